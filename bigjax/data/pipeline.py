"""From a source to batches on devices: endless and shuffled to train, finite and padded to evaluate.

Batch `step` is a function of (seed, step): the order says which examples, and an op draws from (seed, epoch, id) and
its place in the string alone. So a run goes on at any step at no cost, on any number of hosts, and sees the same.

There are two engines with the same results. If all ops work on NumPy batches, a few threads do: a million small images
a second, and TensorFlow, which takes seconds to import, stays out. If an op works on single examples, as decoding does,
tf.data does the work from the first to the last of these, in parallel and in order. Array ops between two such ops run
example by example under Python's lock, which is slow: put them first or last.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bigjax.data import growth as growing
from bigjax.data import order
from bigjax.errors import UserError

_ORDERED = 4096  # Examples whose order is worked out at once, so that NumPy's cost a call does not count.
_CLOSING = 10.0  # Seconds that closing waits for a thread; one whose source stands still is left alone then.

Skips = tuple[tuple[int, int], ...]  # Ranges of batches of the order that no step takes, in order, none within another.


def train_batches(
  source: Any,
  *,
  batch_size: int,
  seed: int,
  preprocess: tuple[Any, ...] = (),
  start_step: int = 0,
  growth: growing.Growth | None = None,
  skips: Skips = (),
  fetched: Callable[..., None] | None = None,
  host: int | Sequence[int] = 0,
  hosts: int = 1,
  prefetch: int = 2,
  threads: int | None = None,
) -> "Batches":
  """Returns the endless batches of this host from step `start_step` on.

  Args:
    source: Has `len` and `fetch(ids)`, and `order(positions, seed)` if reshuffled epochs aren't the order it wants.
    batch_size: Examples a step on all hosts together.
    seed: Of the order and of the ops' randomness.
    preprocess: Ops in order, see bigjax/data/ops.
    start_step: The step of the first batch.
    growth: Leaves rows of early batches empty, of `mask` 0.
    skips: What of the order is left out.
    fetched: Is told (epochs, ids, mask) of every batch, as they were asked of the source, before it is given.
    host: Which part of each batch: the `host`-th of `hosts` equal ones, in order, or several of them.
    hosts: Number of parts.
    prefetch: Batches made ahead, or as many as there are threads if these are more.
    threads: Workers for array ops; one a core, 4 at most, if None.
  """
  plan = Plan(source, batch_size, host, hosts, seed=seed, growth=growth, skips=skips)
  return _batches(plan, tuple(preprocess), start_step, prefetch, threads, fetched)


def eval_batches(
  source: Any,
  *,
  batch_size: int,
  preprocess: tuple[Any, ...] = (),
  start: int = 0,
  host: int | Sequence[int] = 0,
  hosts: int = 1,
  prefetch: int = 2,
  threads: int | None = None,
) -> "Batches":
  """Returns every example once, by id, in as many batches on every host; where `mask` is 0 is padding.

  Without the first `start` batches.
  """
  return _batches(Plan(source, batch_size, host, hosts), tuple(preprocess), start, prefetch, threads)


def spec(source: Any, preprocess: tuple[Any, ...] = ()) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shape (without the batch) and the type on a device of every feature, `mask` too, by making a batch."""
  # Two: some ops mix pairs.
  with eval_batches(source, batch_size=2, preprocess=preprocess, prefetch=1, threads=1) as batches:
    batch = next(batches)
  _check_numeric(batch)
  return {k: jax.ShapeDtypeStruct(v.shape[1:], jax.dtypes.canonicalize_dtype(v.dtype)) for k, v in batch.items()}


def to_device(
  batches: Iterable[dict[str, np.ndarray]],
  sharding: jax.sharding.Sharding,
  ahead: int = 2,
  again: Callable[[int], Iterable[dict[str, np.ndarray]]] | None = None,
) -> "Ahead":
  """Returns `batches` as global arrays laid out by `sharding`, `ahead` of them on the devices before they are used.

  Each process gives its parts, see `sharding.data_part`. A thread does it, at its own pace; closing what is returned
  ends it and closes `batches`. `again(n)` gives the same batches without the first n, see `Ahead.begin_again`.
  """

  def put(batches):
    with contextlib.closing(batches) if hasattr(batches, "close") else contextlib.nullcontext():
      for i, batch in enumerate(batches):
        if i == 0:
          _check_numeric(batch)
        yield {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}

  return Ahead(put(batches), ahead, again and (lambda n: put(again(n))))


def _check_numeric(batch):
  for name, value in batch.items():
    if value.dtype.kind not in "biufcV":  # V: bfloat16 and other types of ml_dtypes.
      raise UserError(
        f"preprocess leaves {name!r} as text or objects, which no device holds: decode it, "
        f"or add drop({name!r}), or keep(...) with what the model and the task need."
      )


class Batches:
  """An iterator that can be closed from any thread, which ends its workers."""

  def __init__(self, generator: Iterator[dict[str, np.ndarray]]):
    self._generator, self._lock, self._closed = generator, threading.Lock(), threading.Event()
    # Also when this object is forgotten, and before the interpreter takes itself apart.
    self.close = weakref.finalize(self, _close, generator, self._lock, self._closed)

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    with self._lock:
      if self._closed.is_set():
        raise StopIteration
      return next(self._generator)

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


def _close(generator, lock, closed):
  closed.set()
  if lock.acquire(timeout=_CLOSING / 5):  # A thread has it whose source stands still, or it is about to be free.
    try:
      generator.close()
    finally:
      lock.release()


class Ahead:
  """An iterator run by a thread of its own, up to `depth` items before they are asked for.

  `again(n)`, if there is one, gives the same items without the first n.
  """

  def __init__(self, generator: Iterator[Any], depth: int, again: Callable[[int], Iterator[Any]] | None = None):
    self._items, self._room, self._stopped = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
    self._abandoned, self._again, self._taken = threading.Event(), again, 0
    self._threads: list[threading.Thread] = []
    for _ in range(max(1, depth)):
      self._room.put(None)
    self.close = weakref.finalize(self, _stop, self._threads, self._room, self._stopped, self._abandoned)
    self._begin(generator)

  def _begin(self, generator):
    # The thread must not hold `self`, so that forgetting this object ends it as closing does.
    parts = (generator, self._taken, self._items, self._room, self._stopped, bool(self._threads))
    self._threads.append(threading.Thread(target=_run_ahead, args=parts, name="bigjax-ahead", daemon=True))
    self._threads[-1].start()

  def __iter__(self):
    return self

  def __next__(self) -> Any:
    return self.take(None)

  def take(self, seconds: float | None) -> Any:
    """Returns the next item, as `next` does; raises `queue.Empty` if it is not there within so many seconds."""
    if self._stopped.is_set():
      raise StopIteration
    number, item, error = self._items.get(timeout=seconds)
    while number != self._taken:  # Another thread had it first.
      self._room.put(None)
      number, item, error = self._items.get(timeout=seconds)
    if error is not None:
      self.close()
      raise error
    self._taken += 1
    self._room.put(None)
    return item

  def begin_again(self) -> None:
    """Has one more thread make what comes next from the beginning, once: whichever has an item first gives it.

    What one waits for is often a connection, not what is at its other end.
    """
    if self._again is not None and len(self._threads) == 1:
      self.abandon()
      self._room.put(None)  # The first thread may have the only one.
      self._begin(self._again(self._taken))

  def abandon(self) -> None:
    """Has closing not wait for the thread, whose source stands still."""
    self._abandoned.set()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


def _run_ahead(generator, number, items, room, stopped, is_second):
  try:
    with contextlib.closing(generator):
      while True:
        room.get()
        if stopped.is_set():
          return
        items.put((number, next(generator), None))
        number += 1
  except BaseException as e:  # Its end or its failure: the consumer's to see.
    if isinstance(e, StopIteration) or not is_second:  # A second attempt that fails leaves it to the first.
      items.put((number, None, e))


def _stop(threads, room, stopped, abandoned):
  stopped.set()
  for _ in threads:
    room.put(None)
  for thread in threads:
    if thread is not threading.current_thread():  # The collector of garbage runs in any thread.
      thread.join(0 if abandoned.is_set() else _CLOSING)


def taken(steps: np.ndarray | int, skips: Skips) -> np.ndarray:
  """Returns which batch of the order each step takes, counted from 0 as steps are here."""
  for first, stop in skips:
    steps = np.where(steps >= first, steps + (stop - first), steps)
  return np.asarray(steps)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which examples make up a host's batches: in training order for a seed, or each once, by id, without one."""

  source: Any
  batch_size: int
  host: int | Sequence[int]  # Which of `hosts` equal parts, or several of them, in order.
  hosts: int
  seed: int | None = None
  growth: growing.Growth | None = None
  skips: Skips = ()

  def __post_init__(self):
    if self.batch_size < 1 or self.batch_size % self.hosts:
      raise UserError(
        f"batch_size: {self.batch_size} is not a positive multiple of {self.hosts}, the number of hosts' parts."
      )
    if len(self.source) == 0:
      raise UserError(f"data: the source {type(self.source).__name__} has no examples.")

  @property
  def parts(self) -> np.ndarray:
    return np.atleast_1d(np.asarray(self.host, np.int64))

  @property
  def local_size(self) -> int:
    return self.batch_size // self.hosts * len(self.parts)

  @functools.cached_property
  def rows(self) -> np.ndarray:
    """The place in the whole batch of each row that this host has."""
    size = self.batch_size // self.hosts
    return (self.parts[:, None] * size + np.arange(size)).reshape(-1)

  @property
  def steps(self) -> int | None:
    """The number of batches; None if endless."""
    return None if self.seed is not None else -(-len(self.source) // self.batch_size)

  def examples(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (epochs, ids, mask) of the examples at `places` in the stream of this host's examples."""
    step, place = np.divmod(places, self.local_size)
    step, row, mask = taken(step, self.skips), self.rows[place], np.ones(len(places), bool)
    positions = step * self.batch_size + row
    if self.growth is not None:
      positions, mask = self.growth.rows(step, row, self.batch_size)
    if self.seed is None:
      last = len(self.source) - 1
      return np.zeros_like(positions), np.minimum(positions, last), (positions <= last).astype(np.float32)
    if hasattr(self.source, "order"):
      epochs, ids = self.source.order(positions, self.seed)
    else:
      epochs, ids = order.shuffled(len(self.source), positions, self.seed)
    return epochs, ids, mask.astype(np.float32)

  def keys(self, epochs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return order.example_keys(self.seed or 0, epochs, ids)


def _batches(plan, ops, start_step, prefetch, threads, fetched=None):
  pairing = [op.name for op in ops if op.name.rpartition(".")[2] in ("mixup", "cutmix")]
  if pairing and plan.growth is not None:
    raise UserError(
      f"config.batch_warmup: {pairing[0]} mixes neighbours, some of which are not there yet. Take one out."
    )
  if pairing and len(plan.parts) > 1 and plan.batch_size // plan.hosts % 2:
    raise UserError(
      f"batch_size: {pairing[0]} mixes neighbours, and {plan.batch_size} in {plan.hosts} parts puts them on different "
      f"hosts; choose a multiple of {2 * plan.hosts}."
    )
  workers = threads or min(4, os.cpu_count() or 1)
  engine = _with_tensorflow if any(op.kind == "example" for op in ops) else _with_threads
  return Batches(_told(engine(plan, ops, start_step, max(1, prefetch), workers), fetched or (lambda *examples: None)))


def _told(made, fetched):
  """Passes batches on, what they are of told first."""
  with contextlib.closing(made):
    for examples, batch in made:
      fetched(*examples)
      yield batch


def _with_threads(plan, ops, start_step, prefetch, workers):
  """Engine of array ops alone."""

  def make(examples):
    epochs, ids, mask = examples
    return examples, _apply(ops, 0, plan, epochs, ids, plan.source.fetch(ids)) | {"mask": mask}

  return _in_order(make, _planned(plan, start_step), max(prefetch, workers), workers)


def _planned(plan, start_step):
  """Yields (epochs, ids, mask) of each batch, many batches worked out at a time."""
  size = plan.local_size
  steps = itertools.count(start_step) if plan.steps is None else iter(range(start_step, plan.steps))
  while chunk := list(itertools.islice(steps, max(1, _ORDERED // size))):
    found = plan.examples(np.arange(chunk[0] * size, (chunk[-1] + 1) * size))
    yield from zip(*(np.split(part, len(chunk)) for part in found))


def _in_order(function, items, depth, workers):
  """Yields `function(item)` for each item, in order, `depth` of them under way in `workers` threads.

  Python waits for the threads of an executor before it ends; a source that stands still would hold the process for
  good. These are daemons.
  """
  work: queue.SimpleQueue[tuple[concurrent.futures.Future, Any] | None] = queue.SimpleQueue()
  pool = [
    threading.Thread(target=_work, args=(function, work), name="bigjax-data", daemon=True) for _ in range(workers)
  ]

  def submit(item):
    future = concurrent.futures.Future()
    work.put((future, item))
    return future

  waiting = collections.deque(submit(item) for item in itertools.islice(items, depth))
  for thread in pool:
    thread.start()
  try:
    while waiting:
      done = waiting.popleft().result()
      waiting.extend(submit(item) for item in itertools.islice(items, 1))
      yield done
  finally:
    for future in waiting:
      future.cancel()
    for _ in pool:
      work.put(None)
    until = time.monotonic() + _CLOSING
    for thread in (t for t in pool if t is not threading.current_thread()):
      thread.join(max(0.0, until - time.monotonic()))


def _work(function, work):
  """A thread of the pool: what it is given, until that is None."""
  while (given := work.get()) is not None:
    future, item = given
    if future.set_running_or_notify_cancel():
      try:
        future.set_result(function(item))
      except BaseException as e:  # The consumer's to see.
        future.set_exception(e)
    del given, future, item  # A batch is large.


def _apply(ops, start, plan, epochs, ids, batch):
  """Runs the array ops from place `start` of `ops` on; an op's place sets its draws apart from its neighbours'."""
  keys = plan.keys(epochs, ids) if ops[start:] else None
  for place in range(start, len(ops)):
    batch = ops[place].apply(batch, order.fold(keys, place))
  return batch


def _with_tensorflow(plan, ops, start_step, prefetch, workers):
  """Engine of ops of which some work on single examples: tf.data up to the last of these, threads from there on."""
  from bigjax.data import tfdata

  rest = 1 + max(i for i, op in enumerate(ops) if op.kind == "example")

  def finish(item):
    (*_, mask), (epochs, ids, batch) = item
    return (epochs, ids, mask), _apply(ops, rest, plan, epochs, ids, batch) | {"mask": mask}

  with contextlib.closing(tfdata.batches(plan, ops[:rest], start_step)) as made:
    yield from _in_order(finish, zip(_planned(plan, start_step), made), prefetch, workers)
