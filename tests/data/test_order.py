import itertools
import math

import numpy as np
import pytest

from bigjax.data import order

SIZES = [*range(1, 40), 61, 63, 64, 65, 97, 127, 128, 129, 251, 255, 256, 257, 1009, 1023, 1024, 1025, 4093, 65537]


def positions(*args):
  return np.arange(*args, dtype=np.int64)


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5, -1])
def test_every_epoch_visits_every_example_once(seed):
  for n in SIZES:
    epochs, ids = order.shuffled(n, positions(2 * n), seed)
    np.testing.assert_array_equal(epochs, np.repeat([0, 1], n))
    for epoch in ids.reshape(2, n):
      np.testing.assert_array_equal(np.sort(epoch), np.arange(n))


def test_epochs_and_seeds_differ():
  _, ids = order.shuffled(1000, positions(3000), 0)
  _, others = order.shuffled(1000, positions(3000), 1)
  runs = [*ids.reshape(3, 1000), *others.reshape(3, 1000)]
  for a, b in itertools.combinations(runs, 2):
    assert np.sum(a == b) < 12  # 1 is expected of two independent permutations.


def test_a_position_depends_on_nothing_around_it():
  """Slices by host, batch and start all see the same stream, a trillion examples in as well."""
  for n, start in [(103, 0), (103, 10**6), (10**12 + 39, 7 * 10**12)]:
    stream = positions(start, start + 64)
    epochs, ids = order.shuffled(n, stream, 5)
    for hosts in (1, 2, 8, 64):
      parts = [order.shuffled(n, part, 5) for part in np.split(stream, hosts)]
      np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), epochs)
      np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), ids)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_permutations_of_a_few_examples_are_equally_likely(n):
  count = 24_000
  _, ids = order.shuffled(n, positions(count * n), 0)
  _, counts = np.unique(ids.reshape(count, n), axis=0, return_counts=True)
  assert len(counts) == math.factorial(n)
  assert chi_square(counts) < 3


@pytest.mark.parametrize("n", [16, 30, 64, 101])
def test_pairs_of_places_hold_all_pairs_of_examples_equally_often(n):
  count = 20_000
  _, ids = order.shuffled(n, positions(count * n), 0)
  ids = ids.reshape(count, n)
  for i, j in [(0, 1), (0, n - 1), (n // 2, n // 2 + 1)]:
    counts = np.bincount(ids[:, i] * n + ids[:, j], minlength=n * n).reshape(n, n)
    assert chi_square(counts[~np.eye(n, dtype=bool)]) < (1.25 if n > 16 else 1.6)


def test_neighbours_in_the_order_are_no_neighbours_in_the_data():
  _, ids = order.shuffled(100_003, positions(100_003), 0)
  assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.01


def test_keys_differ_by_seed_epoch_and_id():
  epochs, ids = np.repeat(np.arange(20), 500), np.tile(np.arange(500), 20)
  keys = np.concatenate([order.example_keys(seed, epochs, ids) for seed in range(3)])
  assert keys.dtype == np.uint64
  assert len(np.unique(keys)) == len(keys)
  assert len(np.unique([order.fold(keys[:100], salt) for salt in range(50)])) == 5000


def test_uniform_numbers_are_uniform_and_do_not_depend_on_the_batch():
  keys = order.example_keys(0, np.zeros(50_000, np.int64), np.arange(50_000))
  numbers = order.uniform(keys, 1, 3)
  assert numbers.dtype == np.float32
  assert 0 <= numbers.min() < numbers.max() < 1
  np.testing.assert_allclose(numbers.mean(0), 0.5, atol=0.005)
  np.testing.assert_allclose(numbers.var(0), 1 / 12, atol=0.002)
  columns = np.concatenate([numbers, order.uniform(keys, 2, 1)], axis=1)
  np.testing.assert_allclose(np.corrcoef(columns.T), np.eye(4), atol=0.02)
  np.testing.assert_array_equal(order.uniform(keys[70:75], 1, 3), numbers[70:75])
  np.testing.assert_array_equal(order.uniform(keys[:5], 1, 2), numbers[:5, :2])


def test_the_order_is_pinned():
  """Another order would silently change what a resumed run sees; a change here needs a line in the changelog."""
  _, ids = order.shuffled(1000, positions(6), 0)
  assert ids.tolist() == [826, 851, 813, 795, 373, 127]
  assert order.example_keys(0, np.array([1]), np.array([2])).tolist() == [10258996963251528848]


def chi_square(counts):
  """Chi square over its degrees of freedom: about 1 for equal chances."""
  expected = counts.sum() / counts.size
  return ((counts - expected) ** 2 / expected).sum() / (counts.size - 1)
