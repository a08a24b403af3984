"""Adds a measurement up over a split, on the devices, and fetches it once.

Every evaluator has the same inside: one compiled function measures a batch, what it returns can be added, and the host
looks at nothing before the last batch. Counts are int32. What is a mean is kept as `Moments`: a float32 sum over a
million tokens forgets small terms, and a variance from a sum of squares cancels to nothing when the mean is far from 0.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bigjax.errors import UserError, suggest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """How many values there were, their mean, and the sum of their squared distances from it."""

  # A pytree holds whatever a transformation puts at its leaves, hence no array types here.
  count: object
  mean: object
  squares: object

  @classmethod
  def of(cls, values: Array, weight: Array) -> Moments:
    """Returns the moments over the leading axes that `weight` has; a value of weight 0 may be NaN."""
    axes = tuple(range(weight.ndim))
    weight = weight.astype(jnp.float32)
    count = weight.sum()
    weight = weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim))
    values = jnp.where(weight != 0, values.astype(jnp.float32), 0.0)
    mean = (values * weight).sum(axes) / _or_one(count)
    return cls(count, mean, (jnp.square(values - jnp.expand_dims(mean, axes)) * weight).sum(axes))

  def __add__(self, other: Moments) -> Moments:
    """Chan, Golub and LeVeque 1979, equation 2.1 (http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf)."""
    count = self.count + other.count
    share = other.count / _or_one(count)
    apart = other.mean - self.mean
    squares = self.squares + other.squares + jnp.square(apart) * self.count * share
    return Moments(count, self.mean + apart * share, squares)


def over_batches(measure: Callable) -> Callable:
  """Returns `add_up(batches, *args)`, the sum of `measure(*args, batch)` over all batches, as NumPy arrays.

  `measure` returns a dict of counts and `Moments`, with the examples under "count". It is compiled once for the
  lifetime of what is returned, which keeps no hold on `args`.

  Raises:
    UserError: there was no example.
  """
  measured = replicated(measure)
  add = jax.jit(lambda a, b: jax.tree.map(operator.add, a, b, is_leaf=lambda x: isinstance(x, Moments)))

  def add_up(batches: Iterable[Mapping], *args) -> dict:
    total = None
    for batch in batches:
      new = measured(*args, batch)
      total = new if total is None else add(total, new)
    total = jax.device_get(total)
    if total is None or not total["count"] > 0:
      raise UserError("config.evals: the data of an evaluator holds no example; look at its split and its filters")
    return total

  return add_up


_jit: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("jit", default=None)


@contextlib.contextmanager
def compiled_by(jit: Callable | None) -> Iterator[None]:
  """Within, `replicated` has functions compiled by this, where it is not None."""
  token = _jit.set(jit)
  try:
    yield
  finally:
    _jit.reset(token)


def replicated(function: Callable) -> Callable:
  """Returns `function(*args, batch)` compiled, its results whole on every device so that every host can fetch them."""
  by = functools.cache(lambda jit: jit(function))

  @functools.partial(jax.jit, static_argnums=0)
  def compiled(sharding, args, batch):
    found = function(*args, batch)
    return found if sharding is None else jax.lax.with_sharding_constraint(found, sharding)

  def call(*args):
    if jit := _jit.get():
      return by(jit)(*args)
    *args, batch = args
    where = getattr(read(batch, "mask"), "sharding", None)
    whole = None
    if isinstance(where, jax.sharding.NamedSharding):
      whole = jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec())
    return compiled(whole, tuple(args), batch)

  return call


def read(found: Mapping, name: str, option: str = "") -> Array | np.ndarray:
  """Returns what a batch or a prediction holds by that name.

  Raises:
    UserError: it holds no such thing; `option` says which option of the evaluator asked for it.
  """
  if name not in found:
    asked = f"config.evals: {option}={name!r}" if option else f"config.evals: {name!r}"
    raise UserError(f"{asked} is not there.{suggest(name, found)}")
  return found[name]


def outside(labels: Array, real: Array, classes: int) -> Array:
  """Returns how many of the real labels are none of the classes, for `refuse_outside` to look at in the end."""
  return (((labels < 0) | (labels >= classes)) & real).sum(dtype=jnp.int32)


def refuse_outside(count: np.ndarray, name: str, outputs: str) -> None:
  """Raises a UserError if labels were found outside what the model's `outputs` ("10 classes") can say."""
  if count:
    raise UserError(
      f"config.evals: {int(count)} of the values of {name!r} lie outside the {outputs} (counted from 0); "
      "give the model as many outputs as the data has classes, or mend the data"
    )


def _or_one(count: Array) -> Array:
  return jnp.where(count == 0, 1.0, count)
