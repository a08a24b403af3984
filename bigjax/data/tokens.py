"""Rows of tokens for language models, out of a token store: windows of the whole, or documents packed.

A row is `block` tokens and the one that follows. Which tokens a row holds is a function of the store, the split and
`block`; so training is one of (seed, step), on any number of hosts. How documents are packed is worked out once and
kept beside the store.
"""

import dataclasses
import hashlib
import json
import zipfile
from typing import Literal

import numpy as np

from bigjax.data import absent, packing, splits, tfrecord, token_store
from bigjax.errors import UserError

_PLAN = 1  # Changes when other rows are made of the same documents.


@dataclasses.dataclass(frozen=True)
class Windows:
  """Runs of tokens, whatever documents they are from."""

  store: token_store.Store
  block: int
  stride: int
  start: int  # First token, and the end.
  stop: int
  bytes_per_token: float  # Mean, of UTF-8: a loss in bits a byte is loss / ln 2 / bytes_per_token.

  @property
  def vocab_size(self) -> int:
    return self.store.vocab_size

  def __len__(self) -> int:
    return (self.stop - self.start - self.block - 1) // self.stride + 1

  def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    tokens = np.empty((len(ids), self.block + 1), np.int32)
    for row, i in zip(tokens, ids.tolist()):
      self.store.read(self.start + i * self.stride, row)
    return {"tokens": tokens}

  def spans(self, ids: np.ndarray) -> list[str]:
    """Returns which tokens of the store each row is, in words."""
    return [f"tokens {s:,} to {s + self.block:,}" for s in (self.start + ids * self.stride).tolist()]


@dataclasses.dataclass(frozen=True)
class Packed:
  """Rows of documents, with the number of each in its row and the places in it."""

  store: token_store.Store
  packing: packing.Packing
  bytes_per_token: float

  @property
  def vocab_size(self) -> int:
    return self.store.vocab_size

  @property
  def efficiency(self) -> float:
    """The part of all places that hold a token."""
    return self.packing.efficiency

  def __len__(self) -> int:
    return len(self.packing)

  def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    plan = self.packing
    tokens, segments, positions = np.zeros((3, len(ids), plan.room), np.int32)
    for row, i in enumerate(ids.tolist()):
      pieces, place = range(plan.rows[i], plan.rows[i + 1]), 0
      for segment, piece in enumerate(pieces, 1):
        length = int(plan.lengths[piece])
        there = slice(place, place + length)
        self.store.read(int(plan.starts[piece]), tokens[row, there])
        segments[row, there] = segment
        positions[row, there] = np.arange(length)
        place += length
    return {"tokens": tokens, "segments": segments, "positions": positions}

  def spans(self, ids: np.ndarray) -> list[str]:
    """Returns which tokens of the store each row is, in words."""
    return self.packing.spans(ids)


def make(
  path: str,
  *,
  block: int,
  documents: Literal["joined", "packed"] = "joined",
  stride: int | None = None,
  split: str = "train",
  split_seed: int | None = None,
  vocab_size: int | None = None,
) -> Windows | Packed:
  """Reads a token store.

  Args:
    path: The folder `bigjax data tokenize` made.
    block: Tokens a row, to which the next is added: `tokens` is int32 [batch, block + 1].
    documents: `joined`: a row is a window of all documents after another. `packed`: of whole documents, the long ones
      split; `segments` and `positions`, int32 [batch, block + 1], number the documents of a row from 1 (0 is empty)
      and the tokens of each from 0, so that a model can keep them apart.
    stride: From the start of one window to the next; `block`, which predicts every token once, if None.
    split: Which documents, in TFDS's notation: `[:99%]`, `[99%:]`; in one piece where they are joined.
    split_seed: Cuts the split out of this permutation of the documents; for packed ones.
    vocab_size: The model's, to be told here if it isn't the store's.

  Raises:
    UserError: There is no such store, it is damaged, or the split makes no row.
  """
  store = token_store.open_store(path)
  if block < 1 or (stride is not None and stride < 1):
    raise UserError(f"block={block} and stride={stride} must be 1 or more.")
  if vocab_size is not None:
    store.tokenizer.check_model(vocab_size, "vocab_size")
  subset = splits.parse(split, {"train": store.num_documents}, split_seed)[1]
  if documents == "packed":
    if stride is not None:
      raise UserError(f"stride={stride} is for joined documents; packed ones have none. Leave it out.")
    return _packed(store, block, split, subset)
  if subset.seed is not None or len(subset.ranges) > 1:
    raise UserError(f"split={split!r}: joined documents are split in one piece, such as [:99%]; or pack them.")
  first, last = subset.ranges[0]
  if (first, last) == (0, store.num_documents):  # No need to read where they begin.
    start, stop, bytes_per_token = 0, store.num_tokens, store.bytes_per_token
  else:
    (start, start_bytes), (stop, stop_bytes) = store.documents[[first, last]].tolist()
    bytes_per_token = (stop_bytes - start_bytes) / max(1, stop - start)
  if stop - start < block + 1:
    raise UserError(f"block={block}: split={split!r} has {stop - start:,} tokens, and a window takes {block + 1:,}.")
  return Windows(store, block, block if stride is None else stride, start, stop, bytes_per_token)


def stand_in(path: str, *, block: int, documents: str = "joined", **_) -> absent.Absent | None:
  """Returns rows of the same shapes where there is no store at `path`, for a plan; None where there is one."""
  names = ("tokens", "segments", "positions") if documents == "packed" else ("tokens",)
  return absent.Absent(dict.fromkeys(names, ((block + 1,), "int32"))) if absent.files(path) else None


def _packed(store, block, split, subset):
  begins, rows = store.documents, subset.rows()
  sizes = np.diff(begins, axis=0)[rows]
  identity = [_PLAN, store.index["shards"], block, subset.size, subset.ranges, subset.seed]
  key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
  file = store.path / f"packing-{key}.npz"
  plan = _kept(file, block + 1)
  if plan is None:
    plan = packing.pack(begins[:-1][rows][:, 0], sizes[:, 0], block + 1)
    tfrecord.write_arrays(file, rows=plan.rows, starts=plan.starts, lengths=plan.lengths)
  if not len(plan):
    raise UserError(f"split={split!r} has no document of two tokens or more.")
  return Packed(store, plan, float(sizes[:, 1].sum() / sizes[:, 0].sum()))


def _kept(file, room):
  """Returns the packing that was worked out before, if there is one and it is whole."""
  if not file.is_file():
    return None
  try:
    with open(file, "rb") as data, np.load(data) as arrays:  # Its checksums are looked at.
      return packing.Packing(room, arrays["rows"], arrays["starts"], arrays["lengths"])
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
    return None
