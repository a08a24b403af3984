"""What the compiler makes of a step, read off its program: memory, products, traffic, collectives.

The step is the one that `train.compile_step` compiles for a run, with the same options. Everything here is plain data,
which is kept: the same module is not compiled twice.
"""

from __future__ import annotations

import re
import time
from typing import Any

import jax

from bigjax import overview, train
from bigjax.plan import collectives, hlo, kept, network, profiles, program
from bigjax.plan.prepare import Prepared

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def step(prepared: Prepared, visible: float, keep: kept.Kept) -> dict[str, Any]:
  """Returns what there is to know of the compiled step; bytes and FLOPs are a device's, of one step.

  Args:
    prepared: the experiment, on its devices.
    visible: the share of scores that attention kernels compute.
    keep: where results are kept.
  """
  run = prepared.run
  options = profiles.compiler_options(run.mesh.devices.flat[0])
  with jax.set_mesh(run.mesh):
    lowered = train.lower_step(run)
    where = f"{prepared.topology} x {prepared.num_slices} {[getattr(d, 'coords', d.id) for d in run.mesh.devices.flat]}"
    key = kept.key(lowered.as_text(), where, options)
    found = keep.get(key)
    if found is not None:
      return found | {"kept": True}
    started = time.perf_counter()
    try:
      compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
      failed = too_large(str(e))
      if failed is None:
        raise
      found = {"key": key, "seconds": time.perf_counter() - started, "refused": failed}
      keep.put(key, found)
      return found
  found = {"key": key, "seconds": time.perf_counter() - started} | read(prepared, compiled, visible)
  keep.put(key, found)
  return found


def read(prepared: Prepared, compiled: Any, visible: float) -> dict[str, Any]:
  """Returns what is in a compiled program."""
  run, profile, text = prepared.run, prepared.profile, compiled.as_text()
  module, m = hlo.parse(text), compiled.memory_analysis()
  every = collectives.find(module, run.mesh)
  return {
    "memory": {
      "arguments": m.argument_size_in_bytes,
      "temporaries": m.temp_size_in_bytes,
      "code": m.generated_code_size_in_bytes,
      "outputs": m.output_size_in_bytes - m.alias_size_in_bytes,  # Beyond what is written over the old state.
    },
    "buffers": [vars(b) for b in program.buffers(module)],
    "work": _work(module, visible, profile),
    "communication": {
      "axes": network.total(every, run.mesh, profile, profile.rate),
      "bytes": sum(c.total for c in every),
      "collectives": overview.collectives(run, text),
    },
  }


def _work(module, visible, profile) -> dict[str, Any]:
  products = program.products(module, visible)
  phases: dict[str, int] = {}
  for p in products:
    phases[p.phase] = phases.get(p.phase, 0) + p.total
  return {
    "hardware_flops_a_device": sum(phases.values()),
    "by_phase": phases,
    "kernel_flops": sum(p.total for p in products if p.kernel),
    "kernels_of_unknown_work": program.silent(module, visible),
    "estimated_cycles": program.cycles(module),
    "hbm_bytes": program.traffic(module),
    "product_seconds": sum(p.total / profile.peak(p.dtype) for p in products) * profile.devices,
    "kernel_seconds": sum(p.total / profile.peak(p.dtype) for p in products if p.kernel) * profile.devices,
    "endless_loops": list(module.endless),
  }


def too_large(message: str) -> dict[str, Any] | None:
  """Returns what the compiler said was needed and there, in bytes, if it refused a program for its memory."""
  if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
    return None
  sizes = [float(n) * _UNITS[u] for n, u in re.findall(r"(\d+(?:\.\d+)?)([KMGT])i?B?\b", message)]
  said = message.splitlines()[0]
  if len(sizes) < 2:
    return {"needed": 1, "available": 0, "said": said, "buffers": []}
  return {"needed": int(sizes[0]), "available": int(sizes[1]), "said": said, "buffers": _largest(message)}


def _largest(message):
  """The allocations that the compiler lists when it refuses a program."""
  found = []
  for part in re.split(r"\n\s*\d+\.\s*Size:", message)[1:11]:
    size = re.match(r"\s*(\d+(?:\.\d+)?)([KMGT]?)", part)
    shape = re.search(r"Shape:\s*(\S+)", part)
    operator = re.search(r'op_name="([^"]*)"', part) or re.search(r"Operator:\s*(\S+)", part)
    place = re.search(r'source_file="([^"]*)" source_line=(\d+)', part)
    found.append(
      {
        "bytes": int(float(size[1]) * _UNITS.get(size[2], 1)) if size else 0,
        "shape": shape[1] if shape else "",
        "what": operator[1].split("/")[-1] if operator else "",
        "line": f"{'/'.join(place[1].split('/')[-3:])}:{place[2]}" if place else "",
      }
    )
  return found
