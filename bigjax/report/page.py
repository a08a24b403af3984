"""The report as one HTML page: what the run reached, how it got there, and all it takes to repeat it."""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigjax.metrics.reading import (
  EVENTS,
  claim_outcome,
  direction,
  format_rate,
  format_seconds,
  format_value,
  is_per_class,
  speed,
)
from bigjax.report import confusion, curves
from bigjax.report.markup import Markup, element, fragment
from bigjax.report.run import Run, split_name

_BROKEN = ("failed", "crashed", "error")


def html(run: Run) -> str:
  """The whole page."""
  style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
  matrices = list(confusion.sections(run))
  small = [section for section, classes in matrices if classes <= 10]
  large = [section for section, classes in matrices if classes > 10]
  by_class, members = _per_class(run)
  left = [_last_and_best(run), by_class if members <= 30 else None]
  columns = [element("div", left, cls="stack"), element("div", _time(run), small, cls="stack")]
  sections = [
    _curves(run),
    element("div", columns, cls="pair"),
    large,
    by_class if members > 30 else None,
    _parameters(run),
    _config(run),
    _environment(run),
  ]
  head = [
    element("meta", charset="utf-8"),
    element("meta", name="viewport", content="width=device-width, initial-scale=1"),
    element("title", f"{run.name} · bigjax"),
    element("style", Markup(style)),
  ]
  body = element("main", _header(run), _alerts(run), _tiles(run), sections, _footer(run))
  return f"<!doctype html>\n{element('html', element('head', head), element('body', body), lang='en')}\n"


def _section(title: str, *children: Any, lead: Any = None, long: bool = False) -> Markup:
  opening = [element("h2", title), element("p", lead, cls="lead") if lead else None]
  return element("section", opening, *children, cls="long" if long else None)


def _header(run: Run) -> Markup:
  status = str(run.facts.get("status") or "")
  kind = "finished" if status.startswith("finished") else "broken" if status in _BROKEN else ""
  command = run.facts.get("command") or []
  configs = [word.removeprefix("--config=") for word in command if str(word).startswith("--config=")]
  started, finished = _moment(run.facts.get("started")), _moment(run.facts.get("finished"))
  when = f"{started} to {finished}" if started and finished else f"since {started}" if started else ""
  return element(
    "header",
    element("h1", run.name),
    element("span", status, cls=f"status {kind}".strip()) if status else None,
    element("div", " · ".join([*map(str, configs[:1]), *([when] if when else [])]), cls="sub"),
  )


def _alerts(run: Run) -> list[Markup]:
  broken = [series for panel in run.panels for series in panel.series if series.broken]
  if not run.rows:
    return [element("p", "Nothing has been measured yet.", cls="notice")]
  if not broken:
    return []
  first = min(broken, key=lambda series: series.broken[0])
  more = f" (and {len(broken) - 1} more metrics then or later)" if len(broken) > 1 else ""
  text = (
    f" was not finite at step {first.broken[0]:,}{more}. A lower learning rate, a longer warmup or clipping may help."
  )
  return [element("p", element("b", first.name), text, cls="notice bad")]


def _tiles(run: Run) -> Markup | None:
  table, tiles = run.table, []

  def add(value, label, cls=None):
    tiles.append(element("div", element("b", value, cls=cls), element("span", label), cls="tile"))

  claim = claim_outcome(run.config.get("claim"), table)
  shown = _headline_metrics(run, table)
  for name in shown:
    entry = table[name]
    if claim and name == run.config["claim"]["metric"]:
      running = run.facts.get("status") == "running"
      said, cls = ("reached", "good") if claim[0] else ("not reached yet", None) if running else ("missed", "bad")
      add(format_value(entry["last"]), [_breakable(name), f", last; claim {said}"], cls)
    elif "best" in entry and "/" in name:
      add(format_value(entry["best"]), [_breakable(name), f", best at step {entry['best_step']:,}"])
    else:
      add(format_value(entry["last"]), [_breakable(name), ", last"], None if math.isfinite(entry["last"]) else "bad")
  steps, total = run.facts.get("step"), run.facts.get("total_steps")
  if steps is None and run.rows:
    steps = run.rows[-1]["step"]
  if steps is not None:
    add(f"{steps:,}", f"of {total:,} steps" if total else "steps")
  if seconds := run.facts.get("seconds"):
    add(format_seconds(sum(seconds.values())), "wall time")
  measured = speed(run.facts, run.config)
  if "examples_per_second" in measured:
    per_step = f"examples/s at {format_rate(measured['milliseconds_per_step'])} ms a step"
    add(format_rate(measured["examples_per_second"]), per_step)
  if count := _parameter_count(run):
    add(_compact(count), "parameters")
  return element("div", tiles, cls="tiles") if tiles else None


def _headline_metrics(run: Run, table: Mapping[str, Any]) -> list[str]:
  """At most three names: the claimed or watched metric, the first other evaluations, the training loss."""
  watched = [(run.config.get("claim") or {}).get("metric"), (run.config.get("keep") or {}).get("best")]
  rest = [name for name in table if "best" in table[name] and split_name(name, run.evals)[0] != "train"]
  rest.sort(key=lambda name: (direction(name) != "max", name.count("_")))
  names = list(dict.fromkeys([*(name for name in watched if name in table), *rest[:1]]))[:1]
  # Beside it the same metric of another evaluation or of the EMA, or else the loss.
  base = lambda name: name.rsplit("/", 1)[-1]
  rest.sort(key=lambda name: (base(name) != base(names[0]), base(name) != "loss"))
  names += [name for name in rest if name not in names][:1]
  return [*names, *(["loss"] if "loss" in table else [])]


def _breakable(name: str) -> Markup:
  """A name that may be broken after its joints."""
  return Markup(fragment(name).replace("/", "/<wbr>").replace("_", "_<wbr>"))


def _curves(run: Run) -> Markup | None:
  if not run.panels:
    return None
  figures = []
  for panel in run.panels[: curves.MOST_PANELS]:
    drawn = Markup(curves.svg(panel, run))
    picture = element("div", drawn, role="img", aria_label=f"{panel.title} over the steps")
    caption = element("figcaption", element("h3", _breakable(panel.title)), element("span", curves.note(panel)))
    figures.append(element("figure", caption, picture, cls="chart"))
  legend = None
  if run.labels != ("train",):
    items = [element("li", element("i", style=f"background:{_colour(run, label)}"), label) for label in run.labels]
    legend = element("ul", items, cls="legend")
  rest = [panel.title for panel in run.panels[curves.MOST_PANELS :]]
  more = element("p", f"Not drawn, but in metrics.csv: {', '.join(rest)}.", cls="soft") if rest else None
  return _section("Curves", legend, element("div", figures, cls="curves"), more, long=True)


def _colour(run: Run, label: str) -> str:
  order = list(dict.fromkeys(("train", *run.labels)))
  return f"var(--series-{order.index(label) % len(curves.COLOURS)})" if label in order else "var(--faint)"


def _last_and_best(run: Run) -> Markup | None:
  table = run.table
  groups: dict[str, list[tuple[str, str]]] = {}
  for name in table:
    label, base = split_name(name, run.evals)
    groups.setdefault(label, []).append((base, name))
  lines = []
  for label in sorted(groups, key=lambda label: label == "train"):
    dot = element("i", style=f"background:{_colour(run, label)}")
    lines.append(element("tr", element("th", dot, label, cls="group", colspan=4, scope="rowgroup")))
    for base, name in sorted(groups[label], key=lambda item: direction(item[1]) is None):
      entry = table[name]
      best = [format_value(entry["best"]), f"{entry['best_step']:,}"] if "best" in entry else ["", ""]
      cells = [element("td", cell, cls=cls) for cell, cls in zip(best, ("num best", "num soft"), strict=True)]
      cells = [element("td", format_value(entry["last"]), cls="num"), *cells]
      lines.append(element("tr", element("th", base, scope="row", cls="indent"), cells))
  if not lines:
    return None
  header = [element("th", "metric"), *(element("th", t, cls="num") for t in ("last", "best", "at step"))]
  body = element("table", element("thead", element("tr", header)), element("tbody", lines), cls="wide")
  return _section("Last and best", element("div", body, cls="scroll"))


def _time(run: Run) -> Markup | None:
  seconds = {name: s for name, s in (run.facts.get("seconds") or {}).items() if s > 0}
  total = sum(seconds.values())
  if not total:
    return None
  names = {
    "start": "start",
    "compile": "compilation",
    "restore": "making or restoring the state",
    "device": "training steps on the devices",
    "host": "training steps on the host",
    "train": "training steps",
    "input": "waiting for input",
    "eval": "evaluation",
    "save": "saving",
    "lost": "lost: steps of a start that was killed",
  }
  # The order of the colours is that of the names, so that two reports of different runs look alike.
  order = sorted(seconds, key=lambda name: list(_TIME_COLOURS).index(name) if name in _TIME_COLOURS else 9)
  parts, lines = [], []
  for name in order:
    share, colour = seconds[name] / total, _TIME_COLOURS.get(name, "var(--faint)")
    parts.append(element("i", style=f"background:{colour};flex:{max(share, 0.002):.4f}", title=f"{name} {share:.1%}"))
    dot = element("i", cls="dot", style=f"background:{colour}")
    amount = format_seconds(seconds[name]) if total >= 120 else f"{seconds[name]:.1f} s"
    cells = [element("td", amount, cls="num"), element("td", f"{share:.1%}", cls="num soft")]
    lines.append(element("tr", element("td", dot, names.get(name, name)), cells))
  starts = len(run.facts.get("starts", []))
  noted = "goodput" in run.facts  # Older runs have the seconds of their last start only.
  lead = f"Goodput {run.facts['goodput']:.1%}: the part in which steps were computed." if noted else None
  if starts > 1:
    lead = f"{lead} Of all {starts} starts." if noted else "Of the last start only: the run was resumed."
  table = element("table", element("tbody", lines), cls="wide")
  return _section("Where the time went", element("div", parts, cls="bar"), table, lead=lead)


_TIME_COLOURS = {
  "train": "var(--series-0)",
  "device": "var(--series-0)",
  "host": "var(--series-3)",
  "eval": "var(--series-2)",
  "save": "var(--series-4)",
  "input": "var(--series-1)",
  "start": "var(--faint)",
}


def _per_class(run: Run) -> tuple[Markup | None, int]:
  """Metrics of single classes or outputs, the newest values: a row a class, a column a metric; and how many rows."""
  found: dict[str, dict[str, dict[str, float]]] = {}
  for row in run.rows:
    for name, value in row.items():
      if name != "step" and is_per_class(name) and not isinstance(value, list):
        parent, _, member = name.rpartition("/")
        label, metric = split_name(parent, run.evals)
        found.setdefault(label, {}).setdefault(member, {})[metric] = value
  parts = []
  for label, members in found.items():
    metrics = list(dict.fromkeys(metric for values in members.values() for metric in values))
    header = element("tr", element("th", label), [element("th", metric, cls="num") for metric in metrics])
    lines = [
      element(
        "tr",
        element("th", member, scope="row"),
        [element("td", _share(values[m]) if m in values else "", cls="num") for m in metrics],
      )
      for member, values in members.items()
    ]
    table = element("table", element("thead", header), element("tbody", lines), cls="wide")
    title = element("summary", f"{label}: {len(members)} rows of {', '.join(metrics)}")
    parts.append(
      element("details", title, element("div", table, cls="scroll"), open="" if len(members) <= 30 else None)
    )
  return (_section("By class", *parts, long=True) if parts else None), sum(map(len, found.values()))


def _share(value: float) -> str:
  """Shares below each other have as many digits each."""
  return f"{value:.4f}" if 0 <= value <= 1 else format_value(value)


def _parameters(run: Run) -> Markup | None:
  leaves = [leaf for leaf in run.parameters if isinstance(leaf, Mapping) and "path" in leaf]
  total = sum(leaf.get("count", 0) for leaf in leaves)
  if not leaves:
    return None
  modules: dict[str, dict[str, int]] = {}
  for leaf in leaves:
    top, _, rest = str(leaf["path"]).partition("/")
    inner = modules.setdefault(top, {})
    inner[rest.split("/")[0]] = inner.get(rest.split("/")[0], 0) + leaf.get("count", 0)

  def line(name, count, cls=None):
    share = element("i", style=f"width:{100 * count / total:.2f}%" if total else None)
    percent = f"{count / total:.1%}" if total else ""
    cells = [element("td", f"{count:,}", cls="num"), element("td", percent, cls="num soft")]
    return element("tr", element("th", name, scope="row", cls=cls), cells, element("td", share, cls="share"))

  with_inner = sum(map(len, modules.values())) <= 40
  lines = []
  for top, inner in modules.items():
    lines.append(line(top, sum(inner.values()), "group" if with_inner and len(inner) > 1 else None))
    if with_inner and len(inner) > 1:
      lines += [line(name, count, "indent") for name, count in inner.items()]
  header = [element("th", "module"), element("th", "parameters", cls="num"), element("th", "share", cls="num")]
  summed = element("thead", element("tr", header, element("th", "")))
  table = element("table", summed, element("tbody", lines), cls="wide")

  columns = ("path", "shape", "type", "count", "layout")
  header = [element("th", c, cls="num" if c == "count" else None) for c in columns]
  rows = [
    element(
      "tr",
      element("th", leaf["path"], scope="row", cls="mono"),
      element("td", " × ".join(map(str, leaf.get("shape", []))) or "scalar", cls="mono"),
      element("td", leaf.get("dtype", ""), cls="soft"),
      element("td", f"{leaf.get('count', 0):,}", cls="num"),
      element("td", _layout(leaf), cls="soft mono"),
    )
    for leaf in leaves[:1000]
  ]
  every = element("table", element("thead", element("tr", header)), element("tbody", rows), cls="wide")
  cut = f", the first 1,000 of {len(leaves):,}" if len(leaves) > 1000 else ""
  details = element(
    "details", element("summary", f"All {len(leaves):,} arrays{cut}"), element("div", every, cls="scroll")
  )
  size = sum(leaf.get("bytes", 0) for leaf in leaves)
  lead = f"{total:,} parameters in {len(leaves):,} arrays" + (f", {_bytes(size)}" if size else "")
  return _section("Parameters", element("div", table, cls="scroll"), details, lead=lead, long=True)


def _layout(leaf: Mapping[str, Any]) -> str:
  rule = leaf.get("rule")
  return str(rule[1]) if isinstance(rule, (list, tuple)) and len(rule) == 2 else str(leaf.get("spec", ""))


def _config(run: Run) -> Markup | None:
  if not run.config:
    return None
  lead = "Resolved: defaults filled in. The same is in config.json."
  return _section("Config", element("div", _tree(run.config), cls="tree"), lead=lead, long=True)


def _tree(value: Mapping[str, Any]) -> Markup:
  """Nested lists; a component's name stands beside its key, as the kind of thing it is."""
  items = []
  for key, inner in value.items():
    name = element("span", key, cls="key")
    if isinstance(inner, Mapping) and inner:
      kind = inner.get("name")
      rest = {k: v for k, v in inner.items() if k != "name" or not isinstance(kind, str)}
      items.append(
        element(
          "li",
          name,
          element("span", kind, cls="kind") if isinstance(kind, str) else None,
          _tree(rest) if rest else None,
        )
      )
    elif isinstance(inner, list) and any(isinstance(item, (Mapping, list)) for item in inner):
      entries = {str(i): item for i, item in enumerate(inner)}
      flat = all(isinstance(item, list) and not any(isinstance(x, (Mapping, list)) for x in item) for item in inner)
      body = element("ul", [element("li", _leaf(item)) for item in inner]) if flat else _tree(entries)
      items.append(element("li", name, body))
    else:
      items.append(element("li", name, _leaf(inner)))
  return element("ul", items)


def _leaf(value: Any) -> Markup:
  if isinstance(value, list):
    joined = [fragment([", " if i else "", _leaf(item)]) for i, item in enumerate(value)]
    return fragment(joined) if value else element("span", "none", cls="none")
  if value is None or value == {}:
    return element("span", "none", cls="none")
  if isinstance(value, bool):
    return element("span", "yes" if value else "no", cls="number")
  if isinstance(value, int):
    return element("span", f"{value:,}" if abs(value) >= 10_000 else value, cls="number")
  if isinstance(value, float):
    return element("span", f"{value:g}", cls="number")
  return element("span", value if value != "" else '""', cls="text")


def _environment(run: Run) -> Markup | None:
  facts = dict(run.facts)
  if not facts:
    return None
  command, git, versions = facts.pop("command", None), facts.pop("git", None) or {}, facts.pop("versions", None) or {}
  for name in ("status", "seconds", "step", "total_steps", "best", "steps_per_second", "started", "finished"):
    facts.pop(name, None)  # shown elsewhere
  starts = facts.pop("starts", None) or []
  pairs: list[tuple[str, Any]] = []
  if git.get("commit"):
    changed = git.get("changed_files") or []
    state = f", with {len(changed)} changed files" if changed else ", clean" if "changed_files" in git else ""
    pairs.append(("code", [element("code", str(git["commit"])[:12]), state]))
  if len(starts) > 1:
    pairs.append(("starts", f"{len(starts)}: {', '.join(filter(None, map(_moment, starts)))}"))
  for key, value in facts.items():
    pairs.append((key.replace("_", " "), _fact(value)))
  text = shlex.join(map(str, command)) if isinstance(command, list) else command
  listed = [fragment([element("dt", key), element("dd", value)]) for key, value in pairs]
  packages = [fragment([element("dt", name), element("dd", version)]) for name, version in versions.items()]
  columns = element("div", element("dl", listed), element("dl", packages) if packages else None, cls="pair")
  return _section("Environment", element("pre", text) if text else None, columns)


def _fact(value: Any) -> str:
  if isinstance(value, Mapping):
    return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
  if isinstance(value, list):
    return ", ".join(map(_fact, value))
  return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _footer(run: Run) -> Markup:
  files = ("metrics.csv", "metrics.jsonl", "curves.png", "config.json", "run.json", "parameters.json")
  links = [element("a", file, href=file) for file in files if (run.workdir / file).exists()]
  more = [element("code", f"bigjax eval --workdir={run.workdir}")]
  if any(run.workdir.glob(EVENTS)):
    more.insert(0, element("code", f"tensorboard --logdir={run.workdir}"))
  return element("footer", links, more)


def _moment(text: Any) -> str:
  """`22 Nov 2026, 03:10 UTC` of an ISO time."""
  try:
    moment = datetime.datetime.fromisoformat(str(text))
  except ValueError:
    return ""
  return f"{moment.day} {moment:%b %Y, %H:%M} {moment.tzname() or ''}".strip()


def _parameter_count(run: Run) -> int:
  return run.facts.get("parameter_count") or sum(leaf.get("count", 0) for leaf in run.parameters)


def _compact(count: int) -> str:
  for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if count >= unit:
      return f"{count / unit:.3g} {letter}"
  return str(count)


def _bytes(count: int) -> str:
  for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if count >= unit:
      return f"{count / unit:.1f} {name}"
  return f"{count} B"
