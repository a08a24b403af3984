"""What training changes, as one pytree of plain dicts, and the functional face of an NNX module.

A module is an object while it is built and while it is called. What crosses `jax.jit` is dicts of arrays, whose
dispatch costs what it would without NNX. This is the only file that takes modules apart.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bigjax import lora, precision, quantize

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that training changes; leaves are arrays, or shapes or shardings where a state stands for those."""

  step: Any  # Updates made so far, int32.
  params: PyTree  # What the optimizer trains, float32 or bfloat16.
  extras: PyTree  # What the model keeps besides, such as batch statistics.
  opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class Model:
  """An NNX module as pure functions over plain dicts."""

  build: Callable[..., nnx.Module]  # Called with `rngs=`.
  kept: Any = jnp.float32  # The type of the parameters; the module sees float32 in any case.
  products: quantize.Rules | quantize.Word | None = None  # Layers that multiply in 8 bits.
  exact: bool = True  # Gradients of kernels are added up in float32, whatever the computation is in.
  tuned: lora.LoraConfig | None = None  # Then params are adapters, and extras {"base": the module's own, "kept": ...}.

  def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
    """Returns fresh (params, extras)."""
    _, params, extras = nnx.split(self.build(rngs=nnx.Rngs(key)), nnx.Param, ...)
    return self._parts(_plain(params), _plain(extras), key)

  def _parts(self, params, extras, key):
    params = precision.cast(params, self.kept)
    if self.adapters is None:
      return params, extras
    base = params if self.tuned.base is None else precision.cast(params, jnp.dtype(self.tuned.base))
    adapters = self.adapters.init(jax.random.fold_in(key, 3))
    return precision.cast(adapters, self.kept), {"base": base, "kept": extras}

  def own(self, params: PyTree, extras: PyTree) -> tuple[PyTree, PyTree]:
    """Returns the module's own parameters, and what it keeps besides, without adapters."""
    return (params, extras) if self.adapters is None else (extras["base"], extras["kept"])

  def with_own(self, params: PyTree, own: PyTree, kept: PyTree) -> tuple[PyTree, PyTree]:
    """Returns (params, extras) with the module's own parameters and what it keeps put in; adapters stay `params`."""
    return (own, kept) if self.adapters is None else (params, {"base": own, "kept": kept})

  def merged(self, params: PyTree, extras: PyTree) -> tuple[PyTree, PyTree]:
    """Returns (params, extras) of the module without adapters that computes the same; on the host, by `lora.merge`."""
    own, kept = self.own(params, extras)
    return (own, kept) if self.adapters is None else (self.adapters.merged(own, params)[0], kept)

  def bind(self, params: PyTree, extras: PyTree, key: jax.Array | None = None) -> nnx.Module:
    """Returns the module itself, to call inside `jit` as any Python object; a key is for what adapters drop."""
    wide = precision.cast(params, jnp.float32)
    own, kept = self.own(wide, extras)
    if self.adapters is not None:
      own = self.adapters.applied(precision.cast(own, jnp.float32), wide)
    module = nnx.merge(self._graphdef, _numbered(own), _numbered(kept))
    summed = precision.summed if self.exact else lambda module: module
    module = summed(quantize.applied(module, self.products))
    module.sums = jnp.float32 if self.exact else jnp.bfloat16
    return module if self.adapters is None else summed(self.adapters.attached(module, wide, key))

  def extras(self, module: nnx.Module, before: PyTree) -> PyTree:
    """Returns the extras as a call left them; `before` are those that it began with."""
    kept = _plain(nnx.state(module, nnx.Not(nnx.Any(nnx.Param, nnx.PathContains("adapter")))))
    return kept if self.adapters is None else {"base": before["base"], "kept": kept}

  def settled(self, params: PyTree, extras: PyTree) -> PyTree:
    """Returns the extras after a step: what a module does once all parts of a batch have been added up.

    That is `module.settle()` where it has one, such as experts that balance their load by what they had to do.
    """
    module = self.bind(params, extras)
    getattr(module, "settle", lambda: None)()
    return self.extras(module, extras)

  @property
  def adapters(self) -> lora.Adapters | None:
    """What there is to know of the adapters, if there are some."""
    return None if self.tuned is None else self._traced[3]

  @property
  def lr_multipliers(self) -> tuple[tuple[str, float], ...]:
    """Rules for learning rates that the model's parametrisation asks for; adapters have none."""
    return () if self.adapters is not None else self._traced[4]

  @property
  def abstract(self) -> tuple[PyTree, PyTree]:
    """The shapes of (params, extras)."""
    if self.adapters is None:
      return self._traced[1:3]
    return jax.eval_shape(lambda: self._parts(*self._traced[1:3], jax.random.key(0)))

  @property
  def _graphdef(self):
    return self._traced[0]

  @functools.cached_property
  def _traced(self):
    """The module's structure, found once without making an array."""
    module = nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))
    quantize.check(module, self.products)
    graphdef, params, extras = nnx.split(module, nnx.Param, ...)
    params = precision.cast(_plain(params), self.kept)
    adapters = None if self.tuned is None else lora.of(self.tuned, module, params)
    return graphdef, params, _plain(extras), adapters, tuple(getattr(module, "lr_multipliers", ()))


def create(key: jax.Array, model: Model, tx: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first step."""
  params, extras = model.init(key)
  return TrainState(jnp.zeros((), jnp.int32), params, extras, tx.init(params))


def _plain(state):
  """An `nnx.State` as nested dicts with string keys, which is what checkpoints and rules know."""
  rename = lambda tree: {str(k): rename(v) for k, v in tree.items()} if isinstance(tree, dict) else tree
  return rename(nnx.to_pure_dict(state))


def _numbered(tree):
  """The inverse of `_plain`'s renaming: NNX lists have integer keys."""
  if not isinstance(tree, dict):
    return tree
  return {int(k) if k.isdigit() else k: _numbered(v) for k, v in tree.items()}
