"""ViT: published sizes, patches as a convolution, heads, positions, registers, scan against no scan."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigjax.models import layers, vit

SMALL = dict(num_classes=5, image_size=(8, 12), patch_size=4, width=16, depth=2, heads=2)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 12, 3)), jnp.float32)


@functools.cache
def parameters(**changes):
  """Random ones: a head that starts at zero would hide what comes before it."""
  graphdef, params = nnx.split(nnx.eval_shape(lambda: vit.make(**SMALL | changes, rngs=nnx.Rngs(0))), nnx.Param)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), nnx.to_pure_dict(params))
  return graphdef, params


def size(**arguments):
  module = nnx.eval_shape(lambda: vit.make(**arguments, rngs=nnx.Rngs(0)))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


# B, L and H (IMAGENET1K_SWAG_LINEAR_V1): https://docs.pytorch.org/vision/stable/models/vision_transformer.html
# Ti, S: timm's vit_tiny_patch16_224 and vit_small_patch16_224, 5.72 M and 22.05 M.
@pytest.mark.parametrize(
  ("variant", "count"),
  [
    ("Ti/16", 5_717_416),
    ("S/16", 22_050_664),
    ("B/16", 86_567_656),
    ("B/32", 88_224_232),
    ("L/16", 304_326_632),
    ("L/32", 306_535_400),
    ("H/14", 632_045_800),
  ],
)
def test_sizes_are_the_published_ones(variant, count):
  assert size(num_classes=1000, variant=variant) == count
  assert size(num_classes=1000, variant=variant, scan=True) == count


def test_what_is_given_overrides_the_variant():
  assert size(num_classes=1000, variant="B/16", patch_size=32) == 88_224_232
  assert size(num_classes=1000, variant="B/16", depth=1) == 86_567_656 - 11 * 7_087_872


def test_embedding_patches_is_a_strided_convolution():
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(4, 4, 3, 7)).astype(np.float32)
  convolved = jax.lax.conv_general_dilated(IMAGES, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  patches = layers.patches(IMAGES, (2, 3), 4, 3)
  expected = convolved.reshape(len(IMAGES), 6, 7)
  np.testing.assert_allclose(patches @ kernel.reshape(-1, 7), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["cls", "gap", "map"])
@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_every_head_works_with_every_kind_of_position(head, positions):
  graphdef, params = parameters(head=head, positions=positions)
  logits = jax.eval_shape(lambda: nnx.merge(graphdef, params)(IMAGES))
  assert logits.shape == (3, 5)
  assert ("positions" in params) == (positions == "learned")
  assert ("class_token" in params) == (head == "cls")
  if positions == "learned":
    assert params["positions"].shape == (2 * 3 + (head == "cls"), 16)


def test_fixed_positions_tell_rows_and_columns_apart():
  table = np.asarray(vit.sincos2d(3, 4, 16)).reshape(3, 4, 16)
  assert len(np.unique(table.reshape(12, 16).round(5), axis=0)) == 12
  assert (table[:, :, :8] == table[:1, :, :8]).all()  # The column, the same in each row.
  assert (table[:, :, 8:] == table[:, :1, 8:]).all()
  np.testing.assert_allclose(table[2, 3, [0, 4, 8, 12]], [np.sin(3), np.cos(3), np.sin(2), np.cos(2)], rtol=1e-5)


@pytest.mark.parametrize("head", ["cls", "gap"])
def test_registers_act_through_attention_alone(head):
  graphdef, params = parameters(head=head)
  with_graphdef, with_params = parameters(head=head, registers=3)
  registers = with_params["registers"]

  def features(graphdef, params, blocks):
    return jax.jit(lambda: nnx.merge(graphdef, params | {"blocks": blocks}).features(IMAGES))()

  deaf = jax.tree.map_with_path(lambda path, leaf: 0 * leaf if path[1].key == "attn" else leaf, params["blocks"])
  plain, ignored = features(graphdef, params, deaf), features(with_graphdef, params | {"registers": registers}, deaf)
  np.testing.assert_allclose(ignored, plain, rtol=1e-5, atol=1e-5)
  plain, heard = (
    features(graphdef, params, params["blocks"]),
    features(with_graphdef, params | {"registers": registers}, params["blocks"]),
  )
  assert np.abs(heard - plain).max() > 1e-3


def test_scanned_layers_give_the_same_features_and_gradients():
  changes = dict(dropout=0.2, drop_path=0.3)
  graphdef, params = parameters(**changes)
  scanned_graphdef, _ = parameters(**changes, scan=True)

  def stacked(tree):
    return tree | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree["blocks"].values())}

  def loss(params, graphdef):
    logits = nnx.merge(graphdef, params)(IMAGES, key=jax.random.key(3), train=True)
    return jnp.square(logits).mean()

  both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  plain, gradient = both(params, graphdef)
  scanned, scanned_gradient = both(stacked(params), scanned_graphdef)
  np.testing.assert_allclose(scanned, plain, rtol=1e-4)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), scanned_gradient, stacked(gradient))


def test_it_starts_as_the_paper_has_it():
  _, params = jax.jit(lambda: nnx.split(vit.make(**SMALL | dict(width=64), scan=True, rngs=nnx.Rngs(0)), nnx.Param))()
  params = nnx.to_pure_dict(params)
  assert not np.any(params["head"]["kernel"]) and not np.any(params["class_token"])
  np.testing.assert_allclose(np.std(params["positions"]), 0.02, rtol=0.1)
  # Xavier uniform of square kernels: the variance of U(-a, a) is a^2 / 3, a = sqrt(6 / (64 + 64)).
  for name in ("qkv", "out"):
    kernel = params["blocks"]["attn"][name]["kernel"]
    np.testing.assert_allclose(np.std(kernel), np.sqrt(1 / 64), rtol=0.02)
    assert np.abs(kernel).max() <= np.sqrt(6 / 128)
