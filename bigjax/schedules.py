"""Durations in any unit, and learning rates as functions of the step.

A config says how long something lasts in the unit it is thought in: `1000`, `"90 epochs"`, `"2e9 tokens"`, `"5%"`.
A `Clock` turns that into steps. A curve is a public function here: given the clock and its arguments it returns
`step -> learning rate`, float32, to be called inside `jax.jit`.

In all curves `peak` is the highest rate and `final` the one at the last step, both absolute. `warmup` is linear from 0;
as in big_vision and optax, the very first update (step 0) of a warmed-up run therefore has rate 0.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import optax

from bigjax.errors import UserError, shown

Duration = Annotated[int | float | str, "duration"]
Schedule = Callable[[Any], Any]  # From the step, an integer (array), to the learning rate, float32.

_UNITS = {"step": "steps", "epoch": "epochs", "example": "examples", "token": "tokens", "%": "percent"}
_FORMS = "write a number of steps (1000), '90 epochs', '2e6 examples', '2e9 tokens' or '5%'"


def parse_duration(value: int | float | str, where: str = "duration") -> tuple[float, str]:
  """Returns the number and the unit, one of steps, epochs, examples, tokens and percent (of the whole run).

  Raises:
    UserError: The value is negative, not finite, not a whole number of steps, or not understood.
  """
  text = str(value).strip().lower()
  number, unit = text, "steps"
  if split := re.fullmatch(r"(.*?)\s*(steps?|epochs?|examples?|tokens?|percent|%)", text):
    number, unit = split[1], _UNITS.get(split[2].rstrip("s"), "percent")
  try:
    number = math.nan if isinstance(value, bool) else float(number)
  except ValueError:
    number = math.nan
  if not math.isfinite(number) or number < 0:
    raise UserError(f"{where}: {shown(value)} is not a duration; {_FORMS}.")
  if unit == "steps" and number != int(number):
    raise UserError(f"{where}: {value!r} is not a whole number of steps; a part of the run is '{number:.0%}'.")
  return number, unit


@dataclasses.dataclass(frozen=True)
class Clock:
  """How long a run is and what a step of it holds: all that it takes to turn a duration into steps."""

  total_steps: int
  batch_size: int
  examples: int | None = None  # In the data set; None or 0 if that has no end.
  tokens_per_example: int | None = None

  @classmethod
  def of(
    cls,
    total_steps: Duration,
    batch_size: int,
    examples: int | None = None,
    tokens_per_example: int | None = None,
    where: str = "config.total_steps",
  ) -> Clock:
    """Returns the clock of a run whose length is itself a duration, at least one step."""
    clock = cls(0, batch_size, examples, tokens_per_example)
    steps = clock.steps(total_steps, where)
    if steps < 1:
      raise UserError(f"{where}: {total_steps!r} is less than one step; {_FORMS[:-8]}.")
    return dataclasses.replace(clock, total_steps=steps)

  def steps(self, duration: Duration, where: str = "duration") -> int:
    """Returns the nearest whole number of steps; at least 1, unless the duration is 0.

    Raises:
      UserError: The duration is not understood, or its unit needs what this run does not have.
    """
    number, unit = parse_duration(duration, where)
    if unit == "percent" and not self.total_steps:
      raise UserError(f"{where}: {duration!r} is a part of the run's length and so can't be that length itself.")
    if unit == "epochs" and not self.examples:
      raise UserError(f"{where}: {duration!r} is unknown, as this data has no known size; give steps or examples.")
    if unit == "tokens" and not self.tokens_per_example:
      raise UserError(f"{where}: {duration!r} is unknown, as this data has no tokens; give steps, examples or epochs.")
    # One multiplication and one division each, so that exact inputs give exact results.
    steps = {
      "steps": lambda: number,
      "epochs": lambda: number * self.examples / self.batch_size,
      "examples": lambda: number / self.batch_size,
      "tokens": lambda: number / (self.batch_size * self.tokens_per_example),
      "percent": lambda: number * self.total_steps / 100,
    }[unit]()
    return max(1, round(steps)) if steps else 0


# Curves


def constant(clock: Clock, *, peak: float, warmup: Duration = 0) -> Schedule:
  """The same rate all along, after the warm-up."""
  _check(peak=peak)
  return _warmed_up(clock, warmup, lambda step, progress: peak)


def linear(clock: Clock, *, peak: float, warmup: Duration = 0, final: float = 0.0) -> Schedule:
  """Falls in a straight line from the end of the warm-up to the last step."""
  _check(peak=peak, final=final)
  return _warmed_up(clock, warmup, lambda step, progress: peak + (final - peak) * progress)


def cosine(clock: Clock, *, peak: float, warmup: Duration = 0, final: float = 0.0) -> Schedule:
  """Falls along half a cosine wave, https://arxiv.org/abs/1608.03983, without restarts."""
  _check(peak=peak, final=final)
  return _warmed_up(clock, warmup, lambda step, progress: final + (peak - final) * _half_wave(progress))


def rsqrt(
  clock: Clock,
  *,
  peak: float,
  warmup: Duration = 0,
  timescale: Duration = 10_000,
  cooldown: Duration = 0,
  final: float = 0.0,
) -> Schedule:
  """Falls as 1 / sqrt(1 + t / timescale), t steps after the warm-up, then linearly to `final` during the cooldown.

  One long run serves many lengths: stop it anywhere and cool down (https://arxiv.org/abs/2106.04560). As in big_vision
  the cooldown multiplies the curve.
  """
  _check(peak=peak, final=final)
  start, scale = _steps(clock, "warmup", warmup), _steps(clock, "timescale", timescale, least=1)
  end = _steps(clock, "cooldown", cooldown)
  if start + end > clock.total_steps:
    raise _too_long(clock, f"warmup {warmup!r} and cooldown {cooldown!r}", start + end)

  def curve(step, progress):
    del progress
    rate = peak / jnp.sqrt(1 + jnp.maximum(step - start, 0) / scale)
    left = jnp.clip((clock.total_steps - step) / end, 0, 1) if end else 1.0
    return final + (rate - final) * left

  return _warmed_up(clock, warmup, curve)


def exponential(
  clock: Clock,
  *,
  peak: float,
  factor: float,
  every: Duration,
  warmup: Duration = 0,
  staircase: bool = False,
  final: float = 0.0,
) -> Schedule:
  """Multiplies the rate by `factor` every so often, smoothly or (`staircase`) at once; never below `final`."""
  _check(peak=peak, final=final)
  _check_factor(factor)
  start, period = _steps(clock, "warmup", warmup), _steps(clock, "every", every, least=1)

  def curve(step, progress):
    del progress
    times = jnp.maximum(step - start, 0) / period
    return jnp.maximum(peak * factor ** (jnp.floor(times) if staircase else times), final)

  return _warmed_up(clock, warmup, curve)


def step(
  clock: Clock, *, peak: float, boundaries: tuple[Duration, ...], factor: float = 0.1, warmup: Duration = 0
) -> Schedule:
  """Multiplies the rate by `factor` at each of `boundaries`, such as `("30 epochs", "60 epochs")`."""
  _check(peak=peak)
  _check_factor(factor)
  at = [_steps(clock, f"boundaries[{i}]", b) for i, b in enumerate(boundaries)]
  if not at or at != sorted(set(at)):
    raise UserError(f"config.schedule.boundaries: {boundaries!r} must be durations that grow, at least one; got {at}.")
  passed = lambda step: sum((step >= b).astype(jnp.float32) for b in at)
  return _warmed_up(clock, warmup, lambda step, progress: peak * factor ** passed(step))


def wsd(
  clock: Clock,
  *,
  peak: float,
  warmup: Duration = 0,
  decay: Duration = "20%",
  final: float = 0.0,
  shape: Literal["linear", "cosine", "sqrt"] = "linear",
) -> Schedule:
  """Warm-up, stable, decay: constant until the last `decay` of the run, then down to `final`.

  `shape` "sqrt" is 1 - sqrt(progress), the best of those compared in https://arxiv.org/abs/2405.18392.
  """
  _check(peak=peak, final=final)
  start, length = _steps(clock, "warmup", warmup), _steps(clock, "decay", decay, least=1)
  if start + length > clock.total_steps:
    raise _too_long(clock, f"warmup {warmup!r} and decay {decay!r}", start + length)
  shapes = {"linear": lambda t: 1 - t, "cosine": _half_wave, "sqrt": lambda t: 1 - jnp.sqrt(t)}
  if shape not in shapes:
    raise UserError(f"config.schedule.shape must be one of {', '.join(map(repr, shapes))}, not {shape!r}.")

  def curve(step, progress):
    del progress
    return final + (peak - final) * shapes[shape](jnp.clip((step - (clock.total_steps - length)) / length, 0, 1))

  return _warmed_up(clock, warmup, curve)


def one_cycle(
  clock: Clock, *, peak: float, warmup: Duration = "30%", start: float | None = None, final: float | None = None
) -> Schedule:
  """Rises along a cosine from `start` to the peak during the warm-up, then falls along another to `final`.

  https://arxiv.org/abs/1708.07120; as in PyTorch, `start` is peak / 25 and `final` start / 10,000 if not given.
  """
  start = peak / 25 if start is None else start
  final = start / 1e4 if final is None else final
  _check(peak=peak, start=start, final=final)
  rise = _steps(clock, "warmup", warmup)

  def curve(step, progress):
    rising = start + (peak - start) * (1 - _half_wave(jnp.clip(step / max(rise, 1), 0, 1)))
    return jnp.where(step < rise, rising, final + (peak - final) * _half_wave(progress))

  return _warmed_up(clock, warmup, curve, warm=False)


def reduce_on_plateau(
  clock: Clock,
  *,
  peak: float,
  warmup: Duration = 0,
  factor: float = 0.1,
  patience: Duration = "5%",
  window: Duration = "1%",
  cooldown: Duration = 0,
  min_improvement: float = 1e-4,
  final: float = 0.0,
) -> Schedule:
  """Multiplies the rate by `factor` when the training loss has not improved for `patience`; never below `final`.

  The loss is averaged over each `window`, and a window improves if its mean is below the best one's by
  `min_improvement`, relative. After a reduction, `cooldown` passes before windows count again. What is returned is the
  rate before any reduction; its attribute `transform`, which `updates.make` applies at the end, reduces the updates.
  """
  _check(peak=peak, final=final)
  _check_factor(factor)
  if factor >= 1:
    raise UserError(f"config.schedule.factor: {factor!r} must be below 1 for the rate to be reduced.")
  if not 0 < min_improvement < 1:
    raise UserError(f"config.schedule.min_improvement: {min_improvement!r} must be between 0 and 1.")
  size = _steps(clock, "window", window, least=1)
  windows = lambda name, value: round(_steps(clock, name, value) / size)
  curve = constant(clock, peak=peak, warmup=warmup)
  schedule = lambda step: curve(step)  # A function of its own, to carry the transformation.
  schedule.transform = optax.contrib.reduce_on_plateau(
    factor=factor,
    patience=max(1, windows("patience", patience)),
    rtol=min_improvement,
    cooldown=windows("cooldown", cooldown),
    accumulation_size=size,
    min_scale=final / peak,
  )
  return schedule


def _warmed_up(clock, warmup, curve, warm=True):
  """Returns the float32 schedule of `curve(step, progress)`, after a linear warm-up to its value there.

  `progress` goes from 0 at the end of the warm-up to 1 at the last step. The warm-up multiplies, as in big_vision.
  """
  start = _steps(clock, "warmup", warmup)
  if start > clock.total_steps:
    raise _too_long(clock, f"warmup {warmup!r}", start)
  length = max(1, clock.total_steps - start)

  def schedule(step):
    step = jnp.asarray(step).astype(jnp.float32)
    rate = curve(step, jnp.clip((step - start) / length, 0, 1))
    if warm and start:
      rate = rate * jnp.minimum(1, step / start)
    return jnp.broadcast_to(jnp.asarray(rate, jnp.float32), step.shape)

  return schedule


def _half_wave(progress):
  """From 1 at 0 down to 0 at 1."""
  return 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _steps(clock, name, duration, least=0):
  return max(least, clock.steps(duration, f"config.schedule.{name}"))


def _check(**rates):
  for name, rate in rates.items():
    positive = rate > 0 if name == "peak" else rate >= 0
    if not (math.isfinite(rate) and positive):
      raise UserError(f"config.schedule.{name}: {rate!r} is not a learning rate; give a positive number.")
  for name in set(rates) - {"peak"}:
    if rates[name] > rates["peak"]:
      raise UserError(f"config.schedule.{name}: {rates[name]!r} is above the peak of {rates['peak']!r}.")


def _check_factor(factor):
  if not 0 < factor <= 1:
    raise UserError(f"config.schedule.factor: {factor!r} must be above 0 and at most 1.")


def _too_long(clock, what, steps):
  return UserError(f"config.schedule: {what} take {steps} steps, but the run has {clock.total_steps}; shorten them.")
