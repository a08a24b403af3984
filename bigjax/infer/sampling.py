"""Which token comes next, given the logits.

No sort of the vocabulary: the k-th largest probability, or the one at which the likeliest tokens make up a share p, is
mostly among the `FEW` largest; otherwise it is found by bisection of its 31 bits, each step a sum over the vocabulary.
Equally likely tokens stay or go together.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from bigjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How to draw a token. In this order: penalty, temperature, top_k, top_p, min_p."""

  temperature: float = 1.0  # 0 takes the likeliest.
  top_k: int | None = None  # Among so many of the likeliest.
  top_p: float | None = None  # Among the likeliest that make up this share, https://arxiv.org/abs/1904.09751.
  min_p: float | None = None  # Among those with this part of the likeliest's probability, arxiv.org/abs/2407.01082.
  repetition_penalty: float = 1.0  # Above 1: fewer tokens that were there, https://arxiv.org/abs/1909.05858.

  def __post_init__(self):
    ranges = {
      "temperature": (self.temperature >= 0, "0 (the likeliest) or above"),
      "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
      "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
      "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
      "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1 is none"),
    }
    for name, (fine, wanted) in ranges.items():
      if not fine:
        raise UserError(f"{name}: {getattr(self, name)} is no such number: {wanted}.")

  @property
  def on(self) -> frozenset[str]:
    """What there is to compute; a program is compiled for these names, whatever the numbers."""
    found = {"repetition_penalty"} if self.repetition_penalty != 1 else set()
    if self.temperature:
      off = {"top_k": None, "top_p": 1, "min_p": 0}
      found |= {"temperature"} | {n for n, v in off.items() if getattr(self, n) not in (None, v)}
    return frozenset(found)

  def numbers(self) -> dict[str, Array]:
    """The numbers of what is on."""
    return {name: jnp.asarray(getattr(self, name), jnp.float32) for name in sorted(self.on)}


GREEDY = Sampling(temperature=0.0)
FEW = 128


def choose(
  logits: Float32[Array, "batch vocab"],
  on: frozenset[str],
  numbers: Mapping[str, Array],
  keys: Array,
  seen: Bool[Array, "batch vocab"] | None = None,
) -> Int[Array, " batch"]:
  """Returns a token of each row. Where a row has a NaN, that one's number.

  Args:
    logits: of the next token.
    on: `Sampling.on`.
    numbers: `Sampling.numbers()`.
    keys: a JAX key for each row, which its token is a function of.
    seen: tokens that the repetition penalty is for.
  """
  if "repetition_penalty" in on:
    penalty = numbers["repetition_penalty"]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
  if "temperature" not in on:
    return _likeliest(logits)
  logits = logits / numbers["temperature"]
  if on & {"top_k", "top_p", "min_p"}:
    logits = kept(logits, on, numbers)
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
  # On a CPU the noise is made several times where it is drawn and compared at once.
  return _likeliest(jax.lax.optimization_barrier(logits + noise))


def _likeliest(logits: Float32[Array, "batch vocab"]) -> Int[Array, " batch"]:
  """`argmax`, the first of equal ones or of NaNs, as two reductions: a fifth of its time on a CPU."""
  found = (logits == logits.max(axis=-1, keepdims=True)) | jnp.isnan(logits)
  return jnp.where(found, jnp.arange(logits.shape[-1]), logits.shape[-1]).min(axis=-1)


def kept(
  logits: Float32[Array, "batch vocab"], on: frozenset[str], numbers: Mapping[str, Array]
) -> Float32[Array, "batch vocab"]:
  """Returns the logits, -inf for tokens that top_k, top_p or min_p leave out."""
  mass = jnp.exp(logits - logits.max(axis=-1, keepdims=True))  # The likeliest has 1.
  few = min(FEW, mass.shape[-1])
  top = jax.lax.top_k(mass, few)[0] if on & {"top_k", "top_p"} else None
  least = jnp.zeros(len(logits))
  if "top_k" in on:
    count = numbers["top_k"]
    enough = lambda t: (mass >= t[:, None]).sum(axis=-1) >= count
    among = lambda: top[:, jnp.clip(count.astype(jnp.int32) - 1, 0, few - 1)]
    least = jax.lax.cond(count <= few, among, lambda: _largest(enough, len(logits)))
  if "top_p" in on:
    wanted = numbers["top_p"] * jnp.where(mass >= least[:, None], mass, 0).sum(axis=-1)
    share = lambda t: jnp.where(mass >= jnp.maximum(t, least)[:, None], mass, 0).sum(axis=-1)
    there = top.cumsum(axis=-1) >= wanted[:, None]
    among = jnp.take_along_axis(top, there.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    enough = lambda t: share(t) >= wanted
    # Each row by its own, whatever the others need: sums in another order may round to another token.
    largest = jax.lax.cond(there.any(-1).all(), lambda: among, lambda: _largest(enough, len(logits)))
    least = jnp.maximum(least, jnp.where(there.any(-1), among, largest))
  if "min_p" in on:
    least = jnp.maximum(least, numbers["min_p"])
  return jnp.where(mass < least[:, None], -jnp.inf, logits)  # A NaN is not less.


def _largest(enough: Callable[[Array], Array], rows: int) -> Float[Array, " rows"]:
  """Returns the largest number from 0 to 1 of which `enough` is true, if it's true up to there."""
  number = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) // 2
    fine = enough(number(middle))
    return jnp.where(fine, middle, low), jnp.where(fine, high, middle)

  one = 0x3F800000  # The bits of 1.0: between it and 0, floats are in the order of their bits.
  bounds = jnp.zeros(rows, jnp.int32), jnp.full(rows, one + 1, jnp.int32)
  return number(jax.lax.fori_loop(0, 31, halve, bounds)[0])
