"""Saving and restoring a state with Orbax: in the background, atomically, onto any layout.

Nothing else in the package knows Orbax. A checkpoint is the state (step, params, extras, opt_state by name) and a small
JSON of what the loop itself remembers (best metric so far). It is complete or it is not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bigjax import paths
from bigjax.errors import UserError

policies = ocp.checkpoint_managers


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
    args = ocp.args.Composite(state=ocp.args.StandardSave(_by_name(state)), loop=ocp.args.JsonSave(dict(loop)))
    self._manager.save(step, args=args, metrics=metrics, force=True)

  def restore(self, abstract, shardings, step: int | None = None):
    """Returns (state, loop) of the last checkpoint or of `step`, laid out as `shardings`; None where there is none.

    Raises:
      UserError: The checkpoint's leaves are not those of `abstract`; the message shows the difference.
      OSError: The checkpoint is damaged.
    """
    step = self._pick(step)
    if step is None:
      return None
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    self._compare(step, abstract)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_by_name(target)), loop=ocp.args.JsonRestore())
    with self._damage_said(step):
      restored = self._manager.restore(step, args=args)
    leaves = dict(_named(restored.state))
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[n] for n in paths.names(abstract)]), restored.loop

  def read(self, step: int | None = None) -> dict[str, np.ndarray]:
    """Returns every leaf of a checkpoint by its path, on the host."""
    step = self._pick(step)
    if step is None:
      raise UserError(f"There is no checkpoint in {self.directory}.")
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), self._tree(step))
    with self._damage_said(step), ocp.PyTreeCheckpointer() as reader:
      tree = reader.restore(os.path.join(self._step_dir(step), "state"), restore_args=as_numpy)
    return dict(zip(paths.names(tree), jax.tree.leaves(tree), strict=True))

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

  def _compare(self, step, abstract):
    """Restoring is strict: every leaf there, none over, shapes and types equal."""
    there = {n: (tuple(m.shape), np.dtype(m.dtype)) for n, m in _named(self._tree(step))}
    wanted = {n: (tuple(x.shape), np.dtype(x.dtype)) for n, x in _named(_by_name(abstract))}
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


def _by_name(state) -> dict[str, Any]:
  """The state as nested dicts by name: what a checkpoint holds, whatever Python classes it was made of."""
  root: dict[str, Any] = {}
  for name, leaf in _named(state):
    *parents, last = name.split("/")
    node = root
    for part in parents:
      node = node.setdefault(part, {})
    node[last] = leaf
  return root


def _named(tree):
  return list(zip(paths.names(tree), jax.tree.leaves(tree), strict=True))
