"""Which leaves are matrices, and what Muon does to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigjax import schedules, updates
from bigjax.errors import UserError
from bigjax.optimizers import muon

RATE = schedules.constant(schedules.Clock(10, 1), peak=0.1)


def gradients(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


def first_update(grads, **settings):
  tx = muon.make(0.1, **settings)
  return jax.jit(tx.update)(grads, tx.init(grads), grads)[0]


def is_adam(update, grad):
  tx = optax.nadam(0.1)
  return np.allclose(update, tx.update(grad, tx.init(grad))[0], rtol=1e-5)


def test_hidden_kernels_are_matrices_and_everything_else_is_adams():
  grads = gradients(
    {
      "embed": {"kernel": (6, 4)},
      "patch_embed": {"kernel": (2, 2, 3, 4)},
      "position": (5, 4),
      "blocks": {"mlp": {"kernel": (3, 4, 8), "bias": (3, 8)}, "norm": {"scale": (3, 4)}},
      "conv": {"kernel": (3, 3, 4, 8), "bias": (8,)},
      "fc": {"kernel": (8, 4)},
      "head": {"kernel": (4, 10), "bias": (10,)},
    }
  )
  updated = first_update(grads)
  adams = jax.tree.map(is_adam, updated, grads)
  assert adams == {
    "embed": {"kernel": True},
    "patch_embed": {"kernel": True},
    "position": True,
    "blocks": {"mlp": {"kernel": False, "bias": True}, "norm": {"scale": True}},
    "conv": {"kernel": False, "bias": True},
    "fc": {"kernel": False},
    "head": {"kernel": True, "bias": True},
  }


def test_an_update_is_nearly_orthogonal_with_the_root_mean_square_of_adamw():
  update = first_update(gradients({"fc": {"kernel": (64, 32)}}))["fc"]["kernel"]
  singular = np.linalg.svd(np.asarray(update), compute_uv=False)
  assert singular.max() / singular.min() < 2.5  # Of a random matrix of this shape about 6.
  assert np.sqrt(np.mean(update**2)) == pytest.approx(0.1 * 0.2, rel=0.25)


def test_a_stack_of_layers_is_updated_as_its_layers_are():
  grads = gradients({"mlp": {"kernel": (3, 4, 8)}})
  stacked = first_update(grads)["mlp"]["kernel"]
  for i in range(3):
    alone = first_update({"mlp": {"kernel": grads["mlp"]["kernel"][i]}})["mlp"]["kernel"]
    np.testing.assert_allclose(stacked[i], alone, rtol=1e-4, atol=1e-6)


def test_layouts_say_what_the_axes_of_a_kernel_are():
  grads = gradients({"query": {"kernel": (8, 2, 4)}, "out": {"kernel": (2, 4, 8)}, "fc": {"kernel": (8, 8)}})
  layouts = ((".*query/kernel", "ioo"), ("out/.*", "iio"), ("fc/.*", "adam"))
  updated = first_update(grads, layouts=layouts)
  flat = {name: {"kernel": grads[name]["kernel"].reshape(8, 8)} for name in ("query", "out")}
  expected = first_update(flat)
  for name in flat:
    np.testing.assert_allclose(updated[name]["kernel"].reshape(8, 8), expected[name]["kernel"], rtol=1e-4, atol=1e-6)
  assert is_adam(updated["fc"]["kernel"], grads["fc"]["kernel"])


def test_layouts_hold_whatever_is_frozen_or_under_another_schedule():
  shapes = {"query": {"kernel": (8, 2, 4)}, "fc": {"kernel": (8, 8), "bias": (8,)}, "head": {"kernel": (8, 3)}}
  params = gradients(shapes)
  factory = functools.partial(muon.make, layouts=(("query/.*", "ioo"), ("fc/kernel", "io")))
  rules = (("fc/.*", schedules.constant(schedules.Clock(10, 1), peak=0.2)), (".*", RATE))
  optimizer = updates.make(factory, rules, params, freeze=("head/.*", "query/.*"))
  change, _ = jax.jit(optimizer.tx.update)(params, optimizer.tx.init(params), params)
  expected = first_update({"fc": params["fc"]})
  np.testing.assert_allclose(change["fc"]["kernel"], 2 * expected["fc"]["kernel"], rtol=1e-4)
  assert not jnp.any(change["query"]["kernel"])


@pytest.mark.parametrize(
  ("layouts", "message"),
  [
    ((("fc/.*", "ii"),), r"layouts\[0\]: 'ii' must be 'adam', or a letter for each axis"),
    ((("fc/.*", "xy"),), "a letter for each axis"),
    ((("fc/.*", "iio"),), r"'iio' for 'fc/kernel' names 3 axes, but the leaf has 2"),
    ((("fd/.*", "io"),), r"config\.optimizer\.layouts\[0\]: 'fd/\.\*' matches no leaf"),
  ],
)
def test_a_layout_that_can_not_be_is_an_error(layouts, message):
  with pytest.raises(UserError, match=message):
    updates.make(functools.partial(muon.make, layouts=layouts), RATE, gradients({"fc": {"kernel": (4, 4)}}))
