"""The same bits on 1, 2, 4 or 8 devices: fixed groups of examples, computed alike and added up in a fixed tree.

Sums of floating-point numbers depend on their order, and what a compiler fuses decides the last bits of a product, so a
run on another mesh is a little other, and after some hundred steps another run. With `config.determinism = "topology"`:

1. A batch is cut into `config.groups` groups of consecutive examples. A device computes those it holds one after
   another, in a loop whose body is the same however often it turns: a loop of one turn would be unrolled and fused with
   its surroundings, so the number of turns is one that the compiler can't know.
2. Gradients, sums and weights are added along a binary tree over the groups: on a device over the block it holds, then
   with the neighbour at distance 1, 2, 4, ... As a + b is b + a to the bit, the shape of the tree is all there is.
3. Randomness is folded from the number of the group.
4. The rest of the step, norms, trust ratios, orthogonalisation, is computed on whole arrays by every device alone. At
   rest the state lies as `config.sharding` has it; in a step it is gathered.
5. An evaluation predicts in groups, too, as many of `config.groups` as divide its batch. What evaluators make of the
   predictions is computed by every device alone, on those of the whole batch.

It asks for numbers of devices that are powers of two, and holds for the same kind of chip and the same versions.
`Alone` is this mode, `Shared` what runs do otherwise: the compiler divides the work, over parts of a batch in turn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.config import use_shardy_partitioner  # The public `jax.config` sets it for all threads at once.
from jax.sharding import PartitionSpec as P

from bigjax import sharding
from bigjax.errors import UserError

PyTree = Any

TOGETHER = 2**14  # Arrays of fewer elements cross the network as one.

# What is met twice decides what XLA rewrites: a / b / c becomes a / (b * c), or not. With several devices it merges
# common subexpressions before it rewrites, and Shardy merges constants; with one device, neither. So here none does.
OPTIONS = {"xla_disable_hlo_passes": "cse"}


@dataclasses.dataclass(frozen=True)
class Shared:
  """The compiler divides a computation over the devices: the same bits from run to run on as many of them."""

  inside: sharding.Layout  # What the computation of the loss knows of the devices.

  def summed(self, grad_fn: Callable, accumulated: Callable) -> Callable:
    """Returns `grad_fn(params, extras, batch, key)` of a whole batch, as `accumulated(grad_fn)` has it."""
    return accumulated(grad_fn)

  def jit(self, step: Callable, **options) -> Callable:
    """Returns `step(state, batch, key)` compiled."""
    return jax.jit(step, **options)

  def jit_init(self, create: Callable, **options) -> Callable:
    """Returns `create(key)` compiled."""
    return jax.jit(create, **options)

  def predicting(self, predict: Callable) -> Callable:
    """Returns `predict(state, batch)` for evaluators."""
    return predict

  jit_measure = None  # What evaluators compute is compiled as any function.


@dataclasses.dataclass(frozen=True)
class Alone:
  """Every device computes alone, on whole arrays and its groups of examples: the same bits on any number of them."""

  mesh: jax.sharding.Mesh
  groups: int

  @property
  def inside(self) -> sharding.Layout:
    """One device, as far as the model can see."""
    return sharding.Layout()

  def summed(self, grad_fn: Callable, accumulated: Callable) -> Callable:
    """Returns `grad_fn(params, extras, batch, key)` of a whole batch, for use in `jit`, where a part of it is at hand.

    However many parts a batch is to be computed in: a device has no more than a group under way.
    """
    del accumulated
    axes, devices = sharding.batch_sharding(self.mesh).spec[0], sharding.batch_ways(self.mesh)
    here = self.groups // devices

    def total(params, extras, batch, key):
      split = jax.tree.map(lambda x: x.reshape(here, -1, *x.shape[1:]), batch)
      first = jax.lax.axis_index(axes) * here
      value = jax.tree.leaves(batch)[0]

      def group(i):
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), split)
        part = _apart(part, value, i)  # Also where there is one group, whose computation would leave the loop in parts.
        grads, (sums, _) = grad_fn(params, extras, part, jax.random.fold_in(key, first + i))
        return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, sums))

      found = _over(group, here, _unknown(here, value))
      grads, sums = _apart(_across(found, axes, devices), value)
      return grads, (sums, extras)

    return total

  def jit(self, step: Callable, **options) -> Callable:
    """Returns `step(state, batch, key)` compiled."""
    specs = (P(), sharding.batch_sharding(self.mesh).spec, P())

    def alone(state, batch, key):
      zeros = _zeros(jax.eval_shape(step, state, batch, key))
      turn = lambda _, found: _typed(step(found[0], batch, key), zeros)
      return jax.lax.fori_loop(0, _unknown(1, jax.tree.leaves(batch)[0]), turn, (state, zeros[1]))

    return self._jit(alone, specs, options)

  def jit_init(self, create: Callable, **options) -> Callable:
    """Returns `create(key)` compiled."""

    def alone(key):
      zeros = _zeros(jax.eval_shape(create, key))
      turn = lambda _, __: _typed(create(key), zeros)
      return jax.lax.fori_loop(0, _unknown(1, jax.random.key_data(key)), turn, zeros)

    return self._jit(alone, P(), options)

  def predicting(self, predict: Callable) -> Callable:
    """Returns `predict(state, batch)` for evaluators, for use in `jit_measure`: of all groups, on every device."""
    axes, devices = sharding.batch_sharding(self.mesh).spec[0], sharding.batch_ways(self.mesh)

    def predicted(state, batch):
      value = jax.tree.leaves(batch)[0]
      groups = math.gcd(self.groups, len(value))
      here = groups // devices
      split = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), batch)
      first = jax.lax.axis_index(axes) * here
      part = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), split)

      def group(i, found):
        new = _apart(predict(state, _apart(part(first + i), value, i)), value, i)
        return jax.tree.map(lambda f, n: jax.lax.dynamic_update_index_in_dim(f, n, i, 0), found, new)

      shapes = jax.eval_shape(predict, state, jax.eval_shape(part, 0))
      empty = jax.tree.map(lambda x: jnp.zeros((here, *x.shape), x.dtype), shapes)
      found = jax.lax.fori_loop(0, _unknown(here, value), group, empty)
      found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
      return _apart(self._gathered(found), value)

    return predicted

  def jit_measure(self, function: Callable) -> Callable:
    """Returns `function(*args, batch)` compiled, the batch divided over devices and all else whole on each."""

    def alone(args, batch):
      batch = self._gathered(batch)
      zeros = _zeros(jax.eval_shape(function, *args, batch))
      turn = lambda _, __: _typed(function(*args, batch), zeros)
      return jax.lax.fori_loop(0, _unknown(1, jax.tree.leaves(batch)[0]), turn, zeros)

    compiled = self._jit(alone, (P(), sharding.batch_sharding(self.mesh).spec), {})
    return lambda *args: compiled(args[:-1], args[-1])

  def _gathered(self, tree):
    """Of arrays that are divided by their first dimension, the whole."""
    if sharding.batch_ways(self.mesh) == 1:
      return tree
    axes = sharding.batch_sharding(self.mesh).spec[0]
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), tree)

  def _jit(self, function, specs, options):
    mapped = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return _AsWritten(jax.jit(mapped, compiler_options=OPTIONS, **options))


@dataclasses.dataclass(frozen=True)
class _AsWritten:
  """A function under `jax.jit`, or what it was lowered to, divided by XLA's older partitioner: it leaves code alone."""

  of: Any

  def __call__(self, *args):
    with use_shardy_partitioner(False):
      return self.of(*args)

  def lower(self, *args) -> _AsWritten:
    with use_shardy_partitioner(False):
      return _AsWritten(self.of.lower(*args))

  def compile(self, compiler_options=None):
    with use_shardy_partitioner(False):
      return self.of.compile(compiler_options=compiler_options)

  def __getattr__(self, name):
    return getattr(self.of, name)


def shared(layout: sharding.Layout, *_) -> Shared:
  """Returns what `config.determinism = "run"` asks for; arguments as of `alone`."""
  return Shared(layout)


def alone(layout: sharding.Layout, groups: int, batch_size: int, extras: Mapping) -> Alone:
  """Returns what `config.determinism = "topology"` asks for.

  Args:
    layout: The run's mesh.
    groups: Of examples, `config.groups`.
    batch_size: Examples a step.
    extras: What the model keeps besides parameters.

  Raises:
    UserError: Something can't be divided so, or depends on the examples on a device in other ways.
  """
  others = {axis: size for axis, size in layout.mesh.shape.items() if size > 1 and axis not in ("replica", "data")}
  if others:
    raise UserError(
      f"config.determinism: 'topology' is for data parallelism, replicated or sharded; config.mesh has {others}. "
      "Use the axes replica and data alone, or determinism='run'."
    )
  if jax.tree.leaves(extras):
    raise UserError(
      "config.determinism: 'topology' can't hold for what this model keeps besides its parameters, such as batch "
      "statistics, which mix the examples of a batch. Use a norm of single examples, or determinism='run'."
    )
  devices = sharding.batch_ways(layout.mesh)
  fits = [2**i for i in range(batch_size.bit_length()) if batch_size % 2**i == 0]
  for name, number in (("config.groups", groups), ("config.mesh: the number of devices", devices)):
    if number not in fits:
      near = min(fits, key=lambda n: (abs(math.log2(n / max(number, 0.5))), n))
      raise UserError(
        f"{name}, {number}, must be a power of two that divides config.batch_size={batch_size} where "
        f"config.determinism is 'topology'; such as {near}."
      )
  if groups % devices:
    raise UserError(
      f"config.groups: {groups} groups of examples are too few for {devices} devices; make it {devices} or more, also "
      "in the runs that are to be the same."
    )
  return Alone(layout.mesh, groups)


def _apart(tree, value, i=0):
  """A copy of `tree` that nothing is fused across: what a loop gives after one turn, of how many no compiler knows.

  `jax.lax.optimization_barrier` is no such wall: XLA takes it away on a CPU before it fuses.
  """
  return jax.lax.fori_loop(0, _unknown(1, value, i), lambda _, __: tree, _zeros(tree))


def _unknown(number, value, i=0):
  """`number`, in a way that a compiler can't see: it knows no bounds of data, nor of `i`, which is never negative."""
  return jnp.minimum(number, number + i + (value.reshape(-1)[0] != 0).astype(jnp.int32))


def _zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _typed(tree, like):
  """`tree` with the types of `like`, none of them weak."""
  return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), tree, like)


def _over(fn, count, turns):
  """The sum of `fn(0), ..., fn(count - 1)` along a binary tree; `count` is a power of two, `turns` the same, traced.

  As in a binary counter, level l holds the sum of a finished block of 2^l: memory for log2(count) + 1 sums.
  """
  levels = count.bit_length()
  stack = jax.tree.map(lambda x: jnp.zeros((levels, *x.shape), x.dtype), jax.eval_shape(fn, jnp.int32(0)))

  def turn(i, stack):
    at = lambda level: jax.tree.map(lambda s: jax.lax.dynamic_index_in_dim(s, level, keepdims=False), stack)
    is_full = lambda carry: (i >> carry[0]) & 1 == 1
    level, total = jax.lax.while_loop(
      is_full, lambda carry: (carry[0] + 1, jax.tree.map(jnp.add, at(carry[0]), carry[1])), (jnp.int32(0), fn(i))
    )
    return jax.tree.map(lambda s, t: jax.lax.dynamic_update_index_in_dim(s, t, level, 0), stack, total)

  stack = jax.lax.fori_loop(0, turns, turn, stack)
  return jax.tree.map(lambda s: s[-1], stack)


def _across(tree, axes, devices):
  """The sum over devices along the binary tree of their order, on every device."""
  if devices == 1:
    return tree
  leaves, structure = jax.tree.flatten(tree)
  small = [i for i, x in enumerate(leaves) if x.size < TOGETHER]
  for dtype in {leaves[i].dtype for i in small}:
    chosen = [i for i in small if leaves[i].dtype == dtype]
    joined = _exchange(jnp.concatenate([leaves[i].reshape(-1) for i in chosen]), axes, devices)
    ends = [sum(leaves[i].size for i in chosen[: k + 1]) for k in range(len(chosen))]
    for i, part in zip(chosen, jnp.split(joined, ends[:-1]), strict=True):
      leaves[i] = part.reshape(leaves[i].shape)
  for i in set(range(len(leaves))) - set(small):
    leaves[i] = _exchange(leaves[i].reshape(-1), axes, devices).reshape(leaves[i].shape)
  return jax.tree.unflatten(structure, leaves)


def _exchange(x, axes, devices):
  """Halves are exchanged and added with the neighbours at distance 1, 2, 4, ..., then the sums are gathered.

  Each device sends as much as in an all-reduce around a ring, 2 (n - 1) / n of `x`, most of it to its next neighbour.
  """
  size, me = x.size, jax.lax.axis_index(axes)
  x = jnp.pad(x, (0, -size % devices))
  bits = devices.bit_length() - 1
  for bit in range(bits):
    halves, mine = x.reshape(2, -1), (me >> bit) & 1
    given = jax.lax.ppermute(halves[1 - mine], axes, [(i, i ^ (1 << bit)) for i in range(devices)])
    x = halves[mine] + given
  reverse = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(devices)]  # The first exchange decided on the highest half.
  return jax.lax.all_gather(x, axes)[jnp.array(reverse)].reshape(-1)[:size]
