import gc
import itertools
import queue
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bigjax.data import ops, order, pipeline
from bigjax.errors import UserError


class Numbers:
  """Example i is the number i."""

  def __init__(self, n, fetched=None):
    self.n, self.fetched = n, fetched

  def __len__(self):
    return self.n

  def fetch(self, ids):
    if self.fetched is not None:
      self.fetched.append(ids)
    return {"x": ids.astype(np.float32)[:, None], "label": ids.astype(np.int32)}


@ops.array_op
def add_noise():
  return lambda batch, keys: {**batch, "x": batch["x"] + order.uniform(keys, 0, 1)}


@ops.array_op
def fail_at(label: int):
  def apply(batch, keys):
    if label in batch["label"]:
      raise ZeroDivisionError(label)
    return batch

  return apply


@ops.array_op
def dawdle():
  def apply(batch, keys):
    time.sleep(0.002 * (batch["label"][0] % 3))
    return batch

  return apply


def ops_of(*text):
  return ops.parse("|".join(f"{__name__}.{op}" for op in text))


def take(batches, count):
  with batches:
    return list(itertools.islice(batches, count))


def train(source, count, **kwargs):
  return take(pipeline.train_batches(source, **{"batch_size": 6, "seed": 0} | kwargs), count)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_epoch_has_every_example_once_and_the_next_in_another_order():
  labels = np.concatenate([b["label"] for b in train(Numbers(30), 10)]).reshape(2, 30)
  np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile(np.arange(30), (2, 1)))
  assert (labels[0] != labels[1]).any()


def test_batches_run_on_across_epochs_of_any_size():
  labels = np.concatenate([b["label"] for b in train(Numbers(7), 7)])
  assert np.bincount(labels).tolist() == [6] * 7


def test_a_batch_depends_on_seed_and_step_alone():
  noisy = ops_of("add_noise()")
  batches = train(Numbers(20), 1000, preprocess=noisy)
  for start in (1, 7, 683, 999):
    assert_same(train(Numbers(20), 1, preprocess=noisy, start_step=start)[0], batches[start])
  assert_same(train(Numbers(20), 20, preprocess=noisy, threads=1, prefetch=7), batches[:20])
  other = train(Numbers(20), 1, preprocess=noisy, seed=1)[0]
  assert (other["label"] != batches[0]["label"]).any()


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_share_out_the_batch_of_one_host(hosts):
  noisy = ops_of("add_noise()")
  alone = train(Numbers(20), 8, preprocess=noisy)
  parts = [train(Numbers(20), 8, preprocess=noisy, host=host, hosts=hosts) for host in range(hosts)]
  assert_same([{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts)], alone)


def test_an_example_is_augmented_in_the_same_way_in_any_company():
  """By its epoch, its id and the op's place; an op that stands twice draws twice."""
  small, large = (train(Numbers(24), 24 // size, batch_size=size, preprocess=ops_of("add_noise()")) for size in (4, 12))
  by_label = lambda batches: {int(i): float(x) for b in batches for i, (x,) in zip(b["label"], b["x"])}
  assert by_label(small) == by_label(large)
  once = by_label(large)
  twice = by_label(train(Numbers(24), 2, batch_size=12, preprocess=ops_of("add_noise()", "add_noise()")))
  first, second = np.array([[once[i] - i, twice[i] - once[i]] for i in range(24)]).T
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.6
  again = by_label(train(Numbers(24), 2, batch_size=12, start_step=2, preprocess=ops_of("add_noise()")))
  assert all(again[i] != once[i] for i in range(24))


def test_a_source_may_have_an_order_of_its_own():
  class Backwards(Numbers):
    def order(self, positions, seed):
      return positions // self.n, self.n - 1 - positions % self.n

  assert [b["label"].tolist() for b in train(Backwards(4), 3, batch_size=2)] == [[3, 2], [1, 0], [3, 2]]


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 7, 8, 9])
def test_evaluation_counts_every_example_once_in_as_many_batches_on_every_host(n, hosts):
  parts = []
  for host in range(hosts):
    with pipeline.eval_batches(Numbers(n), batch_size=8, host=host, hosts=hosts) as batches:
      parts.append(list(batches))
  assert {len(p) for p in parts} == {-(-n // 8)}
  steps = [{k: np.concatenate([b[k] for b in step]) for k in step[0]} for step in zip(*parts)]
  assert all(b["mask"].dtype == np.float32 and b["label"].shape == (8,) for b in steps)
  assert np.concatenate([b["label"][b["mask"] == 1] for b in steps]).tolist() == list(range(n))
  assert np.concatenate([b["mask"] for b in steps]).tolist() == [1.0] * n + [0.0] * (-n % 8)


def test_training_masks_nothing():
  assert train(Numbers(4), 1)[0]["mask"].tolist() == [1.0] * 6


def test_batches_come_in_order_from_many_threads():
  ordered = train(Numbers(20), 40)
  assert_same(train(Numbers(20), 40, preprocess=ops_of("dawdle()"), threads=4), ordered)


def test_no_more_is_fetched_than_asked_for_ahead():
  fetched = []
  with pipeline.train_batches(Numbers(20, fetched), batch_size=2, seed=0, prefetch=3, threads=1) as batches:
    next(batches)
    time.sleep(0.1)
    assert len(fetched) <= 4


def test_what_a_worker_raises_is_raised_as_it_was():
  with pytest.raises(ZeroDivisionError, match="3"):
    train(Numbers(6), 2, preprocess=ops_of("fail_at(3)"))


def test_what_a_worker_raises_reaches_the_loop_after_the_batches_before_it():
  with pipeline.eval_batches(Numbers(12), batch_size=4, preprocess=ops_of("fail_at(9)")) as batches:
    on_device = pipeline.to_device(batches, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert [next(on_device)["label"].tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ZeroDivisionError, match="9"):
      next(on_device)
    with pytest.raises(StopIteration):
      next(on_device)


def workers():
  return [t for t in threading.enumerate() if t.name.startswith("bigjax")]


@pytest.mark.parametrize("how", ["close", "forget", "end", "upstream first"])
def test_nothing_is_left_running(how):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  make = pipeline.eval_batches if how == "end" else lambda s, **kw: pipeline.train_batches(s, seed=0, **kw)
  batches = make(Numbers(100), batch_size=4, preprocess=ops_of("dawdle()"))
  on_device = pipeline.to_device(batches, sharding, ahead=1)
  next(on_device)
  assert workers()
  if how == "close":
    on_device.close()
  elif how == "end":
    assert len(list(on_device)) == 24
  elif how == "upstream first":
    batches.close()
    on_device.close()
  del batches, on_device
  gc.collect()
  assert not workers()


def test_closing_stops_a_consumer_in_another_thread():
  batches = pipeline.train_batches(Numbers(100), batch_size=4, seed=0, preprocess=ops_of("dawdle()"))
  seen = []
  consumer = threading.Thread(target=lambda: seen.extend(batches))
  consumer.start()
  time.sleep(0.05)
  batches.close()
  consumer.join(timeout=5)
  assert seen and not consumer.is_alive() and not workers()


def test_who_waits_hears_that_nothing_came_and_a_source_that_stands_still_holds_nobody_up():
  comes = threading.Event()

  def held():
    yield 1
    comes.wait()
    yield 2

  ahead = pipeline.Ahead(held(), 1)
  assert ahead.take(60.0) == 1
  with pytest.raises(queue.Empty):
    ahead.take(0.05)
  ahead.abandon()
  begun = time.monotonic()
  ahead.close()
  assert time.monotonic() - begun < 5
  with pytest.raises(StopIteration):
    ahead.take(0.05)
  comes.set()


def test_what_stands_still_is_read_anew_once_and_each_item_comes_once():
  comes, readings = threading.Event(), []

  def reading(first):
    readings.append(first)
    for i in range(first, 6):
      if i == 2 and len(readings) == 1:
        comes.wait()
      yield i

  with pipeline.Ahead(reading(0), 1, reading) as ahead:
    assert [ahead.take(60.0), ahead.take(60.0)] == [0, 1]
    with pytest.raises(queue.Empty):
      ahead.take(0.05)
    ahead.begin_again()
    ahead.begin_again()
    assert ahead.take(60.0) == 2 and readings == [0, 2]
    comes.set()  # The first goes on as well; whichever is first gives an item.
    assert list(ahead) == [3, 4, 5]


def test_a_second_reading_that_fails_leaves_it_to_the_first():
  comes = threading.Event()

  def held():
    comes.wait()
    yield 0

  def torn(first):
    raise OSError(first)
    yield

  with pipeline.Ahead(held(), 1, torn) as ahead:
    ahead.begin_again()
    with pytest.raises(queue.Empty):
      ahead.take(0.2)
    comes.set()
    assert list(ahead) == [0]


def test_batches_arrive_split_over_the_devices():
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  size = 2 * len(jax.devices())
  with pipeline.train_batches(Numbers(20), batch_size=size, seed=0) as batches:
    expected = list(itertools.islice(batches, 3))
  with pipeline.to_device(pipeline.train_batches(Numbers(20), batch_size=size, seed=0), sharding) as on_device:
    for want in expected:
      got = next(on_device)
      assert got["x"].sharding.is_equivalent_to(sharding, 2) and len(got["x"].addressable_shards) == len(jax.devices())
      assert_same(jax.device_get(got), want)


def test_spec_tells_the_shapes_and_types_on_the_device():
  class Images(Numbers):
    def fetch(self, ids):
      return {"image": np.zeros((len(ids), 8, 8, 1), np.uint8), "label": ids, "weight": np.ones(len(ids))}

  found = pipeline.spec(Images(1), ops.parse("value_range(-1,1)"))
  assert {k: (v.shape, str(v.dtype)) for k, v in found.items()} == {
    "image": ((8, 8, 1), "float32"),
    "label": ((), "int32"),
    "weight": ((), "float32"),
    "mask": ((), "float32"),
  }


def test_batches_of_the_order_that_are_passed_over_leave_the_others_as_they_are():
  whole, told = train(Numbers(100), 12), []
  left = train(Numbers(100), 9, skips=((2, 3), (5, 7)), fetched=lambda *examples: told.append(examples))
  for a, b, (_, ids, _) in zip(left, [whole[i] for i in (0, 1, 3, 4, 7, 8, 9, 10, 11)], told):
    assert_same(a, b)
    np.testing.assert_array_equal(a["label"], ids)
  on = train(Numbers(100), 4, skips=((2, 3), (5, 7)), start_step=5)
  for a, b in zip(on, left[5:]):
    assert_same(a, b)


def test_what_can_not_be_a_batch_is_told():
  with pytest.raises(UserError, match="batch_size: 6 is not a positive multiple of 4, the number of hosts' parts"):
    train(Numbers(10), 1, hosts=4)
  with pytest.raises(UserError, match="Numbers has no examples"):
    train(Numbers(0), 1)

  class Names(Numbers):
    def fetch(self, ids):
      return {"name": np.array([b"a"] * len(ids), object), "label": ids}

  with pytest.raises(UserError, match=r"'name' as text or objects.*add drop\('name'\)"):
    pipeline.spec(Names(4))
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with pytest.raises(UserError, match="'name' as text"):
    next(pipeline.to_device(pipeline.eval_batches(Names(4), batch_size=4), sharding))


def test_a_program_that_closes_nothing_ends_quietly():
  program = """
import jax
from bigjax.data import pipeline, synthetic
source = synthetic.make("linear", num_examples=10)
left = pipeline.train_batches(source, batch_size=2, seed=0)
next(left)
batches = pipeline.train_batches(source, batch_size=2, seed=0)
on_device = pipeline.to_device(batches, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
print(sorted(next(on_device)))
"""
  ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
  assert (ended.returncode, ended.stdout, ended.stderr) == (0, "['mask', 'target', 'x']\n", "")
