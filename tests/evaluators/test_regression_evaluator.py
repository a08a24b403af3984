"""The regression evaluator against NumPy, with several outputs, padding, and targets far from 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bigjax.errors import UserError
from bigjax.evaluators import regression

RNG = np.random.default_rng(0)
N = 50
TARGETS = (RNG.normal(size=(N, 2)) * [1, 5] + [3, -2]).astype(np.float32)
OUTPUTS = TARGETS + RNG.normal(size=(N, 2)).astype(np.float32)


def predict(state, batch):
  return {"logits": batch["x"] + state}


def filled(x, size, value):
  return np.concatenate([x, np.full((size - len(x), *x.shape[1:]), value, x.dtype)])


def split(outputs, targets, size=8):
  def batches():
    for i in range(0, len(outputs), size):
      x, target = outputs[i : i + size], targets[i : i + size]
      mask = filled(np.ones(len(x), np.float32), size, 0)
      yield {"x": filled(x, size, np.nan), "target": filled(target, size, np.nan), "mask": mask}

  return batches


def measure(outputs=OUTPUTS, targets=TARGETS, size=8, **options):
  return dict(regression.make(predict, split(outputs, targets, size), **options).run(jnp.float32(0)))


@pytest.mark.parametrize("size", [1, 8, 50, 64])
def test_measures_equal_numpys_and_padding_of_nan_never_counts(size):
  error = OUTPUTS.astype(np.float64) - TARGETS
  mse, r2 = np.square(error).mean(0), 1 - np.square(error).mean(0) / TARGETS.astype(np.float64).var(0)
  found = measure(size=size, per_output=True)
  expected = {"mse": mse.mean(), "rmse": mse.mean() ** 0.5, "mae": np.abs(error).mean(), "r2": r2.mean()}
  for k in range(2):
    expected |= {f"mse/{k}": mse[k], f"rmse/{k}": mse[k] ** 0.5, f"mae/{k}": np.abs(error).mean(0)[k], f"r2/{k}": r2[k]}
  assert found == pytest.approx(expected, rel=1e-5)
  assert {type(v) for v in found.values()} == {float}


def test_r2_is_right_where_a_sum_of_squares_would_cancel():
  found = measure(OUTPUTS + 1e4, TARGETS + 1e4)
  targets, error = (TARGETS + 1e4).astype(np.float64), (OUTPUTS + 1e4).astype(np.float64) - (TARGETS + 1e4)
  assert found["r2"] == pytest.approx((1 - np.square(error).mean(0) / targets.var(0)).mean(), abs=1e-3)


def test_the_mean_predicts_with_r2_0_and_constant_targets_are_explained_wholly_or_not():
  targets = TARGETS[:, 0]
  assert measure(np.full(N, targets.mean()), targets)["r2"] == pytest.approx(0, abs=1e-6)
  constant = np.full(N, 2.0, np.float32)
  assert measure(constant, constant)["r2"] == 1
  assert measure(constant + 1, constant)["r2"] == 0


def test_a_column_of_outputs_meets_flat_targets_row_by_row():
  found = measure(OUTPUTS[:, :1], TARGETS[:, 0])
  assert found == measure(OUTPUTS[:, 0], TARGETS[:, 0])
  assert found["mse"] == pytest.approx(np.square(OUTPUTS[:, 0] - TARGETS[:, 0]).mean(), rel=1e-5)


def test_eight_devices_measure_what_one_does():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  spread = lambda: (put(batch, "data") for batch in split(OUTPUTS, TARGETS)())
  found = dict(regression.make(predict, spread).run(put(np.float32(0))))
  assert found == pytest.approx(measure(), rel=1e-6)


def test_what_does_not_fit_is_told():
  with pytest.raises(UserError, match=r"config.evals: target='target' has shape \(8, 2\)"):
    measure(OUTPUTS[:, :1])
  with pytest.raises(UserError, match="Did you mean 'target'"):
    measure(target="targets")
  with pytest.raises(UserError, match="holds no example"):
    measure(OUTPUTS[:0], TARGETS[:0])


def test_runs_of_new_states_compile_once():
  traces = []
  counted = lambda state, batch: traces.append(1) or predict(state, batch)
  evaluator = regression.make(counted, split(OUTPUTS, TARGETS))
  assert len({dict(evaluator.run(jax.numpy.float32(s)))["mse"] for s in range(3)}) == 3
  assert len(traces) == 1
