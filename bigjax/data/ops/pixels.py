"""Ops on batches of images of one size, in NumPy: values, flips, shifts, small distortions.

An image batch is [B, height, width, channel], or [B, height, width] where there are no channels.
Work is done in blocks that stay in the processor's cache, which for large images is twice as fast.
"""

import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

from bigjax.data.ops import array_op, feature
from bigjax.data.order import uniform
from bigjax.errors import UserError


@array_op
def flip_lr(probability: float = 0.5, key: str = "image"):
  """Mirrors images, left for right, each with the probability given."""
  salt = _salt("flip_lr")

  def apply(batch, keys):
    images = _images(batch, key)
    flips = uniform(keys, salt, 1)[:, 0] < probability
    # Whole pixels are moved, not channel by channel: three times as fast.
    pixels = np.ascontiguousarray(images)
    pixels = pixels.view(f"V{images[:1, :1, :1].nbytes}") if images.ndim == 4 and images.size else pixels
    flipped = np.empty_like(pixels)
    for block in _blocks(images):
      flipped[block] = pixels[block]
      chosen = np.flatnonzero(flips[block]) + block.start
      flipped[chosen] = pixels[chosen, :, ::-1]
    return {**batch, key: flipped.view(images.dtype)}

  return apply


@array_op
def value_range(
  vmin: float = -1.0,
  vmax: float = 1.0,
  in_min: float = 0.0,
  in_max: float = 255.0,
  clip: bool = False,
  key: str = "image",
):
  """Maps the values `in_min` to `in_max` onto `vmin` to `vmax`, as float32; `clip` cuts off what lies outside."""
  if in_min >= in_max:
    raise UserError("in_min must be less than in_max.")
  scale = (vmax - vmin) / (in_max - in_min)

  def apply(batch, keys):
    del keys
    values = _scaled(feature(batch, key), scale, vmin - in_min * scale)
    return {**batch, key: np.clip(values, min(vmin, vmax), max(vmin, vmax), out=values) if clip else values}

  return apply


@array_op
def standardize(mean: float | tuple[float, ...], std: float | tuple[float, ...], key: str = "image"):
  """Subtracts `mean` and divides by `std`, numbers for all or one for each channel (the last axis), as float32.

  They are in the units the values have at this point: after `value_range(0, 1)` between 0 and 1.
  """
  mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
  if (std <= 0).any():
    raise UserError("std must be greater than 0.")

  def apply(batch, keys):
    del keys
    values = feature(batch, key)
    for what in (mean, std):
      if what.ndim and what.size not in (1, values.shape[-1]):
        raise UserError(f"{what.size} numbers for {values.shape[-1]} channels: give one, or one for each.")
    return {**batch, key: _scaled(values, 1 / std, -mean / std)}

  return apply


@array_op
def pad(pixels: int, value: float = 0.0, key: str = "image"):
  """Adds `pixels` of `value` on every side: MNIST's 28 x 28 become 32 x 32 with `pad(2)`."""

  def apply(batch, keys):
    del keys
    return {**batch, key: _padded(_images(batch, key), pixels, "constant", value)}

  return apply


@array_op
def random_shift(pixels: int, mode: Literal["constant", "reflect"] = "constant", key: str = "image"):
  """Moves each image by up to `pixels` in both directions: pad and crop, as is usual for CIFAR (with 4).

  What comes in from outside is 0 (`constant`) or the image mirrored (`reflect`).
  """
  salt = _salt("random_shift")
  if pixels < 1:
    raise UserError("pixels must be 1 or more.")

  def apply(batch, keys):
    images = _images(batch, key)
    height, width = images.shape[1:3]
    shifts = np.floor(uniform(keys, salt, 2) * (2 * pixels + 1)).astype(int)
    shifted = np.empty_like(images)
    for block in _blocks(images):
      padded = _padded(images[block], pixels, mode)
      for i, (y, x) in enumerate(shifts[block]):
        shifted[block.start + i] = padded[i, y : y + height, x : x + width]
    return {**batch, key: shifted}

  return apply


@array_op
def random_affine(
  degrees: float = 0.0,
  translate: float = 0.0,
  scale: tuple[float, float] = (1.0, 1.0),
  shear: float = 0.0,
  fill: float = 0.0,
  key: str = "image",
):
  """Turns, moves, scales and slants each image about its middle, a little and at random, with bilinear sampling.

  Args:
    degrees: turned by up to so many degrees either way.
    translate: moved by up to this part of the width and of the height either way.
    scale: smallest and largest factor of size.
    shear: slanted by up to so many degrees either way.
    fill: value outside the image.
    key: the feature.
  """
  salt = _salt("random_affine")
  if not 0 < scale[0] <= scale[1]:
    raise UserError("scale is the smallest and the largest factor, both greater than 0.")

  def apply(batch, keys):
    images = _images(batch, key)
    height, width = images.shape[1:3]
    u = uniform(keys, salt, 5)
    signed = 2 * u - 1
    angle, slant = np.deg2rad(degrees) * signed[:, 0], np.tan(np.deg2rad(shear) * signed[:, 1])
    factor = scale[0] + (scale[1] - scale[0]) * u[:, 2]
    moved = translate * signed[:, 3:] * (height, width)
    # Rows of the inverse map, (y, x) of the result to (y, x) of the source: unscale, then unturn, then unslant.
    cos, sin = np.cos(angle) / factor, np.sin(angle) / factor
    inverse = np.stack([cos, -sin, sin - slant * cos, cos + slant * sin], 1).reshape(-1, 2, 2)
    warped = np.empty_like(images)
    for block in _blocks(images, 2**16):
      warped[block] = warp(images[block], inverse[block], moved[block], fill)
    return {**batch, key: warped}

  return apply


@array_op
def random_erasing(
  probability: float = 0.25,
  area_min: float = 2.0,
  area_max: float = 33.0,
  ratio_min: float = 0.3,
  fill: float = 0.0,
  key: str = "image",
):
  """Paints a random rectangle with `fill`, on each image with the probability given.

  From "Random Erasing Data Augmentation", https://arxiv.org/abs/1708.04896, with its ranges: an area of 2 to 33
  percent, an aspect ratio of `ratio_min` to 1 / `ratio_min`. A rectangle larger than the image is cut to it.
  """
  salt = _salt("random_erasing")
  if not 0 < area_min <= area_max <= 100 or not 0 < ratio_min <= 1:
    raise UserError("need 0 < area_min <= area_max <= 100 (percent) and 0 < ratio_min <= 1.")

  def apply(batch, keys):
    erased = _images(batch, key).copy()
    height, width = erased.shape[1:3]
    chosen, area, ratio, y, x = uniform(keys, salt, 5).T
    area = height * width * (area_min + (area_max - area_min) * area) / 100
    ratio = ratio_min ** (1 - 2 * ratio)
    high = np.clip(np.round(np.sqrt(area * ratio)), 1, height).astype(int)
    wide = np.clip(np.round(np.sqrt(area / ratio)), 1, width).astype(int)
    top = np.floor(y * (height - high + 1)).astype(int)
    left = np.floor(x * (width - wide + 1)).astype(int)
    for i in np.flatnonzero(chosen < probability):
      erased[i, top[i] : top[i] + high[i], left[i] : left[i] + wide[i]] = fill
    return {**batch, key: erased}

  return apply


def warp(images: np.ndarray, inverse: np.ndarray, moved: np.ndarray, fill: float = 0.0) -> np.ndarray:
  """Samples each image [B, height, width, ...] where a linear map sends the result's pixels.

  The pixel at `p` of the result is the source at `inverse @ (p - middle - moved) + middle`, `p` being (y, x), by
  bilinear interpolation; outside the source is `fill`. `inverse` is [B, 2, 2], `moved` [B, 2].
  """
  count, height, width = images.shape[:3]
  middle = np.array([(height - 1) / 2, (width - 1) / 2])
  # Inverse maps are sums of a part by row and a part by column. A border of `fill` is added, and coordinates outside
  # are moved onto it.
  rows = inverse[..., :1] * (np.arange(height) - middle[0] - moved[:, :1])[:, None]
  columns = inverse[..., 1:] * (np.arange(width) - middle[1] - moved[:, 1:])[:, None]
  rows, columns = (rows + middle[:, None] + 1).astype(np.float32)[..., None], columns.astype(np.float32)[..., None, :]
  y = np.clip(rows[:, 0] + columns[:, 0], 0, height + 1)
  x = np.clip(rows[:, 1] + columns[:, 1], 0, width + 1)
  top, left = np.minimum(y.astype(np.int32), height), np.minimum(x.astype(np.int32), width)
  down, right = (y - top)[..., None], (x - left)[..., None]
  pixels = _padded(images, 1, "constant", fill).reshape(count * (height + 2) * (width + 2), -1).astype(np.float32)
  corner = top * (width + 2) + left + (np.arange(count) * ((height + 2) * (width + 2)))[:, None, None]

  def between(start):
    first = pixels.take(start, 0)
    return first + (pixels.take(start + 1, 0) - first) * right

  above = between(corner)
  above += (between(corner + (width + 2)) - above) * down
  result = above.reshape(images.shape)
  return (np.round(result) if images.dtype.kind in "iu" else result).astype(images.dtype)


def _images(batch, key: str) -> np.ndarray:
  images = feature(batch, key)
  if images.dtype == object:
    raise UserError(f"{key!r} is encoded still. Put decode before this op.")
  if images.ndim not in (3, 4):
    raise UserError(f"{key!r} has shape {images.shape[1:]}, not (height, width) or (height, width, channel).")
  return images


def _blocks(values: np.ndarray, size: int = 2**18) -> Iterator[slice]:
  """Yields slices of the first axis that hold about `size` numbers each."""
  step = max(1, size // max(1, values[:1].size))
  for start in range(0, len(values), step):
    yield slice(start, min(start + step, len(values)))


def _scaled(values: np.ndarray, scale, offset) -> np.ndarray:
  scaled = np.empty(values.shape, np.float32)
  scale, offset = np.asarray(scale, np.float32), np.asarray(offset, np.float32)
  for block in _blocks(values):
    np.multiply(values[block], scale, out=scaled[block], dtype=np.float32, casting="unsafe")
    scaled[block] += offset
  return scaled


def _padded(images: np.ndarray, pixels: int, mode: str, value: float = 0.0) -> np.ndarray:
  widths = [(0, 0), (pixels, pixels), (pixels, pixels)] + [(0, 0)] * (images.ndim - 3)
  return np.pad(images, widths, mode, **({"constant_values": value} if mode == "constant" else {}))


def _salt(name: str) -> int:
  """Gives each op random numbers of its own from the same keys."""
  return zlib.crc32(name.encode())
