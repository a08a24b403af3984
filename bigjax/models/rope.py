"""Rotary positions: each pair of a head's dimensions turns with the position, at a speed of its own.

https://arxiv.org/abs/2104.09864. Pairs are (i, i + half), as in Llama's published weights on Hugging Face; weights for
neighbouring pairs (Meta's own files, GGUF, DeepSeek) need their rows put in this order when they are read.

For longer contexts than in training they turn slower, by `factor`: all pairs (linear), slow ones (llama3), or slow ones
and with sharper attention (YaRN, https://arxiv.org/abs/2309.00071).
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """How fast the pairs turn."""

  dim: int  # Dimensions of a head that turn, the first ones.
  theta: float = 10_000.0  # The slowest pair turns about once in 2 pi theta positions.
  scaling: str = "none"  # Or "linear", "llama3", "yarn".
  factor: float = 1.0  # How much longer contexts are than in training.
  trained: int = 8192  # Context in training, for llama3 and yarn.
  low: float = 1.0  # Llama3: a pair that turns less often in the context of training is slowed down by the factor.
  high: float = 4.0  # Llama3: one that turns more often stays; between the two, by degrees.
  fast: float = 32.0  # YaRN: a pair that turns more often stays.
  slow: float = 1.0  # YaRN: one that turns less often is slowed down by the factor.
  amplitude: float | None = None  # YaRN: of the cosines; 0.1 ln(factor) + 1 if None.

  def frequencies(self) -> np.ndarray:
    """Returns the angle by which each pair turns from a position to the next, in radians."""
    plain = self.theta ** -(np.arange(0, self.dim, 2) / self.dim)
    slowed = plain / self.factor
    if self.scaling == "linear":
      return slowed
    if self.scaling == "llama3":  # https://github.com/meta-llama/llama-models, models/llama3/model.py: apply_scaling.
      turns = self.trained * plain / (2 * np.pi)
      kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
      return slowed * (1 - kept) + plain * kept
    if self.scaling == "yarn":
      pair = lambda turns: self.dim * math.log(self.trained / (2 * np.pi * turns)) / (2 * math.log(self.theta))
      first, last = max(math.floor(pair(self.fast)), 0), min(math.ceil(pair(self.slow)), self.dim - 1)
      kept = 1 - np.clip((np.arange(self.dim // 2) - first) / max(last - first, 1e-3), 0, 1)
      return slowed * (1 - kept) + plain * kept
    return plain

  def table(self, positions: Int[Array, "batch seq"]) -> Float32[Array, "batch seq 2 half"]:
    """Returns the cosine and the sine of every pair's angle."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(self.frequencies(), jnp.float32)[None, None]
    amplitude = 1.0
    if self.scaling == "yarn":
      amplitude = sharpness(self.factor) if self.amplitude is None else self.amplitude
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-2) * amplitude


def sharpness(factor: float, scale: float = 1.0) -> float:
  """Returns what YaRN multiplies queries, and keys, by."""
  return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def rotate(
  x: Float[Array, "batch seq heads dim"], table: Float32[Array, "#batch seq 2 half"]
) -> Float[Array, "batch seq heads dim"]:
  """Turns the pairs of every head, in float32; dimensions that the table has no angle for stay."""
  half = table.shape[-1]
  cos, sin = table[:, :, None, 0], table[:, :, None, 1]
  first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., 2 * half :]], axis=-1)
