"""Texts as vectors of length 1, close to one another where the texts mean alike. https://arxiv.org/abs/1908.10084"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigjax import sharding
from bigjax.data.tokenizers import Tokenizer
from bigjax.errors import UserError
from bigjax.infer.decode import bucket, power_of_two


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
  """An encoder that reads text."""

  bind: Callable[..., Any]  # (*weights) -> module, which has `features`.
  weights: tuple[Any, ...]
  tokenizer: Tokenizer
  layout: sharding.Layout = dataclasses.field(default_factory=sharding.Layout)
  batch_size: int = 32

  def embed(self, texts: Sequence[str]) -> np.ndarray:
    """Returns the vector of each text, float32 [texts, width].

    Raises:
      UserError: A text is longer than the model's context; vectors that are no numbers.
    """
    context, roles = self._module.options.context, self.tokenizer.roles
    ends = [[roles[name]] if name in roles else [] for name in ("bos", "eos")]  # [CLS] and [SEP].
    tokens = [[*ends[0], *found.tolist(), *ends[1]] for found in self.tokenizer.encode(texts)]
    for i, row in enumerate(tokens):
      if not row:
        raise UserError(f"text {i} is empty; there is nothing to take the mean of.")
      if len(row) > context:
        raise UserError(f"text {i} has {len(row):,} tokens, and the model's context is {context:,}. Cut it in parts.")
    order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
    ways = self.layout.size("batch")
    rows = -(-power_of_two(min(self.batch_size, max(1, len(tokens)))) // ways) * ways
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), rows):
      some = order[start : start + rows]
      found |= zip(some, self._batch([tokens[i] for i in some], rows, context))
    vectors = np.stack([found[i] for i in range(len(tokens))])
    if not np.isfinite(vectors).all():
      raise UserError("the vectors are no numbers (NaN or infinite): the weights are damaged.")
    return vectors

  def _batch(self, tokens, rows, context):
    ids, segments = np.zeros((2, rows, min(bucket(len(tokens[0])), context)), np.int32)
    for row, segment, one in zip(ids, segments, tokens):
      row[: len(one)], segment[: len(one)] = one, 1
    with sharding.use(self.layout):
      return jax.device_get(self._run(self.weights, ids, segments))

  @functools.cached_property
  def _module(self):
    """The module, without its weights."""
    found = []
    with sharding.use(self.layout):
      jax.eval_shape(lambda *weights: found.append(self.bind(*weights)), *self.weights)
    if not hasattr(found[0], "features"):
      raise UserError(f"config.model: {type(found[0]).__name__} has no vectors of texts. Take bert.")
    self.tokenizer.check_model(found[0].options.vocab_size)
    return found[0]

  @functools.cached_property
  def _run(self):
    @jax.jit
    def run(weights, tokens, segments):
      vectors = self.bind(*weights).features(tokens, segments=segments)
      return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)

    return run
