"""One stack of layers under three kinds of names and shapes, and what turns one into another without loss.

A layer's kernel is a leaf of its own, `blocks/3/mlp/up/kernel`; or a row of one leaf `blocks/mlp/up/kernel`, [layers,
...], where layers are scanned; or, grouped for a circular pipeline, of [repeats, layers / repeats, ...]. Averages and
moments have the names and shapes of their parameters. So names and shapes tell which form a tree has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigjax.errors import UserError

STACK = "blocks"  # The name under which models keep what `models.layers.stack` made.


@dataclasses.dataclass(frozen=True)
class Conversion:
  """The same layers in another form: many leaves from one, one from many, or one from one."""

  sources: tuple[str, ...]
  targets: tuple[str, ...]
  layers: int
  layer: tuple[int, ...]  # The shape of one layer's leaf.
  shared: bool = False  # Stacked, it's still one value: what optimizers have where there is nothing to keep.


def conversions(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Conversion]:
  """Returns how leaves of `wanted` that `there` has in another form are made; both map names to shapes with types.

  A leaf that isn't the same layers, all of them, of one type, is in no conversion.
  """
  missing, spare = ({n: a[n] for n in a if n not in b} for a, b in ((wanted, there), (there, wanted)))
  found = [Conversion(many, (one,), *rest) for one, many, *rest in _pairs(missing, spare)]
  found += [Conversion((one,), many, *rest) for one, many, *rest in _pairs(spare, missing)]
  return found + _regrouped(there, wanted)


def _pairs(stacked, single) -> Iterator[tuple[str, tuple[str, ...], int, tuple[int, ...], bool]]:
  """Yields (name in `stacked`, names in `single`, their number, shape of a layer, shared) of the same layers."""
  for name, whole in stacked.items():
    parts = name.split("/")
    for i in range(1, len(parts)):
      numbered = []
      while (one := "/".join([*parts[:i], str(len(numbered)), *parts[i:]])) in single:
        numbered.append(one)
      kinds = {(single[n].shape, single[n].dtype) for n in numbered}
      if len(kinds) == 1 and (layer := kinds.pop())[1] == whole.dtype:
        shared = whole.shape == layer[0] == (1,)
        if shared or _stacks(whole.shape, len(numbered), layer[0]):
          yield name, tuple(numbered), len(numbered), layer[0], shared


def _stacks(shape, layers, layer):
  """Whether `shape` is so many of `layer`, in one leading dimension or in two."""
  lead = len(shape) - len(layer)
  return lead in (1, 2) and shape[lead:] == layer and math.prod(shape[:lead]) == layers


def _regrouped(there, wanted) -> list[Conversion]:
  """Returns what is stacked on both sides, in one dimension or two. Names don't tell, so all leaves of a stack must."""
  stacks: dict[str, list[str]] = {}
  for name in wanted:
    head, found, _ = name.partition(f"/{STACK}/")
    if found and name in there:
      stacks.setdefault(head, []).append(name)
  found = [c for names in stacks.values() for c in _regrouped_stack(names, there, wanted)]
  # In as many dimensions as before it could be matrices on their side, but not if layers have leaves of several shapes.
  same_rank = all(len(there[n].shape) == len(wanted[n].shape) for c in found for n in c.targets)
  return [] if same_rank and len({c.layer for c in found}) < 2 else found


def _regrouped_stack(names, there, wanted):
  """The conversions of one stack; none unless all its leaves agree on the dimensions that count layers."""
  differ = [n for n in names if there[n].shape != wanted[n].shape]
  same = [n for n in names if there[n].shape == wanted[n].shape != (1,)]
  if same or any(there[n].dtype != wanted[n].dtype for n in differ):
    return []
  for a, b in ((1, 2), (2, 1), (2, 2)):
    leads = {(there[n].shape[:a], wanted[n].shape[:b]) for n in differ}
    if len(leads) == 1 and all(there[n].shape[a:] == wanted[n].shape[b:] for n in differ):
      (old, new) = leads.pop()
      if math.prod(old) == math.prod(new):
        return [Conversion((n,), (n,), math.prod(old), there[n].shape[a:]) for n in differ]
  return []


def sources(conversion: Conversion, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
  """Returns shapes and layouts to read the sources in, such that making the targets from them takes little memory.

  No dimension that counts layers is split, so that they are taken apart or put together where they are. The devices
  that split it in a target split another one in the meantime, if one can be.

  Args:
    conversion: One of `conversions(there, wanted)`.
    there: Shapes by name.
    wanted: Shapes with shardings by name.
  """
  target, layer = wanted[conversion.targets[0]], conversion.layer

  def laid_out(source):
    if not isinstance(target.sharding, NamedSharding):
      return target.sharding
    lead = (None,) * (len(source.shape) - len(layer))
    return NamedSharding(target.sharding.mesh, P(*lead, *_layer_spec(target, layer)))

  found = {n: there[n] for n in conversion.sources}
  return {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=laid_out(s)) for n, s in found.items()}


def _layer_spec(target, layer):
  """How one layer's leaf is spread over all devices that the target is split over."""
  mesh, spec = target.sharding.mesh, target.sharding.spec
  axes = [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in spec]
  axes += [()] * (len(target.shape) - len(axes))
  leading, spec = axes[: len(axes) - len(layer)], axes[len(axes) - len(layer) :]
  for axis in (a for lead in leading for a in lead):
    rows = lambda i, axis=axis: layer[i] / math.prod(mesh.shape[a] for a in (*spec[i], axis))
    if free := [i for i in range(len(layer)) if rows(i).is_integer()]:
      widest = max(free, key=rows)
      spec[widest] = (*spec[widest], axis)
  return [a or None for a in spec]


def convert(conversion: Conversion, sources: Sequence[jax.Array], targets: Sequence[Any]) -> Sequence[jax.Array]:
  """Returns the targets, in the shapes and layouts given.

  Raises:
    UserError: What has to be one value for all layers differs between them.
  """
  if conversion.shared:
    values = sorted({np.asarray(s).item() for s in sources})
    if len(values) > 1:
      raise UserError(f"{conversion.targets[0]}: one value for all layers, which in the checkpoint have {values}.")
    return [jax.device_put(sources[0], t.sharding) for t in targets]
  shardings = tuple(t.sharding for t in targets)
  return _program(conversion.layers, conversion.layer, targets[0].shape, shardings)(*sources)


@functools.cache
def _program(layers, layer, shape, shardings):
  """One program for all leaves of a shape and a layout."""

  def program(*sources):
    whole = sources[0].reshape(layers, *layer) if len(sources) == 1 else jnp.stack(sources)
    return [whole.reshape(shape)] if len(shardings) == 1 else list(whole)

  return jax.jit(program, out_shardings=list(shardings))
