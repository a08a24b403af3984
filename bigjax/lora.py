"""Low-rank adapters: a matrix W stays, and what training adds to it is A B, https://arxiv.org/abs/2106.09685.

`state.Model` builds a module as ever. Adapters are then the parameters, leaves `W/a` [..., in, rank] and `W/b` [...,
rank, out] beside the name of their matrix; the model's own become the part `base` of the extras, which nothing
differentiates, decays or keeps moments of. So the loop, the optimizer and the task see a small model.

A dense layer adds x A B to its result, so that no array of the size of W is made; it is told so when its module is put
together for a call, after `quantize` has had its say, and so stays float while the base multiplies in 8 bits. Other
matrices (embeddings, experts, convolutions) are W + A B in the call, and their gradient is as large as they are.
Leading dimensions, of scanned layers or of experts, are those of the matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes

from bigjax import paths
from bigjax.errors import UserError

PyTree = Any
Pair = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Which matrices get an adapter, and of what kind."""

  rules: tuple[tuple[str, int], ...]  # (regex of a parameter, rank); first match, others stay as they are. 0: none.
  alpha: float | None = None  # An adapter is multiplied by alpha / rank; None: by 1.
  scaling: Literal["rank", "root"] = "rank"  # "root": by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732.
  dropout: float = 0.0  # Of what goes into an adapter, in training; for dense layers.
  base: Literal["float32", "bfloat16"] | None = None  # What the matrices are kept in; None: as config.precision has it.

  def scale(self, rank: int) -> float:
    """What an adapter is multiplied by."""
    return 1.0 if self.alpha is None else self.alpha / (rank if self.scaling == "rank" else math.sqrt(rank))


class Adapter(nnx.Module):
  """What a dense layer adds to its result: (x A) B, scaled."""

  def __init__(self, pair: Pair, scale: float, *, dtype: Any, dropout: float = 0.0, key: jax.Array | None = None):
    self.a, self.b = nnx.Param(pair["a"]), nnx.Param(pair["b"])
    self.scale, self.dropout, self.dtype = scale, dropout, dtype
    self.key = None if key is None else nnx.Variable(key)
    self.dot_general, self.promote_dtype = jax.lax.dot_general, dtypes.promote_dtype  # As in nnx.Linear.

  def __call__(self, x: jax.Array) -> jax.Array:
    dtype = self.dtype or x.dtype
    if self.key is not None:
      keep = jax.random.bernoulli(self.key[...], 1 - self.dropout, x.shape)
      x = jnp.where(keep, x / (1 - self.dropout), jnp.zeros_like(x))
    for factor in (self.a, self.b):
      x, kernel, _ = self.promote_dtype((x, factor[...], None), dtype=dtype)
      x = self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return x * jnp.asarray(self.scale, dtype)


@dataclasses.dataclass(frozen=True)
class Adapters:
  """The adapters of a module; made by `of`."""

  config: LoraConfig
  ranks: Mapping[str, int]  # By the name of the matrix.
  dense: frozenset[str]  # Those that are kernels of dense layers.
  shapes: Mapping[str, tuple[int, ...]]

  def init(self, key: jax.Array) -> PyTree:
    """Returns fresh adapters, float32: A uniform within 1 / sqrt(in), B zero, so that nothing is changed yet."""
    leaves = {}
    for name, rank in self.ranks.items():
      *lead, rows, columns = self.shapes[name]
      own = jax.random.fold_in(key, zlib.crc32(name.encode()))
      bound = rows**-0.5
      leaves[f"{name}/a"] = jax.random.uniform(own, (*lead, rows, rank), jnp.float32, -bound, bound)
      leaves[f"{name}/b"] = jnp.zeros((*lead, rank, columns), jnp.float32)
    return nested(leaves)

  def applied(self, base: PyTree, adapters: PyTree) -> PyTree:
    """Returns the base with the adapters of what is no dense layer added."""
    pairs = self._pairs(adapters)

    def leaf(name, w):
      if name not in pairs or name in self.dense:
        return w
      return w + self.config.scale(self.ranks[name]) * jnp.matmul(pairs[name]["a"], pairs[name]["b"])

    return paths.map_with_name(leaf, base)

  def attached(self, module: nnx.Module, adapters: PyTree, key: jax.Array | None = None) -> nnx.Module:
    """Returns the module, its dense layers told what to add; without a key nothing is dropped."""
    pairs, rate = self._pairs(adapters), self.config.dropout
    layers = {"/".join(map(str, path)): layer for path, layer in nnx.iter_modules(module)}
    for name in self.dense:
      layer, own = layers[name.rpartition("/")[0]], None
      if key is not None and rate:
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        lead = self.shapes[name][:-2]
        own = jax.random.split(own, lead) if lead else own
      layer.adapter = Adapter(
        pairs[name], self.config.scale(self.ranks[name]), dtype=layer.dtype, dropout=rate, key=own
      )
    return module

  def roles(self, tables: Mapping[str, Sequence]) -> dict[str, tuple]:
    """Returns a model's tables of what tensor and expert parallelism split, adapters among it.

    Columns of W are columns of B, rows are rows of A, experts are experts of both; the rank is never split.
    """
    found = {}
    for axis, table in tables.items():
      own = []
      for name in self.ranks:
        dim = next((d for regex, d in table if re.fullmatch(regex, name)), None)
        parts = {None: "", -1: "b", -2: "a"}.get(dim, "ab")
        own += [(re.escape(f"{name}/{part}"), dim) for part in parts]
      found[axis] = (*own, *table)
    return found

  def merged(self, base: PyTree, adapters: PyTree) -> tuple[PyTree, dict[str, np.ndarray]]:
    """Returns (the base with all adapters added, what `unmerged` has to know); arrays of NumPy."""
    pairs, apart = self._pairs(adapters), {}

    def leaf(name, w):
      if name not in pairs:
        return np.asarray(w)
      merged, apart[name] = merge(np.asarray(w), pairs[name], self.config.scale(self.ranks[name]))
      return merged

    return paths.map_with_name(leaf, base), apart

  def unmerged(self, whole: PyTree, adapters: PyTree, apart: Mapping[str, np.ndarray]) -> PyTree:
    """Returns the base that `merged` was given, to the bit."""
    pairs, scale = self._pairs(adapters), self.config.scale
    back = lambda n, w: unmerge(w, pairs[n], scale(self.ranks[n]), apart[n]) if n in pairs else np.asarray(w)
    return paths.map_with_name(back, whole)

  def _pairs(self, adapters):
    flat = dict(zip(paths.names(adapters), jax.tree.leaves(adapters), strict=True))
    return {name: {part: flat[f"{name}/{part}"] for part in "ab"} for name in self.ranks}


def of(config: LoraConfig, module: nnx.Module, base: PyTree) -> Adapters:
  """Returns the adapters that a config asks for.

  Args:
    config: The config.
    module: The module, its arrays or shapes.
    base: Its parameters by name, or their shapes.

  Raises:
    UserError: A rule that decides nothing, a leaf that is no matrix, a rank that is none.
  """
  if not 0 <= config.dropout < 1:
    raise UserError(f"config.lora.dropout: {config.dropout} is not a rate. Choose 0 <= dropout < 1; 0 turns it off.")
  if config.alpha is not None and not config.alpha > 0:
    raise UserError(f"config.lora.alpha: {config.alpha} must be above 0.")
  shapes = {n: tuple(x.shape) for n, x in zip(paths.names(base), jax.tree.leaves(base), strict=True)}
  chosen = paths.first_match([regex for regex, _ in config.rules], list(shapes), "config.lora.rules")
  ranks = {n: config.rules[i][1] for n, i in zip(shapes, chosen, strict=True) if i is not None}
  ranks = {n: rank for n, rank in ranks.items() if rank != 0}
  if not ranks:
    raise UserError("config.lora.rules give no matrix an adapter; write such as [('.*(query|value)/kernel', 8)].")
  dense = {
    "/".join([*map(str, path), "kernel"]) for path, layer in nnx.iter_modules(module) if hasattr(layer, "adapter")
  }
  for name, rank in ranks.items():
    pattern = next(regex for regex, _ in config.rules if re.fullmatch(regex, name))
    kind = name.rpartition("/")[2]
    if len(shapes[name]) < 2 or kind in ("bias", "scale"):
      raise UserError(
        f"config.lora.rules: {pattern!r} takes {name!r} {list(shapes[name])}, which is no matrix; end it with /kernel."
      )
    if not 0 < rank <= (limit := min(shapes[name][-2:])):
      raise UserError(
        f"config.lora.rules: rank {rank} for {name!r} {list(shapes[name])}; a matrix of this size has at most {limit}."
      )
  if config.dropout and not dense & set(ranks):
    raise UserError("config.lora.dropout is for dense layers, of which config.lora.rules name none; set it to 0.")
  return Adapters(config, ranks, frozenset(dense & set(ranks)), {n: shapes[n] for n in ranks})


def nested(leaves: Mapping[str, Any]) -> PyTree:
  """Leaves by name as nested dicts."""
  root: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = root
    for part in parents:
      node = node.setdefault(part, {})
    node[last] = leaf
  return root


# Merging


def product(pair: Pair, scale: float) -> np.ndarray:
  """Returns scale * A B as float32, the same bits on every machine.

  It is added up over the rank in order, in float64, by single sums and products, of which IEEE 754 leaves no doubt; how
  a matrix product adds is its library's affair.
  """
  a, b = (np.asarray(pair[part], np.float64) for part in "ab")
  total = np.zeros((*a.shape[:-1], b.shape[-1]))
  for i in range(a.shape[-1]):
    total += a[..., i, None] * b[..., None, i, :]
  return (scale * total).astype(np.float32)


def merge(w: np.ndarray, pair: Pair, scale: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns (W + scale * A B, what `unmerge` has to know to get W back to the bit).

  A sum is rounded, so taking A B away again gives a neighbour of W, now and then. Which one is what is kept: how many
  floats they are apart, int32, nearly always 0 and so next to nothing once it is compressed.
  """
  change, w = product(pair, scale), np.asarray(w)
  merged = (w.astype(np.float32) + change).astype(w.dtype)
  with np.errstate(over="ignore"):
    return merged, _order(w) - _order(_without(merged, change))


def unmerge(merged: np.ndarray, pair: Pair, scale: float, apart: np.ndarray) -> np.ndarray:
  """Returns the W that `merge` was given, to the bit."""
  near, merged = _without(np.asarray(merged), product(pair, scale)), np.asarray(merged)
  with np.errstate(over="ignore"):
    return _from_order(_order(near) + apart, merged.dtype)


def _without(merged, change):
  return (merged.astype(np.float32) - change).astype(merged.dtype)


def _order(x):
  """The place of each float in the order of all: whole numbers, neighbours for floats that are; -0 has its own."""
  bits = x.view(np.int32) if x.dtype == np.float32 else x.view(np.int16).astype(np.int32)
  mask = np.int32(0x7FFFFFFF if x.dtype == np.float32 else 0x7FFF)
  return np.where(bits < 0, ~(bits & mask), bits)


def _from_order(place, dtype):
  wide = dtype == np.float32
  mask = np.int32(0x7FFFFFFF if wide else 0x7FFF)
  bits = np.where(place < 0, (~place & mask) | ~mask, place)
  return bits.astype(np.int32).view(dtype) if wide else bits.astype(np.int16).view(dtype)


# Which base


def digest(base: PyTree) -> str:
  """Returns what tells one base from another: sums of the bits of all leaves, each weighed by its name and place.

  Whole numbers, so that the order of adding doesn't matter: the same on any mesh, and with layers stacked or not.
  """
  leaves = dict(zip(paths.names(base), jax.tree.leaves(base), strict=True))
  sums: dict[str, np.ndarray] = {}
  for name, leaf in leaves.items():
    layer = re.search(r"(?<=blocks/)(\d+)/", name)
    whole = name if layer is None else name[: layer.start()] + name[layer.end() :]
    start = int(layer[1]) * math.prod(leaf.shape) if layer else 0
    found = np.asarray(_weighed(leaf, np.uint32(start % 2**32)))
    sums[whole] = sums.get(whole, np.zeros(2, np.uint32)) + found
  total = [zlib.crc32(f"{name} {s.tolist()}".encode()) for name, s in sorted(sums.items())]
  low = zlib.crc32(repr(total).encode())
  high = zlib.crc32(repr([s.tolist() for _, s in sorted(sums.items())]).encode())
  return f"{high:08x}{low:08x}"


@functools.partial(jax.jit, inline=False)
def _weighed(leaf, start):
  """Two sums of the bits of a leaf, modulo 2^32."""
  if jnp.issubdtype(leaf.dtype, jnp.floating):
    width = {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    leaf = jax.lax.bitcast_convert_type(leaf, width)
  bits, place = leaf.astype(jnp.uint32), jnp.full(leaf.shape, start, jnp.uint32)
  stride = 1
  for dim in reversed(range(leaf.ndim)):
    place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dim) * np.uint32(stride % 2**32)
    stride *= leaf.shape[dim]
  found = []
  for odd in (0x9E3779B1, 0x85EBCA77):
    mixed = (bits ^ (place * np.uint32(odd))) * np.uint32(0xC2B2AE3D)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x27D4EB2F)
    found.append((mixed ^ (mixed >> 13)).sum(dtype=jnp.uint32))
  return jnp.stack(found)
