"""A run's parameters at a glance: names, shapes, the rule that laid each out, bytes a device."""

from __future__ import annotations

import math
import os
from typing import Any

import jax

from bigjax import paths, record, sharding


def rows(run) -> list[dict[str, Any]]:
  """One row a leaf of the state: path, shape, dtype, count, rule, spec, bytes and bytes a device."""
  names = paths.names(run.abstract)
  given = sharding.as_rules(run.config.sharding)
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
  """Returns the number of parameters."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(run.abstract.params))


def write(run, workdir: str) -> None:
  """Writes parameters.json, the rows of the parameters with `params/` left out."""
  params = [r | {"path": r["path"].removeprefix("params/")} for r in rows(run) if r["path"].startswith("params/")]
  record.write_json(os.path.join(workdir, "parameters.json"), params)


def headline(run) -> str:
  """Returns a line on what is about to run."""
  config = run.config
  return (
    f"{config.model.name}, {count(run):,} parameters; {config.data.source.name}, {len(run.data.source):,} examples; "
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
  widths = [max(len(line[i]) for line in lines) for i in range(6)]
  aligned = [
    "  ".join(c.rjust(w) if i == 5 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
    for line in lines
  ]
  aligned.insert(1, "-" * len(aligned[0]))
  total = {}
  for r in found:
    part = total.setdefault(r["path"].split("/")[0], [0, 0, 0])
    for i, key in enumerate(("count", "bytes", "bytes_a_device")):
      part[i] += r[key]
  sums = [
    f"{part:<10} {n:>16,} values  {_bytes(b):>10} in all  {_bytes(d):>10} a device" for part, (n, b, d) in total.items()
  ]
  return "\n".join([*aligned, "", f"mesh {dict(run.mesh.shape)} of {run.mesh.size} devices", *sums])


def _bytes(n: float) -> str:
  for unit in ("B", "KiB", "MiB"):
    if n < 1024:
      return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
    n /= 1024
  return f"{n:.2f} GiB"
