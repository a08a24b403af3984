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

from bigjax import precision, quantize

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

  def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
    """Returns fresh (params, extras)."""
    _, params, extras = nnx.split(self.build(rngs=nnx.Rngs(key)), nnx.Param, ...)
    return precision.cast(_plain(params), self.kept), _plain(extras)

  def bind(self, params: PyTree, extras: PyTree) -> nnx.Module:
    """Returns the module itself, to call inside `jit` as any Python object."""
    params = _numbered(precision.cast(params, jnp.float32))
    module = nnx.merge(self._graphdef, params, _numbered(extras))
    return quantize.applied(precision.summed(module), self.products)

  @staticmethod
  def extras(module: nnx.Module) -> PyTree:
    """Returns what a call may have changed."""
    return _plain(nnx.state(module, nnx.Not(nnx.Param)))

  def settled(self, params: PyTree, extras: PyTree) -> PyTree:
    """Returns the extras after a step: what a module does once all parts of a batch have been added up.

    That is `module.settle()` where it has one, such as experts that balance their load by what they had to do.
    """
    module = self.bind(params, extras)
    getattr(module, "settle", lambda: None)()
    return self.extras(module)

  @property
  def abstract(self) -> tuple[PyTree, PyTree]:
    """The shapes of (params, extras)."""
    return self._traced[1:]

  @property
  def _graphdef(self):
    return self._traced[0]

  @functools.cached_property
  def _traced(self):
    """The module's structure, found once without making an array."""
    module = nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0)))
    quantize.check(module, self.products)
    graphdef, params, extras = nnx.split(module, nnx.Param, ...)
    return graphdef, precision.cast(_plain(params), self.kept), _plain(extras)


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
