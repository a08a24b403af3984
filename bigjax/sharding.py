"""Where arrays live: the mesh, and rules from names of leaves to layouts.

The model says nothing about devices. A rule is `(regex, strategy)`; the first whose regex matches a leaf's whole path
decides, for parameters, optimizer moments (their path ends in the parameter's) and everything else in the state alike.
Strategies count dimensions from the right, so a stack of scanned layers needs no rule of its own.
"""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bigjax import paths
from bigjax.errors import UserError, suggest

AXES = ("replica", "data", "pipe", "expert", "seq", "tensor")  # Outermost first: slices lie along the outer ones.

Rule = tuple[str, str]


def make_mesh(axes: Sequence[tuple[str, int]], devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Returns the mesh of `[("data", -1), ("tensor", 2)]`: at most one size is -1, which takes the devices left."""
  devices = jax.devices() if devices is None else devices
  names, sizes = [n for n, _ in axes], [s for _, s in axes]
  for name in names:
    if name not in AXES:
      raise UserError(f"config.mesh: {name!r} is not a mesh axis.{suggest(name, AXES)}")
  if len(set(names)) < len(names) or names != sorted(names, key=AXES.index):
    raise UserError(f"config.mesh: name each axis once, in the order {', '.join(AXES)}; not {names}.")
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise UserError(f"config.mesh: sizes are positive, at most one is -1 (what is left); not {sizes}.")
  known = math.prod(s for s in sizes if s != -1)
  if len(devices) % known or (-1 not in sizes and known != len(devices)):
    raise UserError(
      f"config.mesh: {dict(axes)} does not make up the {len(devices)} devices there are; "
      f"the sizes must multiply to {len(devices)}, or leave one -1 and let the others divide it."
    )
  sizes = [len(devices) // known if s == -1 else s for s in sizes]
  return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def replicate(shape, mesh):
  """A whole copy on every device."""
  del mesh
  return (None,) * len(shape)


def fsdp(shape, mesh, axis="data", min_size=2**10):
  """Splits the largest dimension that `axis` divides, leaving arrays under `min_size` elements whole (ZeRO-3)."""
  spec = [None] * len(shape)
  if math.prod(shape) >= min_size:
    for i in np.argsort(shape, stable=True)[::-1]:
      if shape[i] % mesh.shape[axis] == 0:
        spec[i] = axis
        break
  return tuple(spec)


def split(shape, mesh, axis, dim):
  """Splits dimension `dim`, counted from the right (-1 is the last), along `axis`."""
  if not -len(shape) <= dim < 0:
    raise UserError(f"dimension {dim} of shape {shape} does not exist; count from the right, from -1 to -{len(shape)}.")
  if shape[dim] % mesh.shape[axis]:
    raise UserError(f"the {mesh.shape[axis]} devices of axis {axis!r} do not divide dimension {dim} of shape {shape}.")
  spec = [None] * len(shape)
  spec[dim] = axis
  return tuple(spec)


STRATEGIES = {"replicate": replicate, "fsdp": fsdp, "split": split}


def shard_tree(abstract, rules: Sequence[Rule], mesh):
  """Returns a `NamedSharding` for every leaf of `abstract`; raises `UserError` for a leaf or a rule without match."""
  names = paths.names(abstract)
  chosen = paths.first_match([r[0] for r in rules], names, "config.sharding")
  shardings = []
  for name, index, leaf in zip(names, chosen, jax.tree.leaves(abstract), strict=True):
    if index is None:
      raise UserError(f"config.sharding: no rule matches {name!r} {leaf.shape}; end the list with ('.*', 'replicate').")
    pattern, strategy = rules[index]
    try:
      shardings.append(NamedSharding(mesh, P(*_apply(strategy, leaf.shape, mesh))))
    except UserError as e:
      raise UserError(f"config.sharding: rule ({pattern!r}, {strategy!r}) on {name!r}: {e}") from None
  return jax.tree.unflatten(jax.tree.structure(abstract), shardings)


def _apply(strategy, shape, mesh):
  """Calls `name(arg, ...)`; a strategy that names an axis the mesh lacks is an error, not a silent copy."""
  if not (call := re.fullmatch(r"(\w+)(?:\((.*)\))?", strategy.strip())) or call[1] not in STRATEGIES:
    raise UserError(f"there is no such strategy.{suggest(strategy.partition('(')[0], STRATEGIES)}")
  args = [int(a) if re.fullmatch(r"-?\d+", a) else a for a in filter(None, re.split(r"[\s,]+", call[2] or ""))]
  if call[1] in ("fsdp", "split") and args and args[0] not in mesh.shape:
    raise UserError(f"the mesh has no axis {args[0]!r}.{suggest(args[0], mesh.shape)}")
  try:
    return STRATEGIES[call[1]](shape, mesh, *args)
  except (TypeError, KeyError) as e:
    raise UserError(f"wrong arguments {args}: write replicate, fsdp(data) or split(tensor,-1).") from e


def replicated(mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh) -> NamedSharding:
  """Examples are split over every axis along which data differs."""
  return NamedSharding(mesh, P(tuple(a for a in mesh.axis_names if a in ("replica", "data"))))


def batch_ways(mesh) -> int:
  """The number of parts a global batch is split into."""
  return math.prod(mesh.shape[a] for a in mesh.axis_names if a in ("replica", "data"))


def bytes_a_device(leaf, sharding: NamedSharding) -> int:
  """The bytes of `leaf` that one device holds."""
  return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
