"""Texts as the flags of a command give them: one by one, and a file of one a line."""

from __future__ import annotations

from collections.abc import Sequence

from bigjax.errors import UserError


def texts(one: Sequence[str], file: str | None, flag: str) -> list[str]:
  """Returns those of `--FLAG`, which may be given several times, and those of the file of `--FLAGs`.

  Raises:
    UserError: There is none, or the file can't be read.
  """
  found = list(one)
  if file is not None:
    try:
      with open(file, encoding="utf-8") as f:
        found += f.read().splitlines()
    except (OSError, UnicodeDecodeError) as e:
      raise UserError(f"--{flag}s={file} can't be read: {e}.") from e
  if not found:
    raise UserError(f"there is no {flag}; give --{flag} or --{flag}s.")
  return found
