"""Batch ops equal their NumPy and SciPy definitions, depend on each example's key alone, and change no input."""

import numpy as np
import pytest
import scipy.ndimage

from bigjax.data import ops
from bigjax.data.ops import pixels
from bigjax.errors import UserError

KEYS = np.random.default_rng(0).integers(2**63, size=64, dtype=np.uint64)


def run(text, images, keys=KEYS):
  (op,) = ops.parse(text)
  return op.apply({"image": images}, keys[: len(images)])["image"]


@pytest.fixture
def images():
  return np.random.default_rng(1).integers(256, size=(64, 12, 10, 3)).astype(np.uint8)


RANDOM = [
  "flip_lr",
  "random_shift(3)",
  "random_shift(3, mode='reflect')",
  "random_affine(degrees=20, translate=0.1, scale=(0.8, 1.2), shear=10)",
  "random_erasing(probability=0.5)",
]


@pytest.mark.parametrize("text", [*RANDOM, "value_range", "standardize(1, 2)", "pad(2)"])
def test_an_example_depends_on_its_own_key_alone_and_inputs_stay_as_they_were(images, text):
  before = images.copy()
  whole = run(text, images)
  order = np.random.default_rng(2).permutation(64)
  np.testing.assert_array_equal(run(text, images[order], KEYS[order]), whole[order])
  np.testing.assert_array_equal(run(text, images[:7]), whole[:7])
  np.testing.assert_array_equal(images, before)
  assert run(text, images[:0]).shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("text", RANDOM)
def test_other_keys_give_other_images_of_the_same_type(images, text):
  result = run(text, images)
  assert result.dtype == np.uint8 and result.shape == images.shape
  assert (result != run(text, images, KEYS[::-1])).any()
  assert run(text, images[..., 0]).shape == (64, 12, 10)


def test_flip_lr_mirrors_about_half(images):
  flipped = run("flip_lr", images)
  mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
  assert (mirrored | (flipped == images).all((1, 2, 3))).all()
  assert 16 < mirrored.sum() < 48
  np.testing.assert_array_equal(run("flip_lr(1)", images), images[:, :, ::-1])
  np.testing.assert_array_equal(run("flip_lr(0)", images), images)


def test_blocks_do_not_show(images):
  big = np.tile(images, (1, 40, 40, 1))  # Less than one image a block.
  np.testing.assert_array_equal(run("flip_lr", big)[:, :12, :10], run("flip_lr", images))
  np.testing.assert_array_equal(run("value_range", big)[:, :12, :10], run("value_range", images))


def test_value_range_maps_the_ends_onto_the_ends():
  np.testing.assert_allclose(run("value_range(-1, 1)", np.array([[0, 51, 255]], np.uint8)), [[-1, -0.6, 1]], atol=1e-6)
  np.testing.assert_allclose(run("value_range(0, 1, in_min=-1, in_max=1)", np.array([[-1.0, 0.0, 1.0]])), [[0, 0.5, 1]])
  np.testing.assert_allclose(run("value_range(0, 1, in_max=1, clip=True)", np.array([[-2.0, 0.5, 7.0]])), [[0, 0.5, 1]])


def test_standardize_is_by_channel(images):
  expected = (images - np.array([1.0, 2.0, 3.0])) / np.array([4.0, 5.0, 6.0])
  np.testing.assert_allclose(run("standardize((1, 2, 3), (4, 5, 6))", images), expected, rtol=1e-5, atol=1e-5)
  with pytest.raises(UserError, match="2 numbers for 3 channels"):
    run("standardize((1, 2), 1)", images)
  with pytest.raises(UserError, match="std must be greater than 0"):
    ops.parse("standardize(0, (1, 0, 1))")


@pytest.mark.parametrize("text", ["value_range", "standardize(0.5, 2)"])
def test_values_become_float32(images, text):
  assert run(text, images).dtype == run(text, images.astype(np.float64)).dtype == np.float32


def test_pad_adds_a_frame(images):
  padded = run("pad(2, value=7)", images)
  np.testing.assert_array_equal(padded[:, 2:-2, 2:-2], images)
  assert padded.shape == (64, 16, 14, 3) and (padded[:, :2] == 7).all() and (padded[:, :, -2:] == 7).all()


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_random_shift_is_one_of_the_crops_of_the_padded_image_and_every_one_occurs(images, mode):
  shifted = run(f"random_shift(1, mode='{mode}')", images)
  padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode)
  crops = np.stack([padded[:, y : y + 12, x : x + 10] for y in range(3) for x in range(3)])
  same = (crops == shifted).all((2, 3, 4))
  np.testing.assert_array_equal(same.sum(0), 1)
  assert same.any(1).all()


def test_warp_is_scipys_bilinear_affine_transform(images):
  angle = 0.4
  matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle) + 0.1, 1.2 * np.cos(angle)]])
  moved, middle = np.array([1.5, -0.75]), np.array([5.5, 4.5])
  source = images.astype(np.float32)
  ours = pixels.warp(source, np.tile(matrix, (64, 1, 1)), np.tile(moved, (64, 1)), fill=9.0)
  offset = middle - matrix @ (middle + moved)
  for i in range(3):
    for c in range(3):
      # `grid-constant` blends with the fill at the edge, as ours does.
      theirs = scipy.ndimage.affine_transform(
        source[i, ..., c], matrix, offset, order=1, mode="grid-constant", cval=9.0
      )
      np.testing.assert_allclose(ours[i, ..., c], theirs, atol=1e-3)


def test_a_quarter_turn_and_a_whole_move_are_exact():
  image = np.arange(25, dtype=np.uint8).reshape(1, 5, 5)
  turned = pixels.warp(image, np.array([[[0.0, 1.0], [-1.0, 0.0]]]), np.zeros((1, 2)))
  np.testing.assert_array_equal(turned[0], np.rot90(image[0]))
  moved = pixels.warp(image, np.eye(2)[None], np.array([[1.0, -2.0]]))
  np.testing.assert_array_equal(moved[0, 1:, :3], image[0, :4, 2:])
  assert not moved[0, 0].any() and not moved[0, :, 3:].any()


def test_random_affine_stays_within_what_was_asked():
  # A point at the middle moves by no more than the translation; a square's area changes by no more than scale squared.
  image = np.zeros((64, 41, 41), np.float32)
  image[:, 15:26, 15:26] = 1.0
  moved = run("random_affine(translate=0.1)", image)
  middle = (moved * np.arange(41)[:, None]).sum((1, 2)) / moved.sum((1, 2)) - 20
  assert np.abs(middle).max() <= 4.1 + 1e-3 and np.abs(middle).max() > 3 and middle.min() < 0 < middle.max()
  areas = run("random_affine(degrees=30, scale=(0.8, 1.25), shear=10)", image).sum((1, 2)) / 121
  assert 0.6 < areas.min() < 0.8 and 1.2 < areas.max() < 1.6
  np.testing.assert_allclose(run("random_affine", image), image, atol=1e-5)


def test_random_erasing_paints_one_rectangle_within_the_areas():
  images = np.ones((64, 30, 30, 1), np.float32)
  erased = run("random_erasing(probability=1, area_min=10, area_max=20, fill=0)", images)[..., 0] == 0
  areas = erased.sum((1, 2)) / 900
  assert areas.min() > 0.08 and areas.max() < 0.23
  for mask in erased:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert mask.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
  chosen = (run("random_erasing(probability=0.25)", images) == 0).any((1, 2, 3)).sum()
  assert 6 < chosen < 28


@pytest.mark.parametrize("text", ["flip_lr", "random_shift(2)", "random_affine(degrees=3)", "random_erasing", "pad(1)"])
def test_encoded_images_and_wrong_shapes_say_what_to_do(text):
  with pytest.raises(UserError, match="Put decode before"):
    run(text, np.array([b"\xff\xd8", b"\xff\xd8"], object))
  with pytest.raises(UserError, match="not \\(height, width\\)"):
    run(text, np.zeros((2, 9)))
