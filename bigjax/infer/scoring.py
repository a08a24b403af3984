"""How likely continuations are after their contexts: what multiple-choice evaluations compare.

Many at once, each row a context with its continuation, sorted by length and padded to a bucket.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.infer.decode import Generator, bucket, power_of_two

MOST_LOGITS = 2**26  # That exist at once, in float32 256 MiB.


@dataclasses.dataclass(frozen=True)
class Score:
  """What the model says of a continuation."""

  log_likelihood: float  # Natural: the sum of `tokens`.
  tokens: tuple[float, ...]  # Of each token, after all that is before it.
  greedy: bool  # Each of them was the likeliest.


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
  """Scores continuations with the model of a generator."""

  generator: Generator
  batch_size: int = 16

  def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
    """Returns the score of every (context, continuation), in this order; both are tokens, at least one each.

    Raises:
      UserError: Tokens or lengths that the model can't take; logits that are no numbers.
    """
    self.generator.check([context for context, _ in pairs], "context")
    self.generator.check([[*context, *after] if len(after) else [] for context, after in pairs], "continuation")
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    found: dict[int, Score] = {}
    ways = self.generator.layout.size("batch")
    rows = -(-power_of_two(min(self.batch_size, max(1, len(pairs)))) // ways) * ways
    for start in range(0, len(order), rows):
      some = order[start : start + rows]
      found |= dict(zip(some, self._batch([pairs[i] for i in some], rows), strict=True))
    return [found[i] for i in range(len(pairs))]

  def _batch(self, pairs, rows):
    ids = [np.array([*context, *after], np.int32) for context, after in pairs]
    # The last token is only predicted. Rounded beyond the context, it's cut again: models refuse longer rows.
    width = min(bucket(max(map(len, ids)) - 1), self.generator.context)
    tokens, segments = np.zeros((2, rows, width + 1), np.int32)
    for row, segment, one in zip(tokens, segments, ids):
      row[: len(one)], segment[: len(one)] = one, 1
    with sharding.use(self.generator.layout):
      log_p, best = jax.device_get(self._run(self.generator.weights, tokens, segments))
    for row, (context, after) in enumerate(pairs):
      part = slice(len(context) - 1, len(context) + len(after) - 1)
      each = log_p[row, part]
      if not np.isfinite(each).all():
        raise UserError(
          "the logits of a continuation are no numbers (NaN or infinite): the weights are damaged, or training "
          "diverged. Take an earlier checkpoint."
        )
      yield Score(float(each.sum(dtype=np.float64)), tuple(each.tolist()), bool(best[row, part].all()))

  @functools.cached_property
  def _run(self):
    @jax.jit
    def run(weights, tokens, segments):
      module = self.generator.bind(*weights)
      inputs, targets = tokens[:, :-1], tokens[:, 1:]
      hidden, _ = module.hidden(inputs, segments=segments[:, :-1])
      rows, width = targets.shape
      most = max(1, MOST_LOGITS // (rows * module.vocab_size))
      pieces = next(n for n in range(1, width + 1) if width % n == 0 and width // n <= most)
      apart = lambda x: x.reshape(rows, pieces, width // pieces, *x.shape[2:]).swapaxes(0, 1)

      def look(piece):
        hidden, target = piece
        logits = module.unembed(hidden)
        logit = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return logit - jax.nn.logsumexp(logits, axis=-1), logit >= logits.max(axis=-1)

      together = lambda x: x.swapaxes(0, 1).reshape(rows, width)
      return jax.tree.map(together, jax.lax.map(look, (apart(hidden), apart(targets))))

    return run
