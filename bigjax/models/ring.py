"""Attention over a sequence that is split over devices: around a ring, or by turning sequences into heads.

Ring attention (https://arxiv.org/abs/2310.01889): each device keeps its queries, and keys and values pass by, one
neighbour a step, while it computes. The backward pass sends them around again, each with its gradient.

In causal order the device with the last tokens would have all the work, so a sequence is put into balanced order: of 2n
chunks, device i holds chunks i and 2n-1-i, and every step after the first is half a block for everyone
(https://github.com/zhuzilin/ring-flash-attention calls it zigzag). `balance` brings a sequence into that order,
`positions` says which position is where.

Ulysses (https://arxiv.org/abs/2309.14509): before, an all-to-all gives each device all of the sequence for some of the
heads; after, another one gives it back. It moves less where there are heads enough, and takes any backend.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import blockwise
from bigjax.models.blockwise import Where
from bigjax.models.masks import Drop, Rule, Tokens


def is_balanced() -> bool:
  """Whether there is an order of the sequence that spreads causal work better than the natural one."""
  layout = sharding.current()
  return layout.sequence == "ring" and layout.size("seq") > 1


def positions(seq: int) -> Int32[Array, " seq"]:
  """Returns the position in the sequence of what stands at each place in balanced order; 0, 1, ... without a ring."""
  if not is_balanced():
    return jnp.arange(seq, dtype=jnp.int32)
  parts = sharding.current().size("seq")
  check_sequence(seq, 2 * parts)
  return jnp.asarray(np.concatenate([_places(i, parts, seq // parts, np) for i in range(parts)]), jnp.int32)


def balance(x: Array, axis: int = 1) -> Array:
  """Brings an array [batch, ...] whose dimension `axis` is a sequence into balanced order; identity without a ring."""
  return _exchange(x, axis, balance_local)


def unbalance(x: Array, axis: int = 1) -> Array:
  """The inverse of `balance`."""
  return _exchange(x, axis, unbalance_local)


def check_sequence(seq: int, parts: int) -> None:
  """Raises unless `parts` divides the length of a sequence."""
  if seq % parts:
    near = [n for n in (seq // parts * parts, -(-seq // parts) * parts) if n]
    devices = sharding.current().size("seq")
    why = f"{devices} devices of axis seq" + (f" hold {parts} chunks of it" if parts > devices else "")
    raise UserError(
      f"config.mesh: a sequence of {seq} can't be split evenly: {why}. "
      f"Lengths that can: {' or '.join(map(str, near))}; or change the size of the axis."
    )


def _exchange(x, axis, how):
  if not is_balanced():
    return x
  layout = sharding.current()
  check_sequence(x.shape[axis], 2 * layout.size("seq"))
  words = ["seq" if dim == axis else "batch" if dim == 0 else None for dim in range(x.ndim)]
  spec, ring = layout.spec(*words), Ring.of(layout)
  exchange = jax.shard_map(
    lambda x: how(x, ring, axis), mesh=layout.mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  return exchange(x)


class Ring(NamedTuple):
  """The mesh axes that the sequence is split over, and how many devices they have."""

  axes: tuple[str, ...]
  size: int

  @classmethod
  def of(cls, layout: sharding.Layout) -> "Ring":
    """The ring of a layout."""
    return cls(layout.axes("seq"), layout.size("seq"))

  def index(self) -> Array:
    """The number of this device."""
    return jax.lax.axis_index(self.axes)


def _owner(chunk, n):
  return chunk if chunk < n else 2 * n - 1 - chunk


def _places(index, n, length, np=jnp):
  """The positions that device `index` of `n` holds in balanced order."""
  half = length // 2
  chunk = np.arange(half)
  return np.concatenate([index * half + chunk, (2 * n - 1 - index) * half + chunk])


def balance_local(x: Array, ring: Ring, axis: int = 1) -> Array:
  """`balance`, within shard_map: of a device's chunks 2d and 2d+1 the even ones travel, then the odd ones."""
  even, odd = jnp.split(x, 2, axis)
  even = jax.lax.ppermute(even, ring.axes, [(d, _owner(2 * d, ring.size)) for d in range(ring.size)])
  odd = jax.lax.ppermute(odd, ring.axes, [(d, _owner(2 * d + 1, ring.size)) for d in range(ring.size)])
  first_is_even = ring.index() % 2 == 0
  return jnp.concatenate([jnp.where(first_is_even, even, odd), jnp.where(first_is_even, odd, even)], axis)


def unbalance_local(x: Array, ring: Ring, axis: int = 1) -> Array:
  """The inverse of `balance_local`."""
  first, second = jnp.split(x, 2, axis)
  first_is_even = ring.index() % 2 == 0
  even, odd = jnp.where(first_is_even, first, second), jnp.where(first_is_even, second, first)
  even = jax.lax.ppermute(even, ring.axes, [(_owner(2 * d, ring.size), d) for d in range(ring.size)])
  odd = jax.lax.ppermute(odd, ring.axes, [(_owner(2 * d + 1, ring.size), d) for d in range(ring.size)])
  return jnp.concatenate([even, odd], axis)


class Plan(NamedTuple):
  """What is known of a ring when the program is compiled."""

  rule: Rule
  ring: Ring
  zigzag: bool  # Causal, in balanced order, and nothing else says who comes before whom.
  query_blocks: int
  key_blocks: int

  def pairs_at_home(self) -> np.ndarray:
    """The pairs of blocks, of queries and keys of the same device, that see each other."""
    return np.argwhere(np.tri(self.query_blocks) if self.zigzag else np.ones((self.query_blocks, self.key_blocks)))

  def pairs_away(self, earlier: Any) -> Any:
    """The pairs with keys of another device, which comes earlier around the ring or later.

    In balanced order all queries see the first half of an earlier device's keys, and the second half of the queries
    sees all keys of a later one's. Either is half of the pairs, and needs no causal mask.
    """
    pairs = np.ones((self.query_blocks, self.key_blocks))
    if not self.zigzag:
      return np.argwhere(pairs)
    half = self.query_blocks // 2
    before, after = pairs.copy(), pairs.copy()
    before[:, half:] = 0
    after[:half] = 0
    return jnp.where(earlier, np.argwhere(before), np.argwhere(after))


def ring_attention(
  rule: Rule,
  ring: Ring,
  query: Array,
  key: Array,
  value: Array,
  tokens: Tokens,
  key_tokens: Tokens,
  prefix: Array | None,
  drop: Drop | None,
  *,
  zigzag: bool,
  size: int | None = None,
) -> Array:
  """Returns this device's part of attention, [batch, seq / devices, heads, dim]; to be called within shard_map.

  Args:
    rule: the mask and the scale, which is applied here.
    ring: the axes.
    query, key, value: [batch, seq / devices, heads or kv_heads, dim].
    tokens, key_tokens: this device's part of them.
    prefix, drop: as elsewhere.
    zigzag: the sequence is in balanced order, and attention is causal in it.
    size: tokens of a block; by rule from the shape if None.
  """
  size = size or blockwise.block_size(query.shape[0], query.shape[2])
  halves = 2 if zigzag else 1
  blocks = [halves * blockwise.count(x.shape[1] // halves, size) for x in (query, key)]
  return _ring(Plan(rule, ring, zigzag, *blocks), query, key, value, (tokens, key_tokens, prefix, drop))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(plan, query, key, value, where):
  return _ring_forward(plan, query, key, value, where)[0]


def _ring_forward(plan, query, key, value, where):
  rule = plan.rule
  queries = blockwise.split_queries(query * rule.scale, key.shape[2], plan.query_blocks)
  tokens, travelling, rest = _cut(plan, key, value, where)

  def add(sums, travelling, rule, pairs):
    keys, values, key_tokens = travelling
    here = Where(tokens, key_tokens, *rest)
    return blockwise.forward(rule, sums, queries, keys, values, here, pairs, look=rule.window is not None)

  sums = add(blockwise.start(queries, value.shape[-1]), travelling, rule, plan.pairs_at_home())
  sums = _around(plan, sums, travelling, add)
  out, logsum = blockwise.finish(sums, value.dtype)
  out = blockwise.join_queries(out)
  return out, (query, key, value, where, out, logsum)


def _ring_backward(plan, kept, out_gradient):
  query, key, value, where, out, logsum = kept
  rule, kv_heads = plan.rule, key.shape[2]
  queries = blockwise.split_queries(query * rule.scale, kv_heads, plan.query_blocks)
  tokens, travelling, rest = _cut(plan, key, value, where)
  delta = blockwise.split_delta(out, out_gradient, kv_heads, plan.query_blocks)
  out_gradient = blockwise.split_queries(out_gradient, kv_heads, plan.query_blocks)

  def add(gradients, travelling, rule, pairs):
    keys, values, key_tokens = travelling
    here = Where(tokens, key_tokens, *rest)
    rows = (logsum, delta, out_gradient)
    look = rule.window is not None
    return blockwise.backward(rule, gradients, queries, keys, values, here, pairs, *rows, look=look)

  def add_away(gradients, travelling, rule, pairs):
    # Gradients of keys arrive while this device's share is computed, so they are added after it.
    to_query, *to_keys = gradients
    arrived = rotate(to_keys, plan.ring)
    to_query, *share = add((to_query, *map(jnp.zeros_like, to_keys)), travelling, rule, pairs)
    return to_query, *map(jnp.add, arrived, share)

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries, *travelling[:2]))
  gradients = add(zeros, travelling, rule, plan.pairs_at_home())
  to_query, *to_keys = _around(plan, gradients, travelling, add_away)
  to_key, to_value = rotate(to_keys, plan.ring)  # Home.
  return (
    (blockwise.join_queries(to_query) * rule.scale).astype(query.dtype),
    blockwise.join_keys(to_key).astype(key.dtype),
    blockwise.join_keys(to_value).astype(value.dtype),
    None,
  )


_ring.defvjp(_ring_forward, _ring_backward)


def _cut(plan, key, value, where):
  tokens, key_tokens, prefix, drop = where
  travelling = (
    blockwise.split_keys(key, plan.key_blocks),
    blockwise.split_keys(value, plan.key_blocks),
    blockwise.split_tokens(key_tokens, plan.key_blocks),
  )
  return blockwise.split_tokens(tokens, plan.query_blocks), travelling, (prefix, drop)


def _around(plan, carry, travelling, add):
  """Adds what all other devices' keys give; while one step computes, the keys of the next are on their way."""
  n, index = plan.ring.size, plan.ring.index()
  rule = plan.rule._replace(causal=False) if plan.zigzag else plan.rule
  keys, values, key_tokens = travelling
  if not (rule.causal or rule.window is not None or rule.dropout_rate):
    key_tokens = key_tokens._replace(positions=None)  # Nobody will ask for them.

  def step(carry, travelling, distance):
    earlier = (index - distance) % n < index
    return add(carry, travelling, rule, plan.pairs_away(earlier))

  def step_and_send(state, distance):
    carry, travelling = state
    following = rotate(travelling, plan.ring)
    return (step(carry, travelling, distance), following), None

  state = (carry, rotate((keys, values, key_tokens), plan.ring))
  (carry, travelling), _ = jax.lax.scan(step_and_send, state, jnp.arange(1, n - 1))
  return step(carry, travelling, n - 1)


def rotate(tree: Any, ring: Ring) -> Any:
  """Sends everything to the next device around the ring."""
  forward = [(d, (d + 1) % ring.size) for d in range(ring.size)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axes, forward), tree)


def shared_heads(heads: int, kv_heads: int, parts: int) -> np.ndarray:
  """Returns the key-value heads [parts, n] that each of `parts` consecutive groups of query heads needs.

  Where fewer key-value heads than parts exist, several parts get the same one.
  """
  each, group = heads // parts, heads // kv_heads
  if each % group == 0:
    return np.arange(kv_heads).reshape(parts, -1)
  needed = np.arange(heads).reshape(parts, each) // group
  return needed[:, :1] if group % each == 0 else needed


def ulysses(
  ring: Ring,
  query: Array,
  key: Array,
  value: Array,
  tokens: Tokens,
  key_tokens: Tokens,
  drop: Drop | None,
  attend: Callable[..., Array],
) -> Array:
  """Returns this device's part of attention, as `ring_attention`; each device sees all tokens for some of the heads.

  Args:
    ring: the axes.
    query, key, value, tokens, key_tokens, drop: this device's part of them.
    attend: what each device calls, (query, key, value, tokens, key_tokens, drop) -> result.
  """
  heads, kv_heads = query.shape[2], key.shape[2]
  if heads % ring.size:
    near = [n for n in (heads // ring.size * ring.size, -(-heads // ring.size) * ring.size) if n]
    raise UserError(
      f"config.mesh: {heads} heads on each device can't be dealt to the {ring.size} of axis seq, as all-to-all "
      f"attention does. {' or '.join(map(str, near))} heads could; or choose ring attention."
    )
  needed = shared_heads(heads, kv_heads, ring.size).reshape(-1)
  if len(needed) > kv_heads:
    key, value = key[:, :, needed], value[:, :, needed]
  deal = lambda x: jax.lax.all_to_all(x, ring.axes, split_axis=2, concat_axis=1, tiled=True)
  gather = lambda x: jax.lax.all_gather(x, ring.axes, axis=1, tiled=True)
  if drop is not None:
    each = heads // ring.size
    drop = drop._replace(heads=jax.lax.dynamic_slice_in_dim(drop.heads, ring.index() * each, each))
  tokens, key_tokens = jax.tree.map(gather, (tokens, key_tokens))
  out = attend(deal(query), deal(key), deal(value), tokens, key_tokens, drop)
  return jax.lax.all_to_all(out, ring.axes, split_axis=1, concat_axis=2, tiled=True)
