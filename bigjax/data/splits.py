"""Parts of a data set in TensorFlow Datasets' notation, for sources that are not TFDS.

`train`, `train[:80%]`, `[80%:]`, `[10:-200]`, `[:10%]+[90%:]`, and for cross-validation `fold(i,k)` (the i-th of k
parts) and `not_fold(i,k)` (the rest), or `train.fold(i,k)` where there are several splits. Percentages round to the
nearest example as TFDS does (https://www.tensorflow.org/datasets/splits). With a seed, the parts are cut out of a fixed
permutation.
"""

import dataclasses
import re

import numpy as np
from jaxtyping import Int64

from bigjax.data import order
from bigjax.errors import UserError, shown, suggest

_SLICE = re.compile(r"(?P<name>[A-Za-z_]\w*)?(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_FOLD = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)\.)?(?P<kind>fold|not_fold)\((?P<index>\d+),(?P<count>\d+)\)")


@dataclasses.dataclass(frozen=True)
class Subset:
  """Some of `size` examples: ranges of their ids, or of a permutation of these when there is a seed."""

  size: int
  ranges: tuple[tuple[int, int], ...]
  seed: int | None = None

  def __len__(self) -> int:
    return sum(stop - start for start, stop in self.ranges)

  def rows(self) -> slice | Int64[np.ndarray, " rows"]:
    """Returns what picks these examples out of an array of all: a slice where that is enough, else their indices."""
    if self.seed is None and len(self.ranges) == 1:
      return slice(*self.ranges[0])
    indices = np.concatenate([np.arange(start, stop) for start, stop in self.ranges])
    return indices if self.seed is None else order.permute(indices, self.size, self.seed)


def parse(split: str, sizes: dict[str, int], seed: int | None = None) -> tuple[str, Subset]:
  """Returns the name of the split and the examples of it that `split` stands for.

  Args:
    split: Slices in TFDS's notation, joined by "+" where there are several. The name may be left out if there is one.
    sizes: Number of examples of each named split there is.
    seed: Cuts the slices out of this permutation of the examples; folds are always shuffled, by seed 0 if None.

  Raises:
    UserError: The notation is not understood, a name is unknown, or a slice is empty or reaches past the end.
  """
  text = re.sub(r"\s", "", split)
  if fold := _FOLD.fullmatch(text):
    name = _name(fold["name"], split, sizes)
    return name, Subset(sizes[name], _fold(fold, split, sizes[name]), seed or 0)
  parts = [_SLICE.fullmatch(part) for part in text.split("+")]
  if not all(part and part[0] for part in parts):
    examples = "'train', 'train[:80%]', '[100:200]', '[:10%]+[90%:]', 'fold(0,5)' or 'not_fold(0,5)'"
    raise UserError(f"split={shown(split)} is not understood; it looks like {examples}.")
  names = {_name(part["name"], split, sizes) for part in parts}
  if len(names) > 1:
    raise UserError(f"split={split!r}: slices of {' and '.join(sorted(names))} can't be joined; use a mixture.")
  (name,) = names
  ranges = []
  for part in parts:
    start, stop = _range(part, split, sizes[name])
    if any(start < other_stop and other_start < stop for other_start, other_stop in ranges):
      raise UserError(f"split={split!r} has some of the examples {start} to {stop} twice.")
    ranges.append((start, stop))
  return name, Subset(sizes[name], tuple(ranges), seed)


def _name(name, split, sizes):
  if name is None:
    if len(sizes) > 1:
      raise UserError(f"split={split!r} doesn't say of which split: {', '.join(sizes)}.")
    return next(iter(sizes))
  if name not in sizes:
    raise UserError(f"split={split!r}: there is no split {name!r}.{suggest(name, sizes)}")
  return name


def _range(part, split, size):
  start, stop = _boundary(part["start"], 0, size), _boundary(part["stop"], size, size)
  if not 0 <= start <= stop <= size:
    raise UserError(f"split={split!r} asks for the examples {start} to {stop}; there are {size}.")
  if start == stop:
    raise UserError(f"split={split!r} has no examples: it goes from {start} to {stop} of {size}.")
  return start, stop


def _boundary(text, default, size):
  if text is None:
    return default
  value = round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)
  return value + size if text.startswith("-") else value


def _fold(fold, split, size):
  index, count = int(fold["index"]), int(fold["count"])
  if not (2 <= count <= size and index < count):
    raise UserError(f"split={split!r}: the fold must be below the number of folds, and that from 2 to {size}.")
  start, stop = index * size // count, (index + 1) * size // count
  ranges = ((start, stop),) if fold["kind"] == "fold" else ((0, start), (stop, size))
  return tuple(r for r in ranges if r[0] < r[1])
