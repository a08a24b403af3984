"""Several sources as one, in given proportions that hold within every few thousand examples.

The stream is cut into blocks. Each source has the same number of places in every block, by largest remainder, and a
permutation of (seed, block) says which. So how often a source came before any position is a product, not a
count, and a sum of a few where proportions change on the way: the mixture is as stateless as its parts. Each part goes
through its own epochs.
"""

import dataclasses
from typing import Annotated, Any

import numpy as np

from bigjax.data import order as orders
from bigjax.errors import UserError

_BLOCK = 4096  # Examples, so that a share is exact to 1 in 8192.


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Sources after another by id, among each other in training."""

  sources: tuple[Any, ...]
  counts: np.ndarray  # Places of each source in a block, [stages, sources].
  stages: np.ndarray  # First block of each stage.

  def __len__(self) -> int:
    return sum(map(len, self.sources))

  def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    parts, starts = self._parts(ids), self._starts
    fetched = {p: self.sources[p].fetch(ids[parts == p] - starts[p]) for p in np.unique(parts)}
    batch = {}
    for name, like in next(iter(fetched.values())).items():
      batch[name] = np.empty((len(ids), *like.shape[1:]), like.dtype)
      for part, features in fetched.items():
        batch[name][parts == part] = features[name]
    return batch

  def order(self, positions: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epoch of its source and the id of the example at each position of the training stream."""
    blocks, places = np.divmod(positions, _BLOCK)
    slots = orders.permute(places, _BLOCK, seed, blocks)
    stages = np.searchsorted(self.stages, blocks, side="right") - 1
    ends = np.cumsum(self.counts, axis=1)
    parts = (ends[stages] <= slots[:, None]).sum(axis=1)
    counts = self.counts[stages, parts]
    before = self._before[stages, parts] + (blocks - self.stages[stages]) * counts
    within = before + slots - (ends[stages, parts] - counts)
    epochs, ids = np.empty_like(positions), np.empty_like(positions)
    for part in np.unique(parts):
      chosen, source = parts == part, self.sources[part]
      # Sources of one size must not go in step.
      own_seed = int(orders.fold(np.array([seed & (2**64 - 1)], np.uint64), int(part))[0])
      if hasattr(source, "order"):
        epochs[chosen], own = source.order(within[chosen], own_seed)
      else:
        epochs[chosen], own = orders.shuffled(len(source), within[chosen], own_seed)
      ids[chosen] = own + self._starts[part]
    return epochs, ids

  def spans(self, ids: np.ndarray) -> list[str]:
    """Returns what each row is, in the words of its source."""
    parts, plain = self._parts(ids), lambda ids: [""] * len(ids)
    within = ids - self._starts[parts]
    return [getattr(self.sources[p], "spans", plain)(within[[i]])[0] for i, p in enumerate(parts)]

  def sizes(self) -> list[int]:
    """Returns the sizes of the sources that go through epochs of their own, in the order of their ids."""
    return [size for s in self.sources for size in (s.sizes() if hasattr(s, "sizes") else [len(s)])]

  @property
  def _before(self):
    """Places each source had before each stage."""
    lengths = np.diff(self.stages)[:, None]
    return np.concatenate([np.zeros_like(self.counts[:1]), np.cumsum(self.counts[:-1] * lengths, axis=0)])

  @property
  def _starts(self):
    return np.cumsum([0, *map(len, self.sources)])

  def _parts(self, ids):
    return np.searchsorted(self._starts, ids, side="right") - 1


def make(
  sources: tuple[Annotated[Any, "data"], ...],
  *,
  weights: tuple[float, ...],
  changes: tuple[tuple[int, tuple[float, ...]], ...] = (),
) -> Mixture:
  """Mixes sources.

  Args:
    sources: Each `dict(name=..., ...)` in a config; all must have the same features.
    weights: How much of the stream comes from each, whatever their sizes and sum.
    changes: Other weights from some position of the stream on, in examples, in order: `((2_000_000, (0.5, 0.5)),)`.
      They take effect within the 4,096 examples that follow. A weight may be 0 where it isn't always.
  """
  stages = ((0, weights), *changes)
  for where, (position, given) in zip(["weights", *(f"changes[{i}]" for i in range(len(changes)))], stages):
    if not sources or len(given) != len(sources):
      raise UserError(f"{where}: {len(given)} of them for {len(sources)} sources; give one for each.")
    if min(given) < 0 or max(given) <= 0 or (not changes and min(given) == 0):
      raise UserError(f"{where}: {given} must all be above 0; leave out a source that isn't wanted.")
    if position < 0:
      raise UserError(f"{where}: the position {position} is below 0.")
  starts = np.array([-(-position // _BLOCK) for position, _ in stages], np.int64)
  if (np.diff(starts) < 1).any():
    shown = ", ".join(str(position) for position, _ in changes)
    raise UserError(f"changes: at {shown}; they must come in order, {_BLOCK} examples apart and from the start.")
  for part in range(len(sources)):
    if not any(given[part] for _, given in stages):
      raise UserError(
        f"weights: number {part} (counted from 0) is never above 0; leave out a source that isn't wanted."
      )
  counts = np.stack([_largest_remainder(np.array(given, np.float64)) for _, given in stages])
  for (_, given), count in zip(stages, counts):
    if unseen := [weight for weight, places in zip(given, count) if weight and not places]:
      raise UserError(f"weights: {unseen[0]} of {sum(given)} is less than 1 in {2 * _BLOCK}: none of it would be seen.")
  kinds = [{name: (v.shape[1:], str(v.dtype)) for name, v in s.fetch(np.zeros(1, np.int64)).items()} for s in sources]
  for i, kind in enumerate(kinds):
    if kind != kinds[0]:
      names = sorted(name for name in kind.keys() | kinds[0].keys() if kind.get(name) != kinds[0].get(name))
      shown = "; ".join(f"{name}: {_shown(kinds[0].get(name))} and {_shown(kind.get(name))}" for name in names)
      raise UserError(f"sources: the features of the first and of number {i} (counted from 0) differ: {shown}.")
  return Mixture(tuple(sources), counts, starts)


def _largest_remainder(weights):
  """Returns whole numbers in the proportion of `weights` that add up to a block."""
  shares = weights / weights.sum() * _BLOCK
  counts = np.floor(shares).astype(np.int64)
  counts[np.argsort(counts - shares, kind="stable")[: _BLOCK - counts.sum()]] += 1
  return counts


def _shown(kind):
  return "none" if kind is None else f"{kind[1]}{list(kind[0])}"
