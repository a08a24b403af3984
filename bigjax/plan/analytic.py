"""What a step will about take, without compiling it: for chips that have no compiler here, and for the hopeless.

Memory is the state, its gradient, what the forward pass leaves for the backward pass (read off the traced loss, so
every model has it), the inside of one layer, the weights that are gathered for it, and one part's logits. Time is the
least that the products take at the peak and the network for weights, gradients and split layers. A few percent or tens
of percent away from what a compiler makes of it: `bigjax plan` shows both beside each other.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from typing import Any

import jax

from bigjax import paths, precision, sharding
from bigjax.plan import network, work
from bigjax.plan.prepare import Prepared

# The part of the forward pass that the backward pass computes again.
_AGAIN = {"none": 0.0, "full": 1.0, "dots": 0.1}
_PARTLY = 0.7


def estimate(prepared: Prepared, flops: work.Work) -> dict[str, Any]:
  """Returns memory and time of a step, of one device."""
  return {"memory": memory(prepared), **_time(prepared, flops)}


# Memory


def memory(prepared: Prepared) -> dict[str, int]:
  """Returns bytes on a device: of the state and the batch, and what comes and goes."""
  run = prepared.run
  found = state_bytes(run)
  left = kept(run) // run.config.accumulate
  whole = (
    kept(run, "none") // run.config.accumulate if option(run.config.model, "remat") not in (None, "none") else left
  )
  found["activations"] = left
  found["layer"] = max(0, whole - left) // max(1, layers(run))
  found["gradients"] = found["params"] * (2 if run.config.accumulate > 1 else 1)
  found["gathered"] = _gathered(run)
  found["logits"] = _logits(run)
  found["temporaries"] = sum(found[n] for n in ("activations", "layer", "gradients", "gathered", "logits"))
  found["total"] = sum(found[n] for n in ("params", "optimizer", "extras", "batch", "temporaries"))
  return found


def state_bytes(run: Any) -> dict[str, int]:
  """Returns the bytes on a device of each part of the state, and of the batch."""
  parts = dict.fromkeys(("params", "opt_state", "extras", "step"), 0)
  layouts = jax.tree.leaves(run.shardings)
  for name, leaf, layout in zip(paths.names(run.abstract), jax.tree.leaves(run.abstract), layouts, strict=True):
    parts[name.split("/")[0]] += sharding.bytes_a_device(leaf, layout)
  batch = sum(math.prod(x.shape) * x.dtype.itemsize for x in run.batch.values()) // sharding.batch_ways(run.mesh)
  return {"params": parts["params"], "optimizer": parts["opt_state"], "extras": parts["extras"], "batch": batch}


def kept(run: Any, remat: str | None = None) -> int:
  """Returns the bytes on a device of what the forward pass leaves for the backward pass, with another `remat` if given.

  Copies of parameters in the type of the computation are not among them, nor is what was given.
  """
  return sum(_a_device(run, v.aval) for v in _left(run, remat)[1])


def largest(run: Any, most: int = 10) -> list[dict[str, Any]]:
  """Returns the largest arrays on a device: leaves of the state, and what is left for the backward pass."""
  jaxpr, left = _left(run, None)
  layouts = jax.tree.leaves(run.shardings)
  state = zip(paths.names(run.abstract), jax.tree.leaves(run.abstract), layouts, strict=True)
  rows = [(sharding.bytes_a_device(x, layout), x, name, "") for name, x, layout in state]
  rows += [(_a_device(run, v.aval), v.aval, *_origin(jaxpr, v)) for v in left]
  rows = sorted(rows, key=lambda row: -row[0])[:most]
  spelled = lambda x: f"{x.dtype}[{','.join(map(str, x.shape))}] over all devices"
  return [dict(bytes=size, shape=spelled(x), what=what, line=line) for size, x, what, line in rows]


def _left(run, remat):
  """The traced forward pass, and the values in it that the backward pass wants."""
  model = run.model.build
  changed = {} if remat is None else {"remat": remat}
  if "attention" in inspect.signature(model.factory).parameters and run.mesh.devices.flat[0].platform != "tpu":
    changed["attention"] = "chunked"  # Kernels of flash attention keep as much.
  model = dataclasses.replace(run.model, build=dataclasses.replace(model, kwargs={**model.kwargs, **changed}))
  run = dataclasses.replace(run, model=model)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def forward(params, extras, batch, key):
    return jax.tree.leaves(jax.vjp(lambda p: run.loss(p, extras, batch, key)[0].sums["loss"], params)[1])

  traced = jax.make_jaxpr(forward)(run.abstract.params, run.abstract.extras, dict(run.batch), key).jaxpr
  given, own = set(traced.invars), {p.shape for p in jax.tree.leaves(run.abstract.params)}
  outs = {v: None for v in traced.outvars if not hasattr(v, "val") and v not in given}
  return traced, [v for v in outs if v.aval.shape not in own]


def _origin(jaxpr, value):
  """The operation that made a value, and its line; within a scan or a call, the one in there."""
  made = next((e for e in jaxpr.eqns if value in e.outvars), None)
  if made is None:
    return "", ""
  for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
    inner = made.params.get(name)
    inner = getattr(inner, "jaxpr", inner)
    if inner is not None and len(inner.outvars) == len(made.outvars):
      out = inner.outvars[made.outvars.index(value)]
      found = _origin(inner, out) if not hasattr(out, "val") else ("", "")
      if found[0]:
        return found
  trace = made.source_info.traceback
  files = [(f.file_name, f.line_num) for f in trace.frames] if trace is not None else []
  own = [(file, line) for file, line in files if "site-packages" not in file and "/bigjax/" in file]
  line = f"bigjax/{own[0][0].rpartition('/bigjax/')[2]}:{own[0][1]}" if own else ""
  return made.primitive.name, line


def _a_device(run, value):
  """The bytes of an activation on a device: split as the batch is, and over heads or hidden units if it isn't between
  layers."""
  if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
    return 0
  size = math.prod(value.shape) * value.dtype.itemsize
  tokens = run.pace[0]
  if math.prod(value.shape) < tokens:
    return size if math.prod(value.shape) < run.config.batch_size else size // sharding.batch_ways(run.mesh)
  ways = sharding.batch_ways(run.mesh) * run.layout.size("seq") * run.layout.size("stage")
  return size // (ways if value.shape[-1] == width(run) else ways * run.layout.size("hidden"))


def width(run: Any) -> int | None:
  """Returns the size of what goes from layer to layer, as far as the model shows it."""
  features = run.outputs.get("features")
  if features is not None:
    return features.shape[-1]
  return next((p.shape[-1] for name, p in _params(run) if name.endswith("embed/embedding")), None)


def layers(run: Any) -> int:
  """Returns the number of layers of a model that says it."""
  depth = option(run.config.model, "depth")
  if depth is None:
    stacked = [p.shape[0] for n, p in _params(run) if re.search(r"(^|/)blocks/(?!\d+/)", n)]
    numbers = [int(m[1]) + 1 for n, _ in _params(run) if (m := re.search(r"(?:^|/)blocks/(\d+)/", n))]
    depth = max([*stacked, *numbers], default=1)
  return depth


def _params(run):
  return zip(paths.names(run.abstract.params), jax.tree.leaves(run.abstract.params), strict=True)


def gathers(run: Any) -> list[tuple[str, int, int]]:
  """Returns, of each parameter that is gathered for use, its name, the bytes of it whole in the computation's type, and
  the number of its layers."""
  width = 4 if precision.of(run.config.precision).compute == "float32" else 2
  layouts, found = jax.tree.leaves(run.shardings.params), []
  for (name, leaf), layout in zip(_params(run), layouts, strict=True):
    split = {a for entry in layout.spec for a in ((entry,) if isinstance(entry, str) else entry or ())}
    own = {a for a in split if a in ("tensor", "pipe") or (a == "expert" and "experts" in name)}
    if math.prod(run.mesh.shape[a] for a in split - own) > 1:
      stacked = re.search(r"(^|/)blocks/(?!\d+/)", name) is not None
      parts = math.prod(run.mesh.shape[a] for a in own)
      found.append((name, math.prod(leaf.shape) * width // parts, leaf.shape[0] if stacked else 1))
  return found


def _gathered(run):
  """Two layers at a time, one in use and one on its way, or the largest that is in no stack."""
  one = sum(size // count for _, size, count in gathers(run) if count > 1)
  return max(2 * one, max((size for _, size, count in gathers(run) if count == 1), default=0))


def _logits(run):
  """The logits of a part and their gradient, in float32."""
  logits = run.outputs.get("logits")
  if logits is None or "tokens" not in run.batch:
    return 0
  parts = sharding.batch_ways(run.mesh) * run.layout.size("seq") * run.layout.size("vocab") * run.config.accumulate
  return 2 * 4 * math.prod(logits.shape) // parts // (option(run.config.task, "loss_chunks") or 1)


def option(component: Any, name: str) -> Any:
  """Returns what a component is given, or its default; None if it has no such option."""
  parameter = inspect.signature(component.factory).parameters.get(name)
  return None if parameter is None else component.kwargs.get(name, parameter.default)


# Time


def _time(prepared, flops) -> dict[str, Any]:
  run, profile = prepared.run, prepared.profile
  again = flops.forward * _AGAIN.get(option(run.config.model, "remat") or "none", _PARTLY)
  peak = profile.peak(precision.of(run.config.precision).compute) / profile.devices
  bounds = {"compute": (flops.total + again) / run.mesh.size / peak}
  if stages := run.layout.size("stage") - 1:
    turns = run.layout.microbatches * run.layout.repeats
    bounds["compute"] *= (turns + stages) / turns
  for name, (sent, joined) in _sent(prepared).items():
    bounds[f"{joined.name} {name}"] = sent / joined.bandwidth if joined.bandwidth else math.inf
  return {"bounds": bounds, "seconds": _step(bounds)}


def _step(bounds):
  """What splits layers is waited for; what gathers weights or adds gradients up lies beside the products."""
  waited = sum(s for name, s in bounds.items() if name.endswith(" tensor") and math.isfinite(s))
  return max([bounds["compute"] + waited, *(s for s in bounds.values() if math.isfinite(s))])


def _sent(prepared):
  """Bytes that a device sends along axes in a step, and what they go over."""
  run, mesh, found = prepared.run, prepared.run.mesh, {}
  data = tuple(a for a in ("data", "expert", "seq") if mesh.shape.get(a, 1) > 1)
  add = lambda axes, sent: found.update(
    {"+".join(axes): (sent, network.link(mesh, axes, prepared.profile, _across(mesh, axes)))}
  )
  accumulate = run.config.accumulate
  gathered = sum(size for _, size, _ in gathers(run))
  whole = sum(math.prod(p.shape) * 4 for _, p in _params(run)) / max(1, run.layout.size("hidden"))
  if data and gathered:
    ways = math.prod(mesh.shape[a] for a in data)
    add(data, (2 * gathered * accumulate + whole) * (ways - 1) / ways)
  elif data:
    add(data, 2 * whole)
  if mesh.shape.get("replica", 1) > 1:
    add(("replica",), 2 * whole / (math.prod(mesh.shape[a] for a in data) if gathered else 1))
  features = width(run)
  if mesh.shape.get("tensor", 1) > 1 and features is not None:
    bytes_each = 4 if precision.of(run.config.precision).compute == "float32" else 2
    one = run.pace[0] * features * bytes_each / sharding.batch_ways(mesh) / run.layout.size("seq")
    rounds = 6 if option(run.config.model, "remat") not in (None, "none") else 4
    parts = mesh.shape["tensor"]
    add(("tensor",), rounds * layers(run) * one * 2 * (parts - 1) / parts)
  return found


def _across(mesh, axes):
  """Whether devices that differ along these axes are in different slices."""
  index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
  return len({getattr(d, "slice_index", 0) for d in mesh.devices[index].flat}) > 1


def step_time(pace: tuple[int, str], prepared: Prepared, found: dict[str, Any]) -> dict[str, Any]:
  """Returns what `report.step_time` does, from the estimate alone."""
  bounds, profile = found["estimate"]["bounds"], prepared.profile
  known = {name: s for name, s in bounds.items() if math.isfinite(s)}
  bound, step = max(known, key=known.get), found["estimate"]["seconds"]
  useful = found["work"]["model_flops_a_device"] / (profile.peak("bfloat16") / profile.devices)
  count, unit = pace
  return {
    "bounds": known,
    "bound_by": bound,
    "roofline_seconds": known[bound],
    "waiting_seconds": step - bounds["compute"],
    "expected_seconds": step,
    "mfu_bound": useful / known[bound],
    "mfu_expected": useful / step,
    "pace_unit": unit,
    "pace_a_chip": count / step / prepared.chips,
    "not_in_it": [
      "everything but products at their peak and the network: an estimate without a compiler",
      *(f"collectives over {n}: bandwidth unknown" for n, s in bounds.items() if not math.isfinite(s)),
    ],
  }
