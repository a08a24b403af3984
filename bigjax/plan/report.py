"""What a step will take on machines that are not there, as data: memory, work, communication, time, cost.

The step is the one that `train.compile_step` compiles for a run, for devices that need not exist. What is the
compiler's word, what is counted in its program, and what is computed from published figures is told apart by section.
Expected times are calibrated on one published run, see calibration.py.
"""

from __future__ import annotations

import math
from typing import Any

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.plan import analytic, calibration, changes, compiled, kept, prepare, topology, work
from bigjax.plan.prepare import Prepared

FORMULA = (
  "2 m k n for each product, and again for each operand that depends on parameters (6 for each parameter and token, "
  "https://arxiv.org/abs/2001.08361, https://arxiv.org/abs/2204.02311 appendix B); causal scores counted once"
)
NOTHING_KEPT = kept.Kept()


def make(
  prepared: Prepared, price: float | int | None = None, keep: kept.Kept = NOTHING_KEPT, compile: bool = True
) -> dict[str, Any]:
  """Returns the plan of an experiment that is laid out on the devices of a topology.

  Args:
    prepared: from `prepare.prepare`.
    price: of a chip for an hour, in any currency.
    keep: where what compiled programs came to is kept.
    compile: without it, or where there is no compiler for the chip, there are estimates alone.
  """
  if price is not None and not 0 <= price < math.inf:
    raise UserError(f"--price={price} must be what a chip costs for an hour.")
  run, profile = prepared.run, prepared.profile
  compile = compile and topology.compiles(prepared.topology)
  found = {
    "config": {
      "model": run.config.model.name,
      "data": run.config.data.source.name,
      "stands_in": prepared.stands_in,
      "batch_size": run.config.batch_size,
    },
    "topology": prepared.topology,
    "slices": prepared.num_slices,
    "chips": prepared.chips,
    "devices": run.mesh.size,
    "mesh": dict(run.mesh.shape),
    "chip": _chip(profile),
    "compiled": compile,
    "compiler_options": dict(profile.options) if compile else {},
  }
  flops = work.of(run)
  found["work"] = {
    "model_flops": flops.total,
    "model_flops_a_device": flops.total / run.mesh.size,
    "attention_flops": flops.attention,
    "formula": FORMULA,
    "loops_of_unknown_length": flops.endless,
  }
  found["estimate"] = analytic.estimate(prepared, flops)
  step = compiled.step(prepared, flops.visible, keep) if compile else None
  found["compile_seconds"] = round(step["seconds"], 1) if step else None
  found["kept"] = bool(step and step.get("kept"))
  found["memory"] = _memory(prepared, step, found["estimate"])
  found["fits"] = found["memory"]["missing"] == 0
  if step is None:
    found["time"] = analytic.step_time(run.pace, prepared, found)
  elif "refused" not in step:
    found["work"] |= step["work"] | {"recompute_share": _recomputed(step["work"], found["work"])}
    found["communication"] = step["communication"]
    found["time"] = step_time(run.pace, profile, found)
  if "time" in found:
    found["run"] = _whole(prepared, found, price)
  return found


def _recomputed(done, model):
  hardware = done["hardware_flops_a_device"]
  return max(0.0, 1 - model["model_flops_a_device"] / hardware) if hardware else 0.0


def _chip(profile):
  figures = ("hbm", "hbm_bandwidth", "vmem", "clock", "links", "link_bandwidth", "dcn", "devices", "chips_a_host")
  return {
    "name": profile.name,
    "flops": dict(profile.flops),
    **{f: getattr(profile, f) for f in figures},
    "rate": profile.rate,
    "sources": dict(profile.sources),
    "unknown": list(profile.unknown),
  }


# Memory


def _memory(prepared, step, estimate) -> dict[str, Any]:
  """Bytes on a device."""
  profile = prepared.profile
  limit = profile.hbm // profile.devices
  found = {"limit": limit} | {name: estimate["memory"][name] for name in ("params", "optimizer", "extras", "batch")}
  if step is None:
    found |= {"temporaries": estimate["memory"]["temporaries"], "total": estimate["memory"]["total"]}
    found["buffers"] = analytic.largest(prepared.run)
  elif "refused" in step:
    refused = step["refused"]
    found |= {"needed": refused["needed"], "available": refused["available"], "said": refused["said"]}
    found["buffers"] = refused["buffers"] or analytic.largest(prepared.run)
    found["missing"] = max(1, refused["needed"] - refused["available"])
    found["remedies"] = remedies(prepared, refused["needed"], refused["available"])
    return found
  else:
    found |= step["memory"] | {"buffers": step["buffers"]}
    found["total"] = sum(step["memory"].values())
  found["missing"] = max(0, found["total"] - limit)
  found["remedies"] = remedies(prepared, found["total"], limit) if found["missing"] else []
  return found


def remedies(prepared: Prepared, needed: int, limit: int) -> list[dict[str, Any]]:
  """Returns changes that lower a step's memory, the cheapest in time first.

  Whether one would fit is told by what it changes in the estimate, on top of what is needed now; none is compiled.
  """
  now, found = analytic.memory(prepared)["total"], []
  for change, why in _changes(prepared.run):
    try:
      then = analytic.memory(prepare.prepare(changes.apply(prepared.config, change), *prepared.where))["total"]
    except UserError:
      continue
    about = needed + then - now
    found.append({"flags": changes.flags(change), "why": why, "about": about, "fits": about <= limit})
  return found


def _changes(run) -> list[tuple[dict[str, Any], str]]:
  config, found = run.config, []
  ways = sharding.batch_ways(run.mesh)
  task, model = (lambda name: analytic.option(config.task, name)), (lambda name: analytic.option(config.model, name))
  if task("loss_chunks") == 1:
    found.append(({"task.loss_chunks": 8}, "an eighth of the logits at a time"))
  for parts in (2, 4, 8):
    if config.batch_size % (parts * ways * config.accumulate) == 0:
      change = {"accumulate": parts * config.accumulate}
      found.append((change, f"a part of the batch at a time, one of {change['accumulate']}; the same update"))
  if model("remat") not in (None, "full"):
    if model("remat") == "none":
      found.append(({"model.remat": "dots"}, "what isn't a product is computed again"))
    found.append(({"model.remat": "full"}, "activations are computed again, up to a third more work"))
  if isinstance(config.sharding, str) and "fsdp" not in config.sharding and run.mesh.shape.get("data", 1) > 1:
    sharded = "fsdp" if config.sharding in ("auto", "replicated") else f"{config.sharding}+fsdp"
    found.append(({"sharding": sharded}, "a part of the state on each device"))
  if model("capacity_factor") is None and run.mesh.shape.get("expert", 1) > 1:
    why = "room for a quarter more choices than an expert's mean instead of for all; another model: the rest is dropped"
    found.append(({"model.capacity_factor": 1.25}, why))
  for parts in (2, 4, 8):
    if config.batch_size % (parts * ways) == 0:
      change = {"batch_size": config.batch_size // parts, "accumulate": 1}
      found.append((change, "another run: it learns in other steps"))
  return found


# Time


def step_time(pace, profile, found) -> dict[str, Any]:
  """Seconds of a step: the least that each resource takes, and what the compiler's estimate comes to."""
  done, axes = found["work"], found["communication"]["axes"]
  bounds = {"compute": done["product_seconds"], "HBM": done["hbm_bytes"] / (profile.hbm_bandwidth / profile.devices)}
  for name, row in axes.items():
    bounds[f"{row['link']} {name}"] = row["seconds"] or 0.0
  bound = max(bounds, key=bounds.get)
  waiting = sum(row["exposed"] or 0.0 for row in axes.values())
  expected = None
  if profile.rate and done["estimated_cycles"]:
    expected = done["estimated_cycles"] / profile.rate + done["kernel_seconds"] + waiting
    expected = max(expected * calibration.FACTOR, bounds[bound])
  step = expected or bounds[bound]
  count, unit = pace
  peak = profile.peak("bfloat16") / profile.devices
  useful = done["model_flops_a_device"] / peak
  return {
    "bounds": bounds,
    "bound_by": bound,
    "roofline_seconds": bounds[bound],
    "waiting_seconds": waiting,
    "expected_seconds": expected,
    "calibration": calibration.FACTOR if expected else None,
    "mfu_bound": useful / bounds[bound] if bounds[bound] else 0.0,
    "mfu_expected": useful / step if step else 0.0,
    "pace_unit": unit,
    "pace_a_chip": count / step / found["chips"] if step else None,
    "not_in_it": _left_out(profile, found),
  }


def _left_out(profile, found):
  """What the expected time does not know of."""
  missing = ["input, evaluation and checkpoints"]
  missing += [f"{len(n)} kernels of unknown work" for n in (found["work"]["kernels_of_unknown_work"],) if n]
  missing += [
    f"collectives over {n}: bandwidth unknown"
    for n, r in found["communication"]["axes"].items()
    if r["seconds"] is None
  ]
  missing += [f"loops of unknown length counted once: {len(n)}" for n in (found["work"]["endless_loops"],) if n]
  return missing


def _whole(prepared, found, price) -> dict[str, Any] | None:
  """The run from its first step to its last; None where its length is not known."""
  if prepared.steps is None:
    return None
  step = found["time"]["expected_seconds"] or found["time"]["roofline_seconds"]
  hours = step * prepared.steps / 3600
  chip_hours = hours * found["chips"]
  cost = None if price is None else chip_hours * price
  return {"steps": prepared.steps, "hours": hours, "chip_hours": chip_hours, "price": price, "cost": cost}
