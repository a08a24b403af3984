"""Schedule-free learning: averaging in the place of a falling learning rate, https://arxiv.org/abs/2405.15682.

The parameters that are trained are the points y where gradients are taken; what is to be evaluated and used is the
average x, which `updates.make` offers as the view "averaged". Use it with a `constant` schedule and a warm-up.
"""

from __future__ import annotations

from typing import Literal

import optax

from bigjax.errors import UserError
from bigjax.optimizers.stages import Staged, staged


def make(
  learning_rate: optax.ScalarOrSchedule,
  *,
  base: Literal["adamw", "sgd"] = "adamw",
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_lr_power: float = 2.0,
) -> Staged:
  """Returns schedule-free AdamW or SGD; `b1` is how much of the average is in y, in the place of momentum.

  Weight decay, which makes it AdamW, comes from `config.decay`; it acts on y, as in the paper. A step has weight
  `max(learning rate)^weight_lr_power` in the average.
  """
  if not 0 < b1 <= 1:
    raise UserError(f"config.optimizer.b1: {b1!r} must be above 0 and at most 1; finding the average divides by it.")
  scale = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True) if base == "adamw" else optax.identity()
  return staged(
    optax.chain(scale, optax.scale_by_learning_rate(learning_rate)),
    after=optax.contrib.schedule_free(optax.identity(), learning_rate, b1, weight_lr_power),
  )
