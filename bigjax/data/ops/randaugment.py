"""RandAugment: a few operations drawn at random from sixteen, all of one strength.

From "RandAugment: Practical automated data augmentation with a reduced search space",
https://arxiv.org/abs/1909.13719; the operations and what a magnitude means to each are those of EfficientNet's and
big_vision's code (`Contrast` is PIL's, with the mean grey level; theirs has another constant in its place).
"""

import math

from bigjax.data.ops import example_op, feature
from bigjax.errors import UserError

_GREY = 128  # What is seen where a moved image has uncovered nothing.


@example_op
def randaugment(num_layers: int = 2, magnitude: float = 10.0, key: str = "image"):
  """Applies `num_layers` operations drawn at random to a uint8 colour image, before its values are rescaled.

  Args:
    num_layers: operations one after the other, usually 1 to 3.
    magnitude: strength of them all; 10 is the full range of the operations, 5 to 30 are usual.
    key: the feature.
  """
  if num_layers < 1 or magnitude < 0:
    raise UserError("num_layers must be 1 or more, magnitude 0 or more.")

  def apply(example, seed):
    import tensorflow as tf

    image = feature(example, key)
    if image.dtype != tf.uint8 or image.shape[-1] != 3:
      raise UserError(
        f"{key!r} is {image.dtype.name} with shape {tuple(image.shape)}: RandAugment is for decoded uint8 images of 3 "
        "channels. Put it after decode, and before value_range or standardize."
      )
    shape = image.shape
    for layer in range(num_layers):
      draw = tf.random.experimental.stateless_fold_in(seed, layer)
      choice = tf.random.stateless_uniform([], draw, maxval=len(OPERATIONS), dtype=tf.int32)
      # Sign of a turn or a move, and the middle of a cutout.
      u = tf.random.stateless_uniform([3], tf.random.experimental.stateless_fold_in(draw, 1))
      branches = [lambda f=f, image=image, u=u: f(tf, image, magnitude / 10, u) for f in OPERATIONS.values()]
      image = tf.ensure_shape(tf.switch_case(choice, branches), shape)
    return {**example, key: image}

  return apply


def _autocontrast(tf, image, level, u):
  del level, u
  pixels = tf.cast(image, tf.float32)
  low, high = tf.reduce_min(pixels, [0, 1]), tf.reduce_max(pixels, [0, 1])
  stretched = (pixels - low) * tf.math.divide_no_nan(255.0, high - low)
  return tf.where(high > low, _to_uint8(tf, stretched), image)


def _equalize(tf, image, level, u):
  """Spreads each channel's values so that all are about equally frequent, by PIL's integer rule."""
  del level, u

  def channel(values):
    values = tf.cast(values, tf.int32)
    histogram = tf.math.bincount(tf.reshape(values, [-1]), minlength=256, maxlength=256)
    step = (tf.size(values) - histogram[tf.reduce_max(values)]) // 255
    table = (tf.cumsum(histogram, exclusive=True) + step // 2) // tf.maximum(step, 1)
    return tf.where(step > 0, tf.gather(tf.clip_by_value(table, 0, 255), values), values)

  return tf.cast(tf.stack([channel(image[..., c]) for c in range(3)], -1), tf.uint8)


def _invert(tf, image, level, u):
  del tf, level, u
  return 255 - image


def _posterize(tf, image, level, u):
  """Keeps the highest bits of each value: 4 of the 8 at magnitude 10."""
  del u
  shift = tf.constant(max(8 - int(level * 4), 0), tf.uint8)
  # Shifting all 8 bits out of a uint8 is undefined.
  return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift) if int(level * 4) else tf.zeros_like(image)


def _solarize(tf, image, level, u):
  del u
  return tf.where(tf.cast(image, tf.int32) < int(level * 256), image, 255 - image)


def _solarize_add(tf, image, level, u):
  del u
  brighter = tf.cast(tf.clip_by_value(tf.cast(image, tf.int32) + int(level * 110), 0, 255), tf.uint8)
  return tf.where(image < 128, brighter, image)


def _color(tf, image, level, u):
  del u
  return _enhance(tf, _grey(tf, image), image, level)


def _contrast(tf, image, level, u):
  del u
  mean = tf.round(tf.reduce_mean(tf.cast(_grey(tf, image), tf.float32)))
  return _enhance(tf, tf.fill(tf.shape(image), mean), image, level)


def _brightness(tf, image, level, u):
  del u
  return _enhance(tf, tf.zeros_like(image), image, level)


def _sharpness(tf, image, level, u):
  """Blends with a smoothed copy, whose border is the image's own."""
  del u
  kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)[..., None, None] / 13.0
  pixels = tf.cast(image, tf.float32)[None]
  smooth = tf.nn.depthwise_conv2d(pixels, tf.tile(kernel, [1, 1, 3, 1]), [1, 1, 1, 1], "VALID")[0]
  smooth = tf.pad(tf.round(smooth), [[1, 1], [1, 1], [0, 0]])
  inside = tf.pad(tf.ones(tf.shape(image)[:2] - 2, tf.bool), [[1, 1], [1, 1]])[..., None]
  return _enhance(tf, tf.where(inside, smooth, pixels[0]), image, level)


def _rotate(tf, image, level, u):
  """Turns by up to 30 degrees about the middle."""
  angle = _signed(tf, level * math.radians(30), u)
  last = tf.cast(tf.shape(image)[:2] - 1, tf.float32) / 2
  cos, sin = tf.cos(angle), tf.sin(angle)
  x = last[1] - (cos * last[1] - sin * last[0])
  y = last[0] - (sin * last[1] + cos * last[0])
  return _project(tf, image, [cos, -sin, x, sin, cos, y])


def _shear_x(tf, image, level, u):
  return _project(tf, image, [1.0, _signed(tf, level * 0.3, u), 0.0, 0.0, 1.0, 0.0])


def _shear_y(tf, image, level, u):
  return _project(tf, image, [1.0, 0.0, 0.0, _signed(tf, level * 0.3, u), 1.0, 0.0])


def _translate_x(tf, image, level, u):
  return _project(tf, image, [1.0, 0.0, _signed(tf, level * 100, u), 0.0, 1.0, 0.0])


def _translate_y(tf, image, level, u):
  return _project(tf, image, [1.0, 0.0, 0.0, 0.0, 1.0, _signed(tf, level * 100, u)])


def _cutout(tf, image, level, u):
  """Greys a square of up to 80 pixels a side around a random point."""
  reach = int(level * 40)
  sides = tf.shape(image)[:2]
  middle = tf.cast(u[1:] * tf.cast(sides, tf.float32), tf.int32)
  row, column = tf.range(sides[0]) - middle[0], tf.range(sides[1]) - middle[1]
  inside = ((row >= -reach) & (row < reach))[:, None] & ((column >= -reach) & (column < reach))[None]
  return tf.where(inside[..., None], tf.constant(_GREY, tf.uint8), image)


OPERATIONS = {
  "autocontrast": _autocontrast,
  "equalize": _equalize,
  "invert": _invert,
  "rotate": _rotate,
  "posterize": _posterize,
  "solarize": _solarize,
  "color": _color,
  "contrast": _contrast,
  "brightness": _brightness,
  "sharpness": _sharpness,
  "shear_x": _shear_x,
  "shear_y": _shear_y,
  "translate_x": _translate_x,
  "translate_y": _translate_y,
  "cutout": _cutout,
  "solarize_add": _solarize_add,
}


def _enhance(tf, plain, image, level):
  """Goes from `plain` to `image` and beyond: by 0.1 at magnitude 0, 1.9 at magnitude 10."""
  plain, image = tf.cast(plain, tf.float32), tf.cast(image, tf.float32)
  return _to_uint8(tf, plain + (level * 1.8 + 0.1) * (image - plain))


def _grey(tf, image):
  return tf.round(tf.tensordot(tf.cast(image, tf.float32), [0.299, 0.587, 0.114], 1))[..., None]


def _to_uint8(tf, values):
  return tf.cast(tf.clip_by_value(values, 0.0, 255.0), tf.uint8)


def _signed(tf, value, u):
  return tf.where(u[0] < 0.5, value, -value)


def _project(tf, image, rows):
  """Takes the pixel (x, y) of the result from where the six numbers send it in the image, the nearest one."""
  projection = tf.stack([*(tf.cast(v, tf.float32) for v in rows), 0.0, 0.0])[None]
  return tf.raw_ops.ImageProjectiveTransformV3(
    images=image[None],
    transforms=projection,
    output_shape=tf.shape(image)[:2],
    fill_value=float(_GREY),
    interpolation="NEAREST",
    fill_mode="CONSTANT",
  )[0]
