"""What becomes of a run whose loss or gradient is not finite, or whose loss leaps: `config.guard`.

| `nonfinite` | the run                                                                                        |
| ----------- | ---------------------------------------------------------------------------------------------- |
| "stop"      | ends with an error; the last checkpoint is of a step before                                    |
| "skip"      | leaves that update out, on the devices; only the step and the clocks of schedules count it     |
| "rollback"  | goes back to the last checkpoint, and on from there without the batch that broke it            |

Each is bounded, and each leaves a bundle for `bigjax replay`. The numbers of a step are looked at when
the second after it is on its way, so that the devices never wait for the host: a fault is known two steps late, and
always before a checkpoint.
All hosts see the same numbers, and so decide alike.

A loss that leaps is above its median over a window by so many times what it usually is away from it, several steps in
a row. Going back then passes over the batches from shortly before the first of these steps, as in PaLM
(https://arxiv.org/abs/2204.02311, section 5.1).

What is passed over is written down in the workdir before the run goes on, and beside every checkpoint from then on. So
a batch is a function of (seed, step, what was passed over), and going back is no other path than a restart.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigjax import bundles, hosts, precision, record
from bigjax.data import pipeline
from bigjax.errors import UserError
from bigjax.sentry import AHEAD

Action = Literal["stop", "skip", "rollback"]
LOOKED_AT = ("loss", "grad_norm", "update_norm", "skipped_in_a_row", "loss_scale")
_NORMAL = 1.4826  # Times the median distance from the median is the standard deviation, of normal numbers.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeConfig:
  """When a loss leaps, which is answered by going back."""

  above: float = 10.0  # The median by so many standard deviations, told by the median distance from it.
  window: int = 128  # Steps that both are of.
  patience: int = 3  # Steps in a row.
  before: int = 4  # Batches before the first of these steps that are passed over with them.


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
  """What to do about faults, and how often."""

  nonfinite: Action = "stop"
  max_skips: int = 20  # Updates left out in a run, before it stops.
  max_rollbacks: int = 3  # Times it goes back, before it stops.
  spike: SpikeConfig | None = None


def of(config: Action | GuardConfig) -> GuardConfig:
  """Returns the settings of a word, and settings as they are; raises `UserError` for those that can't work."""
  found = GuardConfig(nonfinite=config) if isinstance(config, str) else config
  least = {"max_skips": (found.max_skips, 0), "max_rollbacks": (found.max_rollbacks, 0)}
  if found.spike is not None:
    spike = found.spike
    least |= {"spike.window": (spike.window, 4), "spike.patience": (spike.patience, 1)}
    least |= {"spike.before": (spike.before, 0)}
    if not spike.above > 0:
      raise UserError(f"config.guard.spike.above: {spike.above} must be positive.")
  for name, (value, lowest) in least.items():
    if value < lowest:
      raise UserError(f"config.guard.{name}: {value} must be {lowest} or more.")
  return found


# In the step


def keeping(config) -> Callable[[Any, Any, Mapping[str, Any]], tuple[Any, Mapping[str, Any]]]:
  """Returns `(new state, old state, measured) -> (state, measured)`: with "skip", the old one where a number is broken.

  The step and the clocks of schedules go on all the same. Where a loss is scaled, what overflowed was left out already.
  """
  if of(config.guard).nonfinite != "skip" or precision.of(config.precision).mode == "float16":
    return lambda new, old, measured: (new, measured)
  is_clock = lambda x: isinstance(x, optax.ScaleByScheduleState)

  def keep(new, old, measured):
    fine = jnp.stack([jnp.isfinite(measured[k]) for k in LOOKED_AT[:3]]).all()
    choose = lambda n, o: n if is_clock(n) else jnp.where(fine, n, o)
    kept = jax.tree.map(choose, new, old, is_leaf=is_clock)
    return dataclasses.replace(kept, step=new.step), dict(measured) | {"skipped": 1 - fine.astype(jnp.float32)}

  return keep


# Beside the loop


class RollBack(Exception):
  """Ends an attempt; the next one passes over what this says."""


class Guard:
  """Looks at every step's numbers, two steps late, and does what the config says.

  Entered last of all, it lets nobody around it see a `RollBack`: that is no failure of the run. `status` says it.

  Args:
    run: The experiment.
    workdir: Its directory.
    checkpoints: Its checkpoints.
    loop: What was saved beside the checkpoint that the run goes on from.
    forget: Removes what else it could go on from.
  """

  def __init__(
    self, run, workdir: str, checkpoints, loop: Mapping[str, Any], forget: Callable[[], None] = lambda: None
  ):
    self._run, self._workdir, self._checkpoints, self._forget = run, workdir, checkpoints, forget
    self._before = hosts.agreed(passed_over(workdir))
    self.skips = _joined(loop.get("skips", ()), self._before)
    self._note = record.noting(workdir) if jax.process_index() == 0 else (lambda text: None)
    self._config = of(run.config.guard)
    saved = loop.get("guard", {})
    self._skipped = saved.get("skipped", 0)
    self._spike = self._config.spike and Spike(self._config.spike, saved.get("losses", ()), saved.get("high", 0))
    self._underway: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
    self.rolled_back = False

  def seen(self, step: int, measured: Mapping[str, jax.Array]) -> None:
    """Takes the numbers of a step that is on its way, and looks at those of one that is done."""
    watched = {k: measured[k] for k in LOOKED_AT if k in measured}
    for value in watched.values():
      value.copy_to_host_async()
    self._underway.append((step, watched))
    if len(self._underway) > AHEAD:
      self._look()

  def settle(self) -> None:
    """Looks at what is still on its way; to be called before a state is kept.

    Raises:
      FloatingPointError: The run is to stop.
      RollBack: It is to go back.
    """
    while self._underway:
      self._look()

  def _look(self):
    step, measured = self._underway.popleft()
    found = jax.device_get(measured)
    values = {k: float(found[k]) for k in measured}
    try:
      overflowed = precision.refuse_overflow(step, values)  # Then the state is that of the step before.
    except FloatingPointError as e:
      raise FloatingPointError(f"{e} {self._bundle(step, step, values, 'overflow', 'stop')}") from None
    if overflowed:
      return
    if not all(math.isfinite(values[k]) for k in LOOKED_AT[:3]):
      {"stop": self._stop, "skip": self._skip, "rollback": self._roll_back}[self._config.nonfinite](step, values)
    elif self._spike and (first := self._spike.seen(step, values["loss"])):
      self._leave_spike(first, step, values)

  def to_json(self) -> dict[str, Any]:
    """What is to be saved beside a checkpoint, so that a run that goes on from it decides as this one."""
    noted = {"skipped": self._skipped} if self._skipped else {}
    noted |= self._spike.to_json() if self._spike else {}
    passed = {"skips": [list(s) for s in self.skips]} if self.skips else {}
    return passed | ({"guard": noted} if noted else {})

  def _stop(self, step, values, why=""):
    bundle = self._bundle(step, step, values, "nonfinite", "stop")
    raise FloatingPointError(
      f"{_shown(step, values)}{why} Try a lower peak of config.schedule, a longer warmup, or config.clip; the last "
      f"checkpoint is intact. config.guard='skip' or 'rollback' goes on. {bundle}"
    )

  def _skip(self, step, values):
    self._skipped += 1
    most = self._config.max_skips
    if self._skipped > most:
      self._stop(step, values, f" {most} updates were left out before (config.guard.max_skips).")
    self._bundle(step, step, values, "nonfinite", "skip")
    self._note(f"{_shown(step, values)} The update was left out ({self._skipped} of at most {most}).")

  def _roll_back(self, step, values):
    done, most = len(self._before), self._config.max_rollbacks
    if done >= most:
      self._stop(step, values, f" The run went back {done} times before (config.guard.max_rollbacks).")
    self._bundle(step, step, values, "nonfinite", "rollback")
    self._pass_over(step, step, f"{_shown(step, values)}")

  def _leave_spike(self, first, step, values):
    bundle = self._bundle(first, step, values, "spike", "rollback")
    done, most = len(self._before), self._config.max_rollbacks
    if done >= most:
      raise FloatingPointError(
        f"The loss leapt to {values['loss']:g} from step {first} to {step}, and the run went back {done} times before "
        f"(config.guard.max_rollbacks). Try a lower peak of config.schedule, config.clip, or a higher "
        f"config.guard.spike.above; the last checkpoint is intact. {bundle}"
      )
    first = max(1, first - self._config.spike.before)
    self._pass_over(first, step, f"The loss leapt to {values['loss']:g} up to step {step}.")

  def _pass_over(self, first, last, reason):
    """Ends this attempt so that the next one goes on without the batches of these steps, from before them."""
    self._forget()
    # One that saw what is to be passed over is of no use; if there is no other, what came after it is passed over.
    start = self._checkpoints.back_to(first)
    begin, end = pipeline.taken(np.array([max(first - 1, start), last - 1]), self.skips).tolist()
    entry = {"batches": [begin, end + 1], "step": last, "back_to": start, "reason": reason, "time": record.now()}
    if jax.process_index() == 0:
      record.write_json(_file(self._workdir), [*self._before, entry])
    said = f"the batch of step {last}" if first == last else f"the batches of steps {begin + 1} to {last}"
    raise RollBack(f"{reason} Back to step {start}, and on without {said}.")

  def _bundle(self, first, step, values, kind, action):
    """Writes what it takes to see the steps again, and says how."""
    if jax.process_index() != 0:
      return ""
    start = max((s for s in self._checkpoints.steps(coming=True) if s < first), default=0)
    where = bundles.write(self._run, self._workdir, self.skips, start, (first, step), values, kind, action)
    return f"To see what it was: bigjax replay {where}"

  def __enter__(self) -> Guard:
    return self

  def __exit__(self, kind, error, trace) -> bool:
    self.rolled_back = isinstance(error, RollBack)
    if self.rolled_back:
      self._note(str(error))
    return self.rolled_back


class Spike:
  """Tells a loss that leaps from one that wavers; what it knows is a few numbers."""

  def __init__(self, config: SpikeConfig, losses: Sequence[float] = (), high: int = 0):
    self._config, self._high = config, high
    self._losses = collections.deque(losses, config.window)

  def seen(self, step: int, loss: float) -> int | None:
    """Returns the first step of a leap that has lasted long enough; None while there is none."""
    window = list(self._losses)
    self._losses.append(loss)
    if len(window) == self._config.window:
      self._high = self._high + 1 if self._leaps(window, loss) else 0
    return step - self._high + 1 if self._high >= self._config.patience else None

  def _leaps(self, window, loss):
    middle = _median(window)  # NumPy's takes ten times as long for so few.
    if not loss > middle:
      return False
    # A loss that hardly moves, as at the very end, has no scale of its own.
    spread = max(_NORMAL * _median([abs(x - middle) for x in window]), 1e-3 * abs(middle))
    return loss > middle + self._config.above * spread

  def to_json(self) -> dict[str, Any]:
    return {"losses": list(self._losses)} | ({"high": self._high} if self._high else {})


def _median(values):
  return sorted(values)[len(values) // 2]


# What was passed over


def passed_over(workdir: str) -> list[dict[str, Any]]:
  """Returns each time that a run went back: which batches it left out since, and why."""
  file = _file(workdir)
  with contextlib.suppress(FileNotFoundError):
    try:
      with open(file, encoding="utf-8") as f:
        return json.load(f)
    except ValueError as e:
      raise UserError(f"{file} can't be read: {e}; bring it back from a copy, it says what the run left out.") from e
  return []


def _joined(saved, entries):
  """What a run leaves out: as its checkpoint says, and the workdir since."""
  joined: list[tuple[int, int]] = []
  for first, stop in sorted([*map(tuple, saved), *(tuple(entry["batches"]) for entry in entries)]):
    if joined and first <= joined[-1][1]:
      joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
    else:
      joined.append((first, stop))
  return tuple(joined)


def _file(workdir):
  return os.path.join(workdir, "rollbacks.json")


def _shown(step, values):
  return (
    f"The loss is {values['loss']} at step {step} (norm of the gradient {values['grad_norm']}, of the update "
    f"{values['update_norm']})."
  )
