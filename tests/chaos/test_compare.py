"""Two runs are compared to the bit, or as closely as undisturbed ones agree; what is really different is found."""

import ml_dtypes
import numpy as np
import pytest

from bigjax.chaos import compare, harness
from bigjax.errors import UserError

ONE = np.ones(4, np.float32)


def apart(state, changed, name="params/bias", rounding=None):
  return compare.states(state, state | {name: changed}, rounding or compare.Rounding(1e-4, {}, {}), lambda text: None)


def test_without_a_rounding_a_bit_is_a_difference():
  state = {"params/bias": ONE}
  assert compare.states(state, {"params/bias": ONE.copy()}) == []
  assert compare.states(state, {"params/bias": np.nextafter(ONE, np.float32(2))}) == ["params/bias"]
  assert compare.states(state, {"params/bias": ONE.astype(np.float64)}) == ["params/bias"]


def test_a_leaf_may_differ_by_ten_times_what_rounding_did_to_its_part():
  state = {f"{part}/{name}": ONE for part in ("params", "opt_state/0/mu") for name in ("a/bias", "b/bias")}
  rounding = compare.Rounding(1e-2, {"params": 1e-5, "opt_state/0/mu": 1e-4}, {})
  for name, most in (("params/b/bias", 1e-4), ("opt_state/0/mu/a/bias", 1e-3)):
    assert apart(state, ONE * np.float32(1 + 0.9 * most), name, rounding) == []
    (said,) = apart(state, ONE * np.float32(1 + 1.5 * most), name, rounding)
    assert said.startswith(f"{name}: ") and "of its largest apart, more than" in said


def test_numbers_that_are_no_numbers_and_other_types_are_never_near():
  rounding = compare.Rounding(1.0, {"params": 1.0}, {})
  for changed in (ONE * np.nan, ONE * np.inf, ONE.astype(np.float64), ONE[:3], np.ones(4, np.int32)):
    assert len(apart({"params/bias": ONE}, changed, rounding=rounding)) == 1
  half = np.ones(4, ml_dtypes.bfloat16)
  assert apart({"params/bias": half}, half * ml_dtypes.bfloat16(1.02), rounding=rounding) == []
  counts = np.arange(3)
  assert apart({"params/bias": counts}, counts + 1, rounding=rounding) == ["params/bias"]


def test_what_has_no_gradient_but_noise_is_left_out_and_said():
  said = []
  state = {"params/bias": ONE, "opt_state/0/nu/bias": np.float32([1e-4, 1e-19, 1e-5, 0]), "params/other": ONE}
  rounding = compare.Rounding(1e-4, {}, {})
  same = lambda name, i: (
    not compare.states(state, state | {name: ONE + 0.1 * np.eye(4, dtype=np.float32)[i]}, rounding, said.append)
  )
  assert [same("params/bias", i) for i in range(4)] == [False, True, False, False]
  assert not same("params/other", 1)
  assert len(said) == 1 and said[0].startswith("    left out: 1 of 4 of params/bias")


def test_where_rounding_alone_is_too_much_nothing_is_compared():
  compare.Rounding(1e-4, {"params": 9e-6}, {}).check("1 x 1, 1 x 2")
  with pytest.raises(UserError, match=r"--tolerance=0.0001: undisturbed runs on 1 x 1, 1 x 2 are 0.04 .* in opt/nu"):
    compare.Rounding(1e-4, {"params": 9e-6, "opt/nu": 0.04}, {}).check("1 x 1, 1 x 2")


@pytest.mark.slow
def test_a_changed_number_is_found(config, tmp_path):
  run = harness.Harness(config=config, overrides=[], out=str(tmp_path), places=[(1, 1)], limit=120.0)
  first = run.undisturbed()
  other = harness.Harness(
    config=config, overrides=["--config.seed=4"], out=str(tmp_path / "b"), places=[(1, 1)], limit=120.0
  )
  differences, compared = run.compare(first, other.undisturbed())
  assert compared > 100 and any("params" in d for d in differences)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_on_other_places_rounding_is_allowed_and_a_real_difference_found(config, tmp_path, precision):
  def undisturbed(name, places, *overrides):
    return harness.Harness(
      config=config,
      overrides=[f"--config.precision={precision}", "--config.total_steps=4", *overrides],
      out=str(tmp_path / name),
      places=places,
      limit=120.0,
      tolerance=0.3,
    )

  run = undisturbed("a", [(1, 1), (1, 2)])
  first = run.undisturbed()
  four = undisturbed("b", [(1, 4)]).undisturbed()
  assert run.compare(first, four)[0] == []
  # Another order of the batches, and a rate that is a tenth higher.
  for i, wrong in enumerate(("--config.seed=4", "--config.schedule.peak=1.1e-2")):
    differences, _ = run.compare(first, undisturbed(f"c{i}", [(1, 1)], wrong).undisturbed())
    assert any("params/" in d for d in differences), wrong
    assert any("ledger" in d for d in differences) == (i == 0)
