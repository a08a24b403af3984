"""Two runs' numbers side by side, as their files have them."""

import pytest

from bigjax.commands import repro
from bigjax.errors import UserError


def test_runs_are_compared_number_by_number_also_where_a_line_was_cut_short(tmp_path):
  a, b = tmp_path / "a", tmp_path / "b"
  a.mkdir()
  b.mkdir()
  (a / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "norm": null, "seconds": 1}\n{"step": 2, "lo')
  (b / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "norm": null, "seconds": 2}\n')
  assert repro.compare(str(a), str(b)) == ([], 2)
  (b / "metrics.jsonl").write_text('{"step": 1, "loss": 2.25}\n')
  assert repro.compare(str(a), str(b)) == (["step 1 norm: not in " + str(b), "step 1 loss: 2.5 -> 2.25"], 2)
  with pytest.raises(UserError, match="no metrics.jsonl"):
    repro.compare(str(tmp_path), str(a))
