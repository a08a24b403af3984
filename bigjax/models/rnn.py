"""Recurrent networks over sequences of values or tokens, giving one output a sequence or one a position."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from bigjax.errors import UserError
from bigjax.models import layers


def _vanilla(inputs, recurrent, state):
  """Elman's network, https://doi.org/10.1207/s15516709cog1402_1."""
  del state
  output = jnp.tanh(inputs + recurrent)
  return output, (output,)


def _lstm(inputs, recurrent, state):
  """https://doi.org/10.1162/neco.1997.9.8.1735 with forget gates, https://doi.org/10.1162/089976600300015015."""
  _, cell = state
  entry, forget, candidate, exit_ = jnp.split(inputs + recurrent, 4, axis=-1)
  cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(entry) * jnp.tanh(candidate)
  output = jax.nn.sigmoid(exit_) * jnp.tanh(cell)
  return output, (output, cell)


def _gru(inputs, recurrent, state):
  """https://arxiv.org/abs/1406.1078, its reset gate after the product (version 1), which is then one for all gates."""
  (output,) = state
  reset, update, candidate = jnp.split(inputs, 3, axis=-1)
  recurrent_reset, recurrent_update, recurrent_candidate = jnp.split(recurrent, 3, axis=-1)
  reset = jax.nn.sigmoid(reset + recurrent_reset)
  update = jax.nn.sigmoid(update + recurrent_update)
  candidate = jnp.tanh(candidate + reset * recurrent_candidate)
  output = (1 - update) * candidate + update * output
  return output, (output,)


# (one step from [batch, gates * width] of inputs and of recurrence, gates, arrays of state)
CELLS = {"vanilla": (_vanilla, 1, 1), "lstm": (_lstm, 4, 2), "gru": (_gru, 3, 1)}


class Layer(nnx.Module):
  """One recurrent layer in one direction; the product with all inputs is taken before the scan over them."""

  def __init__(self, fan_in: int, width: int, cell: str, *, reverse: bool, dtype, rngs: nnx.Rngs):
    self.step, gates, self.num_states = layers.choose(CELLS, "cell", cell)
    self.width, self.reverse, self.dtype = width, reverse, dtype
    glorot, orthogonal = nnx.initializers.glorot_uniform(), nnx.initializers.orthogonal()
    self.inputs = nnx.Linear(fan_in, gates * width, kernel_init=glorot, dtype=dtype, rngs=rngs)
    # Only GRU gates what comes from the recurrence before it is added; elsewhere a second bias would be the first.
    recurrent = dict(kernel_init=orthogonal, use_bias=cell == "gru", dtype=dtype, rngs=rngs)
    self.recurrent = nnx.Linear(width, gates * width, **recurrent)
    if cell == "lstm":  # Remember at first: https://proceedings.mlr.press/v37/jozefowicz15.html
      self.inputs.bias[...] = self.inputs.bias[...].at[width : 2 * width].set(1.0)

  def __call__(
    self, x: Float[Array, "batch seq features"], mask: Bool[Array, "batch seq"] | None
  ) -> tuple[Float[Array, "batch seq width"], Float[Array, "batch width"]]:
    """Returns the output at every position, and the last one (the first, in reverse)."""
    batch, seq, features = x.shape
    # Time first, and the state in float32 whatever the products are computed in.
    x = self.inputs(x.transpose(1, 0, 2).reshape(seq * batch, features)).reshape(seq, batch, -1).astype(jnp.float32)
    mask = None if mask is None else mask.T[:, :, None]

    def step(state, xs):
      inputs, real = xs
      output, new = self.step(inputs, self.recurrent(state[0]).astype(jnp.float32), state)
      if real is not None:
        new = tuple(jnp.where(real, n, s) for n, s in zip(new, state))
      return new, output.astype(self.dtype)

    start = (jnp.zeros((batch, self.width)),) * self.num_states
    state, outputs = jax.lax.scan(step, start, (x, mask), reverse=self.reverse)
    return outputs.transpose(1, 0, 2), state[0].astype(self.dtype)


@nnx.dataclass(eq=False, kw_only=True)
class RNN(nnx.Module):
  """Token embedding, if inputs are tokens -> recurrent layers, dropout between them -> head."""

  embed: nnx.Embed | None
  layers: nnx.Module  # a list of lists: one layer a direction
  head: nnx.Linear
  in_features: int | None
  output: str
  seq_len: int | None
  pad_id: int | None
  dropout: float

  def features(
    self,
    inputs: Float[Array, "batch seq features"] | Float[Array, "batch values"] | Int[Array, "batch seq"],
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> Float[Array, "batch *seq width"]:
    """Returns what the head sees of the last layer: [batch, width], or [batch, seq, width] for output="position"."""
    keys = layers.subkeys(layers.training_key(key, train, self.dropout), len(self.layers))
    x, mask = self._embedded(inputs)
    seq = x.shape[1]
    if self.seq_len not in (None, seq):
      raise UserError(f"model.seq_len: {self.seq_len}, but the sequences have {seq} positions. Set it to that.")
    last = None
    for directions, layer_key in zip(self.layers, keys):
      x = x if last is None else layers.dropout(x, self.dropout, layer_key)
      outputs, lasts = zip(*(layer(x, mask) for layer in directions))
      x, last = jnp.concatenate(outputs, axis=-1), jnp.concatenate(lasts, axis=-1)
    if self.output == "last":
      x = last
    elif self.output == "mean":
      real = jnp.ones(x.shape[:2]) if mask is None else mask.astype(jnp.float32)
      x = jnp.einsum("bsw,bs->bw", x.astype(jnp.float32), real) / jnp.maximum(real.sum(axis=1, keepdims=True), 1.0)
    elif self.output == "flat":
      x = x.reshape(len(x), -1)
    return layers.dropout(x, self.dropout, keys[0])  # The first layer has not used its key.

  def __call__(
    self,
    inputs: Float[Array, "batch seq features"] | Float[Array, "batch values"] | Int[Array, "batch seq"],
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> Float32[Array, "batch *seq outputs"]:
    x = self.features(inputs, key=key, train=train)
    return self.head(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

  def _embedded(self, inputs):
    """[batch, seq, features] of any input, and which positions are real; None for all."""
    if self.embed is not None:
      if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise UserError("model.vocab_size is set, but the inputs are no tokens. Set model.in_features instead.")
      return self.embed(inputs), None if self.pad_id is None else inputs != self.pad_id
    shape = inputs.shape[1:]
    if shape[-1] % self.in_features or (len(shape) == 2 and shape[1] != self.in_features):
      raise UserError(f"model.in_features: {self.in_features} does not fit examples of shape {shape}.")
    return inputs.reshape(len(inputs), -1, self.in_features), None


def make(
  *,
  num_outputs: int,
  in_features: int | None = None,
  vocab_size: int | None = None,
  output: Literal["last", "mean", "flat", "position"] = "last",
  seq_len: int | None = None,
  cell: Literal["vanilla", "lstm", "gru"] = "lstm",
  width: int = 128,
  depth: int = 1,
  bidirectional: bool = False,
  embed_dim: int | None = None,
  pad_id: int | None = None,
  dropout: float = 0.0,
  dtype: str = "float32",
  rngs: nnx.Rngs,
) -> RNN:
  """A recurrent network: a classifier of sequences, or with output="position" a language model or a tagger.

  Args:
    num_outputs: number of logits; a language model has as many as tokens.
    in_features: values at each position, for inputs [batch, seq, in_features] or flat [batch, seq * in_features].
    vocab_size: number of tokens, for inputs int [batch, seq]. Give this or `in_features`.
    output: of what the head makes logits: the "last" state, the "mean" of all, all of them as one row ("flat"), or each
      for itself ("position").
    seq_len: length of the sequences, which "flat" needs to know.
    cell: "vanilla", "lstm" or "gru".
    width: of the state, in each direction.
    depth: number of layers.
    bidirectional: also from the end to the start. A language model must not: it would see what it is to predict.
    embed_dim: width of the token embedding, `width` if None.
    pad_id: this token leaves the state as it is, so that a padded sequence gives what the bare one gives.
    dropout: rate between layers and before the head.
    dtype: of the products; states, parameters and logits are float32.
  """
  if (in_features is None) == (vocab_size is None):
    raise UserError("model.in_features and model.vocab_size: give one, for inputs that are values or tokens.")
  if vocab_size is None and (embed_dim is not None or pad_id is not None):
    raise UserError("model.embed_dim and model.pad_id are for tokens. Set model.vocab_size, or leave them out.")
  if (output == "flat") != (seq_len is not None):
    raise UserError(f"model.seq_len: {seq_len} with output={output!r}. Output 'flat' needs the length, no other does.")
  if bidirectional and output == "position" and num_outputs == vocab_size:
    raise UserError("model.bidirectional: a language model would see the tokens it is to predict. Set it to False.")
  layers.check_positive(num_outputs=num_outputs, in_features=in_features, vocab_size=vocab_size)
  layers.check_positive(width=width, depth=depth, embed_dim=embed_dim, seq_len=seq_len)
  layers.check_rate(dropout=dropout)
  compute = layers.choose(layers.DTYPES, "dtype", dtype)
  embed, fan_in = None, in_features
  if vocab_size is not None:
    fan_in = embed_dim or width
    embed = nnx.Embed(vocab_size, fan_in, dtype=compute, rngs=rngs)
  stack = nnx.List([])
  for _ in range(depth):
    directions = (False, True) if bidirectional else (False,)
    stack.append(nnx.List([Layer(fan_in, width, cell, reverse=r, dtype=compute, rngs=rngs) for r in directions]))
    fan_in = width * len(directions)
  return RNN(
    embed=embed,
    layers=stack,
    head=nnx.Linear(fan_in * (seq_len or 1), num_outputs, kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs),
    in_features=in_features,
    output=output,
    seq_len=seq_len,
    pad_id=pad_id,
    dropout=dropout,
  )
