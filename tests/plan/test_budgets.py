"""A config that states what its step must fit is held to it; one that states nothing is left alone."""

import json

import pytest

import bigjax
from bigjax.errors import UserError
from bigjax.plan import budgets, kept, report


def write(tmp_path, config):
  (tmp_path / "config.json").write_text(json.dumps(config))
  return str(tmp_path / "config.json")


def test_a_budget_that_bounds_nothing_is_refused(small):
  with pytest.raises(UserError, match="bounds nothing"):
    bigjax.resolve(small(plan=dict(topology="v5e:2x2")))


def test_a_config_without_a_budget_has_nothing_to_hold(small, tmp_path):
  assert list(budgets.check(write(tmp_path, small()), kept.Kept())) == []


def test_each_bound_is_told_and_judged(small, tmp_path, monkeypatch):
  found = dict(memory=dict(total=3 * 2**30), communication=dict(bytes=2**30), time=dict(mfu_bound=0.5))
  monkeypatch.setattr(report, "make", lambda prepared, keep: found)
  plan = dict(topology="h100:8", hbm_gib=4.0, collective_gib=0.5, mfu_bound=0.6)
  lines = list(budgets.check(write(tmp_path, small(plan=plan)), kept.Kept()))
  assert [fine for _, fine in lines] == [True, False, False]
  assert lines[0][0].startswith("fine") and "HBM, GiB 3, at most 4" in lines[0][0]
  assert lines[1][0].startswith("OVER") and lines[2][0].startswith("BELOW")
