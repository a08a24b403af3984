"""Sums: adding weighted sums equals measuring everything at once, and weight 0 counts for nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.sums import Sums

RNG = np.random.default_rng(0)
LOSS, ACCURACY = jnp.asarray(RNG.normal(size=12), jnp.float32), jnp.asarray(RNG.integers(0, 2, 12) == 1)
WEIGHT = jnp.asarray([1, 0, 1, 1, 2, 0.5, 0, 0, 0, 1, 1, 3], jnp.float32)


def test_means_are_weighted_means():
  means = Sums.of(LOSS, WEIGHT, accuracy=ACCURACY).means()
  np.testing.assert_allclose(means["loss"], np.average(LOSS, weights=WEIGHT), rtol=1e-6)
  np.testing.assert_allclose(means["accuracy"], np.average(ACCURACY, weights=WEIGHT), rtol=1e-6)


def test_without_weights_every_value_counts_one():
  np.testing.assert_allclose(Sums.of(LOSS).means()["loss"], LOSS.mean(), rtol=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 4, 6, 12])
def test_a_batch_in_k_parts_adds_up_to_the_whole(parts):
  whole = Sums.of(LOSS, WEIGHT, accuracy=ACCURACY)
  pieces = [Sums.of(*x[:2], accuracy=x[2]) for x in zip(*(jnp.split(a, parts) for a in (LOSS, WEIGHT, ACCURACY)))]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sum(pieces[1:], pieces[0]), whole)


def test_the_mean_of_the_parts_means_would_be_wrong():
  means = [Sums.of(*x).means()["loss"] for x in zip(jnp.split(LOSS, 3), jnp.split(WEIGHT, 3))]
  assert abs(np.mean(means) - np.average(LOSS, weights=WEIGHT)) > 0.01


def test_a_mask_of_examples_covers_their_tokens():
  losses = jnp.arange(6.0).reshape(2, 3)
  sums = Sums.of(losses, jnp.asarray([0.0, 1.0]))
  assert (sums.sums["loss"], sums.weights["loss"]) == (12, 3)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_what_stands_at_weight_0_reaches_neither_sums_nor_gradients(garbage):
  values = jnp.where(WEIGHT == 0, garbage, LOSS)
  loss = lambda values, weight: Sums.of(values, weight).sums["loss"]
  assert loss(values, WEIGHT) == loss(LOSS, WEIGHT)
  by_value, by_weight = jax.grad(loss, argnums=(0, 1))(values, WEIGHT)
  np.testing.assert_array_equal(by_value, WEIGHT)
  assert np.isfinite(by_weight).all()


def test_no_weight_at_all_means_0():
  assert Sums.of(LOSS, jnp.zeros(12)).means() == {"loss": 0}


def test_sums_are_float32_whatever_comes_in():
  # 4,096 ones are 4,096, and not the 256 at which bfloat16 stops counting.
  sums = Sums.of(jnp.ones(4096, jnp.bfloat16), jnp.ones(4096, jnp.bfloat16), hit=jnp.ones(4096, bool))
  assert {x.dtype for x in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
  assert jax.tree.leaves(sums) == [4096.0] * 4


def test_sums_cross_jit_grad_scan_and_eval_shape():
  assert jax.eval_shape(Sums.of, LOSS, WEIGHT).sums["loss"].shape == ()
  start = jax.tree.map(jnp.zeros_like, Sums.of(LOSS, WEIGHT))
  parts = (LOSS.reshape(4, 3), WEIGHT.reshape(4, 3))
  total, _ = jax.jit(lambda: jax.lax.scan(lambda sums, x: (sums + Sums.of(*x), None), start, parts))()
  np.testing.assert_allclose(total.means()["loss"], np.average(LOSS, weights=WEIGHT), rtol=1e-6)
