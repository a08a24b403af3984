"""What compiled programs came to, kept on disk by a hash of what the compiler was given.

A step that lowers to the same module, for the same chips, options and compiler, is not compiled again. What is read off
a program depends on the code that reads it too, so those files are part of the hash.

To know the module a step has to be lowered, which takes seconds of a core. A search, which asks for many, keeps whole
plans by the question: the config, its shapes, the chips, and all code that could have a say in the answer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import site
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMPILER = ("jax", "jaxlib", "libtpu")
READERS = (
  *(
    f"plan/{name}.py"
    for name in ("collectives", "compiled", "hlo", "network", "profiles", "program", "reasons", "work")
  ),
  "overview.py",
)


@dataclasses.dataclass(frozen=True)
class Kept:
  """A folder of JSON files; None keeps nothing."""

  folder: str | None = None

  def get(self, key: str) -> dict[str, Any] | None:
    """Returns what was kept under `key`, if it is whole."""
    try:
      return json.loads(self._file(key).read_text()) if self.folder else None
    except (OSError, ValueError):
      return None

  def put(self, key: str, found: Mapping[str, Any]) -> None:
    if self.folder:
      file = self._file(key)
      file.parent.mkdir(parents=True, exist_ok=True)
      written = file.with_suffix(f".{os.getpid()}")
      written.write_text(json.dumps(found))
      written.replace(file)  # Whole or not at all, whoever else is writing.

  def _file(self, key):
    return Path(self.folder) / f"{key}.json"


def key(module: str, where: str, options: Mapping[str, Any] | None) -> str:
  """Returns the hash of a lowered module's text, its chips, the compiler's options, and the versions of all."""
  readers = [Path(__file__).parent.parent / name for name in READERS]
  return _hash(module, where, json.dumps(dict(options or {}), sort_keys=True), _versions(COMPILER), _content(readers))


def question(*asked: str) -> str:
  """Returns the hash of what is asked, of the code that would answer, and of the versions of what that code uses.

  The code is this package, and every other module in this process that is neither Python's nor installed: a model in a
  user's own file has a say in the program.
  """
  flags = [(name, value) for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_", "LIBTPU_"))]
  return _hash(*asked, json.dumps(sorted(flags)), _versions((*COMPILER, "flax", "optax")), _code())


@functools.cache
def _code() -> str:
  package = Path(__file__).parent.parent
  installed = [*site.getsitepackages(), site.getusersitepackages(), *map(sysconfig.get_path, ("stdlib", "purelib"))]
  loaded = {Path(m.__file__).absolute() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
  own = {file for file in loaded if not any(file.is_relative_to(folder) for folder in installed)}
  return _content(sorted({*own, *package.rglob("*.py")}))


def _versions(names) -> str:
  return json.dumps({name: _version(name) for name in names})


def _version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return ""


def _content(files) -> str:
  return _hash(*(hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()))


def _hash(*parts: str) -> str:
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
