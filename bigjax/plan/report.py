"""What a step will take on machines that are not there, as data: memory, work, communication, time, cost.

The step is the one that `train.compile_step` compiles for a run, for devices that need not exist. What is the
compiler's word, what is counted in its program, and what is computed from published figures is told apart by section.
Predicted times are not calibrated on any machine.
"""

from __future__ import annotations

import inspect
import math
import re
import time
from typing import Any

import jax

from bigjax import overview, paths, sharding, train
from bigjax.errors import UserError
from bigjax.plan import collectives, hlo, network, profiles, program, work

FORMULA = (
  "2 m k n for each product, and again for each operand that depends on parameters (6 for each parameter and token, "
  "https://arxiv.org/abs/2001.08361, https://arxiv.org/abs/2204.02311 appendix B); causal scores counted once"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def make(run: Any, topology: str, slices: int = 1, price: float | int | None = None) -> dict[str, Any]:
  """Returns the plan of an experiment that is laid out on the devices of a topology.

  Args:
    run: from `bigjax.experiment.build(config, devices)`.
    topology: its name, for the record.
    slices: how many of it.
    price: of a chip for an hour, in any currency.
  """
  device = run.mesh.devices.flat[0]
  profile = profiles.of(device)
  if profile is None:
    raise UserError(f"--topology={topology}: there is no profile of {device.device_kind!r}; {list(profiles.PROFILES)}.")
  found = {
    "config": {
      "model": run.config.model.name,
      "data": run.config.data.source.name,
      "batch_size": run.config.batch_size,
    },
    "topology": topology,
    "slices": slices,
    "chips": run.mesh.size // profile.devices,
    "devices": run.mesh.size,
    "mesh": dict(run.mesh.shape),
    "chip": _chip(profile),
    "compiler_options": profiles.compiler_options(device) or {},
  }
  started = time.perf_counter()
  compiled = failed = None
  try:
    compiled = train.compile_step(run)
  except jax.errors.JaxRuntimeError as e:
    failed = too_large(str(e))
    if failed is None:
      raise
  found["compile_seconds"] = round(time.perf_counter() - started, 1)
  found["memory"] = _memory(run, profile, compiled, failed)
  found["fits"] = found["memory"]["missing"] == 0
  flops = work.of(run)
  found["work"] = {
    "model_flops": flops.total,
    "model_flops_a_device": flops.total / run.mesh.size,
    "attention_flops": flops.attention,
    "formula": FORMULA,
    "loops_of_unknown_length": flops.endless,
  }
  if compiled is not None:
    module = hlo.parse(compiled.as_text())
    found["memory"]["buffers"] = [vars(b) for b in program.buffers(module)]
    found["work"] |= _work(module, flops, found["work"]["model_flops_a_device"], profile)
    every = collectives.find(module, run.mesh)
    rows = overview.collectives(run, compiled.as_text())
    axes = network.total(every, run.mesh, profile, profile.rate)
    found["communication"] = {"axes": axes, "bytes": sum(c.total for c in every), "collectives": rows}
    found["time"] = step_time(run.pace, profile, found)
    found["run"] = _whole(run, found, price)
  return found


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


def _memory(run, profile, compiled, failed) -> dict[str, Any]:
  """Bytes on a device."""
  limit = profile.hbm // profile.devices
  parts = dict.fromkeys(("params", "opt_state", "extras", "step"), 0)
  layouts = jax.tree.leaves(run.shardings)
  for name, leaf, layout in zip(paths.names(run.abstract), jax.tree.leaves(run.abstract), layouts, strict=True):
    parts[name.split("/")[0]] += sharding.bytes_a_device(leaf, layout)
  found = {"limit": limit, "params": parts["params"], "optimizer": parts["opt_state"], "extras": parts["extras"]}
  ways = sharding.batch_ways(run.mesh)
  found["batch"] = sum(math.prod(x.shape) * x.dtype.itemsize for x in run.batch.values()) // ways
  if compiled is None:
    found |= failed
    found["missing"] = max(1, failed["needed"] - failed["available"])
    found["remedies"] = remedies(run)
    return found
  m = compiled.memory_analysis()
  found |= {
    "arguments": m.argument_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
    "code": m.generated_code_size_in_bytes,
    "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,  # Beyond what is written over the old state.
  }
  found["total"] = sum(found[k] for k in ("arguments", "temporaries", "code", "outputs"))
  found["missing"] = max(0, found["total"] - limit)
  found["remedies"] = remedies(run) if found["missing"] else []
  return found


def too_large(message: str) -> dict[str, Any] | None:
  """Returns what the compiler said was needed and there, in bytes, if it refused a program for its memory."""
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  sizes = [float(n) * _UNITS[u] for n, u in re.findall(r"(\d+(?:\.\d+)?)([KMGT])i?B?\b", message)]
  if len(sizes) < 2:
    return {"needed": 1, "available": 0, "said": message.splitlines()[0]}
  return {"needed": int(sizes[0]), "available": int(sizes[1]), "said": message.splitlines()[0]}


def remedies(run: Any) -> list[str]:
  """Returns overrides that lower a step's memory, the cheapest in time first; none of them is tried."""
  config, found = run.config, []
  ways = sharding.batch_ways(run.mesh)
  if config.batch_size % (2 * ways * config.accumulate) == 0:
    found.append(f"--config.accumulate={2 * config.accumulate}  (half of the batch at a time, the same update)")
  if _option(config.task, "loss_chunks") == 1:
    found.append("--config.task.loss_chunks=8  (an eighth of the logits at a time)")
  if _option(config.model, "remat") == "none":
    found.append("--config.model.remat=full  (activations computed again, a third more work)")
  if isinstance(config.sharding, str) and config.sharding not in ("auto", "fsdp") and run.mesh.size > 1:
    found.append("--config.sharding=fsdp  (a part of the state on each device)")
  if config.batch_size % 2 == 0 and config.batch_size // 2 >= ways:
    found.append(f"--config.batch_size={config.batch_size // 2}  (another run: it learns in other steps)")
  return [*found, "a larger topology"]


def _option(component, name):
  """What a component is given, or its default; None if it has no such option."""
  parameter = inspect.signature(component.factory).parameters.get(name)
  return None if parameter is None else component.kwargs.get(name, parameter.default)


# Work


def _work(module, flops, model, profile) -> dict[str, Any]:
  """Work of a device in the compiled program."""
  products = program.products(module, flops.visible)
  phases: dict[str, int] = {}
  for p in products:
    phases[p.phase] = phases.get(p.phase, 0) + p.total
  hardware = sum(phases.values())
  return {
    "hardware_flops_a_device": hardware,
    "by_phase": phases,
    "recompute_share": max(0.0, 1 - model / hardware) if hardware else 0.0,
    "kernel_flops": sum(p.total for p in products if p.kernel),
    "kernels_of_unknown_work": program.silent(module, flops.visible),
    "estimated_cycles": program.cycles(module),
    "hbm_bytes": program.traffic(module),
    "product_seconds": sum(p.total / profile.peak(p.dtype) for p in products) * profile.devices,
    "kernel_seconds": sum(p.total / profile.peak(p.dtype) for p in products if p.kernel) * profile.devices,
    "endless_loops": list(module.endless),
  }


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
    expected = max(expected, bounds[bound])
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
  if profile.clock is None and profile.cycles:
    missing += ["a published clock: cycles are taken at the rate that reaches the peak, so the time is a lower bound"]
  return missing


def _whole(run, found, price) -> dict[str, Any]:
  """The run from its first step to its last."""
  step = found["time"]["expected_seconds"] or found["time"]["roofline_seconds"]
  hours = step * run.total_steps / 3600
  chip_hours = hours * found["chips"]
  cost = None if price is None else chip_hours * price
  return {"steps": run.total_steps, "hours": hours, "chip_hours": chip_hours, "price": price, "cost": cost}
