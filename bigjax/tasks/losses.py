"""Cross-entropy against integer labels, without a one-hot matrix, and if asked for without whole logits.

A vocabulary of 50,000 makes a one-hot target as large as the logits; the log-normaliser less the label's own logit
needs none, and label smoothing and z-loss are terms of what is at hand already.
"""

from collections.abc import Callable
from typing import Any

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


def in_chunks(
  unembed: Callable[[Array], Array],
  losses: Callable[[Array, Array], tuple[Array, Any]],
  hidden: Float[Array, "batch seq width"],
  labels: Integer[Array, "batch seq"],
  weight: Float[Array, "batch seq"],
  chunks: int,
) -> tuple[Float[Array, ""], Any]:
  """Returns the weighted sum of `losses(unembed(hidden), labels)` and its metrics, a part of the sequence at a time.

  Logits of one part exist at once. Their gradient is taken in the forward pass, while they are there: nothing is
  computed twice, as a checkpoint would, and what is kept is the gradient of what went in. (As Liger's fused linear
  cross-entropy, https://arxiv.org/abs/2410.10989.) A part has every `chunks`-th position, so that devices that split
  the sequence have some of each.

  Args:
    unembed: From hidden states to logits, closed over its parameters, which get their gradient too.
    losses: `(logits, labels) -> (losses, metrics)`, arrays [batch, seq].
    hidden: What logits are made of.
    labels: The classes.
    weight: Of each loss; 0 leaves it out, be it finite or not.
    chunks: Number of parts; divides the sequence.
  """
  split = lambda a: jnp.moveaxis(a.reshape(len(a), -1, chunks, *a.shape[2:]), 2, 0)
  join = lambda a: jnp.moveaxis(a, 0, 2).reshape(a.shape[1], -1, *a.shape[3:])
  # Half precision has too few exponents for gradients that no loss scale has come to yet.
  kept = jnp.float32 if hidden.dtype == jnp.float16 else hidden.dtype
  labels, weight = split(labels), split(weight)
  unembed, params = jax.closure_convert(unembed, jax.eval_shape(lambda x: split(x)[0], hidden))

  def part(params, hidden, labels, weight):
    values, metrics = losses(unembed(hidden, *params), labels)
    return (jnp.where(weight != 0, values, 0.0) * weight).sum(), metrics

  def forward(params, hidden):
    add = lambda total, now: (total + now[0], now[1])
    return jax.lax.scan(
      lambda total, xs: add(total, part(params, *xs)), jnp.float32(0), (split(hidden), labels, weight)
    )

  def forward_and_gradient(params, hidden):
    def body(carry, xs):
      total, gradient = carry
      value, pull, metrics = jax.vjp(lambda params, x: part(params, x, *xs[1:]), params, xs[0], has_aux=True)
      d_params, d_hidden = pull(jnp.ones_like(value))
      gradient = jax.tree.map(lambda a, b: a + b.astype(a.dtype), gradient, d_params)
      return (total + value, gradient), (d_hidden.astype(kept), metrics)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    (total, gradient), (d_hidden, metrics) = jax.lax.scan(
      body, (jnp.float32(0), zeros), (split(hidden), labels, weight)
    )
    return (total, metrics), (params, gradient, d_hidden)

  def backward(kept, slopes):
    params, gradient, d_hidden = kept
    slope = slopes[0]
    scaled = jax.tree.map(lambda p, g: (slope * g).astype(p.dtype), params, gradient)
    return scaled, (slope * join(d_hidden).astype(jnp.float32)).astype(hidden.dtype)

  summed = jax.custom_vjp(forward)
  summed.defvjp(forward_and_gradient, backward)
  total, metrics = summed(params, hidden)
  return total, jax.tree.map(lambda m: join(jax.lax.stop_gradient(m)), metrics)
