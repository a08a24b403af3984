"""Which part of which leaf is which tensor of a file, in both directions.

A layer of the file is a leaf of its own here, or a row of a leaf in which layers are stacked, or of a grouped one; an
expert is a row of a leaf too. Which, the shapes of the leaves tell, so the same table serves all of them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigjax.errors import UserError, few
from bigjax.weights.families import Family

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
  """One matrix or vector of a leaf: `leaf[lead]`."""

  leaf: str
  lead: tuple[int, ...]
  shape: Shape  # Of leaf[lead].


@dataclasses.dataclass(frozen=True)
class Link:
  """A tensor of the file is these parts of leaves, one after another in its outputs."""

  tensor: str
  slots: tuple[Slot, ...]
  turned: bool  # [out, in] there, [in, out] here.
  order: np.ndarray | None = None  # Output i here is output order[i] there.
  offset: float = 0.0  # What the values there are larger by.

  @property
  def axis(self) -> int:
    """The dimension of outputs, in the file."""
    return 0 if self.turned else len(self.slots[0].shape) - 1

  @property
  def shape(self) -> Shape:
    """That of the tensor."""
    shape = list(self.slots[0].shape[::-1] if self.turned else self.slots[0].shape)
    shape[self.axis] = sum(self.width(i) for i in range(len(self.slots)))
    return tuple(shape)

  def width(self, slot: int) -> int:
    """The number of outputs of one of the slots."""
    return self.slots[slot].shape[-1]

  def start(self, slot: int) -> int:
    """The output in the file that one of the slots begins at."""
    return sum(self.width(i) for i in range(slot))


def links(family: Family, options: Any, shapes: Mapping[str, Shape]) -> list[Link]:
  """Returns what ties every leaf to the tensors of a family, in the order of layers.

  Args:
    family: whose names.
    options: of the model.
    shapes: of its leaves, by name.

  Raises:
    UserError: The family has no place for a leaf.
  """
  places = _places(options, shapes)
  found = []
  for there, leaves in family.tensors.items():
    leaves = (leaves,) if isinstance(leaves, str) else leaves
    for layer in range(len(places)) if "{layer}" in there else (0,):
      named = [_resolve(leaf, places[layer], shapes) for leaf in leaves]
      if None in named:
        continue
      count = shapes[named[0][0]][len(named[0][1])] if "{expert}" in there else 1
      for expert in range(count):
        slots = tuple(
          Slot(name, (*lead, expert) if "{expert}" in there else lead, shapes[name][-_rank(name) :])
          for name, lead in named
        )
        turned = family.transposed and _rank(slots[0].leaf) == 2 and leaves[0].endswith("/kernel")
        order = _order(family, options, leaves[0].removeprefix("{layer}/"))
        offset = family.offset if leaves[0].endswith("scale") else 0.0
        found.append((layer, Link(there.format(layer=layer, expert=expert), slots, turned, order, offset)))
  found = [link for _, link in sorted(found, key=lambda pair: pair[0])]
  held = {slot.leaf for link in found for slot in link.slots}
  over = [name for name in shapes if name not in held and not name.endswith("/load")]
  if over:
    raise UserError(f"{family.architecture} has no place for {few(over)}.")
  return found


def _rank(name):
  """The dimensions of a leaf without those that count layers or experts."""
  return 2 if name.endswith(("/kernel", "/embedding")) else 1


def _places(options, shapes):
  """The stack that each layer is in, and its number there."""
  kinds = getattr(options, "kinds", (None,) * options.depth)
  first = getattr(options, "first_dense", 0)
  last = len({n.split("/")[1] for n in shapes if n.startswith("last_blocks/")})
  apart = any(n.startswith("dense_blocks/") for n in shapes)
  found, seen = [], {}
  for i, kind in enumerate(kinds):
    early, late = i < first, i >= len(kinds) - last
    stack = "first_blocks" if early else "last_blocks" if late else "blocks"
    stack = "dense_blocks" if stack == "blocks" and apart and not kind.routed else stack
    found.append((stack, seen.get(stack, 0)))
    seen[stack] = found[-1][1] + 1
  return found


def _resolve(leaf, place, shapes):
  """The leaf that is meant here and the row of it, or None."""
  if not leaf.startswith("{layer}/"):
    return (leaf, ()) if leaf in shapes else None
  (stack, number), rest = place, leaf.removeprefix("{layer}/")
  if (single := f"{stack}/{number}/{rest}") in shapes:
    return single, ()
  if (stacked := f"{stack}/{rest}") in shapes:
    base = _rank(rest) + ("/experts/" in f"/{rest}")
    counts = shapes[stacked][: len(shapes[stacked]) - base]
    return stacked, tuple(int(i) for i in np.unravel_index(number, counts))
  return None


def _order(family, options, leaf):
  if leaf not in family.interleaved:
    return None
  sizes = {"kv_count": getattr(options, "kv_heads", None) or options.heads}
  number = lambda v: v if isinstance(v, int) else sizes[v] if v in sizes else getattr(options, v)
  heads, still, turning = map(number, family.interleaved[leaf])
  one = np.concatenate([np.arange(still), still + np.arange(turning).reshape(-1, 2).T.reshape(-1)])
  return (np.arange(heads)[:, None] * (still + turning) + one[None]).reshape(-1)


def match(found: list[Link], tensors: Mapping[str, Any], family: Family, where: str) -> tuple[list[str], list[str]]:
  """Returns the name that each link's tensor has in a file, and the names of what is left over and isn't ignored.

  Raises:
    UserError: Tensors are missing or of another shape.
  """
  renamed = lambda name, p: p + name.removeprefix(family.prefix) if name.startswith(family.prefix) else name
  hits = lambda p: sum(renamed(link.tensor, p) in tensors for link in found)
  prefix = max((family.prefix, *family.prefixes), key=hits)
  names = {id(link): renamed(link.tensor, prefix) for link in found}
  missing = [names[id(link)] for link in found if names[id(link)] not in tensors]
  lines = [f"  - {name}  is missing" for name in missing]
  lines += [
    f"  ! {name}  {list(tensors[name].shape)} in {tensors[name].file}, {list(link.shape)} by the config"
    for link in found
    if (name := names[id(link)]) in tensors and tuple(tensors[name].shape) != link.shape
  ]
  used = set(names.values())
  over = [n for n in tensors if n not in used and not re.fullmatch(family.ignored, n)]
  if lines:
    lines += [f"  + {name}  is over" for name in over]
    more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
    raise UserError(f"{where} is not of this model ({family.architecture}):\n" + "\n".join(lines[:20]) + more)
  return [names[id(link)] for link in found], over
