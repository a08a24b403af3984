import numpy as np
import pytest

from bigjax.data import synthetic
from bigjax.errors import UserError


def everything(source):
  return source.fetch(np.arange(len(source)))


@pytest.mark.parametrize("kind", ["linear", "images", "tokens"])
def test_an_example_never_changes(kind):
  source = synthetic.make(kind, num_examples=50, shape=(4, 4, 1))
  whole = everything(source)
  for name, values in synthetic.make(kind, num_examples=60, shape=(4, 4, 1)).fetch(np.array([7, 3])).items():
    np.testing.assert_array_equal(values, whole[name][[7, 3]])
  other = everything(synthetic.make(kind, num_examples=50, shape=(4, 4, 1), seed=1))
  assert all((other[name] != values).any() for name, values in whole.items())


def test_the_line_can_be_found_by_least_squares():
  batch = everything(synthetic.make("linear", num_examples=2000, noise=0.5))
  x, target = batch["x"], batch["target"]
  assert x.shape == (2000, 1) and target.shape == (2000,) and x.dtype == target.dtype == np.float32
  np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=0.05)
  (w, b), *_ = np.linalg.lstsq(np.c_[x, np.ones(2000)], target)
  np.testing.assert_allclose([w, b], [3, 2], atol=0.05)
  np.testing.assert_allclose((target - w * x[:, 0] - b).std(), 0.5, atol=0.03)
  exact = everything(synthetic.make("linear", num_examples=10, noise=0.0, weights=(1.0, -2.0), bias=0.5))
  np.testing.assert_allclose(exact["target"], exact["x"] @ [1, -2] + 0.5, atol=1e-5)


def test_the_nearest_mean_tells_the_labels_of_images():
  batch = everything(synthetic.make("images", num_examples=500, shape=(6, 5, 2), num_classes=4, noise=0.5))
  images, labels = batch["image"].reshape(500, -1), batch["label"]
  assert batch["image"].shape == (500, 6, 5, 2) and batch["image"].dtype == np.float32 and labels.dtype == np.int32
  assert np.bincount(labels, minlength=4).min() > 90
  means = np.stack([images[:250][labels[:250] == c].mean(0) for c in range(4)])
  nearest = ((images[250:, None] - means) ** 2).sum(-1).argmin(1)
  assert (nearest == labels[250:]).all()


def test_two_tokens_foretell_the_rest():
  tokens = everything(synthetic.make("tokens", num_examples=100, vocab_size=17, length=9))["tokens"]
  assert tokens.shape == (100, 10) and tokens.dtype == np.int32 and tokens.min() == 0 and tokens.max() == 16
  first, second = tokens[:, :1], tokens[:, 1:2]
  np.testing.assert_array_equal(tokens, (first + (second - first) * np.arange(10)) % 17)


def test_there_is_at_least_one_example():
  with pytest.raises(UserError, match="num_examples"):
    synthetic.make(num_examples=0)
