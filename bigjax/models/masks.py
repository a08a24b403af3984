"""Who attends to whom: one rule for causal order, windows, prefixes, packed segments and padding.

Every backend of attention asks here, for a whole sequence or for a block of it, so that they can't differ. So do the
weights that dropout drops: they are a function of the key, the example, the head and the two positions, and therefore
the same whatever the backend, the block sizes and the mesh.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Int, UInt32

MASKED = -1e30  # A score nobody has; finite, because the difference of two infinities is not a number.


class Rule(NamedTuple):
  """What is known when the program is compiled."""

  causal: bool = False
  window: int | None = None  # Positions nearer than this are seen, oneself among them.
  scale: float = 1.0
  softcap: float | None = None
  dropout_rate: float = 0.0
  heads: int = 1  # Of the whole model, as are keys: they number the weights.
  keys: int = 1


class Tokens(NamedTuple):
  """Where each token stands. Segment 0 is padding; without segments all are one."""

  positions: Int[Array, "#batch seq"] | None  # None where nobody asks.
  segments: Int[Array, "#batch seq"] | None = None


class Drop(NamedTuple):
  """What dropout draws on: a key, and the numbers of the examples and heads that are here."""

  key: UInt32[Array, "2"]
  examples: UInt32[Array, " batch"]
  heads: UInt32[Array, " heads"]


def visible(
  rule: Rule, query: Tokens, key: Tokens, prefix: Int[Array, " batch"] | None = None
) -> Bool[Array, "#batch query key"] | None:
  """Returns which keys each query sees; None if all.

  The keys of the first `prefix` positions are seen by all queries, whatever the causal order; a window still holds.
  """
  found = []
  if rule.causal or rule.window is not None:
    distance = query.positions[:, :, None] - key.positions[:, None, :]
  if rule.causal:
    past = distance >= 0
    found.append(past if prefix is None else past | (key.positions < prefix[:, None])[:, None, :])
  if rule.window is not None:
    found.append(distance < rule.window)
    if not rule.causal or prefix is not None:
      found.append(distance > -rule.window)
  if key.segments is not None:
    found.append((key.segments != 0)[:, None, :])
    if query.segments is not None:
      found.append(query.segments[:, :, None] == key.segments[:, None, :])
  if not found:
    return None
  seen = found[0]
  for condition in found[1:]:
    seen = seen & condition
  return seen


def scores(
  rule: Rule,
  query: Array,
  key: Array,
  where: tuple[Tokens, Tokens, Int[Array, " batch"] | None],
) -> tuple[Array, Array]:
  """Returns float32 scores [batch, kv_heads, group, query, key], masked, and the same before the mask (for softcap).

  Args:
    query: [batch, kv_heads, group, query, dim], scaled.
    key: [batch, kv_heads, key, dim].
  """
  # Groups are more rows of one product; as a dimension of their own they cost a CPU 7% of attention.
  rows = query.reshape(*query.shape[:2], -1, query.shape[-1])
  raw = jnp.einsum("bhqd,bhkd->bhqk", rows, key, preferred_element_type=jnp.float32)
  raw = raw.reshape(*query.shape[:-1], -1)
  if rule.softcap is not None:
    raw = rule.softcap * jnp.tanh(raw / rule.softcap)
  seen = visible(rule, *where)
  return (raw if seen is None else jnp.where(seen[:, None, None], raw, MASKED)), raw


def keep(rule: Rule, drop: Drop, query: Tokens, key: Tokens, group: int) -> Bool[Array, "batch kv_heads group q k"]:
  """Returns which weights dropout keeps: the generator that jax.random uses, at the weight's own number."""
  row = drop.examples[:, None] * jnp.uint32(rule.heads) + drop.heads[None]
  row = row[:, :, None] * jnp.uint32(rule.keys) + query.positions.astype(jnp.uint32)[:, None]
  shape = (*row.shape, key.positions.shape[-1])
  column = jnp.broadcast_to(key.positions.astype(jnp.uint32)[:, None, None], shape)
  counts = jnp.stack([jnp.broadcast_to(row[..., None], shape), column])
  bits = threefry_2x32((drop.key[0], drop.key[1]), counts)[0]
  kept = bits >= jnp.uint32(round(rule.dropout_rate * 2**32))
  return kept.reshape(shape[0], -1, group, *shape[2:])


def raw_key(key: jax.Array) -> UInt32[Array, "2"]:
  """Returns two words drawn from a key of any kind."""
  return jax.random.bits(key, (2,), jnp.uint32)
