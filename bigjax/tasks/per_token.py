"""A token to predict at each position: the loss and the predictions of language modelling, masked or not."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.sums import Sums
from bigjax.tasks import features
from bigjax.tasks.losses import correct, cross_entropy, in_chunks


class Reading(NamedTuple):
  """What a batch means to a task; arrays [batch, time]."""

  inputs: Array  # Tokens that the model sees.
  target: Array  # The token to predict at each position; any of the vocabulary where nothing is.
  weight: Array  # What each prediction counts.
  packing: dict[str, Array]  # How documents are packed in a row, as the model takes it.


@dataclasses.dataclass(frozen=True)
class PerToken:
  """Learns the token at each position that a task reads off a batch."""

  label_smoothing: float
  z_loss: float
  loss_chunks: int
  read: Callable[[Mapping], Reading]
  known: tuple[tuple[str, str | None], ...]  # Features of tokens; the mask of those that count, None for all.

  def __post_init__(self):
    if not 0 <= self.label_smoothing < 1:
      raise UserError(f"config.task.label_smoothing: {self.label_smoothing} is outside 0 <= label_smoothing < 1")
    if self.z_loss < 0:
      raise UserError(f"config.task.z_loss: {self.z_loss} is below 0")
    if self.loss_chunks < 1:
      raise UserError(f"config.task.loss_chunks: {self.loss_chunks} is below 1")

  def loss(self, module, batch: Mapping, *, key: Array) -> Sums:
    """Returns the cross-entropy in nats and the accuracy summed over tokens; the weights are numbers of tokens.

    exp of the mean loss is the perplexity; where smoothing, z-loss or a model's own penalties make the loss something
    else, `nll` stands beside it, without them.
    """
    inputs, target, weight, packing = self.read(batch)
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
    sums = getattr(module, "sums", jnp.float32)
    total, metrics = in_chunks(module.unembed, losses, hidden, target, weight, self.loss_chunks, sums)
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
    for name, where in self.known:
      features.check_range(batch, name, outputs["logits"].shape[-1], where)

  def predict(self, module, batch: Mapping) -> dict[str, Array]:
    """Returns arrays [batch, time] on the tokens to predict, and `logits` [batch, time, vocabulary].

    `target` is the token, `log_likelihood` the natural logarithm of its probability, `correct` whether it is the
    likeliest, `weight` 0 for what is not to be predicted. `features` stand beside them where the module has them.
    """
    inputs, target, weight, packing = self.read(batch)
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
      raise UserError(
        f"config.task: {what}, which config.model can't do: it has no hidden(...). Take gpt, decoder or bert."
      )

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


def like(batch: Mapping, name: str, tokens: Array, tokens_name: str, remedy: str) -> Array:
  """Returns a feature that has a value for every token; raises `UserError` if it has another shape."""
  values = features.read(batch, name, "tokens")
  if values.shape != tokens.shape:
    raise UserError(
      f"config.task.tokens: {name!r} has shape {values.shape} and {tokens_name!r} {tokens.shape}; {remedy}"
    )
  return values
