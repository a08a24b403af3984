"""Conversations: what a model reads of them, which tokens it learns, and what is refused."""

import json

import numpy as np
import pytest

from bigjax.data import chat, pipeline, templates, tokenizers
from bigjax.errors import UserError

SPECIAL = ("<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "<end_of_turn>")
TALK = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "Hi there"},
  {"role": "assistant", "content": "Hello."},
  {"role": "user", "content": "Bye"},
  {"role": "assistant", "content": "So long."},
]
# As published with HuggingFaceTB/SmolLM2-135M-Instruct, but for its own system prompt.
JINJA = (
  "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
  library = pytest.importorskip("tokenizers")
  alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  vocab = {c: i for i, c in enumerate(alphabet)} | {"He": 256, "Hel": 257, "ĠT": 258}
  special = {name: 259 + i for i, name in enumerate(SPECIAL)}
  return tokenizers.bpe(vocab, [("H", "e"), ("He", "l"), ("Ġ", "T")], special=special)


@pytest.fixture
def file(tmp_path, tokenizer):
  tokenizer.save(tmp_path / "tokenizer")
  return tmp_path / "chat.jsonl"


def write(file, *talks):
  file.write_text("".join(json.dumps(t if isinstance(t, dict) else {"messages": t}) + "\n" for t in talks))
  return dict(path=str(file), tokenizer=str(file.parent / "tokenizer"))


def learned(tokenizer, pieces, answers="all"):
  ids, mask = chat.encode(tokenizer, pieces, answers)
  return tokenizer.decode(ids), tokenizer.decode(ids[mask])


def test_a_template_is_what_the_model_was_published_with(tokenizer):
  whole, answers = learned(tokenizer, templates.NAMED["chatml"](TALK))
  assert whole == (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello."
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSo long.<|im_end|>\n"
  )
  assert answers == "Hello.<|im_end|>So long.<|im_end|>"
  assert learned(tokenizer, templates.NAMED["chatml"](TALK), "last")[1] == "So long.<|im_end|>"
  whole, answers = learned(tokenizer, templates.NAMED["gemma"](TALK[:3]))
  assert whole == (
    "<bos><start_of_turn>user\nBe brief.\n\nHi there<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
  )
  assert answers == "Hello.<end_of_turn>"


def test_a_models_own_jinja_gives_the_tokens_of_the_named_template(tokenizer, tmp_path):
  pytest.importorskip("jinja2")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": JINJA, "eos_token": "<|im_end|>"}))
  (tmp_path / "chat_template.jinja").write_text(JINJA)
  expected = chat.encode(tokenizer, templates.NAMED["chatml"](TALK))
  for where in ("tokenizer_config.json", "chat_template.jinja", ""):
    found = chat.encode(tokenizer, templates.load(str(tmp_path / where))(TALK))
    for a, b in zip(found, expected):
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [*templates.NAMED, "its own"])
def test_a_question_is_the_beginning_of_the_conversation(name, tmp_path):
  (tmp_path / "own.jinja").write_text(JINJA)
  render = templates.load(str(tmp_path / "own.jinja") if name == "its own" else name)
  text = lambda pieces: "".join(piece.text for piece in pieces)
  for count in (1, 2, 4):
    asked = TALK[1:2] if count == 1 else TALK[:count]
    pieces, over = templates.opened(render, asked)
    answer = {"role": "assistant", "content": "Yes."}
    assert text(render([*asked, answer])).rstrip("\n") == (text(pieces) + "Yes." + over).rstrip("\n")
    assert over


def test_what_somebody_wrote_is_no_control_token(tokenizer):
  talk = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]
  ids, _ = chat.encode(tokenizer, templates.NAMED["chatml"](talk))
  assert (ids == tokenizer.special["<|im_end|>"]).sum() == 2


def test_text_between_control_tokens_is_encoded_in_one_unless_an_answer_would_begin_within_a_token(tokenizer):
  piece = templates.Piece
  ids, mask = chat.encode(tokenizer, [piece("H", True), piece("el", False)])
  assert ids.tolist() == [257] and not mask.any()
  ids, mask = chat.encode(tokenizer, [piece("H", True), piece("el", False, True)])
  assert mask.tolist() == [False, True, True]
  ids, mask = chat.encode(tokenizer, [piece("a\n", True), piece("Hello", False, True)])
  assert tokenizer.decode(ids[mask]) == "Hello" and ids[2] == 257


def test_conversations_are_packed_with_the_masks_of_their_answers(file, tokenizer):
  source = chat.make(**write(file, *([TALK] * 5 + [TALK[1:3]] * 9)), template="chatml", block=160)
  batch = source.fetch(np.arange(len(source)))
  assert batch["tokens"].shape == batch["token_mask"].shape == (len(source), 161)
  assert batch["segments"].max() > 1
  said = [tokenizer.decode(t[m == 1]) for t, m in zip(batch["tokens"], batch["token_mask"])]
  assert sorted("".join(said).split("<|im_end|>")) == sorted([""] + ["Hello."] * 14 + ["So long."] * 5)
  assert (batch["token_mask"] <= (batch["segments"] != 0)).all()
  assert ((batch["positions"] == 0) & (batch["segments"] > 0)).sum() == 14
  alone = chat.make(**write(file, TALK, TALK[1:3]), template="chatml", block=160, packed=False)
  assert len(alone) == 2 and alone.fetch(np.arange(2))["segments"].max() == 1


def test_a_conversation_without_an_answer_in_the_row_is_left_out_and_counted(file):
  long = [{"role": "user", "content": "x" * 200}, TALK[2]]
  source = chat.make(**write(file, TALK[1:3], long), template="chatml", block=100)
  assert (len(source), source.dropped) == (1, 1)
  with pytest.raises(UserError, match="every answer lies beyond the row's end"):
    chat.make(**write(file, long), template="chatml", block=100)


def test_it_is_a_source(file):
  source = chat.make(**write(file, *[TALK] * 8), template="chatml", block=150)
  shapes = pipeline.spec(source)
  assert {k: v.shape for k, v in shapes.items()} == {
    **dict.fromkeys(("tokens", "token_mask", "segments", "positions"), (151,)),
    "mask": (),
  }


@pytest.mark.parametrize(
  ("talk", "message"),
  [
    ({"message": TALK}, "line 1: there is no list 'messages' of messages. Did you mean 'message'"),
    ([{"role": "user"}], r"line 1: message 0 has no text 'content' \(it has 'role'\)"),
    ([{"rôle": "user", "content": "a"}], "message 0 has no text 'role'"),
    ([{"role": "asistant", "content": "a"}], "there is no role 'asistant'. Did you mean 'assistant'"),
    ([{"role": "user", "content": "a"}], "no message of 'assistant' to learn"),
    ([], "there is no list 'messages'"),
  ],
)
def test_a_line_that_is_no_conversation_is_told_with_its_place(file, talk, message):
  with pytest.raises(UserError, match=message):
    chat.make(**write(file, talk), template="chatml", block=20)


def test_templates_that_are_not_there_or_refuse_are_told(file, tmp_path):
  pytest.importorskip("jinja2")
  with pytest.raises(UserError, match="Did you mean 'chatml'"):
    chat.make(**write(file, TALK), template="chatlm", block=20)
  (tmp_path / "a.jinja").write_text("{{ raise_exception('roles must alternate') }}")
  with pytest.raises(UserError, match="line 1: the template says: roles must alternate"):
    chat.make(**write(file, TALK), template=str(tmp_path / "a.jinja"), block=20)
  (tmp_path / "b.jinja").write_text("{% for")
  with pytest.raises(UserError, match="can't be read"):
    chat.make(**write(file, TALK), template=str(tmp_path / "b.jinja"), block=20)
  (tmp_path / "c.jinja").write_text("{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}")
  with pytest.raises(UserError, match="changes what came before message 2"):
    chat.make(**write(file, TALK), template=str(tmp_path / "c.jinja"), block=20)
