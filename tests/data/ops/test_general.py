"""Ops on any feature do what their names say, and no more."""

import numpy as np
import pytest

from bigjax.data import ops
from bigjax.errors import UserError


def run(text, batch):
  keys = np.arange(len(next(iter(batch.values()))), dtype=np.uint64)
  for op in ops.parse(text):
    batch = op.apply(batch, keys)
  return batch


@pytest.fixture
def batch():
  return {"image": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "label": np.array([1, 0]), "mask": np.ones(2)}


def test_keep_keeps_the_mask_too(batch):
  assert set(run("keep('label')", batch)) == {"label", "mask"}
  assert set(run("keep('label')", {"label": batch["label"], "image": batch["image"]})) == {"label"}


def test_drop_rename_and_copy_leave_the_values_alone(batch):
  assert set(run("drop('image')", batch)) == {"label", "mask"}
  renamed = run("rename('image', 'x', 'label', 'y')", batch)
  assert set(renamed) == {"x", "y", "mask"} and renamed["x"] is batch["image"]
  assert run("rename(image='label', label='image')", batch)["label"] is batch["image"]
  assert run("copy('image', 'original')", batch)["original"] is batch["image"]


def test_rename_does_not_overwrite(batch):
  with pytest.raises(UserError, match="there is a feature 'label' already"):
    run("rename(image='label')", batch)


@pytest.mark.parametrize("text", ["keep('imag')", "drop('imag')", "rename(imag='x')", "copy('imag', 'x')"])
def test_a_feature_that_is_not_there_is_an_error_that_says_which_are(batch, text):
  with pytest.raises(UserError, match="no feature 'imag' here. Did you mean 'image'"):
    run(text, batch)


def test_rename_wants_pairs(batch):
  with pytest.raises(UserError, match="'image' has no new name"):
    run("rename('image')", batch)


def test_cast_reshape_and_flatten(batch):
  assert run("cast('image', 'float32')", batch)["image"].dtype == np.float32
  assert run("reshape('image', (4, -1))", batch)["image"].shape == (2, 4, 3)
  flat = run("flatten", batch)["image"]
  np.testing.assert_array_equal(flat, np.arange(24).reshape(2, 12))
  with pytest.raises(UserError, match=r"shape \(3, 4\), which does not fill \(5,\)"):
    run("reshape('image', (5,))", batch)
  with pytest.raises(UserError, match="cannot become float32"):
    run("cast('text', 'float32')", {"text": np.array([b"a", b"b"], object)})


def test_symlog_is_odd_small_values_stay_and_large_ones_become_logarithms():
  x = np.array([[-(np.e - 1), -1e-4, 0.0, 1e-4, np.e**3 - 1]], np.float32)
  np.testing.assert_allclose(run('symlog("x")', {"x": x})["x"], [[-1, -1e-4, 0, 1e-4, 3]], rtol=1e-3)


def test_flatten_of_an_empty_batch_keeps_the_width():
  assert run("flatten", {"image": np.zeros((0, 3, 4))})["image"].shape == (0, 12)


def test_pad_to_makes_one_array_of_rows_of_varying_length():
  rows = np.empty(3, object)
  for i, count in enumerate((0, 3, 1)):
    rows[i] = np.full((count, 2), i, np.float32)
  padded = run("pad_to('boxes', 2, value=-1)", {"boxes": rows})["boxes"]
  assert padded.dtype == np.float32
  np.testing.assert_array_equal(padded[..., 0], [[-1, -1], [1, 1], [2, -1]])
  with pytest.raises(UserError, match="not a feature of numbers of varying length"):
    run("pad_to('text', 2)", {"text": np.array([b"a"], object)})


def test_one_hot_of_classes_and_of_a_map_of_classes(batch):
  np.testing.assert_array_equal(run("one_hot(3)", batch)["label"], [[0, 1, 0], [1, 0, 0]])
  assert run("one_hot(3)", batch)["label"].dtype == np.float32
  assert run("one_hot(24, key='image')", batch)["image"].shape == (2, 3, 4, 24)


@pytest.mark.parametrize("bad", [-1, 3])
def test_a_label_out_of_range_is_an_error(bad):
  with pytest.raises(UserError, match=rf"'label' {bad} is not one of the classes 0 to 2"):
    run("one_hot(3)", {"label": np.array([0, bad])})


def test_one_hot_twice_is_an_error(batch):
  with pytest.raises(UserError, match="one-hot already"):
    run("one_hot(3)|one_hot(3)", batch)
