"""A batch that grows: at first some of its rows are examples and the rest padding, of `mask` 0.

Shapes stay, so there is one program. No example is passed over: the stream goes on where the last batch ended, and
where that is follows from the step alone. So batch `step` is a function of (seed, step) as ever, on any number of
hosts.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int64


@dataclasses.dataclass(frozen=True)
class Growth:
  """A batch is `parts` parts, row r of part r % parts; `first` of them are in use at step 0, all from `steps` on."""

  parts: int
  first: int
  steps: int

  def active(self, step: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Returns how many parts are in use."""
    return self.first + np.minimum(step, self.steps) * (self.parts - self.first) // self.steps

  def rows(
    self, step: Int64[np.ndarray, " n"], row: Int64[np.ndarray, " n"], batch_size: int
  ) -> tuple[Int64[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Returns the position in the stream of each row of a batch, and whether it is an example; if not, any position."""
    within, part = np.divmod(row, self.parts)
    active = self.active(step)
    late = np.maximum(step - self.steps, 0)
    before = self._before[np.minimum(step, self.steps)] + late * self.parts
    positions = before * (batch_size // self.parts) + within * active + np.minimum(part, active - 1)
    return positions, part < active

  @functools.cached_property
  def _before(self) -> np.ndarray:
    """Parts in use before each step up to the last of the warm-up."""
    return np.concatenate([[0], np.cumsum(self.active(np.arange(self.steps)))])
