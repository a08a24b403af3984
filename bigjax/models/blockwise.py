"""Attention block by block: memory grows with the sequence, not with its square.

Forward, the online softmax of FlashAttention (https://arxiv.org/abs/2205.14135); backward, the loop of its second part
(https://arxiv.org/abs/2307.08691), which computes scores again and keeps only the logarithm of each row's sum. Both run
over a list of pairs (block of queries, block of keys), in which pairs that see nothing don't occur. Ring attention runs
the same loops over the keys that pass by.

Blocks are the leading dimension: queries [blocks, batch, kv_heads, group, size, dim], keys and values
[blocks, batch, kv_heads, size, dim]. Sums are float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from bigjax import sharding
from bigjax.models import masks
from bigjax.models.masks import Drop, Rule, Tokens

# Scores of one pair of blocks, over batch and heads, and the smallest block. What a processor's cache holds is fastest
# there: at 16 x 6 heads of 256 tokens, blocks of 64 take 0.8 of the time of 128. Elsewhere few and large products are.
LIMITS = {"cpu": (2**19, 64)}
USUAL = (2**24, 128)
LARGEST = 1024
EMPTY = masks.MASKED / 2  # A row whose largest score is below has seen nothing.


class Where(NamedTuple):
  """Tokens of queries and of keys in blocks, and what holds for both."""

  query: Tokens
  key: Tokens
  prefix: Array | None
  drop: Drop | None


class Sums(NamedTuple):
  """The softmax so far: weighted values, the largest score of a row, and the sum of its weights."""

  values: Array
  largest: Array
  total: Array


def platform() -> str:
  """Returns what the program is compiled for, which need not be here: "cpu", "tpu", "gpu"."""
  mesh = sharding.current().mesh
  found = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  return "gpu" if found in ("cuda", "rocm") else found


def block_size(batch: int, heads: int) -> int:
  """Returns how many tokens a block should have: as many as fit the budget of scores, within limits."""
  size, (most, smallest) = LARGEST, LIMITS.get(platform(), USUAL)
  while size > smallest and batch * heads * size * size > most:
    size //= 2
  return size


def count(length: int, size: int) -> int:
  """Returns the least number of equal blocks of at most `size`, half of that at the worst; 1 if nothing divides."""
  fewest = -(-length // size)
  return next((n for n in range(fewest, 2 * fewest + 1) if length % n == 0), 1)


def split(x: Array, blocks: int) -> Array:
  """[batch, seq, ...] -> [blocks, batch, seq / blocks, ...]."""
  return jnp.moveaxis(x.reshape(x.shape[0], blocks, -1, *x.shape[2:]), 1, 0)


def join(x: Array) -> Array:
  """[blocks, batch, size, ...] -> [batch, blocks * size, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def split_queries(x: Array, kv_heads: int, blocks: int) -> Array:
  """[batch, seq, heads, dim] -> [blocks, batch, kv_heads, group, size, dim]."""
  x = x.reshape(x.shape[0], blocks, -1, kv_heads, x.shape[2] // kv_heads, x.shape[3])
  return x.transpose(1, 0, 3, 4, 2, 5)


def join_queries(x: Array) -> Array:
  """The inverse of `split_queries`."""
  blocks, batch, kv_heads, group, size, dim = x.shape
  return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, blocks * size, kv_heads * group, dim)


def split_keys(x: Array, blocks: int) -> Array:
  """[batch, seq, kv_heads, dim] -> [blocks, batch, kv_heads, size, dim]."""
  return split(x, blocks).swapaxes(2, 3)


def join_keys(x: Array) -> Array:
  """The inverse of `split_keys`."""
  return join(x.swapaxes(2, 3))


def split_tokens(tokens: Tokens, blocks: int) -> Tokens:
  """The tokens in blocks, as `split`."""
  return jax.tree.map(lambda x: split(x, blocks), tokens)


def start(query: Array, dim: int) -> Sums:
  """The softmax of nothing, for queries in blocks and values of `dim`."""
  rows = query.shape[:-1]
  return Sums(jnp.zeros((*rows, dim)), jnp.full(rows, masks.MASKED), jnp.zeros(rows))


def forward(
  rule: Rule, sums: Sums, query: Array, key: Array, value: Array, where: Where, pairs: Any, *, look: bool = False
) -> Sums:
  """Adds what the queries of each pair get from its keys; `query` is scaled.

  Args:
    pairs: int [pairs, 2], numbers of the block of queries and the block of keys.
    look: ask the positions, at run time, whether a pair sees anything at all before computing it.
  """

  def add(sums, pair):
    i, j = pair
    here = _at(where, i, j)
    weights, _ = masks.scores(rule, query[i], key[j], here[:3])
    before = sums.largest[i]
    largest = jnp.maximum(before, weights.max(-1))
    weights = jnp.exp(weights - largest[..., None])
    fade = jnp.exp(before - largest)
    total = sums.total[i] * fade + weights.sum(-1)
    if here.drop is not None:
      weights = _dropped(rule, here, weights)
    product = jnp.einsum("bhgqk,bhkd->bhgqd", weights.astype(value.dtype), value[j], preferred_element_type=jnp.float32)
    values = sums.values[i] * fade[..., None] + product
    return Sums(sums.values.at[i].set(values), sums.largest.at[i].set(largest), sums.total.at[i].set(total))

  return _over(pairs, add, sums, rule, where, look)


def finish(sums: Sums, dtype: Any) -> tuple[Array, Array]:
  """Returns the result in blocks and the logarithm of each row's sum; 0 and a huge number for a row without keys."""
  empty = sums.largest < EMPTY
  total = jnp.where(empty, 1, sums.total)
  out = jnp.where(empty[..., None], 0, sums.values / total[..., None])
  logsum = jnp.where(empty, -masks.MASKED, sums.largest + jnp.log(total))
  return checkpoint_name(out.astype(dtype), "attention"), checkpoint_name(logsum, "attention")


def backward(
  rule: Rule,
  gradients: tuple[Array, Array, Array],
  query: Array,
  key: Array,
  value: Array,
  where: Where,
  pairs: Any,
  logsum: Array,
  delta: Array,
  out_gradient: Array,
  *,
  look: bool = False,
) -> tuple[Array, Array, Array]:
  """Adds to the float32 gradients of query (scaled), key and value what each pair contributes.

  Args:
    logsum: as `finish` gives it.
    delta: sum over dim of the result times its gradient.
  """

  def add(gradients, pair):
    i, j = pair
    here = _at(where, i, j)
    scores, raw = masks.scores(rule, query[i], key[j], here[:3])
    weights = jnp.exp(scores - logsum[i][..., None])
    to_weights = jnp.einsum("bhgqd,bhkd->bhgqk", out_gradient[i], value[j], preferred_element_type=jnp.float32)
    dropped = weights
    if here.drop is not None:
      dropped, to_weights = _dropped(rule, here, weights), _dropped(rule, here, to_weights)
    to_scores = weights * (to_weights - delta[i][..., None])
    if rule.softcap is not None:
      to_scores = to_scores * (1 - jnp.square(raw / rule.softcap))
    to_scores = to_scores.astype(query.dtype)
    to_query, to_key, to_value = gradients
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    to_value = to_value.at[j].add(dot("bhgqk,bhgqd->bhkd", dropped.astype(value.dtype), out_gradient[i]))
    to_query = to_query.at[i].add(dot("bhgqk,bhkd->bhgqd", to_scores, key[j]))
    to_key = to_key.at[j].add(dot("bhgqk,bhgqd->bhkd", to_scores, query[i]))
    return to_query, to_key, to_value

  return _over(pairs, add, gradients, rule, where, look)


def _over(pairs, add, carry, rule, where, look):
  def step(carry, pair):
    if not look:
      return add(carry, pair), None
    queries, keys = where.query.positions[pair[0]], where.key.positions[pair[1]]
    ordered = rule.causal and where.prefix is None
    seen = queries.min() - keys.max() < rule.window
    seen &= keys.min() - queries.max() < (1 if ordered else rule.window)
    return jax.lax.cond(seen, add, lambda carry, _: carry, carry, pair), None

  return jax.lax.scan(step, carry, jnp.asarray(pairs, jnp.int32))[0]


def _at(where, i, j):
  at = lambda tree, index: jax.tree.map(lambda x: x[index], tree)
  return where._replace(query=at(where.query, i), key=at(where.key, j))


def _dropped(rule, here, x):
  kept = masks.keep(rule, here.drop, here.query, here.key, x.shape[2])
  return jnp.where(kept, x / (1 - rule.dropout_rate), 0)


class Plan(NamedTuple):
  """How a sequence is cut, known when the program is compiled."""

  rule: Rule
  query_blocks: int
  key_blocks: int
  pairs: tuple[tuple[int, int], ...]


def chunked(
  rule: Rule,
  query: Array,
  key: Array,
  value: Array,
  tokens: Tokens,
  key_tokens: Tokens,
  prefix: Array | None,
  drop: Drop | None,
  *,
  ordered: bool,
  size: int | None = None,
) -> Array:
  """Returns attention [batch, seq, heads, dim] in memory linear in the sequence, forward and backward.

  Args:
    rule: with `scale`, which is applied here.
    ordered: positions of both sides count from 0, so that pairs which see nothing are known without looking.
    size: tokens of a block; by rule from the shape if None.
  """
  size = size or block_size(query.shape[0], query.shape[2])
  queries, keys = query.shape[1], key.shape[1]
  (query, tokens), query_blocks = _padded((query, tokens), queries, size)
  if keys % _blocks(keys, size) and key_tokens.segments is None:
    key_tokens = key_tokens._replace(segments=jnp.ones_like(key_tokens.positions))
  (key, value, key_tokens), key_blocks = _padded((key, value, key_tokens), keys, size)
  starts = np.arange(query_blocks) * (query.shape[1] // query_blocks)
  pairs = pairs_in_order(
    rule if ordered else Rule(),
    starts,
    np.arange(key_blocks) * (key.shape[1] // key_blocks),
    (query.shape[1] // query_blocks, key.shape[1] // key_blocks),
    prefix is not None,
  )
  plan = Plan(rule, query_blocks, key_blocks, pairs)
  return _chunked(plan, query, key, value, (tokens, key_tokens, prefix, drop))[:, :queries]


def pairs_in_order(
  rule: Rule, query_starts: np.ndarray, key_starts: np.ndarray, sizes: tuple[int, int], prefix: bool = False
) -> tuple[tuple[int, int], ...]:
  """Returns the pairs of blocks, at these positions, in which a query may see a key."""
  first, last = query_starts[:, None], query_starts[:, None] + sizes[0] - 1
  key_first, key_last = key_starts[None], key_starts[None] + sizes[1] - 1
  seen = np.ones((len(query_starts), len(key_starts)), bool)
  if rule.causal and not prefix:
    seen &= key_first <= last
  if rule.window is not None:
    seen &= (first - key_last < rule.window) & (key_first - last < rule.window)
  return tuple((int(i), int(j)) for i, j in np.argwhere(seen))


def _blocks(length, size):
  return -(-length // size)


def _padded(tree, length, size):
  """Cuts [batch, length, ...] into blocks of equal size, after adding at most a token a block."""
  blocks = _blocks(length, size)
  extra = -length % blocks
  pad = lambda x: jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
  return jax.tree.map(pad, tree) if extra else tree, blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(plan, query, key, value, where):
  return _chunked_forward(plan, query, key, value, where)[0]


def _chunked_forward(plan, query, key, value, where):
  blocks = _cut(plan, query, key, value, where)
  out, logsum = finish(forward(plan.rule, start(blocks[0], value.shape[-1]), *blocks, plan.pairs), value.dtype)
  out = join_queries(out)
  return out, (query, key, value, where, out, logsum)


def _chunked_backward(plan, kept, out_gradient):
  query, key, value, where, out, logsum = kept
  blocks = _cut(plan, query, key, value, where)
  delta = split_delta(out, out_gradient, key.shape[2], plan.query_blocks)
  out_gradient = split_queries(out_gradient, key.shape[2], plan.query_blocks)
  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in blocks[:3])
  to_query, to_key, to_value = backward(plan.rule, zeros, *blocks, plan.pairs, logsum, delta, out_gradient)
  return (
    (join_queries(to_query) * plan.rule.scale).astype(query.dtype),
    join_keys(to_key).astype(key.dtype),
    join_keys(to_value).astype(value.dtype),
    None,
  )


_chunked.defvjp(_chunked_forward, _chunked_backward)


def split_delta(out: Array, out_gradient: Array, kv_heads: int, blocks: int) -> Array:
  """Returns the sum over dim of `out` times its gradient, in blocks as `logsum`."""
  delta = jnp.einsum("bqhd,bqhd->bqh", out, out_gradient, preferred_element_type=jnp.float32)
  return split_queries(delta[..., None], kv_heads, blocks)[..., 0]


def _cut(plan, query, key, value, where):
  tokens, key_tokens, prefix, drop = where
  cut = Where(split_tokens(tokens, plan.query_blocks), split_tokens(key_tokens, plan.key_blocks), prefix, drop)
  return (
    split_queries(query * plan.rule.scale, key.shape[2], plan.query_blocks),
    split_keys(key, plan.key_blocks),
    split_keys(value, plan.key_blocks),
    cut,
  )
