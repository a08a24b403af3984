"""Made-up examples that can be learned, for tests, benchmarks and first steps; example i never changes."""

import dataclasses
import math
from typing import Literal

import numpy as np

from bigjax.data import order
from bigjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Synthetic:
  """Examples made when they are asked for, from hashes of (seed, id)."""

  kind: str
  num_examples: int
  seed: int
  shape: tuple[int, ...]
  num_classes: int
  noise: float
  weights: tuple[float, ...]
  bias: float
  vocab_size: int
  length: int

  def __len__(self) -> int:
    return self.num_examples

  def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    keys = order.example_keys(self.seed, np.zeros_like(ids), ids)
    return getattr(self, f"_{self.kind}")(keys)

  def _linear(self, keys):
    x = _normal(keys, 0, len(self.weights))
    noise = self.noise * _normal(keys, 1, 1)[:, 0]
    return {"x": x, "target": x @ np.array(self.weights, np.float32) + np.float32(self.bias) + noise}

  def _images(self, keys):
    labels = (order.uniform(keys, 0, 1)[:, 0] * self.num_classes).astype(np.int32)
    classes = order.example_keys(self.seed, np.full(self.num_classes, -1), np.arange(self.num_classes))
    patterns = order.uniform(classes, 1, math.prod(self.shape)) * 2 - 1
    pixels = patterns[labels] + self.noise * (order.uniform(keys, 1, math.prod(self.shape)) * 2 - 1)
    return {"image": pixels.reshape(-1, *self.shape).astype(np.float32), "label": labels}

  def _tokens(self, keys):
    start, step = (order.uniform(keys, 0, 2) * self.vocab_size).astype(np.int64).T
    tokens = (start[:, None] + step[:, None] * np.arange(self.length + 1)) % self.vocab_size
    return {"tokens": tokens.astype(np.int32)}


def make(
  kind: Literal["linear", "images", "tokens"] = "images",
  *,
  num_examples: int = 1024,
  seed: int = 0,
  shape: tuple[int, ...] = (32, 32, 3),
  num_classes: int = 10,
  noise: float = 0.1,
  weights: tuple[float, ...] = (3.0,),
  bias: float = 2.0,
  vocab_size: int = 256,
  length: int = 64,
) -> Synthetic:
  """Makes up examples.

  Args:
    kind: `linear`: `target` is x . weights + bias + noise, `x` normal [len(weights)]. `images`: `image` is the pattern
      of its `label` plus noise, about -1 to 1. `tokens`: `tokens` [length + 1] count up in steps that differ from
      example to example, modulo `vocab_size`, so that all but the first two can be foretold.
    num_examples: How many there are.
    seed: Of everything; other examples for another seed, and other patterns.
    shape: Of an image.
    num_classes: Number of labels of images.
    noise: Deviation of the normal noise of `linear`; largest value of the uniform noise of `images`.
    weights: Of `linear`.
    bias: Of `linear`.
    vocab_size: Number of different tokens.
    length: Tokens an example, to which the next one is added.
  """
  if num_examples < 1 or num_classes < 1 or vocab_size < 1 or length < 1:
    raise UserError("num_examples, num_classes, vocab_size and length must be 1 or more.")
  return Synthetic(kind, num_examples, seed, shape, num_classes, noise, weights, bias, vocab_size, length)


def _normal(keys, salt, count):
  """Normal numbers by Box and Muller's transform, [batch, count]."""
  u, v = order.uniform(keys, salt, 2 * count).reshape(len(keys), 2, count).swapaxes(0, 1)
  return np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)
