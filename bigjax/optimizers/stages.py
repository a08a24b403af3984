"""An optimizer that must act before clipping or after weight decay, not only between them.

`bigjax.updates` puts clipping before an optimizer, and multipliers and decay after it. Two kinds don't fit there: one
that asks for another gradient (sharpness-aware: that gradient is what is to be clipped), and one whose parameters are
an interpolation of what the updates add up to (schedule-free: decay belongs to the sum). They say so with `staged`.
"""

from __future__ import annotations

import optax


class Staged(optax.GradientTransformationExtraArgs):
  """A complete optax transformation that also knows the stages it consists of."""

  before: optax.GradientTransformation | None  # Gradients to gradients.
  base: optax.GradientTransformation  # Gradients to updates, the learning rate included.
  after: optax.GradientTransformation | None  # Updates to updates.


def staged(
  base: optax.GradientTransformation,
  *,
  before: optax.GradientTransformation | None = None,
  after: optax.GradientTransformation | None = None,
) -> Staged:
  """Returns `before`, `base` and `after` as one transformation, in that order."""
  whole = optax.chain(*(stage for stage in (before, base, after) if stage is not None))
  result = Staged(whole.init, whole.update)
  result.before, result.base, result.after = before, base, after
  return result
