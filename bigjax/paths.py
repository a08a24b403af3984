"""Names of leaves, and rules that choose among them by first match.

A leaf is called by its keys joined with "/", such as `blocks/attn/query/kernel`. A rule starts with a regex that must
match the whole name; the first that does decides. Sharding, weight decay, freezing, learning rates and loading another
run's parameters all work by such rules. A rule that decides nothing is a typo or has been overtaken by the model, so
it is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from bigjax.errors import UserError

REQUIRED = object()  # In the place of a default: every leaf must be matched.


def names(tree: Any) -> list[str]:
  """Returns the name of every leaf, in the order of `jax.tree.leaves`."""
  import jax

  paths, _ = jax.tree.flatten_with_path(tree)
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def map_with_name(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """Like `jax.tree.map`, with the leaf's name as first argument: `fn(name, leaf, *others)`."""
  import jax

  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return jax.tree.map_with_path(lambda path, *leaves: fn(name(path), *leaves), tree, *rest)


def first_match(patterns: Sequence[str], names: Sequence[str], where: str) -> list[int | None]:
  """Returns for every name the index of the first pattern that matches the whole of it, or None.

  Raises:
    UserError: A pattern is no regex, or decides nothing: it matches no name, or only names that earlier ones took.
  """
  compiled = [_compile(p, f"{where}[{i}]") for i, p in enumerate(patterns)]
  chosen = [next((i for i, regex in enumerate(compiled) if regex.fullmatch(name)), None) for name in names]
  for i in sorted(set(range(len(patterns))) - set(chosen)):
    matched = {name: index for name, index in zip(names, chosen, strict=True) if compiled[i].fullmatch(name)}
    raise UserError(f"{where}[{i}]: {patterns[i]!r} {_reason(patterns, i, matched, names)}")
  return chosen


def match_tree(rules: Sequence[tuple[str, Any]], tree: Any, where: str, default: Any = REQUIRED) -> Any:
  """Returns a tree like `tree` with the value of the first of `rules` that matches a leaf's name, else `default`.

  Raises:
    UserError: As in `first_match`, or nothing matches a leaf and there is no default.
  """
  import jax

  leaves = names(tree)
  values = []
  for name, index in zip(leaves, first_match([r[0] for r in rules], leaves, where), strict=True):
    if index is None and default is REQUIRED:
      raise UserError(f"{where}: no rule matches {name!r}; end the list with a rule for '.*'.")
    values.append(default if index is None else rules[index][1])
  return jax.tree.unflatten(jax.tree.structure(tree), values)


def _compile(pattern, where):
  try:
    return re.compile(pattern)
  except (re.error, TypeError) as e:
    raise UserError(f"{where}: {pattern!r} is not a regular expression: {e}.") from None


def _reason(patterns, index, matched, names):
  """Says why the pattern at `index` decides nothing, and what to do about it."""
  if matched:
    earlier = ", ".join(repr(patterns[j]) for j in sorted(set(matched.values())))
    return f"is never reached: {earlier} before it takes {_some(list(matched))}; move it up or delete it."
  word = "".join(re.findall(r"[\w/]", re.sub(r"\\.", "", patterns[index])))
  part = [n for n in names if word and word in n]
  close = part or difflib.get_close_matches(word, names, n=3, cutoff=0.3)
  known = f"The closest are {_some(close)}." if close else f"There are {_some(list(names))}."
  hint = f" A rule must match the whole name: try '.*{word}.*'." if part else ""
  return f"matches no leaf. {known}{hint}"


def _some(names, limit=3):
  """The first few names, and how many more there are."""
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return (", ".join(map(repr, names[:limit])) or "none") + more
