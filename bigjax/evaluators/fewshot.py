"""How much a few labelled examples teach a linear classifier on the model's features.

The probe of big_vision (https://github.com/google-research/big_vision, evaluators/fewshot_lsr.py; ViT, section 4.1,
https://arxiv.org/abs/2010.11929): least squares from whitened features to labels of -1 and 1, with an L2 penalty. It
has a closed form, so nothing is trained and nothing depends on a learning rate.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bigjax.errors import UserError
from bigjax.evaluators import totals


@dataclasses.dataclass(frozen=True)
class FewShot:
  """Fits linear classifiers on examples of one stream and tests them on another; made by `make`."""

  predict: Callable
  batches: Callable[[], Iterable[Mapping]]
  train_batches: Callable[[], Iterable[Mapping]]
  shots: tuple[int, ...]
  l2: tuple[float, ...]
  seeds: int
  features: str
  label: str

  def run(self, state) -> Iterator[tuple[str, float]]:
    """Yields "5shot", the accuracy with 5 training examples of each class, and so on for each of `shots`."""
    features, labels = self._training_set(state)
    if not np.isfinite(features).all():  # a model that diverged; there is nothing to fit a probe to
      yield from ((f"{shots}shot", math.nan) for shots in self.shots)
      return
    classes = int(labels.max()) + 1
    center = features.mean(0)
    probes = [
      _fit(features[ids] - center, labels[ids], classes, self.l2)
      for shots in self.shots
      for ids in (self._draw(labels, classes, shots, seed) for seed in range(self.seeds))
    ]
    kernel, bias = (np.stack(x).astype(np.float32) for x in zip(*probes))
    found = self._add_up(self.batches(), state, center.astype(np.float32), kernel, bias)
    totals.refuse_outside(found["outside"], self.label, f"{classes} classes, those of the training examples")
    accuracies = found["correct"].reshape(len(self.shots), self.seeds).mean(-1) / int(found["count"])
    for shots, accuracy in zip(self.shots, accuracies):
      yield f"{shots}shot", float(accuracy)

  def _training_set(self, state) -> tuple[np.ndarray, np.ndarray]:
    found = jax.device_get([self._read(state, batch) for batch in self.train_batches()])
    if not any(real.any() for *_, real in found):
      raise UserError("config.evals: the train_batches of fewshot hold no example; look at extra_data and its split")
    features, labels, real = (np.concatenate(x) for x in zip(*found))
    features, labels = features[real].astype(np.float64), labels[real].astype(np.int64)
    if labels.min() < 0:
      raise UserError(f"config.evals: {labels.min()} is a label of the train_batches of fewshot; classes count from 0")
    return features, labels

  def _draw(self, labels: np.ndarray, classes: int, shots: int, seed: int) -> np.ndarray:
    """Returns `shots` ids of each class that there is; those of fewer shots are among those of more."""
    order = np.random.default_rng(seed).permutation(len(labels))
    drawn = [order[labels[order] == c][:shots] for c in range(classes) if (labels == c).any()]
    fewest = min(drawn, key=len)
    if len(fewest) < shots:
      raise UserError(
        f"config.evals: shots={self.shots}, and there are {len(fewest)} examples of class {labels[fewest[0]]} in the "
        "train_batches of fewshot; give fewer shots, or more examples"
      )
    return np.concatenate(drawn)

  @functools.cached_property
  def _read(self) -> Callable:
    return totals.replicated(self._read_batch)

  @functools.cached_property
  def _add_up(self) -> Callable:
    return totals.over_batches(self._measure)

  def _read_batch(self, state, batch: Mapping) -> tuple[Array, Array, Array]:
    """Returns features [batch, width], labels [batch], and which of them are real."""
    found = self.predict(state, batch)
    if self.features not in found:
      raise UserError(f"config.evals: fewshot wants the model's {self.features!r}; it gives {', '.join(sorted(found))}")
    label = totals.read(batch, self.label, "label")
    if label.ndim != 1:
      raise UserError(f"config.evals: label={self.label!r} has shape {label.shape}; give integers [batch]")
    features = found[self.features].astype(jnp.float32)
    return features.reshape(len(features), -1), label, totals.read(batch, "mask") != 0

  def _measure(self, state, center: Array, kernel: Array, bias: Array, batch: Mapping) -> dict[str, Array]:
    features, label, real = self._read_batch(state, batch)
    # Half the digits would be lost to the bfloat16 products that are the default on a TPU.
    scores = jnp.einsum("bw,pwc->bpc", features - center[None], kernel, precision="highest") + bias[None]
    right = (scores.argmax(-1) == label[:, None]) & real[:, None]
    return {
      "count": real.sum(dtype=jnp.int32),
      "outside": totals.outside(label, real, kernel.shape[-1]),
      "correct": right.sum(0, dtype=jnp.int32),
    }


def _fit(
  features: np.ndarray, labels: np.ndarray, classes: int, l2: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns kernel [width, classes] and bias [classes] of the best probe among those of the penalties `l2`."""
  mean, std = features.mean(0), features.std(0) + 1e-5
  # A constant so large that the penalty leaves the bias alone.
  x = np.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)
  y = 2.0 * np.eye(classes)[labels] - 1.0
  # One decomposition serves all penalties; of x'x or of xx', whichever is smaller.
  tall = x.shape[0] >= x.shape[1]
  values, vectors = np.linalg.eigh(x.T @ x if tall else x @ x.T)
  values = np.maximum(values, 0.0)
  right = vectors.T @ (x.T @ y if tall else y)
  left = vectors if tall else x.T @ vectors
  best, weights = -1.0, None
  for penalty in sorted(l2, reverse=True):
    candidate = (left / (values + penalty)) @ right
    accuracy = 0.0
    if len(l2) > 1:
      leverage = np.square(x @ vectors) if tall else np.square(vectors) * values
      leverage = (leverage / (values + penalty)).sum(1)
      # What each example is given by a probe fitted without it.
      held_out = y - (y - x @ candidate) / np.maximum(1 - leverage, 1e-9)[:, None]
      accuracy = (held_out.argmax(1) == labels).mean()
    if accuracy > best:
      best, weights = accuracy, candidate
  kernel = weights[:-1] / std[:, None]
  return kernel, 100.0 * weights[-1] - mean @ kernel


def make(
  predict: Callable,
  batches: Callable[[], Iterable[Mapping]],
  *,
  train_batches: Callable[[], Iterable[Mapping]] | None = None,
  shots: tuple[int, ...] = (1, 5, 10),
  l2: tuple[float, ...] = (1024.0,),
  seeds: int = 3,
  features: str = "features",
  label: str = "label",
) -> FewShot:
  """Measures a linear probe on a few examples of each class: `extra_data=dict(train_batches=...)` gives them.

  The features of all training examples come to the host, so let that stream be thousands of examples, not millions.

  Args:
    predict: Function of (state, batch) that returns `features` [batch, width].
    batches: Gives the batches to test on, with `mask`.
    train_batches: Gives the batches to draw training examples from, with `mask`.
    shots: How many training examples of each class, for each accuracy to yield.
    l2: Penalties. Of several, each probe takes the one of the best leave-one-out accuracy on its own training examples
      (the larger of equals), so that no test label is used to choose; with one shot that is the largest.
    seeds: Over how many draws of training examples an accuracy is the mean.
    features: What of `predict` is the probe's input.
    label: Feature of the batches that holds the labels, integers [batch].
  """
  if train_batches is None:
    raise UserError(
      "config.evals: fewshot draws its examples from a second stream; give extra_data=dict(train_batches=...)"
    )
  if not shots or min(shots) < 1 or not l2 or not min(l2) > 0 or seeds < 1:
    raise UserError(f"config.evals: shots={shots}, l2={l2}, seeds={seeds}; all are above 0, and there is one or more")
  return FewShot(predict, batches, train_batches, shots, l2, seeds, features, label)
