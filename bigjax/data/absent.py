"""Examples of a source whose files aren't here: their shapes are known, which is all that a plan of a step wants."""

import dataclasses
import os
from collections.abc import Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Absent:
  """Zeros of the right shapes and types; how many examples there are is not known, so there seem to be very many."""

  features: Mapping[str, tuple[tuple[int, ...], str]]  # Name: (shape of one example, type).

  def __len__(self) -> int:
    return 2**24

  def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.zeros((len(ids), *shape), dtype) for name, (shape, dtype) in self.features.items()}


def files(paths: str | Iterable[str]) -> bool:
  """Returns whether a file or folder among `paths` isn't there."""
  paths = (paths,) if isinstance(paths, str) else paths
  return any(not p.startswith("package:") and not os.path.exists(os.path.expanduser(p)) for p in paths)
