"""A plan as one HTML page that needs no other file: does it fit, how fast, what bounds it, and what takes the room."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigjax.plan import text
from bigjax.report.markup import Markup, element

_PARTS = (("params", "parameters"), ("optimizer", "optimizer"), ("extras", "kept besides"), ("batch", "batch"))
_PARTS += (("temporaries", "activations, temporaries"), ("code", "generated code"), ("outputs", "beyond the old state"))


def html(plan: Mapping[str, Any], change: str = "") -> str:
  """Returns the page; `change` is what `text.compare` found."""
  style = (Path(__file__).parents[1] / "report" / "style.css").read_text(encoding="utf-8")
  title = f"{plan['config']['model']} on {plan['topology']}"
  head = [
    element("meta", charset="utf-8"),
    element("meta", name="viewport", content="width=device-width, initial-scale=1"),
    element("title", f"plan: {title} · bigjax"),
    element("style", Markup(style)),
  ]
  pairs = dict(text.sections(plan))
  rest = ("work a step", "communication a device a step", "run")
  body = [
    _header(plan, title),
    _alert(plan),
    _tiles(plan),
    _section("what changed", element("pre", change)) if change else None,
    element("div", [_memory(plan), element("div", [_time(plan, pairs)], cls="stack")], cls="pair"),
    _buffers(plan),
    [_section(name, _list(pairs[name])) for name in rest if name in pairs],
    _collectives(plan),
    _section("how it was compiled", _list(pairs["plan"])),
    _chip(plan),
  ]
  page = element("html", element("head", head), element("body", element("main", body)), lang="en")
  return f"<!doctype html>\n{page}\n"


def _header(plan, title):
  kind = "finished" if plan["fits"] else "broken"
  slices = f"{plan['slices']} slices of " if plan["slices"] > 1 else ""
  mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
  what = f"{slices}{plan['topology']} · {plan['chips']:,} chips · mesh {mesh} · {plan['config']['batch_size']:,} a step"
  return element(
    "header",
    element("h1", title),
    element("span", "fits" if plan["fits"] else "does not fit", cls=f"status {kind}"),
    element("div", what, cls="sub"),
  )


def _alert(plan):
  if plan["fits"]:
    return None
  said = [f"{text.size(plan['memory']['missing'])} are missing on each device. "]
  said += [f"{name}: {value}. " for name, value in text.remedies(plan["memory"]["remedies"])]
  return element("p", said, cls="notice bad")


def _tiles(plan):
  found, m = [], plan["memory"]
  if "total" in m:
    share = f"of {text.size(m['limit'])} a device, {m['total'] / m['limit']:.0%}"
    found.append((text.size(m["total"]), share, "good" if plan["fits"] else "bad"))
  else:
    found.append((text.size(m["needed"]), f"needed, {text.size(m['available'])} there", "bad"))
  if t := plan.get("time"):
    step = t["expected_seconds"] or t["roofline_seconds"]
    found.append((text.duration(step), f"a step, bound by {t['bound_by']}", None))
    found.append((f"{t['mfu_expected']:.1%}", f"MFU expected, at most {t['mfu_bound']:.1%}", None))
    found.append((f"{t['pace_a_chip']:,.0f}", f"{t['pace_unit']} a second a chip", None))
  if c := plan.get("communication"):
    found.append((text.size(c["bytes"]), "results of collectives a device a step", None))
  if r := plan.get("run"):
    found.append((f"{r['chip_hours']:,.0f}", f"chip-hours, {r['hours']:,.1f} hours", None))
    if r["cost"] is not None:
      found.append((f"{r['cost']:,.0f}", f"at {r['price']:g} a chip an hour", None))
  tile = lambda value, label, cls: element("div", element("b", value, cls=cls), element("span", label), cls="tile")
  return element("div", [tile(*each) for each in found], cls="tiles")


def _memory(plan):
  m = plan["memory"]
  parts = [(label, m[name]) for name, label in _PARTS if m.get(name)]
  whole = max(m["limit"], sum(size for _, size in parts))
  color = lambda i: f"background: var(--series-{i % 6})"
  bar = [element("i", style=f"width: {size / whole:.2%}; {color(i)}") for i, (_, size) in enumerate(parts)]
  row = lambda i, label, size: element(
    "tr",
    element("td", element("i", cls="dot", style=color(i)), label),
    element("td", text.size(size), cls="num"),
    element("td", f"{size / m['limit']:.1%}", cls="num soft"),
  )
  rows = [row(i, *part) for i, part in enumerate(parts)]
  if "total" in m:
    total = [element("td", "total"), element("td", text.size(m["total"]), cls="num best")]
    rows.append(element("tr", total, element("td", f"{m['total'] / m['limit']:.1%}", cls="num soft")))
  lead = "The bar is as long as the device's memory." if plan["fits"] else "More than the device has."
  return _section(
    "memory a device", element("div", bar, cls="bar"), element("table", element("tbody", rows), cls="wide"), lead=lead
  )


def _time(plan, pairs):
  if "time" not in plan:
    return _section("time", element("p", "not known: the compiler refused the program", cls="soft"))
  bounds = sorted(((n, s) for n, s in plan["time"]["bounds"].items() if s), key=lambda item: -item[1])
  most = max((s for _, s in bounds), default=1)
  rows = [
    element(
      "tr",
      element("th", name),
      element("td", element("i", style=f"width: {s / most:.1%}"), cls="share"),
      element("td", text.duration(s), cls="num"),
    )
    for name, s in bounds
  ]
  other = [pair for pair in pairs["time"] if not pair[0].startswith("least: ")]
  table = element("table", element("tbody", rows), cls="wide")
  return _section("time", table, element("br"), _list(other), lead="The least that each resource takes for a step.")


def _buffers(plan):
  found = plan["memory"].get("buffers")
  if not found:
    return None
  rows = [(text.size(b["bytes"]), b["shape"], b["what"], b["line"]) for b in found]
  return _section("the largest arrays", _table(("bytes", "shape", "what", "line"), rows, right=(0,)))


def _collectives(plan):
  if not (sent := plan.get("communication")):
    return None
  rows = [
    (
      c["kind"],
      "+".join(c["axes"]) + (" across slices" if c["across_slices"] else ""),
      text.size(c["bytes"]),
      f"{c['count']:,}",
      text.size(c["total"]),
      "yes" if c["overlapped"] else "no",
      c["pass"],
      c["lines"][0] if c["lines"] else "",
      c["why"] if c["expected"] else f"UNEXPLAINED: {c['why']}",
    )
    for c in sent["collectives"]
  ]
  head = ("collective", "axis", "bytes", "times", "total", "overlapped", "pass", "line", "why")
  return _section("collectives", _table(head, rows, right=(2, 3, 4)), long=True) if rows else None


def _chip(plan):
  rows = [(name, where) for name, where in plan["chip"]["sources"].items()]
  return _section(f"figures of a {plan['chip']['name']}", _list(rows), lead="Each as published there.")


def _section(title, *children, lead=None, long=False):
  opening = [element("h2", title), element("p", lead, cls="lead") if lead else None]
  return element("section", opening, *children, cls="long" if long else None)


def _list(pairs):
  return element("dl", [[element("dt", name), element("dd", value)] for name, value in pairs])


def _table(head, rows, right=()):
  cls = lambda i: "num" if i in right else "whole" if i == 0 else None
  body = [element("tr", [element("td", value, cls=cls(i)) for i, value in enumerate(row)]) for row in rows]
  top = element("thead", element("tr", [element("th", name, cls=cls(i)) for i, name in enumerate(head)]))
  return element("div", element("table", top, element("tbody", body), cls="wide"), cls="scroll")
