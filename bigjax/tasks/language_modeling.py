"""The next token, from those before it."""

import functools
from collections.abc import Mapping

import jax.numpy as jnp

from bigjax.errors import UserError
from bigjax.tasks import features
from bigjax.tasks.per_token import PerToken, Reading, like


def make(
  *, label_smoothing: float = 0.0, z_loss: float = 0.0, loss_chunks: int = 1, tokens: str = "tokens"
) -> PerToken:
  """Learns to predict the next token.

  A batch may have `token_mask` [batch, time + 1] beside its tokens: 1 for a token to predict, 0 for one that is only
  seen (a prompt) or is padding. Documents packed in a row have `segments` [batch, time + 1], which count from 1 (0 is
  padding), and `positions`, those in the document.

  Args:
    label_smoothing: Part of the target that is spread over the vocabulary (https://arxiv.org/abs/1512.00567).
    z_loss: Weight of the squared log-normaliser, 1e-4 in PaLM (https://arxiv.org/abs/2204.02311).
    loss_chunks: Parts of the sequence whose logits exist one after another; more take less memory.
    tokens: Feature of the batch that holds the tokens, integers [batch, time + 1].
  """
  return PerToken(label_smoothing, z_loss, loss_chunks, functools.partial(_read, tokens), ((tokens, None),))


def _read(name: str, batch: Mapping) -> Reading:
  """Each token is the target of those before it."""
  tokens = features.read(batch, name, "tokens")
  if tokens.ndim != 2 or tokens.shape[1] < 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise UserError(
      f"config.task.tokens: {name!r} is {tokens.dtype}{list(tokens.shape)}; "
      "give integers [batch, time + 1], two a row or more"
    )
  inputs, target = tokens[:, :-1], tokens[:, 1:]
  weight = jnp.broadcast_to(features.mask(batch, tokens)[:, None], target.shape)
  if "token_mask" in batch:
    token_mask = like(batch, "token_mask", tokens, name, "give a mask of every token, the first too")
    weight = weight * token_mask[:, 1:].astype(jnp.float32)
  packing = {n: features.read(batch, n, "tokens")[:, :-1] for n in ("segments", "positions") if n in batch}
  if "segments" in batch:  # A document's first token is not to be guessed from another's end.
    segments = features.read(batch, "segments", "tokens")
    weight = weight * ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0))
  # What is not predicted may hold anything, such as the -100 of other libraries.
  return Reading(inputs, jnp.where(weight != 0, target, 0), weight, packing)
