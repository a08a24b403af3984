"""Regression: losses by hand, rows against rows, padding that adds exactly nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.errors import UserError
from bigjax.tasks import regression

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
KERNEL = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)


@dataclasses.dataclass
class Linear:
  kernel: jax.Array

  def __call__(self, inputs, *, key=None, train=False):
    return inputs @ self.kernel


def example_batch(n=12, padding=0):
  mask = np.ones(n, np.float32)
  mask[n - padding :] = 0
  x, target = RNG.normal(size=(n, 3)), RNG.normal(size=(n, 2)) * 3
  return {"x": x.astype(np.float32), "target": target.astype(np.float32), "mask": mask}


def means(task, batch, kernel=KERNEL):
  return task.loss(Linear(kernel), batch, key=KEY).means()


@pytest.mark.parametrize("loss", ["squared", "absolute", "huber"])
def test_losses_equal_numpys(loss):
  batch = example_batch()
  error = np.abs(batch["x"] @ np.asarray(KERNEL) - batch["target"])
  expected = {
    "squared": error**2,
    "absolute": error,
    "huber": np.where(error <= 1.5, error**2 / 2, 1.5 * (error - 0.75)),
  }
  found = means(regression.make(loss=loss, delta=1.5), batch)
  np.testing.assert_allclose(found["loss"], expected[loss].mean(), rtol=1e-5)
  np.testing.assert_allclose(found["mse"], (error**2).mean(), rtol=1e-5)
  np.testing.assert_allclose(found["mae"], error.mean(), rtol=1e-5)


def test_one_output_goes_with_flat_targets_and_never_broadcasts():
  batch = example_batch()
  flat = means(regression.make(), batch | {"target": batch["target"][:, 0]}, KERNEL[:, :1])["loss"]
  column = means(regression.make(), batch | {"target": batch["target"][:, :1]}, KERNEL[:, :1])["loss"]
  np.testing.assert_allclose(flat, np.square(batch["x"] @ KERNEL[:, 0] - batch["target"][:, 0]).mean(), rtol=1e-5)
  assert flat == column
  assert flat == means(regression.make(), batch | {"target": batch["target"][:, 0]}, KERNEL[:, 0])["loss"]


@pytest.mark.parametrize("loss", ["squared", "absolute", "huber"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_padding_adds_exactly_nothing_to_sums_and_gradients(loss, garbage):
  task, batch = regression.make(loss=loss), example_batch(padding=5)
  spoilt = {k: v.copy() for k, v in batch.items()}
  spoilt["x"][7:] = spoilt["target"][7:] = garbage
  gradient = lambda batch: jax.grad(lambda kernel: means(task, batch, kernel)["loss"])(KERNEL)
  assert means(task, batch) == means(task, spoilt)
  np.testing.assert_array_equal(gradient(batch), gradient(spoilt))
  np.testing.assert_allclose(gradient(spoilt), gradient({k: v[:7] for k, v in batch.items()}), rtol=1e-5)


def test_a_batch_in_parts_adds_up():
  task, batch = regression.make(loss="huber"), example_batch(padding=2)
  pieces = [task.loss(Linear(KERNEL), {k: v[i::4] for k, v in batch.items()}, key=KEY) for i in range(4)]
  for k, value in sum(pieces[1:], pieces[0]).means().items():
    np.testing.assert_allclose(value, means(task, batch)[k], rtol=1e-6)


def test_predict_gives_the_numbers_without_needing_targets():
  batch = example_batch()
  found = regression.make().predict(Linear(KERNEL), {"x": batch["x"]})
  np.testing.assert_allclose(found["logits"], batch["x"] @ np.asarray(KERNEL), rtol=1e-5)


def test_whole_number_targets_are_numbers():
  batch = example_batch()
  whole = batch | {"target": batch["target"].astype(np.int32)}
  as_floats = batch | {"target": whole["target"].astype(np.float32)}
  assert means(regression.make(), whole) == means(regression.make(), as_floats)


def test_outputs_and_targets_that_do_not_fit_are_told():
  batch = example_batch()
  with pytest.raises(UserError, match=r"config.task.target: 'target' has shape \(12, 2\) .* \(12, 1\)"):
    means(regression.make(), batch, KERNEL[:, :1])
  with pytest.raises(UserError, match=r"config.task.target: .*Did you mean 'target'"):
    means(regression.make(target="targets"), batch)
  with pytest.raises(UserError, match="config.task.delta"):
    regression.make(delta=0.0)
