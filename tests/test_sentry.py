"""The step names what it refuses; time is told apart and adds up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import config as configs
from bigjax import experiment, sentry, train
from bigjax.errors import UserError


@pytest.fixture(scope="module")
def step():
  images = dict(name="synthetic", kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
  config = dict(
    total_steps=4,
    batch_size=16,
    data=dict(source=images),
    model=dict(name="linear", in_features=16, num_outputs=3),
    task=dict(name="classification"),
    optimizer=dict(name="sgd"),
    schedule=dict(name="constant", peak=0.1),
    sharding=((".*kernel", "fsdp(data,8)"), (".*", "replicated")),
  )
  run = experiment.build(configs.resolve(config, experiment.TrainConfig))
  with jax.set_mesh(run.mesh):
    compiled = train.compile_step(run)
    with train.train_batches(run, 0) as batches:
      key = jax.device_put(jax.random.key(0), train.sharding.replicated(run.mesh))
      yield compiled, run.init(jax.random.key(0)), next(batches), key


def called(step, **changes):
  compiled, state, batch, key = step
  copy = jax.tree.map(jnp.copy, state)
  with jax.transfer_guard("disallow"):
    return compiled(changes.get("state", copy), batch | changes.get("batch", {}), changes.get("key", key))


def test_it_takes_what_it_was_compiled_for(step):
  state, measured = called(step)
  assert int(state.step) == 1 and np.isfinite(measured["loss"])


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda b: {"image": b["image"][:8]}, "batch/image is float32[8, 4, 4, 1] instead of float32[16, 4, 4, 1]"),
    (lambda b: {"label": b["label"].astype("float32")}, "batch/label is float32[16] instead of int32[16]"),
    (lambda b: {"weight": b["mask"]}, "batch/weight is new"),
    (lambda b: {"mask": np.ones(16, np.float32)}, "batch/mask is on the host, as a numpy.ndarray"),
    (lambda b: {"mask": jax.device_put(b["mask"], jax.devices()[0])}, "batch/mask is laid out as SingleDeviceSharding"),
  ],
)
def test_what_it_was_not_compiled_for_is_named(step, change, words):
  with pytest.raises(UserError, match="config.data") as told:
    called(step, batch=change(step[2]))
  assert words in str(told.value)
  lines = str(told.value).splitlines()[1:-1]
  assert len(lines) == 1  # And nothing else.


def test_a_missing_feature_is_named(step):
  compiled, state, batch, key = step
  with pytest.raises(UserError, match="batch/label is missing"):
    compiled(jax.tree.map(jnp.copy, state), {k: v for k, v in batch.items() if k != "label"}, key)


def test_a_state_that_was_given_away_is_named(step):
  state = jax.tree.map(jnp.copy, step[1])
  called(step, state=state)
  with pytest.raises(UserError, match="state/step was given away"):
    called(step, state=state)


def test_what_goes_wrong_inside_stays_as_it_is():
  def broken(x):
    raise ValueError("inside")

  with pytest.raises(ValueError, match="^inside$"):
    sentry.Step(broken, {"x": jax.ShapeDtypeStruct((), "float32")})(jnp.float32(1))
