"""MLP-Mixer: published sizes, what mixes what, scan against no scan."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigjax.models import mixer

SMALL = dict(num_classes=5, image_size=8, patch_size=4, width=8, depth=2, tokens_dim=6, channels_dim=12)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3)), jnp.float32)


# Table 1 of https://arxiv.org/abs/2105.01601 (18, 19, 59, 60 and 207 M), exact as in timm's mixer_*_224.
@pytest.mark.parametrize(
  ("variant", "count"),
  [("S/16", 18_528_264), ("S/32", 19_104_624), ("B/16", 59_880_472), ("B/32", 60_293_428), ("L/16", 208_196_168)],
)
def test_sizes_are_the_published_ones(variant, count):
  module = nnx.eval_shape(lambda: mixer.make(num_classes=1000, variant=variant, rngs=nnx.Rngs(0)))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))) == count


def random(scan):
  graphdef, params = nnx.split(
    nnx.eval_shape(lambda: mixer.make(**SMALL, drop_path=0.3, scan=scan, rngs=nnx.Rngs(0))), nnx.Param
  )
  rng = np.random.default_rng(1)
  return graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), nnx.to_pure_dict(params))


def test_one_mlp_mixes_patches_and_the_other_channels():
  _, params = random(scan=False)
  block = nnx.eval_shape(
    lambda: mixer.MixerBlock(4, 8, 6, 12, activation="gelu_tanh", dropout=0.0, dtype=jnp.float32, rngs=nnx.Rngs(0))
  )
  graphdef = nnx.graphdef(block)
  x = jax.random.normal(jax.random.key(0), (2, 4, 8))

  def branch(silent, x):
    """What the block adds when the other MLP adds nothing."""
    parameters = params["blocks"][0] | {silent: jax.tree.map(jnp.zeros_like, params["blocks"][0][silent])}
    return nnx.merge(graphdef, parameters)(x)[0] - x

  moved = x.at[1, 2, 3].add(1.0)
  tokens, channels = (np.abs(branch(s, moved) - branch(s, x)) > 1e-6 for s in ("channels", "tokens"))
  assert tokens[1].all() and not tokens[0].any()  # The norm spreads it over channels, then every patch has it.
  assert channels[1, 2].all() and channels.sum() == 8  # Only the patch itself.


def test_scanned_layers_give_the_same_logits_and_gradients():
  graphdef, params = random(scan=False)
  scanned_graphdef, _ = random(scan=True)

  def stacked(tree):
    return tree | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree["blocks"].values())}

  def loss(params, graphdef):
    return jnp.square(nnx.merge(graphdef, params)(IMAGES, key=jax.random.key(3), train=True)).mean()

  both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  plain, gradient = both(params, graphdef)
  scanned, scanned_gradient = both(stacked(params), scanned_graphdef)
  np.testing.assert_allclose(scanned, plain, rtol=1e-4)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), scanned_gradient, stacked(gradient))
