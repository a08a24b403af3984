"""A block of the decoder: attention of two kinds, MLP or experts, norms; and the options that say which."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bigjax import sharding
from bigjax.models import layers, moe
from bigjax.models.attention import attend
from bigjax.models.cache import Layer
from bigjax.models.rope import Rope, rotate, sharpness


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What a decoder is; `make` has the words."""

  vocab_size: int
  context: int
  width: int
  depth: int
  heads: int
  mlp_dim: int
  kv_heads: int | None = None
  head_dim: int | None = None
  norm: str = "rms"
  norm_place: str = "pre"
  norm_offset: bool = False
  epsilon: float = 1e-5
  bias: str = "none"
  qk_norm: str = "none"
  positions: str = "rope"
  rope_theta: float = 10_000.0
  rope_fraction: float = 1.0
  rope_scaling: str = "none"
  rope_factor: float = 1.0
  rope_trained: int = 8192
  rope_amplitude: float | None = None
  rope_sharpen: float = 0.0
  local_theta: float | None = None
  window: int | None = None
  pattern: str = "G"
  softcap: float | None = None
  logit_softcap: float | None = None
  scale_dim: int | None = None
  gated: bool = True
  activation: str = "silu"
  tied: bool = False
  embed_scale: bool = False
  query_rank: int | None = None
  kv_rank: int | None = None
  nope_dim: int = 128
  rope_dim: int = 64
  value_dim: int = 128
  experts: int = 0
  top_k: int = 2
  expert_dim: int | None = None
  shared_experts: int = 0
  first_dense: int = 0
  moe_every: int = 1
  scoring: str = "softmax"
  normalize: bool = True
  route_scale: float = 1.0
  groups: int = 1
  top_groups: int = 1
  bias_rate: float = 0.0
  capacity_factor: float | None = None
  group: int | None = None
  exchange: str = "auto"
  balance_loss: float = 0.0
  router_z_loss: float = 0.0
  mup_base: int | None = None
  dropout: float = 0.0
  attention: str = "auto"
  scan: bool = False
  remat: str = "none"
  dtype: str = "float32"

  @property
  def compute(self) -> Any:
    return layers.DTYPES[self.dtype]

  @property
  def wider(self) -> float:
    """How many times the width at which hyperparameters were found, for muP."""
    return self.width / (self.mup_base or self.width)

  @property
  def ropes(self) -> dict[str, Rope]:
    """How heads turn, by the name of the table; those of local layers can do so differently."""
    if self.positions != "rope":
      return {}
    dim = self.rope_dim if self.kv_rank else round(self.rope_fraction * self.head_size)
    scaled = dict(scaling=self.rope_scaling, factor=self.rope_factor, trained=self.rope_trained)
    found = {"rope": Rope(dim=dim, theta=self.rope_theta, amplitude=self.rope_amplitude, **scaled)}
    return found if self.local_theta is None else found | {"local_rope": Rope(dim=dim, theta=self.local_theta)}

  @property
  def head_size(self) -> int:
    return self.head_dim or self.width // self.heads

  @property
  def keeps(self) -> dict[str, tuple[int, int]]:
    """What a cache keeps of a token in each layer: heads and dimensions by name."""
    if self.kv_rank:
      return {"latent": (1, self.kv_rank), "turning": (1, self.rope_dim)}
    return dict.fromkeys(("key", "value"), (self.kv_heads or self.heads, self.head_size))

  @property
  def kinds(self) -> tuple["Kind", ...]:
    """What each layer computes."""
    local = [self.pattern[i % len(self.pattern)] == "L" for i in range(self.depth)]
    late = [i - self.first_dense for i in range(self.depth)]
    routed = [self.experts > 0 and i >= 0 and (i + 1) % self.moe_every == 0 for i in late]
    return tuple(map(Kind, routed, local))


class Kind(NamedTuple):
  """What a layer computes: with experts or without, attention in a window or to everything."""

  routed: bool
  local: bool


class RMSNorm(nnx.Module):
  """Divides by the root mean square, https://arxiv.org/abs/1910.07467, in float32; `offset` is added to the scale."""

  def __init__(self, width: int, *, epsilon: float, offset: float = 0.0):
    self.epsilon, self.offset = epsilon, offset
    self.scale = nnx.Param(jnp.full(width, 1 - offset))

  def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
    wide = x.astype(jnp.float32)
    mean = jnp.square(wide).mean(axis=-1, keepdims=True)
    scale = jnp.expand_dims(self.scale[...] + self.offset, range(x.ndim - 1))
    return (wide * jax.lax.rsqrt(mean + self.epsilon) * scale).astype(x.dtype)


def make_norm(o: Options, rngs: nnx.Rngs, width: int | None = None) -> nnx.Module:
  """The norm of the options, over the last dimension."""
  if o.norm == "layer":
    return nnx.LayerNorm(width or o.width, epsilon=o.epsilon, use_bias=o.bias == "all", rngs=rngs)
  return RMSNorm(width or o.width, epsilon=o.epsilon, offset=float(o.norm_offset))


def _dense(o: Options, rngs: nnx.Rngs, inputs: int, outputs: int, *, bias: bool = False, end: bool = False):
  """A dense layer; what enters the residual stream starts smaller by 1 / sqrt(number of such), as in GPT-2."""
  scale = 0.02 / math.sqrt(o.wider)
  init = nnx.initializers.normal(scale / math.sqrt(2 * o.depth) if end else scale)
  return layers.Dense(inputs, outputs, use_bias=bias, kernel_init=init, dtype=o.compute, rngs=rngs)


class Attention(nnx.Module):
  """Self-attention with one key and value head for each group of query heads, https://arxiv.org/abs/2305.13245."""

  def __init__(self, o: Options, rngs: nnx.Rngs):
    heads, kv_heads, dim = o.heads, o.kv_heads or o.heads, o.head_size
    self.heads, self.kv_heads, self.qk_norm = heads, kv_heads, o.qk_norm
    # muP wants 1 / dim; this is the usual 1 / sqrt(dim) for heads of 64.
    self.scale = 8 / dim if o.mup_base else (o.scale_dim or dim) ** -0.5
    bias = o.bias != "none"
    self.query = _dense(o, rngs, o.width, heads * dim, bias=bias)
    self.key = _dense(o, rngs, o.width, kv_heads * dim, bias=bias)
    self.value = _dense(o, rngs, o.width, kv_heads * dim, bias=bias)
    normed = {"none": (), "head": (dim, dim), "all": (heads * dim, kv_heads * dim)}[o.qk_norm]
    self.query_norm, self.key_norm = (make_norm(o, rngs, n) for n in normed) if normed else (None, None)
    self.out = _dense(o, rngs, heads * dim, o.width, bias=o.bias == "all", end=True)

  def project(self, x: Float[Array, "batch seq width"], table: Array | None) -> tuple[Array, dict[str, Array]]:
    """Returns queries, [batch, seq, heads, dim], and what a cache keeps: keys and values."""
    made = lambda dense, heads: checkpoint_name(_heads(dense.to_heads(x, heads)), "qkv")
    query, key, value = made(self.query, self.heads), made(self.key, self.kv_heads), made(self.value, self.kv_heads)
    if self.qk_norm == "all":
      over_all = lambda norm, x: _heads(norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape))
      query, key = over_all(self.query_norm, query), over_all(self.key_norm, key)
    if self.qk_norm == "head":
      query, key = self.query_norm(query), self.key_norm(key)
    if table is not None:
      query, key = rotate(query, table), rotate(key, table)
    return query, {"key": key, "value": value}

  def attend(self, query: Array, new: dict[str, Array], **how) -> Array:
    """Returns what the tokens at hand see of each other, [batch, seq, heads, dim]."""
    return attend(query, new["key"], new["value"], scale=self.scale, **how)

  def recall(self, query: Array, cache: Layer, softcap: float | None) -> Array:
    """Returns what one token sees of those in a cache, itself among them."""
    return cache.recall(query, scale=self.scale, softcap=softcap)


class LatentAttention(nnx.Module):
  """Keys and values are made of a short vector, all that a cache has to keep, https://arxiv.org/abs/2405.04434.

  A key is a part of its own for each head, which does not turn, and a part that turns and all heads share.
  """

  def __init__(self, o: Options, rngs: nnx.Rngs):
    self.heads, self.split, self.rank = o.heads, o.nope_dim, o.kv_rank
    # YaRN sharpens here instead of in the cosines, for the part that does not turn as well.
    self.scale = (o.scale_dim or o.nope_dim + o.rope_dim) ** -0.5 * sharpness(o.rope_factor, o.rope_sharpen) ** 2
    query_dim = o.heads * (o.nope_dim + o.rope_dim)
    if o.query_rank:
      self.query_down, self.query_norm = _dense(o, rngs, o.width, o.query_rank), make_norm(o, rngs, o.query_rank)
    else:
      self.query_down = self.query_norm = None
    self.query_up = _dense(o, rngs, o.query_rank or o.width, query_dim)
    self.kv_down = _dense(o, rngs, o.width, o.kv_rank + o.rope_dim)
    self.kv_norm = make_norm(o, rngs, o.kv_rank)
    self.kv_up = _dense(o, rngs, o.kv_rank, o.heads * (o.nope_dim + o.value_dim))
    self.out = _dense(o, rngs, o.heads * o.value_dim, o.width, end=True)

  def project(self, x: Float[Array, "batch seq width"], table: Array) -> tuple[Array, dict[str, Array]]:
    """Returns queries, [batch, seq, heads, dim], and what a cache keeps: the vector, and the keys' shared part."""
    by_head = lambda x: _heads(x.reshape(*x.shape[:2], self.heads, -1))
    query = by_head(self.query_up(x if self.query_down is None else self.query_norm(self.query_down(x))))
    latent, shared = jnp.split(self.kv_down(x), [self.rank], axis=-1)
    still, turning = jnp.split(query, [self.split], axis=-1)
    query = jnp.concatenate([still, rotate(turning, table)], axis=-1)
    return query, {"latent": self.kv_norm(latent)[:, :, None], "turning": rotate(shared[:, :, None], table)}

  def attend(self, query: Array, new: dict[str, Array], **how) -> Array:
    """Returns what the tokens at hand see of each other, [batch, seq, heads, dim]."""
    up = _heads(self.kv_up(new["latent"][:, :, 0]).reshape(*query.shape[:3], -1))
    key, value = jnp.split(up, [self.split], axis=-1)
    shared = new["turning"]
    key = jnp.concatenate([key, jnp.broadcast_to(shared, (*key.shape[:3], shared.shape[-1]))], axis=-1)
    query, key, value = (checkpoint_name(x, "qkv") for x in (query, key, value))
    return attend(query, key, value, scale=self.scale, **how)

  def recall(self, query: Array, cache: Layer, softcap: float | None) -> Array:
    """Returns what one token sees of those in a cache, itself among them.

    The products that make keys and values of the latent vectors go to the query and the result instead: all heads then
    share one key and value, the vector itself (section 2.1.2 of the paper).
    """
    if getattr(self.kv_up, "adapter", None) is None:
      kernel = self.kv_up.kernel[...].astype(query.dtype)
    else:
      kernel = self.kv_up(jnp.eye(self.rank, dtype=query.dtype))
    to_key, to_value = jnp.split(kernel.reshape(self.rank, self.heads, -1), [self.split], axis=-1)
    still, turning = jnp.split(query, [self.split], axis=-1)
    query = jnp.concatenate([jnp.einsum("bqhn,rhn->bqhr", still, to_key), turning], axis=-1)
    latent = cache.read("latent", query.dtype)
    key = jnp.concatenate([latent, cache.read("turning", query.dtype)], axis=-1)
    how = dict(scale=self.scale, softcap=softcap, backend="reference")
    out = attend(query, key, latent, key_segments=cache.filled(), **how)
    return jnp.einsum("bqhr,rhv->bqhv", out, to_value)


def _heads(x):
  """Splits heads over devices; those of keys and values stay whole where there are too few."""
  word = None if x.shape[2] % sharding.current().size("heads") else "heads"
  return sharding.constrain(x, "batch", "seq", word, None)


class Mlp(nnx.Module):
  """down(activation(gate(x)) * up(x)), https://arxiv.org/abs/2002.05202; without a gate, down(activation(up(x)))."""

  def __init__(self, o: Options, hidden: int, rngs: nnx.Rngs):
    self.activation = layers.choose(layers.ACTIVATIONS, "activation", o.activation)
    bias = o.bias == "all"
    self.gate = _dense(o, rngs, o.width, hidden, bias=bias) if o.gated else None
    self.up = _dense(o, rngs, o.width, hidden, bias=bias)
    self.down = _dense(o, rngs, hidden, o.width, bias=bias, end=True)

  def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
    inside = lambda dense: checkpoint_name(sharding.constrain(dense(x), "batch", "seq", "hidden"), "hidden")
    hidden = inside(self.up)
    hidden = self.activation(hidden) if self.gate is None else self.activation(inside(self.gate)) * hidden
    return self.down(hidden)


def _moe(o: Options, rngs: nnx.Rngs) -> moe.MoE:
  hidden = o.expert_dim or o.mlp_dim
  names = "experts top_k gated activation scoring normalize groups top_groups bias_rate capacity_factor group exchange"
  return moe.MoE(
    o.width,
    hidden,
    **{name: getattr(o, name) for name in names.split()},
    scale=o.route_scale,
    shared=Mlp(o, o.shared_experts * hidden, rngs) if o.shared_experts else None,
    dtype=o.compute,
    init=(nnx.initializers.normal(0.02), nnx.initializers.normal(0.02 / math.sqrt(2 * o.depth))),
    rngs=rngs,
  )


class Block(nnx.Module):
  """Attention, then an MLP or experts, each added to the residual stream; norms before, after, or both."""

  def __init__(self, o: Options, routed: bool, rngs: nnx.Rngs):
    norm = lambda *places: make_norm(o, rngs) if o.norm_place in places else None
    self.window, self.softcap, self.dropout, self.backend = o.window, o.softcap, o.dropout, o.attention
    self.local_rope = "rope" if o.local_theta is None else "local_rope"
    self.routed = routed
    self.norm1 = norm("pre", "sandwich")
    self.attn = (LatentAttention if o.kv_rank else Attention)(o, rngs)
    self.post1 = norm("post", "sandwich")
    self.norm2 = norm("pre", "sandwich")
    self.mlp = _moe(o, rngs) if routed else Mlp(o, o.mlp_dim, rngs)
    self.post2 = norm("post", "sandwich")

  def __call__(
    self,
    x: Float[Array, "batch seq width"],
    *,
    local: bool,
    key: PRNGKeyArray | None = None,
    segments: Int[Array, "batch seq"] | None = None,
    cache: Layer | None = None,
    **tables: Array,
  ) -> tuple[Float[Array, "batch seq width"], dict[str, Any]]:
    """Returns what goes on to the next block, and what there is besides: sums of the router, the cache afterwards.

    A cache takes all rows' first tokens together, and then one at a time.
    """
    keys = layers.subkeys(key, 3)

    def add(x, branch, norm, key):
      branch = layers.dropout(branch if norm is None else norm(branch), self.dropout, key)
      return sharding.constrain(x + branch.astype(x.dtype), "batch", "seq", "embed")

    before = x if self.norm1 is None else self.norm1(x)
    query, new = self.attn.project(before, tables.get(self.local_rope if local else "rope"))
    cache = None if cache is None else cache.add(new)
    if cache is not None and x.shape[1] == 1:
      out = self.attn.recall(query, cache, self.softcap)
    else:
      out = self.attn.attend(
        query,
        new,
        causal=True,
        window=self.window if local else None,
        segments=segments,
        balanced=True,
        softcap=self.softcap,
        dropout_rate=self.dropout,
        dropout_key=keys[0],
        backend=self.backend if cache is None else "auto",  # Prompts have any length.
      )
    x = add(x, self.attn.out.from_heads(_heads(out)), self.post1, keys[1])
    before, aux = x if self.norm2 is None else self.norm2(x), {}
    if self.routed:
      # A capacity is for groups of tokens in training; a token at a time would never meet a full expert.
      mask = None if segments is None else segments != 0
      out, aux = self.mlp(before, mask=mask, dropless=cache is not None)
    else:
      out = self.mlp(before)
    return add(x, out, self.post2, keys[2]), aux if cache is None else aux | {"cache": cache}
