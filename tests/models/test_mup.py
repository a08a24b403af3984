"""muP: what the width does to how far activations move, and to starts, rates and logits."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from bigjax import state
from bigjax.errors import UserError
from bigjax.models import decoder

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "coordinate_check.py"
SIZES = dict(vocab_size=32, context=8, depth=2, heads=2)


@pytest.fixture(scope="module")
def check():
  spec = importlib.util.spec_from_file_location("coordinate_check", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
def test_with_mup_changes_are_of_one_size_at_any_width_and_without_they_grow(check):
  mup, standard = check.slopes([32, 128], 32), check.slopes([32, 128], None)
  for name in check.SEEN:
    assert np.abs(mup[name]).max() < 0.35, name  # These widths are small: logits still shrink a little at first.
    assert np.mean(standard[name]) > np.mean(mup[name]) + 0.3, name
  assert min(standard["logits"]) > 0.4


def test_kernels_start_smaller_learn_slower_and_logits_are_multiplied():
  make = lambda width, base: state.Model(
    lambda rngs: decoder.make(**SIZES, width=width, mlp_dim=4 * width, mup_base=base, rngs=rngs)
  )
  usual, wide = make(256, None), make(256, 64)
  (a, _), (b, _) = usual.init(jax.random.key(0)), wide.init(jax.random.key(0))
  kernel = lambda params: np.std(params["blocks"]["0"]["mlp"]["up"]["kernel"])
  np.testing.assert_allclose(kernel(b) / kernel(a), (64 / 256) ** 0.5, rtol=1e-5)
  np.testing.assert_array_equal(b["token_embed"]["embedding"], a["token_embed"]["embedding"])
  assert wide.lr_multipliers == ((".*blocks/.*/kernel", 0.25),)
  assert usual.lr_multipliers == ()
  hidden = np.ones((1, 3, 256), np.float32)
  logits = lambda model, params: np.asarray(model.bind(params, {}).unembed(jax.numpy.asarray(hidden)))
  np.testing.assert_allclose(logits(wide, a), logits(usual, a) / 4, rtol=1e-6)


def test_at_its_base_with_heads_of_64_it_is_the_usual_model():
  make = lambda base: state.Model(lambda rngs: decoder.make(**SIZES, width=128, mlp_dim=64, mup_base=base, rngs=rngs))
  tokens = np.arange(8)[None] % 32
  found = [np.asarray(m.bind(*m.init(jax.random.key(0)))(jax.numpy.asarray(tokens))) for m in (make(None), make(128))]
  np.testing.assert_array_equal(*found)


def test_what_is_not_known_to_scale_is_refused():
  model = state.Model(lambda rngs: decoder.make(**SIZES, width=32, mlp_dim=64, experts=2, mup_base=16, rngs=rngs))
  with pytest.raises(UserError, match=r"model.mup_base: how experts scale"):
    model.init(jax.random.key(0))
