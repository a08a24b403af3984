"""Weighted sums: what a loss or a metric adds up over examples before anything is divided.

A mean over a batch cannot be added to the mean of another batch when padding or packing makes their weights differ;
a sum and a weight can. So tasks return sums and weights, the step divides the global sum by the global weight once,
and one batch of B equals k batches of B/k on any number of devices.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
  """Sums and weights by name, scalars of float32; `loss` is the one that is trained on."""

  # A pytree holds whatever a transformation puts at its leaves (shapes, shardings, None), hence no array types here.
  sums: dict
  weights: dict

  @classmethod
  def of(cls, loss: Array, weight: Array | None = None, **metrics: Array) -> Sums:
    """Adds up per-example values, all shaped as `loss`, each times `weight` (ones if None), in float32.

    `weight` may have fewer trailing dimensions than `loss`, such as a mask of examples over a loss of tokens.
    """
    weight = jnp.ones(loss.shape, jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32)
    weight = jnp.broadcast_to(weight.reshape(weight.shape + (1,) * (loss.ndim - weight.ndim)), loss.shape)
    values = {"loss": loss, **metrics}
    # `where` inside the product: a non-finite value on padding must reach neither the sum nor a gradient.
    sums = {k: (jnp.where(weight != 0, v.astype(jnp.float32), 0.0) * weight).sum() for k, v in values.items()}
    return cls(sums, dict.fromkeys(values, weight.sum()))

  def plus(self, penalties: dict[str, Array]) -> Sums:
    """Adds terms to the loss that are sums over the same tokens or examples, each shown by its name as well."""
    sums = self.sums | {"loss": sum(penalties.values(), start=self.sums["loss"])} | penalties
    return Sums(sums, self.weights | dict.fromkeys(penalties, self.weights["loss"]))

  def __add__(self, other: Sums) -> Sums:
    return jax.tree.map(jnp.add, self, other)

  def means(self) -> dict[str, Array]:
    """Each sum over its weight; 0 where the weight is 0."""
    return {k: v / jnp.where(self.weights[k] == 0, 1.0, self.weights[k]) for k, v in self.sums.items()}
