"""Rotary positions against the published formulas and what they are for."""

import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.models.rope import Rope, rotate, sharpness

RNG = np.random.default_rng(0)


def test_a_pair_turns_by_its_frequency_a_position():
  x = jnp.asarray(RNG.normal(size=(1, 5, 2, 8)), jnp.float32)
  positions = jnp.asarray([[3, 1, 4, 1, 5]])
  found = rotate(x, Rope(dim=8, theta=100.0).table(positions))
  pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
  angle = np.asarray(positions)[..., None, None] * 100.0 ** (-np.arange(4) / 4)
  turned = pairs * np.exp(1j * angle)
  np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-5)


def test_scores_depend_on_the_distance_alone():
  query, key = (jnp.asarray(RNG.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))
  at = lambda x, p: rotate(x, Rope(dim=16).table(jnp.asarray([[p]])))[0, 0, 0]
  np.testing.assert_allclose(at(query, 90) @ at(key, 83), at(query, 7) @ at(key, 0), rtol=1e-4)


def test_a_part_of_a_head_can_turn_and_the_rest_stay():
  x = jnp.asarray(RNG.normal(size=(2, 3, 2, 8)), jnp.float32)
  table = Rope(dim=4).table(jnp.asarray([[5, 6, 7]]))
  found = rotate(x, table)
  np.testing.assert_array_equal(found[..., 4:], x[..., 4:])
  np.testing.assert_allclose(found[..., :4], rotate(x[..., :4], table), rtol=1e-6)


def test_linear_scaling_is_a_slower_position():
  positions = jnp.asarray([[0, 8, 80]])
  scaled = Rope(dim=8, scaling="linear", factor=8.0).table(positions)
  np.testing.assert_allclose(scaled, Rope(dim=8).table(positions // 8), rtol=1e-5, atol=1e-6)


def test_llama3_slows_what_turns_less_than_once_and_leaves_what_turns_four_times():
  """The numbers of Llama 3.1: theta 500,000, factor 8, trained on 8,192."""
  plain = Rope(dim=128, theta=5e5).frequencies()
  scaled = Rope(dim=128, theta=5e5, scaling="llama3", factor=8.0, trained=8192).frequencies()
  turns = 8192 * plain / (2 * np.pi)
  np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4])
  np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8)
  between = (turns > 1) & (turns < 4)
  smooth = (turns[between] - 1) / 3
  np.testing.assert_allclose(scaled[between], ((1 - smooth) / 8 + smooth) * plain[between])
  assert between.any()


def test_yarn_of_deepseek_keeps_fast_pairs_and_slows_slow_ones():
  """https://arxiv.org/abs/2309.00071, equations 17 to 22; dim 64, factor 40, trained on 4,096."""
  plain = Rope(dim=64).frequencies()
  scaled = Rope(dim=64, scaling="yarn", factor=40.0, trained=4096).frequencies()
  ratio = scaled / plain
  # By hand: pair(32) = 64 ln(4096 / (64 pi)) / (2 ln 10000) = 10.47, and pair(1) = 22.51.
  np.testing.assert_allclose(ratio[:11], 1)
  np.testing.assert_allclose(ratio[23:], 1 / 40)
  ramp = np.arange(1, 13) / 13
  np.testing.assert_allclose(ratio[11:23], (1 - ramp) + ramp / 40)
  table = Rope(dim=64, scaling="yarn", factor=40.0, trained=4096).table(jnp.asarray([[0]]))
  np.testing.assert_allclose(table[0, 0, 0], 0.1 * np.log(40) + 1, rtol=1e-6)
  assert Rope(dim=64, scaling="yarn", factor=40.0, amplitude=1.0).table(jnp.asarray([[0]]))[0, 0, 0, 0] == 1
  assert sharpness(1.0) == 1 and sharpness(40.0) == pytest.approx(1.3689, abs=1e-4)
