"""Tokenizers are compared with the libraries themselves, on vocabularies small enough to read."""

import base64
import itertools
import json
import re

import numpy as np
import pytest
import tokenizers as lib

from bigjax.data import documents, tokenizers
from bigjax.errors import UserError

TEXT = (
  "the cat sat on the mat, the cat's hat; 12345 naïve cafés\n\n  the end.\nthe the theta, a catalogue of hats and mats"
)


@pytest.fixture(scope="module")
def trained():
  return tokenizers.train([TEXT] * 3, 300)


def ids(tokenizer, text, **kwargs):
  return tokenizer.encode([text], **kwargs)[0].tolist()


def hugging_face(tmp_path, trained):
  trained.save(tmp_path / "hf")
  return tokenizers.load(str(tmp_path / "hf" / "tokenizer.json"))


def gpt2(tmp_path, trained, names=("vocab.json", "merges.txt")):
  model = json.loads(trained.files()["tokenizer.json"])["model"]
  folder = tmp_path / names[0]
  folder.mkdir()
  (folder / names[0]).write_text(json.dumps(model["vocab"]))
  (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
  return folder


def tiktoken_lines(trained):
  """The same vocabulary as ranks: bytes in base64, in the order of the merges."""
  spell = {tokenizers._spelling()(bytes([byte])): byte for byte in range(256)}
  tokens = [name for name in sorted(trained.names(), key=trained.names().get) if name not in trained.special]
  as_bytes = [bytes(spell[letter] for letter in name) for name in tokens]
  return b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(as_bytes))


def test_text_comes_back_from_its_tokens(trained):
  for tokenizer in (trained, tokenizers.load("byte"), tokenizers.characters(TEXT)):
    assert tokenizer.decode(tokenizer.encode([TEXT])[0]) == TEXT
    assert max(ids(tokenizer, TEXT)) < tokenizer.vocab_size
    assert tokenizer.encode([TEXT])[0].dtype == np.int32
    assert ids(tokenizer, "") == []


def test_merges_are_made_best_first():
  # "ab" comes before "bc": abc is [ab, c].
  letters = {letter: i for i, letter in enumerate("abc")}
  tokenizer = tokenizers.bpe({**letters, "ab": 3, "bc": 4}, [("a", "b"), ("b", "c")])
  assert ids(tokenizer, "abcbc") == [3, 2, 4]


def test_one_vocabulary_is_the_same_from_every_kind_of_file(tmp_path, trained):
  (tmp_path / "mine.tiktoken").write_bytes(tiktoken_lines(trained))
  read = {
    "tokenizer.json": hugging_face(tmp_path, trained),
    "its folder": tokenizers.load(str(tmp_path / "hf")),
    "vocab.json": tokenizers.load(str(gpt2(tmp_path, trained) / "vocab.json")),
    "encoder.json": tokenizers.load(str(gpt2(tmp_path, trained, ("encoder.json", "vocab.bpe")) / "vocab.bpe")),
  }
  for tokenizer in read.values():
    assert (ids(tokenizer, TEXT), tokenizer.digest) == (ids(trained, TEXT), trained.digest)
    assert tokenizer.roles == trained.roles == {"eos": 0}
  ranks = tokenizers.load(str(tmp_path / "mine.tiktoken"), "gpt2")
  assert [i + 1 for i in ids(ranks, TEXT)] == ids(trained, TEXT)  # It has no control token in front.
  assert ranks.digest != trained.digest


def by_ranks(ranks, word):
  """tiktoken's algorithm, as its educational module has it."""
  if word in ranks:
    return [ranks[word]]
  parts = [word[i : i + 1] for i in range(len(word))]
  while len(parts) > 1:
    merged = [ranks.get(a + b, 1 << 60) for a, b in itertools.pairwise(parts)]
    best = min(merged)
    if best == 1 << 60:
      break
    at = merged.index(best)
    parts[at : at + 2] = [parts[at] + parts[at + 1]]
  return [ranks[part] for part in parts]


def test_tiktoken_ranks_merge_as_in_tiktoken(tmp_path):
  rng = np.random.default_rng(0)
  words = sorted({bytes(rng.choice(list(b"abc"), rng.integers(2, 6))) for _ in range(60)})
  ranks = {bytes([byte]): byte for byte in range(256)}
  ranks |= {bytes(words[i]): 256 + rank for rank, i in enumerate(rng.permutation(len(words)))}
  lines = b"\n".join(base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items())
  (tmp_path / "x.tiktoken").write_bytes(lines)
  tokenizer = tokenizers.load(str(tmp_path / "x.tiktoken"), r"\w+")
  texts = [bytes(rng.choice(list(b"abc"), 12)) for _ in range(200)]
  assert [t.tolist() for t in tokenizer.encode([t.decode() for t in texts])] == [by_ranks(ranks, t) for t in texts]


def test_the_patterns_are_the_published_ones():
  words = lambda name, text: [
    text[slice(*where)]
    for _, where in lib.pre_tokenizers.Split(lib.Regex(tokenizers.PATTERNS[name]), "isolated").pre_tokenize_str(text)
  ]
  assert words("gpt2", "I'll pay 12345 now!\n\n ok") == ["I", "'ll", " pay", " 12345", " now", "!", "\n\n", " ok"]
  assert words("cl100k", "I'LL pay 12345!\n\nok") == ["I", "'LL", " pay", " ", "123", "45", "!\n\n", "ok"]
  assert words("o200k", "aCamelCase's a/b") == ["a", "Camel", "Case's", " a", "/b"]


def test_what_a_text_says_is_no_control_token_unless_asked_for(trained):
  text = "the<|endoftext|>"
  assert 0 not in ids(trained, text)
  assert trained.decode(ids(trained, text)) == text
  assert ids(trained, text, special=True) == [*ids(trained, "the"), 0]


def test_training_is_a_function_of_the_text_in_any_order(trained):
  assert trained.vocab_size == 300
  assert tokenizers.train([TEXT] * 3, 300).digest == trained.digest
  parts = [TEXT, "another text, with other words", "and a third one"]
  assert tokenizers.train(parts, 300).digest == tokenizers.train(parts[::-1], 300).digest
  assert len(ids(trained, TEXT)) < len(TEXT.encode())


def test_sentencepiece_models_are_read_whatever_they_are_called(tmp_path):
  import io

  import sentencepiece

  out = io.BytesIO()
  sentences = iter(re.split(r"[\n,;]+", TEXT) * 5)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=sentences, model_writer=out, vocab_size=60, hard_vocab_limit=False, minloglevel=2
  )
  (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
  tokenizer = tokenizers.load(str(tmp_path))
  reference = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
  assert ids(tokenizer, "the cat sat") == reference.encode("the cat sat")
  assert tokenizer.decode(ids(tokenizer, "the cat sat")) == "the cat sat"
  assert (tokenizer.vocab_size, tokenizer.roles) == (reference.get_piece_size(), {"unk": 0, "bos": 1, "eos": 2})
  assert tokenizer.begin == 1  # As the models are trained whose vocabularies are of this kind.
  (tmp_path / "llama3.model").write_bytes(b"IQ== 0\nIg== 1\n")  # Llama 3's tokenizer.model is tiktoken's.
  assert tokenizers.load(str(tmp_path / "llama3.model"), "gpt2").vocab_size == 2


def test_the_token_that_texts_begin_with_is_that_of_the_file(tmp_path, trained):
  assert trained.begin is None
  library = lib.Tokenizer.from_str(trained.files()["tokenizer.json"].decode())
  library.add_special_tokens(["<s>"])
  library.post_processor = lib.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", library.token_to_id("<s>"))]
  )
  library.save(str(tmp_path / "tokenizer.json"))
  found = tokenizers.load(str(tmp_path))
  assert found.begin == found.special["<s>"] == found.roles["bos"]
  assert found.encode(["a cat"])[0].tolist() == trained.encode(["a cat"])[0].tolist()
  found.save(tmp_path / "again")
  assert tokenizers.load(str(tmp_path / "again")).begin == found.begin


def test_a_file_with_a_length_of_its_own_does_not_cut_texts(tmp_path, trained):
  inner = lib.Tokenizer.from_str(trained.files()["tokenizer.json"].decode())
  inner.enable_truncation(4)
  inner.enable_padding(length=8)
  inner.save(str(tmp_path / "tokenizer.json"))
  assert ids(tokenizers.load(str(tmp_path)), TEXT) == ids(trained, TEXT)


def test_what_was_saved_is_read_again(tmp_path, trained):
  for i, tokenizer in enumerate((trained, tokenizers.load("byte"), tokenizers.characters(TEXT))):
    tokenizer.save(tmp_path / str(i))
    again = tokenizers.load(str(tmp_path / str(i)))
    assert (again.digest, again.roles, ids(again, "the cat")) == (
      tokenizer.digest,
      tokenizer.roles,
      ids(tokenizer, "the cat"),
    )


def test_bytes_per_token_count_utf_8():
  assert tokenizers.characters("né€").bytes_per_token(["né€", "n"]) == 7 / 4
  assert tokenizers.load("byte").bytes_per_token(["né€"]) == 1


def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(trained):
  text = "\n".join([TEXT, "no-spaces-" * 20, "one two  three\n \nfour!\n/five"] * 4)
  pieces = list(documents.cut(text, 16))
  assert "".join(pieces) == text and len(pieces) > 12
  for tokenizer in (
    trained,
    tokenizers.train([TEXT], 280, pattern="cl100k"),
    tokenizers.train([TEXT], 280, pattern="o200k"),
  ):
    assert np.concatenate(tokenizer.encode(pieces)).tolist() == ids(tokenizer, text)


def test_a_vocabulary_that_is_not_the_models_is_told_with_the_numbers(trained):
  trained.check_model(300)
  trained.check_model(384)  # Padded.
  with pytest.raises(UserError, match=r"config\.model\.vocab_size: the model has 299 tokens .* 300: .* vocab_size=300"):
    trained.check_model(299)
  for far in (600, 50257):
    with pytest.raises(UserError, match="they don't belong together"):
      trained.check_model(far)
  with pytest.raises(UserError, match=r"has 50,257 tokens and the tokenizer \(tokenizers\) 300: they don't belong"):
    trained.check_model(50257)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("tokenizer.json", b'{"model": {"type": "BP', r"tokenizer\.json' can't be read, it may be cut short"),
    ("tokenizer.json", b'{"hello": "x"}', r"is not a tokenizer's file; it holds hello"),
    ("vocab.json", b'{"a": 0}', r"'vocab\.json' needs merges\.txt or vocab\.bpe beside it"),
    ("x.model", b"\x00\x01\x02", r"x\.model' can't be read"),
    ("x.tiktoken", b"IQ== 0\nIg== 1\n", r"of 2 ranks is none that is known: .* cl100k"),
  ],
)
def test_files_that_are_no_tokenizer_say_so(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    tokenizers.load(str(tmp_path / name))


def test_merges_of_another_vocabulary_are_refused(tmp_path, trained):
  folder = gpt2(tmp_path, trained)
  (folder / "merges.txt").write_text("q z\n")
  with pytest.raises(UserError, match=r"'merges\.txt' does not belong to 'vocab\.json': 'qz' is no token"):
    tokenizers.load(str(folder))


def test_other_mistakes_are_told(tmp_path, trained):
  with pytest.raises(UserError, match=r"there is no file '.*nowhere'; it is 'byte'"):
    tokenizers.load(str(tmp_path / "nowhere"))
  with pytest.raises(UserError, match=r"holds none of tokenizer\.json"):
    tokenizers.load(str(tmp_path))
  with pytest.raises(UserError, match=r"'ß' \(U\+00DF\) is not among its \d+ characters"):
    tokenizers.characters(TEXT).encode(["tße"])
  with pytest.raises(UserError, match=r"'😀'"):
    tokenizers.characters("abc").encode(["a😀"])
  with pytest.raises(UserError, match=r"vocab_size=9999: the text has words for \d+ tokens only"):
    tokenizers.train([TEXT], 9999)
  with pytest.raises(UserError, match=r"vocab_size=100 is less than the 256 bytes and 1 control tokens"):
    tokenizers.train([TEXT], 100)
  with pytest.raises(UserError, match=r"eos='<\|end\|>' is not in the vocabulary\. Did you mean '<\|endoftext\|>'"):
    tokenizers.role(trained, "eos", "<|end|>")
