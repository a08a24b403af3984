"""Images and labels are mixed by the same weight, pairwise, as each example's key says."""

import numpy as np
import pytest

from bigjax.data import ops
from bigjax.data.ops.mixing import _beta
from bigjax.errors import UserError

KEYS = np.random.default_rng(0).integers(2**63, size=64, dtype=np.uint64)


def run(text, batch, keys=KEYS):
  for op in ops.parse(text):
    batch = op.apply(batch, keys[: len(batch["label"])])
  return batch


@pytest.fixture
def batch():
  rng = np.random.default_rng(1)
  return {"image": rng.integers(256, size=(64, 8, 9, 3)).astype(np.uint8), "label": np.arange(64)}


def test_mixup_is_the_blend_that_its_labels_say(batch):
  mixed = run("one_hot(64)|mixup(0.8)", batch)
  own = mixed["label"][np.arange(64), np.arange(64)].astype(np.float64)
  neighbour = np.arange(64) ^ 1
  np.testing.assert_allclose(mixed["label"][np.arange(64), neighbour], 1 - own, atol=1e-6)
  np.testing.assert_allclose(mixed["label"].sum(1), 1, atol=1e-6)
  weight = own[:, None, None, None]
  np.testing.assert_allclose(
    mixed["image"], weight * batch["image"] + (1 - weight) * batch["image"][neighbour], atol=1e-3
  )
  assert mixed["image"].dtype == mixed["label"].dtype == np.float32
  assert (own >= 0.5).all() and len(np.unique(own)) == 64


def test_cutmix_pastes_one_rectangle_whose_area_is_the_labels_weight(batch):
  mixed = run("one_hot(64)|cutmix(1.0)", batch)
  neighbour = np.arange(64) ^ 1
  pasted = (mixed["image"] == batch["image"][neighbour]).all(-1)
  kept = (mixed["image"] == batch["image"]).all(-1)
  assert (pasted | kept).all() and mixed["image"].dtype == np.uint8
  np.testing.assert_allclose(mixed["label"][np.arange(64), neighbour], pasted.mean((1, 2)), atol=1e-6)
  for mask in pasted[pasted.any((1, 2))]:
    assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()
  assert pasted.mean() > 0.2


@pytest.mark.parametrize("text", ["one_hot(64)|mixup", "one_hot(64)|cutmix"])
def test_two_hosts_mix_their_halves_as_one_host_mixes_the_whole(batch, text):
  whole = run(text, batch)
  for half in (slice(0, 32), slice(32, 64)):
    part = run(text, {k: v[half] for k, v in batch.items()}, KEYS[half])
    for name in part:
      np.testing.assert_array_equal(part[name], whole[name][half])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_weights_follow_the_beta_distribution(alpha):
  u = (np.arange(20_000) + 0.5) / 20_000
  values = _beta(u, alpha)
  np.testing.assert_allclose(values.mean(), 0.5, atol=1e-3)
  np.testing.assert_allclose(values.var(), 1 / (4 * (2 * alpha + 1)), rtol=1e-2)


@pytest.mark.parametrize("text", ["mixup", "cutmix"])
def test_class_numbers_an_odd_batch_and_encoded_images_say_what_to_do(batch, text):
  with pytest.raises(UserError, match=r"Put one_hot\(num_classes\) before"):
    run(text, batch)
  with pytest.raises(UserError, match="7 is odd"):
    run(f"one_hot(64)|{text}", {k: v[:7] for k, v in batch.items()})
  with pytest.raises(UserError, match="not a batch of decoded images"):
    run(f"one_hot(64)|{text}", {**batch, "image": np.array([b"x"] * 64, object)})
  with pytest.raises(UserError, match="alpha must be greater than 0"):
    ops.parse(f"{text}(0)")
