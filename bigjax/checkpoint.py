"""Saving and restoring a state with Orbax: in the background, atomically, verified, onto any layout.

A checkpoint is the state by name, a small JSON of what the loop itself remembers, and digests of every file. It is
complete or it is not there (commits.py); nothing is read that is not what was written (digests.py); a save that fails
ends nothing (saving.py). It says nothing of the devices it was saved from, and the layers of a deep model may be
stacked in it or not (stacks.py). Only this file and saving.py know Orbax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from bigjax import appended, bundles, commits, hosts, paths, stacks, stores, workdirs
from bigjax.commits import Damaged, Keep
from bigjax.errors import UserError, say
from bigjax.saving import Save, said

AT_ONCE = 256 * 10**6  # Bytes under way from disk to devices, of each process.
PATIENCE = 300.0  # Seconds that the loop waits for a disk that is slow, before it goes on without the next checkpoint.
PAUSES = (1, 2, 4)  # Seconds between attempts to save what must be saved before the run ends.
BACK_OFF = (10, 600)  # Seconds until the first attempt after one that failed, and the most there are after many.


class Checkpoints:
  """The checkpoints of one run, under `workdir/checkpoints`."""

  def __init__(
    self,
    workdir: str,
    keep: Keep | None = None,
    *,
    read_only: bool = False,
    where: str = "--workdir",
    note: Callable[[str], None] | None = None,
  ):
    """Opens them; process 0 takes away what a run left that was killed.

    Args:
      workdir: The directory of the run.
      keep: Which stay.
      read_only: Nothing is written, renamed or made.
      where: What `workdir` was named by, for messages.
      note: Called with a line for each thing a person should know, on process 0; prints it by default.
    """
    self._where, self._keep, self._note = where, keep or Keep(), note or say
    self._workdir, self._root = workdir, stores.place(workdirs.home(workdir)) / "checkpoints"
    self.directory = str(self._root)
    self._known: dict[int, commits.Manifest] = {}
    self._intact: set[int] = set()  # Those that were verified here.
    self._saving: Save | None = None
    self._saved: Save | None = None
    self._failures, self._reason, self._next_try = 0, "", 0.0
    if read_only and not self._root.is_dir():
      raise UserError(f"{where}={workdir} holds no checkpoints; train there first, or name another directory.")
    if not read_only and jax.process_index() == 0:
      self._root.mkdir(parents=True, exist_ok=True)
      commits.sweep(self._root)

  def steps(self, coming: bool = False) -> list[int]:
    """Returns the steps there are checkpoints of, damaged or not; with `coming`, that of one being written, too."""
    written = {self._saving.step} if coming and self._saving is not None else set()
    return sorted(written.union(commits.steps(self._root) if self._root.exists() else []))

  def newest(self) -> int | None:
    """Returns the newest step, damaged or not; every process has to call it, and gets the same."""
    return hosts.agreed(max(self.steps(), default=None))

  # Saving

  def save(
    self, step: int, state, loop: Mapping[str, Any], metric: float | None = None, *, insist: bool = False
  ) -> None:
    """Copies the state off the devices, and writes it in the background; every process has to call it.

    One that can't be written is said to be so, and nothing else happens: the next call tries again, `owed` says when.
    What is there stays until something newer is complete.

    Args:
      step: Of which it is the state.
      state: Any pytree of arrays.
      loop: What the loop remembers, as JSON has it.
      metric: What it may be the best by.
      insist: Wait until it's there, and try again a few times if it can't be written.

    Raises:
      OSError: It can't be written, and `insist` says it has to be.
    """
    self._attempt(step, state, loop, metric, insist)
    if insist:
      self.settle()
      for pause in PAUSES:
        if self._failures:
          time.sleep(pause)
          self._attempt(step, state, loop, metric, insist)
          self.settle()
      self.wait()

  def owed(self) -> bool:
    """Whether a save failed and it's time to try again, at whatever step; a matter of nanoseconds, for the loop.

    Several processes would have to agree on it: they try again when the next checkpoint is due.
    """
    if (self._saving is None and not self._failures) or jax.process_count() > 1:
      return False
    if self._saving is not None:
      if not self._saving.ended(0.0):
        return False
      self.settle()
    return self._failures > 0 and time.monotonic() >= self._next_try

  def wait(self) -> None:
    """Waits for the last save.

    Raises:
      OSError: There is no checkpoint of what was to be saved last.
    """
    self.settle()
    if self._failures:
      raise OSError(
        f"No checkpoint could be written to {self.directory}: {self._reason}. {self._last()}; mend that and start the "
        "same command again."
      )

  def settle(self) -> None:
    """Returns when no save is under way any more, however the last one ended: one that failed is tried again later."""
    save, self._saving = self._saving, None
    if save is None:
      return
    save.ended()
    self._saved = save
    if save.failure is not None:
      self._failed(save.step, save.failure)
    elif self._failures:
      self._say(f"Checkpoints are written again: there is that of step {save.step}.")
      self._failures = 0

  def back_to(self, before: int) -> int:
    """Has the run go on from the newest checkpoint below step `before`, those above it are removed; returns its step.

    Where all are later, it's the first of them, and where there is none 0. Every process has to call it.
    """
    self.settle()
    steps = hosts.agreed(self.steps())
    target = max((s for s in steps if s < before), default=min(steps, default=0))
    if jax.process_index() == 0:
      for step in (s for s in steps if s > target):
        commits.remove(self._root, step)
    return target

  def amend(self, step: int, loop: Mapping[str, Any], metric: float | None = None) -> None:
    """Has the checkpoint of a step remember what was found about it later, and what it may be the best by."""
    appended.settle()
    if jax.process_index() == 0:
      manifest = dataclasses.replace(self._manifest(step), **self._said(loop, metric))
      commits.amend(self._root, manifest)
      self._known[step] = manifest
      self._prune(step)

  def _attempt(self, step, state, loop, metric, insist):
    if insist and self._saving is not None:
      self._saving.ended()
    # All or none begin: what Orbax does on one process may wait for what it does on another.
    unsettled = [reason for reason in hosts.gathered(appended.unsettled()) if reason]
    decision = hosts.agreed(self._decide(step, insist, unsettled) if jax.process_index() == 0 else None)
    if "directory" in decision or "failure" in decision:
      self.settle()
    if "failure" in decision:
      self._failed(step, decision["failure"])
    if "directory" in decision:
      directory = epath.Path(decision["directory"])
      manifest = commits.Manifest(step=step, **self._said(loop, metric))
      commit = lambda files: self._commit(directory, manifest, files)
      self._saving = Save(step, directory, _by_name(state), commit, self._saved)

  def _said(self, loop, metric):
    """What a checkpoint says of a step, but for its files."""
    rated = metric is not None and self._keep.best is not None
    return dict(
      loop=dict(loop),
      metric=metric * (1 if self._keep.mode == "max" else -1) if rated else None,
      of=commits.measure(self._keep) if rated else None,
      keep=dataclasses.asdict(self._keep),
    )

  def _decide(self, step, insist, unsettled):
    """Process 0 says where a checkpoint is written, or that none is and why; `unsettled` are reasons against it."""
    if self._saving is not None:
      if not self._saving.ended(PATIENCE):
        self._note(
          f"The checkpoint of step {self._saving.step} is still being written after {PATIENCE} s: the disk is slow. "
          f"Training goes on without one of step {step}."
        )
        return {}
      if jax.process_count() == 1:
        self.settle()
    try:
      if step in self.steps():
        return {}
      # Alone, it's tried again as soon as it's time to.
      alone = jax.process_count() == 1
      if self._failures and alone and not insist and time.monotonic() < self._next_try:
        return {}
      if unsettled:
        return {"failure": unsettled[0]}
      return {"directory": str(commits.begin(self._root, step, secrets.token_hex(4)))}
    except OSError as e:
      return {"failure": said(e)}

  def _failed(self, step, reason):
    self._failures, self._reason = self._failures + 1, reason
    first, most = BACK_OFF
    self._next_try = time.monotonic() + min(most, first * 2 ** min(self._failures - 1, 20))
    self._say(f"The checkpoint of step {step} could not be written: {reason}. {self._last()}; it is tried again.")

  def _last(self):
    try:
      steps = self.steps()
    except OSError:
      steps = []
    return f"The last one is that of step {steps[-1]}" if steps else "There is none yet"

  def _say(self, text):
    if jax.process_index() == 0:
      self._note(text)

  def _commit(self, directory, manifest, files):
    """On process 0, in the background: what was written is a checkpoint, and those that need not stay go."""
    workdirs.publish(self._workdir)  # What the run wrote so far is there before a checkpoint that goes on from it.
    made = commits.commit(directory, self._root, manifest, files)
    self._known[made.step] = made
    self._prune(made.step)

  def _prune(self, newest):
    try:
      why = commits.reasons(self._readable(self.steps()), self._keep, bundles.needed(self._workdir))
      for step in (s for s, reasons in why.items() if not reasons and s != newest):
        commits.remove(self._root, step)
    except OSError as e:
      self._note(f"Older checkpoints could not be removed: {said(e)}.")

  def _readable(self, steps):
    for step in steps:
      with contextlib.suppress(Damaged):  # Which is for a person to remove.
        yield self._manifest(step)

  # Verifying

  def latest(self) -> int | None:
    """Returns the newest step whose files are what was written, to go on from; None where there is no checkpoint.

    Every process has to call it, and gets the same. Those that are damaged get another name, and it is said so.

    Raises:
      Damaged: None is intact.
    """
    # A network's file system may show one host less than another.
    steps, damaged = hosts.agreed(self.steps()), {}
    for step in reversed(steps):
      lines = self._wrong(step)
      if not lines:
        if damaged and jax.process_index() == 0:
          self._set_aside(damaged, step)
        return step
      damaged[step] = lines
    if damaged:
      told = "".join(f"\n  step {s}: {commits.joined(lines)}" for s, lines in damaged.items())
      raise Damaged(
        f"No checkpoint in {self.directory} is intact:{told}\nBring one back from a copy; or remove them to start anew."
      )
    return None

  def verify(self, step: int) -> None:
    """Holds the files of a checkpoint against their digests; every process has to call it, and does a part.

    Raises:
      Damaged: They are not what was written.
    """
    if lines := self._wrong(step):
      raise self._damaged(step, commits.joined(lines))

  def _wrong(self, step) -> list[str]:
    if step not in self._intact:
      share = jax.process_index(), jax.process_count()
      lines = [line for part in hosts.gathered(commits.wrong(self._root, step, share)) for line in part]
      if lines:
        return list(dict.fromkeys(lines))
      if self._manifest(step).files is None:
        self._say(f"The checkpoint of step {step} was written before there were digests: it can't be verified.")
      self._intact.add(step)
    return []

  def _set_aside(self, damaged, step):
    for other, lines in damaged.items():
      aside = commits.set_aside(self._root, other)
      self._known.pop(other, None)
      self._note(
        f"The checkpoint of step {other} is damaged ({commits.joined(lines)}); it is {aside.name} now, and the run "
        f"goes on from that of step {step}."
      )

  def _damaged(self, step, reason):
    others = ", ".join(str(s) for s in self.steps() if s != step)
    return Damaged(
      f"The checkpoint {commits.place(self._root, step)} is damaged ({reason}). Bring it back from a copy, or take an "
      f"earlier one; there are those of steps {others or 'none'}."
    )

  # Restoring

  def restore(self, abstract, shardings, step: int | None = None):
    """Returns (state, loop) of the last checkpoint or of `step`, laid out as `shardings`; None where there is none.

    It is verified before anything is read. Each device reads what it is to hold, a bounded part at a time; layers in
    another form than wanted take one leaf more.

    Raises:
      UserError: The checkpoint's leaves are not those of `abstract`; the message shows the difference.
      Damaged: The checkpoint is not what was written.
    """
    step = self._pick(step)
    if step is None:
      return None
    self.verify(step)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    there = self.leaves(step)
    wanted = dict(_named(target))
    conversions = stacks.conversions(there, wanted)
    self._compare(step, there, wanted, conversions)
    made = {n for c in conversions for n in c.targets}
    leaves = self.load(step, {n: x for n, x in wanted.items() if n not in made})
    for group in _groups(conversions, there):
      sources = self.load(step, {n: x for c in group for n, x in stacks.sources(c, there, wanted).items()})
      for c in group:
        made = stacks.convert(c, [sources.pop(n) for n in c.sources], [wanted[n] for n in c.targets])
        leaves |= zip(c.targets, jax.block_until_ready(made), strict=True)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[n] for n in wanted]), self.loop(step)

  def read(self, step: int | None = None, only: tuple[str, ...] = ("",)) -> dict[str, np.ndarray]:
    """Returns the leaves of a checkpoint whose path begins with one of `only`, by their path, on the host."""
    step = self._pick(step)
    if step is None:
      raise UserError(f"There is no checkpoint in {self.directory}.")
    self.verify(step)
    return self._numpy(step, {n: m for n, m in self.leaves(step).items() if n.startswith(only)})

  def values(self, step: int, name: str) -> np.ndarray:
    """Returns one leaf of a checkpoint, on the host; `verify` comes first."""
    return self._numpy(step, {name: self.leaves(step)[name]})[name]

  def loop(self, step: int) -> dict[str, Any]:
    """Returns what the loop remembered."""
    return dict(self._manifest(step).loop)

  def _numpy(self, step, leaves):
    shapes = _nested(leaves)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    args = ocp.args.PyTreeRestore(shapes, restore_args=as_numpy, partial_restore=True)
    with self._damage_said(step):
      return dict(_named(ocp.PyTreeCheckpointHandler().restore(self._state(step), args=args)))

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind, *_) -> None:
    self.settle() if kind else self.wait()

  def _pick(self, step):
    steps = self.steps()
    if step is not None and step not in steps:
      raise UserError(
        f"{self._where.removesuffix('workdir')}step={step}: {self.directory} has checkpoints of steps "
        f"{', '.join(map(str, steps)) or 'none'}."
      )
    return step if step is not None else (steps[-1] if steps else None)

  def _manifest(self, step):
    if step not in self._known:
      try:
        self._known[step] = commits.read(self._root, step)
      except Damaged as e:
        raise self._damaged(step, said(e)) from e
    return self._known[step]

  def _state(self, step):
    return commits.place(self._root, step) / commits.STATE

  def _tree(self, step):
    """What the checkpoint says of each leaf."""
    with self._damage_said(step):
      return ocp.PyTreeCheckpointHandler().metadata(self._state(step)).tree

  @contextlib.contextmanager
  def _damage_said(self, step):
    """What is complete or not there was complete once: what can't be read of it now was lost later."""
    try:
      yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as e:  # The array library has no type of its own for it: some are bare.
      raise self._damaged(step, said(e)) from e

  def leaves(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of what is in a checkpoint, by its path."""
    return {n: jax.ShapeDtypeStruct(tuple(m.shape), np.dtype(m.dtype)) for n, m in _named(self._tree(step))}

  def load(self, step: int, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Returns some leaves by name, read in the shapes and layouts given; `verify` comes first."""
    if not leaves:
      return {}
    tree = _nested(leaves)
    limit = max(AT_ONCE, 2 * max(map(_size, leaves.values())))  # A leaf has to fit.
    restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
    args = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=limit / 10**9)
    with self._damage_said(step):
      return dict(_named(handler.restore(self._state(step), args=args)))

  def _compare(self, step, there, wanted, conversions):
    """Restoring is strict: every leaf there, none over, shapes and types equal, but for layers stacked otherwise."""
    done = {n for c in conversions for n in (*c.sources, *c.targets)}
    there, wanted = ({n: (x.shape, np.dtype(x.dtype)) for n, x in t.items() if n not in done} for t in (there, wanted))
    show = lambda leaf: f"{leaf[1]}{list(leaf[0])}"
    lines = [f"  - {n}  {show(there[n])}  in the checkpoint only" for n in there if n not in wanted]
    lines += [f"  + {n}  {show(wanted[n])}  in this config only" for n in wanted if n not in there]
    differ = [n for n in wanted if n in there and there[n] != wanted[n]]
    lines += [
      f"  ! {n}  checkpoint {show(there[n])}, config {show(wanted[n])}: another {_kind(there[n], wanted[n])}"
      for n in differ
    ]
    if lines:
      more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
      raise UserError(
        f"The checkpoint of step {step} in {self.directory} is not of this config's state:\n"
        + "\n".join(lines[:20])
        + more
        + "\nUse another --workdir, the config it was made with, or config.init_from to take parts of it, or all of it "
        "with changes (init_from.whole)."
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


def _kind(there, wanted):
  """In what two leaves (shape, type) differ."""
  sizes = [math.prod(shape) for shape, _ in (there, wanted)]
  kinds = ["precision"] if there[1] != wanted[1] else []
  kinds += ["size"] if sizes[0] != sizes[1] else ["layout"] if there[0] != wanted[0] else []
  return " and ".join(kinds)


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
