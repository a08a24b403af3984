"""CNN: sizes by hand, pooling against XLA's own, one dimension as well as two."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigjax.models import cnn


def build(**arguments):
  return nnx.eval_shape(lambda: cnn.make(num_classes=10, **arguments, rngs=nnx.Rngs(0)))


def count(module):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_the_size_of_one_convolution_a_pooling_and_a_dense_layer():
  module = build(in_shape=(28, 28, 1), channels=(32,), dense=(128,))
  assert count(module) == (3 * 3 * 1 * 32 + 32) + (14 * 14 * 32 * 128 + 128) + (128 * 10 + 10)


def test_the_size_in_one_dimension_is_that_of_mnist1d():
  # https://github.com/greydanus/mnist1d: ConvBase, three convolutions of 25 channels with stride 2: 5,210 parameters.
  module = build(in_shape=(40, 1), channels=(25, 25, 25), kernel=(5, 3, 3), stride=2, pool=1, dense=())
  assert count(module) == 5_210


@pytest.mark.parametrize(
  ("arguments", "features"),
  [
    (dict(in_shape=(28, 28, 1), channels=(4, 6), dense=()), 7 * 7 * 6),
    (dict(in_shape=(9, 11, 3), channels=(4,), pool=2, dense=()), 4 * 5 * 4),
    (dict(in_shape=(12, 12, 1), channels=(4,), kernel=5, padding="valid", dense=()), 4 * 4 * 4),
    (dict(in_shape=(13, 1), channels=(4,), stride=2, pool=3, dense=()), 2 * 4),
    (dict(in_shape=(12, 12, 1), channels=(4,), kernel=3, padding="valid", stride=3, pool=1, dense=()), 4 * 4 * 4),
    (dict(in_shape=(28, 28, 1), channels=(4, 6), global_pool=True, dense=()), 6),
    (dict(in_shape=(28, 28, 1), channels=(4, 6), convs_per_stage=2, batch_norm=True, dense=(7, 9)), 9),
    (dict(in_shape=(4, 6, 8, 1), channels=(3,), dense=()), 2 * 3 * 4 * 3),
  ],
)
def test_what_is_left_of_an_image_is_counted_right(arguments, features):
  graphdef, state = nnx.split(build(**arguments))
  inputs = jax.ShapeDtypeStruct((2, *arguments["in_shape"]), jnp.float32)
  found = jax.eval_shape(lambda state, x: nnx.merge(graphdef, state).features(x), state, inputs)
  assert found.shape == (2, features)
  assert jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x), state, inputs).shape == (2, 10)


def test_pooling_is_that_of_xla_with_the_same_gradient():
  x = jax.random.normal(jax.random.key(0), (2, 7, 8, 3))

  def reduced(x, start, operation):
    return jax.lax.reduce_window(x, start, operation, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

  for pooling, expected in {
    "max": lambda x: reduced(x, -jnp.inf, jax.lax.max),
    "mean": lambda x: reduced(x, 0.0, jax.lax.add) / 4,
  }.items():
    np.testing.assert_allclose(cnn._pool(x, 2, pooling), expected(x), rtol=1e-6)
    slopes, expected_slopes = (
      jax.grad(lambda x, f=f: jnp.sin(f(x)).sum())(x) for f in (lambda x, p=pooling: cnn._pool(x, 2, p), expected)
    )
    np.testing.assert_allclose(slopes, expected_slopes, rtol=1e-5, atol=1e-6)


def test_a_single_channel_may_be_left_out_of_the_inputs():
  module = cnn.make(num_classes=3, in_shape=(6, 1), channels=(2,), dense=(), rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (4, 6))
  np.testing.assert_array_equal(module(x), module(x[:, :, None]))
