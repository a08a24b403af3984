"""Pipeline parallelism: each group of devices holds some of the layers, and microbatches travel through them.

All stages are one program: a `vmap` over stages whose axis is split over the mesh's "pipe", so that every device does
the work of its own stage, and a roll along that axis, which is each device sending its result to the next (GSPMD,
https://arxiv.org/abs/2105.04663, section 3.3). With R `repeats` the layers go round R times: the interleaved schedule
of https://arxiv.org/abs/2104.04473, where a stage has R shorter runs of layers and the bubble shrinks.

In iteration t, stage s does step t - s, where step u is repeat u // M of microbatch u % M. Where that is not in
[0, M * R) the stage is idle: it computes on activations it has, and nothing uses the result.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, Shaped

from bigjax import sharding
from bigjax.errors import UserError

LAYER_INPUT = "layer_input"  # What a policy that saves nothing keeps.


def bubble(stages: int, microbatches: int, repeats: int = 1) -> float:
  """Returns the part of the time that a stage is idle."""
  return (stages - 1) / (microbatches * repeats + stages - 1)


def check(depth: int, batch: int, layout: sharding.Layout, *, scanned: bool = True) -> None:
  """Raises `UserError` unless `depth` layers and `batch` examples can go through the pipeline of `layout`."""
  stages, parts, repeats, ways = layout.size("stage"), layout.microbatches, layout.repeats, layout.size("batch")
  if not scanned:
    raise UserError(f"model.scan: the {stages} stages of a pipeline need the layers in one stack. Set scan=True.")
  if depth % (stages * repeats):
    fitting = [r for r in range(1, depth // stages + 1) if depth % (stages * r) == 0]
    remedy = f"Take {_multiples(depth, stages * repeats)} layers"
    remedy += f", or config.pipeline.repeats={' or '.join(map(str, fitting))}." if fitting else "."
    raise UserError(f"model.depth: {depth} layers can't be {stages} stages x {repeats} repeats. {remedy}")
  if parts % stages:
    raise UserError(
      f"config.pipeline.microbatches: {parts} can't be spread over the {stages} stages of the mesh's axis 'pipe'. "
      f"Use {_multiples(parts, stages)}."
    )
  if batch % (parts * ways) or not batch:
    raise UserError(
      f"config.batch_size: {batch} examples in {parts} microbatches over {ways} data-parallel devices are "
      f"{batch / parts / ways:.3g} each, and have to be whole. Use {_multiples(batch, parts * ways)}."
    )


def _multiples(size, unit):
  """The multiples of `unit` about `size`, in words."""
  low = size // unit * unit
  return f"{low} or {low + unit}" if low else f"{unit}"


def run(
  layer: Callable[..., tuple[Array, dict[str, Array]]],
  blocks: Any,
  x: Shaped[Array, "batch seq width"],
  *,
  keys: Key[Array, " layers"] | None = None,
  rates: Float[Array, " layers"] | None = None,
  arrays: Mapping[str, Array] | None = None,
  policy: Callable[..., Any] | None = None,
) -> tuple[Shaped[Array, "batch seq width"], dict[str, Array]]:
  """Applies all layers to `x`, stage by stage; returns (x, aux), as a scan over the layers would.

  A microbatch has every M-th example, so that each device splits what it already has. Masks of dropout are drawn for
  each layer and microbatch: they differ from those of a run without pipeline, their rates don't.

  Memory: for the backward pass a device keeps what its layers keep of one microbatch, M * R + P - 1 times. With
  `policy` that is the input of each layer and what the policy saves: in all that of a whole batch in 1 / P of the
  layers, and the bubble's share on top. With the layout's `remat_stages` it is only the input of a stage, for one more
  forward pass.
  Weights split by FSDP are gathered once an iteration, not once a step.

  Args:
    layer: `layer(x, block, key, rate, **arrays) -> (x, aux)`, `x` of the same shape and type; the values of aux are
      sums over examples. Not under `jax.checkpoint`: give `policy`.
    blocks: Leaves [layers, ...], or [repeats, layers / repeats, ...] for a layout with repeats: natural order, row by
      row. The last of these dimensions is split over "pipe".
    x: Activations.
    keys: One a layer, or None.
    rates: One a layer, of stochastic depth, or None.
    arrays: By name, what all layers see of each example: [batch, ...].
    policy: What the backward pass of a layer need not compute again, one of `jax.checkpoint_policies`; None: all of it.

  Raises:
    UserError: The layers or the batch can't be split as the current layout says.
  """
  layout = sharding.current()
  stages, parts, repeats = layout.size("stage"), layout.microbatches, layout.repeats
  axes = 1 if repeats == 1 else 2  # That count layers.
  depth = math.prod(jax.tree.leaves(blocks)[0].shape[:axes])
  check(depth, len(x), layout)
  columns, steps = parts // stages, parts * repeats
  number = jnp.arange(stages)
  is_stage = lambda s: jnp.expand_dims(number == s, range(1, x.ndim + 1))

  def split(a):
    """[batch, ...] -> [microbatch, example, ...]."""
    return jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0)

  def by_stage(leaf, axes):
    """[layers, ...] -> [stage, repeat, layer, ...], without the repeats if there is one."""
    inner = (stages, depth // stages // repeats, *leaf.shape[axes:])
    leaf = leaf.reshape(inner) if repeats == 1 else jnp.moveaxis(leaf.reshape(repeats, *inner), 1, 0)
    rest = [P.UNCONSTRAINED] * (leaf.ndim - 1)
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(layout.mesh, P(*layout.spec("stage"), *rest)))

  layers = (jax.tree.map(lambda leaf: by_stage(leaf, axes), blocks),)
  layers += tuple(None if a is None else by_stage(a, 1) for a in (keys, rates))
  arrays = {name: split(a) for name, a in (arrays or {}).items()}

  if policy is not None:
    policy = _seen_by_one_stage(policy)
    layer = jax.checkpoint(layer, policy=policy)

  def stage(layers, x, repeat, microbatch):
    """Takes one microbatch through the layers of one stage."""
    if repeats > 1:
      layers = jax.tree.map(lambda leaf: _take(leaf, repeat, 0), layers)
    side = {name: _take(a, microbatch, 0) for name, a in arrays.items()}

    def one(x, layer_):
      block, key, rate = layer_
      x = checkpoint_name(x, LAYER_INPUT)
      return layer(x, block, None if key is None else jax.random.fold_in(key, microbatch), rate, **side)

    return jax.lax.scan(one, x, layers)

  if layout.remat_stages:
    stage = jax.checkpoint(stage)
  elif repeats > 1:
    stage = jax.checkpoint(stage, policy=_all_but_weights(policy))
  work = jax.vmap(stage, spmd_axis_name=layout.axes("stage"))

  # What waits for the first stage and what came out of the last is held by all stages together, microbatch m by stage
  # m % P in column m // P. A column that is read or written moves on by a stage each time, towards the first: that one
  # finds the next microbatch at hand, and the last can leave its result where it is.
  held = lambda a: sharding.constrain(a, "stage", None, "batch", "seq", None)
  moving = lambda a: sharding.constrain(a, "stage", "batch", "seq", None)
  waiting = held(jnp.moveaxis(split(x).reshape(columns, stages, -1, *x.shape[1:]), 1, 0))
  # Between two repeats a result waits in a column as well; with one column it goes straight to the first stage.
  waits = 1 if columns == 1 else repeats

  def iteration(carry, t):
    state, waiting, total = carry
    # The first stage takes a microbatch.
    place, entering = t // stages % columns, t < parts * waits
    column = _take(waiting, place, 1)
    state = moving(_where(is_stage(0) & entering, column, state))
    waiting = held(_put(waiting, place, _where(entering, moving(jnp.roll(column, -1, 0)), column)))
    # Each stage works.
    step = t - number
    out, aux = work(layers, state, step // parts % repeats, step % parts)
    out = moving(out)
    # The last stage leaves its result.
    place, leaving = (t + 1 - stages) // stages % columns, t + 1 - stages >= parts * (repeats - waits)
    column = _take(waiting, place, 1)
    pushed = _where(is_stage(stages - 1), out, moving(jnp.roll(column, -1, 0)))
    waiting = held(_put(waiting, place, _where(leaving, pushed, column)))
    # Everything moves on.
    return (moving(jnp.roll(out, 1, 0)), waiting, add(total, aux, step)), None

  def add(total, aux, step):
    """Adds to `total`, [stage, repeat, layer, ...], what stages that are not idle say of their layers."""
    step = step[:, None]
    now = (step >= 0) & (step < steps) & (step // parts == jnp.arange(repeats)[None])
    here = lambda a: jnp.expand_dims(now, range(2, a.ndim + 1))
    return jax.tree.map(lambda t, a: t + jnp.where(here(a), a[:, None], jnp.zeros_like(a[:, None])), total, aux)

  # Idle stages start on real activations too: of zeros a norm may have no derivative, and NaN times 0 is NaN.
  state = moving(waiting[:, 0])
  _, aux = jax.eval_shape(work, layers, state, number, number)
  total = jax.tree.map(lambda a: jnp.zeros((stages, repeats, *a.shape[1:]), a.dtype), aux)
  (_, waiting, total), _ = jax.lax.scan(iteration, (state, waiting, total), jnp.arange(steps + stages - 1))
  x = jnp.moveaxis(waiting, (0, 1), (2, 1)).reshape(x.shape)
  aux = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0).reshape(depth, *a.shape[3:]), total)
  return sharding.constrain(x, "batch", "seq", None), aux


# The backward pass spreads the condition over the activations again; it'd be kept at that size otherwise.
_where = jax.checkpoint(jnp.where)


def _take(a, index, axis):
  return jax.lax.dynamic_index_in_dim(a, index, axis, keepdims=False)


def _put(a, index, value):
  """`a` with `value` at `index` of its second dimension."""
  return jax.lax.dynamic_update_index_in_dim(a, value, index, 1)


def _seen_by_one_stage(policy):
  """`policy` without the dimension of stages, which makes a batched product of every product with weights."""

  def seen(prim, *avals, **params):
    if prim.name == "dot_general":
      contracting, batch = params["dimension_numbers"]
      params = params | {"dimension_numbers": (contracting, tuple(dims[1:] for dims in batch))}
    return policy(prim, *avals, **params)

  return seen


def _all_but_weights(policy):
  """Keeps what `policy` says, but selects the weights of a repeat again: kept, they'd be there for each iteration."""

  def keep(prim, *avals, **params):
    if policy is None:
      return prim.name not in ("gather", "dynamic_slice", "squeeze", "reshape", "transpose")
    return True if params.get("name") == LAYER_INPUT else policy(prim, *avals, **params)

  return keep
