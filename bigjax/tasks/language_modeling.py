"""The next token, from those before it."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bigjax.errors import UserError
from bigjax.sums import Sums
from bigjax.tasks import features
from bigjax.tasks.losses import correct, cross_entropy


@dataclasses.dataclass(frozen=True)
class LanguageModeling:
  """Learns each token of `tokens` [batch, time + 1] from its predecessors; made by `make`."""

  label_smoothing: float
  z_loss: float
  tokens: str

  def loss(self, module, batch: Mapping, *, key: Array) -> Sums:
    """Returns the cross-entropy in nats and the accuracy summed over tokens; the weights are numbers of tokens.

    exp of the mean loss is the perplexity; where smoothing or z-loss make the loss something else, `nll` stands beside
    it, without them.
    """
    inputs, target, weight = self._shift(batch)
    logits = module(inputs, key=key, train=True)
    losses = cross_entropy(logits, target, label_smoothing=self.label_smoothing, z_loss=self.z_loss)
    metrics = {"accuracy": correct(logits, target)}
    if self.label_smoothing or self.z_loss:
      metrics["nll"] = cross_entropy(logits, target)
    return Sums.of(losses, weight=weight, **metrics)

  def check(self, batch: Mapping[str, np.ndarray], outputs: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises `UserError` for a token in a NumPy batch that is not in the model's vocabulary."""
    features.check_range(batch, self.tokens, outputs["logits"].shape[-1])

  def predict(self, module, batch: Mapping) -> dict[str, Array]:
    """Returns arrays [batch, time] on the tokens to predict, and `logits` [batch, time, vocabulary].

    `target` is the token, `log_likelihood` the natural logarithm of its probability, `correct` whether it is the
    likeliest, `weight` 0 for padding. `features` stand beside them where the module has them.
    """
    inputs, target, weight = self._shift(batch)
    found = features.outputs(module, inputs)
    return found | {
      "target": target,
      "log_likelihood": -cross_entropy(found["logits"], target),
      "correct": correct(found["logits"], target),
      "weight": weight,
    }

  def _shift(self, batch: Mapping) -> tuple[Array, Array, Array]:
    """Returns what the model sees, what it is to predict, and what each prediction counts, all [batch, time]."""
    tokens = features.read(batch, self.tokens, "tokens")
    if tokens.ndim != 2 or tokens.shape[1] < 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise UserError(
        f"config.task.tokens: {self.tokens!r} is {tokens.dtype}{list(tokens.shape)}; "
        "give integers [batch, time + 1], two a row or more"
      )
    inputs, target = tokens[:, :-1], tokens[:, 1:]
    weight = jnp.broadcast_to(features.mask(batch, tokens)[:, None], target.shape)
    if "token_mask" in batch:
      token_mask = features.read(batch, "token_mask", "tokens")
      if token_mask.shape != tokens.shape:
        raise UserError(
          f"config.task.tokens: 'token_mask' has shape {token_mask.shape} and {self.tokens!r} {tokens.shape}; "
          "give a mask of every token, the first too"
        )
      weight = weight * token_mask[:, 1:].astype(jnp.float32)
    # What is not predicted may hold anything, such as the -100 of other libraries.
    return inputs, jnp.where(weight != 0, target, 0), weight


def make(*, label_smoothing: float = 0.0, z_loss: float = 0.0, tokens: str = "tokens") -> LanguageModeling:
  """Learns to predict the next token.

  A batch may have `token_mask` [batch, time + 1] beside its tokens: 1 for a token to predict, 0 for one that is only
  seen (a prompt) or is padding.

  Args:
    label_smoothing: Part of the target that is spread over the vocabulary (https://arxiv.org/abs/1512.00567).
    z_loss: Weight of the squared log-normaliser, 1e-4 in PaLM (https://arxiv.org/abs/2204.02311).
    tokens: Feature of the batch that holds the tokens, integers [batch, time + 1].
  """
  if not 0 <= label_smoothing < 1:
    raise UserError(f"config.task.label_smoothing: {label_smoothing} is outside 0 <= label_smoothing < 1")
  if z_loss < 0:
    raise UserError(f"config.task.z_loss: {z_loss} is below 0")
  return LanguageModeling(label_smoothing, z_loss, tokens)
