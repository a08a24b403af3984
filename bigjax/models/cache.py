"""What attention keeps of the tokens before, so that a new token costs one row of every product.

The prompts of a batch end together, with padding in front of the shorter ones. So a token has the same slot in every
row, and writing it is one slice. Keys that turn are kept turned. A layer with a window keeps a ring of as many slots as
the window is long; latent attention keeps the latent vector. In "int8" there is a scale for every head and token.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bigjax import sharding
from bigjax.errors import UserError, suggest
from bigjax.models.attention import attend

TYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, "int8": jnp.int8}

# Arrays, or shapes, by what they are: [batch, heads, slots, dim]; in a scanned stack after an axis of layers.
Kept = dict[str, Any]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kept", "count", "padding", "index"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Layer:
  """What one layer keeps, heads before slots: as attention multiplies it."""

  kept: Kept
  count: Int[Array, ""]  # Tokens that went in before, padding among them: the slot of the next one, but for rings.
  padding: Int[Array, " batch"]  # Of the tokens of each row, the first ones.
  index: Int[Array, ""] | None = None  # Of the layer, where `kept` is a stack's.

  @property
  def slots(self) -> int:
    return next(iter(self.kept.values())).shape[-2]

  def add(self, new: Mapping[str, Float[Array, "batch seq heads dim"]]) -> "Layer":
    """Returns the cache with these tokens: the first ones of all rows, or one more of each."""
    kept = dict(self.kept)
    for name, array in new.items():
      array = _heads_first(array.swapaxes(1, 2))
      if kept[name].dtype == jnp.int8:
        scale = jnp.max(jnp.abs(array.astype(jnp.float32)), axis=-1, keepdims=True) / 127
        array = jnp.round(array / jnp.where(scale == 0, 1, scale))
        kept[_scale(name)] = self._written(kept[_scale(name)], scale)
      kept[name] = self._written(kept[name], array)
    return dataclasses.replace(self, kept=kept)

  def _written(self, kept, array):
    seq, first = array.shape[2], self.count % self.slots
    if seq > 1:  # Into an empty cache; of a ring only what stays.
      first = 0
      if seq > self.slots:
        array = jnp.roll(array[:, :, -self.slots :], seq % self.slots, axis=2)
    start = (0, 0, first, 0)
    array = array.astype(kept.dtype)
    if self.index is not None:
      start, array = (self.index, *start), array[None]
    return jax.lax.dynamic_update_slice(kept, array, start)

  def read(self, name: str, dtype) -> Float[Array, "batch slots heads dim"]:
    """Returns one of the things kept, of all tokens, in numbers of `dtype`."""
    mine = lambda kept: kept if self.index is None else jax.lax.dynamic_index_in_dim(kept, self.index, keepdims=False)
    array = mine(self.kept[name])
    if array.dtype == jnp.int8:
      array = array.astype(jnp.float32) * mine(self.kept[_scale(name)])
    return array.astype(dtype).swapaxes(1, 2)

  def recall(
    self, query: Float[Array, "batch 1 heads dim"], *, scale: float | None = None, softcap: float | None = None
  ) -> Float[Array, "batch 1 heads value_dim"]:
    """Returns what one token sees of those whose `key` and `value` are kept, itself among them."""
    key, value = self.read("key", query.dtype), self.read("value", query.dtype)
    how = dict(scale=scale, softcap=softcap, backend="reference")
    return attend(query, key, value, key_segments=self.filled(), **how)

  def filled(self) -> Int[Array, "batch slots"]:
    """Returns 1 for slots that hold a token which the one added last sees, else 0."""
    age = (self.count - jnp.arange(self.slots)) % self.slots
    return ((self.count - age)[None] >= self.padding[:, None]).astype(jnp.int32)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "count", "padding"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
  """What all layers of a model keep; made by its `empty_cache`."""

  layers: tuple[Kept, ...]
  count: Any  # As in `Layer`, as is the padding.
  padding: Any

  def places(self, seq: int) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"] | None]:
    """Returns the positions of the next tokens, and where there are several their segments: 0 is padding."""
    positions = self.count + jnp.arange(seq, dtype=jnp.int32)[None] - self.padding[:, None]
    return jnp.maximum(positions, 0), None if seq == 1 else (positions >= 0).astype(jnp.int32)

  def run(self, extend: Callable, groups: Sequence, x: Array) -> tuple[Array, "Cache"]:
    """Goes through all layers; returns what comes out, and the cache with the new tokens.

    Args:
      extend: `extend(x, blocks, layers) -> (x, layers)` goes through some blocks with their part of the cache.
      groups: pairs of such blocks, in a list or a stack with a leading axis to scan over, and how many layers each has.
      x: [batch, seq, width].
    """
    after, start = [], 0
    at = lambda kept, index: [Layer(one, self.count, self.padding, index) for one in kept]
    for blocks, length in groups:
      stacked = not isinstance(blocks, nnx.List)
      stop = start + length * (1 if stacked else len(blocks))
      kept, start = self.layers[start:stop], stop
      if stacked:
        count = jax.tree.leaves(blocks)[0].shape[0]

        def body(carry, xs):
          x, layers = extend(carry[0], xs[0], at(carry[1], xs[1]))
          return (x, tuple(layer.kept for layer in layers)), None

        (x, kept), _ = jax.lax.scan(body, (x, kept), (blocks, jnp.arange(count)))
        after += kept
        continue
      for i, block in enumerate(blocks):
        x, layers = extend(x, block, at(kept[i * length : (i + 1) * length], None))
        after += [layer.kept for layer in layers]
    return x, dataclasses.replace(self, layers=tuple(after))

  def after(self, seq: int) -> "Cache":
    return dataclasses.replace(self, count=self.count + seq)

  def grown(self, like: "Cache") -> "Cache":
    """Returns the same with as many slots as `like` has, shapes of a larger cache of the same model."""
    pad = lambda kept, to: jnp.pad(kept, [(0, b - a) for a, b in zip(kept.shape, to.shape)])
    return dataclasses.replace(self, layers=jax.tree.map(pad, self.layers, like.layers))


def empty(
  layers: Sequence[tuple[Mapping[str, tuple[int, int]], int | None, int | None]],
  padding: Int[Array, " batch"],
  slots: int,
  dtype: str,
) -> Cache:
  """Returns a cache without tokens.

  Args:
    layers: of each (what it keeps: heads and dimensions by name, its window, the number of layers if it's a stack).
    padding: how many of each row's tokens will be padding, the first ones.
    slots: for how many tokens, padding among them.
    dtype: "float32", "bfloat16", "float16" or "int8".

  Raises:
    UserError: The mesh splits sequences or layers, which one token at a time can't be.
  """
  if dtype not in TYPES:
    raise UserError(f"cache: {dtype!r} is not a type of caches.{suggest(dtype, TYPES)}")
  layout = sharding.current()
  for word, axis in (("seq", "seq"), ("stage", "pipe")):
    if layout.size(word) > 1:
      raise UserError(f"config.mesh: a token at a time can't be split over {axis!r}. Use data, expert and tensor.")

  def make(keeps, window, stack):
    kept = {}
    for name, (heads, dim) in keeps.items():
      shape = (len(padding), heads, slots if window is None else min(window, slots))
      full = lambda dim, dtype, shape=shape: _heads_first(jnp.zeros((*shape, dim), dtype))
      found = {name: full(dim, TYPES[dtype])}
      if dtype == "int8":
        found[_scale(name)] = full(1, jnp.float32)
      kept |= found
    return kept if stack is None else {k: jnp.broadcast_to(v[None], (stack, *v.shape)) for k, v in kept.items()}

  return Cache(tuple(make(*layer) for layer in layers), jnp.zeros((), jnp.int32), padding)


def _scale(name):
  return f"{name}_scale"


def _heads_first(x):
  """Heads are split over devices where there are enough."""
  word = None if x.shape[1] % sharding.current().size("heads") else "heads"
  return sharding.constrain(x, "batch", word, None, None)
