"""Totals: moments merge without cancellation, each batch counts once, one compilation serves every run."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bigjax.errors import UserError
from bigjax.evaluators.totals import Moments, over_batches, replicated

RNG = np.random.default_rng(0)


def merged(values, weight, parts):
  pieces = [Moments.of(*x) for x in zip(jnp.split(jnp.asarray(values), parts), jnp.split(jnp.asarray(weight), parts))]
  return sum(pieces[1:], pieces[0])


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_of_parts_are_those_of_the_whole_however_far_the_mean_is_from_0(parts, offset):
  values, weight = (RNG.normal(size=(64, 3)) + offset).astype(np.float32), RNG.integers(0, 3, 64)
  found = merged(values, weight, parts)
  mean = np.average(values.astype(np.float64), axis=0, weights=weight)
  squares = (weight[:, None] * np.square(values - mean)).sum(0)
  assert found.count == weight.sum()
  np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
  np.testing.assert_allclose(found.squares, squares, rtol=1e-3)


def test_moments_are_over_every_axis_that_the_weight_has():
  values, weight = RNG.normal(size=(4, 6)).astype(np.float32), RNG.integers(0, 2, (4, 6))
  found = Moments.of(jnp.asarray(values), jnp.asarray(weight))
  np.testing.assert_allclose(found.mean, np.average(values, weights=weight), rtol=1e-5)


def test_a_part_of_padding_alone_changes_nothing():
  some, none = Moments.of(jnp.arange(3.0), jnp.ones(3)), Moments.of(jnp.full(3, jnp.nan), jnp.zeros(3))
  jax.tree.map(np.testing.assert_array_equal, some + none, some)
  jax.tree.map(np.testing.assert_array_equal, none + some, some)


def test_a_million_batches_worth_of_rounding_stays_small():
  # A plain float32 sum of these 2^25 ones would stop at 2^24.
  one = Moments.of(jnp.full(1024, 0.1), jnp.ones(1024))
  total, _ = jax.lax.scan(lambda total, _: (total + one, None), one, None, 2**15)
  np.testing.assert_allclose(total.mean, 0.1, rtol=1e-6)


def batches(n=5, size=8):
  return [{"x": np.full(size, i, np.float32), "mask": np.ones(size, np.float32)} for i in range(n)]


def test_every_batch_is_added_once_and_compiled_once_over_many_runs():
  traces = []

  def measure(state, batch):
    traces.append(1)
    return {"count": batch["mask"].sum(), "x": (state * batch["x"]).sum()}

  add_up = over_batches(measure)
  for state in (1.0, 2.0, 3.0):
    found = add_up(batches(), jnp.asarray(state))
    assert (found["count"], found["x"]) == (40, state * 80)
    assert isinstance(found["x"], np.ndarray | np.generic)
  assert len(traces) == 1


def test_no_hold_is_kept_on_the_state():
  add_up = over_batches(lambda state, batch: {"count": batch["mask"].sum() + state[0]})
  state = jnp.ones(3)
  gone = weakref.ref(state)
  add_up(batches(), state)
  del state
  gc.collect()
  assert gone() is None


def test_the_host_fetches_nothing_before_the_last_batch(monkeypatch):
  fetched = []
  device_get = jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(1) or device_get(x))

  def stream():
    yield from batches()
    assert not fetched

  over_batches(lambda batch: {"count": batch["mask"].sum()})(stream())
  assert fetched == [1]


def test_results_are_whole_on_every_device_even_where_the_compiler_would_split_them():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  batch = jax.device_put(batches(1)[0], NamedSharding(mesh, PartitionSpec("data")))
  found = replicated(lambda batch: batch["x"] + 1)(batch)
  assert found.sharding.is_fully_replicated
  assert jax.jit(lambda batch: batch["x"] + 1)(batch).sharding.spec == PartitionSpec("data")


@pytest.mark.parametrize("found", [[], [{"x": np.ones(4, np.float32), "mask": np.zeros(4, np.float32)}]])
def test_no_example_is_an_error_and_not_a_division_by_0(found):
  with pytest.raises(UserError, match="holds no example"):
    over_batches(lambda batch: {"count": batch["mask"].sum()})(found)
