"""Attention: one function; what computes it depends on the platform, the size and the mesh.

Softmax attention, https://arxiv.org/abs/1706.03762, with fewer heads of keys and values than of queries if wanted,
https://arxiv.org/abs/2305.13245. Scores and softmax are float32. The backends:

- "reference": every score in memory, the fastest for short sequences and what the others are tested against;
- "unrolled": blocks of queries, without the keys that they can't see, for causal order and windows on a CPU;
- "chunked": blocks, memory linear in the sequence, without those that see nothing, everywhere;
- "jax": `jax.nn.dot_product_attention`, on a GPU the kernels of cuDNN;
- "splash": the Pallas kernel for TPUs that comes with JAX (elsewhere interpreted, which is for tests).

A sequence that the mesh splits goes around a ring or through an all-to-all: see ring.py.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bigjax import sharding
from bigjax.errors import UserError, suggest
from bigjax.models import blockwise, masks, ring
from bigjax.models.masks import Drop, Rule, Tokens

BACKENDS = ("auto", "reference", "unrolled", "chunked", "jax", "splash")
# Scores that a device may hold for one call, in float32 1 GiB. The backward pass of every layer needs them again.
MOST_SCORES = 2**28
# On a CPU blocks pay off from this length on if half of them see nothing: 0.87 of the reference's time, forward and
# backward, at 256 tokens (16 x 6 heads of 64), 0.7 at 512, 0.55 at 1,024, 0.4 at 4,096; 1.3 where nothing is left out.
WORTH_SKIPPING = 256
# These are unrolled, in eight parts of 64 queries or more, while a call has few enough scores to keep them: 0.93 of the
# time that a GPT's whole training step takes with "chunked" at 256 tokens, 0.83 at 512, 0.85 at 1,024 (batches of 16, 8
# and 4); in four parts 0.86 and 0.88 at the latter two.
MOST_UNROLLED, PARTS, PART = 2**25, 8, 64
LANES = 128  # Of a TPU's vector unit: splash attention wants lengths that it divides.


def attend(
  query: Float[Array, "batch seq heads dim"],
  key: Float[Array, "batch kv_seq kv_heads dim"],
  value: Float[Array, "batch kv_seq kv_heads value_dim"],
  *,
  causal: bool = False,
  window: int | None = None,
  prefix: Int[Array, " batch"] | None = None,
  positions: Int[Array, "#batch seq"] | None = None,
  key_positions: Int[Array, "#batch kv_seq"] | None = None,
  segments: Int[Array, "batch seq"] | None = None,
  key_segments: Int[Array, "batch kv_seq"] | None = None,
  balanced: bool = False,
  scale: float | None = None,
  softcap: float | None = None,
  dropout_rate: float = 0.0,
  dropout_key: PRNGKeyArray | None = None,
  backend: str = "auto",
) -> Float[Array, "batch seq heads value_dim"]:
  """Returns for each query the softmax average of the values it sees; 0 where it sees none.

  Args:
    query: its heads are a multiple of those of key and value.
    key: a query head uses the key head of its group; groups are consecutive.
    value: may have another size than keys.
    causal: a query sees positions up to its own.
    window: a query sees positions nearer than this: with `causal` itself and the `window - 1` before it.
    prefix: keys at the first `prefix` positions are seen in spite of `causal`.
    positions: of the queries; 0, 1, ... if None. For a cache; packed documents need `segments` only.
    key_positions: of the keys; 0, 1, ... if None.
    segments: of the queries: they see keys of their own segment. 0 is padding, which sees and is seen by nobody.
    key_segments: of the keys; `segments` if None. Alone, it says which keys are padding.
    balanced: the sequence is in the order of `ring.positions`.
    scale: of the scores; 1 / sqrt(dim) if None.
    softcap: scores are squeezed into (-softcap, softcap).
    dropout_rate: share of weights to drop, if there is a `dropout_key`. Which ones doesn't depend on backend or mesh.
    dropout_key: a key of JAX.
    backend: one of `BACKENDS`; "auto" takes the best that can do it.

  Raises:
    UserError: A backend that can't do it; heads, lengths or a batch that the mesh does not divide.
  """
  _check(query, key, segments, key_segments, window, backend)
  rate = 0.0 if dropout_key is None else dropout_rate
  rule = Rule(
    causal=causal,
    window=window,
    scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
    softcap=softcap,
    dropout_rate=rate,
    heads=query.shape[2],
    keys=key.shape[1],
  )
  order = _Order(
    ordered=positions is None and key_positions is None,
    balanced=balanced and ring.is_balanced(),
    paired=key_segments is None or segments is None,
  )
  key_segments = segments if key_segments is None else key_segments
  natural = ring.positions if order.balanced else lambda length: jnp.arange(length, dtype=jnp.int32)
  tokens = Tokens(natural(query.shape[1])[None] if positions is None else positions, segments)
  key_tokens = Tokens(natural(key.shape[1])[None] if key_positions is None else key_positions, key_segments)
  drop_key = masks.raw_key(dropout_key) if rate else None
  arrays = (query, key, value, tokens, key_tokens, prefix, drop_key)

  layout = sharding.current()
  # One query, as of a pool or a step of decoding, can't be split; what computes it is up to the compiler.
  split = layout.size("seq") > 1 and query.shape[1] > 1
  parts = {word: layout.size(word) for word in ("batch", "heads")}
  if not split:
    backend = _choose(backend, rule, arrays, order, parts)
  if split or (backend != "reference" and max(parts.values()) > 1):
    return _over_mesh(rule, backend, order, arrays, split)
  return _local(rule, backend, order, *arrays[:-1], _drop(drop_key, query.shape[0], query.shape[2]))


class _Order(NamedTuple):
  """What is known about positions when the program is compiled."""

  ordered: bool  # Nobody gave positions.
  balanced: bool  # The sequence is in balanced order.
  paired: bool  # Queries have the segments of the keys, or none.


def _check(query, key, segments, key_segments, window, backend):
  heads, kv_heads = query.shape[2], key.shape[2]
  if heads % kv_heads:
    near = sorted((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: abs(n - kv_heads))[0]
    raise UserError(f"model.kv_heads: {kv_heads} does not divide {heads} heads. The nearest that does is {near}.")
  if window is not None and window < 1:
    raise UserError(f"model.window: {window} is not a window: 1 is the position itself.")
  if backend not in BACKENDS:
    raise UserError(f"model.attention: {backend!r} is not known.{suggest(backend, BACKENDS)}")
  if segments is not None and key_segments is None and query.shape[1] != key.shape[1]:
    raise ValueError("Queries and keys of different length: give key_segments as well.")


def _drop(key, examples, heads, first_example=0, first_head=0):
  """The numbers of the weights that are here, which start elsewhere on each device."""
  if key is None:
    return None
  count = lambda n, first: jnp.arange(n, dtype=jnp.uint32) + jnp.asarray(first).astype(jnp.uint32)
  return Drop(key, count(examples, first_example), count(heads, first_head))


# What computes it


def _local(rule, backend, order, query, key, value, tokens, key_tokens, prefix, drop):
  """Attention whose sequence is whole here."""
  compute = dict(reference=_reference, unrolled=_unrolled, chunked=_chunked, jax=_jax_nn, splash=_splash)[backend]
  with jax.named_scope(_scope(rule, query.shape[1], key.shape[1])):
    out = compute(rule, order, query, key, value, tokens, key_tokens, prefix, drop)
  # These have named what they keep; by another name of another layout it would be kept twice.
  return out if backend in ("chunked", "splash") else checkpoint_name(out, "attention")


def _scope(rule, queries, keys):
  """What profiles show, and `bigjax plan` counts the wanted scores by: attend_8192x8192_causal_window512."""
  window = "" if rule.window is None else f"_window{rule.window}"
  return f"attend_{queries}x{keys}{'_causal' * rule.causal}{window}"


def _reference(rule, order, query, key, value, tokens, key_tokens, prefix, drop):
  """Every score in memory."""
  return _by_rows(rule, order, query, key, value, tokens, key_tokens, prefix, drop, query.shape[1])


def _unrolled(rule, order, query, key, value, tokens, key_tokens, prefix, drop):
  """Every score in memory but those that are known to be masked."""
  return _by_rows(
    rule, order, query, key, value, tokens, key_tokens, prefix, drop, max(PART, -(-query.shape[1] // PARTS))
  )


def _by_rows(rule, order, query, key, value, tokens, key_tokens, prefix, drop, size):
  """So many queries after another, each with all the keys that it may see."""
  batch, seq, heads, _ = query.shape
  keys, kv_heads = key.shape[1], key.shape[2]
  query = (query * rule.scale).reshape(batch, seq, kv_heads, heads // kv_heads, -1).transpose(0, 2, 3, 1, 4)
  key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
  sure = _everyone_sees_a_key(order, seq, keys, key_tokens)
  cut = lambda tokens, part: jax.tree.map(lambda x: x[:, part], tokens)
  found = []
  for first in range(0, seq, size):
    rows = slice(first, first + size)
    near = slice(0, keys) if size >= seq else _seen(rule, first, min(first + size, seq), keys, prefix)
    where = (cut(tokens, rows), cut(key_tokens, near), prefix)
    found.append(_softmax_average(rule, query[:, :, :, rows], key[:, :, near], value[:, :, near], where, drop, sure))
  out = found[0] if len(found) == 1 else jnp.concatenate(found, axis=3)
  return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, -1).astype(value.dtype)


def _seen(rule, first, last, keys, prefix):
  """The keys that queries from `first` up to `last` may see, whose positions are counted from 0."""
  beyond = 0 if rule.causal else keys if rule.window is None else rule.window - 1
  stop = keys if prefix is not None else min(keys, last + beyond)
  return slice(0 if rule.window is None else min(max(0, first - rule.window + 1), keys - 1), stop)


def _softmax_average(rule, query, key, value, where, drop, sure):
  """What queries [batch, kv_heads, group, query, dim] get; `sure` says that each sees a key.

  What is divided by the softmax's sum is the result and not each weight: 4% of a GPT's training step on a CPU.
  """
  batch, kv_heads, group, seq, _ = query.shape
  scores, _ = masks.scores(rule, query, key, where)
  largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.exp(scores - largest)
  dropped = weights
  if drop is not None:
    kept = masks.keep(rule, drop, *where[:2], group)
    dropped = jnp.where(kept, weights / (1 - rule.dropout_rate), 0)
  rows = lambda x: x.reshape(batch, kv_heads, -1, x.shape[-1])
  out = jnp.einsum("bhqk,bhkd->bhqd", rows(dropped).astype(value.dtype), value, preferred_element_type=jnp.float32)
  out = out / rows(weights).sum(axis=-1, keepdims=True)
  if not sure:
    out = jnp.where(rows(largest) > blockwise.EMPTY, out, 0)
  return out.reshape(batch, kv_heads, group, seq, -1)


def _everyone_sees_a_key(order, queries, keys, key_tokens):
  """Everyone sees itself, where there is no padding."""
  return order.ordered and queries == keys and key_tokens.segments is None


def _chunked(rule, order, query, key, value, tokens, key_tokens, prefix, drop):
  ordered = order.ordered and not order.balanced
  return blockwise.chunked(rule, query, key, value, tokens, key_tokens, prefix, drop, ordered=ordered)


def _jax_nn(rule, order, query, key, value, tokens, key_tokens, prefix, drop):
  assert drop is None
  kernel = blockwise.platform() == "gpu" and _refuses_cudnn(query) is None
  arguments = dict(scale=rule.scale, implementation="cudnn" if kernel else "xla")
  # In its own words where there are some: as a mask, cuDNN would read every score's bias from memory.
  plain = order.ordered and not order.balanced and prefix is None and key_tokens.segments is None
  if plain and (rule.causal or rule.window is None):
    window = None if rule.window is None else (rule.window - 1, 0)
    return jax.nn.dot_product_attention(query, key, value, is_causal=rule.causal, local_window_size=window, **arguments)
  seen = masks.visible(rule, tokens, key_tokens, prefix)
  out = jax.nn.dot_product_attention(query, key, value, mask=None if seen is None else seen[:, None], **arguments)
  return out if seen is None else jnp.where(seen.any(-1)[:, :, None, None], out, 0)


def _splash(rule, order, query, key, value, tokens, key_tokens, prefix, drop):
  assert drop is None
  assert prefix is None
  kernel = _splash_kernel(rule.causal, rule.window, rule.softcap, query.shape[1], key.shape[1], query.shape[2])
  heads_first = lambda x: x.swapaxes(1, 2)
  arrays = [heads_first(query * rule.scale), heads_first(key), heads_first(value)]
  if key_tokens.segments is None:
    return heads_first(jax.vmap(kernel)(*arrays))
  from jax.experimental.pallas.ops.tpu import splash_attention

  # Padding gets to see padding, so that no row is empty, and then nothing of it is left.
  own = jnp.ones(query.shape[:2], jnp.int32) if tokens.segments is None else tokens.segments
  other = key_tokens.segments if tokens.segments is not None else (key_tokens.segments != 0).astype(jnp.int32)
  out = heads_first(jax.vmap(kernel)(*arrays, splash_attention.SegmentIds(own, other)))
  empty = own == 0 if tokens.segments is not None else ~(other != 0).any(-1, keepdims=True)
  return jnp.where(empty[:, :, None, None], 0, out)


def _splash_kernel(causal, window, softcap, queries, keys, heads):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  if causal or window is not None:
    left = None if window is None else window - 1
    mask = splash.LocalMask((queries, keys), (left, 0 if causal else left), offset=0)
  else:
    mask = splash.FullMask((queries, keys))
  query_block, key_block = _splash_block(queries), _splash_block(keys)
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap,
    residual_checkpoint_name="attention",
    interpret=blockwise.platform() != "tpu",
    block_sizes=splash.BlockSizes(
      block_q=query_block,
      block_kv=key_block,
      block_kv_compute=key_block,
      block_q_dkv=query_block,
      block_kv_dkv=key_block,
      block_kv_dkv_compute=key_block,
      block_q_dq=query_block,
      block_kv_dq=key_block,
    ),
  )


def _splash_block(length):
  """The largest block up to 1024 that divides the length and is a multiple of the lanes: fewer, larger products."""
  return max(size for size in range(LANES, min(length, 1024) + 1, LANES) if length % size == 0)


# Which


def _choose(backend, rule, arrays, order, parts):
  query, key = arrays[:2]
  if backend != "auto":
    if reason := _refuses(backend, rule, order, *arrays[:-1]):
      raise UserError(f"model.attention: {backend!r} can't do {reason}. Choose auto, chunked or reference.")
    return backend
  platform = blockwise.platform()
  if platform == "tpu" and not _refuses("splash", rule, order, *arrays[:-1]):
    return "splash"
  if platform == "gpu" and not (_refuses("jax", rule, order, *arrays[:-1]) or _refuses_cudnn(query)):
    return "jax"
  queries, keys = query.shape[1], key.shape[1]
  if queries == 1:
    return "reference"
  skips = (rule.causal or rule.window is not None) and order.ordered and not order.balanced and arrays[5] is None
  scores = query.shape[0] * query.shape[2] * queries * keys / math.prod(parts.values())
  if platform == "cpu" and skips and min(queries, keys) >= WORTH_SKIPPING:
    return "unrolled" if scores <= MOST_UNROLLED else "chunked"
  return "chunked" if scores > MOST_SCORES else "reference"


def _refuses(backend, rule, order, query, key, value, tokens, key_tokens, prefix):
  """Returns what a backend can't do of this, if anything."""
  if backend not in ("unrolled", "jax", "splash"):
    return None
  if backend == "unrolled":
    return None if order.ordered and not order.balanced else "positions of one's own"
  if rule.dropout_rate:
    return "dropout of weights"
  if backend == "jax":
    if rule.softcap is not None:
      return "soft-capping"
    return "values of another size than keys" if value.shape[-1] != key.shape[-1] else None
  if prefix is not None:
    return "a prefix"
  if not order.ordered or order.balanced:
    return "positions of one's own"
  if (rule.causal or rule.window is not None) and query.shape[1] != key.shape[1]:
    return "an order between sequences of different length"
  if not order.paired:
    return "different segments of queries and keys"
  for length in (query.shape[1], key.shape[1]):
    if length % LANES:
      return f"a length of {length}, which {LANES} does not divide"
  return None


def _refuses_cudnn(query):
  if jax.default_backend() != "gpu":  # As for a plan.
    return "a GPU that is not here: JAX asks it what it is"
  dim = query.shape[-1]
  return None if query.dtype in (jnp.bfloat16, jnp.float16) and dim % 8 == 0 and dim <= 128 else "this type or size"


# Over a mesh


def _over_mesh(rule, backend, order, arrays, split):
  """Every device attends for its examples and heads; a split sequence goes around."""
  layout = sharding.current()
  query, key, _, tokens, key_tokens, prefix, drop_key = arrays
  parts = layout.size("heads")
  _check_divides(layout, "batch", "config.batch_size", "examples", query.shape[0])
  _check_divides(layout, "heads", "model.heads", "heads", query.shape[2])
  kv_split = key.shape[2] % parts == 0
  seq = "seq" if split else None
  around = ring.Ring.of(layout) if split else None
  zigzag = rebalance = False
  if split and layout.sequence == "ring":
    if backend not in ("auto", "chunked"):
      raise UserError(f"model.attention: {backend!r} does not go around a ring. Choose auto, or sequence='ulysses'.")
    self_attention = query.shape[1] == key.shape[1]
    zigzag = rule.causal and order.ordered and prefix is None and self_attention
    rebalance = zigzag and not order.balanced
  if split:
    for x in (query, key):
      ring.check_sequence(x.shape[1], around.size * (2 if zigzag or order.balanced else 1))
  # Which key and value heads each part of the query heads needs, where they can't be split alike.
  needed = None if kv_split else ring.shared_heads(query.shape[2], key.shape[2], parts)

  def local(query, key, value, tokens, key_tokens, prefix, drop_key):
    first_head = jax.lax.axis_index(layout.axes("heads")) * query.shape[2] if parts > 1 else 0
    first_example = jax.lax.axis_index(layout.axes("batch")) * query.shape[0] if layout.axes("batch") else 0
    drop = _drop(drop_key, query.shape[0], query.shape[2], first_example, first_head)
    if needed is not None:
      mine = jnp.asarray(needed)[jax.lax.axis_index(layout.axes("heads"))]
      key, value = key[:, :, mine], value[:, :, mine]
    if not split:
      return _local(rule, backend, order, query, key, value, tokens, key_tokens, prefix, drop)
    if layout.sequence == "ring":
      if rebalance:
        exchange = functools.partial(ring.balance_local, ring=around)
        query, key, value, tokens, key_tokens = jax.tree.map(exchange, (query, key, value, tokens, key_tokens))
      out = ring.ring_attention(rule, around, query, key, value, tokens, key_tokens, prefix, drop, zigzag=zigzag)
      return checkpoint_name(ring.unbalance_local(out, around), "attention") if rebalance else out

    def whole(query, key, value, tokens, key_tokens, drop):
      arrays = (query, key, value, tokens, key_tokens, prefix)
      chosen = _choose(backend, rule, (*arrays, drop), order, {})
      return _local(rule, chosen, order, *arrays, drop)

    out = ring.ulysses(around, query, key, value, tokens, key_tokens, drop, whole)
    return checkpoint_name(out, "attention")  # Or the backward pass would exchange it again.

  def spec(x, *words):
    """The layout of an array that may have one row for all examples."""
    return None if x is None else layout.spec(None if x.shape[0] == 1 and words[0] == "batch" else words[0], *words[1:])

  kv = ("batch", seq, "heads" if kv_split else None, None)
  in_specs = (
    layout.spec("batch", seq, "heads", None),
    layout.spec(*kv),
    layout.spec(*kv),
    jax.tree.map(lambda x: spec(x, "batch", seq), tokens),
    jax.tree.map(lambda x: spec(x, "batch", seq), key_tokens),
    None if prefix is None else layout.spec("batch"),
    None if drop_key is None else layout.spec(None),
  )
  run = jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=in_specs[0], check_vma=False)
  return run(*arrays)


def _check_divides(layout, word, path, what, size):
  parts = layout.size(word)
  if size % parts:
    near = [n for n in (size // parts * parts, -(-size // parts) * parts) if n]
    axes = "x".join(layout.axes(word))
    raise UserError(
      f"{path}: {size} {what} can't be split over the {parts} devices of {axes}. "
      f"{' or '.join(map(str, near))} can; or change the size of the axis."
    )
