"""Documents into rows of one length, with next to nothing left empty.

A document longer than a row is split: full rows, and a rest. Rests and short documents go into rows by best fit, the
longest first: each into the row it fills best. Lengths are small whole numbers, so rows are kept by the room
they have left, and the best is the lowest bit of a number: a microsecond a document, and 99% and more full, as in
"Fewer Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830.

The next piece of a split document begins with the last token of the one before, so that every token but a document's
first is predicted, once.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64


@dataclasses.dataclass(frozen=True)
class Packing:
  """Which pieces of documents make up each row."""

  room: int
  rows: Int64[np.ndarray, " rows_and_one"]  # Where the pieces of each row begin, and of all end.
  starts: Int64[np.ndarray, " pieces"]  # A piece's first token.
  lengths: Int64[np.ndarray, " pieces"]

  def __len__(self) -> int:
    return len(self.rows) - 1

  @property
  def efficiency(self) -> float:
    """The part of all places that hold a token."""
    return float(self.lengths.sum() / (self.room * max(1, len(self))))

  def spans(self, ids: Int64[np.ndarray, " batch"]) -> list[str]:
    """Returns which tokens each row holds, in words."""
    pieces = [range(self.rows[i], self.rows[i + 1]) for i in ids]
    ends = self.starts + self.lengths - 1
    return ["tokens " + ", ".join(f"{self.starts[p]:,} to {ends[p]:,}" for p in row) for row in pieces]


def pack(starts: Int64[np.ndarray, " documents"], lengths: Int64[np.ndarray, " documents"], room: int) -> Packing:
  """Packs documents, each `lengths` tokens from `starts` on, into rows of `room` tokens, 2 or more.

  A document of one token has nothing to predict and is left out. Rows come in the order of their first pieces.
  """
  full = np.maximum(lengths - 1, 0) // (room - 1)
  which = np.repeat(np.arange(len(lengths)), full)
  number = np.arange(len(which)) - np.repeat(np.cumsum(full) - full, full)
  rest = lengths - full * (room - 1)
  short = np.flatnonzero(rest > 1)
  row = _best_fit(rest[short], room)
  piece_starts = np.concatenate([starts[which] + number * (room - 1), starts[short] + full[short] * (room - 1)])
  piece_lengths = np.concatenate([np.full(len(which), room, np.int64), rest[short]])
  # Rows of their own for full pieces, then those that are shared; numbered anew by where they begin.
  row = np.concatenate([np.arange(len(which)), len(which) + row])
  count = int(row.max()) + 1 if len(row) else 0
  begin = np.full(count, np.iinfo(np.int64).max)
  np.minimum.at(begin, row, piece_starts)
  renumbered = np.empty(count, np.int64)
  renumbered[np.argsort(begin, kind="stable")] = np.arange(count)
  row = renumbered[row]
  order = np.lexsort((piece_starts, row))
  ends = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=count))]).astype(np.int64)
  return Packing(room, ends, piece_starts[order], piece_lengths[order])


def _best_fit(lengths, room):
  """Returns the row of each length: the longest first, each where it leaves the least."""
  rows = np.empty(len(lengths), np.int64)
  by_room: list[list[int]] = [[] for _ in range(room + 1)]
  there = 0  # Bit r is set if there are rows with room for r.
  count = 0
  order = np.argsort(-lengths, kind="stable")
  for i, length in zip(order.tolist(), lengths[order].tolist()):
    fitting = there >> length
    if fitting:
      left = length + (fitting & -fitting).bit_length() - 1
      row = by_room[left].pop()
      if not by_room[left]:
        there ^= 1 << left
    else:
      left, row, count = room, count, count + 1
    rows[i] = row
    left -= length
    if left > 1:
      by_room[left].append(row)
      there |= 1 << left
  return rows
