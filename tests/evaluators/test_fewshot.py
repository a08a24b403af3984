"""The few-shot probe: perfect where features tell the classes apart, chance where they don't."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bigjax.errors import UserError
from bigjax.evaluators import fewshot

CLASSES, WIDTH = 4, 16


def predict(state, batch):
  return {"logits": batch["image"][:, :CLASSES], "features": batch["image"] * state}


def examples(n, apart, seed, width=WIDTH):
  """Gaussian clouds whose centres are `apart` standard deviations from 0, the same centres for every seed."""
  centers = np.random.default_rng(99).normal(size=(CLASSES, width))
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(n) % CLASSES)
  images = apart * centers[labels] + rng.normal(size=(n, width))
  return images.astype(np.float32), labels


def filled(x, size, value):
  return np.concatenate([x, np.full((size - len(x), *x.shape[1:]), value, x.dtype)])


def split(images, labels, size=16):
  def batches():
    for i in range(0, len(images), size):
      image, label = images[i : i + size], labels[i : i + size]
      yield {
        "image": filled(image, size, np.nan),
        "label": filled(label, size, -99),
        "mask": filled(np.ones(len(image), np.float32), size, 0),
      }

  return batches


def measure(test, train, state=1.0, size=16, **options):
  evaluator = fewshot.make(predict, split(*test, size), train_batches=split(*train, size), **options)
  return dict(evaluator.run(jnp.float32(state)))


def test_separable_features_are_told_apart_without_a_mistake():
  found = measure(examples(203, 10, 1), examples(101, 10, 2))
  assert found == {"1shot": 1.0, "5shot": 1.0, "10shot": 1.0}


def test_features_that_know_nothing_are_at_chance():
  # 800 draws at 1/4, three probes: a standard deviation of 0.015 at most.
  found = measure(examples(800, 0, 1), examples(101, 0, 2))
  assert all(abs(v - 1 / CLASSES) < 0.06 for v in found.values())


def test_more_shots_teach_more():
  found = measure(examples(800, 0.5, 1), examples(201, 0.5, 2), shots=(1, 5, 40), seeds=5)
  assert found["1shot"] < found["5shot"] < found["40shot"]


def ridge(train, train_labels, test, penalty):
  """The probe in primal form, straight from the definition."""
  mean, std = train.mean(0), train.std(0) + 1e-5
  pad = lambda x: np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
  x, y = pad(train.astype(np.float64)), 2.0 * np.eye(CLASSES)[train_labels] - 1
  weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
  return (pad(test) @ weights).argmax(-1)


@pytest.mark.parametrize("width", [4, 64])  # fewer and more than the examples: both forms of the solution
@pytest.mark.parametrize("penalty", [1.0, 1024.0])
def test_the_probe_is_the_ridge_regression_of_the_definition(width, penalty):
  test, train = examples(200, 0.5, 1, width), examples(5 * CLASSES, 0.5, 2, width)
  found = measure(test, train, shots=(5,), l2=(penalty,), seeds=1)["5shot"]
  assert found == (ridge(*train, test[0], penalty) == test[1]).mean()


@pytest.mark.parametrize("width", [4, 64])
def test_of_several_penalties_the_best_by_leaving_one_out_is_taken(width):
  (train, labels), penalties = examples(10 * CLASSES, 0.4, 2, width), (0.01, 10.0, 1e3, 1e5)
  kernel, bias = fewshot._fit(train.astype(np.float64), labels, CLASSES, penalties)
  # Leaving each example out in turn, whitened as before, and solving anew.
  mean, std = train.mean(0), train.std(0) + 1e-5
  x = np.pad((train - mean) / std, ((0, 0), (0, 1)), constant_values=100.0).astype(np.float64)
  y, accuracies = 2.0 * np.eye(CLASSES)[labels] - 1, {}
  for penalty in penalties:
    right = 0
    for i in range(len(x)):
      rest, goal = np.delete(x, i, 0), np.delete(y, i, 0)
      weights = np.linalg.solve(rest.T @ rest + penalty * np.eye(x.shape[1]), rest.T @ goal)
      right += (x[i] @ weights).argmax() == labels[i]
    accuracies[penalty] = right / len(x)
  best = max(penalties, key=lambda penalty: (accuracies[penalty], penalty))
  assert len(set(accuracies.values())) > 1
  alone = fewshot._fit(train.astype(np.float64), labels, CLASSES, (best,))
  np.testing.assert_array_equal(kernel, alone[0])
  np.testing.assert_array_equal(bias, alone[1])


def test_features_far_from_0_and_on_other_scales_make_no_difference():
  test, train = examples(200, 0.5, 1), examples(100, 0.5, 2)
  moved = [((100 + 0.01 * images).astype(np.float32), labels) for images, labels in (test, train)]
  found, expected = measure(*moved), measure(test, train)
  assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("size", [1, 64])
def test_neither_batch_size_nor_padding_matters(size):
  test, train = examples(50, 0.5, 1), examples(45, 0.5, 2)
  assert measure(test, train, size=size) == measure(test, train)


def test_logits_can_be_probed_where_there_are_no_features():
  assert set(measure(examples(50, 1, 1), examples(45, 1, 2), features="logits", shots=(2,))) == {"2shot"}


def test_eight_devices_measure_what_one_does():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  spread = lambda batches: lambda: (put(batch, "data") for batch in batches())
  test, train = examples(100, 0.5, 1), examples(101, 0.5, 2)
  evaluator = fewshot.make(predict, spread(split(*test)), train_batches=spread(split(*train)))
  assert dict(evaluator.run(put(np.float32(1)))) == measure(test, train)


def test_runs_of_new_states_compile_once():
  traces = []
  counted = lambda state, batch: traces.append(1) or predict(state, batch)
  test, train = examples(50, 1, 1), examples(45, 1, 2)
  evaluator = fewshot.make(counted, split(*test), train_batches=split(*train))
  for state in (1.0, 2.0, 3.0):
    dict(evaluator.run(jnp.float32(state)))
  assert len(traces) == 2  # once to read training examples, once to test


def test_a_diverged_model_measures_nan():
  found = measure(examples(50, 1, 1), examples(45, 1, 2), state=math.nan)
  assert all(math.isnan(v) for v in found.values())
  assert list(found) == ["1shot", "5shot", "10shot"]


def test_what_makes_no_sense_is_told_with_the_remedy():
  test, train = examples(50, 1, 1), examples(40, 1, 2)
  with pytest.raises(UserError, match="extra_data=dict"):
    fewshot.make(predict, split(*test))
  with pytest.raises(UserError, match=r"shots=\(11,\), and there are 10 examples of class"):
    measure(test, train, shots=(11,))
  with pytest.raises(UserError, match="hold no example"):
    measure(test, (train[0][:0], train[1][:0]))
  with pytest.raises(UserError, match="holds no example"):
    measure((test[0][:0], test[1][:0]), train)
  with pytest.raises(UserError, match="lie outside the 4 classes, those of the training examples"):
    measure((test[0], test[1] + 1), train)
  with pytest.raises(UserError, match="fewshot wants the model's 'pooled'; it gives features, logits"):
    measure(test, train, features="pooled")
  with pytest.raises(UserError, match="all are above 0"):
    measure(test, train, l2=())
