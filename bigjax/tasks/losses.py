"""Cross-entropy against integer labels, without a one-hot matrix, and if asked for without whole logits.

A vocabulary of 50,000 makes a one-hot target as large as the logits; the log-normaliser less the label's own logit
needs none, and label smoothing and z-loss are terms of what is at hand already.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Integer

from bigjax import sharding


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
  # gradient over 8,192 classes. A sum of floats is made in one pass with the log-normaliser's, as a least index isn't.
  index, own = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1), labels[..., None].astype(jnp.int32)
  found = jnp.where(index < own, 2.0, jnp.where(index == own, 1.0, 0.0))
  return jnp.where(logits >= logits.max(-1, keepdims=True), found, 0.0).sum(-1) == 1


def in_chunks(
  unembed: Callable[[Array], Array],
  losses: Callable[[Array, Array], tuple[Array, Any]],
  hidden: Float[Array, "batch seq width"],
  labels: Integer[Array, "batch seq"],
  weight: Float[Array, "batch seq"],
  chunks: int,
  sums: Any = jnp.float32,
) -> tuple[Float[Array, ""], Any]:
  """Returns the weighted sum of `losses(unembed(hidden), labels)` and its metrics, a part of the sequence at a time.

  Logits of one part exist at once. Their gradient is taken in the forward pass, while they are there: nothing is
  computed twice, as a checkpoint would, and what is kept is the gradient of what went in. (As Liger's fused linear
  cross-entropy, https://arxiv.org/abs/2410.10989.) A part has every `chunks`-th position, so that devices that split
  the sequence have some of each.

  Devices that split the batch gather the parameters before the first part, and each adds up the gradient of its own
  examples; it is summed over them once, after the last. Left to the compiler, both happen for every part.

  Args:
    unembed: From hidden states to logits, closed over its parameters, which get their gradient too.
    losses: `(logits, labels) -> (losses, metrics)`, arrays [batch, seq].
    hidden: What logits are made of.
    labels: The classes.
    weight: Of each loss; 0 leaves it out, be it finite or not.
    chunks: Number of parts; divides the sequence.
    sums: The type that gradients of parameters are added up over devices in; over parts it is float32.
  """
  groups = _Groups.of(sharding.current(), len(hidden))
  split = lambda a: groups.split(jnp.moveaxis(a.reshape(len(a), -1, chunks, *a.shape[2:]), 2, 0))

  def join(a):
    a = jnp.moveaxis(groups.join(a), 0, 2)
    return a.reshape(a.shape[0], -1, *a.shape[3:])

  # Half precision has too few exponents for gradients that no loss scale has come to yet.
  kept = jnp.float32 if hidden.dtype == jnp.float16 else hidden.dtype
  labels, weight = split(labels), split(weight)
  one = lambda x: groups.first(split(x)[0])
  with sharding.use(groups.inside):
    unembed, params = jax.closure_convert(unembed, jax.eval_shape(one, hidden))

  def part(params, hidden, labels, weight):
    values, metrics = losses(unembed(hidden, *params), labels)
    return (jnp.where(weight != 0, values, 0.0) * weight).sum(), metrics

  def forward(params, hidden):
    def add(total, xs):
      value, metrics = groups.each(lambda *xs: part(params, *xs))(*xs)
      return total + value.sum(), metrics

    return jax.lax.scan(add, jnp.float32(0), (split(hidden), labels, weight))

  def forward_and_gradient(params, hidden):
    whole = jax.tree.map(groups.gathered, params)

    def one(hidden, labels, weight):
      loss = lambda params, hidden: part(params, hidden, labels, weight)
      value, pull, metrics = jax.vjp(loss, whole, hidden, has_aux=True)
      return value, pull(jnp.ones_like(value)), metrics

    def body(carry, xs):
      total, gradient = carry
      value, (d_params, d_hidden), metrics = groups.each(one)(*xs)
      gradient = jax.tree.map(lambda a, b: a + b.astype(a.dtype), gradient, d_params)
      return (total + value.sum(), gradient), (d_hidden.astype(kept), metrics)

    zeros = jax.tree.map(lambda p: groups.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    (total, gradient), (d_hidden, metrics) = jax.lax.scan(
      body, (jnp.float32(0), zeros), (split(hidden), labels, weight)
    )
    gradient = jax.tree.map(lambda g: groups.sum(g, sums), gradient)
    if groups.ways > 1:  # Before the backward pass goes on, or what each device has added up is kept until its end.
      gradient, d_hidden = jax.lax.optimization_barrier((gradient, d_hidden))
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


@dataclasses.dataclass(frozen=True)
class _Groups:
  """The examples of a batch by the devices that have them, as a dimension of their own; none where one has them all."""

  layout: sharding.Layout
  ways: int

  @classmethod
  def of(cls, layout: sharding.Layout, batch: int) -> "_Groups":
    ways = layout.size("batch")
    return cls(layout, ways if batch % ways == 0 else 1)

  @property
  def inside(self) -> sharding.Layout:
    """What the computation for one group knows of the devices."""
    if self.ways == 1:
      return self.layout
    return dataclasses.replace(self.layout, words={**self.layout.words, "batch": ()})

  def split(self, a):
    """[parts, batch, ...] -> [parts, groups, batch / groups, ...]."""
    return a if self.ways == 1 else a.reshape(len(a), self.ways, -1, *a.shape[2:])

  def join(self, a):
    """The inverse of `split`."""
    return a if self.ways == 1 else a.reshape(len(a), -1, *a.shape[3:])

  def first(self, a):
    return a if self.ways == 1 else a[0]

  def each(self, function):
    """Returns `function` of one group applied to all, every device its own."""
    if self.ways == 1:
      return function

    def inside(*args):
      with sharding.use(self.inside):
        return function(*args)

    return jax.vmap(inside, spmd_axis_name=self.layout.axes("batch"))

  def gathered(self, a):
    """A parameter, whole on every device unless the vocabulary is split."""
    if self.ways == 1 or self.layout.size("vocab") > 1:
      return a
    return jax.lax.with_sharding_constraint(a, NamedSharding(self.layout.mesh, P()))

  def zeros(self, shape, dtype):
    """What each group adds to."""
    if self.ways == 1:
      return jnp.zeros(shape, dtype)
    spec = P(self.layout.axes("batch"), *[P.UNCONSTRAINED] * len(shape))
    return jax.lax.with_sharding_constraint(
      jnp.zeros((self.ways, *shape), dtype), NamedSharding(self.layout.mesh, spec)
    )

  def sum(self, a, dtype):
    """Adds groups up; each device gets a part, whichever it keeps of the parameter, unless nothing divides it.

    The same one in every replica: what a replica keeps of a parameter is the whole of it or what the others keep.
    """
    if self.ways == 1:
      return a
    total = jax.lax.reduce_sum(a.astype(dtype), (0,))  # jnp.sum would widen it again.
    axes = tuple(axis for axis in self.layout.axes("batch") if axis != "replica")
    parts = math.prod(self.layout.mesh.shape[axis] for axis in axes)
    dims = [i for i in range(total.ndim) if total.shape[i] % parts == 0 and (i or self.layout.size("vocab") == 1)]
    spec = [axes if axes and i == min(dims, default=None) else P.UNCONSTRAINED for i in range(total.ndim)]
    return jax.lax.with_sharding_constraint(total, NamedSharding(self.layout.mesh, P(*spec)))
