"""Batches that grow: which examples they hold, in what order, and what is padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import train
from bigjax.data import pipeline, synthetic
from bigjax.data.growth import Growth
from bigjax.errors import UserError
from bigjax.sums import Sums

GROWTH = Growth(parts=4, first=1, steps=6)


class Numbers:
  """Examples are their numbers."""

  def __len__(self):
    return 1000

  def fetch(self, ids):
    return {"id": ids}

  def order(self, positions, seed):
    return np.zeros_like(positions), positions


def batches(count, start=0, **arguments):
  made = pipeline.train_batches(Numbers(), batch_size=8, seed=0, start_step=start, growth=GROWTH, **arguments)
  with made:
    return [next(made) for _ in range(count)]


def test_batches_grow_to_their_size_and_every_example_is_seen_once_in_order():
  found = batches(10)
  assert [int(b["mask"].sum()) for b in found] == [2, 2, 4, 4, 6, 6, 8, 8, 8, 8]
  seen = np.concatenate([b["id"][b["mask"] == 1] for b in found])
  np.testing.assert_array_equal(seen, np.arange(len(seen)))


def test_empty_rows_are_whole_parts_of_an_accumulated_batch():
  for batch in batches(7):
    parts = batch["mask"].reshape(-1, GROWTH.parts)  # As `train.accumulate` cuts it.
    assert (parts == parts[0]).all()
    assert (np.diff(parts[0]) <= 0).all() and parts[0, 0] == 1


@pytest.mark.parametrize("start", [1, 4, 6, 9])
def test_a_run_goes_on_at_any_step(start):
  for a, b in zip(batches(12)[start:], batches(12 - start, start)):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_hosts_hold_parts_of_the_same_batches():
  halves = [batches(9, host=i, hosts=2) for i in range(2)]
  for whole, a, b in zip(batches(9), *halves):
    for name in whole:
      np.testing.assert_array_equal(whole[name], np.concatenate([a[name], b[name]]))


def test_neighbours_that_are_not_there_are_not_mixed():
  from bigjax.data import ops

  source = synthetic.make(kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
  with pytest.raises(UserError, match="config.batch_warmup: mixup mixes neighbours"):
    pipeline.train_batches(source, batch_size=8, seed=0, growth=GROWTH, preprocess=ops.parse("one_hot(3)|mixup(0.2)"))


def test_empty_parts_add_nothing_and_are_not_computed():
  computed = []

  def grad_fn(params, extras, batch, key):
    jax.debug.callback(lambda: computed.append(1))
    loss = lambda params: (params * batch["x"] * batch["mask"]).sum()
    return jax.grad(loss)(params), (Sums.of(batch["x"], weight=batch["mask"]), extras)

  batch = {"x": jnp.arange(8.0), "mask": jnp.asarray([1.0, 1, 0, 0] * 2)}
  found = {}
  for skip in (False, True):
    computed.clear()
    step = jax.jit(train.accumulate(grad_fn, 4, skip=skip))
    found[skip] = jax.device_get(step(jnp.float32(2.0), {}, batch, jax.random.key(0)))
    jax.effects_barrier()
    assert len(computed) == (2 if skip else 4)
  jax.tree.map(np.testing.assert_array_equal, found[True], found[False])
  assert found[True][0] == 0 + 1 + 4 + 5
