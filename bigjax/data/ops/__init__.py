"""Preprocessing as one string: `"decode|inception_crop(224)|flip_lr|value_range(-1,1)"`.

A string can be swept, diffed and read at a glance, so it is what a config holds. Every name is a public function of a
file in this folder (or, with dots, of the user's own), and its arguments are Python literals that are checked against
its signature before anything runs. There are two kinds of op:

  array    works on a whole batch of NumPy arrays: `apply(batch, keys)`, `keys` uint64[B], one for each example. Needs
           no TensorFlow (5 to 15 s to import) and is many times faster than one call an example.
  example  works on the TensorFlow tensors of one example, as where images differ in size:
           `apply(example, seed)`, `seed` int32[2].

An op's randomness comes from its keys or its seed alone, so the same example of the same epoch of the same run is
always augmented in the same way. An op returns a new dictionary and leaves the arrays it was given as they were.
To write one, see `array_op` and `example_op`.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from bigjax.errors import UserError, shown, suggest


@dataclasses.dataclass(frozen=True)
class Op:
  """One step of a preprocessing string, its arguments bound.

  `structural` is true of an array op that only moves features about (keep, rename, ...) and never looks into one, so
  that it works on TensorFlow tensors, whatever their shape, as well as on arrays.
  """

  name: str
  kind: Literal["array", "example"]
  apply: Callable[[dict, Any], dict]
  args: tuple[tuple[str, Any], ...] = ()
  structural: bool = False

  def __str__(self) -> str:
    arguments = ", ".join(f"{name}={value!r}" if name else repr(value) for name, value in self.args)
    return f"{self.name}({arguments})" if arguments else self.name


def array_op(function: Callable | None = None, *, structural: bool = False) -> Callable:
  """Marks a function that returns `apply(batch, keys)`: an op on batches of NumPy arrays.

  ```
  @array_op
  def invert(key: str = "image"):
    return lambda batch, keys: {**batch, key: 255 - batch[key]}
  ```
  """
  if function is None:
    return lambda f: array_op(f, structural=structural)
  function.op_kind, function.op_structural = "array", structural
  return function


def example_op(function: Callable) -> Callable:
  """Marks a function that returns `apply(example, seed)`: an op on one example's TensorFlow tensors."""
  function.op_kind, function.op_structural = "example", False
  return function


def parse(text: str, where: str = "preprocess") -> tuple[Op, ...]:
  """Reads a string of ops separated by `|`; `where` is the config path that errors name.

  Raises:
    UserError: the string cannot be read, names an op there is not, or gives one a wrong argument.
  """
  if not isinstance(text, str):
    raise UserError(f'{where}: {text!r} is not a string of ops, such as "flip_lr|value_range(-1, 1)".')
  if not text.strip():
    return ()
  try:
    tree = ast.parse(f"(\n{text}\n)", mode="eval").body
  except (SyntaxError, ValueError, RecursionError, MemoryError) as e:  # The parser's stack has an end.
    reason = e.msg if isinstance(e, SyntaxError) else str(e)
    raise UserError(
      f"{where}: {shown(text, 300)} cannot be read ({reason}). "
      'Write ops separated by |, such as "flip_lr|value_range(-1, 1)".'
    ) from None
  try:
    return tuple(_bind(node, where) for node in _chain(tree))
  except RecursionError:
    raise UserError(f"{where}: {shown(text, 300)} is nested too deep. Ops follow one another, apart by |.") from None


def known() -> dict[str, Callable]:
  """Returns every op of this package by name."""
  found = {}
  for module in pkgutil.iter_modules(__path__):
    functions = vars(importlib.import_module(f"{__name__}.{module.name}")).items()
    found |= {name: f for name, f in functions if hasattr(f, "op_kind") and not name.startswith("_")}
  return found


def feature(batch: Mapping[str, Any], key: str) -> Any:
  """Returns `batch[key]`, or raises the error that says which features there are."""
  if key not in batch:
    raise UserError(f"there is no feature {key!r} here.{suggest(key, batch)}")
  return batch[key]


def signature(name: str, function: Callable) -> str:
  """Returns `flip_lr(probability: float = 0.5, key: str = 'image')`."""
  return f"{name}{inspect.signature(function).replace(return_annotation=inspect.Signature.empty)}"


def _chain(node: ast.expr) -> list[ast.expr]:
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    return [*_chain(node.left), node.right]
  return [node]


def _bind(node: ast.expr, where: str) -> Op:
  text = ast.unparse(node)
  call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
  name = ast.unparse(call.func)
  if not all(part.isidentifier() for part in name.split(".")):
    raise UserError(f'{where}: {text!r} is not an op. Write its name and its arguments, such as "value_range(-1, 1)".')
  function = _function(name, where)
  shown = signature(name, function)
  try:
    positional = [ast.literal_eval(arg) for arg in call.args]
    keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
  except (ValueError, TypeError):
    raise UserError(
      f"{where}: {text!r} has an argument that is not a number, string, tuple, True, False or None. The op is {shown}."
    ) from None
  bound = _checked(function, positional, keywords, f"{where}: {text}", shown)
  try:
    apply = function(*bound.args, **bound.kwargs)
  except UserError as e:
    raise UserError(f"{where}: {text}: {e}") from None
  return Op(name, function.op_kind, _telling(apply, f"{where}: {text}"), tuple(_named(bound)), function.op_structural)


def _named(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
  for name, value in bound.arguments.items():
    kind = bound.signature.parameters[name].kind
    if kind is inspect.Parameter.VAR_POSITIONAL:
      yield from (("", v) for v in value)
    elif kind is inspect.Parameter.VAR_KEYWORD:
      yield from value.items()
    else:
      yield name, value


def _function(name: str, where: str) -> Callable:
  module, _, attribute = name.rpartition(".")
  if not module:
    functions = known()
    if name not in functions:
      raise UserError(
        f"{where}: there is no op {name!r}.{suggest(name, functions)} "
        "An op of your own is named with its module: my_pkg.my_ops.name."
      )
    return functions[name]
  try:
    function = getattr(importlib.import_module(module), attribute, None)
  except ModuleNotFoundError as e:
    if e.name is None or not f"{module}.".startswith(f"{e.name}."):  # One of the module's own imports is missing.
      raise
    raise UserError(f"{where}: there is no module {e.name!r} for the op {name!r} (is it on PYTHONPATH?).") from None
  if not hasattr(function, "op_kind"):
    ops = [k for k, f in vars(importlib.import_module(module)).items() if hasattr(f, "op_kind")]
    raise UserError(
      f"{where}: {name!r} is not an op (a function under @array_op or @example_op).{suggest(attribute, ops)}"
    )
  return function


def _checked(function: Callable, positional: list, keywords: dict, where: str, shown: str) -> inspect.BoundArguments:
  """Returns the arguments as the signature wants them: lists as tuples, whole numbers as floats where those are due."""
  parameters = inspect.signature(function).parameters
  variadic = {p.kind: p.name for p in parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
  named = [name for name in parameters if name not in variadic.values()]
  for key in keywords:
    if key not in named and inspect.Parameter.VAR_KEYWORD not in variadic:
      raise UserError(f"{where}: no argument is called {key!r}.{suggest(key, named)} The op is {shown}.")
  try:
    bound = inspect.signature(function).bind(*positional, **keywords)
  except TypeError as e:
    raise UserError(f"{where}: {e}. The op is {shown}.") from None
  hints = typing.get_type_hints(function)
  for name, value in bound.arguments.items():
    hint = hints.get(name, Any)
    if name == variadic.get(inspect.Parameter.VAR_POSITIONAL):
      hint = tuple[hint, ...]
    elif name == variadic.get(inspect.Parameter.VAR_KEYWORD):
      hint, value = tuple[hint, ...], tuple(value.values())
    result = _conform(value, hint)
    if result is _NO:
      told = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
      raise UserError(f"{where}: {name} must be {told}, not {value!r}. The op is {shown}.")
    names = bound.arguments[name]
    bound.arguments[name] = dict(zip(names, result)) if isinstance(names, dict) else result
  return bound


_NO = object()


def _conform(value: Any, hint: Any) -> Any:
  """Returns `value` as type `hint`, or `_NO` where it is not of that type."""
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return value
  if origin in (types.UnionType, typing.Union):
    return next((r for r in (_conform(value, h) for h in inner) if r is not _NO), _NO)
  if origin is Literal:
    return value if any(value == v and type(value) is type(v) for v in inner) else _NO
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      return _NO
    items = inner[:1] * len(value) if inner[1:] == (...,) else inner
    result = tuple(_conform(v, h) for v, h in zip(value, items)) if len(items) == len(value) else (_NO,)
    return _NO if _NO in result else result
  if hint is float and type(value) is int:
    return float(value) if abs(value) < 2**1000 else _NO
  return value if type(value) is (types.NoneType if hint is None else hint) else _NO


def _telling(apply: Callable, where: str) -> Callable:
  """Puts the op's place in the config before what `apply` says is wrong."""

  def told(features, randomness):
    try:
      return apply(features, randomness)
    except UserError as e:
      raise UserError(f"{where}: {e}") from None

  return told
