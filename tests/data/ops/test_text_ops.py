import json

import numpy as np
import pytest
import tokenizers as lib

from bigjax.data import ops, order
from bigjax.errors import UserError

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", "##ing", "mat", "on", "."]
IDS = {name: i for i, name in enumerate(WORDS)}
MASK = IDS["[MASK]"]


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
  folder = tmp_path_factory.mktemp("wordpiece")
  tokenizer = lib.Tokenizer(lib.models.WordPiece(IDS, unk_token="[PAD]"))
  tokenizer.pre_tokenizer = lib.pre_tokenizers.BertPreTokenizer()
  tokenizer.add_special_tokens(WORDS[:4])
  tokenizer.save(str(folder / "tokenizer.json"))
  return str(folder)


def masked(text, rows, keys=None, **features):
  (op,) = ops.parse(text)
  keys = order.example_keys(0, np.zeros(len(rows), np.int64), np.arange(len(rows))) if keys is None else keys
  return op.apply({"tokens": rows, **features}, keys)


def sentence(rows, words="[CLS] the cat ##s sat on the mat . [SEP]"):
  return np.tile(np.array([IDS[word] for word in words.split()], np.int32), (rows, 1))


def test_of_the_chosen_tokens_eight_in_ten_are_hidden_and_one_in_ten_is_another(wordpiece):
  rows = sentence(20_000)
  batch = masked(f"mask_tokens({wordpiece!r}, probability=0.2)", rows)
  chosen = batch["token_mask"] > 0
  np.testing.assert_array_equal(batch["target"], rows)
  np.testing.assert_array_equal(batch["tokens"][~chosen], rows[~chosen])
  assert not chosen[:, [0, -1]].any()  # [CLS] and [SEP].
  assert chosen[:, 1:-1].mean() == pytest.approx(0.2, abs=0.005)
  seen, were = batch["tokens"][chosen], rows[chosen]
  # A random token is the mask or the token itself once in 12 each.
  assert (seen == MASK).mean() == pytest.approx(0.8 + 0.1 / 12, abs=0.01)
  assert (seen == were).mean() == pytest.approx(0.1 + 0.1 / 12, abs=0.01)
  others = seen[(seen != MASK) & (seen != were)]
  assert set(others) == set(range(12)) - {MASK}
  assert batch["tokens"].dtype == np.int32 and batch["token_mask"].dtype == np.float32


def test_an_example_is_hidden_by_its_key_alone(wordpiece):
  text = f"mask_tokens({wordpiece!r})"
  keys = order.example_keys(0, np.zeros(64, np.int64), np.arange(64))
  whole = masked(text, sentence(64), keys)["tokens"]
  np.testing.assert_array_equal(masked(text, sentence(64)[40:50], keys[40:50])["tokens"], whole[40:50])
  assert (masked(text, sentence(64), keys + np.uint64(1))["tokens"] != whole).any()


def test_words_are_hidden_whole(wordpiece):
  rows = sentence(5000, "[CLS] the cat ##s ##ing mat ##s sat [SEP]")
  chosen = masked(f"mask_tokens({wordpiece!r}, 0.3, unit='word')", rows)["token_mask"]
  for word in ([2, 3, 4], [5, 6]):
    assert (chosen[:, word] == chosen[:, word[:1]]).all()
  assert (chosen[:, 2] != chosen[:, 1]).any() and (chosen[:, 2] != chosen[:, 5]).any()
  assert chosen[:, 1:-1].mean() == pytest.approx(0.3, abs=0.02)


def test_words_of_byte_level_vocabularies_begin_with_a_space(tmp_path):
  letters = sorted(lib.pre_tokenizers.ByteLevel.alphabet())
  names = ["<mask>", "Ġa", "Ġb", "c", "d", "Ċ"] * 1 + [f"Ġ{letter}{letter}" for letter in "abcdefghijklmno"]
  vocab = {name: i for i, name in enumerate(dict.fromkeys(names + letters))}
  content = lib.Tokenizer(lib.models.BPE(vocab, []))
  content.add_special_tokens(["<mask>"])
  content.save(str(tmp_path / "tokenizer.json"))
  rows = np.tile(np.array([vocab[name] for name in ("c", "Ġa", "c", "d", "Ċ", "c", "Ġb", "d")], np.int32), (500, 1))
  chosen = masked(f"mask_tokens({str(tmp_path)!r}, 0.5, unit='word')", rows)["token_mask"]
  assert [(chosen[:, i] == chosen[:, i - 1]).all() for i in range(1, 8)] == [0, 1, 1, 0, 1, 0, 1]


def test_padding_of_packed_rows_is_not_hidden(wordpiece):
  segments = np.ones((300, 10), np.int32)
  segments[:, 5:] = 0
  batch = masked(f"mask_tokens({wordpiece!r}, 0.9)", sentence(300), segments=segments)
  assert batch["token_mask"][:, 1:5].any() and not batch["token_mask"][:, 5:].any()


def test_mistakes_are_told(wordpiece, tmp_path):
  with pytest.raises(UserError, match=r"mask_tokens.*probability is the part"):
    ops.parse(f"mask_tokens({wordpiece!r}, 1.5)")
  with pytest.raises(UserError, match=r"the tokenizer 'byte' has no mask token, such as \[MASK\]"):
    ops.parse("mask_tokens('byte')")
  with pytest.raises(UserError, match=r"'tokens' goes up to 99, and the tokenizer .* has 12 tokens"):
    masked(f"mask_tokens({wordpiece!r})", np.full((1, 4), 99))
  (tmp_path / "vocabulary.json").write_text(json.dumps({"characters": "ab"}))
  with pytest.raises(UserError, match=r"no mask token"):
    ops.parse(f"mask_tokens({str(tmp_path)!r})")
