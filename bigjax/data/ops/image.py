"""Ops on images of any size, one at a time, in TensorFlow: decoding, resizing, cropping.

Once images are of one size, the ops of `pixels.py` work on whole batches. Sizes are pixels; an image is
[height, width, channel], as a rule uint8, and keeps its type.
"""

import re
from typing import Literal

from bigjax.data.ops import example_op, feature
from bigjax.errors import UserError

Method = Literal["bilinear", "bicubic", "area", "nearest", "lanczos3", "lanczos5", "gaussian", "mitchellcubic"]


@example_op
def decode(channels: Literal[0, 1, 3, 4] = 3, precise: bool = False, key: str = "image"):
  """Decodes JPEG, PNG, GIF (its first frame) or BMP bytes to uint8 [height, width, channels].

  Before `inception_crop` leave it out: that op then decodes no more than it crops, which is faster.

  Args:
    channels: 3 for colour, 1 for grey, 4 for colour with transparency, 0 for what the file has.
    precise: decode JPEG as PIL does to within a grey level, instead of faster (a tenth or so).
    key: the feature that holds the bytes.
  """

  def apply(example, seed):
    del seed
    import tensorflow as tf

    data = _encoded(tf, example, key)

    def whole():
      if precise:
        return tf.image.decode_jpeg(data, channels, dct_method="INTEGER_ACCURATE")
      return tf.io.decode_image(data, channels, expand_animations=False)

    image = _decoding(tf, key, data, whole)
    return {**example, key: tf.ensure_shape(image, (None, None, channels or None))}

  return apply


@example_op
def resize(
  size: int | tuple[int, int],
  method: Method = "bilinear",
  antialias: bool = True,
  key: str = "image",
):
  """Resizes to `size` on each side, or to (height, width), whatever the aspect ratio was."""
  height, width = _pair(size)

  def apply(example, seed):
    del seed
    import tensorflow as tf

    return {**example, key: _resized(tf, _decoded(tf, example, key), (height, width), method, antialias)}

  return apply


@example_op
def resize_small(size: int, method: Method = "bilinear", antialias: bool = True, key: str = "image"):
  """Resizes the shorter side to `size` and keeps the aspect ratio; `central_crop` usually follows."""
  _pair(size)

  def apply(example, seed):
    del seed
    import tensorflow as tf

    image = _decoded(tf, example, key)
    sides = tf.cast(tf.shape(image)[:2], tf.float32)
    target = tf.cast(tf.round(sides * (size / tf.reduce_min(sides))), tf.int32)
    return {**example, key: _resized(tf, image, target, method, antialias)}

  return apply


@example_op
def central_crop(size: int | tuple[int, int] | None = None, key: str = "image"):
  """Cuts the middle out, `size` on each side or (height, width); by default the largest square."""
  target = None if size is None else _pair(size)

  def apply(example, seed):
    del seed
    import tensorflow as tf

    image = _decoded(tf, example, key)
    sides = tf.shape(image)[:2]
    if target is None:
      crop = tf.repeat(tf.reduce_min(sides), 2)
    else:
      crop = tf.constant(target)
      sides = _fitting(tf, sides, crop, f"central_crop({size})")
    begin = (sides - crop) // 2
    cut = tf.slice(image, tf.concat([begin, [0]], 0), tf.concat([crop, [-1]], 0))
    return {**example, key: tf.ensure_shape(cut, (*(target or (None, None)), image.shape[-1]))}

  return apply


@example_op
def random_crop(
  size: int | tuple[int, int],
  padding: int = 0,
  mode: Literal["constant", "reflect"] = "constant",
  key: str = "image",
):
  """Cuts a random part out, `size` on each side or (height, width), after adding `padding` pixels all around.

  For images that are of that size already, `random_shift` does the same for a whole batch at once.
  """
  target = _pair(size)

  def apply(example, seed):
    import tensorflow as tf

    image = _decoded(tf, example, key)
    if padding:
      image = tf.pad(image, [[padding, padding], [padding, padding], [0, 0]], mode.upper())
    sides = _fitting(tf, tf.shape(image)[:2], tf.constant(target), f"random_crop({size})")
    begin = tf.random.stateless_uniform([2], seed, maxval=2**31 - 1, dtype=tf.int32) % (sides - target + 1)
    cut = tf.slice(image, tf.concat([begin, [0]], 0), [*target, -1])
    return {**example, key: tf.ensure_shape(cut, (*target, image.shape[-1]))}

  return apply


@example_op
def inception_crop(
  size: int | tuple[int, int],
  area_min: float = 5.0,
  area_max: float = 100.0,
  ratio_min: float = 3 / 4,
  ratio_max: float = 4 / 3,
  method: Method = "bilinear",
  antialias: bool = False,
  channels: Literal[1, 3] = 3,
  key: str = "image",
):
  """Cuts out a part of random area and aspect ratio and resizes it: the training crop of ImageNet.

  Takes a decoded image or its bytes; of a JPEG's bytes it decodes no more than it needs. From "Going Deeper with
  Convolutions", https://arxiv.org/abs/1409.4842, with the ranges of TensorFlow's and big_vision's Inception crop.

  Args:
    size: the result's sides.
    area_min: least part of the image's area, in percent (torchvision's RandomResizedCrop has 8).
    area_max: greatest part of the image's area, in percent.
    ratio_min: least width over height.
    ratio_max: greatest width over height.
    method: of resizing.
    antialias: smooths where it shrinks; slower.
    channels: 3 for colour, 1 for grey, where the bytes are decoded here.
    key: the feature.
  """
  target = _pair(size)
  if not 0 < area_min <= area_max <= 100:
    raise UserError("area_min and area_max are percents of the image, 0 < area_min <= area_max <= 100.")
  if not 0 < ratio_min <= ratio_max:
    raise UserError("the aspect ratios must be 0 < ratio_min <= ratio_max.")

  def apply(example, seed):
    import tensorflow as tf

    image = feature(example, key)

    def window(shape):
      begin, sides, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros([1, 0, 4]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(ratio_min, ratio_max),
        area_range=(area_min / 100, area_max / 100),
        use_image_if_no_bounding_boxes=True,
      )
      return begin, sides

    def of_jpeg():
      begin, sides = window(tf.image.extract_jpeg_shape(image))
      return tf.image.decode_and_crop_jpeg(image, tf.concat([begin[:2], sides[:2]], 0), channels)

    def of_pixels(pixels):
      return tf.slice(pixels, *window(tf.shape(pixels)))

    def of_other():
      return of_pixels(tf.io.decode_image(image, channels, expand_animations=False))

    if image.dtype == tf.string:
      crop = _decoding(tf, key, image, lambda: tf.cond(tf.io.is_jpeg(image), of_jpeg, of_other))
      crop = tf.ensure_shape(crop, (None, None, channels))
    else:
      crop = tf.ensure_shape(of_pixels(image), (None, None, image.shape[-1]))
    return {**example, key: _resized(tf, crop, target, method, antialias)}

  return apply


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
  pair = (size, size) if isinstance(size, int) else size
  if min(pair) < 1:
    raise UserError("a size is 1 pixel or more.")
  return pair


def _resized(tf, image, size, method, antialias):
  resized = tf.image.resize(image, size, method=method, antialias=antialias)
  if image.dtype.is_floating or resized.dtype == image.dtype:
    return tf.cast(resized, image.dtype)
  if method not in ("bilinear", "area", "gaussian"):  # The others leave the range of the type.
    resized = tf.clip_by_value(resized, image.dtype.min, image.dtype.max)
  return tf.cast(tf.round(resized), image.dtype)


def _encoded(tf, example, key):
  data = feature(example, key)
  if data.dtype != tf.string:
    raise UserError(f"{key!r} is not encoded: it is {data.dtype.name} already. Leave this op out.")
  return data


def _decoded(tf, example, key):
  image = feature(example, key)
  if image.dtype == tf.string:
    raise UserError(f"{key!r} is encoded still. Put decode before this op.")
  if image.shape.rank not in (3, None):
    raise UserError(f"{key!r} has shape {tuple(image.shape)}, not (height, width, channel).")
  return image


def _decoding(tf, key, data, decoding):
  """Runs `decoding`, with an error for the person who has the file where TensorFlow runs eagerly, and can be caught."""
  if not tf.executing_eagerly():
    return decoding()
  try:
    return decoding()
  except tf.errors.InvalidArgumentError as e:
    size = len(data.numpy())
    reason = re.sub(r"\{\{.*?\}\}\s*|\s*\[Op:.*", "", str(e.message)).strip().rstrip(".")
    raise UserError(
      f"{key!r} is not a whole JPEG, PNG, GIF or BMP image ({size:,} bytes; {reason}). It was cut short or damaged: "
      "get the file again, or take it out, and prepare the dataset anew (`bigjax data prepare` finds such files)."
    ) from None


def _fitting(tf, sides, crop, name):
  fits = tf.debugging.assert_greater_equal(
    sides, crop, f"{name}: the image is smaller than the crop; put resize_small before it."
  )
  with tf.control_dependencies([] if fits is None else [fits]):
    return tf.identity(sides)
