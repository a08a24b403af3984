"""One label an example, or a distribution over the classes, or several labels at once."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from bigjax.errors import UserError
from bigjax.sums import Sums
from bigjax.tasks import features
from bigjax.tasks.losses import correct, cross_entropy


@dataclasses.dataclass(frozen=True)
class Classification:
  """Learns classes from `inputs` and `label`; made by `make`."""

  activation: str
  label_smoothing: float
  class_weights: tuple[float, ...] | None
  inputs: str
  label: str

  def loss(self, module, batch: Mapping, *, key: Array) -> Sums:
    """Returns the cross-entropy in nats and the top-1 accuracy, summed over the unmasked examples of `batch`.

    `label` holds integers [batch], or numbers [batch, classes]: probabilities (mixup, one-hot), or with the sigmoid
    loss any set of classes. One logit means two classes, of which the first has the logit 0; probabilities [batch]
    are then those of the second. A label that is none of the classes makes the loss NaN.
    """
    logits = module(features.read(batch, self.inputs, "inputs"), key=key, train=True).astype(jnp.float32)
    softmax = self.activation == "softmax" or logits.shape[-1] == 1
    logits, label = self._classes(logits, features.read(batch, self.label, "label"))
    mask = features.mask(batch, logits)
    if label.ndim == 1 and softmax and self.class_weights is None:
      losses = cross_entropy(logits, label, label_smoothing=self.label_smoothing)
      return Sums.of(losses, weight=mask, accuracy=correct(logits, label))
    targets = label if label.ndim == 2 else _one_hot(label, logits.shape[-1])
    losses, weights = self._weighted(logits, targets, softmax)
    chosen = jnp.take_along_axis(targets, logits.argmax(-1)[:, None], axis=-1)[:, 0]
    sums = Sums.of(losses, weight=mask, accuracy=(chosen > 0) & (chosen == targets.max(-1)))
    return dataclasses.replace(sums, weights=sums.weights | {"loss": (weights * mask).sum()})

  def predict(self, module, batch: Mapping) -> dict[str, Array]:
    """Returns `logits` [batch, classes], and `features` [batch, width] where the module has them."""
    return features.outputs(module, features.read(batch, self.inputs, "inputs"))

  def check(self, batch: Mapping[str, np.ndarray], outputs: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises `UserError` for a label in a NumPy batch that none of the model's `outputs` stands for."""
    features.check_range(batch, self.label, max(2, outputs["logits"].shape[-1]))

  def _classes(self, logits: Array, label: Array) -> tuple[Array, Array]:
    """Returns logits over at least two classes, and labels as integers [batch] or numbers [batch, classes]."""
    batch, classes = logits.shape
    if label.ndim == 2 and label.shape[-1] == 1:
      label = label[:, 0]
    if classes == 1:
      logits, classes = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1), 2
      if label.ndim == 1 and jnp.issubdtype(label.dtype, jnp.floating):
        label = jnp.stack([1 - label, label], axis=-1)
    if label.ndim == 1 and jnp.issubdtype(label.dtype, jnp.floating):
      raise UserError(
        f"config.task.label: {self.label!r} is {label.dtype}[{batch}] and the model has {classes} classes; "
        "give integers, or a number for each class"
      )
    if label.shape not in ((batch,), (batch, classes)):
      raise UserError(
        f"config.task.label: {self.label!r} has shape {label.shape} and the logits have {(batch, classes)}; "
        f"give labels [{batch}] or [{batch}, {classes}], or a model with as many classes"
      )
    if self.class_weights is not None and len(self.class_weights) != classes:
      raise UserError(
        f"config.task.class_weights: {len(self.class_weights)} weights for {classes} classes; give one for each"
      )
    return logits, label.astype(jnp.int32 if label.ndim == 1 else jnp.float32)

  def _weighted(self, logits: Array, targets: Array, softmax: bool) -> tuple[Array, Array]:
    """Returns each example's loss, and the weight that a sum of such losses is divided by."""
    examples, classes = logits.shape
    ones = jnp.ones(examples)
    class_weights = jnp.asarray([self.class_weights or (1.0,) * classes], jnp.float32)
    if softmax:
      smooth = optax.smooth_labels(targets, self.label_smoothing)
      losses = -(class_weights * smooth * jax.nn.log_softmax(logits)).sum(-1)
      return losses, (class_weights * targets).sum(-1) if self.class_weights else ones
    smooth = (1 - self.label_smoothing) * targets + self.label_smoothing / 2
    return (class_weights * optax.sigmoid_binary_cross_entropy(logits, smooth)).sum(-1), ones


def _one_hot(label: Array, classes: int) -> Array:
  known = (label >= 0) & (label < classes)
  return jnp.where(known[:, None], jax.nn.one_hot(label, classes), jnp.nan)


def make(
  *,
  loss: Literal["softmax", "sigmoid"] = "softmax",
  label_smoothing: float = 0.0,
  class_weights: tuple[float, ...] | None = None,
  inputs: str = "image",
  label: str = "label",
) -> Classification:
  """Learns which class an example is of.

  Args:
    loss: "softmax" for one class an example; "sigmoid" for a yes or no to each class, summed over the classes (as
      big_vision has it). A model of one logit learns two classes, and both words then mean the same.
    label_smoothing: Part of the target that is spread evenly: over all classes with softmax
      (https://arxiv.org/abs/1512.00567), over yes and no with sigmoid.
    class_weights: A weight for each class. With softmax the mean is PyTorch's: the sum of the weighted losses over
      the sum of the labels' weights, with smoothing too; soft labels weigh what their classes weigh on average, so that
      one-hot labels and integers agree (PyTorch divides those by the number of examples). With sigmoid each class's
      term is multiplied, and the mean is over examples.
    inputs: Feature of the batch that the model is given.
    label: Feature of the batch that holds the labels.
  """
  if not 0 <= label_smoothing < 1:
    raise UserError(f"config.task.label_smoothing: {label_smoothing} is outside 0 <= label_smoothing < 1")
  if class_weights is not None and (not class_weights or min(class_weights) < 0 or not max(class_weights) > 0):
    raise UserError(f"config.task.class_weights: {class_weights}; weights are 0 or more, and not all of them 0")
  return Classification(loss, label_smoothing, class_weights, inputs, label)
