"""What files say of a model is held to types and sizes before anything is made of it."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from bigjax.errors import UserError, shown

LAYERS = 10_000  # More than any model has; a number without end must not be counted to.


def typed(found: Mapping[str, Any], cls: type, names: Mapping[str, str], where: str) -> dict[str, Any]:
  """Returns options of a model as their dataclass `cls` has them: whole numbers, texts, numbers that are finite.

  Args:
    found: option: value.
    cls: their dataclass.
    names: what the file calls an option.
    where: the file.

  Raises:
    UserError: One is of another type, below its least or beyond all sense.
  """
  hints = typing.get_type_hints(cls)
  return {n: _typed(value, hints[n], n, names.get(n, n).partition("|")[0], where) for n, value in found.items()}


def _typed(value, hint, option, key, where):
  kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
  if value is None and type(None) in kinds:
    return None
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if int in kinds and number and math.isfinite(value) and value == int(value):
    least, most = int(option in ("vocab_size", "context", "width", "depth", "heads")), 2**31 - 1
    if least <= value <= (LAYERS if option == "depth" else most):
      return int(value)
  elif (
    (float in kinds and number and math.isfinite(value))
    or (bool in kinds and isinstance(value, bool))
    or (str in kinds and isinstance(value, str) and len(value) < 10**5)
  ):
    return value
  wanted = " or ".join(getattr(k, "__name__", str(k)) for k in kinds if k is not type(None))
  raise UserError(f"{where}: {key} = {shown(value)} is no {wanted} that a model can have. Fetch the file again.")
