"""What parameters are kept in and computed with: what is lost by it, what isn't, and what it costs."""

import copy
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigjax import config as configs
from bigjax import experiment, metrics, paths, precision, train, updates
from bigjax.errors import UserError

VIT = dict(name="vit", num_classes=3, image_size=4, channels=1, patch_size=2, width=16, depth=2, heads=2, head="gap")
MLP = dict(name="mlp", in_features=16, widths=(8,), num_outputs=3)
TINY = dict(
  total_steps=8,
  batch_size=16,
  data=dict(source=dict(name="synthetic", kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)),
  model=MLP,
  task=dict(name="classification"),
  optimizer=dict(name="adamw", weight_decay=0.0),
  schedule=dict(name="constant", peak=1e-2),
  log_every=1,
  writers=("jsonl",),
)


def resolved(**changes):
  return configs.resolve(copy.deepcopy(TINY) | changes, experiment.TrainConfig)


def built(**changes):
  return experiment.build(resolved(**changes))


def trained(run, steps=8):
  """Returns the losses of the first steps and the last state."""
  with jax.set_mesh(run.mesh), train.train_batches(run, 0) as batches:
    step, state, losses = train.compile_step(run), run.init(jax.random.key(0)), []
    key = jax.device_put(jax.random.key(1), jax.sharding.NamedSharding(run.mesh, jax.sharding.PartitionSpec()))
    for _ in range(steps):
      state, measured = step(state, next(batches), key)
      losses.append(measured)
  return jax.device_get(losses), jax.device_get(state)


def of_kind(state, kind):
  return next(updates._find(state.opt_state, kind))


def assert_same_bits(a, b):
  jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes() or pytest.fail(f"{x} is not {y}"), a, b)


def dots(run):
  """The types of the factors of every product in the step, as it is handed to the compiler."""
  text = train.make_step(run).lower(run.abstract, dict(run.batch), jax.eval_shape(lambda: jax.random.key(0))).as_text()
  factors = [line.rsplit(" : ", 1)[1].split("->")[0] for line in text.splitlines() if "stablehlo.dot_general" in line]
  return {"".join(sorted({part.rsplit("x", 1)[1].rstrip(">) ") for part in f.split(", ")})) for f in factors}


# What a word means


@pytest.mark.parametrize(
  ("word", "compute", "kept"),
  [
    ("float32", "float32", "float32"),
    ("mixed", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16_kahan", "bfloat16", "bfloat16"),
    ("float16", "float16", "float32"),
  ],
)
def test_a_word_sets_what_is_computed_in_and_what_parameters_are_kept_in(word, compute, kept):
  run = built(precision=word)
  assert run.config.model.kwargs["dtype"] == compute
  assert {str(p.dtype) for p in jax.tree.leaves(run.abstract.params)} == {kept}


def test_a_model_that_computes_in_something_else_is_an_error():
  with pytest.raises(
    UserError, match=r"model\.dtype: 'bfloat16' contradicts .*'float32'.*set config\.precision='mixed'"
  ):
    resolved(model=MLP | dict(dtype="bfloat16"))
  with pytest.raises(UserError, match=r"model\.dtype: 'float32' contradicts config\.precision='mixed'"):
    resolved(model=MLP | dict(dtype="float32"), precision="mixed")
  assert resolved(model=MLP | dict(dtype="bfloat16"), precision="mixed").model.kwargs["dtype"] == "bfloat16"


def test_a_model_that_can_not_be_told_is_an_error():
  with pytest.raises(UserError, match=r"'mixed' computes in bfloat16, and model 'linear' has no argument `dtype`"):
    resolved(model=dict(name="linear", in_features=16, num_outputs=3), precision="mixed")


def test_what_is_recorded_of_a_config_resolves_to_the_same():
  config = resolved(precision=dict(mode="bfloat16", moments="float32"))
  recorded = json.loads(json.dumps(configs.describe(config)))
  assert recorded["model"]["dtype"] == "bfloat16"
  assert configs.describe(configs.resolve(recorded, experiment.TrainConfig)) == recorded


def test_settings_that_can_not_work_are_errors():
  with pytest.raises(UserError, match=r"config\.precision\.moments is for the bfloat16 modes"):
    built(precision=dict(mode="mixed", moments="bfloat16"))
  with pytest.raises(UserError, match=r"config\.precision\.gradients: 'bfloat16' is for modes that compute in it"):
    built(precision=dict(mode="float16", gradients="bfloat16"))
  with pytest.raises(UserError, match=r"config\.precision\.loss_scale: -1\.0 must be positive"):
    built(precision=dict(mode="float16", loss_scale=-1.0))
  with pytest.raises(UserError, match=r"config\.precision\.grow_every: 0 must be 1 or more"):
    built(precision=dict(mode="float16", grow_every=0))


def test_mixed_multiplies_in_bfloat16_and_exponentiates_normalises_and_takes_logarithms_in_float32():
  run = built(model=VIT, precision="mixed")
  params, extras = run.model.abstract
  loss = lambda *args: run.loss(*args)[0].sums["loss"]
  key = jax.eval_shape(lambda: jax.random.key(0))
  jaxpr = jax.make_jaxpr(jax.grad(loss))(params, extras, dict(run.batch), key)
  types = {}
  for equation in equations(jaxpr.jaxpr):
    types.setdefault(equation.primitive.name, []).extend(str(x.aval.dtype) for x in equation.invars[:1])
  for careful in ("exp", "log", "rsqrt", "reduce_max"):
    assert set(types[careful]) == {"float32"}, careful
  assert types["dot_general"].count("bfloat16") > types["dot_general"].count("float32") > 0  # Softmax's, the head's.
  assert jaxpr.out_avals[0].dtype == jnp.float32
  assert run.outputs["logits"].dtype == jnp.float32


@pytest.mark.parametrize("word", ["mixed", "bfloat16", "float16", dict(mode="mixed", gradients="bfloat16")])
def test_gradients_of_kernels_are_added_up_in_float32_unless_half_the_bytes_are_asked_for(word):
  run = built(model=MLP | dict(widths=(8, 8)), precision=word)
  key = jax.eval_shape(lambda: jax.random.key(0))
  jaxpr = jax.make_jaxpr(train.make_step(run))(run.abstract, dict(run.batch), key)
  narrow = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
  narrow = [str(e.outvars[0].aval.dtype) for e in narrow if e.invars[0].aval.dtype != jnp.float32]
  assert narrow.count("float32") == (0 if isinstance(word, dict) else 2)
  # Two forward, two to what went in, of which the compiler drops that of the examples where JAX has not.
  assert len(narrow) == (5 if isinstance(word, dict) else 6)


@pytest.mark.parametrize(
  ("word", "dtype"), [("mixed", "float32"), (dict(mode="mixed", gradients="bfloat16"), "bfloat16")]
)
def test_the_gradient_of_the_head_of_logits_in_chunks_is_added_up_over_devices_in_the_type_asked_for(word, dtype):
  decoder = dict(name="decoder", vocab_size=32, context=8, width=16, depth=1, heads=2, mlp_dim=16)
  task = dict(name="language_modeling", loss_chunks=2)
  tokens = dict(source=dict(name="synthetic", kind="tokens", length=8))
  run = built(model=decoder, task=task, data=tokens, precision=word, mesh=(("data", 8),))
  key = jax.eval_shape(lambda: jax.random.key(0))
  with jax.set_mesh(run.mesh):
    jaxpr = jax.make_jaxpr(train.make_step(run))(run.abstract, dict(run.batch), key)
  summed = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "reduce_sum"]
  assert [str(e.invars[0].aval.dtype) for e in summed if e.invars[0].aval.shape == (8, 32, 16)] == [dtype]


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


@pytest.mark.parametrize(
  "word", ["mixed", *[pytest.param(w, marks=pytest.mark.slow) for w in ("bfloat16", "bfloat16_kahan", "float16")]]
)
def test_the_loss_goes_down_as_in_float32(word):
  expected = [m["loss"] for m in trained(built(), 8)[0]]
  losses = [m["loss"] for m in trained(built(precision=word), 8)[0]]
  np.testing.assert_allclose(losses, expected, atol=0.05)
  assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
  ("chosen", "expected"),
  [
    ("float32", 12),
    ("mixed", 12),
    ("float16", 12),
    ("bfloat16", 6),
    ("bfloat16_kahan", 8),
    (dict(mode="bfloat16", moments="float32"), 10),
    (dict(mode="bfloat16_kahan", moments="float32"), 12),
  ],
)
def test_bytes_a_parameter_are_those_of_the_table(chosen, expected):
  run = built(precision=chosen)
  count = sum(p.size for p in jax.tree.leaves(run.abstract.params))
  arrays = [x for x in jax.tree.leaves((run.abstract.params, run.abstract.opt_state)) if x.ndim]
  assert sum(x.size * x.dtype.itemsize for x in arrays) == expected * count


# Rounding


def test_an_update_too_small_for_bfloat16_is_lost_by_rounding_to_the_nearest_and_by_nothing_else():
  steps, rate = 512, 2.0**-12  # 1/16 of the distance from 1 to the next bfloat16, 512 times: 1.125.
  params = {"w": jnp.ones((4096,), jnp.bfloat16)}

  def after(stage):
    tx = precision.widened(optax.with_extra_args_support(optax.chain(optax.sgd(rate), stage)))

    def step(carry, _):
      params, state = carry
      change, state = tx.update({"w": -jnp.ones((4096,), jnp.bfloat16)}, state, params)
      return (optax.apply_updates(params, change), state), None

    (params_after, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))((params, tx.init(params)))
    assert params_after["w"].dtype == jnp.bfloat16
    return np.asarray(params_after["w"], np.float64)

  assert (after(optax.identity()) == 1.0).all()
  np.testing.assert_allclose(after(precision.kahan()), 1.125, atol=2**-8)
  by_chance = after(precision.stochastic(seed=0))
  # Each step adds a whole 2^-7 with odds 1/32: a deviation of 2^-7 sqrt(512 / 32 * 31 / 32) for one parameter.
  deviation = 2**-7 * (steps / 32 * 31 / 32) ** 0.5
  assert abs(by_chance.mean() - 1.125) < 5 * deviation / 4096**0.5
  assert by_chance.std() == pytest.approx(deviation, rel=0.1)


def test_rounding_by_chance_takes_either_neighbour_with_the_odds_that_make_the_mean_right():
  x = jnp.float32(1 + 2**-7 * 0.3)
  draws = np.asarray(precision.round_stochastically(jax.random.key(0), jnp.broadcast_to(x, (100_000,))))
  assert set(draws.tolist()) == {1.0, 1 + 2**-7}
  assert abs((draws > 1).mean() - 0.3) < 5 * (0.3 * 0.7 / 100_000) ** 0.5
  down = np.asarray(precision.round_stochastically(jax.random.key(0), jnp.broadcast_to(-x, (100_000,))))
  np.testing.assert_array_equal(down, -draws)


def test_rounding_leaves_what_is_a_bfloat16_and_what_is_no_number():
  x = jnp.array([0.0, -0.0, 1.0, -3e38, 1e-40, jnp.inf, -jnp.inf, jnp.nan]).astype(jnp.bfloat16).astype(jnp.float32)
  assert_same_bits(precision.round_stochastically(jax.random.key(1), x), x)
  np.testing.assert_array_equal(precision.round_to_nearest(x), x)


@pytest.mark.parametrize("stage", [precision.stochastic(3), precision.kahan()])
def test_parameter_plus_update_is_a_bfloat16_without_another_rounding(stage):
  keys = jax.random.split(jax.random.key(0))
  params = {"w": precision.round_to_nearest(jax.random.normal(keys[0], (10_000,)))}
  change = {"w": jax.random.normal(keys[1], (10_000,)) * 0.1}
  change, _ = jax.jit(stage.update)(change, stage.init(params), params)
  total = params["w"] + change["w"]
  near = np.abs(total) > np.abs(params["w"]) / 2**16
  np.testing.assert_array_equal(total[near], precision.round_to_nearest(total)[near])


def test_kahan_follows_float32_where_rounding_to_the_nearest_leaves_it():
  target = jax.random.normal(jax.random.key(0), (64, 64))
  start = {"w": jnp.zeros((64, 64), jnp.bfloat16)}

  def after(params, *stages):
    tx = optax.chain(optax.adam(lambda t: 3e-3 * 0.995**t), *stages)
    tx = precision.widened(optax.with_extra_args_support(tx))

    def step(carry, _):
      params, state = carry
      change, state = tx.update({"w": params["w"].astype(jnp.float32) - target}, state, params)
      return (optax.apply_updates(params, change), state), None

    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=1000))((params, tx.init(params)))
    return params["w"].astype(jnp.float32), state

  exact, _ = after(precision.cast(start, jnp.float32))
  plain, _ = after(start)
  kahan, state = after(start, precision.kahan())
  error = lambda w: float(optax.tree.norm(w - exact) / optax.tree.norm(exact))
  whole = kahan + state[-1].compensation["w"]
  assert error(kahan) < 2.0**-8 < error(plain)  # No more than the last rounding alone.
  assert error(whole) < 2.0**-11
  assert error(precision.round_to_nearest(exact)) == pytest.approx(error(kahan), rel=0.2)


def test_second_moments_in_bfloat16_decay_only_because_they_are_rounded_by_chance():
  params = {"w": jnp.ones((4096,))}
  tx = precision.stored(optax.scale_by_adam(b2=0.999), seed=0)
  state = tx.init(params)
  state = state._replace(inner=state.inner._replace(nu=precision.cast(params, jnp.bfloat16)))
  step = jax.jit(lambda s, _: (tx.update({"w": jnp.zeros(4096)}, s, params)[1], None))
  state, _ = jax.lax.scan(step, state, None, length=500)
  nu = np.asarray(state.inner.nu["w"], np.float64)
  assert state.inner.nu["w"].dtype == jnp.bfloat16
  assert abs(nu.mean() - 0.999**500) < 5 * nu.std() / 4096**0.5
  assert precision.round_to_nearest(jnp.float32(0.999)) == 1.0


def test_the_draws_are_those_of_seed_update_and_leaf_on_any_mesh_and_whatever_else_there_is():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  params = {"a": jnp.ones((16, 8)), "b": jnp.ones((16, 8))}
  change = jax.tree.map(lambda p: p * 1e-3, params)
  stage = precision.stochastic(seed=5)
  update = jax.jit(lambda *args: stage.update(*args))
  one, state = update(change, stage.init(params), params)
  layout = lambda x: jax.NamedSharding(mesh, jax.P("data") if x.ndim else jax.P())
  split = jax.tree.map(lambda x: jax.device_put(x, layout(x)), (change, stage.init(params), params))
  assert_same_bits(update(*split)[0], one)
  update = stage.update
  assert_same_bits(update({"b": change["b"]}, stage.init(params), {"b": params["b"]})[0]["b"], one["b"])
  assert (one["a"] != one["b"]).any()
  assert (update(change, state, params)[0]["a"] != one["a"]).any()
  other = precision.stochastic(seed=6)
  assert (other.update(change, other.init(params), params)[0]["a"] != one["a"]).any()


def test_kahan_and_moments_lie_where_their_parameters_do():
  run = built(
    model=VIT, precision="bfloat16_kahan", sharding=[(".*(mlp|attn).*kernel", "fsdp(data,1)"), (".*", "replicated")]
  )
  layouts = dict(zip(paths.names(run.shardings), jax.tree.leaves(run.shardings), strict=True))
  kernels = [n for n in layouts if n.startswith("params/") and "attn/qkv/kernel" in n]
  assert kernels
  for name in kernels:
    followers = [n for n in layouts if n.endswith(name.removeprefix("params/"))]
    assert len(followers) == 4  # Itself, two moments, the compensation.
    assert {str(layouts[n].spec) for n in followers} == {str(layouts[name].spec)}
    assert "data" in str(layouts[name].spec)


def test_the_average_of_bfloat16_parameters_is_float32_and_of_what_they_are():
  run = built(precision="bfloat16", ema=0.5)
  first = jax.device_get(run.init(jax.random.key(0)).params)
  _, state = trained(run, 1)
  average = of_kind(state, updates.EmaState).params
  half = lambda a, b: 0.5 * np.asarray(a, np.float32) + 0.5 * np.asarray(b, np.float32)
  assert {str(x.dtype) for x in jax.tree.leaves(average)} == {"float32"}
  jax.tree.map(lambda e, a, b: np.testing.assert_allclose(e, half(a, b), atol=1e-7), average, first, state.params)


def test_frozen_parameters_stay_and_have_no_memory():
  run = built(precision="bfloat16_kahan", freeze=["first/.*"])
  first = jax.device_get(run.init(jax.random.key(0)).params)
  _, state = trained(run, 2)
  assert_same_bits(state.params["first"], first["first"])
  assert not [n for n in paths.names(state.opt_state) if "/first/" in n]


class StopAfter:
  """Sends this process a SIGTERM while step `step` is being logged, as a preempted machine would."""

  def __init__(self, monkeypatch, step):
    original = metrics.Logger.step

    def logged(self, at, measured):
      original(self, at, measured)
      if at == step:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.Logger, "step", logged)


@pytest.mark.parametrize("word", ["bfloat16", "bfloat16_kahan", "float16"])
def test_a_resumed_run_is_bitwise_the_same(tmp_path, monkeypatch, word):
  config = resolved(precision=word)
  assert train.train(config, str(tmp_path / "whole")) == "finished"
  with monkeypatch.context() as patch:
    StopAfter(patch, 3)
    assert train.train(config, str(tmp_path / "parts")) == "stopped"
  assert train.train(config, str(tmp_path / "parts")) == "finished"
  run = experiment.build(config)
  ends = []
  for name in ("whole", "parts"):
    with train.Checkpoints(str(tmp_path / name), read_only=True) as checkpoints:
      ends.append(jax.device_get(checkpoints.restore(run.abstract, run.shardings)[0]))
  assert_same_bits(*ends)


def test_a_batch_in_parts_adds_up_in_float32():
  whole, _ = trained(built(precision="bfloat16"), 3)
  parts, _ = trained(built(precision="bfloat16", accumulate=2), 3)
  for a, b in zip(whole, parts, strict=True):
    assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    assert a["grad_norm"].dtype == b["grad_norm"].dtype == np.float32


# A scaled loss


def scaled(**settings):
  config = precision.of(precision.PrecisionConfig(mode="float16", **settings))
  inner = optax.with_extra_args_support(optax.adam(optax.linear_schedule(0.1, 0.0, 10)))
  return precision.scaled(inner, config, weight=16.0)


def test_the_scale_is_first_that_of_the_mean_and_then_grows_after_good_steps_and_halves_after_an_overflow():
  tx, params = scaled(loss_scale=1024.0, grow_every=3), {"w": jnp.ones(2)}
  state, scales = tx.init(params), []
  for gradient in (1, 1, 1, jnp.inf, 1, 1, jnp.nan, 1, 1, 1):
    _, state = tx.update({"w": jnp.full(2, gradient, jnp.float32)}, state, params)
    scales.append(float(state.scale))
  assert scales == [64, 64, 128, 64, 64, 64, 32, 32, 32, 64]
  assert int(state.skipped) == 2
  assert int(state.skipped_in_a_row) == 0


def test_a_skipped_update_changes_no_bit_but_of_the_scale():
  tx, params = scaled(), {"w": jnp.array([1.0, -0.0, 0.0, -3.0])}
  change, state = tx.update({"w": jnp.ones(4)}, tx.init(params), params)
  skipped, after = jax.jit(tx.update)({"w": jnp.array([1.0, jnp.inf, 1.0, 1.0])}, state, params)
  assert_same_bits(optax.apply_updates(params, skipped), params)
  assert_same_bits(after.inner, state.inner)
  again, _ = tx.update({"w": jnp.ones(4)}, after, params)
  straight, _ = tx.update({"w": jnp.ones(4)}, state, params)
  assert_same_bits(again, straight)
  assert (change["w"] != 0).all()


def test_an_overflow_in_training_skips_the_step_whole_and_training_goes_on():
  run = built(precision=dict(mode="float16", loss_scale=2.0**31), model=MLP | dict(batch_norm=True), ema=0.9)
  first = jax.device_get(run.init(jax.random.key(0)))
  _, skipped = trained(run, 1)
  for name in ("params", "extras"):
    assert_same_bits(getattr(skipped, name), getattr(first, name))
  assert_same_bits(of_kind(skipped, updates.EmaState), of_kind(first, updates.EmaState))
  assert_same_bits(of_kind(skipped, optax.ScaleByAdamState), of_kind(first, optax.ScaleByAdamState))
  measured, state = trained(run, 24)
  assert 0 < measured[-1]["skipped_steps"] < 20
  assert measured[-1]["skipped_in_a_row"] == 0
  assert measured[-1]["loss"] < measured[0]["loss"]
  assert measured[-1]["loss_scale"] == 2.0 ** (31 - 4 - measured[-1]["skipped_steps"])
  assert int(of_kind(state, optax.ScaleByAdamState).count) == 24 - measured[-1]["skipped_steps"]


def test_schedules_stand_still_where_a_step_was_skipped():
  run = built(
    precision=dict(mode="float16", loss_scale=2.0**31), schedule=dict(name="linear", peak=1.0), total_steps=24
  )
  measured, _ = trained(run, 24)
  expected = [1 - (i - int(m["skipped_steps"])) / 24 for i, m in enumerate(measured)]
  used = [i for i, m in enumerate(measured) if not m["skipped_in_a_row"]]
  assert len(used) < 24
  np.testing.assert_allclose([measured[i]["learning_rate"] for i in used], [expected[i] for i in used], rtol=1e-5)


def test_overflows_without_end_stop_the_run_with_a_message(tmp_path):
  config = resolved(
    precision="float16",
    data=TINY["data"] | dict(preprocess="value_range(-1e30,1e30,in_max=1)"),
    total_steps=40,
    checkpoint_every=20,
  )
  with pytest.raises(FloatingPointError, match=r"overflowed float16 in 30 steps in a row.*config\.precision='mixed'"):
    train.train(config, str(tmp_path))


def test_the_scale_of_the_loss_is_no_part_of_the_gradient():
  plain, _ = trained(built(), 1)
  for scale in (2.0**4, 2.0**12):
    half, _ = trained(built(precision=dict(mode="float16", loss_scale=scale)), 1)
    assert half[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=0.02)


def test_products_are_in_what_the_word_says():
  assert dots(built()) == {"f32"}
  assert dots(built(precision="float16")) == {"f16", "f32"}  # float32's are the head's.
