"""One number an example, or several."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array

from bigjax.errors import UserError
from bigjax.sums import Sums
from bigjax.tasks import features


@dataclasses.dataclass(frozen=True)
class Regression:
  """Learns the numbers in `target` from `inputs`; made by `make`."""

  penalty: str
  delta: float
  inputs: str
  target: str

  def loss(self, module, batch: Mapping, *, key: Array) -> Sums:
    """Returns the loss, squared error and absolute error summed over the unmasked examples of `batch`.

    `target` is [batch] or [batch, outputs]; an example's loss is the mean over its outputs.
    """
    outputs = module(features.read(batch, self.inputs, "inputs"), key=key, train=True).astype(jnp.float32)
    target = features.read(batch, self.target, "target").astype(jnp.float32)
    # Rows against rows: [batch, 1] less [batch] would broadcast to [batch, batch].
    outputs, target = (x[:, None] if x.ndim == 1 else x for x in (outputs, target))
    if outputs.shape != target.shape:
      raise UserError(
        f"config.task.target: {self.target!r} has shape {target.shape} and the model's outputs {outputs.shape}; "
        "give the model as many outputs as there are targets"
      )
    error = outputs - target
    squared, absolute = jnp.square(error), jnp.abs(error)
    if self.penalty == "huber":
      loss = optax.huber_loss(outputs, target, delta=self.delta)
    else:
      loss = squared if self.penalty == "squared" else absolute
    return Sums.of(loss.mean(-1), weight=features.mask(batch, outputs), mse=squared.mean(-1), mae=absolute.mean(-1))

  def predict(self, module, batch: Mapping) -> dict[str, Array]:
    """Returns `logits`, the predicted numbers [batch, outputs], and `features` where the module has them."""
    return features.outputs(module, features.read(batch, self.inputs, "inputs"))


def make(
  *,
  loss: Literal["squared", "absolute", "huber"] = "squared",
  delta: float = 1.0,
  inputs: str = "x",
  target: str = "target",
) -> Regression:
  """Learns numbers.

  Args:
    loss: "squared" error, "absolute" error, or "huber": half the squared error up to `delta`, and linear from there
      (Huber 1964, https://doi.org/10.1214/aoms/1177703732).
    delta: Where huber's loss turns linear, in units of the target.
    inputs: Feature of the batch that the model is given.
    target: Feature of the batch that holds the numbers, [batch] or [batch, outputs].
  """
  if not delta > 0:
    raise UserError(f"config.task.delta: {delta} is not above 0")
  return Regression(loss, delta, inputs, target)
