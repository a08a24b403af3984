"""What the devices say to each other in a step: every collective of a program, its mesh axis, bytes, and cause.

`find` reads them off the compiler's program, so they are the ones that will run, whoever asked for them: the model, in
a `shard_map`, or the partitioner. Bytes are those of the result on one device, without padding, times how often it
runs: an all-gather counts the gathered array, a reduce-scatter the part that is left. `sent` is what a device sends.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bigjax.plan import hlo

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# What keeps a device busy while an asynchronous collective is under way.
_WORK = frozenset(("fusion", "dot", "convolution", "custom-call", "while", "call", "conditional", "scatter", "sort"))
_NOT_OWN = re.compile(r"^<|site-packages|dist-packages|lib/python\d|bigjax/sharding\.py$")
_ACROSS_SLICES = {"ONE_TO_ONE": "collective-permute", "P2P": "collective-permute"}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of the program."""

  name: str  # In the HLO text.
  kind: str  # One of KINDS.
  axes: tuple[str, ...]  # Axes of the mesh along which its devices differ.
  parts: int  # Devices that talk to each other: the size of a group.
  whole: bool  # Whether a group is all of these axes, and not a part.
  arrays: tuple[hlo.Array, ...]  # The result on one device.
  executions: int  # In a step.
  phase: str  # "forward", "backward", "recompute" (for the backward pass), "update".
  op_name: str
  stack: tuple[hlo.Frame, ...]  # The lines that caused it, the innermost first.
  origin: str = ""  # The argument of the step that it passes on unchanged, `state.params['kernel']`, if it does.
  asynchronous: bool = False  # It is started and waited for at two places.
  overlapped: bool = False  # There is work between the two.
  cover: int = 0  # The cycles that the TPU compiler estimates for that work.
  slow: bool = False  # It crosses slices.

  @property
  def bytes(self) -> int:
    """Of the result on one device, each time."""
    return sum(a.bytes for a in self.arrays)

  @property
  def total(self) -> int:
    """Bytes of the results on one device in a step."""
    return self.bytes * self.executions

  @property
  def sent(self) -> int:
    """Bytes that a device sends each time, in a ring."""
    share = (self.parts - 1) / self.parts
    factor = {"all-reduce": 2 * share, "reduce-scatter": self.parts - 1, "collective-permute": 1}
    return round(self.bytes * factor.get(self.kind, share))

  @property
  def lines(self) -> tuple[hlo.Frame, ...]:
    """The lines that are neither a library's nor `constrain`'s own, the innermost first."""
    return tuple(f for f in self.stack if not _NOT_OWN.search(f.file)) or self.stack

  @property
  def source(self) -> hlo.Frame | None:
    """The innermost of them."""
    return next(iter(self.lines), None)


def find(module: hlo.Module, mesh: Any) -> list[Collective]:
  """Returns every collective that moves bytes, in the order of the text.

  Args:
    module: The program.
    mesh: With `axis_names` and `shape`; partition i of the program is device i of the mesh, row by row.
  """
  found, chains = [], _chains(module)
  for computation in module.computations.values():
    times = module.executions[computation.name]
    for i in computation if times else ():
      if i.opcode == "recv" and "_xla_megascale_transfer_type" in i.rest:
        found.append(_across_slices(module, computation, i, times, mesh))
      elif (kind := i.opcode.removesuffix("-start")) in KINDS and not _is_a_piece(module, chains, computation, i):
        found.append(_collective(module, chains, computation, i, kind, times, mesh))
  return [c for c in found if c is not None]


def _collective(module, chains, computation, i, kind, times, mesh):
  axes, parts, whole = _axes(_groups(i, module.devices), mesh)
  if kind == "collective-permute":  # Its groups are pairs.
    parts, whole = math.prod(mesh.shape[a] for a in axes), True
  if parts == 1:
    return None
  arrays, seen_as = _result(computation, i), i
  start, done, where = _start_and_done(module, chains, computation, i)
  if fusion := _fusion(module, computation):
    # A TPU's reduce-scatter is written as a fusion of an all-reduce and the slice that stays.
    if kind == "all-reduce" and fusion[1].bytes * parts == sum(a.bytes for a in arrays):
      kind, arrays = "reduce-scatter", fusion[1].arrays
    where = where or fusion[0]
    seen_as = fusion[1]
  elif start is not None and where is not computation:
    seen_as = done or start
  between = _between(where, start, done) if start is not None and done is not None else []
  return Collective(
    name=i.name,
    kind=kind,
    axes=axes,
    parts=parts,
    whole=whole,
    arrays=arrays,
    executions=times,
    origin=_origin(module, computation, i),
    asynchronous=start is not None,
    overlapped=bool(between),
    cover=sum(b.cycles for b in between),
    **_cause(module, computation, i, seen_as, where),
  )


def _across_slices(module, computation, i, times, mesh):
  """A collective between slices: each device sends to, and receives from, the runtime that joins them."""
  sort = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)[1]
  slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', i.rest)
  numbers = [n for part in slices[1].split(",") for n in _span(part)] if slices else [0]
  axes, parts, whole = _axes(np.array([[(n - min(numbers)) * module.devices for n in numbers]]), mesh)
  done = next((d for d in computation if d.opcode == "recv-done" and i.name in d.operands), None)
  between = _between(computation, i, done) if done is not None else []
  key = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', i.rest)
  sends = (s for s in computation if s.opcode == "send" and key and key[0] in s.rest)
  send = next(sends, i)
  return Collective(
    name=i.name,
    kind=_ACROSS_SLICES.get(sort, sort.lower().replace("_", "-")),
    axes=axes,
    parts=parts,
    whole=whole,
    arrays=i.arrays[:1],
    executions=times,
    origin=_origin(module, computation, send),
    asynchronous=True,
    overlapped=bool(between),
    cover=sum(b.cycles for b in between),
    slow=True,
    **_cause(module, computation, send, done or i, computation),
  )


def _span(text):
  first, _, last = text.partition(":")
  return range(int(first), int(last or first) + 1)


# Which devices


def _groups(i, devices) -> np.ndarray:
  """Returns [groups, members], numbers of partitions; of a permutation its pairs."""
  if pairs := i.attribute("source_target_pairs"):
    return np.array([[int(n) for n in re.findall(r"\d+", p)] for p in re.findall(r"\{(\d+,\d+)\}", pairs)]).reshape(
      -1, 2
    )
  text = re.search(r"\breplica_groups=(.*?)(?:, [a-z_]+=|$)", i.rest)
  return groups(text[1] if text else "{}", devices)


def groups(text: str, devices: int) -> np.ndarray:
  """Returns [groups, members] of `{{0,1},{2,3}}`, `[4,2]<=[2,4]T(1,0)`, or `mesh['data'=2,'tensor'=4] {'tensor'}`.

  The last names axes of a mesh of its own, `{'tensor':(2)2}` a part of one: after a factor of 2, the next of 2.
  """
  if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
    shape, dims = _numbers(iota[1]), _numbers(iota[2])
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_numbers(iota[3]) if iota[3] else range(len(dims))).reshape(shape)
  if named := re.match(r"@?mesh\w*\[(.*?)\](.*)$", text):
    sizes = {n: int(s) for n, s in re.findall(r"'([^']*)'=(\d+)", named[1])}
    order = re.search(r"device_ids=\(?\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", named[2])
    ids = np.arange(math.prod(sizes.values()))
    if order:
      ids = (
        groups(order[0].removeprefix("device_ids=").lstrip("("), devices).ravel() if order[2] else _numbers(order[1])
      )
    chosen = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", named[2].rpartition("{")[2])
    return _along(np.asarray(ids).reshape(tuple(sizes.values())), list(sizes), chosen)
  members = [_numbers(g) for g in re.findall(r"\{([\d,\s]+)\}", text)]
  return np.array(members) if members else np.arange(devices)[None]


def _along(ids, names, chosen):
  """The groups along some axes, or parts of axes, of an array of devices."""
  shape, grouped = [], []
  for name, size in zip(names, ids.shape, strict=True):
    cuts = sorted((int(pre), int(part)) for n, pre, part in chosen if n == name and part)
    whole = any(n == name and not part for n, _, part in chosen)
    before = 1
    for pre, part in cuts:
      shape.append(pre // before)
      shape.append(part)
      grouped.append(len(shape) - 1)
      before = pre * part
    shape.append(size // before)
    if whole:
      grouped.append(len(shape) - 1)
  others = [d for d in range(len(shape)) if d not in grouped]
  members = math.prod(shape[d] for d in grouped)
  return ids.reshape(shape).transpose(*others, *grouped).reshape(-1, members)


def _axes(groups, mesh) -> tuple[tuple[str, ...], int, bool]:
  """Returns the axes along which members of a group differ, how many members, and if that is all of these axes."""
  sizes = [mesh.shape[a] for a in mesh.axis_names]
  places = np.stack(np.unravel_index(groups % math.prod(sizes), sizes), axis=-1)  # [groups, members, axes]
  differ = (places != places[:, :1]).any(axis=(0, 1))
  axes = tuple(a for a, d in zip(mesh.axis_names, differ, strict=True) if d)
  members = groups.shape[1] if axes else 1
  return axes, members, members in (1, math.prod(mesh.shape[a] for a in axes))


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(",") if n.strip())


# What is moved, and when


def _result(computation, i) -> tuple[hlo.Array, ...]:
  """The arrays that come out; a start returns what it was given too, and what it keeps account with."""
  if not i.opcode.endswith("-start"):
    return i.arrays
  done = _waits_for(computation, i)
  if done is not None:
    return done.arrays
  return hlo.parse_arrays(i.parts[1]) if i.result.startswith("(") and len(i.parts) > 1 else i.arrays


def _waits_for(computation, start):
  wanted = start.opcode.removesuffix("-start") + "-done"
  waiting = [start.name]
  for name in waiting:
    for user in computation.users.get(name, ()):
      if user.opcode == wanted:
        return user
      if user.opcode in ("async-update", "call-update", "get-tuple-element", "tuple", "bitcast", "copy"):
        waiting.append(user.name)
  return None


def _given(computation, start):
  """Where a start, or what follows it, is given its operands."""
  updates = (u for u in computation.users.get(start.name, ()) if u.opcode == "call-update")
  return next(updates, start) if start.opcode == "call-start" else start


def _fusion(module, computation):
  """Where and how a computation is called, if it is a fusion."""
  call = next(iter(module.callers.get(computation.name, ())), None)
  return call if call is not None and call[1].opcode == "fusion" else None


def _start_and_done(module, chains, computation, i):
  """Returns what starts it, what waits for it, and the computation they are in; nothing if it is one instruction."""
  if '"is_sync":true' in i.rest:  # A GPU's start that was found not worth overlapping.
    return None, None, None
  if i.opcode.endswith("-start"):
    return i, _waits_for(computation, i), computation
  for caller, call in module.callers.get(computation.name, ()):
    if call.opcode in ("async-start", "call-start"):
      return _given(caller, call), _waits_for(caller, call), caller
    if call.opcode == "fusion" and _target(computation, "AsyncCollectiveStart"):
      pieces = _pieces(module, chains, computation, i)
      return call, next((c for c, inner in pieces if _target(inner, "AsyncCollectiveDone")), None), caller
  return None, None, None


def _target(computation, name):
  return any(i.opcode == "custom-call" and f'custom_call_target="{name}"' in i.rest for i in computation)


# A TPU's compiler spreads a collective over several fusions, to overlap it with what else is in them: it starts in one,
# ends in another, and every one holds it as an instruction of the same chain.


def _chain(i):
  chain = re.search(r'chain_id="(\d+)"', i.rest)
  return (chain[1], i.attribute("channel_id"), i.opcode) if chain else None


def _chains(module) -> dict[tuple, list[tuple[hlo.Instruction, hlo.Computation]]]:
  """By the computation that calls them and the chain: the fusions, in order, and what they call."""
  found = {}
  for computation in module.computations.values():
    for i in computation if _fusion(module, computation) else ():
      if i.opcode in KINDS and (chain := _chain(i)):
        caller, call = _fusion(module, computation)
        found.setdefault((caller.name, *chain), []).append((caller.order[call.name], call, computation))
  return {key: [piece[1:] for piece in sorted(pieces, key=lambda p: p[0])] for key, pieces in found.items()}


def _pieces(module, chains, computation, i):
  fusion = _fusion(module, computation)
  return chains.get((fusion[0].name, *_chain(i)), []) if fusion and _chain(i) else []


def _is_a_piece(module, chains, computation, i):
  """Whether it is the middle or end of a chain, which counts where it starts."""
  pieces = _pieces(module, chains, computation, i)
  return bool(pieces) and pieces[0][1] is not computation


def _between(computation, start, done) -> list[hlo.Instruction]:
  """The work scheduled between two instructions."""
  first, last = computation.order[start.name], computation.order[done.name]
  return [i for i in computation.listed[first + 1 : last] if i.opcode in _WORK]


# Why


def _cause(module, computation, *candidates) -> dict[str, Any]:
  """The operation and the lines that it is there for: its own, else those of what is next to it in the program."""
  *instructions, where = candidates
  near = [i for i in instructions if i is not None]
  place = where or computation
  if any(not i.op_name or not module.stack(i) for i in near):
    near += _neighbours(module, place, [i for i in near if i.name in place.instructions])
    near += [call for _, call in module.callers.get(place.name, ())]
  op_names = [i.op_name for i in near if "/" in i.op_name]
  # Several sums made into one have the name of one of them.
  first = near[0]
  together = [computation.instructions[o].op_name for o in first.operands if o in computation.instructions]
  phases = [phase(name) for name in (*op_names[:1], *(together if len(together) > 1 else ())) if "/" in name]
  return {
    "op_name": next((i.op_name for i in near if i.op_name), ""),
    "phase": next((p for p in ("backward", "recompute", "forward") if p in phases), "update"),
    "stack": next(filter(None, map(module.stack, near)), ()),
  }


def _neighbours(module, computation, instructions, steps=4) -> list[hlo.Instruction]:
  """What takes their results and what they take, the nearest first; around a loop, what the last turn made."""
  found = {i.name: i for i in instructions}
  for _ in range(steps):
    users = [u for name in found for u in computation.users.get(name, ()) if u.opcode != "tuple"]
    operands = [
      computation.instructions[o] for i in found.values() for o in i.operands if o in computation.instructions
    ]
    found |= {i.name: i for i in (*users, *operands)}
    before = [_last_turn(module, computation, i) for i in found.values() if i.opcode == "get-tuple-element"]
    found |= {i.name: i for i in before if i is not None}
  return list(found.values())


def _last_turn(module, computation, i):
  """What an element of a loop's state was made by: in the loop, by the turn before; after it, by the last."""
  source = computation.instructions.get(i.operands[0])
  loops = (call for _, call in module.callers.get(computation.name, ()) if call.opcode == "while")
  loop = next(loops, None) if source is None or source.opcode == "parameter" else source
  if loop is None or loop.opcode != "while":
    return None
  body = module.computations[loop.attribute("body").lstrip("%")]
  return body.instructions[body.root.operands[int(i.attribute("index"))]] if body.root.opcode == "tuple" else None


def phase(op_name: str) -> str:
  """Returns the part of the step that an operation belongs to, by the path JAX gives it."""
  if "rematted_computation" in op_name:
    return "recompute"
  if "transpose(" in op_name:
    return "backward"
  return "forward" if "jvp(" in op_name else "update"


_SAME = frozenset((*hlo.PASSES_ON, "transpose", "dynamic-slice", "slice", "slice-start", "slice-done"))


def _origin(module, computation, i) -> str:
  """The argument of the program that a collective's operand is, sliced or converted at most; else nothing."""
  if re.match(r"\w+[.\[][^/]*$", i.op_name):
    return i.op_name
  alone = len(i.operands) == 1 or i.opcode == "send"
  return (_argument(module, computation, i.operands[0], ()) or "") if alone else ""


def _argument(module, computation, name, path, depth=0) -> str | None:
  """Follows a value up to the argument that it is; `path` are the indices still to be taken of it."""
  i = computation.instructions.get(name)
  if i is None or depth > 200:
    return None
  follow = lambda name, path=path: _argument(module, computation, name, path, depth + 1)
  if i.opcode == "get-tuple-element":
    return follow(i.operands[0], (int(i.attribute("index")), *path))
  if i.opcode == "tuple":
    return follow(i.operands[path[0]], path[1:]) if path else None
  if i.opcode in _SAME or i.opcode.removesuffix("-start").removesuffix("-done") == "all-gather":
    return follow(i.operands[0], () if i.opcode.endswith("-done") else path)
  if i.opcode == "custom-call" and "ConcatBitcast" in i.rest:  # A TPU fetches an array slice by slice.
    return follow(i.operands[0])
  if i.opcode == "while":
    return follow(i.operands[0]) if path and module.unchanged(i, path[0]) else None
  if i.opcode in ("fusion", "call"):
    inner = module.computations[i.called[0]]
    number = _parameter_behind(inner, inner.root, path)
    return follow(i.operands[number], ()) if number is not None else None
  if i.opcode != "parameter":
    return None
  if computation.entry:
    return i.op_name or None
  for caller, call in module.callers.get(computation.name, ()):
    if call.opcode == "while":
      same = path and module.unchanged(call, path[0])
      return _argument(module, caller, call.operands[0], path, depth + 1) if same else None
    if call.opcode in ("fusion", "call", "async-start", "call-start"):
      given = _given(caller, call).operands[call.opcode == "call-start" :]
      return _argument(module, caller, given[int(i.argument)], path, depth + 1)
  return None


def _parameter_behind(inner, i, path) -> int | None:
  """The parameter that a fusion passes on, if that is all that it does."""
  while i.opcode in _SAME or (i.opcode == "tuple" and path):
    name = i.operands[path[0]] if i.opcode == "tuple" else i.operands[0]
    path = path[1:] if i.opcode == "tuple" else path
    i = inner.instructions[name]
  return int(i.argument) if i.opcode == "parameter" else None


def by_line(collectives: Sequence[Collective]) -> list[list[Collective]]:
  """Returns them in groups that a person would call one, the heaviest first.

  Those of a group share kind, axes, bytes, pass, line, and leaf, whatever the number of its layer.
  """
  together = {}
  for c in collectives:
    leaf = re.sub(r"\['?\d+'?\]", "[*]", c.origin)
    together.setdefault((c.kind, c.axes, c.bytes, c.phase, c.lines[:2], leaf, c.overlapped), []).append(c)
  return sorted(together.values(), key=lambda group: -sum(c.total for c in group))
