"""A process of a run with one fault in it: `python -m bigjax.chaos.worker FAULT.json train ...`.

The fault is put around functions of the package by name, from outside: nothing in the package knows of it. What it did
and when is written to the file that the fault's description names, one JSON a line.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
import threading
import time

FULL = 4096  # Bytes that a file may still have once the disk is "full".


def main(argv: list[str]) -> int:
  """Runs a command of bigjax with a fault in it; returns its exit code."""
  with open(argv[0], encoding="utf-8") as f:
    described = json.load(f)
  from bigjax import main as entrypoint

  strike = _Strike(described)
  strike.at("start")
  if argv[1] == "train":
    install(strike)
  code = entrypoint.main(argv[1:])
  strike.at("end")
  return code


class _Strike:
  """Counts moments, and strikes at the one that is meant."""

  def __init__(self, described):
    self._fault, self._log = described.get("fault"), described["log"]
    self._seen: dict[str, int] = {}
    self.poison = False  # The next batch is to be broken.

  def note(self, **said) -> None:
    with open(self._log, "a", encoding="utf-8") as f:
      f.write(json.dumps({"time": time.time(), **said}) + "\n")

  def at(self, moment: str) -> None:
    """A moment has come."""
    fault = self._fault
    self._seen[moment] = self._seen.get(moment, 0) + 1
    if fault is None or fault["moment"] != moment or fault["count"] != self._seen[moment]:
      return
    self._fault = None
    if fault["delay"]:
      threading.Timer(fault["delay"], self._do, [fault]).start()
    else:
      self._do(fault)

  def waits_for(self, moment: str) -> bool:
    return self._fault is not None and self._fault["moment"] == moment

  def _do(self, fault):
    self.note(struck=fault["kind"], step=self._seen.get("input", 0))
    kind = fault["kind"]
    if kind in ("SIGTERM", "SIGINT", "SIGKILL"):
      os.kill(os.getpid(), getattr(signal, kind))
    elif kind == "NaN":
      self.poison = True
    elif kind == "stall":
      time.sleep(3600)
    elif kind == "disk full":
      resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    else:  # Files are damaged once the process is gone.
      os.kill(os.getpid(), signal.SIGKILL)


def install(strike: _Strike) -> None:
  """Puts the moments into the training loop's parts."""
  from bigjax import checkpoint, evaluation, train

  def before(owner, name, moment):
    wrapped = getattr(owner, name)

    @functools.wraps(wrapped)
    def call(*args, **kwargs):
      strike.at(moment)
      return wrapped(*args, **kwargs)

    setattr(owner, name, call)

  before(train, "compile_step", "compile")
  before(checkpoint.Checkpoints, "restore", "restore")
  before(checkpoint.Checkpoints, "save", "save")
  before(evaluation.Evaluation, "run", "eval")

  started, batches = train.start, train.train_batches

  @functools.wraps(started)
  def start(*args, **kwargs):
    state, loop = started(*args, **kwargs)
    strike.note(start=int(state.step))
    return state, loop

  @functools.wraps(batches)
  def train_batches(*args, **kwargs):
    return _Batches(batches(*args, **kwargs), strike)

  train.start, train.train_batches = start, train_batches
  if strike.waits_for("commit"):
    threading.Thread(target=_watch_commits, args=(strike,), daemon=True).start()


class _Batches:
  """Batches as they are, but for the broken one."""

  def __init__(self, batches, strike):
    self._batches, self._strike = batches, strike

  def __enter__(self):
    self._batches.__enter__()
    return self

  def __exit__(self, *args):
    return self._batches.__exit__(*args)

  def __getattr__(self, name):
    return getattr(self._batches, name)

  def __iter__(self):
    return self

  def __next__(self):
    self._strike.at("input")
    batch = next(self._batches)
    if self._strike.poison:
      self._strike.poison = False
      import jax

      with jax.transfer_guard("allow"):
        batch = dict(batch) | {"mask": batch["mask"] * float("nan")}
    return batch


def _watch_commits(strike):
  """Notices files of a checkpoint that is not complete."""
  workdir = next(a.partition("=")[2] for a in sys.argv if a.startswith("--workdir="))
  directory, known = os.path.join(workdir, "checkpoints"), set()
  while strike.waits_for("commit"):
    names = os.listdir(directory) if os.path.isdir(directory) else []
    for name in names:
      if not name.isdigit() and name not in known:
        known.add(name)
        strike.at("commit")
    time.sleep(0.0005)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
