"""A process of a run with one fault in it: `python -m bigjax.chaos.worker FAULT.json train ...`.

The fault is put around methods of the package by name, from outside: nothing in the package knows of it. What it did
and when is written to the file that the fault's description names, one JSON a line.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import signal
import sys
import threading
import time

FULL = 4096  # Bytes that a file may still have once the disk is "full".
A_WHILE = 2.0  # Seconds for which it is, or the input is slow.


def main(argv: list[str]) -> int:
  """Runs a command of bigjax with a fault in it; returns its exit code."""
  with open(argv[0], encoding="utf-8") as f:
    described = json.load(f)
  strike = _Strike(described)
  strike.at("start")
  from bigjax import main as entrypoint

  if argv[1] == "train":
    install(strike)
  code = entrypoint.main(argv[1:])
  strike.at("end")
  return code


class _Strike:
  """Counts moments, and strikes at the one that is meant."""

  def __init__(self, described):
    self._fault, self._log, self._pids = described.get("fault"), described["log"], described.get("pids")
    self._seen: dict[str, int] = {}
    self._lock = threading.Lock()
    self.step: int | None = None  # The last one that was taken.
    self.poison = False  # The batch that is being made is to be broken.

  def note(self, **said) -> None:
    """Writes a line of the log."""
    line = json.dumps({"time": time.time(), **said}) + "\n"
    descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)

  def at(self, moment: str) -> None:
    """A moment has come."""
    with self._lock:
      fault = self._fault
      self._seen[moment] = self._seen.get(moment, 0) + 1
      if fault is None or fault["moment"] != moment or fault["count"] != self._seen[moment]:
        return
      self._fault = None
    if fault["delay"] and moment != "input":
      timer = threading.Timer(fault["delay"], self._do, [fault])
      timer.daemon = True  # A process that is done before has no fault.
      timer.start()
    else:
      self._do(fault)

  def _do(self, fault):
    kind = fault["kind"]
    self.note(struck=kind, step=self.step)
    if kind in ("SIGTERM", "SIGINT", "SIGKILL"):
      self._send(getattr(signal, kind), fault["processes"])
      if fault["moment"] == "input":  # The loop waits for what is slow just then.
        time.sleep(A_WHILE)
    elif kind == "freeze":
      os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "NaN":
      self.poison = True
    elif kind == "slow input":
      time.sleep(A_WHILE)
    elif kind == "stalled input":
      time.sleep(3600)
    elif kind == "SIGTERM in a stall":
      timer = threading.Timer(1.0, self._send, [signal.SIGTERM, fault["processes"]])
      timer.daemon = True
      timer.start()
      time.sleep(3600)
    elif kind.startswith("disk full"):
      before = resource.getrlimit(resource.RLIMIT_FSIZE)
      resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, before[1]))
      if kind == "disk full a while":
        timer = threading.Timer(A_WHILE, resource.setrlimit, [resource.RLIMIT_FSIZE, before])
        timer.daemon = True
        timer.start()
    else:  # Files are damaged once the process is gone.
      self._send(signal.SIGKILL, fault["processes"])

  def _send(self, number, processes):
    """Sends a signal to this process, and to the others that are to have it at the same moment, first."""
    if len(processes) > 1:
      while not os.path.exists(self._pids):  # It is written once all are started.
        time.sleep(0.001)
      with open(self._pids, encoding="utf-8") as f:
        pids = json.load(f)
      for pid in (pids[i] for i in processes if pids[i] != os.getpid()):
        with contextlib.suppress(ProcessLookupError):  # It is done.
          os.kill(pid, number)
    os.kill(os.getpid(), number)


def install(strike: _Strike) -> None:
  """Puts the moments around what the loop calls."""
  import jax

  from bigjax import checkpoint, commits, evaluation, experiment, ledger

  def around(owner, name, moment, then=None):
    wrapped = getattr(owner, name)

    @functools.wraps(wrapped)
    def call(*args, **kwargs):
      if then is None:
        strike.at(moment)
      result = wrapped(*args, **kwargs)
      if then is not None:
        then(*args)
        strike.at(moment)
      return result

    setattr(owner, name, call)

  def begun(book, workdir, plan, first, *_):
    strike.step = first
    strike.note(start=first)

  def taken(book, step):
    strike.step = step

  around(jax.stages.Lowered, "compile", "compile")
  around(checkpoint.Checkpoints, "restore", "restore")
  around(checkpoint.Checkpoints, "save", "save")
  around(evaluation.Evaluation, "run", "eval")
  for name in ("_sync", "_write", "remove"):
    around(commits, name, "commit")
  around(ledger.Ledger, "__init__", "begin", begun)
  around(ledger.Ledger, "note", "step", taken)

  checked = experiment.Experiment.checked

  @functools.wraps(checked)
  def made(run, batches):
    for batch in checked(run, batches):
      strike.at("input")
      if strike.poison:
        strike.poison = False
        batch = batch | {"mask": batch["mask"] * float("nan")}
      yield batch

  experiment.Experiment.checked = made


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
