"""Every optimizer by its name in a config: it learns, and its state can be taken apart and put together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigjax import config, schedules, updates

OPTIMIZERS = {
  "sgd": dict(name="sgd"),
  "momentum": dict(name="sgd", momentum=0.9),
  "nesterov": dict(name="sgd", momentum=0.9, nesterov=True),
  "adam": dict(name="adam"),
  "adamw": dict(name="adamw", weight_decay=1e-3),
  "adadelta": dict(name="adadelta", peak=10.0),
  "adagrad": dict(name="adagrad"),
  "rmsprop": dict(name="rmsprop"),
  "adafactor": dict(name="adafactor", min_dim_size_to_factor=4),
  "lion": dict(name="lion", weight_decay=0.0),
  "lamb": dict(name="lamb"),
  "muon": dict(name="muon"),
  "schedule-free AdamW": dict(name="schedule_free"),
  "schedule-free SGD": dict(name="schedule_free", base="sgd"),
  "sam": dict(name="sam"),
  "sam on Adam": dict(name="sam", base="adam", rho=0.01),
  "lars": dict(name="lars", peak=5.0),
  "adopt of optax.contrib": dict(name="adopt"),
  "an outside function": dict(name="optax.contrib.ademamix"),
}
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(32, 6)).astype(np.float32)
TARGETS = INPUTS @ RNG.normal(size=(6, 4)).astype(np.float32) + 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns_and_goes_on_from_its_flattened_state(name):
  spec = dict(OPTIMIZERS[name])
  clock = schedules.Clock(total_steps=60, batch_size=32)
  schedule = schedules.constant(clock, peak=spec.pop("peak", 0.05), warmup=2)
  factory = config.component("optimizers", spec, "config.optimizer")
  params = {"fc": {"kernel": np.full((6, 4), 0.1, np.float32), "bias": np.full(4, 0.1, np.float32)}}
  optimizer = updates.make(factory, schedule, params, clip={"norm": 10.0}, ema=0.5)

  def loss(params):
    return jnp.mean((INPUTS @ params["fc"]["kernel"] + params["fc"]["bias"][None] - TARGETS) ** 2)

  traces = []

  @jax.jit
  def step(params, opt_state):
    traces.append(name)
    value, grads = jax.value_and_grad(loss)(params)
    grad_fn = lambda params, _: jax.grad(loss)(params)
    change, opt_state = optimizer.tx.update(grads, opt_state, params, value=value, grad_fn=grad_fn)
    return optax.apply_updates(params, change), opt_state

  def train(params, opt_state, steps):
    for _ in range(steps):
      params, opt_state = step(params, opt_state)
    return params, opt_state

  halfway, opt_state = train(params, jax.jit(optimizer.tx.init)(params), 30)
  straight, _ = train(halfway, opt_state, 30)
  assert loss(straight) < 0.5 * loss(params)
  for view in optimizer.views.values():
    assert loss(view(opt_state, halfway)) < loss(params)

  leaves = [np.asarray(x) for x in jax.tree.leaves((halfway, opt_state))]
  abstract = jax.eval_shape(lambda p: (p, optimizer.tx.init(p)), params)
  resumed, _ = train(*jax.tree.unflatten(jax.tree.structure(abstract), leaves), 30)
  jax.tree.map(np.testing.assert_array_equal, straight, resumed)
  assert len(traces) == 1
