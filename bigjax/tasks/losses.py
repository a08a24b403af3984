"""Cross-entropy against integer labels, without a one-hot matrix.

A vocabulary of 50,000 makes a one-hot target as large as the logits; the log-normaliser less the label's own logit
needs none, and label smoothing and z-loss are terms of what is at hand already.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer


def cross_entropy(
  logits: Float[Array, "*batch classes"],
  labels: Integer[Array, "*batch"],
  *,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> Float[Array, "*batch"]:
  """Returns -log softmax(logits)[label] in nats and float32; NaN where the label is none of the classes.

  `label_smoothing` moves that part of the target to all classes alike (Szegedy et al. 2016,
  https://arxiv.org/abs/1512.00567); `z_loss` times the squared log-normaliser keeps it near 0 (PaLM, section 5,
  https://arxiv.org/abs/2204.02311).
  """
  logits, labels = logits.astype(jnp.float32), labels.astype(jnp.int32)
  log_normalizer = jax.nn.logsumexp(logits, axis=-1)
  known = (labels >= 0) & (labels < logits.shape[-1])
  label_logit = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
  target_logit = jnp.where(known, label_logit, jnp.nan)
  if label_smoothing:
    target_logit = (1 - label_smoothing) * target_logit + label_smoothing * logits.mean(-1)
  losses = log_normalizer - target_logit
  return losses + z_loss * log_normalizer**2 if z_loss else losses


def correct(logits: Float[Array, "*batch classes"], labels: Integer[Array, "*batch"]) -> Bool[Array, "*batch"]:
  """Returns whether the largest logit (the first of equals, as argmax) is the label's; False where logits are NaN."""
  # argmax reduces pairs, which XLA does not vectorise on a CPU: it cost half as much again as the whole loss and its
  # gradient over 8,192 classes. Two plain reductions find the same index.
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  first = jnp.where(logits >= logits.max(-1, keepdims=True), index, logits.shape[-1]).min(-1)
  return first == labels
