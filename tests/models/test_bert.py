"""BERT: published sizes, who sees whom, scans, gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigjax.errors import UserError
from bigjax.models import bert

SMALL = dict(vocab_size=13, context=16, width=16, depth=2, heads=4, mlp_dim=24)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 10)), jnp.int32)


def count(**arguments):
  params = nnx.state(nnx.eval_shape(lambda: bert.make(**arguments, rngs=nnx.Rngs(0))), nnx.Param)
  return sum(math.prod(p.shape) for p in jax.tree.leaves(params))


def test_published_sizes_have_the_published_number_of_parameters():
  """Of google-bert/bert-base-uncased and -large-uncased as BertForMaskedLM, sentence-transformers/all-MiniLM-L6-v2."""
  assert count(variant="base") == 109_514_298
  assert count(variant="large") == 335_174_458
  assert count(variant="minilm-l6") == 22_713_216


def test_a_token_sees_those_of_its_segment_on_either_side_and_no_others():
  module = bert.make(**SMALL, rngs=nnx.Rngs(0))
  segments = jnp.asarray([[1] * 4 + [2] * 4 + [0] * 2] * 2)
  before = module(TOKENS, segments=segments)
  after = module(TOKENS.at[:, 3].add(1), segments=segments)
  moved = np.abs(np.asarray(after - before)).max(axis=(0, 2)) > 1e-6
  np.testing.assert_array_equal(moved, [True] * 4 + [False] * 6)


def test_features_are_the_mean_over_real_tokens():
  module = bert.make(**SMALL, predicts=False, rngs=nnx.Rngs(0))
  segments = jnp.asarray([[1] * 10, [1] * 6 + [0] * 4])
  hidden, _ = module.hidden(TOKENS, segments=segments)
  features = module.features(TOKENS, segments=segments)
  np.testing.assert_allclose(features[1], hidden[1, :6].mean(axis=0), atol=1e-6)
  alone = module.features(TOKENS[1:, :6])
  np.testing.assert_allclose(features[1], alone[0], atol=1e-5)
  with pytest.raises(UserError, match="model.predicts: this encoder has no head"):
    module(TOKENS)


@pytest.mark.parametrize("changes", [dict(scan=True), dict(remat="full"), dict(scan=True, remat="save(qkv)")])
def test_scans_and_recomputation_change_no_gradient(changes):
  def gradient(**arguments):
    graphdef, params = nnx.split(bert.make(**SMALL, **arguments, rngs=nnx.Rngs(0)))
    loss = lambda params: jnp.square(nnx.merge(graphdef, params)(TOKENS)).mean()
    return nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))

  plain, other = gradient(), gradient(**changes)
  stacked = other["blocks"] if "scan" in changes else jax.tree.map(lambda *x: jnp.stack(x), *other["blocks"].values())
  expected = jax.tree.map(lambda *x: jnp.stack(x), *plain["blocks"].values())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stacked, expected)


def test_what_makes_no_model_is_refused():
  with pytest.raises(UserError, match=r"model.depth is missing. Give it, or a variant: base, large, minilm-l6"):
    bert.make(vocab_size=3, context=4, width=4, rngs=nnx.Rngs(0))
  with pytest.raises(UserError, match="model.context: 16 positions are too few"):
    bert.make(**SMALL, rngs=nnx.Rngs(0))(jnp.zeros((1, 17), jnp.int32))
  with pytest.raises(UserError, match="model.heads: 5 does not divide width 16"):
    bert.make(**SMALL | dict(heads=5), rngs=nnx.Rngs(0))
