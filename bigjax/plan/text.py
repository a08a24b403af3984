"""A plan for a person: as text, and beside another plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigjax import overview
from bigjax.plan import topology

# What `compare` shows, where plans have it.
_COMPARED = {
  "memory.params": "bytes",
  "memory.optimizer": "bytes",
  "memory.temporaries": "bytes",
  "memory.total": "bytes",
  "work.model_flops_a_device": "flops",
  "work.hardware_flops_a_device": "flops",
  "work.recompute_share": "share",
  "work.estimated_cycles": "count",
  "work.hbm_bytes": "bytes",
  "communication.bytes": "bytes",
  "time.roofline_seconds": "seconds",
  "time.expected_seconds": "seconds",
  "time.mfu_expected": "share",
  "time.pace_a_chip": "count",
  "run.hours": "count",
  "run.chip_hours": "count",
  "run.cost": "count",
}


def table(plan: Mapping[str, Any]) -> str:
  """Returns a plan as text."""
  lines = []
  for title, rows in sections(plan):
    width = max((len(name) for name, _ in rows), default=0)
    lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
  if plan.get("communication"):
    lines += ["collectives", overview.collectives_table(plan["communication"]["collectives"])]
  return "\n".join(lines).rstrip()


def sections(plan: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
  """Returns the plan as titles with (name, value) rows."""
  mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
  slices = f"{plan['slices']} slices of " if plan["slices"] > 1 else ""
  options = ", ".join(f"{k}={v}" for k, v in plan["compiler_options"].items()) or "none"
  head = [
    ("where", f"{slices}{plan['topology']}: {plan['chips']} chips, mesh {mesh}"),
    (
      "what",
      f"{plan['config']['model']} on {plan['config']['data']}, {plan['config']['batch_size']:,} examples a step",
    ),
    ("compiled", f"{_compiled(plan)}, options: {options}" if plan["compiled"] else f"no: estimates alone{_get(plan)}"),
  ]
  if plan["compiled"] and plan["topology"].partition(":")[0] in topology.GPUS:
    head.append(
      ("instead", "of cuDNN's attention, compiled only where the GPU is, ours in blocks, which moves more bytes")
    )
  if plan["config"]["stands_in"]:
    head.append(("data", "not here: the shapes of a batch are taken from the config"))
  if plan["chip"]["unknown"]:
    head.append(("unknown", f"no published figure of this chip: {', '.join(plan['chip']['unknown'])}"))
  found = [("plan", head), ("memory a device", _memory(plan))]
  found.append(("work a step", _work(plan)))
  if plan.get("communication"):
    found.append(("communication a device a step", _communication(plan)))
  if plan.get("time"):
    found += [("time", _time(plan)), ("run", _run(plan))]
  return found


def _get(plan):
  """What a compiler for this chip is in, where there is one to be had."""
  return "; GPUs' compiler is in jax-cuda12-plugin" if plan["topology"].partition(":")[0] in topology.GPUS else ""


def _compiled(plan):
  return "before, and kept" if plan["kept"] else f"in {plan['compile_seconds']:.0f} s"


def _memory(plan):
  m = plan["memory"]
  rows = [(name, size(m[name])) for name in ("params", "optimizer", "extras", "batch") if m[name]]
  if "total" in m:
    rows += [("activations, temporaries", size(m["temporaries"]))]
    rows += [(name, size(m[key])) for name, key in (("generated code", "code"),) if m.get(key)]
    rows += [("beyond the old state", size(m["outputs"]))] if m.get("outputs") else []
    rows += [("total", f"{size(m['total'])} of {size(m['limit'])}, {m['total'] / m['limit']:.1%}")]
  else:
    rows += [("the compiler says", m["said"])]
  if plan["compiled"]:
    rows += [("estimated without", f"{size(plan['estimate']['memory']['total'])}")]
  if not plan["fits"]:
    rows += [("DOES NOT FIT", f"{size(m['missing'])} missing"), *remedies(m["remedies"])]
  for b in m.get("buffers", ()):
    rows.append((f"  {size(b['bytes'])}", f"{b['shape']} {b['what']} {b['line']}".rstrip()))
  return rows


def remedies(remedies):
  """The cheapest change that fits, or all there are."""
  fit = next((r for r in remedies if r["fits"]), None)
  about = lambda r: f"{r['flags']}  ({r['why']}; about {size(r['about'])})"
  if fit:
    return [("fits with", about(fit))]
  return [*(("not enough", about(r)) for r in remedies), ("fits with", "a larger topology, or several of these")]


def _work(plan):
  w = plan["work"]
  rows = [("model", f"{flops(w['model_flops'])}, {flops(w['model_flops_a_device'])} a device: {w['formula']}")]
  rows += [("of it attention", flops(w["attention_flops"]))] if w["attention_flops"] else []
  if "hardware_flops_a_device" in w:
    parts = ", ".join(f"{phase} {flops(n)}" for phase, n in w["by_phase"].items())
    rows += [("hardware", f"{flops(w['hardware_flops_a_device'])} a device in products: {parts}")]
    rows += [("beyond the model", f"{w['recompute_share']:.1%} (computed again, or by more devices than one)")]
    rows += [("estimated cycles", f"{w['estimated_cycles']:,} of fusions, loops multiplied out")]
    rows += [("main memory", f"{size(w['hbm_bytes'])} read and written")]
  return rows


def _communication(plan):
  rows = []
  for axis, r in plan["communication"]["axes"].items():
    if not axis:
      continue
    at = "an unknown bandwidth" if r["bandwidth"] is None else f"{r['bandwidth'] / 1e9:.0f} GB/s"
    kind = f"{r['link']}, {'ring' if r['ring'] else 'row'} on {r['sides']} sides" if r["link"] == "ICI" else r["link"]
    time = "unknown" if r["seconds"] is None else f"{duration(r['seconds'])}, {duration(r['exposed'])} of it waited for"
    rows.append((axis, f"{r['count']:,} with {size(r['bytes'])} of results at {at} ({kind}): {time}"))
  return rows or [("none", "no device sends anything")]


def _time(plan):
  t = plan["time"]
  rows = [(f"least: {name}", duration(s)) for name, s in sorted(t["bounds"].items(), key=lambda item: -item[1]) if s]
  rows += [("bound by", t["bound_by"])]
  if t["expected_seconds"]:
    rows += [("expected step", f"{duration(t['expected_seconds'])}{_calibrated(t)}")]
  rows += [("MFU", f"at most {t['mfu_bound']:.1%}, expected {t['mfu_expected']:.1%}")]
  rows += [("pace", f"{t['pace_a_chip']:,.0f} {t['pace_unit']} a second a chip")] if t["pace_a_chip"] else []
  return [*rows, ("not in it", "; ".join(t["not_in_it"]))]


def _calibrated(t):
  factor = t.get("calibration")
  return f": {factor:.2f} times what the compiler estimates, see calibration.py" if factor else ", not calibrated"


def _run(plan):
  r = plan["run"]
  if r is None:
    return [("steps", "not known without the data, in which epochs are counted")]
  rows = [("steps", f"{r['steps']:,}"), ("time", f"{r['hours']:,.2f} hours, {r['chip_hours']:,.1f} chip-hours")]
  return rows + ([] if r["cost"] is None else [("cost", f"{r['cost']:,.2f} at {r['price']:g} a chip an hour")])


def compare(plan: Mapping[str, Any], other: Mapping[str, Any]) -> str:
  """Returns what a plan has more or less of than another."""
  lines = [f"against {other['topology']} x {other['slices']}, mesh {other['mesh']}"]
  for path, kind in _COMPARED.items():
    before, after = (_at(p, path) for p in (other, plan))
    if before is None or after is None or before == after:
      continue
    change = f"{after / before - 1:+.1%}" if before else "from nothing"
    lines.append(f"  {path:<30}  {_shown(before, kind)} -> {_shown(after, kind)}  {change}")
  if plan["fits"] != other["fits"]:
    lines.append(f"  {'fits':<30}  {other['fits']} -> {plan['fits']}")
  if plan["compiler_options"] != other["compiler_options"]:
    lines.append(f"  {'compiler_options':<30}  {other['compiler_options']} -> {plan['compiler_options']}")
  return "\n".join(lines if len(lines) > 1 else [*lines, "  nothing differs"])


def _at(plan, path):
  section, key = path.split(".")
  return (plan.get(section) or {}).get(key)


def _shown(value, kind):
  return {
    "bytes": size,
    "flops": flops,
    "seconds": duration,
    "share": lambda v: f"{v:.1%}",
    "count": lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.3g}",
  }[kind](value)


def size(n: float | int) -> str:
  """Returns bytes in words."""
  for unit in ("B", "KiB", "MiB"):
    if abs(n) < 1024:
      return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
    n /= 1024
  return f"{n:.2f} GiB"


def flops(n: float | int) -> str:
  """Returns FLOPs in words."""
  for unit in ("", "k", "M", "G", "T"):
    if abs(n) < 1000:
      return f"{n:.4g} {unit}FLOP"
    n /= 1000
  return f"{n:.4g} PFLOP"


def duration(seconds: float | int) -> str:
  """Returns seconds in words."""
  return (
    f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
  )
