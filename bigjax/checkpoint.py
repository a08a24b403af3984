"""Saving and restoring a state with Orbax: in the background, atomically, onto any layout.

Nothing else in the package knows Orbax. A checkpoint is the state (step, params, extras, opt_state by name) and a small
JSON of what the loop itself remembers (best metric so far). It is complete or it is not there. It says nothing of the
devices it was saved from, and the layers of a deep model may be stacked in it or not: see stacks.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bigjax import paths, stacks
from bigjax.errors import UserError

policies = ocp.checkpoint_managers

CHUNK = 64 * 2**20  # Bytes of a leaf that are read as one: else a device reads all that another one has written.
AT_ONCE = 256 * 10**6  # Bytes under way from disk to devices, of each process.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
  """Which checkpoints stay: the last ones, one every so often, and the best by a metric."""

  last: int = 1
  every: int | None = None  # Steps.
  best: str | None = None  # A metric such as "val/accuracy"; the state is saved whenever it improves.
  mode: str = "max"


class Checkpoints:
  """The checkpoints of one run, under `workdir/checkpoints`."""

  def __init__(self, workdir: str, keep: Keep = Keep(), *, read_only: bool = False, where: str = "--workdir"):
    self._where = where  # What the directory was named by, for messages.
    self.directory = os.path.join(os.path.abspath(workdir), "checkpoints")
    sign = 1 if keep.mode == "max" else -1
    rules = [policies.LatestN(keep.last)]
    rules += [policies.EveryNSteps(keep.every)] if keep.every else []
    # What was the best by another metric, before the config changed, is no candidate.
    self._of = f"{keep.mode} {keep.best}"
    value = lambda metrics: metrics["best"] if metrics.get("of", self._of) == self._of else -np.inf
    best = policies.BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False)
    rules += [best] if keep.best else []
    self._keep, self._sign = keep, sign
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(rules),
      best_fn=value if keep.best else None,
      create=not read_only,
      read_only=read_only,
      cleanup_tmp_directories=not read_only,
      step_format_fixed_length=8,
    )
    if read_only and not os.path.isdir(self.directory):
      raise UserError(f"{where}={workdir} holds no checkpoints; train there first, or name another directory.")
    handlers = {"state": ocp.StandardCheckpointHandler(), "loop": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(self, step: int, state, loop: Mapping[str, Any], metric: float | None = None) -> None:
    """Copies the state off the devices, and writes it in the background."""
    if step in self._manager.all_steps():
      return
    best = {"best": -np.inf if metric is None else self._sign * metric, "of": self._of}
    metrics = best if self._keep.best else None
    tree = _by_name(state)
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), tree)
    args = ocp.args.Composite(state=ocp.args.StandardSave(tree, chunks), loop=ocp.args.JsonSave(dict(loop)))
    self._manager.save(step, args=args, metrics=metrics, force=True)

  def restore(self, abstract, shardings, step: int | None = None):
    """Returns (state, loop) of the last checkpoint or of `step`, laid out as `shardings`; None where there is none.

    Each device reads what it is to hold, a bounded part at a time; layers in another form than wanted take one leaf
    more.

    Raises:
      UserError: The checkpoint's leaves are not those of `abstract`; the message shows the difference.
      OSError: The checkpoint is damaged.
    """
    step = self._pick(step)
    if step is None:
      return None
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    there = {n: jax.ShapeDtypeStruct(tuple(m.shape), np.dtype(m.dtype)) for n, m in _named(self._tree(step))}
    wanted = dict(_named(target))
    conversions = stacks.conversions(there, wanted)
    self._compare(step, there, wanted, conversions)
    with self._damage_said(step):
      loop = self._manager.restore(step, args=ocp.args.Composite(loop=ocp.args.JsonRestore())).loop
    made = {n for c in conversions for n in c.targets}
    leaves = self._load(step, {n: x for n, x in wanted.items() if n not in made})
    for group in _groups(conversions, there):
      sources = self._load(step, {n: x for c in group for n, x in stacks.sources(c, there, wanted).items()})
      for c in group:
        made = stacks.convert(c, [sources.pop(n) for n in c.sources], [wanted[n] for n in c.targets])
        leaves |= zip(c.targets, jax.block_until_ready(made), strict=True)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[n] for n in wanted]), loop

  def read(self, step: int | None = None, only: tuple[str, ...] = ("",)) -> dict[str, np.ndarray]:
    """Returns the leaves of a checkpoint whose path begins with one of `only`, by their path, on the host."""
    step = self._pick(step)
    if step is None:
      raise UserError(f"There is no checkpoint in {self.directory}.")
    found = {n: m for n, m in _named(self._tree(step)) if n.startswith(only)}
    shapes = _nested({n: jax.ShapeDtypeStruct(tuple(m.shape), np.dtype(m.dtype)) for n, m in found.items()})
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    args = ocp.args.PyTreeRestore(shapes, restore_args=as_numpy, partial_restore=True)
    with self._damage_said(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      return dict(_named(reader.restore(os.path.join(self._step_dir(step), "state"), args=args)))

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_) -> None:
    self._manager.wait_until_finished()
    self._manager.close()

  def _pick(self, step):
    steps = self.steps()
    if step is not None and step not in steps:
      raise UserError(
        f"{self._where.removesuffix('workdir')}step={step}: {self.directory} has checkpoints of steps "
        f"{', '.join(map(str, steps)) or 'none'}."
      )
    return step if step is not None else (steps[-1] if steps else None)

  def _step_dir(self, step):
    return os.path.join(self.directory, f"{step:08d}")

  def _tree(self, step):
    """What the checkpoint says of each leaf."""
    with self._damage_said(step):
      return self._manager.item_metadata(step).state.tree

  @contextlib.contextmanager
  def _damage_said(self, step):
    """What is complete or not there was complete once: what can't be read of it now was lost later."""
    try:
      yield
    except (AttributeError, KeyError, OSError, ValueError) as e:
      reason = " ".join(str(e).split())[:300]
      raise OSError(
        f"The checkpoint {self._step_dir(step)} is damaged ({reason}). Bring it back from a copy, or move it away to "
        f"go on from an earlier one; there are those of steps {', '.join(map(str, self.steps()))}."
      ) from e

  def _load(self, step, leaves):
    """Returns some leaves by name, read in the shapes and layouts given."""
    if not leaves:
      return {}
    tree = _nested(leaves)
    limit = max(AT_ONCE, 2 * max(map(_size, leaves.values())))  # A leaf has to fit.
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
    args = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=limit / 10**9)
    with self._damage_said(step), ocp.Checkpointer(handler) as reader:
      return dict(_named(reader.restore(os.path.join(self._step_dir(step), "state"), args=args)))

  def _compare(self, step, there, wanted, conversions):
    """Restoring is strict: every leaf there, none over, shapes and types equal, but for layers stacked otherwise."""
    done = {n for c in conversions for n in (*c.sources, *c.targets)}
    there, wanted = ({n: (x.shape, np.dtype(x.dtype)) for n, x in t.items() if n not in done} for t in (there, wanted))
    show = lambda leaf: f"{leaf[1]}{list(leaf[0])}"
    lines = [f"  - {n}  {show(there[n])}  in the checkpoint only" for n in there if n not in wanted]
    lines += [f"  + {n}  {show(wanted[n])}  in this config only" for n in wanted if n not in there]
    lines += [
      f"  ! {n}  checkpoint {show(there[n])}, config {show(wanted[n])}"
      for n in wanted
      if n in there and there[n] != wanted[n]
    ]
    if lines:
      more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
      raise UserError(
        f"The checkpoint of step {step} in {self.directory} is not of this config's state:\n"
        + "\n".join(lines[:20])
        + more
        + "\nUse another --workdir, the config it was made with, or config.init_from to take parts of it."
      )


def _groups(conversions, there):
  """Parts of the list that read few bytes compared to what may be under way, or a single conversion that reads more."""
  group, size = [], 0
  for c in conversions:
    more = sum(_size(there[n]) for n in c.sources) / jax.process_count()
    if group and size + more > AT_ONCE // 4:
      yield group
      group, size = [], 0
    group, size = [*group, c], size + more
  if group:
    yield group


def _size(leaf):
  return math.prod(leaf.shape) * leaf.dtype.itemsize


def _by_name(state) -> dict[str, Any]:
  """The state as nested dicts by name: what a checkpoint holds, whatever Python classes it was made of."""
  return _nested(dict(_named(state)))


def _nested(leaves):
  root: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = root
    for part in parents:
      node = node.setdefault(part, {})
    node[last] = leaf
  return root


def _named(tree):
  return list(zip(paths.names(tree), jax.tree.leaves(tree), strict=True))
