"""Elements of a page as function calls; whatever is not an element already is escaped."""

from __future__ import annotations

import html
from typing import Any


class Markup(str):
  """Text that is HTML already. All other text is escaped before it becomes part of some."""


def element(name: str, /, *children: Any, **attributes: Any) -> Markup:
  """`element("td", 5, cls="num")` is `<td class="num">5</td>`.

  Children are text, `Markup`, or lists of these; None and "" are left out. Attributes of value None are, too;
  `cls` is written as `class`, and `_` in other names as `-`.
  """
  written = "".join(
    f' {"class" if key == "cls" else key.replace("_", "-")}="{html.escape(str(value))}"'
    for key, value in attributes.items()
    if value is not None
  )
  if name in ("meta", "img", "br"):
    return Markup(f"<{name}{written}>")
  return Markup(f"<{name}{written}>{fragment(children)}</{name}>")


def fragment(children: Any) -> Markup:
  """The children one after another, escaped where they are not `Markup`."""
  if isinstance(children, Markup):
    return children
  if isinstance(children, (list, tuple)):
    return Markup("".join(map(fragment, children)))
  return Markup("" if children is None else html.escape(str(children)))
