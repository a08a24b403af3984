"""What a config describes, built and checked but not started: no array exists yet and no device has worked.

`TrainConfig` documents every key. `build` makes the objects of a run from it, and finds what a schema can't: a model
that can't take the batch, a size no device count divides, a rule that matches nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bigjax import checkpoint, checks, lora, precision, quantize, schedules, sharding, tiers, topology, updates
from bigjax import guard as guards
from bigjax import state as states
from bigjax.best import Watch
from bigjax.config import Component
from bigjax.data import growth as growing
from bigjax.data import ops, pipeline
from bigjax.errors import UserError
from bigjax.schedules import Duration
from bigjax.watchdog import WatchdogConfig

Regex = str


def preprocess(value: str, where: str) -> None:
  """Checks a string of ops."""
  ops.parse(value, where)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where examples come from and what is done to them."""

  source: Annotated[Component, "data"]  # dict(name="arrays", ...): one of bigjax/data/.
  preprocess: Annotated[str, preprocess] = ""  # "decode|flip_lr|value_range(-1,1)".


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """A measurement of the state, every so often."""

  evaluator: Annotated[Component, "evaluators"]
  data: DataConfig
  every: Duration = "1 epoch"  # How often; the last step is always measured.
  batch_size: int | None = None  # Examples a batch; None: as in training.
  extra_data: Mapping[str, DataConfig] = dataclasses.field(
    default_factory=dict
  )  # Further finite streams, by the evaluator's argument.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
  """Bounds on the gradient, in this order."""

  value: float | None = None  # Each element to [-value, value].
  norm: float | None = None  # The global norm to at most this.
  adaptive: float | None = None  # Each unit's norm to this times its weight's, https://arxiv.org/abs/2102.06171.


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepConfig:
  """Which checkpoints stay."""

  last: int = 2  # The newest ones: one to go on from, and one in case that is damaged.
  every: Duration | None = None  # And one every so often.
  best: str | None = None  # And the best by this metric, "val/accuracy", saved whenever it improves.
  mode: Literal["max", "min"] = "max"
  temporary: tiers.TemporaryConfig | None = None  # And one every few minutes on a near disk.
  # Steps wait until a save is on disk: a killed run loses at most one interval between saves, and not up to two.
  synchronous: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopConfig:
  """Ends the run when a metric has stopped improving."""

  metric: str  # Such as "val/loss".
  patience: int  # Evaluations without improvement.
  mode: Literal["max", "min"] = "min"
  min_delta: float = 0.0  # What counts as improvement.


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
  """Takes parameters and what a model keeps besides from another run's checkpoint, or from published weights."""

  workdir: str | None = None
  step: int | None = None  # Of the workdir; None: the last.
  weights: str | None = None  # A directory as `transformers` has it, or a GGUF file: see bigjax/weights.
  changed: tuple[str, ...] = ()  # Options of the model that differ from those of the weights on purpose.
  rules: tuple[tuple[Regex, str | None], ...] = (
    (".*", r"\g<0>"),
  )  # (leaf here, its name there, or None: keep the fresh value).

  # All of a workdir's state, to go on with: names begin with params/, extras/, opt_state/ then. See bigjax/changes.py.
  whole: bool = False
  drop: tuple[Regex, ...] = ()  # Leaves there that are left behind, such as an average: "opt_state/.*".
  resize: tuple[Regex, ...] = ()  # Leaves here of other sizes, such as a head: what both have is taken, the rest fresh.
  cast: bool = False  # Other precisions.

  def __post_init__(self):
    if (self.workdir is None) == (self.weights is None):
      raise UserError("config.init_from names either a workdir or weights.")
    if (self.drop or self.resize or self.cast) and not self.whole:
      raise UserError("config.init_from: drop, resize and cast are for whole=True; of parameters, rules say it all.")
    if self.whole and self.workdir is None:
      raise UserError("config.init_from.whole: weights have no state to go on with; name a workdir.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClaimConfig:
  """The result this config is for; a finished run says whether it was reached."""

  metric: str  # Such as "test/accuracy".
  at_least: float | None = None
  at_most: float | None = None
  source: str = ""  # Where the number comes from.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
  """How a batch goes through the stages of a mesh with an axis `pipe`."""

  microbatches: int | None = None  # Parts of a batch under way at once; None: as many as stages.
  repeats: int = 1  # Rounds each of them makes: layers are dealt out to the stages in so many turns.
  remat_stages: bool = False  # The backward pass computes stages again from their input, on top of model.remat.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchWarmupConfig:
  """Batches that grow to `batch_size`, a part at a time; shapes stay, what is not there yet is padding.

  Parts of `accumulate` that are all padding are not computed, so with it the warm-up is as much faster as its batches
  are smaller; without it the time of a step stays. Durations, and the speed shown, count whole batches.
  """

  until: Duration  # When the batch is whole.
  first: int = 1  # Parts at the start.
  parts: int | None = None  # Of a batch; None: those of `accumulate`, 8 where that is 1.


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetConfig:
  """What a step must fit on chips that need not be there; `bigjax plan --check` and `make plan` hold it to that."""

  topology: str  # Such as "v5p:4x4x8".
  num_slices: int = 1
  hbm_gib: float | None = None  # Of a device, at most.
  collective_gib: float | None = None  # Results of collectives on a device, at most.
  mfu_bound: float | None = None  # What the roofline allows, at least.

  def __post_init__(self):
    if self.hbm_gib is None and self.collective_gib is None and self.mfu_bound is None:
      raise UserError("config.plan bounds nothing: give hbm_gib, collective_gib or mfu_bound.")


Schedule = Annotated[Component, "schedules"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Every key of a config. A duration is a number of steps, or "90 epochs", "2e6 examples", "2e9 tokens", "5%"."""

  # What is learned, from what.
  total_steps: Duration  # The length of the run.
  batch_size: int  # Examples a step, over all devices and hosts.
  data: DataConfig
  model: Annotated[Component, "models"]
  task: Annotated[Component, "tasks"]
  seed: int = 0  # Of initialisation, order, augmentation and dropout.
  init_from: InitConfig | None = None
  lora: lora.LoraConfig | None = None  # Trains adapters of the model that init_from brings, see lora.py.

  # How it is updated.
  optimizer: Annotated[Component, "optimizers"]  # One of bigjax/optimizers/, or any of optax by name.
  schedule: Schedule | tuple[tuple[Regex, Schedule | None], ...]  # One for all, or by first match; None freezes.
  clip: ClipConfig | None = None
  decay: tuple[tuple[Regex, float | str], ...] = ()  # Weight decay: 0.1 or "decoupled(0.1)", "l2(1e-4)", "l1(1e-5)".
  lr_multipliers: tuple[tuple[Regex, float], ...] = ()
  freeze: tuple[Regex, ...] = ()
  ema: float | None = None  # Decay of an average of the parameters, evaluated beside them.
  ema_warmup: bool = False  # The decay is at most (1 + t) / (10 + t) at update t, so that the start is soon forgotten.
  accumulate: int = 1  # Parts a batch is computed in; the update is that of the whole.
  batch_warmup: BatchWarmupConfig | None = None  # Smaller batches at the start.

  # In what numbers.
  precision: precision.Mode | precision.PrecisionConfig = "float32"  # "mixed", "bfloat16", ...: see precision.py.
  quantize: quantize.Word | quantize.Rules | None = None  # "int8", "fp8" or [(regex of layers, word or None), ...].

  # Where it runs.
  mesh: tuple[tuple[str, int], ...] = (("data", -1),)  # Axes, outermost first; -1 is what is left.
  sharding: str | tuple[tuple[Regex, str], ...] = "auto"  # "fsdp+tensor", or rules: see bigjax/sharding.py.
  activations: Mapping[str, str | tuple[str, ...] | None] = dataclasses.field(default_factory=dict)  # Word: axes.
  sequence: Literal["ring", "ulysses"] = "ring"  # How attention works where the mesh splits sequences.
  pipeline: PipelineConfig = PipelineConfig()
  determinism: Literal["run", "topology"] = "run"  # "topology": the same bits on any number of devices, topology.py.
  groups: int = 8  # Of examples, for that: a power of two, at least as many as there will be devices.

  # What is measured, kept and shown.
  evals: Mapping[str, EvalConfig] = dataclasses.field(default_factory=dict)
  log_every: Duration = 50
  checkpoint_every: Duration = "20%"  # The last step is always saved.
  keep: KeepConfig = KeepConfig()
  early_stop: StopConfig | None = None
  guard: guards.Action | guards.GuardConfig = "stop"  # What a loss or gradient that isn't finite does, or a leap.
  writers: tuple[Literal["jsonl", "csv", "tensorboard", "console"], ...] = ("jsonl", "csv", "tensorboard")
  claim: ClaimConfig | None = None
  plan: BudgetConfig | None = None
  watchdog: WatchdogConfig | None = dataclasses.field(default_factory=WatchdogConfig)

  def __post_init__(self):
    # Here, and not where the model is made: what is recorded of a config says what was computed.
    object.__setattr__(self, "model", precision.computing(self.model, self.precision))


# A run may go on under a config that differs in these: they don't change what is computed, but for the order of sums
# and, in a pipeline, what dropout draws.
OBSERVING = ("evals", "log_every", "checkpoint_every", "keep", "early_stop", "guard", "writers", "claim", "plan")
OBSERVING += ("watchdog", "mesh", "sharding", "activations", "sequence", "pipeline")
OBSERVING += ("model.scan", "model.remat", "model.attention", "task.loss_chunks")


@dataclasses.dataclass(frozen=True)
class Stream:
  """A source and what is done to its examples."""

  source: Any
  preprocess: tuple[Any, ...]

  @classmethod
  def of(cls, data: DataConfig) -> Stream:
    return cls(data.source(), ops.parse(data.preprocess))

  def spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch."""
    one = pipeline.spec(self.source, self.preprocess)
    return {k: jax.ShapeDtypeStruct((batch_size, *v.shape), v.dtype) for k, v in one.items()}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The objects of a run."""

  config: TrainConfig
  layout: sharding.Layout
  data: Stream
  batch: Mapping[str, jax.ShapeDtypeStruct]  # The shapes of a global batch.
  clock: schedules.Clock
  model: states.Model
  task: Any
  optimizer: updates.Optimizer
  outputs: Mapping[str, jax.ShapeDtypeStruct]  # What the task predicts of a batch.
  abstract: states.TrainState  # Shapes of the state.
  shardings: states.TrainState  # Layout of the state.
  division: topology.Shared | topology.Alone  # How the step is divided over devices.

  @property
  def mesh(self) -> jax.sharding.Mesh:
    return self.layout.mesh

  @property
  def total_steps(self) -> int:
    return self.clock.total_steps

  def steps(self, duration: Duration, where: str) -> int:
    """Returns a cadence in steps, at least 1."""
    return _steps(self.clock, duration, where)

  def due(self, step: int, every: int) -> bool:
    """Whether something done `every` so many steps is done at `step`; at the last it always is."""
    return step % every == 0 or step == self.total_steps

  @property
  def pace(self) -> tuple[int, str]:
    """What a step gets through, and what that is counted in."""
    if "tokens" in self.batch:
      return self.config.batch_size * self.clock.tokens_per_example, "tokens"
    return self.config.batch_size, "examples"

  def init(self, key: jax.Array) -> states.TrainState:
    """Returns the first state, made in place on its devices."""
    create = functools.partial(states.create, model=self.model, tx=self.optimizer.tx)
    with sharding.use(self.division.inside):
      return self.division.jit_init(create, out_shardings=self.shardings)(key)

  def loss(self, params, extras, batch: Mapping[str, jax.Array], key: jax.Array):
    """Returns (sums, extras as the call left them); pure, for use under `division.jit`."""
    with sharding.use(self.division.inside):
      module = self.model.bind(params, extras, key)
      return self.task.loss(module, batch, key=key), self.model.extras(module, extras)

  @property
  def growth(self) -> growing.Growth | None:
    """How the batch grows."""
    return _growth(self.config, self.clock)

  @property
  def borrows(self) -> bool:
    """Whether most of the model is another run's, and stays there: checkpoints hold adapters only."""
    return self.config.lora is not None and self.config.init_from is not None

  def predict(self, state: states.TrainState, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What the model says of a batch; pure, for use under `jit`."""
    with sharding.use(self.division.inside):
      return self.task.predict(self.model.bind(state.params, state.extras), batch)

  def checked(self, batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Passes NumPy batches on, through the task's `check` if it has one."""
    check = getattr(self.task, "check", lambda batch, outputs: None)
    with contextlib.closing(batches):
      for batch in batches:
        check(batch, self.outputs)
        yield batch

  def keep(self) -> checkpoint.Keep:
    keep = self.config.keep
    every = None if keep.every is None else self.steps(keep.every, "config.keep.every")
    return checkpoint.Keep(last=keep.last, every=every, best=keep.best, mode=keep.mode)


def build(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> Experiment:
  """Returns the experiment that `config` describes; raises `UserError` for what can't work, before any device does.

  It is laid out on all devices there are, or on `devices`.
  """
  layout = _layout(config, devices)
  checks.sizes(config, layout.mesh)
  Watch.of(config.keep, config.early_stop, config.evals, {})  # Refuses metrics that no evaluator gives.
  checks.claim(config)
  guards.of(config.guard)
  data = Stream.of(config.data)
  batch = data.spec(config.batch_size)
  clock = _clock(config, data, batch)
  numbers = precision.of(config.precision)
  model = states.Model(
    config.model, numbers.params, config.quantize, exact=numbers.gradients == "float32", tuned=config.lora
  )
  task = config.task()
  with sharding.use(layout):
    params, extras = model.abstract
    optimizer = updates.make(
      config.optimizer,
      _schedules(config.schedule, clock),
      params,
      clip=None if config.clip is None else dataclasses.asdict(config.clip),
      decay=config.decay,
      lr_multipliers=(*config.lr_multipliers, *model.lr_multipliers),
      freeze=config.freeze,
      ema=config.ema,
      ema_warmup=config.ema_warmup,
      numbers=numbers,
      seed=config.seed,
      weight=float(config.batch_size * (clock.tokens_per_example or 1)),
    )
    outputs = checks.trace(model, task, params, extras, dict(batch))
  opt_state = jax.eval_shape(optimizer.tx.init, params)
  abstract = states.TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, extras, opt_state)
  roles = _roles(config.model) if model.adapters is None else model.adapters.roles(_roles(config.model))
  tree = dict(roles=roles, repeats=layout.repeats, own=model.own(params, extras)[0])
  shardings = sharding.shard_tree(abstract, config.sharding, layout.mesh, **tree)
  divide = {"run": topology.shared, "topology": topology.alone}[config.determinism]
  division = divide(layout, config.groups, config.batch_size, extras)
  run = Experiment(config, layout, data, batch, clock, model, task, optimizer, outputs, abstract, shardings, division)
  run.growth  # noqa: B018  # Refuses parts that can't be.
  return run


def order(config: TrainConfig) -> pipeline.Plan:
  """Returns which examples the steps of a run take; of a config whose data can be read, nothing else is built."""
  data = Stream.of(config.data)
  growth = None
  if config.batch_warmup is not None:
    growth = _growth(config, _clock(config, data, data.spec(config.batch_size)))
  return pipeline.Plan(data.source, config.batch_size, 0, 1, seed=config.seed, growth=growth)


def _growth(config, clock):
  warmup = config.batch_warmup
  if warmup is None:
    return None
  parts = warmup.parts or (config.accumulate if config.accumulate > 1 else 8)
  if config.batch_size % parts:
    raise UserError(f"config.batch_warmup.parts: {parts} parts do not divide a batch of {config.batch_size}.")
  if not 1 <= warmup.first < parts:
    raise UserError(f"config.batch_warmup.first: {warmup.first} of {parts} parts; give 1 to {parts - 1}.")
  return growing.Growth(parts, warmup.first, _steps(clock, warmup.until, "config.batch_warmup.until"))


def _steps(clock, duration, where):
  steps = clock.steps(duration, where)
  if steps < 1:
    raise UserError(f"{where} must be positive, not {duration!r}; '100%' is once, at the end.")
  return steps


def _layout(config, devices):
  mesh = sharding.make_mesh(config.mesh, devices)
  stages = mesh.shape.get("pipe", 1)
  if config.pipeline.repeats < 1 or (config.pipeline.microbatches or 1) < 1:
    raise UserError(f"config.pipeline: microbatches and repeats must be positive, not {config.pipeline}.")
  if stages == 1 and config.pipeline != PipelineConfig():
    raise UserError("config.pipeline: the mesh has no axis 'pipe'; add ('pipe', stages) to config.mesh.")
  return sharding.Layout(
    mesh=mesh,
    words=sharding.words(config.activations),
    sequence=config.sequence,
    microbatches=config.pipeline.microbatches or stages,
    repeats=config.pipeline.repeats,
    remat_stages=config.pipeline.remat_stages,
  )


def _roles(model):
  """The tables of the model's file that say which dimensions the strategies split."""
  file = sys.modules[model.factory.__module__]
  tables = (("tensor", "TENSOR"), ("expert", "EXPERT"), ("fsdp", "FSDP"))
  return {strategy: getattr(file, table) for strategy, table in tables if hasattr(file, table)}


def _clock(config, data, batch):
  tokens = batch["tokens"].shape[-1] - 1 if "tokens" in batch else None  # The last one is only predicted.
  return schedules.Clock.of(config.total_steps, config.batch_size, len(data.source), tokens)


def _schedules(schedule: Component | tuple, clock) -> Callable | tuple:
  if isinstance(schedule, Component):
    return schedule(clock)
  return tuple((regex, None if s is None else s(clock)) for regex, s in schedule)
