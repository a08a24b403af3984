import itertools

import numpy as np
import pytest

from bigjax.data import mixture, pipeline
from bigjax.errors import UserError


class Numbers:
  """The numbers from `start` on, with a name each."""

  def __init__(self, start, n, dtype=np.int32):
    self.start, self.n, self.dtype = start, n, dtype

  def __len__(self):
    return self.n

  def fetch(self, ids):
    return {"label": (ids + self.start).astype(self.dtype), "name": np.array([b"%d" % i for i in ids], object)}


def mixed(*weights, sizes=(50, 500, 5000)):
  sources = tuple(Numbers(10_000 * i, n) for i, n in zip(range(len(weights)), sizes))
  return mixture.make(sources, weights=tuple(map(float, weights)))


def stream(source, positions, seed=0):
  epochs, ids = source.order(np.asarray(positions, np.int64), seed)
  return epochs, source.fetch(ids)["label"]


def test_every_block_has_the_shares_exactly():
  source = mixed(0.5, 0.3, 0.2)
  for block in (0, 1, 1000):
    _, labels = stream(source, np.arange(4096) + 4096 * block)
    assert np.bincount(labels // 10_000).tolist() == [2048, 1229, 819]  # 2048, 1228.8, 819.2
  _, labels = stream(source, np.arange(512))
  np.testing.assert_allclose(np.bincount(labels // 10_000) / 512, [0.5, 0.3, 0.2], atol=0.07)


def test_each_source_goes_through_its_own_epochs():
  source = mixed(1, 1, 2)
  epochs, labels = stream(source, np.arange(4096 * 6))
  for part, size in enumerate((50, 500, 5000)):
    own, visits = labels[labels // 10_000 == part] % 10_000, epochs[labels // 10_000 == part]
    for epoch in range(len(own) // size):
      assert sorted(own[visits == epoch]) == list(range(size))
  assert epochs.max() == 4096 * 6 // 4 // 50
  first, second = (labels[(labels < 50) & (epochs == epoch)].tolist() for epoch in (0, 1))
  assert first != second


def test_a_position_depends_on_nothing_around_it():
  source = mixed(3, 1, 2)
  epochs, labels = stream(source, np.arange(20_000))
  some = np.array([19_999, 4096, 4095, 0, 7])
  np.testing.assert_array_equal(stream(source, some)[0], epochs[some])
  np.testing.assert_array_equal(stream(source, some)[1], labels[some])
  assert (stream(source, np.arange(20_000), seed=1)[1] != labels).any()


def test_sources_of_one_size_do_not_go_in_step():
  _, labels = stream(mixed(1, 1, sizes=(100, 100)), np.arange(4096))
  first, second = labels[labels < 10_000][:100], labels[labels >= 10_000][:100] - 10_000
  assert np.sum(first == second) < 12


def test_mixtures_mix():
  inner = mixed(1, 1)
  outer = mixture.make((inner, Numbers(30_000, 20)), weights=(3.0, 1.0))
  _, labels = stream(outer, np.arange(4096 * 4))
  np.testing.assert_allclose(np.bincount(labels // 10_000) / labels.size, [3 / 8, 3 / 8, 0, 1 / 4], atol=0.001)


def test_the_pipeline_trains_on_the_mixture_and_evaluates_every_example_once():
  source = mixed(1, 3, sizes=(5, 7))
  with pipeline.train_batches(source, batch_size=8, seed=0) as batches:
    labels = np.concatenate([b["label"] for b in itertools.islice(batches, 512)])
  assert np.bincount(labels // 10_000).tolist() == [1024, 3072]
  with pipeline.eval_batches(source, batch_size=8) as batches:
    batches = list(batches)
  labels = np.concatenate([b["label"][b["mask"] == 1] for b in batches])
  assert labels.tolist() == [*range(5), *range(10_000, 10_007)]
  assert batches[0]["name"].tolist() == [b"0", b"1", b"2", b"3", b"4", b"0", b"1", b"2"]


def test_what_does_not_mix_says_why():
  a, b = Numbers(0, 5), Numbers(0, 5, np.float32)
  with pytest.raises(UserError, match=r"number 1 .* differ: label: int32\[\] and float32\[\]"):
    mixture.make((a, b), weights=(1.0, 1.0))
  with pytest.raises(UserError, match="1 of them for 2 sources"):
    mixture.make((a, a), weights=(1.0,))
  with pytest.raises(UserError, match="above 0"):
    mixture.make((a, a), weights=(1.0, 0.0))
  with pytest.raises(UserError, match="less than 1 in 8192"):
    mixture.make((a, a), weights=(1.0, 1e-5))


def test_weights_change_where_they_are_told_to_and_each_source_goes_on():
  sources = tuple(Numbers(10_000 * i, n) for i, n in enumerate((50, 500)))
  source = mixture.make(sources, weights=(3.0, 1.0), changes=((4097, (1.0, 1.0)), (4 * 4096, (0.0, 1.0))))
  epochs, labels = stream(source, np.arange(6 * 4096))
  shares = (labels // 10_000).reshape(6, 4096).mean(axis=1).tolist()
  assert shares == [0.25, 0.25, 0.5, 0.5, 1, 1]  # From the first whole block on.
  for part, size in enumerate((50, 500)):
    own, visits = labels[labels // 10_000 == part] % 10_000, epochs[labels // 10_000 == part]
    for epoch in range(len(own) // size):
      assert sorted(own[visits == epoch]) == list(range(size))
  some = np.array([23_000, 4096, 8192, 4095, 16_384])
  np.testing.assert_array_equal(stream(source, some)[1], labels[some])


def test_a_mixture_that_never_changes_is_the_same_with_a_change_that_changes_nothing():
  sources = tuple(Numbers(10_000 * i, n) for i, n in enumerate((50, 500)))
  plain = mixture.make(sources, weights=(3.0, 1.0))
  changing = mixture.make(sources, weights=(3.0, 1.0), changes=((8192, (3.0, 1.0)),))
  positions = np.arange(20_000)
  for a, b in zip(stream(plain, positions), stream(changing, positions)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (((4096, (1.0,)),), r"changes\[0\]: 1 of them for 2 sources"),
    (((4096, (0.0, 0.0)),), r"changes\[0\]: \(0\.0, 0\.0\) must all be above 0"),
    (((-1, (1.0, 1.0)),), r"changes\[0\]: the position -1 is below 0"),
    (((5, (1.0, 1.0)), (6, (1.0, 1.0))), r"changes: at 5, 6; they must come in order, 4096 examples apart"),
    (((0, (1.0, 1.0)),), r"changes: at 0"),
    (((4096, (1e9, 1.0)),), r"is less than 1 in 8192"),
  ],
)
def test_changes_that_make_no_sense_say_why(changes, message):
  with pytest.raises(UserError, match=message):
    mixture.make((Numbers(0, 5), Numbers(5, 5)), weights=(1.0, 1.0), changes=changes)
