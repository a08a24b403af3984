"""The step takes what it was compiled for, where it is, and as it is laid out.

Anything else would be compiled again, or moved between host and devices at every step, without a word. JAX refuses both
here; this says which argument it was, and what about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from bigjax import paths
from bigjax.errors import UserError

AHEAD = 2  # Steps that the host may be ahead of the devices: enough to hide its work, and a stop is soon heard.


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled function that names the argument it refuses."""

  compiled: Callable
  takes: Mapping[str, Any]  # Its arguments by name, in order, as shapes with their layouts.

  def __call__(self, *args):
    """Calls it.

    Raises:
      UserError: An argument is not what it was compiled for.
    """
    try:
      return self.compiled(*args)
    except (TypeError, ValueError, RuntimeError) as e:
      lines = [line for (name, want), got in zip(self.takes.items(), args) for line in differences(name, want, got)]
      if not lines:
        raise
      more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
      raise UserError(
        "The step was compiled once, for what a first batch promised, and now gets something else:\n  "
        + "\n  ".join(lines[:20])
        + more
        + "\nLet config.data and its preprocess give every batch the same features, shapes and types, and leave "
        "everything on the devices."
      ) from e


def differences(name: str, want: Any, got: Any) -> list[str]:
  """Returns a line for each leaf of an argument that is not as it was promised."""
  want, got = ({f"{name}/{n}".rstrip("/"): x for n, x in _named(tree)} for tree in (want, got))
  lines = [f"{n} is missing" for n in want if n not in got]
  lines += [f"{n} is new" for n in got if n not in want]
  for n in want:
    if n in got and (what := _difference(want[n], got[n])):
      lines.append(f"{n} {what}")
  return lines


def _difference(want, got):
  if not isinstance(got, jax.Array):
    return f"is on the host, as a {type(got).__module__}.{type(got).__name__}: it would be sent at every step"
  if (want.shape, want.dtype) != (got.shape, got.dtype):
    return f"is {_shown(got)} instead of {_shown(want)}"
  if got.is_deleted():
    return "was given away: an earlier step has used its memory"
  if want.sharding is not None and not want.sharding.is_equivalent_to(got.sharding, len(want.shape)):
    return f"is laid out as {got.sharding} instead of {want.sharding}"
  return None


def _shown(leaf):
  return f"{leaf.dtype}{list(leaf.shape)}"


def _named(tree):
  return zip(paths.names(tree), jax.tree.leaves(tree), strict=True)
