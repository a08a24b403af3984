"""A run at a glance: its parameters, the rule that laid each out, bytes a device; what its devices send each other."""

from __future__ import annotations

import math
import os
from typing import Any

import jax

from bigjax import paths, record, sharding

SMALL = 1024  # Bytes of a collective that is not worth a line.


def rows(run) -> list[dict[str, Any]]:
  """One row a leaf of the state: path, shape, dtype, count, rule, spec, bytes and bytes a device."""
  names = paths.names(run.abstract)
  given = sharding.as_rules(run.config.sharding, run.abstract, run.mesh)
  rules = paths.first_match([r[0] for r in given], names, "config.sharding")
  leaves, layouts = jax.tree.leaves(run.abstract), jax.tree.leaves(run.shardings)
  return [
    {
      "path": name,
      "shape": list(leaf.shape),
      "dtype": str(leaf.dtype),
      "count": math.prod(leaf.shape),
      "rule": list(given[rule]),
      "spec": str(tuple(layout.spec)),
      "bytes": math.prod(leaf.shape) * leaf.dtype.itemsize,
      "bytes_a_device": sharding.bytes_a_device(leaf, layout),
    }
    for name, rule, leaf, layout in zip(names, rules, leaves, layouts, strict=True)
  ]


def facts(run) -> dict[str, Any]:
  """What run.json says of the experiment."""
  return {
    "mesh": dict(run.mesh.shape),
    "devices": f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}",
    "processes": jax.process_count(),
    "parameter_count": count(run),
    "examples": len(run.data.source),
    "total_steps": run.total_steps,
    "batch": {k: f"{v.dtype}{list(v.shape)}" for k, v in run.batch.items()},
  }


def count(run) -> int:
  """Returns the number of parameters, those that adapters are for among them."""
  own, _ = run.model.own(run.abstract.params, run.abstract.extras)
  adapters = {} if run.model.adapters is None else run.abstract.params
  return sum(math.prod(p.shape) for p in jax.tree.leaves((own, adapters)))


def write(run, workdir: str) -> None:
  """Writes parameters.json, the rows of the parameters with `params/` left out."""
  params = [r | {"path": r["path"].removeprefix("params/")} for r in rows(run) if r["path"].startswith("params/")]
  record.write_json(os.path.join(workdir, "parameters.json"), params)


def headline(run) -> str:
  """Returns a line on what is about to run."""
  config, adapters = run.config, run.abstract.params if run.model.adapters is not None else {}
  trained = f" ({sum(math.prod(p.shape) for p in jax.tree.leaves(adapters)):,} of adapters)" if adapters else ""
  return (
    f"{config.model.name}, {count(run):,} parameters{trained}; "
    f"{config.data.source.name}, {len(run.data.source):,} examples; "
    f"{run.total_steps:,} steps of {config.batch_size:,} on {run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
  )


def table(run) -> str:
  """Returns the state as a table, parts of it summed up below."""
  found = rows(run)
  lines = [("path", "shape", "dtype", "rule", "spec", "bytes a device")]
  for r in found:
    shape = "x".join(map(str, r["shape"])) or "scalar"
    lines.append(
      (r["path"], shape, r["dtype"], f"{r['rule'][0]} -> {r['rule'][1]}", r["spec"], _bytes(r["bytes_a_device"]))
    )
  total = {}
  for r in found:
    part = total.setdefault(r["path"].split("/")[0], [0, 0, 0])
    for i, key in enumerate(("count", "bytes", "bytes_a_device")):
      part[i] += r[key]
  sums = [
    f"{part:<10} {n:>16,} values  {_bytes(b):>10} in all  {_bytes(d):>10} a device" for part, (n, b, d) in total.items()
  ]
  return "\n".join([*_aligned(lines, right=(5,)), "", f"mesh {dict(run.mesh.shape)} of {run.mesh.size} devices", *sums])


def words(run) -> dict[str, dict[str, Any]]:
  """The words of activations: the axes of the mesh that each is split over, and into how many parts."""
  return {w: {"axes": list(run.layout.axes(w)), "parts": run.layout.size(w)} for w in run.layout.words}


def words_line(run) -> str:
  """Returns the words that are split, in a line."""
  split = [f"{w} over {' x '.join(v['axes'])} ({v['parts']})" for w, v in words(run).items() if v["parts"] > 1]
  whole = [w for w, v in words(run).items() if v["parts"] == 1]
  return "; ".join([*split, f"whole: {', '.join(whole)}"] if whole else split)


def pipeline(run) -> dict[str, Any] | None:
  """The schedule of a pipeline and its bubble, the share of a device's time that it waits; None without one."""
  layout = run.layout
  if (stages := layout.size("stage")) == 1:
    return None
  turns = layout.microbatches * layout.repeats
  return {
    "stages": stages,
    "microbatches": layout.microbatches,
    "repeats": layout.repeats,
    "bubble": (stages - 1) / (turns + stages - 1),
  }


def collectives(run, text: str) -> list[dict[str, Any]]:
  """What the devices send in a step, from the text of the compiled program, the heaviest first.

  A row is what a person would call one: a kind, axes of the mesh, bytes and a line; `count` is how often it runs in a
  step, `bytes` its result on one device, `total` both multiplied. `expected` says whether the config explains it.
  """
  from bigjax.plan import collectives as reading
  from bigjax.plan import hlo, reasons

  intent = reasons.Intent.of(run)
  every, found = reading.find(hlo.parse(text), run.mesh), []
  verdicts = dict(zip(map(id, every), reasons.judge_all(every, intent), strict=True))
  for group in reading.by_line(every):
    for verdict in dict.fromkeys(verdicts[id(c)] for c in group):
      same = [c for c in group if verdicts[id(c)] == verdict]
      one = same[0]
      found.append(
        {
          "kind": one.kind,
          "axes": list(one.axes),
          "devices": one.parts,
          "bytes": one.bytes,
          "count": sum(c.executions for c in same),
          "total": sum(c.total for c in same),
          "pass": one.phase,
          "lines": [f"{_short(f.file)}:{f.line}" for f in one.lines],
          "functions": [f.function for f in one.lines],
          "op": one.op_name,
          "leaf": hlo.leaf(one.origin),
          "asynchronous": one.asynchronous,
          "overlapped": one.overlapped,
          "across_slices": one.slow,
          "expected": verdict.expected,
          "why": verdict.why,
        }
      )
  return found


def collectives_table(rows: list[dict[str, Any]]) -> str:
  """Returns the rows of `collectives` as a table, sums by axis, and those below that nothing explains."""
  if not rows:
    return "No device sends anything to another."
  head = ("collective", "axis", "bytes", "count", "total", "pass", "line", "why")
  line = lambda r: (
    r["kind"] + (" (overlapped)" if r["overlapped"] else ""),
    "+".join(r["axes"]) + (" across slices" if r["across_slices"] else ""),
    _bytes(r["bytes"]),
    f"{r['count']:,}",
    _bytes(r["total"]),
    r["pass"],
    _place(r["lines"]),
    r["why"] + (f": {r['leaf'].removeprefix('params/')}" if r["leaf"] and r["leaf"] not in r["why"] else ""),
  )
  large = [r for r in rows if r["bytes"] > SMALL or not r["expected"]]
  small = [r for r in rows if r not in large]
  sums = {}
  for r in rows:
    key = "+".join(r["axes"])
    sums[key] = sums.get(key, 0) + r["total"]
  lines = _aligned([head, *map(line, large)], right=(2, 3, 4)) if large else []
  if small:
    lines.append(f"and {sum(r['count'] for r in small):,} of at most {SMALL} bytes, {_bytes(_total(small))} together")
  totals = ", ".join(f"{_bytes(n)} over {axis}" for axis, n in sorted(sums.items(), key=lambda item: -item[1]))
  lines += ["", f"results a device a step: {_bytes(_total(rows))}; {totals}"]
  flagged = [r for r in rows if not r["expected"]]
  if flagged:
    lines += ["", f"{len(flagged)} that nothing in the config explains, {_bytes(_total(flagged))} a step:"]
    for r in flagged:
      where = f" at {_place(r['lines'])} in {r['functions'][0]}" if r["lines"] else ""
      lines.append(
        f"  {r['kind']} over {'+'.join(r['axes'])}, {r['count']:,} x {_bytes(r['bytes'])}{where} ({r['pass']})"
      )
      lines.append(f"    {r['why']}")
  return "\n".join(lines)


def _total(rows):
  return sum(r["total"] for r in rows)


def _place(lines):
  """The line, and what called it."""
  caller = next((line for line in lines[1:] if line != lines[0]), None)
  return " < ".join(lines[:1] + ([caller.removeprefix(lines[0].partition(":")[0] + ":")] if caller else []))


def _short(file):
  """A path from the working directory, or from the package that the file is in."""
  here = os.path.relpath(file)
  if not here.startswith(".."):
    return here
  parts = file.split(os.sep)
  known = next((i for i in range(len(parts) - 1, 0, -1) if parts[i] in ("bigjax", "site-packages")), len(parts) - 2)
  return os.sep.join(parts[known + (parts[known] == "site-packages") :])


def _aligned(lines, right=()):
  """Columns of equal width, a rule below the first line."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  aligned = [
    "  ".join(
      c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  ]
  return [aligned[0], "-" * len(aligned[0]), *aligned[1:]]


def _bytes(n: int | float) -> str:
  for unit in ("B", "KiB", "MiB"):
    if n < 1024:
      return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
    n /= 1024
  return f"{n:.2f} GiB"
