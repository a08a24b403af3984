"""Durations in steps, and curves against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigjax import schedules
from bigjax.errors import UserError
from bigjax.schedules import Clock

CLOCK = Clock(total_steps=200, batch_size=10, examples=100, tokens_per_example=50)
STEPS = np.arange(201)


@pytest.mark.parametrize(
  ("duration", "parsed"),
  [
    (1000, (1000, "steps")),
    ("1000", (1000, "steps")),
    ("1_000 steps", (1000, "steps")),
    ("1 step", (1, "steps")),
    (2e6, (2e6, "steps")),
    ("1.5 epochs", (1.5, "epochs")),
    ("90epochs", (90, "epochs")),
    ("2e6 Examples", (2e6, "examples")),
    (" 2e9 tokens ", (2e9, "tokens")),
    ("5%", (5, "percent")),
    ("0.5 percent", (0.5, "percent")),
  ],
)
def test_a_duration_is_a_number_and_a_unit(duration, parsed):
  assert schedules.parse_duration(duration, "config.warmup") == parsed


@pytest.mark.parametrize("duration", [-1, "-5%", "soon", "", "epochs", "5 minutes", True, "nan", "inf steps", "1,000"])
def test_what_is_no_duration_is_told_the_forms(duration):
  with pytest.raises(UserError, match=r"config\.warmup: .* not a duration; write .*1000.*epochs.*examples.*tokens.*5%"):
    schedules.parse_duration(duration, "config.warmup")


def test_a_part_of_a_step_is_suggested_in_percent():
  with pytest.raises(UserError, match="'25%'"):
    schedules.parse_duration(0.25, "config.warmup")


@pytest.mark.parametrize(
  ("duration", "steps"),
  [
    (7, 7),
    ("3 epochs", 30),
    ("0.25 epochs", 2),
    ("95 examples", 10),
    ("5000 tokens", 10),
    ("5%", 10),
    ("29%", 58),
    ("0.01%", 1),  # At least one, unless it is none.
    ("0%", 0),
    (0, 0),
  ],
)
def test_a_clock_turns_durations_into_steps(duration, steps):
  assert CLOCK.steps(duration) == steps


def test_the_length_of_a_run_is_a_duration_too():
  clock = Clock.of("90 epochs", batch_size=1024, examples=1_281_167)
  assert clock.total_steps == 112_603  # ImageNet: 90 * 1,281,167 / 1024 = 112,602.6.
  assert Clock.of("2e9 tokens", batch_size=512, tokens_per_example=1024).total_steps == 3815


@pytest.mark.parametrize(
  ("duration", "message"),
  [("5%", "can't be that length"), ("1 epoch", "no known size"), ("1e6 tokens", "no tokens"), (0, "less than one")],
)
def test_a_length_that_can_not_be_known_is_an_error(duration, message):
  with pytest.raises(UserError, match=f"config.total_steps: .*{message}"):
    Clock.of(duration, batch_size=8)


def warm(steps, warmup):
  return np.minimum(1, steps / warmup)


def after(steps, warmup, total=200):
  return np.clip((steps - warmup) / (total - warmup), 0, 1)


CURVES = {
  "constant": (schedules.constant(CLOCK, peak=3.0), np.full(201, 3.0)),
  "constant, warm": (schedules.constant(CLOCK, peak=3.0, warmup="5%"), 3 * warm(STEPS, 10)),
  "linear": (
    schedules.linear(CLOCK, peak=2.0, warmup=20, final=0.5),
    warm(STEPS, 20) * (2 - 1.5 * after(STEPS, 20)),
  ),
  "cosine": (
    schedules.cosine(CLOCK, peak=2.0, warmup=20, final=0.5),
    warm(STEPS, 20) * (0.5 + 1.5 * (1 + np.cos(np.pi * after(STEPS, 20))) / 2),
  ),
  "cosine to nothing": (schedules.cosine(CLOCK, peak=1.0), (1 + np.cos(np.pi * STEPS / 200)) / 2),
  "rsqrt": (
    schedules.rsqrt(CLOCK, peak=2.0, warmup=20, timescale=30),
    warm(STEPS, 20) * 2 / np.sqrt(1 + np.maximum(STEPS - 20, 0) / 30),
  ),
  "rsqrt, cooled down": (
    schedules.rsqrt(CLOCK, peak=2.0, timescale=30, cooldown="25%", final=0.1),
    0.1 + (2 / np.sqrt(1 + STEPS / 30) - 0.1) * np.minimum(1, (200 - STEPS) / 50),
  ),
  "exponential": (
    schedules.exponential(CLOCK, peak=2.0, factor=0.5, every=40, warmup=20, final=0.3),
    warm(STEPS, 20) * np.maximum(2 * 0.5 ** (np.maximum(STEPS - 20, 0) / 40), 0.3),
  ),
  "exponential, staircase": (
    schedules.exponential(CLOCK, peak=2.0, factor=0.5, every="4 epochs", staircase=True),
    2 * 0.5 ** (STEPS // 40),
  ),
  "step": (
    schedules.step(CLOCK, peak=2.0, boundaries=("5 epochs", 120), factor=0.1, warmup=10),
    warm(STEPS, 10) * 2 * np.where(STEPS < 50, 1, np.where(STEPS < 120, 0.1, 0.01)),
  ),
  "wsd": (
    schedules.wsd(CLOCK, peak=2.0, warmup=20, decay="20%", final=0.2),
    warm(STEPS, 20) * np.where(STEPS < 160, 2, 2 - 1.8 * (STEPS - 160) / 40),
  ),
  "wsd, sqrt": (
    schedules.wsd(CLOCK, peak=2.0, decay=40, shape="sqrt"),
    2 * (1 - np.sqrt(np.clip((STEPS - 160) / 40, 0, 1))),
  ),
  "wsd, cosine": (
    schedules.wsd(CLOCK, peak=2.0, decay=40, shape="cosine"),
    1 + np.cos(np.pi * np.clip((STEPS - 160) / 40, 0, 1)),
  ),
  "one cycle": (
    schedules.one_cycle(CLOCK, peak=2.0),
    np.array([optax.cosine_onecycle_schedule(200, 2.0)(s) for s in STEPS]),
  ),
  "plateau, before any": (schedules.reduce_on_plateau(CLOCK, peak=2.0, warmup=10), 2 * warm(STEPS, 10)),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_follows_its_formula_from_the_first_step_to_the_last(name):
  schedule, expected = CURVES[name]
  rates = jax.jit(jax.vmap(schedule))(jnp.arange(201, dtype=jnp.int32))
  assert rates.dtype == jnp.float32
  np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(schedule(jnp.arange(201)), rates, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_exact_about_types(name):
  with jax.numpy_dtype_promotion("strict"):
    rate = jax.jit(CURVES[name][0])(jnp.int32(3))
  assert (rate.shape, rate.dtype) == ((), jnp.float32)
  assert float(CURVES[name][0](3)) == pytest.approx(float(rate))


def test_a_curve_stays_at_its_end_when_the_run_goes_on():
  assert schedules.cosine(CLOCK, peak=1.0, final=0.25)(1000) == 0.25
  assert schedules.wsd(CLOCK, peak=1.0, final=0.25)(1000) == 0.25


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: schedules.cosine(CLOCK, peak=1.0, warmup=201), "warmup 201 take 201 steps, but the run has 200"),
    (lambda: schedules.wsd(CLOCK, peak=1.0, warmup="90%", decay="20%"), "220 steps, but the run has 200"),
    (lambda: schedules.rsqrt(CLOCK, peak=1.0, warmup=150, cooldown=100), "250 steps"),
    (lambda: schedules.linear(CLOCK, peak=0.0), r"schedule\.peak: 0\.0 is not a learning rate"),
    (lambda: schedules.linear(CLOCK, peak=1.0, final=2.0), r"schedule\.final: 2\.0 is above the peak"),
    (lambda: schedules.step(CLOCK, peak=1.0, boundaries=("50%", "20%")), "boundaries"),
    (lambda: schedules.step(CLOCK, peak=1.0, boundaries=()), "at least one"),
    (lambda: schedules.exponential(CLOCK, peak=1.0, factor=1.5, every=1), r"schedule\.factor: 1\.5"),
    (lambda: schedules.reduce_on_plateau(CLOCK, peak=1.0, factor=1.0), r"schedule\.factor: 1\.0"),
    (lambda: schedules.cosine(Clock(10, 1), peak=1.0, warmup="1 epoch"), r"config\.schedule\.warmup: '1 epoch'"),
  ],
)
def test_a_curve_that_can_not_be_is_an_error(make, message):
  with pytest.raises(UserError, match=message):
    make()
