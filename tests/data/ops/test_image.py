"""Decoding, resizing and cropping equal PIL and NumPy, draw on the seed alone, and say what is wrong with a file."""

import io

import numpy as np
import pytest
import tensorflow as tf  # noqa: TID253
from PIL import Image

from bigjax.data import ops
from bigjax.errors import UserError

SEED = (3, 4)


def smooth(height=48, width=64):
  """A colour image of gentle waves, which JPEG keeps well."""
  y, x = np.mgrid[:height, :width] / 8
  return (127 * np.stack([np.sin(x) + 1, np.cos(y) + 1, np.sin(x + y) + 1], -1)).astype(np.uint8)


def encoded(image, kind="PNG", **options):
  file = io.BytesIO()
  Image.fromarray(image).save(file, kind, **options)
  return file.getvalue()


def run(text, image, seed=SEED):
  """Runs ops on one example in a graph, as tf.data does."""
  chain = ops.parse(text)

  @tf.autograph.experimental.do_not_convert
  def apply(example):
    for op in chain:
      example = op.apply(example, tf.constant(seed, tf.int32))
    return example

  spec = tf.TensorSpec([], tf.string) if isinstance(image, bytes) else tf.TensorSpec([None, None, 3], image.dtype)
  return tf.function(apply, input_signature=[{"image": spec}])({"image": tf.constant(image)})["image"].numpy()


def test_png_decodes_exactly_and_jpeg_as_pil_does():
  image = smooth()
  np.testing.assert_array_equal(run("decode", encoded(image)), image)
  jpeg = encoded(image, "JPEG", quality=95)
  theirs = np.asarray(Image.open(io.BytesIO(jpeg)), int)
  assert np.abs(run("decode(precise=True)", jpeg) - theirs).max() <= 2
  assert np.abs(run("decode", jpeg) - theirs).mean() < 2


def test_grey_and_colour_are_converted_as_asked():
  image = smooth()
  assert run("decode(1)", encoded(image[..., 0])).shape == (48, 64, 1)
  assert run("decode(0)", encoded(image[..., 0])).shape == (48, 64, 1)
  colour = run("decode", encoded(image[..., 0]))
  np.testing.assert_array_equal(colour, np.repeat(image[..., :1], 3, -1))
  grey = run("decode(1)", encoded(image, "JPEG", quality=95))
  assert np.abs(grey[..., 0] - np.asarray(Image.fromarray(image).convert("L"), int)).mean() < 2


def test_resize_is_pils_bilinear_when_it_smooths():
  ours = run("resize((24, 40))", smooth())
  theirs = np.asarray(Image.fromarray(smooth()).resize((40, 24), Image.Resampling.BILINEAR), int)
  assert ours.dtype == np.uint8 and ours.shape == (24, 40, 3)
  assert np.abs(ours - theirs).max() <= 1


def test_cubic_resizing_stays_within_the_types_range():
  edge = np.zeros((8, 8, 3), np.uint8)
  edge[:, 4:] = 255
  enlarged = run("resize(32, method='bicubic')", edge)  # Overshoots on both sides of the edge.
  assert (enlarged[:, :14] < 16).all() and (enlarged[:, 18:] > 239).all()
  assert run("resize(32)", edge.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize(("shape", "result"), [((48, 64), (24, 32)), ((64, 48), (32, 24)), ((10, 33), (24, 79))])
def test_resize_small_keeps_the_aspect_ratio(shape, result):
  assert run("resize_small(24)", smooth(*shape)).shape == (*result, 3)


def test_central_crop_is_the_middle():
  np.testing.assert_array_equal(run("central_crop((20, 30))", smooth()), smooth()[14:34, 17:47])
  np.testing.assert_array_equal(run("central_crop", smooth()), smooth()[:, 8:56])
  with pytest.raises(tf.errors.InvalidArgumentError, match=r"central_crop\(50\).*put resize_small before it"):
    run("central_crop(50)", smooth())


def test_random_crop_cuts_a_part_of_the_padded_image():
  image = smooth(6, 5)
  padded = np.pad(image, [(2, 2), (2, 2), (0, 0)])
  parts = {padded[y : y + 6, x : x + 5].tobytes() for y in range(5) for x in range(5)}
  crops = {run("random_crop((6, 5), padding=2)", image, (s, 0)).tobytes() for s in range(20)}
  assert crops <= parts and len(crops) > 8
  with pytest.raises(tf.errors.InvalidArgumentError, match=r"random_crop\(9\).*smaller than the crop"):
    run("random_crop(9)", image)


def coordinates(height, width):
  """An image whose pixels say where they are."""
  y, x = np.mgrid[:height, :width]
  return np.stack([y, x, 0 * x], -1).astype(np.float32)


def test_inception_crop_keeps_to_its_areas_and_ratios():
  areas, ratios = [], []
  for s in range(40):
    text = "inception_crop(9, area_min=20, area_max=60, ratio_min=0.5, ratio_max=2, method='nearest')"
    crop = run(text, coordinates(80, 100), (s, 1))
    high, wide = (np.ptp(crop[..., :2].reshape(-1, 2), 0) + 1) * 9 / 8
    areas.append(high * wide / 8000)
    ratios.append(wide / high)
  assert 0.15 < min(areas) < 0.35 and 0.45 < max(areas) < 0.66
  assert 0.4 < min(ratios) < 0.8 and 1.3 < max(ratios) < 2.3


def test_inception_crop_of_bytes_is_decode_and_inception_crop():
  for kind, options in (("PNG", {}), ("JPEG", {"quality": 95})):
    data = encoded(smooth(), kind, **options)
    for seed in [(1, 2), (3, 4), (5, 6)]:
      fused = run("inception_crop(16)", data, seed).astype(int)
      apart = run("decode|inception_crop(16)", data, seed)
      # A JPEG's edge pixels are interpolated from what was decoded, which is less when it is cropped first.
      assert np.abs(fused - apart).mean() < (1 if kind == "JPEG" else 1e-9)
  assert run("inception_crop(16, channels=1)", encoded(smooth()[..., 0])).shape == (16, 16, 1)


@pytest.mark.parametrize("text", ["random_crop(8)", "inception_crop(16)"])
def test_the_seed_decides(text):
  same = [run(text, smooth(), (7, 8)) for _ in range(2)]
  np.testing.assert_array_equal(*same)
  assert any((run(text, smooth(), (s, 8)) != same[0]).any() for s in range(3))


def test_shapes_are_known_where_they_can_be():
  spec = tf.data.Dataset.from_tensors({"image": encoded(smooth())})
  for text, shape in [
    ("decode", (None, None, 3)),
    ("decode(0)", (None, None, None)),
    ("decode|resize(8)", (8, 8, 3)),
    ("decode|central_crop(8)", (8, 8, 3)),
    ("decode|random_crop(8)", (8, 8, 3)),
    ("inception_crop(8)", (8, 8, 3)),
    ("decode|resize_small(8)|central_crop(8)|randaugment(1, 1)", (8, 8, 3)),
  ]:
    chain = ops.parse(text)

    def apply(example, chain=chain):
      for op in chain:
        example = op.apply(example, tf.constant(SEED, tf.int32))
      return example

    assert tuple(spec.map(apply).element_spec["image"].shape) == shape, text


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("text", ["decode", "decode(precise=True)", "inception_crop(8)"])
def test_an_image_cut_short_is_an_error_that_says_so(kind, text):
  data = encoded(smooth(), kind)[:-200]
  (op,) = ops.parse(text, "config.data.ops")
  with pytest.raises(UserError, match=r"config.data.ops: .*'image' is not a whole JPEG.*cut short or damaged.*again"):
    op.apply({"image": tf.constant(data)}, tf.constant(SEED, tf.int32))
  with pytest.raises(tf.errors.InvalidArgumentError):
    run(text, data)


def test_ops_in_the_wrong_order_say_so():
  with pytest.raises(UserError, match="resize.*'image' is encoded still. Put decode before"):
    run("resize(8)", encoded(smooth()))
  with pytest.raises(UserError, match="decode.*'image' is not encoded: it is uint8 already"):
    run("decode|decode", encoded(smooth()))
