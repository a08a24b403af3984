"""The classification evaluator: the numbers are scikit-learn's, whatever the batches, the padding and the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bigjax.errors import UserError
from bigjax.evaluators import classification

RNG = np.random.default_rng(0)
N, CLASSES = 50, 5
LOGITS = (RNG.normal(size=(N, CLASSES)) * 2).astype(np.float32)
LABELS = RNG.choice(CLASSES - 1, N, p=[0.4, 0.3, 0.2, 0.1])  # the last class has no example


def predict(state, batch):
  """A model that knows its answers by heart: the inputs are the logits."""
  return {"logits": batch["image"] * state}


def filled(x, size, value):
  return np.concatenate([x, np.full((size - len(x), *x.shape[1:]), value, x.dtype)])


def split(logits, labels, size=8, garbage=np.nan):
  """Returns a function that gives batches of `size`, the last one filled up with garbage."""

  def batches():
    for i in range(0, len(logits), size):
      image, label = logits[i : i + size], labels[i : i + size]
      yield {
        "image": filled(image, size, garbage),
        "label": filled(label, size, garbage if label.dtype.kind == "f" else -99),
        "mask": filled(np.ones(len(image), np.float32), size, 0),
      }

  return batches


def measure(logits=LOGITS, labels=LABELS, size=8, garbage=np.nan, **options):
  evaluator = classification.make(predict, split(logits, labels, size, garbage), **options)
  return dict(evaluator.run(jnp.float32(1)))


def test_accuracy_and_loss_by_numpy():
  found = measure()
  log_p = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
  assert found["accuracy"] == (LOGITS.argmax(-1) == LABELS).mean()
  np.testing.assert_allclose(found["loss"], -log_p[np.arange(N), LABELS].mean(), rtol=1e-5)


@pytest.mark.parametrize("average", ["macro", "micro", "weighted", None])
def test_precision_recall_f1_and_the_matrix_are_scikit_learns(average):
  from sklearn import metrics

  logits = LOGITS.copy()
  logits[:, 3] -= 20  # never predicted, though there are such examples
  true, predicted = LABELS, logits.argmax(-1)
  found = measure(logits, average=average, per_class=True, confusion=True)
  scores = lambda **options: metrics.precision_recall_fscore_support(true, predicted, zero_division=0, **options)
  mean, each = scores(average=average or "macro"), scores(average=None, labels=range(CLASSES))
  for i, name in enumerate(("precision", "recall", "f1")):
    assert found[name] == pytest.approx(mean[i])
    assert [found[f"{name}/{c}"] for c in range(CLASSES)] == pytest.approx(each[i])
  assert found["confusion_matrix"] == metrics.confusion_matrix(true, predicted, labels=range(CLASSES)).tolist()


@pytest.mark.parametrize("positive", [0, 1])
@pytest.mark.parametrize("outputs", [1, 2])
def test_two_classes_are_about_the_positive_one(positive, outputs):
  from sklearn import metrics

  true, logits = LABELS % 2, LOGITS[:, :outputs]
  score = logits[:, 0] if outputs == 1 else logits[:, 1] - logits[:, 0]
  found = measure(logits, true, positive=positive)
  expected = metrics.precision_recall_fscore_support(true, score > 0, pos_label=positive, average="binary")
  np.testing.assert_allclose([found[k] for k in ("precision", "recall", "f1")], expected[:3], rtol=1e-12)
  np.testing.assert_allclose(found["loss"], optax.sigmoid_binary_cross_entropy(score, true).mean(), rtol=1e-5)


def test_a_threshold_trades_recall_for_precision():
  true, logits = LABELS % 2, LOGITS[:, :1]
  for threshold in (0.2, 0.5, 0.8):
    predicted = 1 / (1 + np.exp(-logits[:, 0])) > threshold
    found = measure(logits, true, threshold=threshold)
    assert found["recall"] == pytest.approx(predicted[true == 1].mean())
    assert found["precision"] == pytest.approx((true[predicted] == 1).mean())


def test_several_labels_at_once_are_scikit_learns_too():
  from sklearn import metrics

  true = RNG.integers(0, 2, (N, CLASSES)).astype(np.float32)
  found = measure(labels=true, multilabel=True, per_class=True)
  expected = metrics.precision_recall_fscore_support(true, LOGITS > 0, average="macro")
  np.testing.assert_allclose([found[k] for k in ("precision", "recall", "f1")], expected[:3], rtol=1e-12)
  assert found["accuracy"] == metrics.accuracy_score(true, LOGITS > 0)
  np.testing.assert_allclose(found["loss"], optax.sigmoid_binary_cross_entropy(LOGITS, true).sum(-1).mean(), rtol=1e-5)


def test_top_k_by_numpy():
  found = measure(top_k=(1, 2, 3))
  ranked = np.argsort(-LOGITS, -1)
  for k in (1, 2, 3):
    assert found[f"top_{k}_accuracy"] == (ranked[:, :k] == LABELS[:, None]).any(-1).mean()
  assert found["top_1_accuracy"] == found["accuracy"]


def test_equal_logits_earn_no_more_than_their_place():
  # All logits equal: the first k classes are the likeliest k, as for argmax and jax.lax.top_k.
  found = measure(np.zeros((10, 5), np.float32), np.arange(10) % 5, top_k=(1, 2, 4))
  assert (found["accuracy"], found["top_1_accuracy"], found["top_2_accuracy"]) == (0.2, 0.2, 0.4)
  assert found["top_4_accuracy"] == 0.8
  ties = RNG.integers(0, 3, (N, CLASSES)).astype(np.float32)
  _, best = jax.lax.top_k(ties, 2)
  assert measure(ties, top_k=(2,))["top_2_accuracy"] == (best == LABELS[:, None]).any(-1).mean()


def test_nan_logits_are_never_among_the_top():
  found = measure(np.full((N, CLASSES), np.nan, np.float32), np.full(N, 3), top_k=(4,))
  assert (found["accuracy"], found["top_4_accuracy"]) == (0, 0)
  assert np.isnan(found["loss"])


ALL = {"top_k": (2,), "per_class": True, "confusion": True}


@pytest.mark.parametrize("size", [1, 7, 50, 64])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_neither_batch_size_nor_what_stands_in_the_padding_matters(size, garbage):
  found, expected = measure(size=size, garbage=garbage, **ALL), measure(size=10, **ALL)
  np.testing.assert_allclose(found.pop("loss"), expected.pop("loss"), rtol=1e-6)
  assert found == expected


def test_eight_devices_measure_what_one_does():
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  whole = split(LOGITS, LABELS)
  spread = lambda: ({k: put(v, "data") for k, v in batch.items()} for batch in whole())
  on_mesh = classification.make(predict, spread, **ALL)
  found, expected = dict(on_mesh.run(put(np.float32(1)))), measure(**ALL)
  np.testing.assert_allclose(found.pop("loss"), expected.pop("loss"), rtol=1e-6)
  assert found == expected


def test_a_model_whose_classes_are_split_over_devices_is_measured_too():
  mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
  split_classes = NamedSharding(mesh, PartitionSpec(None, "tensor"))
  logits, labels = np.tile(LOGITS, (1, 8)), RNG.integers(0, 40, N)
  spread = lambda: (
    jax.device_put(batch, {"image": split_classes, "label": whole, "mask": whole}) for batch in split(logits, labels)()
  )
  whole = NamedSharding(mesh, PartitionSpec())
  found = dict(classification.make(predict, spread, **ALL).run(jax.device_put(np.float32(1), whole)))
  expected = measure(logits, labels, **ALL)
  np.testing.assert_allclose(found.pop("loss"), expected.pop("loss"), rtol=1e-6)
  assert found == expected


def test_repeated_runs_compile_once_and_see_the_new_state():
  traces = []

  def counted(state, batch):
    traces.append(1)
    return predict(state, batch)

  evaluator = classification.make(counted, split(LOGITS, LABELS))
  losses = [dict(evaluator.run(jnp.float32(s)))["loss"] for s in (1, 2, 3)]
  assert len(set(losses)) == 3
  assert len(traces) == 1


def test_one_hot_labels_and_labels_in_a_column_are_understood():
  expected = measure(**ALL)
  for labels in (np.eye(CLASSES, dtype=np.float32)[LABELS], LABELS[:, None]):
    found = measure(labels=labels, **ALL)
    assert {k: v for k, v in found.items() if k != "loss"} == {k: v for k, v in expected.items() if k != "loss"}
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_the_sigmoids_loss_sums_over_classes():
  expected = optax.sigmoid_binary_cross_entropy(LOGITS, np.eye(CLASSES)[LABELS]).sum(-1).mean()
  np.testing.assert_allclose(measure(loss="sigmoid")["loss"], expected, rtol=1e-5)


def test_outputs_beyond_num_classes_are_ignored():
  padded = np.concatenate([LOGITS, np.full((N, 3), 100, np.float32)], -1)
  assert measure(padded, num_classes=CLASSES, **ALL) == measure(**ALL)


@pytest.mark.parametrize("label", [-1, 5, 1000])
def test_labels_out_of_range_are_counted_and_told(label):
  labels = LABELS.copy()
  labels[[3, 17]] = label
  with pytest.raises(UserError, match=r"2 of the values of 'label' lie outside the 5 classes"):
    measure(labels=labels, **ALL)


def test_values_are_plain_python():
  for name, value in measure(**ALL).items():
    assert type(value) is (list if name == "confusion_matrix" else float)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"top_k": (0,)}, "top_k"),
    ({"top_k": (5,)}, "give numbers below 5"),
    ({"threshold": 1.0}, "threshold"),
    ({"positive": 5}, "positive"),
    ({"num_classes": 6}, "num_classes=6"),
    ({"label": "lable"}, "Did you mean 'label'"),
    ({"multilabel": True, "confusion": True}, "multilabel"),
    ({"multilabel": True}, "number for each class"),
  ],
)
def test_options_that_make_no_sense_are_refused(options, message):
  with pytest.raises(UserError, match=r"^config\.evals") as error:
    measure(**options)
  assert message in str(error.value)


def test_a_split_without_examples_is_told():
  with pytest.raises(UserError, match="holds no example"):
    measure(LOGITS[:0], LABELS[:0])
