"""What a notebook reads of a run."""

import math

import pytest

import bigjax
from bigjax.errors import UserError


def test_metrics_are_read_also_where_a_line_was_cut_short(tmp_path):
  with pytest.raises(UserError, match="holds no run"):
    bigjax.read_metrics(str(tmp_path))
  (tmp_path / "config.json").write_text("{}")
  assert bigjax.read_metrics(str(tmp_path)) == {}
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n{"step": 3, "lo')
  found = bigjax.read_metrics(str(tmp_path))["loss"]
  assert found[0] == (1, 2.5) and math.isnan(found[1][1]) and len(found) == 2
