"""Linear and MLP: sizes by hand, the functions in NumPy, batch statistics in NumPy and over eight devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bigjax.models import linear, mlp

X = np.random.default_rng(0).normal(size=(16, 3, 2)).astype(np.float32)


def count(module):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_sizes_are_those_of_mnist1d():
  # https://github.com/greydanus/mnist1d: "logistic" 410 and MLP 15,210 parameters.
  assert count(nnx.eval_shape(lambda: linear.make(in_features=40, num_outputs=10, rngs=nnx.Rngs(0)))) == 410
  module = nnx.eval_shape(lambda: mlp.make(in_features=40, num_outputs=10, widths=(100, 100), rngs=nnx.Rngs(0)))
  assert count(module) == 15_210


def test_linear_is_a_product_and_a_sum():
  module = linear.make(in_features=6, num_outputs=2, rngs=nnx.Rngs(0))
  module.head.bias[...] = jnp.asarray([1.0, -2.0])
  expected = X.reshape(16, 6) @ np.asarray(module.head.kernel[...]) + [1.0, -2.0]
  np.testing.assert_allclose(module(jnp.asarray(X)), expected, rtol=1e-5, atol=1e-5)
  start = linear.make(in_features=6, num_outputs=2, bias=False, kernel_init="zeros", rngs=nnx.Rngs(0))
  assert not np.any(start(jnp.asarray(X)))


def test_an_mlp_is_dense_layers_with_an_activation_between():
  module = mlp.make(in_features=6, num_outputs=2, widths=(5, 4), activation="tanh", rngs=nnx.Rngs(0))
  x = X.reshape(16, 6)
  for layer in (module.first, *module.blocks):
    x = np.tanh(x @ np.asarray(layer.dense.kernel[...]) + np.asarray(layer.dense.bias[...]))
  np.testing.assert_allclose(module.features(jnp.asarray(X)), x, rtol=1e-4, atol=1e-5)


def test_an_mlp_without_hidden_layers_is_linear():
  module = mlp.make(in_features=6, num_outputs=2, widths=(), rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(module.features(jnp.asarray(X)), X.reshape(16, 6))


def normed():
  return mlp.make(in_features=6, num_outputs=2, widths=(4,), batch_norm=True, rngs=nnx.Rngs(0))


def test_batch_statistics_are_running_means_of_the_batches():
  module = normed()
  mean, var = np.zeros(4), np.ones(4)
  for batch in (X, 2 * X + 1):
    hidden = batch.reshape(16, 6) @ np.asarray(module.first.dense.kernel[...])
    mean, var = 0.9 * mean + 0.1 * hidden.mean(0), 0.9 * var + 0.1 * hidden.var(0)
    features = module.features(jnp.asarray(batch), train=True)
    normalised = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    np.testing.assert_allclose(features, np.maximum(normalised, 0), rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(module.first.norm.mean[...], mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(module.first.norm.var[...], var, rtol=1e-4)
  evaluated = np.maximum((hidden - mean) / np.sqrt(var + 1e-5), 0)
  np.testing.assert_allclose(module.features(jnp.asarray(batch)), evaluated, rtol=1e-3, atol=1e-4)


def test_batch_statistics_over_eight_devices_are_those_over_one():
  graphdef, params, extras = nnx.split(normed(), nnx.Param, ...)

  @jax.jit
  def step(extras, x):
    module = nnx.merge(graphdef, params, extras)
    logits = module(x, train=True)
    return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  # Sorted, so that the mean of each device's own rows would be another.
  x = np.sort(X, axis=0)
  sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
  assert len(sharded.sharding.device_set) == 8
  one, eight = step(nnx.to_pure_dict(extras), x), step(nnx.to_pure_dict(extras), sharded)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), eight, one)
