"""The engine for ops on single examples: tf.data's parallel map, in order, around a source's random access.

A source is asked for a few dozen examples at a time, so that it can read them together; the array ops that come first
run on these in NumPy. What then differs from example to example (decoding, cropping) is one TensorFlow graph, run on
all cores. The first example is worked on eagerly: it tells the types and shapes to expect, and what is wrong in words.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from bigjax.data import order
from bigjax.errors import UserError

_FETCHED = 64  # Enough to read well, few enough that raw images are small beside the batches.


def tensorflow() -> Any:
  """Imports TensorFlow so that it stays quiet, rounds alike everywhere, and leaves accelerators to JAX."""
  if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # What JAX sets; TensorFlow's warnings repeat its errors.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  import tensorflow as tf

  with contextlib.suppress(RuntimeError):  # The user's own code has run TensorFlow before: it keeps its devices.
    for kind in ("GPU", "TPU"):
      tf.config.set_visible_devices([], kind)
  return tf


def batches(
  plan: Any, ops: tuple[Any, ...], start_step: int
) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
  """Yields (epochs, ids, batch) of `plan` (see pipeline.Plan) after `ops`, the last of which works on examples."""
  tf = tensorflow()
  work = _Work(tf, plan, ops)
  size, stop = plan.local_size, 2**62 if plan.steps is None else plan.steps * plan.local_size
  plainly = tf.autograph.experimental.do_not_convert  # It would rewrite the errors that ops raise.
  options = tf.data.Options()
  options.deterministic = True
  dataset = (
    tf.data.Dataset.range(start_step * size, stop, _FETCHED)
    .map(plainly(lambda place: work.fetch(place, stop)), num_parallel_calls=2)
    .unbatch()
    .map(plainly(work.graph), num_parallel_calls=tf.data.AUTOTUNE)
    .batch(size, drop_remainder=True)
    .prefetch(1)
    .with_options(options)
  )
  iterator = dataset.as_numpy_iterator()
  for step in range(start_step, stop):
    try:
      which, batch = next(iterator)
    except StopIteration:
      return
    except tf.errors.OpError as e:
      raise work.explain(range(step * size, (step + 1) * size), e) from None
    yield which[:, 0], which[:, 1], batch


class _Work:
  """What is done to examples: `fetch` some, then `graph` on each, as functions that tf.data can trace."""

  def __init__(self, tf, plan, ops):
    self.tf, self.plan = tf, plan
    self.first = next(i for i, op in enumerate(ops) if op.kind == "example")
    self.head, self.body = ops[: self.first], ops[self.first :]
    self.failures = []  # TensorFlow makes a Python exception a string; here is the exception.
    self.stages = self._eagerly(0)
    self.features, self.shapes = self.stages[0], {name: value.shape for name, value in self.stages[-1].items()}

  def fetch(self, place, stop):
    """Returns (features, seeds, epoch and id) of the examples from `place` on."""

    def load(place):
      with self._kept():
        features, seeds, which = self._load(np.arange(place, min(place + _FETCHED, stop)))
        return [seeds, which, *(features[name] for name in self.features)]

    types = [self.tf.int32, self.tf.int64, *(value.dtype for value in self.features.values())]
    seeds, which, *values = self.tf.numpy_function(load, [place], types)
    seeds.set_shape([None, len(self.body), 2])
    which.set_shape([None, 2])
    for value, known in zip(values, self.features.values()):
      value.set_shape([None, *known.shape])
    return dict(zip(self.features, values)), seeds, which

  def graph(self, features, seeds, which):
    """Runs the ops from the first example op on, on one example; which one that is goes along."""
    for i, op in enumerate(self.body):
      features = self._run(op, features, seeds[i], self.stages[i + 1])
    # tf.data's own check is of the number of elements: it would make one batch of 2 x 3 and 3 x 2 pixels.
    return which, {name: self.tf.ensure_shape(value, self.shapes[name]) for name, value in features.items()}

  def explain(self, places, error):
    """Returns what stopped these examples: what was raised in Python, or which example an op can't take."""
    if self.failures:
      return self.failures[0]
    for place in places:
      try:
        found = self._eagerly(place)[-1]
      except UserError as e:
        return e
      for name, value in found.items():
        if value.shape != self.shapes[name]:
          shown = f"{self.shapes[name]} in the first, {value.shape} in {self._described(place)}"
          return UserError(f"preprocess leaves {name!r} with differing shapes, {shown}: resize or crop to one.")
    return error

  def _load(self, places):
    """Returns features after the array ops that come first, seeds for the ops that follow, and epochs and ids."""
    epochs, ids, _ = self.plan.examples(places)
    keys = self.plan.keys(epochs, ids)
    features = self.plan.source.fetch(ids)
    for place, op in enumerate(self.head):
      features = op.apply(features, order.fold(keys, place))
    for name, values in features.items():
      if values.dtype == object and not isinstance(values[0], bytes | str):
        raise UserError(
          f"preprocess: {name!r} has another shape in every example: begin with drop({name!r}) or keep(...)."
        )
    seeds = np.stack([order.fold(keys, self.first + i) for i in range(len(self.body))], axis=1)
    seeds = seeds.view(np.int32).reshape(len(places), -1, 2)
    return {k: _plain(v) for k, v in features.items()}, seeds, np.stack([epochs, ids], axis=1)

  def _run(self, op, features, seed, made):
    """Runs one op on one example; `made` is what it made of the first, for the types an array op's result has."""
    if op.kind == "example":
      return op.apply(features, seed)
    if op.structural:
      return op.apply(features, None)

    def run(seed, *values):
      with self._kept():
        found = _as_batch(op, dict(zip(features, values)), seed)
        return [found[name] for name in made]

    values = self.tf.numpy_function(run, [seed, *features.values()], [value.dtype for value in made.values()])
    for value, (name, first) in zip(values, made.items()):
      value.set_shape(_kept_shape(features.get(name), first))
    return dict(zip(made, values))

  def _eagerly(self, place):
    """Returns the features of the example at `place` before and after each op, or raises which op can't take it."""
    features, seeds, _ = self._load(np.array([place]))
    stages = [{name: self.tf.constant(value[0]) for name, value in features.items()}]
    for i, op in enumerate(self.body):
      try:
        if op.kind == "array" and not op.structural:
          made = _as_batch(op, {name: value.numpy() for name, value in stages[-1].items()}, seeds[0, i])
          stages.append({name: self.tf.constant(value) for name, value in made.items()})
        else:
          stages.append(self._run(op, stages[-1], self.tf.constant(seeds[0, i]), None))
      except UserError as e:
        raise UserError(f"{e} (In {self._described(place)}.)") from None
      except self.tf.errors.OpError as e:
        raise UserError(f"preprocess: {op} can't take {self._described(place)}: {e.message}") from None
    return stages

  def _described(self, place):
    """Returns `example 17 (label 3, file_name b/17.jpg)`: enough to find it."""
    (example_id,) = ids = self.plan.examples(np.array([place]))[1]
    shown = []
    for name, (value,) in self.plan.source.fetch(ids).items():
      text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
      if np.ndim(value) == 0 and len(text) < 200 and text.isprintable():
        shown.append(f"{name} {text}")
    return f"example {example_id}" + (f" ({', '.join(shown)})" if shown else "")

  @contextlib.contextmanager
  def _kept(self):
    try:
      yield
    except Exception as e:
      self.failures.append(e)
      raise


def _as_batch(op, example, seed):
  """Runs an array op on one example as a batch of one; the bits of its seed are its key."""
  made = op.apply({k: _plain(np.asarray(v))[None] for k, v in example.items()}, seed.view(np.uint64))
  return {k: _plain(v)[0, ...] for k, v in made.items()}


def _kept_shape(before, first):
  """The shape that an array op leaves, of which TensorFlow knows nothing: sizes known before, if the first has them."""
  if before is None or before.shape.rank != first.shape.rank:
    return [None] * first.shape.rank
  return [size if size == known else None for size, known in zip(first.shape, before.shape)]


def _plain(values):
  """NumPy's own strings as objects, which is how TensorFlow knows them."""
  return values.astype(object) if values.dtype.kind in "US" else values
