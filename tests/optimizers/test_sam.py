"""Sharpness-aware minimization."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigjax.errors import UserError
from bigjax.optimizers import sam

PARAMS = {"a": np.array([1.0, -2.0, 3.0], np.float32), "b": np.float32(0.5)}


def loss(params):
  return jnp.sum(params["a"] ** 4) + params["b"] ** 3


def test_the_gradient_is_taken_at_the_perturbed_point():
  tx = sam.make(0.01, rho=0.2, momentum=None)
  grad_fn = jax.grad(loss)

  @jax.jit
  def update(params, state):
    return tx.update(grad_fn(params), state, params, value=loss(params), grad_fn=lambda p, _: grad_fn(p))

  change, _ = update(PARAMS, tx.init(PARAMS))
  here = {"a": 4 * PARAMS["a"].astype(np.float64) ** 3, "b": 3 * 0.5**2}
  norm = np.sqrt((here["a"] ** 2).sum() + here["b"] ** 2)
  nearby = {k: PARAMS[k] + 0.2 * here[k] / norm for k in PARAMS}
  np.testing.assert_allclose(change["a"], -0.01 * 4 * nearby["a"] ** 3, rtol=1e-5)
  np.testing.assert_allclose(change["b"], -0.01 * 3 * nearby["b"] ** 2, rtol=1e-5)


def test_it_equals_optax_own():
  ours, theirs = (
    sam.make(0.01, rho=0.2),
    optax.contrib.sam(optax.sgd(0.01, 0.9), optax.chain(optax.contrib.normalize(), optax.sgd(0.2)), opaque_mode=True),
  )
  grad_fn = lambda params, _: jax.grad(loss)(params)
  params, states = [PARAMS, PARAMS], [ours.init(PARAMS), theirs.init(PARAMS)]
  for _ in range(3):
    for i, tx in enumerate([ours, theirs]):
      change, states[i] = tx.update(grad_fn(params[i], 0), states[i], params[i], grad_fn=grad_fn)
      params[i] = optax.apply_updates(params[i], change)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), *params)


def test_where_the_gradient_vanishes_nothing_happens():
  tx = sam.make(0.01, base="adam")
  zero = jax.tree.map(jnp.zeros_like, PARAMS)
  change, _ = tx.update(zero, tx.init(PARAMS), PARAMS, grad_fn=lambda p, _: jax.tree.map(lambda x, y: x - y, p, PARAMS))
  assert all(not np.any(x) for x in jax.tree.leaves(change))


def test_a_radius_of_nothing_is_an_error():
  with pytest.raises(UserError, match=r"rho: 0\.0 must be positive"):
    sam.make(0.1, rho=0.0)
