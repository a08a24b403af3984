"""Classification: the loss is the definition's, padding adds exactly nothing, labels of every kind are understood."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from bigjax.errors import UserError
from bigjax.tasks import classification

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
KERNEL = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)


@dataclasses.dataclass
class Linear:
  """A model as small as the contract allows."""

  kernel: jax.Array
  dtype: str = "float32"

  def __call__(self, inputs, *, key=None, train=False):
    return (inputs @ self.kernel).astype(self.dtype)


class TwoPart(nnx.Module):
  def __init__(self, rngs):
    self.body, self.head = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)

  def features(self, inputs, *, key=None, train=False):
    return jnp.tanh(self.body(inputs))

  def __call__(self, inputs, *, key=None, train=False):
    return self.head(self.features(inputs, key=key, train=train))


def example_batch(n=16, padding=0, label=None):
  mask = np.ones(n, np.float32)
  mask[n - padding :] = 0
  return {
    "image": RNG.normal(size=(n, 6)).astype(np.float32),
    "label": RNG.integers(0, 4, n) if label is None else label,
    "mask": mask,
  }


def means(task, batch, kernel=KERNEL):
  return task.loss(Linear(kernel), batch, key=KEY).means()


def gradient(task, batch, kernel=KERNEL):
  return jax.grad(lambda kernel: means(task, batch, kernel)["loss"])(kernel)


def test_loss_and_accuracy_equal_numpys():
  batch = example_batch()
  found = means(classification.make(), batch)
  logits = batch["image"] @ np.asarray(KERNEL)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(found["loss"], -np.log(p[np.arange(16), batch["label"]]).mean(), rtol=1e-5)
  assert found["accuracy"] == (logits.argmax(-1) == batch["label"]).mean()


TASKS = {
  "softmax": {},
  "smooth": {"label_smoothing": 0.1},
  "weighted": {"class_weights": (0.5, 2.0, 0.0, 1.0), "label_smoothing": 0.1},
  "sigmoid": {"loss": "sigmoid"},
}


@pytest.mark.parametrize("options", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_padding_adds_exactly_nothing_to_sums_and_gradients(options, soft, garbage):
  batch = example_batch(padding=5)
  if soft:
    batch["label"] = RNG.dirichlet(np.ones(4), 16).astype(np.float32)
  spoilt = {k: v.copy() for k, v in batch.items()}
  spoilt["image"][11:] = garbage
  spoilt["label"][11:] = garbage if soft else -7
  task = classification.make(**options)
  short = {k: v[:11] for k, v in batch.items()}
  sums = [task.loss(Linear(KERNEL), b, key=KEY) for b in (batch, spoilt, short)]
  jax.tree.map(np.testing.assert_array_equal, sums[0], sums[1])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sums[1], sums[2])
  np.testing.assert_array_equal(gradient(task, batch), gradient(task, spoilt))
  np.testing.assert_allclose(gradient(task, spoilt), gradient(task, short), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("parts", [2, 8])
def test_a_batch_in_parts_adds_up_to_the_same_loss_and_gradient(options, parts):
  task, batch = classification.make(**options), example_batch(padding=3)
  pieces = [{k: v[i::parts] for k, v in batch.items()} for i in range(parts)]

  def in_parts(kernel):
    sums = [task.loss(Linear(kernel), piece, key=KEY) for piece in pieces]
    return sum(sums[1:], sums[0]).means()["loss"]

  np.testing.assert_allclose(in_parts(KERNEL), means(task, batch)["loss"], rtol=1e-5)
  np.testing.assert_allclose(jax.grad(in_parts)(KERNEL), gradient(task, batch), rtol=1e-4, atol=1e-6)


def test_eight_devices_give_the_sums_of_one():
  task, batch = classification.make(class_weights=(1.0, 2.0, 3.0, 4.0)), example_batch(padding=3)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  kernel = jax.device_put(KERNEL, NamedSharding(mesh, PartitionSpec()))
  found = jax.jit(lambda kernel, batch: task.loss(Linear(kernel), batch, key=KEY))(kernel, sharded)
  expected = task.loss(Linear(KERNEL), batch, key=KEY)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


@pytest.mark.parametrize("options", TASKS.values(), ids=TASKS)
def test_one_hot_labels_are_the_integers_they_stand_for(options):
  batch = example_batch()
  one_hot = batch | {"label": np.eye(4, dtype=np.float32)[batch["label"]]}
  task = classification.make(**options)
  for k, value in means(task, batch).items():
    np.testing.assert_allclose(means(task, one_hot)[k], value, rtol=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_of_a_mixup_target_is_the_mixture_of_the_losses(loss):
  # Both losses are linear in the target, which is what makes mixup of targets the mixup of losses.
  task, batch = classification.make(loss=loss, label_smoothing=0.1), example_batch()
  other, share = RNG.permutation(batch["label"]), 0.3
  hot = np.eye(4, dtype=np.float32)
  mixed = means(task, batch | {"label": share * hot[batch["label"]] + (1 - share) * hot[other]})
  apart = [means(task, batch | {"label": label})["loss"] for label in (batch["label"], other)]
  np.testing.assert_allclose(mixed["loss"], share * apart[0] + (1 - share) * apart[1], rtol=1e-5)


def test_a_mixed_example_is_right_when_its_larger_part_is_predicted():
  batch = {"image": np.eye(3, 6, dtype=np.float32), "mask": np.ones(3, np.float32)}
  kernel = jnp.zeros((6, 4)).at[:, 1].set(1.0)  # always predicts class 1
  batch["label"] = np.asarray([[0.4, 0.6, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.5, 0, 0]], np.float32)
  np.testing.assert_allclose(means(classification.make(), batch, kernel)["accuracy"], 2 / 3, rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_average_as_pytorch_does(smoothing):
  # torch.nn.functional.cross_entropy(weight=w, label_smoothing=s): weighted losses over the sum of the labels' weights.
  weights, batch = np.asarray([0.5, 2.0, 0.0, 3.0]), example_batch()
  logits = batch["image"].astype(np.float64) @ np.asarray(KERNEL, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -(weights * np.eye(4)[batch["label"]] * log_p).sum(-1)
  smooth = -(weights * log_p).sum(-1)
  expected = ((1 - smoothing) * nll + smoothing / 4 * smooth).sum() / weights[batch["label"]].sum()
  task = classification.make(class_weights=tuple(weights.tolist()), label_smoothing=smoothing)
  np.testing.assert_allclose(means(task, batch)["loss"], expected, rtol=1e-5)
  assert means(task, batch)["accuracy"] == (logits.argmax(-1) == batch["label"]).mean()  # that is never weighted


def test_class_weights_by_hand():
  # The log-normaliser of (2, 1, 0) is 2.407606, so the losses of classes 0 and 2 are 0.407606 and 2.407606.
  batch = {"image": np.asarray([[2.0, 1.0, 0.0]] * 2, np.float32), "label": np.asarray([0, 2]), "mask": np.ones(2)}
  task = classification.make(class_weights=(2.0, 1.0, 1.0))
  np.testing.assert_allclose(means(task, batch, jnp.eye(3))["loss"], (2 * 0.407606 + 2.407606) / 3, rtol=1e-5)


def test_sigmoid_loss_sums_over_classes_and_several_labels_are_allowed():
  batch = example_batch(label=RNG.integers(0, 2, (16, 4)))
  logits = batch["image"] @ np.asarray(KERNEL)
  p = 1 / (1 + np.exp(-logits))
  expected = -np.where(batch["label"] == 1, np.log(p), np.log(1 - p)).sum(-1).mean()
  np.testing.assert_allclose(means(classification.make(loss="sigmoid"), batch)["loss"], expected, rtol=1e-5)


def test_no_label_at_all_is_never_predicted_right():
  batch = example_batch(label=np.zeros((16, 4), np.int32))
  assert means(classification.make(loss="sigmoid"), batch)["accuracy"] == 0


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8", "float32"])
@pytest.mark.parametrize("column", [False, True])
def test_one_logit_is_binary_cross_entropy(loss, dtype, column):
  label = RNG.integers(0, 2, 16)
  batch = example_batch(label=label.astype(dtype)[:, None] if column else label.astype(dtype))
  found = means(classification.make(loss=loss), batch, KERNEL[:, :1])
  z = (batch["image"] @ np.asarray(KERNEL))[:, 0]
  np.testing.assert_allclose(found["loss"], optax.sigmoid_binary_cross_entropy(z, label).mean(), rtol=1e-5)
  assert found["accuracy"] == ((z > 0) == label).mean()


def test_one_logit_takes_class_weights_smoothing_and_probabilities():
  label = RNG.integers(0, 2, 16)
  batch, kernel = example_batch(label=label), KERNEL[:, :1]
  z = (batch["image"] @ np.asarray(KERNEL))[:, 0]
  weights = np.where(label == 1, 3.0, 0.5)
  expected = (optax.sigmoid_binary_cross_entropy(z, label) * weights).sum() / weights.sum()
  found = means(classification.make(class_weights=(0.5, 3.0)), batch, kernel)["loss"]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  found = means(classification.make(label_smoothing=0.2), batch, kernel)["loss"]
  np.testing.assert_allclose(found, optax.sigmoid_binary_cross_entropy(z, label * 0.8 + 0.1).mean(), rtol=1e-5)
  share = RNG.uniform(size=16).astype(np.float32)
  found = means(classification.make(), batch | {"label": share}, kernel)["loss"]
  np.testing.assert_allclose(found, optax.sigmoid_binary_cross_entropy(z, share).mean(), rtol=1e-5)


@pytest.mark.parametrize("options", TASKS.values(), ids=TASKS)
def test_a_label_that_is_no_class_shows_as_a_nan_loss(options):
  batch = example_batch()
  batch["label"][3] = 4
  assert np.isnan(means(classification.make(**options), batch)["loss"])


def test_bfloat16_logits_are_summed_in_float32():
  sums = classification.make().loss(Linear(KERNEL, "bfloat16"), example_batch(), key=KEY)
  assert {x.dtype for x in jax.tree.leaves(sums)} == {jnp.dtype("float32")}


def test_features_can_have_other_names():
  batch = example_batch()
  renamed = {"x": batch["image"], "y": batch["label"], "mask": batch["mask"]}
  assert means(classification.make(inputs="x", label="y"), renamed) == means(classification.make(), batch)


def test_predict_gives_logits_and_the_features_of_a_model_that_has_them():
  module, batch = TwoPart(nnx.Rngs(0)), example_batch()
  found = classification.make().predict(module, batch)
  np.testing.assert_allclose(found["logits"], module(batch["image"]), rtol=1e-6)
  np.testing.assert_allclose(found["features"], module.features(batch["image"]), rtol=1e-6)
  assert set(classification.make().predict(Linear(KERNEL), {"image": batch["image"]})) == {"logits"}


def test_features_beside_logits_cost_no_second_forward_pass():
  module = TwoPart(nnx.Rngs(0))
  flops = lambda f: jax.jit(f).lower(example_batch()["image"]).compile().cost_analysis()["flops"]
  both = flops(lambda x: classification.make().predict(module, {"image": x}))
  assert both == flops(module)


@pytest.mark.parametrize(
  ("options", "batch", "message"),
  [
    ({"inputs": "imaeg"}, {}, "config.task.inputs: the batch has no feature 'imaeg'. Did you mean 'image'"),
    ({"label": "lable"}, {}, "config.task.label: the batch has no feature 'lable'. Did you mean 'label'"),
    ({}, {"label": np.zeros((16, 3), np.float32)}, "logits have"),
    ({}, {"label": np.zeros(16, np.float32)}, "give integers"),
    ({"class_weights": (1.0, 2.0)}, {}, "2 weights for 4 classes"),
  ],
)
def test_a_batch_that_does_not_fit_is_told_with_the_remedy(options, batch, message):
  with pytest.raises(UserError, match=r"^config\.task\.") as error:
    means(classification.make(**options), example_batch() | batch)
  assert message in str(error.value)


@pytest.mark.parametrize(
  "options", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"class_weights": (-1.0,)}, {"class_weights": ()}]
)
def test_values_that_make_no_sense_are_refused_before_any_work(options):
  with pytest.raises(UserError, match=f"config.task.{next(iter(options))}"):
    classification.make(**options)
