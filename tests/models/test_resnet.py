"""ResNet v1.5: published sizes, where the strides are, how it starts, batch statistics over eight devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bigjax.models import resnet


def build(**arguments):
  return nnx.eval_shape(lambda: resnet.make(num_classes=1000, **arguments, rngs=nnx.Rngs(0)))


# https://docs.pytorch.org/vision/stable/models/resnet.html
@pytest.mark.parametrize(
  ("depth", "count"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)]
)
def test_sizes_are_the_published_ones(depth, count):
  params = nnx.state(build(depth=depth), nnx.Param)
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def test_a_bottleneck_strides_in_its_3x3_convolution():
  first_of_second_stage = build(depth=50).stages[1].first
  found = [(conv.kernel_size, conv.strides) for conv in first_of_second_stage.convs]
  assert found == [((1, 1), (1, 1)), ((3, 3), (2, 2)), ((1, 1), (1, 1))]
  assert first_of_second_stage.project.strides == (2, 2)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 1), ("small", 4)])
def test_the_small_stem_keeps_the_resolution(stem, side):
  graphdef, state = nnx.split(build(stages=(1, 1, 1, 1), width=4, stem=stem))
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  jaxpr = str(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, images))
  assert f"f32[2,{side},{side},32]" in jaxpr and f"f32[2,{2 * side},{2 * side},32]" not in jaxpr


def test_a_block_starts_as_its_skip():
  block = jax.jit(
    lambda: nnx.split(resnet.ResidualBlock(8, 2, 1, bottleneck=True, dtype=jnp.float32, rngs=nnx.Rngs(0)))
  )()
  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 8))
  np.testing.assert_array_equal(jax.jit(lambda x: nnx.merge(*block)(x, train=False))(x), np.maximum(x, 0))


def test_convolutions_start_with_the_variance_of_he():
  module = resnet.make(num_classes=3, stages=(1,), width=32, stem="small", rngs=nnx.Rngs(0))
  np.testing.assert_allclose(np.std(module.stages[0].first.convs[0].kernel[...]), np.sqrt(2 / (9 * 32)), rtol=0.03)


def test_a_batch_over_eight_devices_has_the_statistics_and_gradients_of_one():
  graphdef, params, extras = jax.jit(
    lambda: nnx.split(
      resnet.make(num_classes=3, stages=(1, 1), width=4, stem="small", rngs=nnx.Rngs(0)), nnx.Param, ...
    )
  )()
  params, extras = nnx.to_pure_dict(params), nnx.to_pure_dict(extras)

  @jax.jit
  def step(params, extras, images):
    def loss(params):
      module = nnx.merge(graphdef, params, extras)
      return jnp.square(module(images, train=True)).mean(), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return jax.grad(loss, has_aux=True)(params)

  # Each device's images are brighter than those of the one before: its own statistics would be others.
  images = np.random.default_rng(0).normal(size=(16, 6, 6, 3)).astype(np.float32) + np.arange(16.0).reshape(-1, 1, 1, 1)
  images = images.astype(np.float32)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  one = step(params, extras, images)
  eight = step(params, extras, jax.device_put(images, NamedSharding(mesh, P("data"))))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), eight, one)
  np.testing.assert_allclose(one[1]["stem_norm"]["mean"], eight[1]["stem_norm"]["mean"], rtol=1e-5)
