"""A checkpoint taken into a state that is not quite its own: what may differ is asked for, and every change is said.

Leaves may have other names, be made anew or be left behind: the optimizer's, an average's. A head may have more
classes, a vocabulary more words: what both have is the checkpoint's, to the bit, and the rest is fresh. Numbers may be
wider or narrower. Layers may be stacked or not, which needs no asking (stacks.py).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigjax import paths, stacks
from bigjax.checkpoint import Checkpoints
from bigjax.errors import UserError, suggest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
  """What may differ; regexes match the whole path of a leaf, such as `params/head/kernel`."""

  rules: Sequence[tuple[str, str | None]] = ((".*", r"\g<0>"),)  # (leaf here, its name there or None: made anew).
  drop: Sequence[str] = ()  # Leaves there that are left behind.
  resize: Sequence[str] = ()  # Leaves here that may have other sizes there.
  cast: bool = False  # Other precisions.
  where: str = "config.init_from"  # What they were named by, for messages.


def take(
  checkpoints: Checkpoints, step: int, abstract: Any, shardings: Any, changes: Changes, fresh: Callable[[], Any]
) -> tuple[Any, list[str]]:
  """Returns (state, report): the checkpoint of `step` as a state like `abstract`, and a line for every change.

  Args:
    checkpoints: Where it is.
    step: Of which.
    abstract: Shapes of the state.
    shardings: Its layout.
    changes: What may differ.
    fresh: Makes a state anew, of which the leaves are that the checkpoint does not have.

  Raises:
    UserError: More differs; the message shows what, and the words that allow it.
  """
  wanted = _named(jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings))
  there = checkpoints.leaves(step)
  origin = _origins(wanted, changes)
  plan = _plan(there, wanted, origin, changes)
  leaves, loss = {}, _Loss()
  pending = plan.plain
  while pending:  # A leaf there may be several here, each of them an array of its own.
    turn = {origin[n]: n for n in reversed(pending)}
    loaded = checkpoints.load(step, {o: _with_dtype(wanted[n], there[o].dtype) for o, n in turn.items()})
    leaves |= {n: loss.cast(loaded.pop(o), wanted[n]) for o, n in turn.items()}
    pending = [n for n in pending if n not in leaves]
  by_origin = {origin[n]: wanted[n] for n in wanted if origin[n] is not None}
  back = {o: n for n, o in origin.items()}
  for c in plan.conversions:
    found = checkpoints.load(step, stacks.sources(c, there, by_origin))
    made = stacks.convert(c, [found.pop(n) for n in c.sources], [by_origin[n] for n in c.targets])
    for target, leaf in zip(c.targets, made, strict=True):
      leaves[back[target]] = loss.cast(leaf, wanted[back[target]])
  if plan.fresh or plan.resized:
    anew = _named(fresh())
    leaves |= {n: anew[n] for n in plan.fresh}
    for name in plan.resized:
      old = there[origin[name]]
      whole = _with_dtype(jax.ShapeDtypeStruct(old.shape, old.dtype, sharding=_everywhere(wanted[name])), old.dtype)
      part = loss.cast(checkpoints.load(step, {origin[name]: whole})[origin[name]], whole, wanted[name].dtype)
      leaves[name] = _put(anew[name], part, wanted[name].sharding)
    del anew
  report = plan.report + loss.report()
  return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[n] for n in wanted]), report


@dataclasses.dataclass
class _Plan:
  """How each leaf comes about."""

  plain: list[str]
  conversions: list[stacks.Conversion]
  resized: list[str]
  fresh: list[str]
  report: list[str]


def _origins(wanted, changes) -> dict[str, str | None]:
  """The name there of every leaf here."""
  where = f"{changes.where}.rules"
  chosen = paths.first_match([r[0] for r in changes.rules], list(wanted), where)
  if None in chosen:
    first = list(wanted)[chosen.index(None)]
    raise UserError(f"{where}: no rule matches {first!r}; add ('.*', None) to leave the rest fresh.")
  found = {}
  for name, index in zip(wanted, chosen, strict=True):
    regex, template = changes.rules[index]
    found[name] = None if template is None else re.fullmatch(regex, name).expand(template)
  return found


def _plan(there, wanted, origin, changes) -> _Plan:
  fits = lambda patterns, name: any(re.fullmatch(p, name) for p in patterns)
  # Layers in another form are found by shape; their precision is another matter.
  erased = lambda leaves: {n: jax.ShapeDtypeStruct(x.shape, _erased(x.dtype)) for n, x in leaves.items()}
  conversions = stacks.conversions(erased(there), erased({o: wanted[n] for n, o in origin.items() if o is not None}))
  source_of = {t: c.sources[0] for c in conversions for t in c.targets}
  made = {t: there[source].dtype for t, source in source_of.items()}
  used = {s for c in conversions for s in c.sources}
  plan, wrong = _Plan([], conversions, [], [], []), []
  if conversions:
    plan.report.append(f"{len(made)} leaves are the same layers in another form")
  for name, leaf in wanted.items():
    source = origin[name]
    if source is None:
      plan.fresh.append(name)
      plan.report.append(f"{name}: fresh")
      continue
    if source in made:
      if (old := made[source]) != leaf.dtype and not (changes.cast and _both_float(there[source_of[source]], leaf)):
        wrong.append(f"! {name}  checkpoint {old}, config {leaf.dtype}; cast=True")
      continue
    if source not in there:
      hint = suggest(source, there) if source != name else ""
      wrong.append(f"+ {name}  {_show(leaf)}  in this config only; rules=(({_escaped(name)!r}, None), ...).{hint}")
      continue
    used.add(source)
    old = there[source]
    if old.dtype != leaf.dtype and not (changes.cast and _both_float(old, leaf)):
      allow = "; cast=True" if _both_float(old, leaf) else ""
      wrong.append(f"! {name}  checkpoint {_show(old)}, config {_show(leaf)}{allow}")
    elif old.shape == leaf.shape:
      plan.plain.append(name)
      if source != name:
        plan.report.append(f"{name} <- {source}")
    elif len(old.shape) == len(leaf.shape) and fits(changes.resize, name):
      plan.resized.append(name)
      plan.report.append(f"{name}: {_resized(old.shape, leaf.shape)}")
    else:
      allow = f"; resize=({_escaped(name)!r},)" if len(old.shape) == len(leaf.shape) else ""
      wrong.append(f"! {name}  checkpoint {_show(old)}, config {_show(leaf)}{allow}")
  for name in there:
    if name not in used:
      if fits(changes.drop, name):
        plan.report.append(f"{name}: left behind")
      else:
        wrong.append(f"- {name}  {_show(there[name])}  in the checkpoint only; drop=({_escaped(name)!r},)")
  if wrong:
    more = f"\n  ... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
    raise UserError(f"{changes.where}: these differ, and this would allow them:\n  " + "\n  ".join(wrong[:20]) + more)
  return plan


def _resized(old: Sequence[int], new: Sequence[int]) -> str:
  both = tuple(map(min, old, new))
  kept, lost, fresh = math.prod(both), math.prod(old) - math.prod(both), math.prod(new) - math.prod(both)
  said = [f"{kept:,} values are the checkpoint's"]
  said += [f"{fresh:,} are fresh"] if fresh else []
  said += [f"{lost:,} of the checkpoint's are LOST"] if lost else []
  return f"{list(old)} -> {list(new)}: {', '.join(said)}"


def _put(fresh, part, sharding):
  """The fresh leaf with what both have taken from the other."""
  both = tuple(slice(0, min(a, b)) for a, b in zip(fresh.shape, part.shape, strict=True))
  return jax.jit(lambda fresh, part: fresh.at[both].set(part[both]), out_shardings=sharding)(fresh, part)


class _Loss:
  """What other precisions change."""

  def __init__(self):
    self._counts: dict[tuple[str, str], int] = {}
    self._most: dict[tuple[str, str], float] = {}

  def cast(self, leaf, like, dtype=None):
    dtype = np.dtype(dtype or like.dtype)
    if leaf.dtype == dtype:
      return leaf
    made = jax.jit(lambda x: x.astype(dtype), out_shardings=like.sharding)(leaf)
    change = jax.jit(lambda a, b: (jnp.abs(a - b.astype(a.dtype)).max(), jnp.abs(a).max()))
    most, size = (float(x) for x in change(leaf, made)) if leaf.size else (0.0, 1.0)
    kind = (str(leaf.dtype), str(dtype))
    self._counts[kind] = self._counts.get(kind, 0) + 1
    self._most[kind] = max(self._most.get(kind, 0.0), most / size if size else 0.0)
    return made

  def report(self) -> list[str]:
    said = lambda most: f"changes values by up to {most:.2g} of the largest of their leaf" if most else "loses nothing"
    return [f"{n} leaves {a} -> {b}: {said(self._most[a, b])}" for (a, b), n in self._counts.items()]


def _named(tree) -> dict[str, Any]:
  return dict(zip(paths.names(tree), jax.tree.leaves(tree), strict=True))


def _with_dtype(leaf, dtype):
  return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)


def _everywhere(leaf):
  """Sizes that a layout divides need not be those of the other leaf."""
  return NamedSharding(leaf.sharding.mesh, P()) if isinstance(leaf.sharding, NamedSharding) else leaf.sharding


def _erased(dtype):
  return np.dtype(np.float32) if jnp.issubdtype(dtype, jnp.floating) else np.dtype(dtype)


def _both_float(a: Any, b: Any) -> bool:
  return jnp.issubdtype(a.dtype, jnp.floating) and jnp.issubdtype(b.dtype, jnp.floating)


def _show(leaf):
  return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def _escaped(name):
  return re.sub(r"([.+*?()\[\]{}|^$\\])", r"\\\1", name)
