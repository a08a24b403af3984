"""Mistakes a person at the keyboard can mend, told in one message; and what exit codes say.

0        all went well
1        a fault of the program or the machine, with a message or a traceback
2        a mistake: a `UserError`, printed by `bigjax.main` without a traceback
75       asked to stop, and saved: the same command goes on
76       hung, or lost a peer, and left: the same command goes on from the last checkpoint
130, 143 left at once, at a second Ctrl-C or SIGTERM
"""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

STOPPED = 75  # "Try again later", as sysexits.h has it.
LOST = 76


class UserError(ValueError):
  """What is wrong, where (the config path and the value), and what to do about it."""


def say(text: str) -> None:
  """Prints what a person should know; a log that can't be written, as on a disk that is full, ends nothing."""
  with contextlib.suppress(OSError, ValueError):
    print(text, file=sys.stderr, flush=True)


def suggest(name: str, known: Iterable[str]) -> str:
  """Returns ` Did you mean 'depth'?`, or the names there are when none is close."""
  known = sorted(map(str, known))
  close = difflib.get_close_matches(str(name), known, n=1)
  return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known) or 'none'}."


def shown(value: Any, most: int = 80) -> str:
  """Returns how a value is written, as far as that fits a line: what a file says may be of any length."""
  text = repr(value)
  return text if len(text) <= most else f"{text[:most]}..."


def few(names: Sequence[str], most: int = 5) -> str:
  """Returns the first of some names, none longer than a line, and how many more there are."""
  first = ", ".join(n if len(n) <= 80 else f"{n[:80]}..." for n in names[:most])
  return first + (f" and {len(names) - most} more" if len(names) > most else "")


def printable(text: str) -> str:
  """Returns text that a terminal may be given: what would move its cursor or colour it is spelt out."""
  return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


@contextlib.contextmanager
def understood(where: str, remedy: str = "Fetch the file again.") -> Iterator[None]:
  """What a file says may be of any type in any place; where that stops the reading of it, it is told by name."""
  try:
    yield
  except UserError:
    raise
  except KeyError as e:
    raise UserError(f"{where} does not say {shown(e.args[0] if e.args else None)}. {remedy}") from e
  except (TypeError, ValueError, AttributeError, ArithmeticError, IndexError, RecursionError) as e:
    raise UserError(f"{where} is damaged: {str(e)[:300]}. {remedy}") from e
