"""How often a classifier is right, over a whole split, and where it is wrong."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from numpy.typing import ArrayLike

from bigjax.errors import UserError
from bigjax.evaluators import totals
from bigjax.evaluators.totals import Moments


@dataclasses.dataclass(frozen=True)
class Classification:
  """Measures a classifier; made by `make`."""

  predict: Callable
  batches: Callable[[], Iterable[Mapping]]
  num_classes: int | None
  top_k: tuple[int, ...]
  average: str | None
  per_class: bool
  confusion: bool
  activation: str
  multilabel: bool
  threshold: float
  positive: int
  label: str

  def run(self, state) -> Iterator[tuple[str, float | list[list[int]]]]:
    """Yields accuracy, loss, top_k_accuracy for each k, precision, recall, f1, and what else was asked for.

    Per class these are "precision/0" and so on; "confusion_matrix" is a nested list of counts, a row for each true
    class and a column for each predicted one.
    """
    found = self._add_up(self.batches(), state)
    classes, count = len(found["true"]), int(found["count"])
    totals.refuse_outside(found["outside"], self.label, f"{classes} classes")
    yield "accuracy", int(found["correct"]) / count
    yield "loss", float(found["loss"].mean)
    for k in self.top_k:
      yield f"top_{k}_accuracy", int(found[f"top_{k}"]) / count
    hits, predicted, true = (found[k].astype(np.float64) for k in ("hits", "predicted", "true"))
    rates = {"precision": (hits, predicted), "recall": (hits, true), "f1": (2 * hits, predicted + true)}
    for name, (part, whole) in rates.items():
      yield name, self._mean(part, whole, predicted, true)
    if self.per_class:
      for name, (part, whole) in rates.items():
        yield from ((f"{name}/{c}", float(rate)) for c, rate in enumerate(_ratio(part, whole)))
    if self.confusion:
      yield "confusion_matrix", found["confusion"].tolist()

  def _mean(self, part: np.ndarray, whole: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> float:
    average = self.average or ("binary" if len(true) == 2 and not self.multilabel else "macro")
    if average == "micro":
      return float(_ratio(part.sum(), whole.sum()))
    rates = _ratio(part, whole)
    if average == "binary":
      return float(rates[self.positive])
    weights = true if average == "weighted" else predicted + true > 0
    return float(_ratio((rates * weights).sum(), weights.sum()))

  @functools.cached_property
  def _add_up(self) -> Callable:
    return totals.over_batches(self._measure)

  def _measure(self, state, batch: Mapping) -> dict[str, Array | Moments]:
    logits = totals.read(self.predict(state, batch), "logits").astype(jnp.float32)
    real = totals.read(batch, "mask") != 0
    label = jnp.asarray(totals.read(batch, self.label, "label"))
    softmax = self.activation == "softmax" and not self.multilabel
    if logits.shape[-1] == 1 and not self.multilabel:  # two classes, of which the first has the logit 0
      logits, softmax = jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1), True
    logits = self._only_classes(logits)
    if label.ndim == 2 and label.shape[-1] == 1 and not self.multilabel:
      label = label[:, 0]
    if label.shape not in ((logits.shape,) if self.multilabel else (logits.shape[:1], logits.shape)):
      raise UserError(
        f"config.evals: label={self.label!r} has shape {label.shape} and the logits {logits.shape}; give a label for "
        "each example, or a number for each class"
      )
    # Padding may hold anything: it is put to zero here, and counts nothing below.
    logits = jnp.where(real[:, None], logits, 0.0)
    label = jnp.where(real.reshape(real.shape + (1,) * (label.ndim - 1)), label, jnp.zeros((), label.dtype))
    measure = self._measure_multilabel if self.multilabel else self._measure_single
    return {"count": real.sum(dtype=jnp.int32), **measure(logits, label, real, softmax)}

  def _measure_single(self, logits: Array, label: Array, real: Array, softmax: bool) -> dict[str, Array | Moments]:
    classes = logits.shape[-1]
    targets = label if label.ndim == 2 else jax.nn.one_hot(label, classes)
    loss = optax.safe_softmax_cross_entropy if softmax else optax.sigmoid_binary_cross_entropy
    losses = loss(logits, targets)
    label = label.argmax(-1) if label.ndim == 2 else label.astype(jnp.int32)
    predicted = logits.argmax(-1)
    if classes == 2:
      predicted = (logits[:, 1] - logits[:, 0] > _logit(self.threshold)).astype(jnp.int32)
    right = (predicted == label) & real
    found = {
      "outside": totals.outside(label, real, classes),
      "correct": right.sum(dtype=jnp.int32),
      "loss": Moments.of(losses if softmax else losses.sum(-1), real),
      "true": _count(label, real, classes),
      "predicted": _count(predicted, real, classes),
      "hits": _count(label, right, classes),
    }
    if self.top_k:
      # A class is ahead of the label's if its logit is larger, or equal and its number smaller, as argmax has it, or
      # NaN. So equal logits earn no more than chance.
      own = jnp.take_along_axis(logits, label[:, None], axis=-1, mode="clip")
      behind = (logits < own) | ((logits == own) & (jnp.arange(classes)[None] >= label[:, None]))
      rank = (~behind).sum(-1)
      found |= {f"top_{k}": ((rank < k) & real).sum(dtype=jnp.int32) for k in self.top_k}
    if self.confusion:
      found["confusion"] = _count((label, predicted), real, (classes, classes))
    return found

  def _measure_multilabel(self, logits: Array, label: Array, real: Array, softmax: bool) -> dict[str, Array | Moments]:
    del softmax  # several labels at once have no softmax
    predicted, true = logits > _logit(self.threshold), label > 0.5
    counts = lambda chosen: (chosen & real[:, None]).sum(0, dtype=jnp.int32)
    return {
      "outside": totals.outside(label, real[:, None], 2),
      "correct": ((predicted == true).all(-1) & real).sum(dtype=jnp.int32),
      "loss": Moments.of(optax.sigmoid_binary_cross_entropy(logits, label.astype(jnp.float32)).sum(-1), real),
      "true": counts(true),
      "predicted": counts(predicted),
      "hits": counts(true & predicted),
    }

  def _only_classes(self, logits: Array) -> Array:
    classes = self.num_classes or logits.shape[-1]
    if classes > logits.shape[-1]:
      raise UserError(f"config.evals: num_classes={classes}, and the model tells {logits.shape[-1]} apart")
    if self.top_k and max(self.top_k) >= classes:
      raise UserError(f"config.evals: top_k={self.top_k} of {classes} classes; give numbers below {classes}")
    if not 0 <= self.positive < classes:
      raise UserError(f"config.evals: positive={self.positive} is none of the {classes} classes")
    return logits[:, :classes]


def _count(values: Array | tuple[Array, ...], real: Array, shape: int | tuple[int, ...]) -> Array:
  return jnp.zeros(shape, jnp.int32).at[values].add(real.astype(jnp.int32), mode="drop")


def _ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
  return np.where(whole > 0, part / np.where(whole > 0, whole, 1), 0.0)


def _logit(probability: float) -> float:
  return math.log(probability / (1 - probability))


def make(
  predict: Callable,
  batches: Callable[[], Iterable[Mapping]],
  *,
  num_classes: int | None = None,
  top_k: tuple[int, ...] = (),
  average: Literal["binary", "macro", "micro", "weighted"] | None = None,
  per_class: bool = False,
  confusion: bool = False,
  loss: Literal["softmax", "sigmoid"] = "softmax",
  multilabel: bool = False,
  threshold: float = 0.5,
  positive: int = 1,
  label: str = "label",
) -> Classification:
  """Measures accuracy, loss, precision, recall and F1 of a classifier.

  The numbers are scikit-learn's: a precision that nothing was predicted for, or a recall without an example, is 0.

  Args:
    predict: Function of (state, batch) that returns `logits` [batch, classes]; one logit means two classes.
    batches: Gives the split's batches, with `mask`.
    num_classes: How many classes there are, where the model has more outputs than that; what is beyond is ignored.
    top_k: For each of these numbers, how often the label is among that many likeliest classes. Of equal logits the
      class of the smaller number goes first.
    average: What precision, recall and f1 are over classes: "binary", those of the class `positive`; "macro", the plain
      mean over the classes that occur as label or prediction; "weighted", the mean weighted by how often a class
      occurs; "micro", all decisions taken together. None is "binary" for two classes and "macro" for more.
    per_class: Whether to yield precision, recall and f1 of each class too.
    confusion: Whether to yield the confusion matrix too.
    loss: What `loss` is the mean of: "softmax" cross-entropy, or "sigmoid", summed over the classes.
    multilabel: Whether an example may be of any number of classes: the labels are then 0 or 1 for each class
      [batch, classes], accuracy asks that all be right, and the loss is the sigmoid's.
    threshold: The probability above which a class is predicted, when there are two, or with `multilabel`.
    positive: The class that "binary" is about.
    label: Feature of the batch that holds the labels, integers [batch] or numbers [batch, classes].
  """
  if top_k and min(top_k) < 1:
    raise UserError(f"config.evals: top_k={top_k}; give numbers from 1")
  if not 0 < threshold < 1:
    raise UserError(f"config.evals: threshold={threshold} is not between 0 and 1")
  if multilabel and (top_k or confusion or average == "binary"):
    raise UserError("config.evals: multilabel has no top_k, no confusion and no average='binary'; drop them")
  return Classification(
    predict, batches, num_classes, top_k, average, per_class, confusion, loss, multilabel, threshold, positive, label
  )
