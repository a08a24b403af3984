"""What becomes of a gradient, against the same done by hand in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigjax import config, paths, schedules, updates
from bigjax.errors import UserError
from bigjax.optimizers import sam, schedule_free

CLOCK = schedules.Clock(total_steps=10, batch_size=4)
RATE = schedules.linear(CLOCK, peak=0.1)  # Another rate at every step, so that a wrong count shows.
PARAMS = {
  "body": {"kernel": np.array([[1.0, -2.0], [3.0, 0.5]], np.float32), "bias": np.array([0.3, -0.4], np.float32)},
  "head": {"kernel": np.array([[2.0], [-1.0]], np.float32)},
}
LEAVES = ["body/bias", "body/kernel", "head/kernel"]
TARGET = jax.tree.map(lambda x: np.full_like(x, 0.25), PARAMS)


def loss(params):
  return sum(0.5 * jnp.sum((p - t) ** 2) for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(TARGET), strict=True))


def run(optimizer, steps=5, params=PARAMS, loss=loss):
  """Trains under jit; returns parameters and state after every step, the start included."""

  @jax.jit
  def step(params, opt_state):
    value, grads = jax.value_and_grad(loss)(params)
    again = lambda params, _: jax.grad(loss)(params)
    change, opt_state = optimizer.tx.update(grads, opt_state, params, value=value, grad_fn=again)
    return optax.apply_updates(params, change), opt_state

  states = [(params, jax.jit(optimizer.tx.init)(params))]
  for _ in range(steps):
    states.append(step(*states[-1]))
  return states


def by_hand(update, steps=5):
  """Trains in float64: `update(t, name, param, grad) -> change`."""
  params = dict(zip(LEAVES, [p.astype(np.float64) for p in jax.tree.leaves(PARAMS)], strict=True))
  for t in range(steps):
    params = {name: p + update(t, name, p, p - 0.25) for name, p in params.items()}
  return params


def assert_same(states, expected):
  for name, leaf in zip(LEAVES, jax.tree.leaves(states[-1][0]), strict=True):
    np.testing.assert_allclose(leaf, expected[name], rtol=2e-6, err_msg=name)


def rate(t):
  return 0.1 * (1 - t / 10)


def test_without_rules_it_is_the_optimizer_itself():
  optimizer = updates.make(optax.adam, RATE, PARAMS)
  states = run(optimizer)
  plain = run(updates.Optimizer(optax.with_extra_args_support(optax.adam(RATE)), {}, {}))
  jax.tree.map(np.testing.assert_array_equal, states[-1][0], plain[-1][0])
  assert not optimizer.views
  assert optimizer.learning_rates == {"": RATE}


# Decay


@pytest.mark.parametrize("strength", [0.3, "0.30", "decoupled(0.3)"])
def test_decoupled_decay_is_times_the_learning_rate_of_the_step(strength):
  states = run(updates.make(optax.sgd, RATE, PARAMS, decay=((".*/kernel", strength),)))
  decay = lambda name: 0.3 if name.endswith("kernel") else 0
  assert_same(states, by_hand(lambda t, name, p, g: -rate(t) * (g + decay(name) * p)))


def test_decoupled_decay_on_adam_is_adamw():
  states = run(updates.make(optax.adam, RATE, PARAMS, decay=((".*", 0.2),)))
  adamw = run(updates.make(functools.partial(optax.adamw, weight_decay=0.2), RATE, PARAMS))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), states[-1][0], adamw[-1][0])


def test_l2_goes_through_the_momentum_and_decoupled_decay_does_not():
  momentum = functools.partial(optax.sgd, momentum=0.9)
  velocity = {}

  def update(t, name, p, g):
    velocity[name] = 0.9 * velocity.get(name, 0) + g + 0.3 * p
    return -rate(t) * velocity[name]

  l2 = run(updates.make(momentum, RATE, PARAMS, decay=((".*", "l2(0.3)"),)))
  assert_same(l2, by_hand(update))
  decoupled = run(updates.make(momentum, RATE, PARAMS, decay=((".*", 0.3),)))
  assert not np.allclose(l2[-1][0]["head"]["kernel"], decoupled[-1][0]["head"]["kernel"])


def test_l1_adds_the_sign():
  states = run(updates.make(optax.sgd, RATE, PARAMS, decay=(("head/.*", "l1(0.05)"), (".*/bias", "l2(0.5)"))))
  penalty = {"head/kernel": lambda p: 0.05 * np.sign(p), "body/bias": lambda p: 0.5 * p}
  assert_same(states, by_hand(lambda t, name, p, g: -rate(t) * (g + penalty.get(name, np.zeros_like)(p))))


@pytest.mark.parametrize("value", [-0.1, "l3(0.1)", "decoupled", "l2()", "nan"])
def test_a_decay_that_is_none_is_an_error(value):
  with pytest.raises(UserError, match=r"config\.decay\[0\]: .*decoupled\(0\.1\)"):
    updates.make(optax.sgd, RATE, PARAMS, decay=((".*", value),))


def test_decay_is_said_in_one_place():
  rules = ((".*/kernel", 0.1),)
  with pytest.raises(UserError, match=r"weight_decay=0\.0001 is the default.*set config\.optimizer\.weight_decay to 0"):
    updates.make(optax.adamw, RATE, PARAMS, decay=rules)
  with pytest.raises(UserError, match=r"weight_decay=0\.3"):
    updates.make(functools.partial(optax.adamw, weight_decay=0.3), RATE, PARAMS, decay=rules)
  updates.make(functools.partial(optax.adamw, weight_decay=0.0), RATE, PARAMS, decay=rules)
  updates.make(optax.adamw, RATE, PARAMS, decay=((".*/kernel", 0.0),))


# Multipliers, freezing, separate schedules


def test_a_multiplier_scales_the_update_and_its_decay():
  rules = (("head/.*", 10.0), (".*/bias", 0.0))
  states = run(updates.make(optax.sgd, RATE, PARAMS, decay=((".*", 0.3),), lr_multipliers=rules))
  times = {"head/kernel": 10, "body/bias": 0, "body/kernel": 1}
  assert_same(states, by_hand(lambda t, name, p, g: -rate(t) * times[name] * (g + 0.3 * p)))


@pytest.mark.parametrize("how", ["freeze", "schedule"])
def test_frozen_leaves_do_not_move_and_have_no_memory(how):
  if how == "freeze":
    optimizer = updates.make(optax.adam, RATE, PARAMS, freeze=("body/.*",), decay=((".*", 0.1),), ema=0.9)
  else:
    rules = (("body/.*", None), (".*", RATE))
    optimizer = updates.make(optax.adam, rules, PARAMS, decay=((".*", 0.1),), ema=0.9)
  states = run(optimizer)
  params, opt_state = states[-1]
  np.testing.assert_array_equal(params["body"]["kernel"], PARAMS["body"]["kernel"])
  np.testing.assert_array_equal(params["body"]["bias"], PARAMS["body"]["bias"])
  # Adam's two moments and the average of `head/kernel`; counts of Adam, its schedule, decay, average.
  assert sorted(x.shape for x in jax.tree.leaves(opt_state)) == [(), (), (), (), (2, 1), (2, 1), (2, 1)]
  alone = {"head": PARAMS["head"]}
  half = lambda params: 0.5 * jnp.sum((params["head"]["kernel"] - 0.25) ** 2)
  expected = run(updates.make(optax.adam, RATE, alone, decay=((".*", 0.1),)), params=alone, loss=half)
  np.testing.assert_array_equal(params["head"]["kernel"], expected[-1][0]["head"]["kernel"])
  assert jax.tree.structure(optimizer.views["ema"](opt_state, params)) == jax.tree.structure(params)


def test_frozen_leaves_have_no_share_in_the_norm():
  norm = dict(clip={"norm": 0.5})
  states = run(updates.make(optax.sgd, RATE, PARAMS, freeze=("body/.*",), **norm), steps=1)
  grad = PARAMS["head"]["kernel"] - 0.25
  expected = PARAMS["head"]["kernel"] - 0.1 * grad * 0.5 / np.linalg.norm(grad)
  np.testing.assert_allclose(states[-1][0]["head"]["kernel"], expected, rtol=1e-6)


def test_leaves_have_schedules_by_first_match():
  slow, fast = schedules.constant(CLOCK, peak=0.01), RATE
  rules = (("head/.*", slow), (".*/bias", None), (".*", fast))
  optimizer = updates.make(optax.sgd, rules, PARAMS, decay=((".*", 0.3),))
  states = run(optimizer)
  rates = {"head/kernel": lambda t: 0.01, "body/bias": lambda t: 0, "body/kernel": rate}
  assert_same(states, by_hand(lambda t, name, p, g: -rates[name](t) * (g + 0.3 * p)))
  assert optimizer.learning_rates == {"/head/.*": slow, "/.*": fast}
  assert {k: float(v) for k, v in optimizer.rates(states[-1][1], 5).items()} == pytest.approx(
    {"/head/.*": 0.01, "/.*": 0.05}
  )


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(decay=(("gamma", 0.1),)), r"config\.decay\[0\]: 'gamma' matches no leaf"),
    (dict(decay=((".*", 0.1), ("head/.*", 0.2))), r"config\.decay\[1\]: 'head/\.\*' is never reached"),
    (dict(freeze=("haed/.*",)), r"config\.freeze\[0\]: 'haed/\.\*' matches no leaf.*'head/kernel'"),
    (dict(freeze=(".*",)), "nothing to train"),
    (dict(lr_multipliers=(("kernel", 2.0),)), r"config\.lr_multipliers\[0\].*try '\.\*kernel\.\*'"),
    (dict(lr_multipliers=((".*", -2.0),)), "can't be negative"),
    (dict(schedule=(("head/.*", RATE),)), r"config\.schedule: no rule matches 'body/bias'"),
    (dict(schedule=((".*", RATE), ("head/.*", None))), r"config\.schedule\[1\]: 'head/\.\*' is never reached"),
    (dict(clip={"norn": 1.0}), "norn is not a way to clip. Did you mean 'norm'"),
    (dict(clip={"norm": 0.0}), r"config\.clip\.norm: 0\.0 must be positive"),
    (dict(ema=1.0), r"config\.ema: 1\.0"),
  ],
)
def test_a_rule_or_value_that_makes_no_sense_is_an_error(settings, message):
  schedule = settings.pop("schedule", RATE) if "schedule" in settings else RATE
  with pytest.raises(UserError, match=message):
    updates.make(optax.sgd, schedule, PARAMS, **settings)


# Clipping


def test_clipping_by_value_and_by_norm_comes_before_coupled_decay():
  clip = {"value": 1.0, "norm": 1.5, "adaptive": None}
  states = run(updates.make(optax.sgd, RATE, PARAMS, clip=clip, decay=((".*", "l2(0.3)"),)), steps=1)
  grads = {n: np.clip(p - 0.25, -1, 1) for n, p in zip(LEAVES, jax.tree.leaves(PARAMS), strict=True)}
  norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
  assert norm > 1.5
  assert_same(states, by_hand(lambda t, name, p, g: -0.1 * (grads[name] * 1.5 / norm + 0.3 * p), steps=1))


def test_adaptive_clipping_bounds_each_unit_by_its_weight():
  states = run(updates.make(optax.sgd, RATE, PARAMS, clip={"adaptive": 0.1}), steps=1)

  def clipped(p, g):
    axis = 0 if p.ndim == 2 else None
    limit = 0.1 * np.maximum(np.linalg.norm(p, axis=axis, keepdims=True), 1e-3)
    return g * np.minimum(1, limit / np.linalg.norm(g, axis=axis, keepdims=True))

  assert_same(states, by_hand(lambda t, name, p, g: -0.1 * clipped(p, g), steps=1))


# Averages


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_that_of_the_parameters_after_each_update(warmup):
  optimizer = updates.make(optax.sgd, RATE, PARAMS, ema=0.9, ema_warmup=warmup)
  states = run(optimizer)
  average = jax.tree.map(np.float64, PARAMS)
  for t, (params, opt_state) in enumerate(states):
    if t:
      decay = min(0.9, t / (9 + t)) if warmup else 0.9
      average = jax.tree.map(lambda a, p, decay=decay: decay * a + (1 - decay) * p, average, params)
    viewed = optimizer.views["ema"](opt_state, params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), viewed, average)


def test_the_average_lies_under_the_parameters_own_paths():
  optimizer = updates.make(optax.adam, RATE, PARAMS, ema=0.9)
  names = paths.names(jax.eval_shape(optimizer.tx.init, PARAMS))
  for leaf in LEAVES:
    assert f"ema/params/{leaf}" in names
    assert f"optimizer/base/0/mu/{leaf}" in names


def test_average_and_parameters_may_be_given_away_both():
  optimizer = updates.make(optax.sgd, RATE, PARAMS, ema=0.9)
  params = jax.tree.map(jnp.asarray, PARAMS)
  step = jax.jit(lambda p, s: optimizer.tx.update(p, s, p), donate_argnums=(0, 1))
  _, state = step(params, jax.jit(optimizer.tx.init)(params))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


# Plateaus


def test_a_plateau_lowers_the_rate_to_its_floor():
  clock = schedules.Clock(total_steps=100, batch_size=4)
  schedule = schedules.reduce_on_plateau(clock, peak=0.1, factor=0.5, patience=4, window=2, final=0.03)
  params = {"w": jnp.ones(())}
  optimizer = updates.make(optax.sgd, schedule, params, decay=((".*", 0.5),))
  opt_state, seen = optimizer.tx.init(params), []
  update = jax.jit(lambda s: optimizer.tx.update(params, s, params, value=jnp.float32(1.0), grad_fn=None))
  for _ in range(12):
    change, opt_state = update(opt_state)
    seen.append(float(-change["w"]) / 1.5)
  # The first window of two steps sets the mark; every two more windows without improvement halve the rate.
  np.testing.assert_allclose(seen, [0.1] * 5 + [0.05] * 4 + [0.03] * 3, rtol=1e-6)
  assert float(optimizer.rates(opt_state, 12)[""]) == pytest.approx(0.03)


def test_a_loss_that_falls_keeps_the_rate():
  schedule = schedules.reduce_on_plateau(CLOCK, peak=0.1, patience=1, window=1)
  optimizer = updates.make(optax.sgd, (("head/.*", RATE), (".*", schedule)), PARAMS)
  rates = optimizer.rates(run(optimizer)[-1][1], 5)
  assert {k: float(v) for k, v in rates.items()} == pytest.approx({"/head/.*": 0.05, "/.*": 0.1})


# Optimizers that ask for more


def test_components_with_bound_arguments_are_factories():
  adamw = config.component("optimizers", dict(name="adamw", weight_decay=0.1), "config.optimizer")
  with pytest.raises(UserError, match=r"weight_decay=0\.1 is set"):
    updates.make(adamw, RATE, PARAMS, decay=((".*", 0.1),))
  expected = run(updates.make(functools.partial(optax.adamw, weight_decay=0.1), RATE, PARAMS))
  jax.tree.map(np.testing.assert_array_equal, run(updates.make(adamw, RATE, PARAMS))[-1][0], expected[-1][0])


@pytest.mark.parametrize("factory", [optax.lbfgs, optax.contrib.sophia, optax.sm3, optax.rprop])
def test_an_optimizer_that_needs_what_no_step_gives_is_an_error(factory):
  with pytest.raises(UserError, match=r"config\.optimizer can't be used here"):
    updates.make(factory, RATE, PARAMS)


def test_sharpness_clips_and_decays_the_gradient_that_is_used():
  factory = functools.partial(sam.make, rho=0.1, momentum=None)
  settings = dict(clip={"value": 1.0}, decay=(("head/.*", "l2(0.3)"), (".*", 0.2)), freeze=("body/bias",))
  params = run(updates.make(factory, RATE, PARAMS, **settings), steps=1)[-1][0]
  before = {n: p for n, p in zip(LEAVES, jax.tree.leaves(PARAMS), strict=True) if n != "body/bias"}
  grads = {n: p - 0.25 for n, p in before.items()}
  norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
  there = {n: np.clip(p + 0.1 * grads[n] / norm - 0.25, -1, 1) for n, p in before.items()}
  kernel = before["head/kernel"] - 0.1 * (there["head/kernel"] + 0.3 * before["head/kernel"])
  np.testing.assert_allclose(params["head"]["kernel"], kernel, rtol=1e-6)
  kernel = before["body/kernel"] - 0.1 * (there["body/kernel"] + 0.2 * before["body/kernel"])
  np.testing.assert_allclose(params["body"]["kernel"], kernel, rtol=1e-6)
  np.testing.assert_array_equal(params["body"]["bias"], PARAMS["body"]["bias"])


def test_sharpness_takes_one_neighbour_for_all_schedules():
  factory = functools.partial(sam.make, rho=0.1)
  together = run(updates.make(factory, RATE, PARAMS))
  apart = run(updates.make(factory, (("head/.*", RATE), (".*", RATE)), PARAMS))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), together[-1][0], apart[-1][0])


def test_schedule_free_decays_and_multiplies_before_it_averages():
  factory = functools.partial(schedule_free.make, base="sgd", b1=0.9)
  steady = schedules.constant(CLOCK, peak=0.1)
  rules = dict(decay=((".*/kernel", 0.3),), lr_multipliers=(("head/.*", 2.0),))
  optimizer = updates.make(factory, ((".*/bias", RATE), (".*", steady)), PARAMS, freeze=("body/bias",), **rules)
  params, opt_state = run(optimizer)[-1]
  for name, times in [("body", 1), ("head", 2)]:
    x = z = y = PARAMS[name]["kernel"].astype(np.float64)
    for t in range(5):  # Equations 3 to 5 of the paper, with decay at y.
      z = z - 0.1 * times * (y - 0.25 + 0.3 * y)
      x = x + (z - x) / (t + 1)
      y = 0.9 * x + 0.1 * z
    np.testing.assert_allclose(params[name]["kernel"], y, rtol=1e-5)
    np.testing.assert_allclose(optimizer.views["averaged"](opt_state, params)[name]["kernel"], x, rtol=1e-5)
  np.testing.assert_array_equal(params["body"]["bias"], PARAMS["body"]["bias"])


def test_schedule_free_of_optax_is_averaged_too_but_takes_no_rules():
  optimizer = updates.make(optax.contrib.schedule_free_sgd, RATE, PARAMS)
  params, opt_state = run(optimizer)[-1]
  expected = optax.contrib.schedule_free_eval_params(opt_state["optimizer"]["base"], params)
  averaged = optimizer.views["averaged"](opt_state, params)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), averaged, expected)
  with pytest.raises(UserError, match="name='schedule_free'"):
    updates.make(optax.contrib.schedule_free_sgd, RATE, PARAMS, decay=((".*", 0.1),))
