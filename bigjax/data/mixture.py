"""Several sources as one, in given proportions that hold within every few thousand examples.

The stream is cut into blocks. Each source has the same number of places in every block, by largest remainder, and a
permutation of (seed, block) says which. So how often a source came before any position is a product, not a
count: the mixture is as stateless as its parts. Each part goes through its own epochs.
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
  counts: np.ndarray  # Places of each source in a block.

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
    ends = np.cumsum(self.counts)
    parts = np.searchsorted(ends, slots, side="right")
    within = blocks * self.counts[parts] + slots - (ends - self.counts)[parts]
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

  @property
  def _starts(self):
    return np.cumsum([0, *map(len, self.sources)])

  def _parts(self, ids):
    return np.searchsorted(self._starts, ids, side="right") - 1


def make(sources: tuple[Annotated[Any, "data"], ...], *, weights: tuple[float, ...]) -> Mixture:
  """Mixes sources.

  Args:
    sources: Each `dict(name=..., ...)` in a config; all must have the same features.
    weights: How much of the stream comes from each, whatever their sizes and sum.
  """
  if not sources or len(weights) != len(sources):
    raise UserError(f"weights: {len(weights)} of them for {len(sources)} sources; give one for each.")
  if min(weights) <= 0:
    raise UserError(f"weights: {weights} must all be above 0; leave out a source that isn't wanted.")
  counts = _largest_remainder(np.array(weights, np.float64))
  if counts.min() == 0:
    part = int(counts.argmin())
    raise UserError(
      f"weights: {weights[part]} of {sum(weights)} is less than 1 in {2 * _BLOCK}: none of it would be seen."
    )
  kinds = [{name: (v.shape[1:], str(v.dtype)) for name, v in s.fetch(np.zeros(1, np.int64)).items()} for s in sources]
  for i, kind in enumerate(kinds):
    if kind != kinds[0]:
      names = sorted(name for name in kind.keys() | kinds[0].keys() if kind.get(name) != kinds[0].get(name))
      shown = "; ".join(f"{name}: {_shown(kinds[0].get(name))} and {_shown(kind.get(name))}" for name in names)
      raise UserError(f"sources: the features of the first and of number {i} (counted from 0) differ: {shown}.")
  return Mixture(tuple(sources), counts)


def _largest_remainder(weights):
  """Returns whole numbers in the proportion of `weights` that add up to a block."""
  shares = weights / weights.sum() * _BLOCK
  counts = np.floor(shares).astype(np.int64)
  counts[np.argsort(counts - shares, kind="stable")[: _BLOCK - counts.sum()]] += 1
  return counts


def _shown(kind):
  return "none" if kind is None else f"{kind[1]}{list(kind[0])}"
