"""The next token, from those before it."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.sums import Sums
from bigjax.tasks import features
from bigjax.tasks.losses import correct, cross_entropy, in_chunks


@dataclasses.dataclass(frozen=True)
class LanguageModeling:
  """Learns each token of `tokens` [batch, time + 1] from its predecessors; made by `make`."""

  label_smoothing: float
  z_loss: float
  loss_chunks: int
  tokens: str

  def loss(self, module, batch: Mapping, *, key: Array) -> Sums:
    """Returns the cross-entropy in nats and the accuracy summed over tokens; the weights are numbers of tokens.

    exp of the mean loss is the perplexity; where smoothing, z-loss or a model's own penalties make the loss something
    else, `nll` stands beside it, without them.
    """
    inputs, target, weight, packing = self._shift(batch)
    if not hasattr(module, "hidden"):
      self._check_plain(packing)
      losses, metrics = self._losses(module(inputs, key=key, train=True), target)
      return Sums.of(losses, weight=weight, **metrics)
    hidden, penalties = module.hidden(inputs, key=key, train=True, **packing)
    if self.loss_chunks == 1:
      losses, metrics = self._losses(module.unembed(hidden), target, bool(penalties))
      return Sums.of(losses, weight=weight, **metrics).plus(penalties)
    self._check_chunks(hidden)
    losses = lambda logits, target: self._losses(logits, target, bool(penalties))
    total, metrics = in_chunks(module.unembed, losses, hidden, target, weight, self.loss_chunks)
    sums = Sums.of(jnp.zeros(target.shape), weight=weight, **metrics)
    return dataclasses.replace(sums, sums=sums.sums | {"loss": total}).plus(penalties)

  def _losses(self, logits, target, penalised=False):
    """Returns the loss of each token, and what else there is to know of it."""
    losses = cross_entropy(logits, target, label_smoothing=self.label_smoothing, z_loss=self.z_loss)
    metrics = {"accuracy": correct(logits, target)}
    if self.label_smoothing or self.z_loss or penalised:
      metrics["nll"] = cross_entropy(logits, target)
    return losses, metrics

  def check(self, batch: Mapping[str, np.ndarray], outputs: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises `UserError` for a token in a NumPy batch that is not in the model's vocabulary."""
    features.check_range(batch, self.tokens, outputs["logits"].shape[-1])

  def predict(self, module, batch: Mapping) -> dict[str, Array]:
    """Returns arrays [batch, time] on the tokens to predict, and `logits` [batch, time, vocabulary].

    `target` is the token, `log_likelihood` the natural logarithm of its probability, `correct` whether it is the
    likeliest, `weight` 0 for padding. `features` stand beside them where the module has them.
    """
    inputs, target, weight, packing = self._shift(batch)
    if not hasattr(module, "hidden"):
      self._check_plain(packing)
    found = features.outputs(module, inputs, **packing)
    return found | {
      "target": target,
      "log_likelihood": -cross_entropy(found["logits"], target),
      "correct": correct(found["logits"], target),
      "weight": weight,
    }

  def _check_plain(self, packing):
    if packing or self.loss_chunks > 1:
      what = "segments, documents packed in a row" if packing else f"loss_chunks={self.loss_chunks}"
      raise UserError(f"config.task: {what}, which config.model can't do: it has no hidden(...). Take gpt or decoder.")

  def _check_chunks(self, hidden):
    seq, ways = hidden.shape[1], sharding.current().size("seq")
    if seq % (self.loss_chunks * ways):
      fitting = [n for n in range(1, seq + 1) if seq % (n * ways) == 0]
      nearest = min(fitting, key=lambda n: abs(n - self.loss_chunks), default=None)
      raise UserError(
        f"config.task.loss_chunks: {self.loss_chunks} parts do not divide a sequence of {seq}"
        + (f" split over {ways} devices" if ways > 1 else "")
        + (f"; {nearest} do." if nearest else ".")
      )

  def _shift(self, batch: Mapping) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Returns what the model sees, what it is to predict, what each prediction counts, and how documents are packed.

    All [batch, time].
    """
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
    packing = {
      name: features.read(batch, name, "tokens")[:, :-1] for name in ("segments", "positions") if name in batch
    }
    if "segments" in batch:  # A document's first token is not to be guessed from another's end.
      segments = features.read(batch, "segments", "tokens")
      weight = weight * ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0))
    # What is not predicted may hold anything, such as the -100 of other libraries.
    return inputs, jnp.where(weight != 0, target, 0), weight, packing


def make(
  *, label_smoothing: float = 0.0, z_loss: float = 0.0, loss_chunks: int = 1, tokens: str = "tokens"
) -> LanguageModeling:
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
  if not 0 <= label_smoothing < 1:
    raise UserError(f"config.task.label_smoothing: {label_smoothing} is outside 0 <= label_smoothing < 1")
  if z_loss < 0:
    raise UserError(f"config.task.z_loss: {z_loss} is below 0")
  if loss_chunks < 1:
    raise UserError(f"config.task.loss_chunks: {loss_chunks} is below 1")
  return LanguageModeling(label_smoothing, z_loss, loss_chunks, tokens)
