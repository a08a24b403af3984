import math

import numpy as np
import pytest

from bigjax.data import text
from bigjax.errors import UserError


def write(path, content, encoding="utf-8"):
  path.write_bytes(content.encode(encoding))
  return str(path)


def decoded(source, ids):
  return ["".join(source.vocabulary[i] for i in row) for row in source.fetch(np.array(ids))["tokens"]]


def test_the_vocabulary_is_the_sorted_symbols_as_in_nanogpt(tmp_path):
  source = text.make(write(tmp_path / "t.txt", "hello world"), block=4)
  assert source.vocabulary == " dehlorw" and source.vocab_size == 8
  tokens = source.fetch(np.array([0, 6]))["tokens"]
  assert tokens.dtype == np.int32
  assert tokens.tolist() == [[3, 2, 4, 4, 5], [7, 5, 6, 4, 1]]
  assert len(source) == 7  # 11 symbols hold 7 runs of 5.


def test_every_start_is_an_example_with_stride_one_and_every_token_is_predicted_once_with_stride_block(tmp_path):
  content = "abcdefghijklm"
  path = write(tmp_path / "t.txt", content)
  source = text.make(path, block=3)
  assert decoded(source, range(len(source))) == [content[i : i + 4] for i in range(10)]
  source = text.make(path, block=3, stride=3)
  windows = decoded(source, range(len(source)))
  assert windows == ["abcd", "defg", "ghij", "jklm"]
  assert "".join(w[1:] for w in windows) == content[1:]
  assert len(text.make(path, block=12, stride=12)) == 1


def test_splits_share_the_vocabulary_and_cut_the_text_once(tmp_path):
  path = write(tmp_path / "t.txt", "aaaaaaaabbbbbbbbcccc")
  train, test = (text.make(path, block=2, stride=2, split=s) for s in ("[:80%]", "[80%:]"))
  assert train.vocabulary == test.vocabulary == "abc"
  assert decoded(train, [0, len(train) - 1]) == ["aaa", "bbb"]
  assert decoded(test, [0]) == ["ccc"]


def test_bytes_are_tokens_of_their_own(tmp_path):
  source = text.make(write(tmp_path / "t.txt", "né€"), block=5, tokenizer="byte")
  assert source.fetch(np.array([0]))["tokens"].tolist() == [list("né€".encode())]
  assert (source.vocab_size, source.vocabulary, source.bytes_per_token) == (256, None, 1.0)


def test_bytes_per_token_turn_a_loss_a_symbol_into_bits_a_byte(tmp_path):
  source = text.make(write(tmp_path / "t.txt", "né€x" * 4), block=2)
  assert source.bytes_per_token == 7 / 4
  uniform = math.log2(source.vocab_size) / source.bytes_per_token
  assert uniform == 8 / 7


def test_a_pattern_joins_files_by_name(tmp_path):
  for name, content in [("b", "cd"), ("a", "ab")]:
    write(tmp_path / f"{name}.txt", content)
  assert decoded(text.make(str(tmp_path / "*.txt"), block=3), [0]) == ["abcd"]
  both = tuple(str(tmp_path / f"{name}.txt") for name in "ba")
  assert decoded(text.make(both, block=3), [0]) == ["cdab"]


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (dict(block=11), r"block=11: split='train' has 11 tokens, and a window takes 12"),
    (dict(block=0), r"must be 1 or more"),
    (dict(block=2, split="fold(0,5)"), r"in one piece"),
    (dict(block=2, split="[:2]+[5:]"), r"in one piece"),
    (dict(block=2, encoding="utf8000"), r"encoding: 'utf8000' is none"),
  ],
)
def test_a_text_that_gives_no_windows_says_why(tmp_path, kwargs, message):
  with pytest.raises(UserError, match=message):
    text.make(write(tmp_path / "t.txt", "hello world"), **kwargs)


def test_files_that_can_not_be_read_say_so(tmp_path):
  with pytest.raises(UserError, match=r"no file .*x\.txt': see github karpathy/char-rnn"):
    text.make(str(tmp_path / "x.txt"), block=2, hint="see github karpathy/char-rnn.")
  with pytest.raises(UserError, match=r"is not utf-8 at byte 2; set encoding, such as 'latin-1'"):
    text.make(write(tmp_path / "l.txt", "olé olé", "latin-1"), block=2)
  assert decoded(text.make(str(tmp_path / "l.txt"), block=2, encoding="latin-1"), [0]) == ["olé"]
