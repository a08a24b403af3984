"""The hidden tokens, from all around them. https://arxiv.org/abs/1810.04805"""

import functools
from collections.abc import Mapping

import jax.numpy as jnp

from bigjax.errors import UserError
from bigjax.tasks import features
from bigjax.tasks.per_token import PerToken, Reading, like


def make(
  *,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  loss_chunks: int = 1,
  tokens: str = "tokens",
  target: str = "target",
) -> PerToken:
  """Learns to fill in what the op `mask_tokens` hides: `preprocess="mask_tokens('stores/wiki')"`.

  A batch has `target` and `token_mask`, 1 for a token to predict, of the shape of its tokens. Documents packed in a row
  have `segments`, which count from 1 (0 is padding), and `positions`, those in the document.

  Args:
    label_smoothing: Part of the target that is spread over the vocabulary (https://arxiv.org/abs/1512.00567).
    z_loss: Weight of the squared log-normaliser, 1e-4 in PaLM (https://arxiv.org/abs/2204.02311).
    loss_chunks: Parts of the sequence whose logits exist one after another; more take less memory.
    tokens: Feature of the batch that holds the tokens to see, integers [batch, time].
    target: Feature that holds the tokens as they were.
  """
  read = functools.partial(_read, tokens, target)
  return PerToken(label_smoothing, z_loss, loss_chunks, read, ((tokens, None), (target, "token_mask")))


def _read(name: str, target_name: str, batch: Mapping) -> Reading:
  """What was hidden is the target, at its own position."""
  tokens = features.read(batch, name, "tokens")
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise UserError(f"config.task.tokens: {name!r} is {tokens.dtype}{list(tokens.shape)}; give integers [batch, time]")
  for needed in (target_name, "token_mask"):
    if needed not in batch:
      raise UserError(
        f"config.task: the batch has no feature {needed!r}, which says what is hidden. "
        "Put mask_tokens(...) into preprocess, that of config.evals too."
      )
  target, token_mask = (like(batch, n, tokens, name, "give one of every token") for n in (target_name, "token_mask"))
  weight = features.mask(batch, tokens)[:, None] * token_mask.astype(jnp.float32)
  packing = {n: features.read(batch, n, "tokens") for n in ("segments", "positions") if n in batch}
  if "segments" in packing:
    weight = weight * (packing["segments"] != 0)
  return Reading(tokens, jnp.where(weight != 0, target, 0), weight, packing)
