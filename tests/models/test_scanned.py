"""Stacks of layers that keep batch statistics: scanned, recomputed or neither, one model and one checkpoint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import config as configs
from bigjax import experiment, paths, sharding, train
from bigjax.checkpoint import Checkpoints
from bigjax.errors import UserError

MODELS = {
  "mlp": dict(name="mlp", in_features=48, widths=(16,) * 4, num_outputs=3, batch_norm=True, dropout=0.1),
  "resnet": dict(name="resnet", stages=(1, 3), width=4, num_classes=3, stem="small", bottleneck=False),
  "bottleneck": dict(name="resnet", stages=(3,), width=4, num_classes=3, stem="small", bottleneck=True),
}
FORMS = {"remat": dict(remat="full"), "scan and remat": dict(scan=True, remat="full")}


def built(model, mesh=(("data", 1),), **changes):
  config = dict(
    total_steps=3,
    batch_size=8,
    data=dict(source=dict(name="synthetic", num_examples=32, shape=(4, 4, 3), num_classes=3)),
    model=MODELS[model] | changes,
    task=dict(name="classification"),
    optimizer=dict(name="sgd", momentum=0.9),
    schedule=dict(name="constant", peak=0.05),
    mesh=mesh,
    sharding="fsdp" if mesh[0] == ("data", 8) else "replicated",
  )
  devices = jax.devices()[: mesh[0][1]]
  return experiment.build(configs.resolve(config, experiment.TrainConfig), devices)


@functools.cache
def plain(model):
  """The unscanned model: its first state, its last, and losses."""
  run = built(model)
  return run.init(jax.random.key(0)), *trained(run)


def trained(run, steps=3):
  """Returns the last state and the losses."""
  with jax.set_mesh(run.mesh), train.train_batches(run, 0) as batches:
    state, step = run.init(jax.random.key(0)), train.compile_step(run)
    key = jax.device_put(jax.random.key(1), sharding.replicated(run.mesh))
    losses = []
    for _ in range(steps):
      state, measured = step(state, next(batches), key)
      losses.append(float(measured["loss"]))
  return state, losses


def in_layers(state):
  """Leaves by the names that they have in a list of layers."""
  found = {}
  for name, value in zip(paths.names(state), jax.tree.leaves(state), strict=True):
    head, stack, rest = name.partition("blocks/")
    if stack and not rest[0].isdigit():
      found |= {f"{head}blocks/{i}/{rest}": np.asarray(layer) for i, layer in enumerate(value)}
    else:
      found[name] = np.asarray(value)
  return found


@pytest.mark.parametrize("model", MODELS)
def test_a_scanned_model_starts_with_the_values_of_an_unscanned_one(model):
  expected, state = in_layers(plain(model)[0]), in_layers(built(model, scan=True).init(jax.random.key(0)))
  assert expected.keys() == state.keys()
  assert any("blocks/1/" in name for name in expected)
  jax.tree.map(np.testing.assert_array_equal, expected, state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_losses_statistics_and_momentum_are_those_of_the_unscanned_model(model, form):
  start, expected, expected_losses = plain(model)
  state, losses = trained(built(model, **FORMS[form]))
  np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
  start, expected, state = map(in_layers, (start, expected, state))
  assert expected.keys() == state.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(state[name], value, rtol=1e-3, atol=2e-5, err_msg=name)
    assert not name.startswith("extras/") or np.abs(value - start[name]).max() > 0, name  # Each layer's have moved.


def test_eight_devices_with_the_stack_split_are_one():
  run = built("resnet", (("data", 8),), scan=True, remat="full", width=16)
  assert any("data" in str(s.spec) for s in jax.tree.leaves(run.shardings.params["stages"]["1"]["blocks"]))
  np.testing.assert_allclose(trained(run)[1], trained(built("resnet", width=16))[1], rtol=2e-5)


def test_what_is_recomputed_and_scanned_is_in_the_program():
  def jaxpr(**form):
    run = built("resnet", **form)
    loss = lambda params: run.loss(params, run.abstract.extras, batch, key)[0].sums["loss"]
    batch = {k: jnp.zeros(v.shape, v.dtype) for k, v in run.batch.items()}
    key, params = jax.random.key(0), run.abstract.params
    extras = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), run.abstract.extras)
    loss = lambda params: run.loss(params, extras, batch, key)[0].sums["loss"]
    return str(jax.make_jaxpr(jax.grad(loss))(params))

  plain, both = jaxpr(), jaxpr(scan=True, remat="full")
  assert "scan[" not in plain and "remat" not in plain
  assert "scan[" in both and "remat" in both


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_of_either_form_is_read_in_the_other(tmp_path, model):
  runs = {scan: built(model, scan=scan) for scan in (False, True)}
  for saved_as, run in runs.items():
    state, _ = trained(run, steps=1)
    folder, other = str(tmp_path / str(saved_as)), runs[not saved_as]
    with Checkpoints(folder) as checkpoints:
      checkpoints.save(1, state, {})
    with Checkpoints(folder, read_only=True) as checkpoints:
      read, _ = checkpoints.restore(other.abstract, other.shardings)
    jax.tree.map(np.testing.assert_array_equal, in_layers(read), in_layers(state))


def test_layers_that_differ_are_no_stack():
  with pytest.raises(UserError, match=r"model.widths: \(16, 8\) differ"):
    built("mlp", widths=(16, 8), scan=True)


def test_layers_that_keep_statistics_are_no_stages():
  with pytest.raises(UserError, match="config.mesh: .*no stages"):
    built("resnet", (("pipe", 2),), scan=True)
