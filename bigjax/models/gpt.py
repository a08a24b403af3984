"""GPT-2: a decoder-only transformer over tokens.

https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import cache as caches
from bigjax.models import layers, ring
from bigjax.models.cache import Cache

# Table 2 of the paper.
VARIANTS = {
  "gpt2": dict(width=768, depth=12, heads=12),
  "gpt2-medium": dict(width=1024, depth=24, heads=16),
  "gpt2-large": dict(width=1280, depth=36, heads=20),
  "gpt2-xl": dict(width=1600, depth=48, heads=25),
}


# And the vocabulary: no device ever holds whole logits.
TENSOR = (*layers.BLOCK_TENSOR, (r"(token_embed|head)/embedding", -2))


@nnx.dataclass(eq=False, kw_only=True)
class GPT(nnx.Module):
  """Token embedding + learned positions -> pre-norm blocks -> norm -> logits of the next token at each position."""

  token_embed: nnx.Embed
  position_embed: nnx.Embed
  blocks: nnx.Module
  norm: nnx.LayerNorm
  heads: int
  head: nnx.Embed | None  # None: the token embedding is the head.
  dropout: float
  remat: str
  dtype: Any

  def hidden(
    self,
    tokens: Int[Array, "batch seq"],
    *,
    segments: Int[Array, "batch seq"] | None = None,
    positions: Int[Array, "batch seq"] | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "batch seq width"], dict[str, Array]]:
    """Returns the normalised output of the last block, which `unembed` turns into logits, and no penalties.

    Documents packed in a row have `segments`, which don't see each other, and `positions` of their own.
    """
    seq = tokens.shape[1]
    if seq > self.context:
      raise UserError(f"model.context: {self.context} positions are too few for sequences of {seq} tokens. Raise it.")
    embed_key, stack_key = layers.subkeys(layers.training_key(key, train, self.dropout), 2)
    positions = ring.positions(seq)[None] if positions is None else ring.balance(positions)
    x = self.token_embed(ring.balance(tokens)) + self.position_embed(positions)
    x = sharding.constrain(layers.dropout(x, self.dropout, embed_key), "batch", "seq", "embed")
    packed = {} if segments is None else {"segments": ring.balance(segments)}
    x, _ = layers.run_stack(self.blocks, x, key=stack_key, remat=self.remat, **packed)
    return ring.unbalance(self.norm(x).astype(self.dtype)), {}

  def empty_cache(self, padding: Int[Array, " batch"], slots: int, dtype: str | None = None) -> Cache:
    """Returns a cache for `slots` tokens a row, of which the first `padding` will be padding; see `cache.empty`."""
    keeps = dict.fromkeys(("key", "value"), (self.heads, self.position_embed.features // self.heads))
    listed = isinstance(self.blocks, nnx.List)
    depth = len(self.blocks) if listed else jax.tree.leaves(self.blocks)[0].shape[0]
    kept = [(keeps, None, None)] * depth if listed else [(keeps, None, depth)]
    return caches.empty(kept, padding, slots, dtype or jnp.dtype(self.dtype).name)

  def extend(self, tokens: Int[Array, "batch seq"], cache: Cache) -> tuple[Float[Array, "batch seq width"], Cache]:
    """Returns what `unembed` turns into logits, of tokens after those in the cache, and the cache with them.

    First come the first tokens of all rows together, padding in front of the shorter; then one at a time.
    """
    positions, segments = cache.places(tokens.shape[1])
    x = self.token_embed(tokens) + self.position_embed(jnp.minimum(positions, self.context - 1))
    packed = {} if segments is None else {"segments": segments}

    def extend(x, block, kept):
      x, aux = block(x, cache=kept[0], **packed)
      return x, [aux["cache"]]

    x, cache = cache.run(extend, [(self.blocks, 1)], sharding.constrain(x, "batch", "seq", "embed"))
    return self.norm(x).astype(self.dtype), cache.after(tokens.shape[1])

  @property
  def context(self) -> int:
    """The longest sequence."""
    return self.position_embed.num_embeddings

  @property
  def vocab_size(self) -> int:
    return self.token_embed.num_embeddings

  def unembed(self, hidden: Float[Array, "batch seq width"]) -> Float32[Array, "batch seq vocab"]:
    """Returns the logits of the next token; the kernel is the embedding of the tokens unless `tied` is off."""
    embed = self.token_embed if self.head is None else self.head
    return layers.unembed(hidden, embed.embedding[...].astype(self.dtype))

  def __call__(
    self,
    tokens: Int[Array, "batch seq"],
    *,
    segments: Int[Array, "batch seq"] | None = None,
    positions: Int[Array, "batch seq"] | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> Float32[Array, "batch seq vocab"]:
    hidden, _ = self.hidden(tokens, segments=segments, positions=positions, key=key, train=train)
    return self.unembed(hidden)


def make(
  *,
  vocab_size: int = 50257,
  context: int = 1024,
  variant: str | None = None,
  width: int | None = None,
  depth: int | None = None,
  heads: int | None = None,
  mlp_dim: int | None = None,
  activation: str = "gelu_tanh",
  bias: bool = True,
  tied: bool = True,
  dropout: float = 0.0,
  attention: str = "auto",
  scan: bool = False,
  remat: str = "none",
  dtype: str = "float32",
  rngs: nnx.Rngs,
) -> GPT:
  """A GPT-2 of a published size (`variant`: gpt2, gpt2-medium, gpt2-large, gpt2-xl) or of your own.

  Args:
    vocab_size: number of tokens.
    context: longest sequence.
    width, depth, heads: sizes; each given one overrides the variant's.
    mlp_dim: width inside the MLP, 4 * width if None.
    activation: the published weights were trained with "gelu_tanh".
    bias: of dense layers and norms.
    tied: the head uses the embedding of the tokens.
    dropout: rate on embeddings, attention weights and what enters the residual stream; the paper has 0.1.
    attention: the backend, see attention.py.
    scan: compile one block and scan over layers; parameters get a leading layer axis. For depth and for TPUs.
    remat: what the backward pass computes again: "none", "full", "dots", "save(qkv)"; see `layers.remat_policy`.
    dtype: of the computation; parameters and logits are float32.
  """
  sizes = layers.sizes(VARIANTS, variant, width=width, depth=depth, heads=heads)
  width, depth = sizes["width"], sizes["depth"]
  layers.check_positive(vocab_size=vocab_size, context=context, mlp_dim=mlp_dim)
  layers.check_rate(dropout=dropout)
  layers.remat_policy(remat)
  compute = layers.choose(layers.DTYPES, "dtype", dtype)
  normal = nnx.initializers.normal(0.02)
  # The paper scales what enters the residual stream by 1 / sqrt(N), N the number of its residual layers: two a block.
  residual = nnx.initializers.normal(0.02 / (2 * depth) ** 0.5)

  def block(rngs):
    return layers.Block(
      width,
      sizes["heads"],
      mlp_dim or 4 * width,
      causal=True,
      activation=activation,
      bias=bias,
      epsilon=1e-5,
      dropout=dropout,
      attention_dropout=dropout,
      attention=attention,
      dtype=compute,
      init=layers.BlockInit(qkv=normal, out=residual, up=normal, down=residual),
      rngs=rngs,
    )

  def embed(count):
    return nnx.Embed(count, width, embedding_init=normal, dtype=compute, rngs=rngs)

  return GPT(
    token_embed=embed(vocab_size),
    position_embed=embed(context),
    blocks=layers.stack(block, depth, scan=scan, rngs=rngs),
    norm=nnx.LayerNorm(width, epsilon=1e-5, use_bias=bias, rngs=rngs),
    heads=sizes["heads"],
    head=None if tied else embed(vocab_size),
    dropout=dropout,
    remat=remat,
    dtype=compute,
  )
