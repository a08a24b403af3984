"""What compiled programs came to, kept on disk by a hash of what the compiler was given.

A step that lowers to the same module, for the same chips, options and compiler, is not compiled again. What is read off
a program depends on the code that reads it too, so those files are part of the hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

READERS = ("collectives", "compiled", "hlo", "network", "profiles", "program", "reasons")


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
  versions = {name: _version(name) for name in ("jax", "jaxlib", "libtpu")}
  parts = [module, where, json.dumps(dict(options or {}), sort_keys=True), json.dumps(versions), _own()]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return ""


def _own():
  digest = hashlib.sha256()
  for name in READERS:
    digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
  return digest.hexdigest()
