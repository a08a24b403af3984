"""Optimised HLO, the text of `compiled.as_text()`, as data: what runs, how often, and the line of Python behind it.

The text is what XLA itself says it will run, after partitioning, fusion and scheduling, on a CPU, a GPU or a TPU alike;
`cost_analysis()` counts the body of a loop once and knows nothing of lines. What is read here is what the printer
writes, https://github.com/openxla/xla/blob/main/xla/hlo/ir/hlo_instruction.cc; instructions stand in the order in which
they run (`is_scheduled=true`). Text of 50 MB takes seconds: a line is only taken apart when somebody asks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?(%?[\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
  r"\b(?:calls|body|condition|to_apply|true_computation|false_computation|branch_computations|called_computations)="
  r"(\{[^}]*\}|%?[\w.\-]+)"
)
# These run what they call; `to_apply` of the others is a scalar function, such as the sum of an all-reduce.
# A TPU's SparseCore is called, `call-start`, before what it is to send is there, which comes by a `call-update`.
CALLERS = frozenset(("while", "fusion", "call", "conditional", "async-start", "call-start", "custom-call"))
PASSES_ON = frozenset(("copy", "convert", "bitcast", "reshape", "copy-start", "copy-done", "optimization-barrier"))


@dataclasses.dataclass(frozen=True)
class Array:
  """An array on one device: `f32[128,64]{1,0:T(8,128)S(1)}`."""

  dtype: str
  dims: tuple[int, ...]
  layout: str = ""  # Minor to major, tiles, and the memory: S(1) is a TPU's vector memory.

  @property
  def count(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without the padding of tiles."""
    return math.ceil(self.count * bits(self.dtype) / 8)


def bits(dtype: str) -> int:
  """Returns the bits of an element; tokens and opaque values have none."""
  size = re.match(r"[a-z]+(\d+)", dtype)
  return int(size[1]) if size else 8 * (dtype == "pred")


@dataclasses.dataclass(frozen=True)
class Frame:
  """A line of Python."""

  file: str
  line: int
  function: str = ""


@dataclasses.dataclass(eq=False, slots=True)
class Instruction:
  """One line of a computation, taken apart on demand."""

  name: str
  opcode: str
  result: str  # The text of its shape.
  rest: str  # Everything from the first operand on.
  root: bool

  @property
  def arrays(self) -> tuple[Array, ...]:
    """Every array of the result, nested tuples flattened."""
    return parse_arrays(self.result)

  @property
  def parts(self) -> tuple[str, ...]:
    """The text of each element of a tuple, or of the result itself."""
    if not self.result.startswith("("):
      return (self.result,)
    depth, start, found = 0, 1, []
    for at in re.finditer(r"[()\[\]{},]", self.result):
      i, c = at.start(), at[0]
      depth += c in "([{"
      if (c == "," and depth == 1) or (c == ")" and depth == 1):
        found.append(self.result[start:i].strip())
        start = i + 1
      depth -= c in ")]}"
    return tuple(f for f in found if f)

  @property
  def bytes(self) -> int:
    """The bytes of the result on one device."""
    return sum(a.bytes for a in self.arrays)

  @property
  def operands(self) -> tuple[str, ...]:
    """The names of what it works on."""
    inside = self.rest[: self._operands_end()]
    if self.opcode in ("constant", "parameter"):
      return ()
    if "%" in inside:
      return tuple(re.findall(r"%([\w.\-]+)", inside))
    return tuple(o.split()[-1] for o in re.sub(r"\{[^}]*\}|\[[^\]]*\]|/\*.*?\*/", "", inside).split(",") if o.strip())

  @property
  def argument(self) -> str:
    """What stands in the parentheses: the value of a constant, the number of a parameter."""
    return self.rest[: self._operands_end()]

  @property
  def attributes(self) -> str:
    """What follows the operands."""
    return self.rest[self._operands_end() + 1 :]

  def attribute(self, key: str) -> str | None:
    """Returns the value of `key=value`: without its quotes, or with the braces or brackets it is in."""
    if not (found := re.search(rf"\b{key}=", self.rest)):
      return None
    text = self.rest[found.end() : found.end() + 100_000]
    if text.startswith('"'):
      return re.match(r'"((?:[^"\\]|\\.)*)"', text)[1]
    if text.startswith("{"):
      return _balanced(text)
    return re.match(r"[^,\s]*", text)[0]

  @property
  def called(self) -> tuple[str, ...]:
    """The computations it names."""
    return tuple(n for group in _CALLED.findall(self.attributes) for n in re.findall(r"[\w.\-]+", group))

  @property
  def op_name(self) -> str:
    """The path of the operation in the traced program, `jit(step)/jvp()/while/body/dot_general`."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
    return found[1].replace("\\'", "'").replace('\\"', '"') if found else ""

  @property
  def cycles(self) -> int:
    """The TPU compiler's estimate of one execution; 0 where it makes none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
    return int(found[1]) if found else 0

  def _operands_end(self):
    depth = 1
    for at in re.finditer(r"[()]", self.rest):
      depth += 1 if at[0] == "(" else -1
      if not depth:
        return at.start()
    return len(self.rest)


@dataclasses.dataclass(eq=False)
class Computation:
  """A list of instructions in the order in which they run."""

  name: str
  entry: bool
  instructions: dict[str, Instruction]

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  @functools.cached_property
  def root(self) -> Instruction:
    return next((i for i in self if i.root), None) or self.listed[-1]

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(i.argument): i for i in self if i.opcode == "parameter"}

  @functools.cached_property
  def listed(self) -> tuple[Instruction, ...]:
    return tuple(self.instructions.values())

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Who takes the result of an instruction."""
    found = {}
    for i in self:
      for name in dict.fromkeys(i.operands):
        found.setdefault(name, []).append(i)
    return found

  @functools.cached_property
  def order(self) -> dict[str, int]:
    """The place of each instruction in the schedule."""
    return {name: i for i, name in enumerate(self.instructions)}


@dataclasses.dataclass(eq=False)
class Module:
  """A program; made by `parse`."""

  header: str
  computations: dict[str, Computation]  # Those called stand before those that call them.
  frames: Mapping[int, tuple[Frame, int]]  # By number: the line, and the number of the frame that called it.

  @functools.cached_property
  def entry(self) -> Computation:
    return next((c for c in self.computations.values() if c.entry), None) or list(self.computations.values())[-1]

  @functools.cached_property
  def devices(self) -> int:
    """The number of devices that the program is for; of a program over several slices, those of one."""
    size = lambda key: int(m[1]) if (m := re.search(rf"\b{key}=(\d+)", self.header)) else 1
    return size("num_partitions") * size("replica_count")

  @functools.cached_property
  def callers(self) -> dict[str, list[tuple[Computation, Instruction]]]:
    """Who calls a computation."""
    found = {}
    for computation in self.computations.values():
      for i in computation:
        if i.opcode in CALLERS:
          for name in i.called:
            if name in self.computations:
              found.setdefault(name, []).append((computation, i))
    return found

  @functools.cached_property
  def executions(self) -> dict[str, int]:
    """How often each computation runs in one run of the program, loops multiplied out.

    Every branch of a conditional is counted, and a loop whose length the text does not tell counts once
    (`endless` names those).
    """
    counts = dict.fromkeys(self.computations, 0)
    counts[self.entry.name] = 1
    for name in self._callers_first:
      for caller, i in self.callers.get(name, ()):
        times = 1
        if i.opcode == "while":
          times = (self.trips(caller, i) or 1) + (i.attribute("condition") or "").endswith(f"%{name}")
        counts[name] += counts[caller.name] * times
    return counts

  @property
  def endless(self) -> tuple[str, ...]:
    """Loops whose number of turns could not be told."""
    loops = ((c, i) for c in self.computations.values() for i in c if i.opcode == "while")
    return tuple(i.name for c, i in loops if self.trips(c, i) is None)

  @functools.cached_property
  def _callers_first(self):
    seen, ordered = set(), []

    def visit(name):
      if name not in seen:
        seen.add(name)
        for caller, _ in self.callers.get(name, ()):
          visit(caller.name)
        ordered.append(name)

    for name in reversed(self.computations):  # The entry stands last, so that this does not recurse deeply.
      visit(name)
    return ordered

  def trips(self, caller: Computation, loop: Instruction) -> int | None:
    """Returns the turns of a `while`: what XLA noted, or counted from its start to its limit; None if neither."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known[1])
    condition = self.computations.get((loop.attribute("condition") or "").lstrip("%"))
    body = self.computations.get((loop.attribute("body") or "").lstrip("%"))
    if condition is None or body is None:
      return None
    limit = index = None
    compare, sides = self._comparison(condition)
    for side in sides if compare is not None else ():
      value, at = self._integer_or_state(condition, side)
      limit = value if value is not None else limit
      index = at if at is not None and value is None and index is None else index
    if limit is None or index is None:
      constants = [int(i.argument) for i in condition if i.opcode == "constant" and i.argument.isdigit()]
      return max(constants, default=None)
    start = self._state(caller, loop, index)
    step = self._step(body, index)
    direction = compare.attribute("direction")
    last = limit + (direction == "LE") - (direction == "GE")
    return max(0, math.ceil((last - (start or 0)) / (step or 1)))

  def _comparison(self, condition):
    """The comparison that ends a loop, and its two sides as names in the condition, also where it is in a fusion."""
    root = condition.root
    if root.opcode == "compare":
      return root, root.operands
    inner = self.computations.get(root.called[0]) if root.opcode in ("fusion", "call") and root.called else None
    if inner is None or inner.root.opcode != "compare":
      return None, ()
    sides = []
    for name in inner.root.operands:
      side = inner.instructions[name]
      if side.opcode == "parameter":
        sides.append(root.operands[int(side.argument)])
      else:
        sides.append(side)
    return inner.root, sides

  def _integer_or_state(self, computation, name, depth=0):
    """The value of a constant, and the index of an element of the loop's state; None for what it is not."""
    i = name if isinstance(name, Instruction) else computation.instructions.get(name)
    if i is None or depth > 20:
      return None, None
    if i.opcode == "constant":
      return (int(i.argument), None) if re.fullmatch(r"-?\d+", i.argument) else (None, None)
    if i.opcode == "get-tuple-element":
      index, source = int(i.attribute("index")), computation.instructions[i.operands[0]]
      if source.opcode == "parameter":
        loop = next((c for c in self.callers.get(computation.name, ()) if c[1].opcode == "while"), None)
        value = self._state(*loop, index) if loop and self.unchanged(loop[1], index) else None
        return value, index
      if source.opcode == "tuple":
        return self._integer_or_state(computation, source.operands[index], depth + 1)
      return None, None
    if i.opcode in PASSES_ON and i.operands:
      return self._integer_or_state(computation, i.operands[0], depth + 1)
    return None, None

  def _state(self, caller, loop, index):
    """The integer that an element of a loop's state starts with."""
    start = caller.instructions.get(loop.operands[0])
    if start is None or start.opcode != "tuple":
      return None
    return self._integer_or_state(caller, start.operands[index])[0]

  def unchanged(self, loop: Instruction, index: int) -> bool:
    """Whether a loop leaves an element of its state as it was."""
    body = self.computations[loop.attribute("body").lstrip("%")]
    if body.root.opcode != "tuple":
      return False
    out = body.instructions[body.root.operands[index]]
    while out.opcode in ("copy", "bitcast"):
      out = body.instructions[out.operands[0]]
    return out.opcode == "get-tuple-element" and int(out.attribute("index")) == index

  def _step(self, body, index):
    """What a turn adds to the counter."""
    out = body.instructions.get(body.root.operands[index]) if body.root.opcode == "tuple" else None
    while out is not None and out.opcode in ("copy", "bitcast"):
      out = body.instructions.get(out.operands[0])
    if out is None or out.opcode not in ("add", "fusion", "call"):
      return None
    values = (self._integer_or_state(body, name)[0] for name in out.operands)
    return next((v for v in values if v is not None), None)

  def stack(self, i: Instruction) -> tuple[Frame, ...]:
    """The lines of Python that an instruction comes from, the innermost first; those of libraries are among them."""
    if found := re.search(r"stack_frame_id=(\d+)", i.rest):
      number, lines = int(found[1]), []
      while number in self.frames and len(lines) < 1000:
        frame, number = self.frames[number]
        lines.append(frame)
      return tuple(lines)
    file = re.search(r'source_file="([^"]*)"', i.rest)
    line = re.search(r"source_line=(\d+)", i.rest)
    return (Frame(file[1], int(line[1]) if line else 0),) if file else ()


def parse(text: str) -> Module:
  """Returns the program that `compiled.as_text()` describes."""
  header, computations, tables = "", {}, {}
  lines = iter(text.split("\n"))
  current = table = None
  for line in lines:
    if current is not None:
      # Of another thread: `}, execution_thread="..."`. A kernel's attributes may end in a line of `}}, metadata=...`.
      if line.rstrip() == "}" or line.startswith("}, execution_thread"):
        current = None
        continue
      while (line.count('"') - line.count('\\"')) % 2:  # The text of a custom call's kernel goes over several lines.
        line += "\n" + next(lines, '"')
      if i := _instruction(line):
        current[i.name] = last = i
      elif current and line.strip():
        last.rest += "\n" + line
    elif line.startswith("HloModule"):
      header = line
    elif line.rstrip().endswith("{") and (found := _HEADER.match(line)):
      current, table = {}, None
      computations[found[2]] = Computation(found[2], bool(found[1]), current)
    elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
      table = tables.setdefault(line, {})
    elif table is not None and line[:1].isdigit():
      number, _, value = line.partition(" ")
      table[int(number)] = value
  if not computations:
    raise ValueError("This is no text of an HLO module: no computation in it.")
  return Module(header, computations, _frames(tables))


def _instruction(line):
  if not (name := _INSTRUCTION.match(line)) or not (opcode := _OPCODE.search(line, name.end() - 1)):
    return None
  result = line[name.end() : opcode.start()]
  return Instruction(name[2].lstrip("%"), opcode[1], result, line[opcode.end() :], bool(name[1]))


def _frames(tables):
  """Returns {number: (line, number of the caller's frame)}; numbers of callers are one too high in what XLA prints."""
  files = {n: v.strip('"') for n, v in tables.get("FileNames", {}).items()}
  functions = {n: v.strip('"') for n, v in tables.get("FunctionNames", {}).items()}
  field = lambda text, key: int(m[1]) if (m := re.search(rf"\b{key}=(\d+)", text)) else 0
  places = {
    n: Frame(files.get(field(v, "file_name_id"), ""), field(v, "line"), functions.get(field(v, "function_name_id"), ""))
    for n, v in tables.get("FileLocations", {}).items()
  }
  frames = tables.get("StackFrames", {}).items()
  found = {n: (field(v, "file_location_id"), field(v, "parent_frame_id")) for n, v in frames}
  shift = found[1][1] if 1 in found else 0  # The first frame has no caller, whatever number that is.
  return {n: (places[place], caller - shift) for n, (place, caller) in found.items() if place in places}


def parse_arrays(text: str) -> tuple[Array, ...]:
  """Returns every array in the text of a shape, nested tuples flattened."""
  return tuple(
    Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d.strip()), layout)
    for dtype, dims, layout in _ARRAY.findall(text)
  )


def leaf(argument: str) -> str:
  """Returns the name of a leaf as rules have it: `state.params['up']['kernel']` is `params/up/kernel`."""
  keys = re.findall(r"\[\\?'?([^'\]\\]+)\\?'?\]|\.(\w+)", argument)
  return "/".join(a or b for a, b in keys)


def _balanced(text):
  depth = 0
  for at in re.finditer(r"[{}]", text):
    depth += 1 if at[0] == "{" else -1
    if not depth:
      return text[: at.end()]
  return text
