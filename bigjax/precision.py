"""The types of numbers that a run keeps and computes with, said in one word of the config.

| `config.precision` | parameters                     | computation             | moments  | bytes a parameter, Adam |
| ------------------ | ------------------------------ | ----------------------- | -------- | ----------------------- |
| "float32"          | float32                        | float32                 | float32  | 12                      |
| "mixed"            | float32                        | bfloat16                | float32  | 12                      |
| "bfloat16"         | bfloat16, rounded by chance    | bfloat16                | bfloat16 | 6                       |
| "bfloat16_kahan"   | bfloat16, and what it left out | bfloat16                | bfloat16 | 8                       |
| "float16"          | float32                        | float16, a scaled loss  | float32  | 12                      |

In all of them softmax, the statistics of norms, logits, loss, the sum of a kernel's gradient over the batch, over its
parts and over devices, the division by the weight and everything between a gradient and the new parameter are float32;
an average of the parameters is kept in float32.

A bfloat16 has 8 bits: an update below 1/512 of its parameter is lost when the sum is rounded to the nearest, and so is
most of training. Rounding up or down by chance, with the odds that make the mean right, loses nothing on average
(https://arxiv.org/abs/2010.06192, as does keeping what was rounded away for the next update, Kahan's compensation).
Moments in bfloat16 are rounded by chance too, since 0.999 times a bfloat16 is that bfloat16 again.

The draws are a function of (seed, update, name of the leaf): the same after a restart and on any mesh.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.nn import dtypes
from jax.ad_checkpoint import checkpoint_name

from bigjax import paths
from bigjax.errors import UserError

PyTree = Any
GIVE_UP_AFTER = 30  # Overflows in a row: halved so often, no scale is too large any more.
DENSE = "dense"  # What the results of dense layers are called, for `jax.checkpoint`.
Mode = Literal["float32", "mixed", "bfloat16", "bfloat16_kahan", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
  """A mode with its settings, where a word is not enough."""

  mode: Mode
  moments: Literal["float32", "bfloat16"] | None = None  # Of the bfloat16 modes; None: bfloat16. 4 bytes instead of 2.
  gradients: Literal["float32", "bfloat16"] = "float32"  # Kernels', over examples and devices; the head's in chunks.
  loss_scale: float = 2.0**15  # Of float16: what the mean loss is multiplied by at first; it adapts within a few steps.
  grow_every: int = 2000  # Of float16: it doubles after so many steps without an overflow.

  @property
  def compute(self) -> str:
    """The `dtype` of the model."""
    return {"float32": "float32", "float16": "float16"}.get(self.mode, "bfloat16")

  @property
  def narrow(self) -> bool:
    """Whether parameters are kept in bfloat16."""
    return self.mode.startswith("bfloat16")

  @property
  def params(self) -> Any:
    """The type that parameters are kept in."""
    return jnp.bfloat16 if self.narrow else jnp.float32


FLOAT32 = PrecisionConfig(mode="float32")


def of(precision: str | PrecisionConfig) -> PrecisionConfig:
  """Returns the settings of a word, and settings as they are; raises `UserError` for those that can't work."""
  found = PrecisionConfig(mode=precision) if isinstance(precision, str) else precision
  if found.moments is not None and not found.narrow:
    raise UserError(f"config.precision.moments is for the bfloat16 modes; under {found.mode!r} moments are float32.")
  if found.gradients != "float32" and found.compute != "bfloat16":
    raise UserError(f"config.precision.gradients: 'bfloat16' is for modes that compute in it, not {found.mode!r}.")
  if not 0 < found.loss_scale < float("inf"):
    raise UserError(f"config.precision.loss_scale: {found.loss_scale} must be positive.")
  if found.grow_every < 1:
    raise UserError(f"config.precision.grow_every: {found.grow_every} must be 1 or more.")
  return found


def computing(model, precision: str | PrecisionConfig):
  """Returns the config's model with the `dtype` that the precision asks for; `UserError` where it can't have that."""
  found = of(precision)
  has_dtype = "dtype" in inspect.signature(model.factory).parameters
  given = model.kwargs.get("dtype")
  if given is not None and has_dtype and given != found.compute:
    meant = next((m for m in ("float32", "mixed", "float16") if of(m).compute == given), None)
    remedy = f", or set config.precision={meant!r}" if meant else ""
    raise UserError(
      f"config.model.dtype: {given!r} contradicts config.precision={found.mode!r}, which computes in "
      f"{found.compute}. Leave dtype to the precision (write {found.compute!r} or nothing){remedy}."
    )
  if has_dtype:
    return dataclasses.replace(model, kwargs=dict(model.kwargs, dtype=found.compute))
  if found.compute != "float32":
    raise UserError(
      f"config.precision: {found.mode!r} computes in {found.compute}, and model {model.name!r} has no argument `dtype` "
      "to be told so; choose 'float32' or give its make() one."
    )
  return model


def cast(tree: PyTree, dtype: Any) -> PyTree:
  """Returns the tree with its floating-point leaves, arrays or shapes, in `dtype`."""

  def leaf(x):
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == dtype:
      return x
    return x.astype(dtype) if hasattr(x, "astype") else jax.ShapeDtypeStruct(x.shape, dtype)

  return jax.tree.map(leaf, tree)


# Sums in float32


def summed(module: nnx.Module) -> nnx.Module:
  """Returns the module, its dense layers told to add up the gradients of their kernels in float32.

  A product in bfloat16 is rounded to bfloat16, and where devices split the batch that is before their parts are added
  together, in bfloat16 again. So the rule of the gradient is around the rounding of the kernel as well: a rounding of
  its result would be moved ahead of the sum by the compiler. Activations and their gradients stay what they are.
  """
  for _, layer in nnx.iter_modules(module):
    if getattr(layer, "dot_general", None) is jax.lax.dot_general:
      layer.dot_general, layer.promote_dtype = _dot, _promoted
  return module


def _promoted(arrays, *, dtype=None):
  """As Flax promotes (inputs, kernel, bias), but for the kernel, which `_dot` rounds."""
  inputs, kernel, bias = arrays
  if dtype is None or jnp.dtype(dtype) == jnp.float32 or kernel.dtype != jnp.float32:
    return dtypes.promote_dtype(arrays, dtype=dtype)
  inputs, bias = dtypes.promote_dtype((inputs, bias), dtype=dtype)
  return inputs, kernel, bias


def _dot(inputs, kernel, dimension_numbers, **kwargs):
  (last, first), batch = dimension_numbers
  dense = tuple(range(inputs.ndim - len(last), inputs.ndim)), tuple(range(len(first))), ((), ())
  if inputs.dtype == kernel.dtype:
    return jax.lax.dot_general(inputs, kernel, dimension_numbers, **kwargs)
  if (tuple(last), tuple(first), batch) != dense:
    return jax.lax.dot_general(inputs, kernel.astype(inputs.dtype), dimension_numbers, **kwargs)
  return checkpoint_name(_dense(inputs, kernel, len(last)), DENSE)  # Policies of remat don't see a product in a rule.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(inputs, kernel, summed):
  """Sums over the last dimensions of `inputs` and the first of `kernel`, so many."""
  last, first = range(inputs.ndim - summed, inputs.ndim), range(summed)
  return jax.lax.dot_general(inputs, kernel.astype(inputs.dtype), ((last, first), ((), ())))


def _dense_backward(summed, saved, gradient):
  inputs, kernel = saved
  batch = range(inputs.ndim - summed)
  made = range(len(batch), gradient.ndim), range(summed, kernel.ndim)
  to_inputs = jax.lax.dot_general(gradient, kernel.astype(inputs.dtype), (made, ((), ())))
  to_kernel = jax.lax.dot_general(inputs, gradient, ((batch, batch), ((), ())), preferred_element_type=jnp.float32)
  return to_inputs, to_kernel


_dense.defvjp(lambda inputs, kernel, summed: (_dense(inputs, kernel, summed), (inputs, kernel)), _dense_backward)


# Parameters in bfloat16


def widened(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
  """Runs `tx` on parameters and gradients in float32, whatever they are kept in; its update is float32."""
  wide = lambda tree: cast(tree, jnp.float32)

  def update(updates, state, params=None, **extra):
    return tx.update(wide(updates), state, wide(params), **extra)

  return optax.GradientTransformationExtraArgs(lambda params: tx.init(wide(params)), update)


class RoundingState(NamedTuple):
  """Counts the draws."""

  count: jax.Array  # Updates so far, int32.


def stochastic(seed: int) -> optax.GradientTransformation:
  """Changes each update so that parameter + update is a bfloat16, one of the two next to it and in the mean the same.

  Parameters and updates are float32 here; see `widened`. The sum is that bfloat16 exactly, unless the update takes away
  all but 1/65536 of the parameter, when it is so within the float32 rounding of the parameter.
  """

  def update(updates, state, params=None):
    key = _key(seed, 0, state.count)
    rounded = lambda name, u, p: round_stochastically(_of_leaf(key, name), p + u) - p
    return paths.map_with_name(rounded, updates, params), RoundingState(optax.safe_increment(state.count))

  return optax.GradientTransformation(lambda params: RoundingState(jnp.zeros((), jnp.int32)), update)


class KahanState(NamedTuple):
  """What the parameters are short of, under the parameters' own paths."""

  compensation: PyTree  # bfloat16.


def kahan() -> optax.GradientTransformation:
  """Changes each update so that parameter + update is a bfloat16, and adds what that left out to the next one.

  Parameter and compensation together have about 16 bits. Parameters and updates are float32 here; see `widened`.
  """

  def update(updates, state, params=None):
    wanted = jax.tree.map(lambda u, c: u + c.astype(jnp.float32), updates, state.compensation)
    updates = jax.tree.map(lambda w, p: round_to_nearest(p + w) - p, wanted, params)
    left = jax.tree.map(lambda w, u: round_to_nearest(w - u).astype(jnp.bfloat16), wanted, updates)
    return updates, KahanState(left)

  zeros = lambda params: KahanState(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params))
  return optax.GradientTransformation(zeros, update)


class StoredState(NamedTuple):
  """The state of an optimizer in bfloat16."""

  count: jax.Array  # Updates so far, int32.
  inner: PyTree


def stored(tx: optax.GradientTransformation, seed: int) -> optax.GradientTransformationExtraArgs:
  """Keeps the float32 arrays of the state of `tx` in bfloat16 between updates, rounded by chance; scalars stay."""
  tx = optax.with_extra_args_support(tx)
  kept = lambda x: jnp.ndim(x) > 0 and x.dtype == jnp.float32

  def init(params):
    inner = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if kept(x) else x, tx.init(params))
    return StoredState(jnp.zeros((), jnp.int32), inner)

  def update(updates, state, params=None, **extra):
    updates, inner = tx.update(updates, cast(state.inner, jnp.float32), params, **extra)
    key = _key(seed, 1, state.count)
    narrow = lambda name, x: round_stochastically(_of_leaf(key, name), x).astype(jnp.bfloat16) if kept(x) else x
    return updates, StoredState(optax.safe_increment(state.count), paths.map_with_name(narrow, inner))

  return optax.GradientTransformationExtraArgs(init, update)


def round_to_nearest(x: jax.Array) -> jax.Array:
  """Returns the bfloat16 nearest to a float32, as float32."""
  return jax.lax.reduce_precision(x, 8, 7)  # A cast there and back is what XLA takes out.


def round_stochastically(key: jax.Array, x: jax.Array) -> jax.Array:
  """Returns one of the two bfloat16 next to a float32, as float32, so that its mean is `x`; a bfloat16 stays."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  carried = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  rounded = jax.lax.bitcast_convert_type(carried & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x)


def _key(seed, use, count):
  return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), use), count)


def _of_leaf(key, name):
  """Its own draws for each leaf, whichever others there are."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


# A scaled loss


class LossScaleState(NamedTuple):
  """The scale and what happened to it."""

  scale: jax.Array  # What the sum of the loss is multiplied by, float32.
  good: jax.Array  # Steps since it last changed.
  skipped: jax.Array  # Steps that changed nothing but the scale.
  skipped_in_a_row: jax.Array  # Up to the last step; once it is `GIVE_UP_AFTER` it only grows.
  inner: PyTree


def scaled(
  tx: optax.GradientTransformationExtraArgs, config: PrecisionConfig, weight: float
) -> optax.GradientTransformationExtraArgs:
  """Skips updates that have overflowed, and adapts the scale of the loss (https://arxiv.org/abs/1710.03740).

  A float16 ends at 65504 and has no numbers below 6e-8, where many gradients lie; so the loss is multiplied before the
  backward pass, and the gradient is divided after it, which is not done here: see `Optimizer.loss_scale`. A skipped
  update is -0, which leaves each parameter as it is, to the bit, and the state of `tx` is kept.

  Args:
    tx: The transformation of the divided gradient.
    config: The settings.
    weight: About what the sum of the loss is divided by to be a mean, such as the number of tokens in a batch: the
      first scale, as that of the sum, is the config's over this.
  """
  first = 2.0 ** math.floor(math.log2(config.loss_scale / weight))

  def init(params):
    zero = jnp.zeros((), jnp.int32)
    return LossScaleState(jnp.float32(first), zero, zero, zero, tx.init(params))

  def update(updates, state, params=None, **extra):
    changed, inner = tx.update(updates, state.inner, params, **extra)
    leaves = jax.tree.leaves((updates, changed))
    fine = jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, old)
    good = jnp.where(fine, state.good + 1, 0)
    grown = jnp.where(good == config.grow_every, jnp.minimum(state.scale * 2, 2.0**100), state.scale)
    given_up = state.skipped_in_a_row >= GIVE_UP_AFTER
    return jax.tree.map(lambda u: jnp.where(fine, u, jnp.full_like(u, -0.0)), changed), LossScaleState(
      scale=jnp.where(fine, grown, jnp.maximum(state.scale / 2, 2.0**-100)),
      good=good % config.grow_every,
      skipped=state.skipped + jnp.where(fine, 0, 1),
      skipped_in_a_row=jnp.where(fine & ~given_up, 0, state.skipped_in_a_row + 1),
      inner=keep(inner, state.inner),
    )

  return optax.GradientTransformationExtraArgs(init, update)


def refuse_overflow(step: int, measured: Mapping[str, Any]) -> bool:
  """Returns whether the step of these metrics was skipped; raises `FloatingPointError` after too many in a row."""
  in_a_row = measured.get("skipped_in_a_row", 0)
  if in_a_row >= GIVE_UP_AFTER:
    raise FloatingPointError(
      f"Up to step {step} the gradient overflowed float16 in {GIVE_UP_AFTER} steps in a row, whatever the scale of the "
      f"loss (now {measured['loss_scale']:g}). So the scale is not what is wrong: try a lower peak of config.schedule, "
      "config.clip or config.precision='mixed'; the last checkpoint is intact."
    )
  return bool(in_a_row > 0)
