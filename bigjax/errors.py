"""Mistakes a person at the keyboard can mend, told in one message.

`bigjax.main` prints a `UserError` without a traceback and leaves with exit code 2;
everything else is a fault of the program or the machine and leaves with 1.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """What is wrong, where (the config path and the value), and what to do about it."""


def suggest(name: str, known: Iterable[str]) -> str:
  """Returns ` Did you mean 'depth'?`, or the names there are when none is close."""
  known = sorted(map(str, known))
  close = difflib.get_close_matches(str(name), known, n=1)
  return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known) or 'none'}."
