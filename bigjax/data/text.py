"""Windows of text for language models, by character or by byte.

The whole text is held as one array of tokens; an example is `block` of them and the one that follows. The vocabulary
is that of all the files, whatever the split, so that training and evaluation number symbols alike.
"""

import dataclasses
import glob
import os
from typing import Literal

import numpy as np

from bigjax.data import absent, splits
from bigjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Text:
  """The windows of a split of a text."""

  tokens: np.ndarray  # Of the split.
  block: int
  stride: int
  vocab_size: int
  vocabulary: str | None  # Symbol i is token i; None if tokens are bytes.
  bytes_per_token: float  # Mean over the split, UTF-8: a loss in bits a byte is loss / ln 2 / bytes_per_token.

  def __len__(self) -> int:
    return (len(self.tokens) - self.block - 1) // self.stride + 1

  def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    windows = self.tokens[ids[:, None] * self.stride + np.arange(self.block + 1)]
    return {"tokens": windows.astype(np.int32)}

  def spans(self, ids: np.ndarray) -> list[str]:
    """Returns which tokens of the split each window is, in words."""
    return [f"tokens {s:,} to {s + self.block:,}" for s in (ids * self.stride).tolist()]


def make(
  path: str | tuple[str, ...],
  *,
  block: int,
  tokenizer: Literal["char", "byte"] = "char",
  stride: int = 1,
  split: str = "train",
  encoding: str = "utf-8",
  hint: str = "",
) -> Text:
  """Reads text files into windows of tokens.

  Args:
    path: A file, a pattern such as `books/*.txt`, or several; they are joined in this order, a pattern's by name.
    block: Tokens a window, to which the next token is added: `tokens` is int32 [batch, block + 1].
    tokenizer: `char`: the sorted symbols of the text are the vocabulary. `byte`: the 256 bytes are.
    stride: From the start of one window to the next. 1 takes every start there is, as nanoGPT trains; `block` counts
      every token once, to evaluate (but for the last few that fill no window).
    split: All characters (`train`) or some in a row: `[:90%]`, `[90%:]`.
    encoding: Of the files.
    hint: Where the text can be had, for the error when it isn't there.
  """
  if block < 1 or stride < 1:
    raise UserError(f"block={block} and stride={stride} must be 1 or more.")
  text = "".join(_read(file, encoding) for file in _files((path,) if isinstance(path, str) else path, hint))
  if not text:
    raise UserError(f"path: {path!r} holds no text.")
  subset = splits.parse(split, {"train": len(text)})[1]
  if subset.seed is not None or len(subset.ranges) > 1:
    raise UserError(f"split={split!r}: a text is split in one piece, such as [:90%] or [90%:].")
  part = text[subset.rows()]
  encoded = part.encode()
  if tokenizer == "byte":
    tokens, vocabulary = np.frombuffer(encoded, np.uint8), None
  else:
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    symbols = np.flatnonzero(np.bincount(points))
    number = np.zeros(symbols[-1] + 1, np.min_scalar_type(len(symbols)))
    number[symbols] = np.arange(len(symbols))
    tokens, vocabulary = number[points[subset.rows()]], "".join(map(chr, symbols))
  if len(tokens) < block + 1:
    raise UserError(f"block={block}: split={split!r} has {len(tokens)} tokens, and a window takes {block + 1}.")
  vocab_size = 256 if vocabulary is None else len(vocabulary)
  return Text(tokens, block, stride, vocab_size, vocabulary, len(encoded) / len(tokens))


def stand_in(path: str | tuple[str, ...], *, block: int, **_) -> absent.Absent | None:
  """Returns windows of the same shapes where the files aren't here, for a plan; None where they are."""
  patterns = (path,) if isinstance(path, str) else path
  missing = absent.files(p for p in patterns if not glob.has_magic(p))
  return absent.Absent({"tokens": ((block + 1,), "int32")}) if missing else None


def _files(paths, hint):
  for path in paths:
    path = os.path.expanduser(path)
    files = [path] if os.path.isfile(path) else sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
    if not files:
      raise UserError(f"path: there is no file {path!r}{': ' + hint if hint else '.'}")
    yield from files


def _read(file, encoding):
  try:
    with open(file, encoding=encoding) as f:
      return f.read()
  except UnicodeDecodeError as e:
    raise UserError(f"path: {file!r} is not {encoding} at byte {e.start}; set encoding, such as 'latin-1'.") from e
  except LookupError as e:
    raise UserError(f"encoding: {encoding!r} is none that Python knows.") from e
