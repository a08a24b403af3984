"""RandAugment's operations equal PIL's, and which ones are applied depends on the seed alone."""

import numpy as np
import pytest
import tensorflow as tf  # noqa: TID253
from PIL import Image, ImageEnhance, ImageOps

from bigjax.data import ops
from bigjax.data.ops.randaugment import OPERATIONS
from bigjax.errors import UserError

LEVEL = 0.51  # Not 0.5, at which shears fall half way between pixels.


@pytest.fixture
def image():
  y, x = np.mgrid[:40, :56] / 7
  waves = np.stack([np.sin(x) + 1, np.cos(y) + 1, np.sin(x + y) + 1], -1) * 90 + 30
  return (waves + np.random.default_rng(0).normal(size=waves.shape) * 5).astype(np.uint8)


def ours(name, image, level=LEVEL, u=(0.2, 0.5, 0.5)):
  result = OPERATIONS[name](tf, tf.constant(image), level, tf.constant(u, tf.float32))
  assert result.dtype == tf.uint8 and tuple(result.shape) == image.shape
  return result.numpy().astype(int)


def affine(image, rows):
  """PIL's nearest affine transform about pixel centres, with grey outside."""
  a, b, c, d, e, f = rows
  rows = (a, b, c + 0.5 - 0.5 * (a + b), d, e, f + 0.5 - 0.5 * (d + e))
  return image.transform(image.size, Image.Transform.AFFINE, rows, Image.Resampling.NEAREST, fillcolor=(128, 128, 128))


PIL = {
  "autocontrast": ImageOps.autocontrast,
  "equalize": ImageOps.equalize,
  "invert": ImageOps.invert,
  "posterize": lambda i: ImageOps.posterize(i, int(4 * LEVEL)),
  "solarize": lambda i: ImageOps.solarize(i, int(256 * LEVEL)),
  "color": lambda i: ImageEnhance.Color(i).enhance(LEVEL * 1.8 + 0.1),
  "contrast": lambda i: ImageEnhance.Contrast(i).enhance(LEVEL * 1.8 + 0.1),
  "brightness": lambda i: ImageEnhance.Brightness(i).enhance(LEVEL * 1.8 + 0.1),
  "sharpness": lambda i: ImageEnhance.Sharpness(i).enhance(LEVEL * 1.8 + 0.1),
  "rotate": lambda i: i.rotate(30 * LEVEL, Image.Resampling.NEAREST, fillcolor=(128, 128, 128)),
  "shear_x": lambda i: affine(i, (1, 0.3 * LEVEL, 0, 0, 1, 0)),
  "shear_y": lambda i: affine(i, (1, 0, 0, 0.3 * LEVEL, 1, 0)),
  "translate_x": lambda i: affine(i, (1, 0, 100 * LEVEL, 0, 1, 0)),
  "translate_y": lambda i: affine(i, (1, 0, 0, 0, 1, 100 * LEVEL)),
}


@pytest.mark.parametrize("name", PIL)
def test_an_operation_is_pils(image, name):
  theirs = np.asarray(PIL[name](Image.fromarray(image)), int)
  result = ours(name, image)
  if name in ("rotate", "shear_x", "shear_y"):  # The nearest of two equally near pixels may differ.
    assert (result == theirs).all(-1).mean() > 0.97
  else:
    assert np.abs(result - theirs).max() <= 1


def test_solarize_add_and_cutout_by_hand(image):
  np.testing.assert_array_equal(
    ours("solarize_add", image), np.where(image < 128, np.minimum(image.astype(int) + 56, 255), image)
  )
  cut = ours("cutout", image, u=(0, 0.0, 0.5))  # Around the middle of the first row.
  expected = image.copy()
  expected[:20, 8:48] = 128
  np.testing.assert_array_equal(cut, expected)


def test_the_sign_of_turns_and_moves_is_drawn(image):
  right, left = ours("translate_x", image, 0.1, (0.9, 0, 0)), ours("translate_x", image, 0.1, (0.1, 0, 0))
  np.testing.assert_array_equal(right[:, 10:], image[:, :-10])
  np.testing.assert_array_equal(left[:, :-10], image[:, 10:])
  assert (right[:, :10] == 128).all() and (left[:, -10:] == 128).all()


def test_there_are_the_sixteen_operations_of_efficientnet_and_extreme_magnitudes_run(image):
  assert len(OPERATIONS) == 16
  for name in OPERATIONS:
    for level in (0.0, 1.0, 3.0):
      ours(name, image, level)
  assert not ours("posterize", image, 0.0).any()
  np.testing.assert_array_equal(ours("solarize", image, 3.0), image)


def test_a_flat_image_stays_flat(image):
  flat = np.full_like(image, 77)
  for name in ("autocontrast", "equalize", "contrast", "sharpness", "color"):
    np.testing.assert_allclose(ours(name, flat), 77, atol=1)


def test_the_seed_decides_and_many_operations_occur(image):
  (op,) = ops.parse("randaugment(2, 9)")
  apply = tf.function(lambda seed: op.apply({"image": tf.constant(image)}, seed)["image"], autograph=False)
  results = [apply(tf.constant([s, 5], tf.int32)).numpy() for s in range(24)]
  np.testing.assert_array_equal(apply(tf.constant([0, 5], tf.int32)), results[0])
  assert len({r.tobytes() for r in results}) > 18


def test_an_image_that_is_not_uint8_colour_says_where_to_put_the_op(image):
  (op,) = ops.parse("randaugment(2, 9)")
  for wrong in (image.astype(np.float32), image[..., :1]):
    with pytest.raises(UserError, match="Put it after decode, and before value_range"):
      op.apply({"image": tf.constant(wrong)}, tf.constant([0, 5], tf.int32))
