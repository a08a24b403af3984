"""BERT: an encoder that sees a whole text and learns by filling in masked words. https://arxiv.org/abs/1810.04805

Embeddings of token, position and type -> norm -> blocks, each branch normed after it is added -> logits of the token at
each position. Without that head it is what sentence embeddings are made of.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int, PRNGKeyArray

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import layers
from bigjax.models.attention import attend

# How "tensor" splits the leaves: (regex, dimension from the right).
TENSOR = (
  (r".*blocks/.*(query|key|value|up)/(kernel|bias)", -1),
  (r".*blocks/.*(out|down)/kernel", -2),
  (r"token_embed/embedding", -2),
)

_BERT = dict(vocab_size=30522, context=512)
VARIANTS = {
  "base": _BERT | dict(width=768, depth=12, heads=12, mlp_dim=3072),  # google-bert/bert-base-uncased
  "large": _BERT | dict(width=1024, depth=24, heads=16, mlp_dim=4096),  # google-bert/bert-large-uncased
  # sentence-transformers/all-MiniLM-L6-v2, which has no head but a pooler that nothing uses.
  "minilm-l6": _BERT | dict(width=384, depth=6, heads=12, mlp_dim=1536, predicts=False, pooler=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What an encoder is; `make` has the words."""

  vocab_size: int
  context: int
  width: int
  depth: int
  heads: int
  mlp_dim: int
  types: int = 2
  epsilon: float = 1e-12
  activation: str = "gelu"
  predicts: bool = True
  pooler: bool = False
  dropout: float = 0.0
  attention: str = "auto"
  scan: bool = False
  remat: str = "none"
  dtype: str = "float32"

  @property
  def compute(self) -> Any:
    return layers.DTYPES[self.dtype]


def _dense(o, rngs, inputs, outputs):
  return layers.Dense(inputs, outputs, kernel_init=nnx.initializers.normal(0.02), dtype=o.compute, rngs=rngs)


def _norm(o, rngs):
  return nnx.LayerNorm(o.width, epsilon=o.epsilon, rngs=rngs)  # In float32.


class Attention(nnx.Module):
  """Self-attention of every token to every other of its segment."""

  def __init__(self, o: Options, rngs: nnx.Rngs):
    self.heads, self.dropout, self.backend = o.heads, o.dropout, o.attention
    self.query, self.key, self.value, self.out = (_dense(o, rngs, o.width, o.width) for _ in range(4))

  def __call__(self, x: Float[Array, "batch seq width"], *, key=None, segments=None) -> Array:
    heads = lambda x: sharding.constrain(x.reshape(*x.shape[:2], self.heads, -1), "batch", "seq", "heads", None)
    qkv = [heads(checkpoint_name(dense(x), "qkv")) for dense in (self.query, self.key, self.value)]
    how = dict(segments=segments, dropout_rate=self.dropout, dropout_key=key, backend=self.backend)
    return self.out(attend(*qkv, **how).reshape(x.shape))


class Block(nnx.Module):
  """Attention, then an MLP; the norm follows the sum."""

  def __init__(self, o: Options, rngs: nnx.Rngs):
    self.dropout = o.dropout
    self.attn = Attention(o, rngs)
    self.norm1 = _norm(o, rngs)
    init = nnx.initializers.normal(0.02)
    self.mlp = layers.Mlp(
      o.width,
      o.mlp_dim,
      activation=o.activation,
      dropout=0.0,
      dtype=o.compute,
      init=layers.BlockInit(init, init, init, init),
      rngs=rngs,
    )
    self.norm2 = _norm(o, rngs)

  def __call__(
    self, x: Float[Array, "batch seq width"], *, key=None, drop_rate=None, segments=None
  ) -> tuple[Array, dict[str, Array]]:
    del drop_rate
    keys = layers.subkeys(key, 3)

    def add(x, branch, norm, key):
      x = norm(x + layers.dropout(branch, self.dropout, key)).astype(x.dtype)
      return sharding.constrain(x, "batch", "seq", "embed")

    x = add(x, self.attn(x, key=keys[0], segments=segments), self.norm1, keys[1])
    return add(x, self.mlp(x), self.norm2, keys[2]), {}


class Bert(nnx.Module):
  """Tokens to logits of the token at each position; made by `make`."""

  def __init__(self, o: Options, rngs: nnx.Rngs):
    self.options = o
    embed = lambda n: nnx.Embed(n, o.width, embedding_init=nnx.initializers.normal(0.02), dtype=o.compute, rngs=rngs)
    self.token_embed, self.position_embed, self.type_embed = embed(o.vocab_size), embed(o.context), embed(o.types)
    self.embed_norm = _norm(o, rngs)
    self.blocks = nnx.data(layers.stack(lambda rngs: Block(o, rngs), o.depth, scan=o.scan, rngs=rngs))
    self.pooler = _dense(o, rngs, o.width, o.width) if o.pooler else None
    self.predict = _dense(o, rngs, o.width, o.width) if o.predicts else None
    self.predict_norm = _norm(o, rngs) if o.predicts else None
    self.predict_bias = nnx.Param(jnp.zeros(o.vocab_size)) if o.predicts else None

  def hidden(
    self,
    tokens: Int[Array, "batch seq"],
    *,
    segments: Int[Array, "batch seq"] | None = None,
    positions: Int[Array, "batch seq"] | None = None,
    types: Int[Array, "batch seq"] | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "batch seq width"], dict[str, Array]]:
    """Returns what `unembed` turns into logits; there are no penalties.

    Args:
      tokens: numbers below the size of the vocabulary.
      segments: of texts packed in a row, which don't see each other; 0 is padding.
      positions: of each token in its text; in the row if None.
      types: which sentence of a pair a token is in; 0 if None.
      key: for dropout.
      train: whether to drop.
    """
    o = self.options
    if tokens.shape[1] > o.context:
      raise UserError(f"model.context: {o.context} positions are too few for sequences of {tokens.shape[1]}. Raise it.")
    if positions is None:
      positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    embed_key, stack_key = layers.subkeys(layers.training_key(key, train, o.dropout), 2)
    x = self.token_embed(tokens) + self.position_embed(positions)
    x = x + self.type_embed(jnp.zeros_like(tokens) if types is None else types)
    x = layers.dropout(self.embed_norm(x).astype(o.compute), o.dropout, embed_key)
    x = sharding.constrain(x, "batch", "seq", "embed")
    packed = {} if segments is None else {"segments": segments}
    return layers.run_stack(self.blocks, x, key=stack_key, remat=o.remat, **packed)[0], {}

  def unembed(self, hidden: Float[Array, "batch seq width"]) -> Float32[Array, "batch seq vocab"]:
    """Returns the logits of the token at each position."""
    if self.predict is None:
      raise UserError("model.predicts: this encoder has no head for tokens. Set it, or use its features.")
    hidden = layers.ACTIVATIONS[self.options.activation](self.predict(hidden))
    hidden = self.predict_norm(hidden).astype(self.options.compute)
    logits = layers.unembed(hidden, self.token_embed.embedding[...].astype(self.options.compute))
    return logits + self.predict_bias[...][None, None]

  def features(
    self,
    tokens: Int[Array, "batch seq"],
    *,
    segments: Int[Array, "batch seq"] | None = None,
    positions: Int[Array, "batch seq"] | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> Float32[Array, "batch width"]:
    """Returns the mean over the tokens of a text, those whose segment isn't 0: https://arxiv.org/abs/1908.10084."""
    hidden, _ = self.hidden(tokens, segments=segments, positions=positions, key=key, train=train)
    real = jnp.ones(tokens.shape) if segments is None else (segments != 0).astype(jnp.float32)
    total = (hidden.astype(jnp.float32) * real[..., None]).sum(axis=1)
    return total / jnp.maximum(real.sum(axis=1, keepdims=True), 1)

  def __call__(
    self,
    tokens: Int[Array, "batch seq"],
    *,
    segments: Int[Array, "batch seq"] | None = None,
    positions: Int[Array, "batch seq"] | None = None,
    types: Int[Array, "batch seq"] | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> Float32[Array, "batch seq vocab"]:
    given = dict(segments=segments, positions=positions, types=types, key=key, train=train)
    return self.unembed(self.hidden(tokens, **given)[0])


def make(
  *,
  variant: str | None = None,
  vocab_size: int | None = None,
  context: int | None = None,
  width: int | None = None,
  depth: int | None = None,
  heads: int | None = None,
  mlp_dim: int | None = None,
  types: int | None = None,
  epsilon: float | None = None,
  activation: str | None = None,
  predicts: bool | None = None,
  pooler: bool | None = None,
  dropout: float = 0.0,
  attention: str = "auto",
  scan: bool = False,
  remat: str = "none",
  dtype: str = "float32",
  rngs: nnx.Rngs,
) -> Bert:
  """An encoder of a published size (`variant`: base, large, minilm-l6), or of your own.

  What is None is the variant's; without a variant it is what stands in brackets.

  Args:
    variant: one of `VARIANTS`.
    vocab_size, context, width, depth, heads, mlp_dim: sizes; the context is that of the longest text.
    types: kinds of sentences that have an embedding [2].
    epsilon: of the norms [1e-12].
    activation: of the MLP ["gelu"].
    predicts: has the head that says which token is where [True].
    pooler: has the dense layer that published weights keep for their first token [False].
    dropout: rate on embeddings, attention weights and what enters the residual stream; the paper has 0.1.
    attention: the backend, see attention.py.
    scan: compile one block and scan over layers; parameters get a leading axis. For depth and for TPUs.
    remat: what the backward pass computes again; see `layers.remat_policy`.
    dtype: of the computation; parameters and logits are float32.
  """
  given = {name: value for name, value in locals().items() if name not in ("variant", "rngs") and value is not None}
  found = layers.choose(VARIANTS, "variant", variant) if variant is not None else {}
  missing = [n for n in ("vocab_size", "context", "width", "depth", "heads", "mlp_dim") if n not in found | given]
  if missing:
    raise UserError(f"model.{missing[0]} is missing. Give it, or a variant: {', '.join(VARIANTS)}.")
  o = Options(**found | given)
  layers.check_positive(**{n: getattr(o, n) for n in ("vocab_size", "context", "width", "depth", "mlp_dim", "types")})
  layers.check_heads(o.width, o.heads)
  layers.check_rate(dropout=o.dropout)
  layers.remat_policy(o.remat)
  layers.choose(layers.DTYPES, "dtype", o.dtype)
  return Bert(o, rngs)
