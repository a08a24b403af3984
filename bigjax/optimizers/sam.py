"""Sharpness-aware minimization: the gradient is taken where the loss is about the worst within `rho`.

https://arxiv.org/abs/2010.01412. A step costs two gradients. optax.contrib.sam is not used as it takes no further
arguments in `update`, and as the gradient at the perturbed point must pass through clipping and coupled decay.
"""

from __future__ import annotations

from typing import Literal

import jax
import optax

from bigjax.errors import UserError
from bigjax.optimizers.stages import Staged, staged


def make(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rho: float = 0.05,
  base: Literal["sgd", "adam"] = "sgd",
  momentum: float | None = 0.9,
  nesterov: bool = False,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> Staged:
  """Returns SGD (with `momentum`, `nesterov`) or Adam (with `b1`, `b2`, `eps`) on the gradient at the perturbed point.

  Its `update` needs `grad_fn(params, index)`, the gradient of the same batch at other parameters.
  """
  if rho <= 0:
    raise UserError(f"config.optimizer.rho: {rho!r} must be positive.")
  bases = {
    "sgd": lambda: optax.sgd(learning_rate, momentum, nesterov),
    "adam": lambda: optax.adam(learning_rate, b1, b2, eps, nesterov=nesterov),
  }
  return staged(bases[base](), before=perturb(rho))


def perturb(rho: float) -> optax.GradientTransformationExtraArgs:
  """Replaces the gradient by that at `params + rho * gradient / |gradient|`."""

  def update(updates, state, params=None, *, grad_fn, **extra):
    del extra
    # Where the gradient vanishes there is no direction to go, and nothing to divide by.
    scale = rho / (optax.tree.norm(updates) + 1e-12)
    nearby = jax.tree.map(lambda p, g: p + scale.astype(p.dtype) * g.astype(p.dtype), params, updates)
    return grad_fn(nearby, 0), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
