"""The decoder-only transformer, with the options by which the open models differ.

GPT-2, Llama, Mistral, Qwen, Gemma, OLMo 2, SmolLM, Phi-3, Mixtral, Qwen3-MoE and DeepSeek-V3 are values of one set of
options; decoder_sizes.py has them. Token embedding -> blocks of attention and MLP -> norm -> logits.

Layers that are computed differently (sliding windows, experts in some) repeat with a period: what is scanned over is
the period. Layers with the same parameters are in one stack whatever they compute: `blocks`; before it `first_blocks`,
those without experts at the start; within it `dense_blocks`, those without experts in between; and `last_blocks`, what
the periods leave over.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import cache as caches
from bigjax.models import layers, moe, ring
from bigjax.models.cache import Cache, Layer
from bigjax.models.decoder_block import Block, Kind, Options, make_norm
from bigjax.models.decoder_sizes import VARIANTS

# How "tensor" and "expert" split the leaves: (regex, dimension from the right). Columns make heads and hidden units,
# rows take them in; no device ever holds whole logits.
TENSOR = (
  (r".*blocks/.*(query|query_up|key|value|kv_up|gate|up)/(kernel|bias)", -1),
  (r".*blocks/.*(out|down)/kernel", -2),
  (r"(token_embed|head)/embedding", -2),
)
EXPERT = moe.EXPERT
# Every device looks the columns that it has up for all tokens, and these are exchanged: far less than the whole table.
FSDP = ((r"token_embed/embedding", -1),)


class Period(nnx.Module):
  """Layers in a row, each of its kind: some of `blocks`, and of `dense_blocks` where the kind has no experts."""

  def __init__(self, kinds: tuple[Kind, ...], blocks, dense_blocks=None, *, remat: str = "none"):
    self.kinds, self.remat = kinds, remat
    self.blocks, self.dense_blocks = nnx.data(blocks), nnx.data(dense_blocks)

  def __call__(self, x: Array, *, key=None, drop_rate=None, **arrays: Array) -> tuple[Array, dict[str, Array]]:
    del drop_rate
    keys, found = layers.subkeys(key, len(self.kinds)), []
    for kind, block, layer_key in zip(self.kinds, self._each(), keys):
      layer = lambda x, block, key, arrays, kind=kind: block(x, local=kind.local, key=key, **arrays)
      if (policy := layers.remat_policy(self.remat)) is not None:
        layer = jax.checkpoint(layer, policy=policy)
      x, aux = layer(x, block, layer_key, arrays)
      found += [aux] if aux else []
    return x, jax.tree.map(lambda *a: jnp.stack(a), *found) if found else {}

  def extend(self, x: Array, kept: Sequence[Layer], **arrays: Array) -> tuple[Array, list[Layer]]:
    """The same for more tokens after those in a cache; returns each layer's cache with them."""
    after = []
    for kind, block, layer in zip(self.kinds, self._each(), kept, strict=True):
      x, aux = block(x, local=kind.local, cache=layer, **arrays)
      after.append(aux["cache"])
    return x, after

  def _each(self):
    seen = {True: 0, False: 0}
    for kind in self.kinds:
      apart = self.dense_blocks is not None and not kind.routed
      yield _at(seen[apart], self.dense_blocks if apart else self.blocks)
      seen[apart] += 1


def _at(index, blocks):
  return blocks[index] if isinstance(blocks, nnx.List) else jax.tree.map(lambda leaf: leaf[index], blocks)


class Decoder(nnx.Module):
  """Tokens to logits of the next token at each position; made by `make`."""

  def __init__(self, o: Options, rngs: nnx.Rngs):
    self.options = o
    embed = lambda n: nnx.Embed(n, o.width, embedding_init=nnx.initializers.normal(0.02), dtype=o.compute, rngs=rngs)
    self.token_embed = embed(o.vocab_size)
    self.position_embed = embed(o.context) if o.positions == "learned" else None
    kinds, count, last = _periods(o)
    counts = {"first_blocks": o.first_dense, "last_blocks": len(last)}
    main = kinds * count
    routed = sum(kind.routed for kind in main)
    mixed = 0 < routed < len(main)
    counts |= {"blocks": routed if mixed else len(main), "dense_blocks": len(main) - routed if mixed else 0}
    has_experts = {"first_blocks": False, "blocks": routed > 0, "dense_blocks": False, "last_blocks": routed > 0}
    for name in ("first_blocks", "blocks", "dense_blocks", "last_blocks"):
      # Only what is in periods is scanned over; the others are few.
      build = lambda rngs, routed=has_experts[name]: Block(o, routed, rngs)
      scan = o.scan and name in ("blocks", "dense_blocks")
      found = layers.stack(build, counts[name], scan=scan, rngs=rngs) if counts[name] else None
      setattr(self, name, nnx.data(found))
    self.norm = make_norm(o, rngs)
    self.head = None if o.tied else embed(o.vocab_size)

  def hidden(
    self,
    tokens: Int[Array, "batch seq"],
    *,
    segments: Int[Array, "batch seq"] | None = None,
    positions: Int[Array, "batch seq"] | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "batch seq width"], dict[str, Array]]:
    """Returns what `unembed` turns into logits, and penalties: sums over tokens, to be added to that of the loss.

    Args:
      tokens: numbers below the size of the vocabulary.
      segments: of documents packed in a row, which don't see each other; 0 is padding.
      positions: of each token in its document; from the segments if None.
      key: for dropout.
      train: whether to drop.
    """
    o = self.options
    if tokens.shape[1] > o.context:
      raise UserError(f"model.context: {o.context} positions are too few for sequences of {tokens.shape[1]}. Raise it.")
    if positions is None and segments is not None:
      positions = _within(segments)
    if positions is None:
      positions = ring.positions(tokens.shape[1])[None]
    else:
      positions = ring.balance(positions)
    tokens, segments = ring.balance(tokens), None if segments is None else ring.balance(segments)

    embed_key, *keys = layers.subkeys(layers.training_key(key, train, o.dropout), 4)
    x = self._embed(tokens, positions)
    x = sharding.constrain(layers.dropout(x, o.dropout, embed_key), "batch", "seq", "embed")
    if sharding.current().size("stage") > 1:  # A pipeline takes the examples of a microbatch out of each array.
      positions = jnp.broadcast_to(positions, tokens.shape)
    arrays = {name: rope.table(positions) for name, rope in o.ropes.items()}
    arrays |= {} if segments is None else {"segments": segments}

    found = []
    if self.first_blocks is not None:
      x, _ = Period(o.kinds[: o.first_dense], self.first_blocks, remat=o.remat)(x, key=keys[0], **arrays)
    x, aux = self._main(x, keys[1], arrays)
    found += [(self.blocks, aux)] if aux else []
    if self.last_blocks is not None:
      x, aux = Period(_periods(o).last, self.last_blocks, remat=o.remat)(x, key=keys[2], **arrays)
      found += [(self.last_blocks, aux)] if aux else []
    if train and o.bias_rate:
      for blocks, aux in found:
        _note_load(blocks, aux["load"])
    total = lambda name: sum(aux[name].sum() for _, aux in found)
    weights = {"balance": o.balance_loss, "router_z": o.router_z_loss} if found else {}
    penalties = {name: weight * total(name) for name, weight in weights.items() if weight}
    return ring.unbalance(self.norm(x).astype(o.compute)), penalties

  def _embed(self, tokens, positions):
    x = self.token_embed(tokens)
    if self.options.embed_scale:
      x = x * jnp.asarray(self.options.width**0.5, x.dtype)
    return x if self.position_embed is None else x + self.position_embed(positions)

  def empty_cache(self, padding: Int[Array, " batch"], slots: int, dtype: str | None = None) -> Cache:
    """Returns a cache for `slots` tokens a row, of which the first `padding` will be padding; see `cache.empty`."""
    o = self.options
    kinds, count, last = _periods(o)
    one = lambda kinds, stack=None: [(o.keeps, o.window if kind.local else None, stack) for kind in kinds]
    main = one(kinds, count) if o.scan else one(kinds * count)
    return caches.empty([*one(o.kinds[: o.first_dense]), *main, *one(last)], padding, slots, dtype or o.dtype)

  def extend(self, tokens: Int[Array, "batch seq"], cache: Cache) -> tuple[Float[Array, "batch seq width"], Cache]:
    """Returns what `unembed` turns into logits, of tokens after those in the cache, and the cache with them.

    First come the first tokens of all rows together, padding in front of the shorter; then one at a time.
    """
    o = self.options
    kinds, count, last = _periods(o)
    positions, segments = cache.places(tokens.shape[1])
    x = sharding.constrain(self._embed(tokens, jnp.minimum(positions, o.context - 1)), "batch", "seq", "embed")
    arrays = {name: rope.table(positions) for name, rope in o.ropes.items()}
    arrays |= {} if segments is None else {"segments": segments}
    alone = lambda kinds, blocks: (nnx.List([Period(kinds, blocks)]), len(kinds))
    groups = [alone(o.kinds[: o.first_dense], self.first_blocks)] if o.first_dense else []
    groups += [(self._grouped(kinds, count), len(kinds))]
    groups += [alone(last, self.last_blocks)] if last else []
    x, cache = cache.run(lambda x, period, layers: period.extend(x, layers, **arrays), groups, x)
    return self.norm(x).astype(o.compute), cache.after(tokens.shape[1])

  @property
  def context(self) -> int:
    """The longest sequence."""
    return self.options.context

  @property
  def vocab_size(self) -> int:
    return self.options.vocab_size

  def _main(self, x, key, arrays):
    """Goes through the periods, by a scan, a loop or a pipeline."""
    o = self.options
    kinds, count, _ = _periods(o)
    # One layer is recomputed at a time. Where it is all of a period, the stack knows how, and a pipeline has to.
    alone = len(kinds) == 1 or sharding.current().size("stage") > 1
    within, around = ("none", o.remat) if alone else (o.remat, "none")
    return layers.run_stack(self._grouped(kinds, count, within), x, key=key, remat=around, **arrays)

  def _grouped(self, kinds, count, remat="none"):
    """The periods, in a list, or one whose leaves have a leading axis."""
    stacks = [self.blocks] if self.dense_blocks is None else [self.blocks, self.dense_blocks]
    if self.options.scan:
      repeats = sharding.current().repeats
      lead = (count,) if repeats == 1 else (repeats, count // repeats)
      group = lambda leaf: leaf.reshape(*lead, -1, *leaf.shape[len(lead) :])
      return Period(kinds, *(jax.tree.map(group, stack) for stack in stacks), remat=remat)
    parts = lambda i: (nnx.List(stack[i * len(stack) // count : (i + 1) * len(stack) // count]) for stack in stacks)
    return nnx.List([Period(kinds, *parts(i), remat=remat) for i in range(count)])

  def unembed(self, hidden: Float[Array, "batch seq width"]) -> Float32[Array, "batch seq vocab"]:
    """Returns the logits of the next token; the kernel is the embedding of the tokens where they are `tied`."""
    embed = self.token_embed if self.head is None else self.head
    logits = layers.unembed(hidden, embed.embedding[...].astype(self.options.compute))
    logits = logits if self.options.mup_base is None else logits / self.options.wider
    cap = self.options.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  def __call__(
    self,
    tokens: Int[Array, "batch seq"],
    *,
    segments: Int[Array, "batch seq"] | None = None,
    positions: Int[Array, "batch seq"] | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> Float32[Array, "batch seq vocab"]:
    return self.unembed(self.hidden(tokens, segments=segments, positions=positions, key=key, train=train)[0])

  @property
  def lr_multipliers(self) -> tuple[tuple[str, float], ...]:
    """Rules for learning rates that belong to the parametrisation."""
    return ((".*blocks/.*/kernel", 1 / self.options.wider),) if self.options.mup_base else ()

  def settle(self) -> None:
    """Once a step: moves the routers' biases by the load that training counted."""
    for blocks in (self.blocks, self.last_blocks):
      for block in blocks if isinstance(blocks, nnx.List) else [blocks] if blocks is not None else []:
        if block.routed:
          block.mlp.settle()


def _note_load(blocks, load):
  load = load.reshape(-1, load.shape[-1])
  if isinstance(blocks, nnx.List):
    for block, one in zip(blocks, load):
      block.mlp.load[...] += one
  else:
    blocks.mlp.load[...] += load.reshape(blocks.mlp.load.shape)


def _within(segments):
  """The position of each token in its run of one segment."""
  place = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
  starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
  return place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)


class _Periods(NamedTuple):
  kinds: tuple[Kind, ...]
  count: int
  last: tuple[Kind, ...]


def _periods(o):
  rest = o.kinds[o.first_dense :]
  length = min(math.lcm(len(o.pattern) if "L" in o.pattern and "G" in o.pattern else 1, o.moe_every), len(rest))
  count, left = divmod(len(rest), length)
  return _Periods(rest[:length], count, rest[len(rest) - left :])


def make(
  *,
  variant: str | None = None,
  vocab_size: int | None = None,
  context: int | None = None,
  width: int | None = None,
  depth: int | None = None,
  heads: int | None = None,
  mlp_dim: int | None = None,
  kv_heads: int | None = None,
  head_dim: int | None = None,
  norm: Literal["rms", "layer"] | None = None,
  norm_place: Literal["pre", "post", "sandwich"] | None = None,
  norm_offset: bool | None = None,
  epsilon: float | None = None,
  bias: Literal["none", "qkv", "all"] | None = None,
  qk_norm: Literal["none", "head", "all"] | None = None,
  positions: Literal["rope", "learned", "none"] | None = None,
  rope_theta: float | None = None,
  rope_fraction: float | None = None,
  rope_scaling: Literal["none", "linear", "llama3", "yarn"] | None = None,
  rope_factor: float | None = None,
  rope_trained: int | None = None,
  rope_amplitude: float | None = None,
  rope_sharpen: float | None = None,
  local_theta: float | None = None,
  window: int | None = None,
  pattern: str | None = None,
  softcap: float | None = None,
  logit_softcap: float | None = None,
  scale_dim: int | None = None,
  gated: bool | None = None,
  activation: str | None = None,
  tied: bool | None = None,
  embed_scale: bool | None = None,
  query_rank: int | None = None,
  kv_rank: int | None = None,
  nope_dim: int | None = None,
  rope_dim: int | None = None,
  value_dim: int | None = None,
  experts: int | None = None,
  top_k: int | None = None,
  expert_dim: int | None = None,
  shared_experts: int | None = None,
  first_dense: int | None = None,
  moe_every: int | None = None,
  scoring: Literal["softmax", "sigmoid"] | None = None,
  normalize: bool | None = None,
  route_scale: float | None = None,
  groups: int | None = None,
  top_groups: int | None = None,
  bias_rate: float | None = None,
  capacity_factor: float | None = None,
  group: int | None = None,
  exchange: Literal["auto", "gather", "ragged"] | None = None,
  balance_loss: float | None = None,
  router_z_loss: float | None = None,
  mup_base: int | None = None,
  dropout: float = 0.0,
  attention: str = "auto",
  scan: bool = False,
  remat: str = "none",
  dtype: str = "float32",
  rngs: nnx.Rngs,
) -> Decoder:
  """A decoder of a published size (`variant`, such as "llama3.1-8b"), or of your own.

  What is None is the variant's; without a variant it is what stands in brackets.

  Args:
    variant: one of `decoder_sizes.VARIANTS`.
    vocab_size, context, width, depth, heads, mlp_dim: sizes; the context is that of the longest sequence.
    kv_heads: heads of keys and values [heads]; 1 is multi-query attention.
    head_dim: of a head [width / heads].
    norm: "rms" or "layer" ["rms"].
    norm_place: of what goes into a branch ("pre"), what comes out ("post"), or both ["pre"].
    norm_offset: the scale is 1 + its parameter, as in Gemma [False].
    epsilon: of the norms [1e-5].
    bias: of no dense layer, of queries, keys and values, or of all and of layer norms ["none"].
    qk_norm: of queries and keys, by head or over all heads together ["none"].
    positions: rotary, an embedding, or none ["rope"].
    rope_theta, rope_fraction: base of the speeds [10000], part of a head's dimensions that turns [1].
    rope_scaling, rope_factor, rope_trained: for longer contexts than the `rope_trained` positions of training; rope.py
      has the formulas ["none"].
    rope_amplitude, rope_sharpen: of YaRN's cosines [0.1 ln(factor) + 1]; latent attention multiplies its scores by
      (0.1 * rope_sharpen * ln(factor) + 1)^2 instead [0].
    local_theta: that of layers with a window, which are not scaled [as the others].
    window: positions that a token of a local layer sees, itself one of them.
    pattern: of local and global layers, repeated: "LLLLLG" ["G"].
    softcap, logit_softcap: bounds of attention scores and logits [none].
    scale_dim: scores are divided by its root [head_dim].
    gated, activation: of the MLP [True, "silu"].
    tied: the head uses the embedding of the tokens [False].
    embed_scale: embeddings are multiplied by sqrt(width) [False].
    query_rank, kv_rank, nope_dim, rope_dim, value_dim: of latent attention, which a kv_rank turns on [none, none, 128,
      64, 128].
    experts: of a layer with experts; 0 is none [0].
    top_k, expert_dim, shared_experts: experts a token chooses [2], their hidden size [mlp_dim], and how many more all
      tokens share [0].
    first_dense, moe_every: layers without experts at the start [0]; after them every so many has some [1].
    scoring, normalize, route_scale, groups, top_groups, capacity_factor, group, exchange: see `moe.MoE`.
    bias_rate: above 0, balances experts by a bias, 0.001 in https://arxiv.org/abs/2408.15664 [0].
    balance_loss: weight of the loss that balances experts in each sequence, 1e-4 in
      https://arxiv.org/abs/2412.19437 [0].
    router_z_loss: weight of the squared log-sum-exp of the router, 1e-3 in https://arxiv.org/abs/2202.08906 [0].
    mup_base: the width at which the learning rate was found, which then holds for any: Tensor Programs V, table 8 for
      Adam, https://arxiv.org/abs/2203.03466. Kernels of blocks start smaller by sqrt(mup_base / width) and learn slower
      by mup_base / width, logits are multiplied by that, scores are divided by head_dim [none].
    dropout: rate on embeddings, attention weights and what enters the residual stream.
    attention: the backend, see attention.py.
    scan: compile one period of layers and scan over them; parameters get a leading axis. For depth and for TPUs.
    remat: what the backward pass computes again: "none", "full", "dots", "save(qkv)"; see `layers.remat_policy`.
    dtype: of the computation; parameters and logits are float32.
  """
  given = {name: value for name, value in locals().items() if name not in ("variant", "rngs") and value is not None}
  found = layers.choose(VARIANTS, "variant", variant) if variant is not None else {}
  missing = [n for n in ("vocab_size", "context", "width", "depth", "heads", "mlp_dim") if n not in found | given]
  if missing:
    raise UserError(f"model.{missing[0]} is missing. Give it, or a variant: {', '.join(VARIANTS)}.")
  options = Options(**found | given)
  check(options)
  return Decoder(options, rngs)


def check(o: Options) -> None:
  """Raises unless there is a model of these options."""
  names = "vocab_size context width depth heads mlp_dim kv_heads head_dim window query_rank kv_rank nope_dim rope_dim"
  names += " value_dim expert_dim moe_every scale_dim rope_trained"
  layers.check_positive(**{name: getattr(o, name) for name in names.split()})
  layers.check_rate(dropout=o.dropout)
  layers.remat_policy(o.remat)
  layers.choose(layers.DTYPES, "dtype", o.dtype)
  if o.head_dim is None and not o.kv_rank:
    layers.check_heads(o.width, o.heads)
  if o.kv_heads and o.heads % o.kv_heads:
    near = min((n for n in range(1, o.heads + 1) if o.heads % n == 0), key=lambda n: abs(n - o.kv_heads))
    raise UserError(f"model.kv_heads: {o.kv_heads} does not divide {o.heads} heads. The nearest that does is {near}.")
  for name, rope in o.ropes.items():
    if rope.dim % 2 or rope.dim > (o.rope_dim if o.kv_rank else o.head_size):
      raise UserError(f"model.rope_fraction: {rope.dim} of a head's {o.head_size} dimensions ({name}) are not pairs.")
  if o.kv_rank and o.positions != "rope":
    raise UserError('model.kv_rank: latent attention has a part that turns; set positions="rope".')
  if not o.pattern or set(o.pattern) - set("LG"):
    raise UserError(f'model.pattern: {o.pattern!r} is no pattern of L (local) and G (global), such as "LLLLLG".')
  if "L" in o.pattern and o.window is None:
    raise UserError(f"model.window is missing, which the L of model.pattern {o.pattern!r} is for.")
  if o.window is not None and "L" not in o.pattern:
    raise UserError(f'model.pattern: {o.pattern!r} has no layer for the window of {o.window}; "L" puts it on all.')
  if o.mup_base is not None:
    layers.check_positive(mup_base=o.mup_base)
    other = [n for n in ("experts", "kv_rank", "embed_scale", "scale_dim") if getattr(o, n)]
    if other:
      raise UserError(f"model.mup_base: how {other[0]} scale with the width is not known here. Leave one of them out.")
  if o.experts:
    moe.check(o.experts, o.top_k, o.groups, o.top_groups)
    rest = o.depth - o.first_dense
    if o.first_dense < 0 or rest < o.moe_every:
      raise UserError(f"model.first_dense: {o.first_dense} of {o.depth} layers leave none with experts.")
    if o.moe_every > 1 and rest % (length := len(_periods(o).kinds)):
      near = o.first_dense + rest // length * length
      raise UserError(
        f"model.depth: the {rest} layers after the first {o.first_dense} are no whole number of periods of {length} "
        f"(moe_every={o.moe_every}, pattern={o.pattern!r}); {near} or {near + length} layers are."
      )
  elif o.first_dense or o.shared_experts:
    raise UserError("model.experts is missing: first_dense and shared_experts are for a model that has some.")
