"""How well a language model foretells a text: loss, perplexity, bits, accuracy."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Array

from bigjax.errors import UserError
from bigjax.evaluators import totals
from bigjax.evaluators.totals import Moments


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """Measures the likelihood of a split's tokens; made by `make`."""

  predict: Callable
  batches: Callable[[], Iterable[Mapping]]
  bytes_per_token: float | None

  def run(self, state) -> Iterator[tuple[str, float]]:
    """Yields loss (nats a token), perplexity, bits_per_token, bits_per_byte where it can be told, and accuracy."""
    found = self._add_up(self.batches(), state)
    totals.refuse_outside(found["outside"], "tokens", "model's vocabulary")
    loss = float(found["loss"].mean)
    yield "loss", loss
    with np.errstate(over="ignore"):
      perplexity = float(np.exp(loss))
    yield "perplexity", perplexity
    yield "bits_per_token", loss / math.log(2)
    if self.bytes_per_token is not None:
      yield "bits_per_byte", loss / math.log(2) / self.bytes_per_token
    yield "accuracy", float(found["correct"].mean)

  @functools.cached_property
  def _add_up(self) -> Callable:
    return totals.over_batches(self._measure)

  def _measure(self, state, batch: Mapping) -> dict[str, Array | Moments]:
    found = self.predict(state, batch)
    weight = totals.read(found, "weight")
    return {
      "count": weight.sum(),
      "outside": totals.outside(found["target"], weight != 0, found["logits"].shape[-1]),
      "loss": Moments.of(-totals.read(found, "log_likelihood"), weight),
      "correct": Moments.of(found["correct"], weight),
    }


def make(
  predict: Callable,
  batches: Callable[[], Iterable[Mapping]],
  *,
  bytes_per_token: float | None = None,
) -> Perplexity:
  """Measures how well the next token is predicted: every token of the split counts once, padding and masked ones never.

  Args:
    predict: Function of (state, batch) that returns what task language_modeling's does.
    batches: Gives the split's batches, with `mask`.
    bytes_per_token: Mean length of a token in bytes of the text, 1 for a text read byte by byte; the source's where it
      knows, as text, tokens and chat do. Needed for bits_per_byte, which alone compares models of different
      vocabularies.
  """
  if bytes_per_token is not None and not bytes_per_token > 0:
    raise UserError(f"config.evals: bytes_per_token={bytes_per_token} is not above 0")
  return Perplexity(predict, batches, bytes_per_token)
