"""What a task reads from a batch and asks of a module.

Padding must add exactly nothing to a loss and to its gradient. A mask over the losses is not enough: the chain rule
multiplies the zero that comes back by whatever the padding made of the activations, and 0 * NaN is NaN. So what is
padding is put to zero before the module sees it.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bigjax.errors import UserError, suggest


def read(batch: Mapping, name: str, option: str) -> Array:
  """Returns `batch[name]` with the rows of padding (`mask` of 0) put to zero.

  `option` is the task's option that holds the name, for the message when the batch has no such feature.
  """
  if name not in batch:
    raise UserError(f"config.task.{option}: the batch has no feature {name!r}.{suggest(name, batch)}")
  values = jnp.asarray(batch[name])
  if "mask" not in batch:
    return values
  real = jnp.asarray(batch["mask"]) != 0
  return jnp.where(real.reshape(real.shape + (1,) * (values.ndim - 1)), values, jnp.zeros((), values.dtype))


def mask(batch: Mapping, like: Array) -> Array:
  """Returns the batch's mask, float32 [batch]; ones where it has none, as when a single example is predicted."""
  return jnp.asarray(batch["mask"], jnp.float32) if "mask" in batch else jnp.ones(like.shape[:1], jnp.float32)


def check_range(batch: Mapping[str, np.ndarray], name: str, classes: int, where: str | None = None) -> None:
  """Raises `UserError` if an integer feature of a NumPy batch lies outside 0 to classes - 1, padding apart.

  `where` names a mask of its values: only what has not 0 there is looked at.
  """
  values = np.asarray(batch[name])
  if not np.issubdtype(values.dtype, np.integer) or not values.size or (values.min() >= 0 and values.max() < classes):
    return
  wrong = ((values < 0) | (values >= classes)).reshape(len(values), -1) & (batch["mask"] != 0)[:, None]
  if where is not None:
    wrong &= np.asarray(batch[where]).reshape(wrong.shape) != 0
  if wrong.any():
    value = values.reshape(len(values), -1)[wrong][0]
    raise UserError(
      f"config.data: {name!r} holds {value}, but the model tells {classes} classes apart, 0 to {classes - 1}; "
      "mend the data, or give config.model as many outputs as there are."
    )


def outputs(module, inputs: Array, **beside: Array) -> dict[str, Array]:
  """Returns the module's `logits` (float32), and its `features` where it has them."""
  found = {"logits": module(inputs, **beside).astype(jnp.float32)}
  # Computed a second time only to the eye: XLA finds the two equal, and what nobody reads is not computed at all.
  if callable(getattr(module, "features", None)):
    found["features"] = module.features(inputs, **beside).astype(jnp.float32)
  return found
