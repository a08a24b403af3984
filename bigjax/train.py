"""The training loop: read this file to know what one run does."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils

from bigjax import config as configs
from bigjax import hosts, metrics, overview, precision, record, sharding, tuned
from bigjax import state as states
from bigjax.best import Watch
from bigjax.checkpoint import Checkpoints
from bigjax.data import pipeline
from bigjax.errors import UserError
from bigjax.evaluation import Evaluation
from bigjax.experiment import OBSERVING, Experiment, TrainConfig, build
from bigjax.plan import mfu, profiles

STOPPED = 75  # Exit code of a run that was asked to stop and saved itself (sysexits' "try again later").


def train(config: TrainConfig, workdir: str) -> str:
  """Trains until `config.total_steps`, from the last checkpoint in `workdir` if there is one.

  Returns:
    How it ended: "finished", "stopped" (asked to by a signal) or "stopped early" (`config.early_stop`).
  """
  described = configs.describe(config)
  record.open_workdir(workdir, described, free=OBSERVING)
  run = build(config)
  primary = jax.process_index() == 0

  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(run.mesh))
    checkpoints = stack.enter_context(Checkpoints(workdir, run.keep()))
    evals = [Evaluation.of(run, name, e) for name, e in config.evals.items()]
    with concurrent.futures.ThreadPoolExecutor(1) as background:
      compiling = background.submit(compile_step, run)  # While the first state is made or read.
      state, loop = start(run, checkpoints)
    step_fn, first = compiling.result(), int(state.step)
    watch = Watch.of(config.keep, config.early_stop, config.evals, loop)
    if primary:
      overview.write(run, workdir)
      record.start(workdir, described, **overview.facts(run))
      stack.enter_context(record.failure_noted(workdir))

    batches = stack.enter_context(train_batches(run, first))
    writers = stack.enter_context(metrics.Writers(workdir, config.writers, resume_step=first or None, primary=primary))
    progress = stack.enter_context(metrics.Progress(run.total_steps, first, *run.pace, quiet=not primary))
    interrupt = stack.enter_context(Interrupt())
    stack.enter_context(hosts.failure_told())  # Last in, so that no peer is waited for before it knows.
    progress.say(overview.headline(run))

    key = jax.device_put(jax.random.fold_in(jax.random.key(config.seed), 1), sharding.replicated(run.mesh))
    logger = Logger(writers, progress, mfu.of(run))
    log_every = run.steps(config.log_every, "config.log_every")
    save_every = [run.steps(config.checkpoint_every, "config.checkpoint_every")]
    save_every += [run.keep().every] if config.keep.every is not None else []  # What is to be kept has to be saved.
    status = "stopped early" if watch.tired else "finished"

    for step in range(first + 1, 1 + (first if watch.tired else run.total_steps)):
      due = functools.partial(is_due, step, last=run.total_steps)
      with progress.pause("input"):
        batch = next(batches)
      with jax.profiler.StepTraceAnnotation("train", step_num=step), jax.transfer_guard("disallow"):
        state, measured = step_fn(state, batch, key)
      logger.step(step, measured if due(log_every) else None)

      measurements = {}
      for evaluation in evals:
        if due(evaluation.every):
          with progress.pause("eval"):
            measurements |= evaluation.run(state)
      if measurements:
        logger.evals(step, measurements)
        watch = watch.seen(step, measurements)

      asked = interrupt.agreed()
      if watch.tired:
        status = "stopped early"
      elif asked:
        status = "stopped"
      ending = status != "finished"
      if any(map(due, save_every)) or watch.improved_at(step) or ending:
        logger.flush()
        refuse_broken(step, measured)
        with progress.pause("save"):
          checkpoints.save(step, *tuned.saved(run, state, watch.to_json()), watch.metric_at(step))
      if ending:
        break

    logger.flush()
    with progress.pause("save"):
      checkpoints.wait()
    writers.flush()
    progress.close()
    spent = dict(seconds=progress.breakdown(), steps_per_second=progress.steps_per_second())
    if primary:
      record.finish(workdir, status, step=int(state.step), best=watch.to_json(), **spent)
  return status


def evaluate(config: TrainConfig, workdir: str, step: int | None = None) -> tuple[int, dict[str, Any]]:
  """Measures the last checkpoint in `workdir`, or that of `step`, by all of the config's evaluators, on any mesh."""
  run = build(config)
  with jax.set_mesh(run.mesh), Checkpoints(workdir, read_only=True) as checkpoints:
    step = hosts.agreed(max(checkpoints.steps(), default=None)) if step is None else step
    if step is None:
      raise UserError(f"--workdir={workdir} has no checkpoint yet.")
    state, _ = tuned.restore(run, checkpoints, step)
    results = {}
    for name, e in config.evals.items():
      results |= Evaluation.of(run, name, e).run(state)
    return int(state.step), results


def start(run: Experiment, checkpoints: Checkpoints) -> tuple[states.TrainState, Mapping[str, Any]]:
  """Returns the state to go on from, and what the loop remembered: the last checkpoint's, or a fresh one."""
  # A network's file system may show one host less than another.
  last = hosts.agreed(max(checkpoints.steps(), default=None))
  if last is not None:
    return tuned.restore(run, checkpoints, last)
  return tuned.first_state(run, jax.random.key(run.config.seed)), {}


def compile_step(run: Experiment):
  """Returns the step compiled for the run's shapes and layouts: one program, which takes no others."""
  with jax.set_mesh(run.mesh):
    return lower_step(run).compile(compiler_options=profiles.compiler_options(run.mesh.devices.flat[0]))


def lower_step(run: Experiment):
  """Returns what the compiler is given."""
  replicated = sharding.replicated(run.mesh)
  laid_out = lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
  state = jax.tree.map(laid_out, run.abstract, run.shardings)
  batch = {k: laid_out(v, sharding.batch_sharding(run.mesh)) for k, v in run.batch.items()}
  key = laid_out(jax.eval_shape(lambda: jax.random.key(0)), replicated)
  with jax.set_mesh(run.mesh):
    return make_step(run).lower(state, batch, key)


def make_step(run: Experiment):
  """Returns `(state, batch, key) -> (state, metrics)`, under `jit`, the old state's memory given to the new."""
  tx, optimizer = run.optimizer.tx, run.optimizer

  def mean_and_grads(params, extras, batch, key, scale):
    """One division by the global weight, after everything is added up."""

    def loss(params, extras, batch, key):
      sums, extras = run.loss(params, extras, batch, key)
      return sums.sums["loss"] * scale, (sums, extras)

    accumulated = lambda grad_fn: accumulate(grad_fn, run.config.accumulate, skip=run.growth is not None)
    summed = run.division.summed(jax.grad(loss, has_aux=True), accumulated)
    grads, (sums, extras) = summed(params, extras, batch, key)
    weight = sums.weights["loss"]
    divisor = jnp.where(weight == 0, 1, weight) * scale
    return jax.tree.map(lambda g: g / divisor, grads), sums.means(), extras

  def step(state, batch, key):
    key, scale = jax.random.fold_in(key, state.step), optimizer.loss_scale(state.opt_state)
    grads, means, extras = mean_and_grads(state.params, state.extras, batch, key, scale)
    again = lambda params, _=None: mean_and_grads(params, state.extras, batch, key, scale)[0]
    updates, opt_state = tx.update(grads, state.opt_state, state.params, value=means["loss"], grad_fn=again)
    params = optax.apply_updates(state.params, updates)
    extras = optimizer.unless_skipped(opt_state, run.model.settled(params, extras), state.extras)
    rates = {f"learning_rate{name}": rate for name, rate in optimizer.rates(opt_state, state.step).items()}
    norms = {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
    measured = means | rates | norms | optimizer.measures(opt_state)
    return states.TrainState(state.step + 1, params, extras, opt_state), measured

  return run.division.jit(step, donate_argnums=0, out_shardings=(run.shardings, None))


def accumulate(grad_fn, parts: int, skip: bool = False):
  """Returns `grad_fn` computed over `parts` of the batch, one after another, sums added; as the whole batch at once.

  `skip` leaves out those that are all padding, but for the first.
  """
  if parts == 1:
    return grad_fn

  def summed(params, extras, batch, key):
    # Part i takes every parts-th example, so that each device splits what it already has.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    part = lambda i: jax.tree.map(lambda x: x[i], split)

    def add(carry, i):
      total, sums, extras = carry
      grads, (more, extras) = grad_fn(params, extras, part(i), jax.random.fold_in(key, i))
      return jax.tree.map(jnp.add, total, grads), sums + more, extras

    def body(carry, i):
      if not skip:
        return add(carry, i), None
      return jax.lax.cond(part(i)["mask"].any(), add, lambda carry, _: carry, carry, i), None

    grads, (sums, extras) = grad_fn(params, extras, part(0), jax.random.fold_in(key, 0))
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)  # Those of bfloat16 parameters are bfloat16.
    (grads, sums, extras), _ = jax.lax.scan(body, (grads, sums, extras), jnp.arange(1, parts))
    return grads, (sums, extras)

  return summed


def is_due(step: int, every: int, *, last: int) -> bool:
  """Whether something done `every` so many steps is done at `step`; at the last it always is."""
  return step % every == 0 or step == last


def train_batches(run: Experiment, first: int) -> pipeline.Ahead:
  """Batches on the devices, from that of step `first` on."""
  mine, parts = sharding.data_part(run.mesh)
  batches = pipeline.train_batches(
    run.data.source,
    batch_size=run.config.batch_size,
    seed=run.config.seed,
    preprocess=run.data.preprocess,
    start_step=first,
    growth=run.growth,
    host=mine,
    hosts=parts,
  )
  return pipeline.to_device(run.checked(batches), sharding.batch_sharding(run.mesh))


def refuse_broken(step: int, measured: Mapping[str, Any]) -> None:
  """Raises `FloatingPointError` where the loss or the update of a step is not finite: such a state is worth nothing."""
  measured = jax.device_get(dict(measured))
  loss, norm, update = (measured[k] for k in ("loss", "grad_norm", "update_norm"))
  skipped = precision.refuse_overflow(step, measured)  # Then the state is that of the step before.
  if not skipped and not (math.isfinite(loss) and math.isfinite(update)):
    raise FloatingPointError(
      f"The loss is {loss} at step {step} (norm of the gradient {norm}, of the update {update}). "
      "Try a lower peak of config.schedule, a longer warmup, or config.clip; the last checkpoint is intact."
    )


class Logger:
  """Fetches a step's metrics once the next step is on its way, so that the devices never wait for the host."""

  def __init__(self, writers: metrics.Writers, progress: metrics.Progress, speed: Callable[[Any], Mapping[str, float]]):
    self._writers, self._progress, self._pending = writers, progress, None
    self._speed = speed  # What there is to say of so many steps a second.

  def step(self, step: int, measured: Mapping[str, jax.Array] | None) -> None:
    self.flush()
    self._pending = None if measured is None else (step, measured)
    self._progress.update(step, None)

  def evals(self, step: int, measurements: Mapping[str, Any]) -> None:
    self.flush()
    self._writers.write(step, measurements)
    self._progress.note(step, measurements)

  def flush(self) -> None:
    """Writes the metrics that are waiting; raises `FloatingPointError` as `refuse_broken` does."""
    if self._pending is None:
      return
    (step, measured), self._pending = self._pending, None
    values = {k: float(v) for k, v in jax.device_get(measured).items()}
    values |= self._speed(self._progress.steps_per_second())
    self._writers.write(step, values)
    self._progress.update(step, values)
    refuse_broken(step, values)


class Interrupt:
  """SIGTERM and SIGINT asked for politely: the first is noticed between two steps, the second ends at once.

  Several processes stop at the same step whichever of them is asked. JAX listens to SIGTERM then (the notice that a
  machine is about to be taken away), and sets a step that none has passed.
  """

  def __init__(self):
    self._asked, self._steps = False, 0
    self._several = jax.process_count() > 1

  def __enter__(self) -> Interrupt:
    here = threading.current_thread() is threading.main_thread()  # Python gives signals to no other.
    heard = [signal.SIGINT] if self._several else [signal.SIGTERM, signal.SIGINT]
    self._before = {s: signal.signal(s, self._ask) for s in heard if here}
    return self

  def agreed(self) -> bool:
    """Whether to stop now; to be called once after every step, by every process."""
    if not self._several:
      return self._asked
    self._steps += 1  # Counted from the start of the loop: a notice that came before it stops the first step.
    return multihost_utils.reached_preemption_sync_point(self._steps)

  def _ask(self, number, frame):
    del frame
    self._asked = True
    signal.signal(number, self._before[number])
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)
