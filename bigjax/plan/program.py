"""What a compiled step does on one device, from the compiler's own program: products, cycles, bytes, largest arrays.

Loops are multiplied out, which `cost_analysis()` does not do. On a TPU a product of matrices is a convolution in the
program, whose padding multiplies nothing: it counts where input and kernel meet, as XLA's own analysis has it,
https://github.com/openxla/xla/blob/main/xla/service/hlo_cost_analysis.cc.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

from bigjax.plan import collectives, hlo, work

# Arrays in these, or made by these, take no memory of their own, or are counted where they are made.
_NOTHING = frozenset(
  ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id", "while",
   "call", "conditional", "optimization-barrier", "copy-done", "slice-done", "async-done", "async-update", "send",
   "send-done", "recv", "recv-done", "iota", "async-start", "all-gather-done", "all-reduce-done",
   "collective-permute-done")
)  # fmt: skip
_LOOKS_UP = frozenset(("dynamic-slice", "gather", "slice"))
_NOT_OWN = re.compile(r"^<|site-packages|dist-packages|lib/python\d|bigjax/(sharding|train|experiment)\.py$")
# Products of queries with keys, or of scores with values, that a kernel of splash attention makes.
_ATTENTION = {"fwd": 2, "dq": 3, "dkv": 4}


@dataclasses.dataclass(frozen=True)
class Product:
  """A product of matrices or a convolution of the program."""

  name: str
  flops: int  # Of one execution.
  executions: int
  phase: str  # As of `collectives.phase`.
  dtype: str  # That the units multiply in.
  kernel: bool = False  # Within a kernel, of which the compiler estimates no cycles.

  @property
  def total(self) -> int:
    return self.flops * self.executions


@dataclasses.dataclass(frozen=True)
class Buffer:
  """A large array on one device."""

  bytes: int
  shape: str
  what: str  # An argument's path, or the operation.
  line: str  # Of Python, where it is made.


def products(module: hlo.Module, visible: float = 1.0) -> list[Product]:
  """Returns every product; `visible` is the share of scores that attention kernels compute."""
  found = []
  for computation in module.computations.values():
    times = module.executions[computation.name]
    for i in computation if times else ():
      if i.opcode not in ("convolution", "dot", "custom-call"):
        continue
      kernel = i.opcode == "custom-call"
      flops = _kernel(computation, i, visible) if kernel else _flops(computation, i)
      if flops:
        dtype = "bfloat16" if kernel else _dtype(computation, i)
        found.append(Product(i.name, flops, times, _phase(module, computation, i), dtype, kernel))
  return found


def silent(module: hlo.Module, visible: float = 1.0) -> list[str]:
  """Returns the kernels whose work can't be told."""
  kernels = (
    (c, i) for c in module.computations.values() for i in c if module.executions[c.name] and "tpu_custom_call" in i.rest
  )
  return [i.name for c, i in kernels if not _kernel(c, i, visible)]


def cycles(module: hlo.Module) -> int:
  """Returns the cycles that the TPU's compiler estimates for a step; kernels and collectives carry no estimate."""
  return _sum(module, lambda _, i: i.cycles)


def traffic(module: hlo.Module) -> int:
  """Returns the bytes that go to and from a device's main memory: operands and results that aren't on the chip."""
  return _sum(module, functools.partial(_traffic, module), whole=True)


def _sum(module, of, whole=False):
  """Adds up `of` over the program as it runs; what an estimate or a fusion covers is not gone into."""

  @functools.cache
  def total(name):
    computation, found = module.computations[name], 0
    for i in computation:
      if i.opcode == "while":
        turns = module.trips(computation, i)
        found += (1 if turns is None else turns) * total(i.attribute("body").lstrip("%"))
        continue
      mine = of(computation, i)
      found += mine
      inside = i.opcode in ("call", "conditional", "async-start") or (i.opcode == "fusion" and not whole)
      if inside and not mine:
        found += sum(total(inner) for inner in i.called if inner in module.computations)
    return found

  return total(module.entry.name)


# Products


def _flops(computation, i) -> int:
  arrays = [_result(computation, name) for name in i.operands[:2]]
  if len(arrays) < 2 or None in arrays:
    return 0
  lhs, rhs = arrays
  if i.opcode == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
    dims = [int(d) for d in contracted[1].split(",") if d] if contracted else []
    flops = 2 * i.arrays[0].count * math.prod(lhs.dims[d] for d in dims)
  else:
    flops = _convolution(i, lhs, rhs)
  exact = "operand_precision={highest" in i.rest and lhs.dtype == "f32"
  return flops * (6 if exact else 1)  # float32 in six products of bfloat16 parts.


def _convolution(i, lhs, rhs) -> int:
  left, out = re.match(r"(\w+)_\w+->(\w+)", i.attribute("dim_labels")).groups()
  result = i.arrays[0]
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", i.attribute("window") or ""))
  fields = lambda key, default: window[key].split("x") if key in window else [default] * len(_spatial(left))
  groups = int(i.attribute("feature_group_count") or 1)
  batches = int(i.attribute("batch_group_count") or 1)
  pairs = 1
  for d, size, stride, pad, lhs_dilate, rhs_dilate in zip(
    _spatial(left),
    fields("size", "1"),
    fields("stride", "1"),
    fields("pad", "0_0"),
    fields("lhs_dilate", "1"),
    fields("rhs_dilate", "1"),
    strict=True,
  ):
    pairs *= work.meeting(
      lhs.dims[left.index(d)],
      int(size),
      result.dims[out.index(d)],
      int(stride),
      int(pad.split("_")[0]),
      int(lhs_dilate),
      int(rhs_dilate),
    )
  features = lhs.dims[left.index("f")] // groups
  return 2 * pairs * features * result.dims[out.index("f")] * (lhs.dims[left.index("b")] // batches)


def _spatial(labels):
  return sorted(c for c in labels if c.isdigit())


def _kernel(computation, i, visible) -> int:
  """The FLOPs of a kernel: what it says itself, or what is known of splash attention."""
  if 'custom_call_target="tpu_custom_call"' not in i.rest:
    return 0
  if told := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', i.rest):
    return int(told[1])
  name = re.search(r"splash_mha_(fwd|dq|dkv)", i.rest[-20_000:] + i.name)
  shapes = hlo.parse_arrays(i.attribute("operand_layout_constraints") or "")
  heads = [a for a in shapes if len(a.dims) >= 3 and a.dtype in ("bf16", "f32", "f16") and a.dims[-1] > 1]
  if not name or len(heads) < 2:
    return 0
  query, key = heads[:2]
  return round(2 * query.count * key.dims[-2] * _ATTENTION[name[1]] * visible)


def _dtype(computation, i) -> str:
  found = _result(computation, i.operands[0])
  name = found.dtype if found is not None else "bf16"
  return "int8" if name in ("s8", "u8", "s4", "u4") else "float8" if name.startswith("f8") else "bfloat16"


def _phase(module, computation, i) -> str:
  names = [i.op_name]
  while len(names) < 4 and not names[-1].count("/") and (calls := module.callers.get(computation.name)):
    computation, call = calls[0]
    names.append(call.op_name)
  return collectives.phase(next((n for n in names if "/" in n), ""))


def _result(computation, name) -> hlo.Array | None:
  i = computation.instructions.get(name)
  return i.arrays[0] if i is not None and i.arrays else None


# Bytes


def _traffic(module, computation, i) -> int:
  if i.opcode in _NOTHING:
    return 0
  made = sum(_far(i.arrays))
  if i.opcode in _LOOKS_UP:
    return 2 * made
  if i.opcode == "dynamic-update-slice":
    update = _result(computation, i.operands[1])
    return 2 * update.bytes if update is not None else 0
  inner = module.computations.get(i.called[0]) if i.opcode == "fusion" and i.called else None
  if inner is not None:
    made = sum(_far(_written(inner, i.arrays)))
  for number, name in enumerate(i.operands):
    array = _result(computation, name)
    if array is not None and not _near(array):
      made += array.bytes if inner is None else _read(inner, number, array)
  return made


def _near(array):
  return "S(" in array.layout


def _far(arrays):
  return [a.bytes for a in arrays if not _near(a)]


def _written(inner, arrays):
  """What a fusion writes: of an array that it changes in part, the part."""
  root = inner.root
  outs = [inner.instructions[o] for o in root.operands] if root.opcode == "tuple" else [root]
  if len(outs) != len(arrays):
    return arrays
  written = []
  for out, array in zip(outs, arrays, strict=True):
    while out.opcode in ("bitcast", "copy") and out.operands:
      out = inner.instructions[out.operands[0]]
    update = _result(inner, out.operands[1]) if out.opcode == "dynamic-update-slice" else None
    written.append(dataclasses.replace(update, layout=array.layout) if update is not None else array)
  return written


def _read(inner, number, array) -> int:
  """What a fusion reads of an operand: slices, if it takes nothing else of it."""
  parameter = inner.parameters.get(number)
  if parameter is None:
    return array.bytes
  total, waiting = 0, [parameter.name]
  for name in waiting:
    for user in inner.users.get(name, ()):
      if user.opcode == "bitcast":
        waiting.append(user.name)
      elif user.opcode in _LOOKS_UP and user.operands[0] == name:
        total += user.bytes
      elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
        return array.bytes
  return min(total, array.bytes)


# The largest


def buffers(module: hlo.Module, most: int = 10) -> list[Buffer]:
  """Returns the largest arrays of the program in main memory: arguments, what loops keep, what is made on the way.

  They need not all exist at the same time, and are without the padding of tiles.
  """
  found = {}
  for computation, i, array, maker in _arrays(module):
    what, line = _described(module, *(maker or (computation, i)))
    shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
    found.setdefault((what, line, shape), Buffer(array.bytes, shape, what, line))
  return sorted(found.values(), key=lambda b: -b.bytes)[:most]


def _arrays(module) -> Iterator[tuple[hlo.Computation, hlo.Instruction, hlo.Array, Any]]:
  entry = module.entry
  given_back = set(entry.root.operands)
  loops = {i.attribute("body").lstrip("%") for c in module.computations.values() for i in c if i.opcode == "while"}
  for computation in module.computations.values():
    if not computation.entry and computation.name not in loops:
      continue
    own = set(computation.root.operands)
    for i in computation:
      if i.opcode == "while":
        yield from _kept(module, computation, i)
      elif i.opcode == "parameter" and computation.entry:
        yield from ((computation, i, a, None) for a in i.arrays)
      elif i.opcode not in _NOTHING and i.name not in (given_back if computation.entry else own):
        yield from ((computation, i, a, None) for a in i.arrays if not _near(a))


def _kept(module, computation, loop):
  """What a loop adds to from turn to turn."""
  body = module.computations[loop.attribute("body").lstrip("%")]
  if body.root.opcode != "tuple":
    return
  for index, (part, name) in enumerate(zip(loop.parts, body.root.operands, strict=False)):
    maker = body.instructions[name]
    if not part.startswith("(") and not module.unchanged(loop, index) and maker.opcode != "get-tuple-element":
      yield from ((computation, loop, a, (body, maker)) for a in hlo.parse_arrays(part) if not _near(a))


def _described(module, computation, i) -> tuple[str, str]:
  if i.opcode == "parameter":
    return hlo.leaf(i.op_name) if i.op_name.startswith("state.") else i.op_name or i.name, ""
  stack = module.stack(i)
  own = [f for f in stack if not _NOT_OWN.search(f.file)] or list(stack)
  parts = own[0].file.split("/") if own else []
  start = next((n for n in range(len(parts) - 1, -1, -1) if parts[n] == "bigjax"), max(0, len(parts) - 2))
  line = f"{'/'.join(parts[start:])}:{own[0].line}" if own else ""
  words = i.op_name.split("/")[-1] if i.op_name else i.opcode
  return f"{words} ({collectives.phase(i.op_name)})" if i.op_name else words, line
