"""Ops that mix each image with another of its batch: mixup and CutMix.

Example i is mixed with example i ^ 1 (0 with 1, 2 with 3, ...), by a coefficient drawn from example i's own key. So
a batch is mixed in the same way however many hosts it is spread over, as long as each holds an even number of
neighbouring examples. Labels become mixtures too, hence `one_hot` goes before.
"""

import zlib

import numpy as np

from bigjax.data.ops import array_op, feature
from bigjax.data.order import uniform
from bigjax.errors import UserError


@array_op
def mixup(alpha: float = 0.2, key: str = "image", label: str = "label"):
  """Blends each image and label with its neighbour's, by a weight from Beta(alpha, alpha); as float32.

  The larger weight goes to the example itself, which changes nothing for a pair taken together and keeps both
  examples of a pair in the batch. From "mixup: Beyond Empirical Risk Minimization", https://arxiv.org/abs/1710.09412.
  """
  salt = _salt("mixup", alpha)

  def apply(batch, keys):
    images, labels = _pairs(batch, key, label)
    own = _beta(uniform(keys, salt, 1)[:, 0], alpha)
    own = np.maximum(own, 1 - own)
    return {**batch, key: _blend(images, own), label: _blend(labels, own)}

  return apply


@array_op
def cutmix(alpha: float = 1.0, key: str = "image", label: str = "label"):
  """Pastes a rectangle of its neighbour into each image; labels are mixed by area.

  The rectangle has the image's aspect ratio, a random middle, and an area of 1 - lambda, lambda from
  Beta(alpha, alpha); what of it lies outside the image is cut off, and the labels' weights follow. From "CutMix:
  Regularization Strategy to Train Strong Classifiers", https://arxiv.org/abs/1905.04899.
  """
  salt = _salt("cutmix", alpha)

  def apply(batch, keys):
    images, labels = _pairs(batch, key, label)
    height, width = images.shape[1:3]
    u, y, x = uniform(keys, salt, 3).T
    side = np.sqrt(1 - _beta(u, alpha))
    high, wide = np.floor(height * side).astype(int), np.floor(width * side).astype(int)
    top, left = np.floor(y * height).astype(int) - high // 2, np.floor(x * width).astype(int) - wide // 2
    bottom, right = np.minimum(top + high, height), np.minimum(left + wide, width)
    top, left = np.maximum(top, 0), np.maximum(left, 0)
    pasted = images.copy()
    for i in range(len(images)):
      rectangle = np.s_[top[i] : bottom[i], left[i] : right[i]]
      pasted[i][rectangle] = images[i ^ 1][rectangle]
    own = 1 - (bottom - top) * (right - left) / (height * width)
    return {**batch, key: pasted, label: _blend(labels, own)}

  return apply


def _pairs(batch, key, label):
  images, labels = feature(batch, key), feature(batch, label)
  if labels.ndim < 2 or labels.dtype.kind != "f":
    raise UserError(f"{label!r} holds class numbers, which cannot be mixed. Put one_hot(num_classes) before this op.")
  if images.dtype == object or images.ndim < 3:
    raise UserError(f"{key!r} is not a batch of decoded images: {images.dtype}, shape {images.shape[1:]} each.")
  if len(images) % 2:
    raise UserError(
      f"examples are mixed in pairs, and {len(images)} is odd. Choose a batch_size that gives every host an even "
      "number of examples."
    )
  return images, labels


def _blend(values: np.ndarray, own: np.ndarray) -> np.ndarray:
  own = own.astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
  neighbours = values.reshape(-1, 2, *values.shape[1:])[:, ::-1].reshape(values.shape)
  blended = own * values
  blended += (1 - own) * neighbours
  return blended


def _beta(u: np.ndarray, alpha: float) -> np.ndarray:
  """Returns Beta(alpha, alpha) values at the quantiles `u`, so that one random number an example will do."""
  from scipy.special import betaincinv

  return betaincinv(alpha, alpha, u.astype(np.float64))


def _salt(name: str, alpha: float) -> int:
  if alpha <= 0:
    raise UserError("alpha must be greater than 0. To mix nothing, leave the op out.")
  return zlib.crc32(name.encode())
