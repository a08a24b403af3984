"""Where the first number comes from that is none: a program evaluated one operation after another.

A program is traced, and each operation's result is looked at. What is not finite remembers which of its operands were
not. From a result that is broken one so gets back to where that began: an operation that made an infinity or a NaN of
finite numbers, or an argument that came with one. Infinities that go nowhere, such as those of a mask under a softmax,
are on no such way.

What calls, loops or branches is evaluated as one operation first, and taken apart where its result is broken.
"""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import source_info_util  # The public names of a jaxpr's parts have none for where they are from.
from jax.extend import core

from bigjax import paths


@dataclasses.dataclass(frozen=True, eq=False)
class Event:
  """A tensor that is not finite."""

  order: int  # In which they were made.
  operation: str  # "log", "div", ..., or "argument".
  module: str  # Names of the modules it was made in, or of the argument.
  backward: bool  # Whether it is part of a gradient.
  line: str  # FILE:LINE (function), of the code that is not a library's.
  tensor: str  # Type and shape.
  nans: int
  infinities: int
  turns: tuple[int, ...]  # Of the loops around it.
  causes: tuple[Event, ...]  # Operands that were not finite.

  @property
  def origins(self) -> list[Event]:
    """Where it comes from, the first first."""
    return [e for e in self._all if not e.causes]

  @property
  def first_nan(self) -> Event | None:
    """The first NaN on the way; None where there is none."""
    return next((e for e in self._all if e.nans), None)

  @property
  def _all(self) -> list[Event]:
    found, waiting = {}, [self]
    while waiting:
      event = waiting.pop()
      if id(event) not in found:
        found[id(event)] = event
        waiting += event.causes
    return sorted(found.values(), key=lambda e: e.order)

  def __str__(self) -> str:
    what = [f"{n:,} {kind}" for n, kind in ((self.nans, "NaN"), (self.infinities, "infinite")) if n]
    where = f" in {self.module}" if self.module else ""
    turn = f", turn {', '.join(map(str, self.turns))} of the loop" if self.turns else ""
    way = ", backward" if self.backward else ""
    if self.operation == "argument":
      return f"{self.module} {self.tensor}, an argument: {' and '.join(what)}"
    return f"{self.operation} {self.tensor}{where}{way}{turn}: {' and '.join(what)}\n  {self.line}"


def trace(function: Callable, *args: Any) -> dict[str, Event | None]:
  """Evaluates `function(*args)` and returns for each leaf of the result, by its path, what made it not finite."""
  program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
  leaves = [x for arg in args for x in jax.tree.leaves(arg)]
  names = [f"{i}/{n}" if len(args) > 1 else n for i, arg in enumerate(args) for n in paths.names(arg)]
  walk = _Walk()
  tensors = [_Tensor(x, walk.argument(n, x)) for n, x in zip(names, leaves, strict=True)]
  found = walk.run(program.jaxpr, [_Tensor(c) for c in program.consts], tensors, source_info_util.new_name_stack(), ())
  return dict(zip(paths.names(shapes), [t.event for t in found], strict=True))


@dataclasses.dataclass(frozen=True)
class _Tensor:
  value: Any
  event: Event | None = None


class _Walk:
  """Evaluates a jaxpr, an equation at a time."""

  def __init__(self):
    self._count = 0

  def argument(self, name: str, value: Any) -> Event | None:
    nans, infinities = _broken(value)
    if not nans + infinities:
      return None
    return Event(self._next(), "argument", name, False, "", _shape(value), nans, infinities, (), ())

  def run(self, jaxpr, consts: Sequence[_Tensor], args: Sequence[_Tensor], names, turns) -> list[_Tensor]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda v: _Tensor(v.val) if isinstance(v, core.Literal) else known[v]
    last = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if not isinstance(v, core.Literal)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    for i, equation in enumerate(jaxpr.eqns):
      operands = [read(v) for v in equation.invars]
      known |= zip(equation.outvars, self._evaluate(equation, operands, names, turns), strict=True)
      for v in {v for v in (*equation.invars, *equation.outvars) if not isinstance(v, core.Literal)}:
        if last.get(v, -1) <= i:
          del known[v]  # As a compiled program would: memory is for what is still needed.
    return [read(v) for v in jaxpr.outvars]

  def _evaluate(self, equation, operands, names, turns):
    names = names + equation.source_info.name_stack
    params = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
      made = equation.primitive.bind(*(t.value for t in operands), **params)
    made = list(made) if equation.primitive.multiple_results else [made]
    broken = [_broken(x) for x in made]
    if not any(map(sum, broken)):
      return [_Tensor(x) for x in made]
    inside = _INSIDE.get(equation.primitive.name, lambda *_: ())
    found = inside(self, equation.params, operands, names, turns)
    if any(t.event for t in found):
      return found  # Else it's finite one operation at a time, and the whole of it is as far as one gets.
    if equation.primitive.name == "select_n":
      operands = _chosen(*operands)
    causes = tuple({id(t.event): t.event for t in operands if t.event}.values())
    return [_Tensor(x, self._event(equation, x, b, names, turns, causes)) for x, b in zip(made, broken)]

  def _event(self, equation, value, broken, names, turns, causes):
    if not sum(broken):
      return None
    scopes = [s.name for s in names.stack if isinstance(s, source_info_util.Scope)]
    transforms = {s.name for s in names.stack if isinstance(s, source_info_util.Transform)}
    return Event(
      order=self._next(),
      operation=equation.primitive.name,
      module="/".join(scopes),
      backward="transpose" in transforms,
      line=_line(equation.source_info.traceback),
      tensor=_shape(value),
      nans=broken[0],
      infinities=broken[1],
      turns=turns,
      causes=causes,
    )

  def _next(self):
    self._count += 1
    return self._count

  def called(self, params, operands, names, turns):
    return self.closed(params["jaxpr" if "jaxpr" in params else "call_jaxpr"], operands, names, turns)

  def closed(self, program, operands, names, turns):
    jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    return self.run(jaxpr, [_Tensor(c) for c in consts], operands, names, turns)

  def scan(self, params, operands, names, turns):
    consts, carry, over = _scan_parts(params, operands)
    length, count = params["length"], len(carry)
    made: list[list[_Tensor]] = []
    for i in reversed(range(length)) if params["reverse"] else range(length):
      now = [_Tensor(t.value[i], t.event if t.event and sum(_broken(t.value[i])) else None) for t in over]
      found = self.closed(params["jaxpr"], [*consts, *carry, *now], names, (*turns, i))
      carry = found[:count]
      made.append(found[count:])
    made = made[::-1] if params["reverse"] else made
    stacked = [
      _Tensor(jnp.stack([t.value for t in column]), next((t.event for t in column if t.event), None))
      for column in zip(*made, strict=True)
    ]
    return [*carry, *stacked]

  def loop(self, params, operands, names, turns):
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    asked, used, carry = operands[:first], operands[first:second], operands[second:]
    for i in range(10**6):
      if not bool(self.closed(params["cond_jaxpr"], [*asked, *carry], names, turns)[0].value):
        return carry
      carry = self.closed(params["body_jaxpr"], [*used, *carry], names, (*turns, i))
    return ()

  def branch(self, params, operands, names, turns):
    index = int(np.clip(int(operands[0].value), 0, len(params["branches"]) - 1))
    return self.closed(params["branches"][index], operands[1:], names, turns)


_CALLS = ("jit", "pjit", "remat2", "checkpoint", "closed_call", "core_call", "eval_jaxpr")
_CALLS += ("custom_jvp_call", "custom_vjp_call")
_INSIDE = dict.fromkeys(_CALLS, _Walk.called) | {"scan": _Walk.scan, "while": _Walk.loop, "cond": _Walk.branch}


def _chosen(which, *cases):
  """The cases of a selection of which something broken was taken."""
  number = np.asarray(which.value).astype(np.int32)
  return [t for i, t in enumerate(cases) if t.event and (~np.isfinite(np.asarray(t.value)) & (number == i)).any()]


def _scan_parts(params, operands):
  """Splits a scan's operands into constants, carry, and what it goes over."""
  if "ft_in" in params:  # From JAX 0.11 on.
    sizes = [len(list(part)) for part in params["ft_in"].unpack()]
  else:
    sizes = [params["num_consts"], params["num_carry"], None]
  return operands[: sizes[0]], operands[sizes[0] : sizes[0] + sizes[1]], operands[sizes[0] + sizes[1] :]


def _broken(value) -> tuple[int, int]:
  """Returns the numbers of NaNs and of infinities."""
  dtype = getattr(value, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
    return 0, 0
  value = np.asarray(value)
  if np.isfinite(value).all():
    return 0, 0
  return int(np.isnan(value).sum()), int(np.isinf(value).sum())


def _shape(value) -> str:
  return f"{value.dtype}{list(np.shape(value))}"


_HERE = os.path.dirname(os.path.abspath(__file__))
# What others call to compute something of theirs.
_TOOLS = tuple(os.path.join(_HERE, name) for name in ("precision.py", "quantize.py", "lora.py", "replay.py", "sums.py"))
_LIBRARIES = tuple(sysconfig.get_paths()[k] for k in ("purelib", "platlib", "stdlib"))


def _line(traceback) -> str:
  """The innermost line of code that is neither a library's nor a tool's."""
  frames = list(source_info_util.user_frames(traceback))
  own = [f for f in frames if f.file_name.startswith(_HERE) or not f.file_name.startswith(_LIBRARIES)]
  frame = next(iter([f for f in own if not f.file_name.startswith(_TOOLS)] or own or frames), None)
  return f"{frame.file_name}:{frame.start_line} ({frame.function_name})" if frame else "(no line is known)"
