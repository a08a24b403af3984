"""Checkpoints damaged at random, scripts/fuzz/checkpoints.py: found, or the same values to the bit."""

import importlib
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "scripts" / "fuzz"))
fuzz = importlib.import_module("checkpoints")


def check(cases, seed):
  counts, bad = fuzz.run(cases, seed)
  assert not bad
  assert sum(counts.values()) == cases
  return counts


def test_damaged_checkpoints_are_found_or_restore_to_the_same_bits():
  counts = check(60, seed=1)
  assert sum(n for (_, outcome), n in counts.items() if outcome == "found") > 30


@pytest.mark.slow
def test_a_thousand_damaged_checkpoints_are_found_or_restore_to_the_same_bits():
  counts = check(1000, seed=2)
  assert {kind for kind, _ in counts} == {*fuzz.KINDS, "several"}
