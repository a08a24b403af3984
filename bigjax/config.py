"""From a config file to the frozen, checked objects a run is made of.

A config names components and their arguments; a component's signature is its schema, `TrainConfig` is the schema of the
rest. Everything is checked here, once, before a device is touched: unknown keys and components, wrong types, missing
values. What is resolved can be written down whole (`describe`), defaults included, and resolved again to the same.
"""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from bigjax.errors import UserError, shown, suggest

# Arguments that the program passes itself, which a config therefore can't.
GIVEN = {
  "models": ("rngs",),
  "schedules": ("clock",),
  "optimizers": ("learning_rate",),
  "evaluators": ("predict", "batches"),
  "data": (),
  "tasks": (),
}


@dataclasses.dataclass(frozen=True)
class Component:
  """A component chosen by name, with checked arguments: `dict(name="vit", depth=12)` in a config.

  Calling it calls the factory with these arguments and those that the program gives.
  """

  kind: str
  name: str
  factory: Callable[..., Any]
  kwargs: Mapping[str, Any]
  where: str  # Its place in the config, for messages.

  def __call__(self, *args, **kwargs):
    try:
      return self.factory(*args, **{k: _built(v) for k, v in self.kwargs.items()}, **kwargs)
    except UserError as e:
      raise UserError(self.located(str(e))) from e

  def located(self, message: str) -> str:
    """Returns a component's own complaint, such as "heads: ..." or "model.heads: ...", with its place in the config."""
    if message.startswith("config."):
      return message
    short = message.removeprefix(f"{self.kind.removesuffix('s')}.").removeprefix("source.")
    separator = "." if short.partition(":")[0] in inspect.signature(self.factory).parameters else ": "
    return f"{self.where}{separator}{short}"


def _built(value):
  """Components among a component's arguments, such as the sources of a mixture, are built with it."""
  if isinstance(value, Component):
    return value()
  return tuple(map(_built, value)) if isinstance(value, tuple) else value


# Files and flags


def read(spec: str, overrides: Sequence[str] = ()):
  """Returns the `ConfigDict` of `FILE.py[:arg]` (or of a recorded config.json) with overrides applied.

  Args:
    spec: A path to a Python file with `get_config(arg=None)`, and after a colon the argument for it.
    overrides: Flags such as `--config.model.depth=2`, read by ml_collections; values are Python literals or strings.
  """
  import ml_collections

  # A folder's name may have colons too, such as that of a workdir named by the time.
  file, arg = re.fullmatch(r"(.*?\.(?:py|json)|[^:]*)(?::(.*))?", spec, re.DOTALL).groups("")
  if not os.path.isfile(file):
    folder = os.path.dirname(file) or "."
    known = [os.path.join(folder, f) for f in os.listdir(folder) if f.endswith(".py")] if os.path.isdir(folder) else []
    raise UserError(f"--config={spec}: there is no file {file!r}.{suggest(file, known)}")
  if file.endswith(".json"):
    try:
      with open(file, encoding="utf-8") as f:
        config = json.load(f)
    except (OSError, ValueError, RecursionError) as e:
      raise UserError(f"--config={file} can't be read: {e}") from e
  else:
    config = _get_config(file, arg)
  if not isinstance(config, Mapping | ml_collections.ConfigDict):
    raise UserError(f"--config={spec} gives {config!r}; a config is a ConfigDict or a dict.")
  return override(config, overrides)


def _get_config(file, arg):
  module_spec = importlib.util.spec_from_file_location("bigjax_config_" + re.sub(r"\W", "_", file), file)
  if module_spec is None:
    raise UserError(f"--config={file} is not a Python file.")
  module = importlib.util.module_from_spec(module_spec)
  with _mistakes_located(file):
    module_spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise UserError(f"--config={file} has no function get_config(arg=None) that returns a ConfigDict.")
  takes_arg = bool(inspect.signature(module.get_config).parameters)
  if arg and not takes_arg:
    raise UserError(f"--config={file}:{arg}: get_config of this file takes no argument.")
  with _mistakes_located(file):
    return module.get_config(arg or None) if takes_arg else module.get_config()


@contextlib.contextmanager
def _mistakes_located(file):
  """A config is its author's own code: what it raises is told with its line there."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == os.path.abspath(file)]
    place = f" (line {lines[-1]})" if lines else ""
    raise UserError(f"--config={file} can't be read: {type(e).__name__}: {e}{place}") from e


def override(config: Any, overrides: Sequence[str]):
  """Applies `--config.a.b=value` through ml_collections' own flags; the schema, not the old value, decides the type."""
  import ml_collections
  from absl import flags
  from ml_collections import config_flags

  def untyped(value):
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      return {k: untyped(v) for k, v in value.items()}
    return ml_collections.FieldReference(value, field_type=object)

  config = ml_collections.ConfigDict(untyped(config))
  for override in overrides:
    _make_sections(config, override.partition("=")[0].split(".")[1:-1])
  values = flags.FlagValues()
  argv = ["bigjax", *overrides]
  try:
    config_flags.DEFINE_config_dict(
      "config", config, flag_values=values, sys_argv=argv, lock_config=False, accept_new_attributes=True
    )
    rest = values(argv)[1:]
  except (
    *(flags.Error, AttributeError, LookupError, TypeError, ValueError),
    *(SyntaxError, RecursionError, MemoryError),  # The parser's stack has an end.
  ) as e:
    said = " ".join(str(e.args[0] if e.args else e).split())  # A KeyError's own text is quoted once more.
    given = " ".join(o if len(o) <= 200 else f"{o[:200]}..." for o in overrides)
    raise UserError(f"{given[:1000]}: {said[:300]}") from e
  if rest:
    raise UserError(f"Unexpected argument {shown(rest[0])}; overrides look like --config.batch_size=64.")
  return config


def _make_sections(config, names):
  """Makes those sections on the way to an override that the config leaves out, such as `keep` of config.keep.last."""
  for name in names:
    if not hasattr(config, "items") or not name.isidentifier():
      return
    if config.get(name) is None:
      if name in config:
        del config[name]
      config[name] = type(config)()
    config = config[name]


def parse_arg(arg: str | None, **defaults):
  """Reads the argument of a config file, `--config=FILE:variant=cnn,width=64`, into a namespace.

  Every name must be one of `defaults`, whose types it takes; a bare word sets the first of them, or a boolean True.
  """
  values = dict(defaults)
  for item in filter(None, (arg or "").split(",")):
    key, equals, text = item.partition("=")
    if not equals and key not in defaults:
      key, text = next(iter(defaults), ""), key
    if key not in defaults:
      near = suggest(key[:80], defaults)
      raise UserError(f"--config=...:{arg[:80]}: {shown(key)} is not an argument of this config.{near}")
    default = defaults[key]
    if isinstance(default, str):
      values[key] = text
      continue
    try:
      values[key] = ast.literal_eval(text.capitalize() if text in ("true", "false") else text or "True")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # The parser's stack has an end.
      values[key] = text
    values[key] = check(values[key], type(default) if default is not None else Any, f"--config=...:{key}")
  return types.SimpleNamespace(**values)


# Resolving


def resolve(config: Any, cls: type, where: str = "config"):
  """Builds the frozen dataclass `cls` from a dict or `ConfigDict`; every key must be known, every value of its type."""
  if not isinstance(config, Mapping) and not hasattr(config, "items"):
    raise UserError(f"{where} must be a dict of {', '.join(f.name for f in dataclasses.fields(cls))}, not {config!r}.")
  fields = {f.name: f for f in dataclasses.fields(cls)}
  hints = _hints(cls)
  for key in config:
    if key not in fields:
      raise UserError(f"{where}.{key} is not a known setting.{suggest(key, fields)}")
  missing = [n for n, f in fields.items() if n not in config and f.default is f.default_factory is dataclasses.MISSING]
  if missing:
    raise UserError(f"{where} is missing {', '.join(f'{n!r} ({_name(hints[n])})' for n in missing)}.")
  return cls(**{k: check(v, hints[k], f"{where}.{k}") for k, v in config.items()})


def component(kind: str, spec: Any, where: str) -> Component:
  """Resolves `dict(name=..., **arguments)` and checks the arguments against the factory's signature."""
  if isinstance(spec, str):
    spec = {"name": spec}
  if not hasattr(spec, "items") or "name" not in spec:
    raise UserError(f"{where} must be dict(name=..., ...), one of bigjax.{kind}, not {spec!r}.")
  kwargs = {**spec}
  name = kwargs.pop("name")
  if not isinstance(name, str):
    raise UserError(f"{where}.name must be a string, not {name!r}.")
  factory = load(kind, name, where)
  parameters = inspect.signature(factory).parameters
  given = GIVEN[kind]
  if kind == "optimizers" and "learning_rate" not in parameters:
    raise UserError(f"{where}.name: {name!r} takes no learning_rate, so it is no optimizer.")
  accepted = {n: p for n, p in parameters.items() if n not in given and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
  hints = _hints(factory)
  for key, value in kwargs.items():
    if key not in accepted:
      reason = "is set by the program" if key in given else f"is not an argument of {kind} {name!r}"
      raise UserError(f"{where}.{key} {reason}.{suggest(key, accepted)}")
    kwargs[key] = check(value, hints.get(key, Any), f"{where}.{key}")
  streams = kind == "evaluators"  # An evaluator's further streams of data are given by name, see EvalConfig.
  missing = [n for n, p in accepted.items() if p.default is p.empty and n not in kwargs and not streams]
  if missing:
    raise UserError(f"{where} ({name}) is missing {', '.join(repr(n) for n in missing)}.")
  return Component(kind, name, factory, types.MappingProxyType(kwargs), where)


def load(kind: str, name: str, where: str = "config") -> Callable[..., Any]:
  """Returns the factory of a component.

  That is `make` of `bigjax/<kind>/<name>.py`; a function of that name where the kind is one file (schedules); one of
  optax's for optimizers; and for a dotted name the module's `make` or the function itself, outside the package.
  """
  if "." in name:
    return _load_dotted(name, where, kind)
  package = importlib.import_module(f"bigjax.{kind}")
  if not hasattr(package, "__path__"):
    known = {
      n: f
      for n, f in vars(package).items()
      if inspect.isfunction(f) and GIVEN[kind][0] in inspect.signature(f).parameters
    }
    known = {n: f for n, f in known.items() if not n.startswith("_")}
    if name not in known:
      raise UserError(f"{where}.name: there is no {kind.removesuffix('s')} {shown(name)}.{suggest(name[:80], known)}")
    return known[name]
  path = f"bigjax.{kind}.{name}"
  if importlib.util.find_spec(path) is not None:
    module = importlib.import_module(path)
    if not hasattr(module, "make"):
      raise UserError(f"{where}.name: bigjax/{kind}/{name}.py is no component; it has no make(...).")
    return module.make
  known = _components(package)
  if kind == "optimizers":
    import optax

    found = getattr(optax, name, None) or getattr(optax.contrib, name, None)
    if found is not None and callable(found):
      return found
    known += [n for m in (optax, optax.contrib) for n, f in vars(m).items() if _is_optimizer(f)]
  raise UserError(f"{where}.name: there is no {kind.removesuffix('s')} {shown(name)}.{suggest(name[:80], known)}")


def _components(package):
  """Names of the files of a kind that have a `make`; those that only share code have none."""
  names = []
  for module in (m for m in pkgutil.iter_modules(package.__path__) if not m.ispkg):
    with open(os.path.join(module.module_finder.path, module.name + ".py"), encoding="utf-8") as f:
      names += [module.name] if "\ndef make(" in f.read() else []
  return names


def _is_optimizer(f):
  return inspect.isfunction(f) and "learning_rate" in inspect.signature(f).parameters


def _load_dotted(name, where, kind):
  for depth in (0, 1):
    path, _, attribute = (name, "", "make") if depth == 0 else name.rpartition(".")
    try:
      module = importlib.import_module(path)
    except ModuleNotFoundError as e:
      if e.name is None or not (path == e.name or path.startswith(e.name + ".")):
        raise  # The component exists; one of its own imports does not.
      continue
    if hasattr(module, attribute):
      return getattr(module, attribute)
  raise UserError(f"{where}.name: {name!r} is neither a module with make(...) nor a function that can be imported.")


@functools.cache
def _hints(obj):
  try:
    return typing.get_type_hints(obj, include_extras=True)
  except (NameError, TypeError):  # An outside library's annotations may need names that are not there at run time.
    return {}


# Types


def check(value: Any, hint: Any, where: str) -> Any:
  """Returns `value` as `hint` wants it (lists become tuples, dicts components or dataclasses); else `UserError`."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hasattr(value, "to_dict"):  # A ConfigDict.
    value = value.to_dict()
  if isinstance(value, list):
    value = tuple(value)
  if origin is Annotated:
    return _check_annotated(value, args[0], args[1:], where)
  if origin in (typing.Union, types.UnionType):
    return _check_union(value, args, hint, where)
  if origin is Literal:
    if value not in args or (isinstance(value, bool) != any(isinstance(a, bool) for a in args if a == value)):
      raise UserError(f"{where} must be one of {', '.join(map(repr, args))}, not {shown(value, 300)}.")
    return value
  if dataclasses.is_dataclass(hint):
    return resolve(value, hint, where)
  if origin is tuple:
    return _check_tuple(value, args, hint, where)
  if origin in (dict, collections.abc.Mapping):
    if not isinstance(value, Mapping):
      raise UserError(f"{where} must be a dict, not {shown(value, 300)}.")
    return types.MappingProxyType({k: check(v, args[1], f"{where}.{k}") for k, v in value.items()})
  if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
    return float(value)
  if hint in (int, float, str, bool, tuple, type(None), None):
    hint = type(None) if hint is None else hint
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
      raise UserError(f"{where} must be {_name(hint)}, not {shown(value, 300)}.")
  return _frozen(value)


def _check_annotated(value, hint, metadata, where):
  from bigjax import schedules

  for note in metadata:
    if isinstance(note, str) and note in GIVEN:
      return component(note, value, where)
  value = check(value, hint, where)
  for note in metadata:
    if note == "duration":
      schedules.parse_duration(value, where)
    elif callable(note):
      note(value, where)
  return value


def _check_union(value, args, hint, where):
  if value is None and type(None) in args:
    return None
  errors = []
  for arg in sorted(
    args, key=lambda a: not (isinstance(a, type) and type(value) is a)
  ):  # 1 stays an int in int | float.
    try:
      return check(value, arg, where)
    except UserError as e:
      errors.append(e)
  structured = [e for a, e in zip(args, errors, strict=False) if hasattr(value, "items") and a is not type(None)]
  others = [a for a in args if a is not type(None)]
  if len(others) == 1 or (structured and hasattr(value, "items")):
    raise next((e for e in errors if not str(e).startswith(f"{where} must be")), errors[0])
  raise UserError(f"{where} must be {_name(hint)}, not {shown(value, 300)}.")


def _check_tuple(value, args, hint, where):
  if not isinstance(value, tuple):
    raise UserError(f"{where} must be a list ({_name(hint)}), not {shown(value, 300)}.")
  if len(args) == 2 and args[1] is Ellipsis:
    return tuple(check(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
  if len(value) != len(args):
    raise UserError(f"{where} must have {len(args)} entries ({_name(hint)}), not {len(value)}: {shown(value, 300)}.")
  return tuple(check(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))


def _frozen(value):
  if isinstance(value, Mapping):
    return types.MappingProxyType({k: _frozen(v) for k, v in value.items()})
  return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _name(hint) -> str:
  """A type as a person would write it."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    kinds = [n for n in args[1:] if isinstance(n, str)]
    return f"a {kinds[0].removesuffix('s')}" if kinds else _name(args[0])
  if origin in (typing.Union, types.UnionType):
    return " or ".join(_name(a) for a in args)
  if origin is tuple:
    return f"list of {_name(args[0])}" if args[-1] is Ellipsis else f"({', '.join(map(_name, args))})"
  if hint in (type(None), None):
    return "None"
  return getattr(hint, "__name__", str(hint))


# Writing down


def describe(value: Any) -> Any:
  """Returns a resolved config as plain JSON values, defaults filled in; `resolve` makes the same config of it again."""
  if isinstance(value, Component):
    parameters = inspect.signature(value.factory).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty and n not in GIVEN[value.kind]}
    defaults = {n: d for n, d in defaults.items() if _is_plain(d)}
    return {"name": value.name, **{k: describe(v) for k, v in (defaults | dict(value.kwargs)).items()}}
  if dataclasses.is_dataclass(value):
    return {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {k: describe(v) for k, v in value.items()}
  return [describe(v) for v in value] if isinstance(value, list | tuple) else value


def _is_plain(value):
  if isinstance(value, list | tuple):
    return all(map(_is_plain, value))
  return value is None or isinstance(value, int | float | str | bool)


def digest(described: Mapping[str, Any]) -> str:
  """A hash of a described config that does not depend on the order of keys or on spelling defaults out."""
  return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def flatten(described: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted path, value) of every leaf."""
  if isinstance(described, Mapping) and described:
    for key, value in described.items():
      yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
  else:
    yield prefix, described


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
  """Returns (path, value in a, value in b) where two described configs differ; `...` stands for a key not there."""
  a, b = dict(flatten(a)), dict(flatten(b))
  same = lambda k: k in a and k in b and type(a[k]) is type(b[k]) and a[k] == b[k]
  return [(k, a.get(k, ...), b.get(k, ...)) for k in dict.fromkeys([*a, *b]) if not same(k)]
