"""How far predicted numbers are from the true ones, over a whole split."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bigjax.errors import UserError
from bigjax.evaluators import totals
from bigjax.evaluators.totals import Moments


@dataclasses.dataclass(frozen=True)
class Regression:
  """Measures squared and absolute errors and R2; made by `make`."""

  predict: Callable
  batches: Callable[[], Iterable[Mapping]]
  per_output: bool
  target: str

  def run(self, state) -> Iterator[tuple[str, float]]:
    """Yields mse, rmse, mae and r2, each the mean over the outputs, and with `per_output` those of each output."""
    found = self._add_up(self.batches(), state)
    mse, mae = (found[k].mean.astype(np.float64) for k in ("squared", "absolute"))
    spread = found["target"].squares.astype(np.float64) / found["count"]
    # As in scikit-learn: targets that are all the same are explained wholly or not at all.
    r2 = np.where(spread > 0, 1 - mse / np.where(spread > 0, spread, 1), np.where(mse == 0, 1.0, 0.0))
    yield "mse", float(mse.mean())
    yield "rmse", math.sqrt(mse.mean())
    yield "mae", float(mae.mean())
    yield "r2", float(r2.mean())
    if self.per_output:
      for k in range(len(mse)):
        yield f"mse/{k}", float(mse[k])
        yield f"rmse/{k}", math.sqrt(mse[k])
        yield f"mae/{k}", float(mae[k])
        yield f"r2/{k}", float(r2[k])

  @functools.cached_property
  def _add_up(self) -> Callable:
    return totals.over_batches(self._measure)

  def _measure(self, state, batch: Mapping) -> dict[str, Array | Moments]:
    outputs = totals.read(self.predict(state, batch), "logits").astype(jnp.float32)
    target = totals.read(batch, self.target, "target").astype(jnp.float32)
    # Rows against rows: [batch, 1] less [batch] would broadcast to [batch, batch].
    outputs, target = (x[:, None] if x.ndim == 1 else x for x in (outputs, target))
    if outputs.shape != target.shape:
      raise UserError(
        f"config.evals: target={self.target!r} has shape {target.shape} and the predictions {outputs.shape}"
      )
    real = totals.read(batch, "mask") != 0
    error = outputs - target
    return {
      "count": real.sum(dtype=jnp.int32),
      "squared": Moments.of(jnp.square(error), real),
      "absolute": Moments.of(jnp.abs(error), real),
      "target": Moments.of(target, real),
    }


def make(
  predict: Callable,
  batches: Callable[[], Iterable[Mapping]],
  *,
  per_output: bool = False,
  target: str = "target",
) -> Regression:
  """Measures mse, rmse, mae and r2 (the coefficient of determination) of predicted numbers.

  With several outputs, each measure is the plain mean of the outputs' own, as in scikit-learn, and rmse the square root
  of that mse.

  Args:
    predict: Function of (state, batch) that returns `logits`, the predicted numbers [batch, outputs].
    batches: Gives the split's batches, with `mask`.
    per_output: Whether to yield each output's measures too, as "mse/0".
    target: Feature of the batch that holds the true numbers.
  """
  return Regression(predict, batches, per_output, target)
