"""The page: everything that comes from a config or a program is escaped; what is missing is said on top."""

import bigjax
from bigjax.plan import page, prepare, report


def test_names_are_text_and_never_markup(small):
  plan = report.make(prepare.prepare(bigjax.resolve(small()), "h100:8"))
  evil = "<script>alert(1)</script>"
  plan["config"] |= {"model": evil, "data": evil}
  plan["memory"]["buffers"] = [dict(bytes=5, shape=evil, what=evil, line=evil)]
  plan["communication"] = dict(
    bytes=1,
    axes={evil: dict(bandwidth=None, link=evil, seconds=None, count=1, bytes=1, exposed=None)},
    collectives=[
      dict(kind=evil, axes=[evil], across_slices=False, bytes=2000, count=1, total=2000, overlapped=False)
      | {"pass": evil, "lines": [evil], "functions": [evil], "why": evil, "expected": False, "leaf": evil}
    ],
  )
  found = page.html(plan, change=evil)
  assert "<script" not in found and found.count("&lt;script&gt;") >= 9


def test_a_plan_that_does_not_fit_says_so_first(small):
  plan = report.make(prepare.prepare(bigjax.resolve(small(batch_size=2**21)), "h100:8"))
  found = page.html(plan)
  assert "does not fit" in found and "are missing on each device" in found and "fits with" in found
