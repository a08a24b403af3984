"""Cross-entropy from integer labels equals the textbook's from one-hot labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigjax.tasks.losses import correct, cross_entropy

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(4, 5, 7)) * 3, jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 7, (4, 5)))


def textbook(logits, labels, smoothing=0.0, z_loss=0.0):
  logits = np.asarray(logits, np.float64)
  log_normalizer = np.log(np.exp(logits).sum(-1))
  target = np.eye(logits.shape[-1])[labels] * (1 - smoothing) + smoothing / logits.shape[-1]
  return -(target * (logits - log_normalizer[..., None])).sum(-1) + z_loss * log_normalizer**2


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 1e-4)])
def test_cross_entropy_equals_the_definition(smoothing, z_loss):
  found = cross_entropy(LOGITS, LABELS, label_smoothing=smoothing, z_loss=z_loss)
  np.testing.assert_allclose(found, textbook(LOGITS, LABELS, smoothing, z_loss), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_its_gradient_is_softmax_less_the_target(smoothing):
  found = jax.grad(lambda x: cross_entropy(x, LABELS, label_smoothing=smoothing).sum())(LOGITS)
  target = optax.smooth_labels(jax.nn.one_hot(LABELS, 7), smoothing)
  np.testing.assert_allclose(found, jax.nn.softmax(LOGITS) - target, atol=1e-6)


def test_bfloat16_logits_are_reduced_in_float32():
  logits = LOGITS.astype(jnp.bfloat16)
  found = cross_entropy(logits, LABELS)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, textbook(logits.astype(jnp.float32), LABELS), rtol=1e-5)


def test_large_logits_neither_overflow_nor_lose_the_gradient():
  logits = jnp.asarray([[1e4, -1e4], [-1e4, 1e4]])
  np.testing.assert_allclose(cross_entropy(logits, jnp.asarray([0, 0])), [0, 2e4])
  assert np.isfinite(jax.grad(lambda x: cross_entropy(x, jnp.asarray([0, 0])).sum())(logits)).all()


@pytest.mark.parametrize("label", [-1, 7, -100, 2**30])
def test_a_label_that_is_no_class_gives_nan_and_not_a_neighbours_loss(label):
  found = cross_entropy(LOGITS, LABELS.at[2, 3].set(label))
  assert np.isnan(found[2, 3])
  assert np.isfinite(found).sum() == 19


def test_no_one_hot_matrix_is_made():
  # 1,000 x 1,000 floats are the logits; the loss needs no second array of that size.
  compiled = jax.jit(cross_entropy).lower(jnp.zeros((1000, 1000)), jnp.zeros(1000, jnp.int32)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 100_000


def test_correct_agrees_with_argmax_where_logits_are_equal_too():
  logits = jnp.asarray(RNG.integers(0, 3, (200, 7)), jnp.float32)
  labels = jnp.asarray(RNG.integers(0, 7, 200))
  np.testing.assert_array_equal(correct(logits, labels), np.argmax(logits, -1) == np.asarray(labels))


def test_nan_logits_are_never_correct():
  assert not correct(jnp.full((7, 7), jnp.nan), jnp.arange(7)).any()
