"""Where arrays live: the mesh, rules from names of leaves to layouts, and words for the axes of activations.

The model says nothing about devices. A rule is `(regex, strategy)`; the first whose regex matches a leaf's whole path
decides, for parameters, optimizer moments (their path ends in the parameter's) and everything else in the state alike.
A strategy is one or more words joined by "+", such as "fsdp+tensor"; one string instead of a list of rules is that
strategy for every leaf, and "auto" what the mesh and the size of the state suggest. Dimensions count from the right,
so a stack of scanned layers needs no rule of its own.

Inside the step, a model names the axes of an activation in words, `constrain(x, "batch", "seq", "embed")`; `Layout`
maps words to axes of the mesh. Without a mesh every word is the identity.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bigjax import paths
from bigjax.errors import UserError, suggest

AXES = ("replica", "data", "pipe", "expert", "seq", "tensor")  # Outermost first: slices lie along the outer ones.

# An expert axis holds different experts, and outside of their layers different examples.
WORDS = {
  "batch": ("replica", "data", "expert"),
  "seq": ("seq",),
  "embed": (),
  "heads": ("tensor",),
  "hidden": ("tensor",),
  "vocab": ("tensor",),
  "experts": ("expert",),
  "stage": ("pipe",),
}

ACCIDENT = 64 * 2**20  # Bytes of a leaf that nobody means to have whole on every device.
ROOM = 2**30  # Bytes of state that every device may as well have.

Rule = tuple[str, str]


# The mesh


def make_mesh(axes: Sequence[tuple[str, int]], devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """Returns the mesh of `[("data", -1), ("tensor", 2)]`: at most one size is -1, which takes the devices left.

  Slices of a multi-slice job, which a slower network joins, lie along the outermost axes.
  """
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
      f"config.mesh: {dict(axes)} does not make up the {len(devices)} devices there are; the sizes must multiply to "
      f"{len(devices)}, or leave one -1 and let the others divide it, such as {_nearest(names, sizes, len(devices))}."
    )
  sizes = [len(devices) // known if s == -1 else s for s in sizes]
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if slices > 1:
    outer = _over_slices(names, sizes, slices)
    inner = [s // o for s, o in zip(sizes, outer, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
  else:
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _nearest(names, sizes, count):
  """The mesh of `count` devices that differs least: each size the nearest that still divides what is left."""
  found, left = {}, count
  for name, size in list(zip(names, sizes, strict=True))[:0:-1]:
    divisors = [d for d in range(1, left + 1) if left % d == 0]
    found[name] = divisors[min(range(len(divisors)), key=lambda i, d=divisors, s=size: abs(d[i] - s))]
    left //= found[name]
  return {names[0]: left} | dict(reversed(found.items()))


def _over_slices(names, sizes, slices):
  """The part of each axis that crosses slices, taken from the outermost in."""
  outer, left = [], slices
  for size in sizes:
    outer.append(math.gcd(size, left))
    left //= outer[-1]
  if left > 1:
    raise UserError(
      f"config.mesh: {dict(zip(names, sizes, strict=True))} can't be laid over {slices} slices; "
      f"give the outermost axis a multiple of {slices}, such as ('replica', {slices})."
    )
  return outer


def replicated(mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh) -> NamedSharding:
  """Examples are split over every axis along which data differs."""
  return NamedSharding(mesh, P(_batch_axes(mesh)))


def batch_ways(mesh) -> int:
  """The number of parts a global batch is split into."""
  return math.prod(mesh.shape[a] for a in _batch_axes(mesh))


def _batch_axes(mesh):
  return tuple(a for a in mesh.axis_names if a in WORDS["batch"])


# The state


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What a strategy sees of a leaf."""

  shape: tuple[int, ...]
  layers: int  # Leading dimensions that count layers: 1 in a scanned stack, 2 in one grouped for a circular pipeline.
  roles: Mapping[str, int]  # The dimension, from the right, that "tensor" or "expert" splits, as the model has it.


def _replicated(leaf, mesh, taken):
  """A whole copy on every device."""
  return {}


def _fsdp(leaf, mesh, taken, *args):
  """Splits the model's choice or the largest dimension left that the axes divide (ZeRO-3): data, expert and seq.

  Arguments: axes, and the size in elements below which an array is left whole.
  """
  axes = [a for a in args if isinstance(a, str)]
  min_size = next((a for a in args if isinstance(a, int)), 2**10)
  _check_axes(axes or ["data"], mesh)
  axes = axes or [a for a in ("data", "expert", "seq") if mesh.shape.get(a, 1) > 1 and a not in taken.values()]
  if math.prod(leaf.shape) < min_size:
    return {}
  # Not the layers: a scan would gather all of them for each.
  free = [i for i in range(leaf.layers - len(leaf.shape), 0) if i not in taken]
  while axes:
    parts = math.prod(mesh.shape[a] for a in axes)
    for i in sorted(free, key=lambda i: (i != leaf.roles.get("fsdp"), -leaf.shape[i])):
      if leaf.shape[i] % parts == 0:
        return {i: axes[0] if len(axes) == 1 else tuple(axes)}
    axes = axes[:-1]
  return {}


def _hsdp(leaf, mesh, taken):
  """Fully sharded within a replica, a copy in each: the gathering stays on the fast network."""
  _check_axes(["replica", "data"], mesh)
  return _fsdp(leaf, mesh, taken, "data")


def _split(leaf, mesh, taken, axis, dim):
  """Splits dimension `dim`, counted from the right (-1 is the last), along `axis`."""
  _check_axes([axis], mesh)
  if not -len(leaf.shape) <= dim < 0:
    raise UserError(
      f"dimension {dim} of shape {leaf.shape} does not exist; count from the right, from -1 to -{len(leaf.shape)}."
    )
  _check_divides(leaf.shape, dim, axis, mesh)
  return {dim: axis}


def _tensor(leaf, mesh, taken):
  """As the model's own table `TENSOR` has it; what is not in it stays whole."""
  return _by_role(leaf, mesh, "tensor")


def _expert(leaf, mesh, taken):
  """As the model's own table `EXPERT` has it."""
  return _by_role(leaf, mesh, "expert")


def _pipe(leaf, mesh, taken):
  """Splits stacked layers into stages."""
  _check_axes(["pipe"], mesh)
  if not leaf.layers:
    return {}
  dim = leaf.layers - 1 - len(leaf.shape)
  _check_divides(leaf.shape, dim, "pipe", mesh)
  return {dim: "pipe"}


def _by_role(leaf, mesh, axis):
  _check_axes([axis], mesh)
  if axis not in leaf.roles:
    return {}
  _check_divides(leaf.shape, leaf.roles[axis], axis, mesh)
  return {leaf.roles[axis]: axis}


# In this order, whatever the order they are named in: fsdp takes what the others leave.
STRATEGIES = {
  "replicated": _replicated,
  "pipe": _pipe,
  "expert": _expert,
  "tensor": _tensor,
  "split": _split,
  "hsdp": _hsdp,
  "fsdp": _fsdp,
}


def shard_tree(
  abstract, rules: Sequence[Rule] | str, mesh, *, roles: Mapping[str, Sequence] = {}, repeats: int = 1, own=None
):
  """Returns a `NamedSharding` for every leaf of `abstract`.

  Args:
    abstract: Shapes; where it has `params`, these are what `roles` speak of.
    rules: `(regex, strategy)` by first match, or one strategy for all.
    mesh: The devices.
    roles: `{"tensor": ((regex, dimension from the right), ...), "expert": ...}`, a model's tables.
    repeats: Rounds of a circular pipeline: stacked layers have two leading dimensions if there are several.
    own: Further parameters that `roles` speak of, which stand elsewhere in `abstract`.

  Raises:
    UserError: A leaf without rule, a rule without leaf, a size that an axis does not divide, an axis that is not there,
      or a large leaf that its strategy means to split but can't.
  """
  rules = as_rules(rules, abstract, mesh)
  names = paths.names(abstract)
  chosen = paths.first_match([r[0] for r in rules], names, "config.sharding")
  describe = _describer(abstract, roles, repeats, own)
  shardings = []
  for name, index, leaf in zip(names, chosen, jax.tree.leaves(abstract), strict=True):
    if index is None:
      raise UserError(
        f"config.sharding: no rule matches {name!r} {leaf.shape}; end the list with ('.*', 'replicated')."
      )
    pattern, strategy = rules[index]
    try:
      spec = _apply(strategy, describe(name, leaf.shape), mesh)
      _check_not_whole_by_accident(leaf, spec, strategy, mesh)
    except UserError as e:
      raise UserError(f"config.sharding: rule ({pattern!r}, {strategy!r}) on {name!r}: {e}") from None
    shardings.append(NamedSharding(mesh, P(*spec)))
  return jax.tree.unflatten(jax.tree.structure(abstract), shardings)


def as_rules(rules: Sequence[Rule] | str, abstract, mesh) -> tuple[Rule, ...]:
  """Returns rules in full: one strategy for all is short for one rule, and "auto" stands for what it comes to.

  That is every axis of the mesh put to its use, and ZeRO-3 where the state would take more than 1 GiB of a device.
  """
  rules = ((".*", rules),) if isinstance(rules, str) else tuple(rules)
  return tuple((pattern, _auto(abstract, mesh) if strategy == "auto" else strategy) for pattern, strategy in rules)


def _auto(abstract, mesh):
  words = [word for word in ("pipe", "expert", "tensor") if mesh.shape.get(word, 1) > 1]
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
  if mesh.shape.get("data", 1) > 1 and size / math.prod(mesh.shape[word] for word in words) > ROOM:
    words.append("fsdp")
  return "+".join(words) or "replicated"


def _describer(abstract, roles, repeats, own):
  """Returns `(name, shape) -> Leaf`: what a leaf is to the model it belongs to."""
  params = getattr(abstract, "params", abstract)  # A state's, or a tree of them.
  named = lambda tree: zip(paths.names(tree), jax.tree.leaves(tree), strict=True)
  shapes = {n: p.shape for tree in (own, params) for n, p in named(tree)}

  def describe(name, shape):
    parts = name.split("/")
    suffixes = ("/".join(parts[i:]) for i in range(len(parts)))
    param = next((s for s in suffixes if s in shapes), None)
    if param is None or shapes[param] != shape:  # Such as Adafactor's moments of rows.
      return Leaf(shape, 0, {})
    stacked = re.fullmatch(r"(?:.*/)?blocks/(?!\d+/).*", param) is not None
    matched = {a: next((d for regex, d in table if re.fullmatch(regex, param)), None) for a, table in roles.items()}
    return Leaf(shape, (1 + (repeats > 1)) * stacked, {a: d for a, d in matched.items() if d is not None})

  return describe


def _apply(strategy, leaf, mesh):
  """Returns the spec of a leaf; strategies joined by "+" each take dimensions that the others left."""
  calls = []
  for word in _words(strategy):
    if not (call := re.fullmatch(r"(\w+)(?:\((.*)\))?", word)) or call[1] not in STRATEGIES:
      raise UserError(f"there is no such strategy.{suggest(word.partition('(')[0], STRATEGIES)}")
    args = [int(a) if re.fullmatch(r"-?\d+", a) else a for a in filter(None, re.split(r"[\s,]+", call[2] or ""))]
    calls.append((call[1], args))
  taken = {}
  for name, args in sorted(calls, key=lambda call: list(STRATEGIES).index(call[0])):
    try:
      found = STRATEGIES[name](leaf, mesh, taken, *args)
    except (TypeError, KeyError) as e:
      raise UserError(
        f"wrong arguments {args} of {name}: write fsdp, fsdp(data), split(tensor,-1) or fsdp+tensor."
      ) from e
    if clash := taken.keys() & found.keys():
      raise UserError(f"dimension {min(clash)} of shape {leaf.shape} would be split twice.")
    taken |= found
  return [taken.get(i) for i in range(-len(leaf.shape), 0)]


def _words(strategy):
  """The strategies joined by "+"; a plus within brackets is not one."""
  return [word.strip() for word in re.split(r"\+(?![^(]*\))", strategy)]


def _check_axes(axes, mesh):
  for axis in axes:
    if axis not in mesh.shape:
      raise UserError(f"the mesh has no axis {axis!r}.{suggest(axis, mesh.shape)} Add it to config.mesh.")


def _check_divides(shape, dim, axis, mesh):
  size, parts = shape[dim], mesh.shape[axis]
  if size % parts:
    near = sorted((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - parts))[:2]
    raise UserError(
      f"the {parts} devices of axis {axis!r} do not divide dimension {dim} of shape {tuple(shape)}; "
      f"{' or '.join(map(str, sorted(near)))} would."
    )


def _check_not_whole_by_accident(leaf, spec, strategy, mesh):
  size = math.prod(leaf.shape) * leaf.dtype.itemsize
  meant = _words(strategy) == ["replicated"]
  if not meant and size > ACCIDENT and mesh.size > 1 and not any(spec):
    raise UserError(
      f"{size / 2**20:.0f} MiB {tuple(leaf.shape)} would be whole on each of {mesh.size} devices: nothing divides it. "
      "Change its size, or say that it is meant by a rule with 'replicated' for it."
    )


def bytes_a_device(leaf, sharding: NamedSharding) -> int:
  """The bytes of `leaf` that one device holds."""
  return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


# Activations


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a computation inside the step may know of the devices."""

  mesh: jax.sharding.Mesh | None = None
  words: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: WORDS)
  sequence: str = "ring"  # How attention sees a sequence that is split: "ring" or "ulysses".
  microbatches: int = 1  # That a pipeline works on.
  repeats: int = 1  # Rounds of a circular pipeline.
  remat_stages: bool = False  # A pipeline keeps the input of a stage alone.

  def axes(self, word: str | None) -> tuple[str, ...]:
    """The axes of the mesh that a word stands for; those of one device are left out."""
    if self.mesh is None or word is None:
      return ()
    return tuple(a for a in self.words[word] if self.mesh.shape.get(a, 1) > 1)

  def size(self, word: str) -> int:
    """The number of parts that a dimension of that name is split into."""
    return math.prod(self.mesh.shape[a] for a in self.axes(word)) if self.mesh is not None else 1

  def spec(self, *words: str | None) -> P:
    """The layout of an array whose dimensions have these names; None is a dimension that is whole."""
    axes = [self.axes(word) for word in words]
    return P(*(None if not a else a[0] if len(a) == 1 else a for a in axes))


_NOWHERE = Layout()
_current: contextvars.ContextVar[Layout] = contextvars.ContextVar("layout", default=_NOWHERE)


def current() -> Layout:
  """Returns the layout that the code being traced is for."""
  return _current.get()


@contextlib.contextmanager
def use(layout: Layout) -> Iterator[None]:
  """Traces what is within for `layout`."""
  token = _current.set(layout)
  try:
    yield
  finally:
    _current.reset(token)


def constrain(x: jax.Array, *words: str | None) -> jax.Array:
  """Lays an activation out by the names of its dimensions; identity where none of them is split.

  Raises:
    UserError: A dimension that its axes do not divide.
  """
  layout = current()
  spec = layout.spec(*words)
  if not any(spec):
    return x
  for dim, word in enumerate(words):
    if x.shape[dim] % (parts := layout.size(word) if word else 1):
      near = max(parts, x.shape[dim] // parts * parts)
      raise UserError(
        f"config.mesh: {word!r} has {x.shape[dim]} in an activation of shape {x.shape}, which the {parts} devices of "
        f"{'x'.join(layout.axes(word))} do not divide; {near} or {near + parts} would, or another size of the axis."
      )
  return jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, spec))


def spread(x: jax.Array) -> jax.Array:
  """Splits the last dimension over as many devices as it can be, so that none of them makes all of `x`."""
  mesh = current().mesh
  if mesh is None:
    return x
  fits = lambda axes: x.shape[-1] % math.prod(mesh.shape[a] for a in axes) == 0
  axes = next(mesh.axis_names[i:] for i in range(len(mesh.axis_names) + 1) if fits(mesh.axis_names[i:]))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), axes)))


def words(given: Mapping[str, str | Sequence[str] | None]) -> dict[str, tuple[str, ...]]:
  """Returns the words of activations, some of them mapped anew by a config.

  Raises:
    UserError: A word that no model uses, an axis that does not exist.
  """
  found = dict(WORDS)
  for word, axes in given.items():
    if word not in WORDS:
      raise UserError(f"config.activations.{word}: no activation has this word.{suggest(word, WORDS)}")
    found[word] = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in found[word]:
      if axis not in AXES:
        raise UserError(f"config.activations.{word}: {axis!r} is not a mesh axis.{suggest(axis, AXES)}")
  return found


def seq_is_split() -> bool:
  """Whether neighbours in a sequence may be on different devices."""
  return current().size("seq") > 1


# Processes


def data_part(mesh: jax.sharding.Mesh, process: int | None = None) -> tuple[tuple[int, ...], int]:
  """Returns which equal parts of a batch a process feeds, in order, and how many parts there are.

  Where its devices sit on the axes that split a batch says it, not its number: processes that differ along tensor, seq
  or pipe alone feed the same parts. The parts need not lie together: on a TPU, neighbours along a ring do not.

  Args:
    mesh: The devices of all processes.
    process: Whose parts; this one's if None.

  Raises:
    UserError: Processes would feed unequal shares.
  """
  process = jax.process_index() if process is None else process
  ways = batch_ways(mesh)
  held: dict[int, set[int]] = {}
  for device, (index,) in batch_sharding(mesh).devices_indices_map((ways,)).items():
    held.setdefault(device.process_index, set()).add(index.indices(ways)[0])
  shares = {p: len(parts) for p, parts in held.items()}
  if len(set(shares.values())) > 1:
    few, many = min(shares, key=shares.get), max(shares, key=shares.get)
    raise UserError(
      f"config.mesh: {dict(mesh.shape)} gives process {few} {shares[few]} of a batch's {ways} parts and process {many} "
      f"{shares[many]}; let the inner axes' sizes divide the {mesh.size // len(held)} devices of a process, or be a "
      "multiple of them."
    )
  # Neighbouring parts of every process count as one, if they can.
  whole = len(held[process])
  together = all(len(parts) == max(parts) - min(parts) + 1 and min(parts) % len(parts) == 0 for parts in held.values())
  if together:
    return (min(held[process]) // whole,), ways // whole
  return tuple(sorted(held[process])), ways
