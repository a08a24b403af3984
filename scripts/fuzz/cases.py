"""Damages a copy of whole files, reads it as the program does, in a process of its own, and says how that ended.

refused    a `UserError`: one message that names what is wrong
the same   the same values as before
changed    other values, and nothing in the format by which that could be known
CHANGED    other values, though what was read has digests or checksums
UNCLEAR    refused in words that don't say what, or that go on for pages
CRASH      any other exception, or a signal
SLOW       no end within the limit
MEMORY     much more memory than what is read takes, or an allocation that failed
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import importlib
import io
import logging
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import damage
import numpy as np

from bigjax.errors import UserError

SECONDS = 20.0  # A case; they take milliseconds, on a machine that may do something else.
MEMORY = 2**31  # Address space above what a worker has when it has read the originals.
RESIDENT = 512 * 2**20  # Bytes that a case may come to need.
FINE = ("refused", "the same", "changed")
COLUMNS = (*FINE, "CHANGED", "UNCLEAR", "CRASH", "SLOW", "MEMORY")


@dataclasses.dataclass(frozen=True)
class Target:
  """A kind of file and the program's own reader of it."""

  name: str
  module: str  # Whose `TARGETS` has it; a process of its own imports that.
  make: Callable[[pathlib.Path], Any]  # Writes whole files into a folder.
  read: Callable[[pathlib.Path], Any]  # Reads them to the end; returns the values.
  kinds: Mapping[str, damage.Damage]
  files: tuple[str, ...] = ("*",)  # Which of them are damaged.
  sure: str | None = None  # Other values are a failure as long as there is such a file, with digests.
  said: str | None = None  # What a refusal has to match; by default it names a file or the folder.


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a case ended."""

  target: str
  case: int
  kinds: tuple[str, ...]
  outcome: str
  why: str


def run(targets: Mapping[str, Target], counts: Mapping[str, int], seed: int = 0, **limits: Any) -> list[Ended]:
  """Runs `counts` cases of each target, all in one process, which is made anew where it was lost."""
  found, worker = [], None
  with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
    for name, count in counts.items():
      opened = False
      for case in range(count):
        worker = worker or _Worker(pathlib.Path(scratch), seed, **limits)
        opened = opened or worker.open(targets[name])
        ended, alive = worker.case(case)
        found.append(ended)
        if not alive:
          worker, opened = worker.close(), False
    if worker:
      worker.close()
  return found


def table(found: Iterable[Ended]) -> str:
  """A line for each target."""
  tally = collections.Counter((e.target, e.outcome) for e in found)
  names = list(dict.fromkeys(e.target for e in found))
  width = max([len("all"), *map(len, names)])
  used = [c for c in COLUMNS if c in FINE or any(tally[n, c] for n in names)]
  lines = [f"{'read':<{width}}" + "".join(f"{c:>10}" for c in ("cases", *used))]
  for name in [*names, None]:
    row = [sum(tally[n, c] for n in names if name in (n, None)) for c in used]
    total = sum(v for (n, _), v in tally.items() if name in (n, None))
    lines.append(f"{name or 'all':<{width}}" + "".join(f"{n:>10,}" for n in (total, *row)))
  return "\n".join(lines)


class _Worker:
  """A process that reads one case after the other."""

  def __init__(self, scratch: pathlib.Path, seed: int, seconds: float = SECONDS, memory: int = MEMORY):
    context = multiprocessing.get_context("spawn")
    self._target, self._seconds = None, seconds
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, scratch, seed, memory), daemon=True)
    self._process.start()
    theirs.close()

  def open(self, target: Target) -> bool:
    """Has the whole files made and read."""
    self._target = target
    self._pipe.send((target.module, target.name))
    said = self._pipe.recv() if self._pipe.poll(600) else "no word within 600 s"
    if said is not None:
      self.close()
      raise RuntimeError(f"{target.name}: the whole files can't be read: {said}")
    return True

  def case(self, number: int) -> tuple[Ended, bool]:
    """Returns how a case ended, and whether the process is still there."""
    self._pipe.send(number)
    if not self._pipe.poll(self._seconds):
      return Ended(self._target.name, number, ("?",), "SLOW", f"nothing within {self._seconds:.0f} s"), False
    try:
      kinds, outcome, why = self._pipe.recv()
    except EOFError:
      self._process.join(10)
      return Ended(self._target.name, number, ("?",), "CRASH", f"exit code {self._process.exitcode}"), False
    return Ended(self._target.name, number, tuple(kinds), outcome, why), outcome != "MEMORY"

  def close(self) -> None:
    self._pipe.close()
    self._process.join(1)
    if self._process.exitcode is None:
      self._process.kill()
      self._process.join()


def _serve(pipe, scratch, seed, memory):
  """What the worker does."""
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  logging.disable(logging.CRITICAL)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # What libraries of C say of each image.
  opened = None
  with contextlib.suppress(EOFError, BrokenPipeError):
    while True:
      asked = pipe.recv()
      if isinstance(asked, int):
        pipe.send(_case(*opened, seed, asked))
        continue
      try:
        opened, problem = _opened(*asked, scratch, memory), None
      except BaseException:
        problem = traceback.format_exc()
      pipe.send(problem)


def _opened(module, name, scratch, memory):
  target = next(t for t in importlib.import_module(module).TARGETS if t.name == name)
  endless = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
  resource.setrlimit(resource.RLIMIT_AS, endless)
  scratch = scratch / re.sub(r"\W+", "_", name)
  if not (whole := scratch / "whole").exists():
    whole.mkdir(parents=True)
    target.make(whole)
  expected = fingerprint(target.read(whole))
  resource.setrlimit(resource.RLIMIT_AS, (_statm()[0] + memory, resource.RLIM_INFINITY))
  return target, scratch, whole, expected


def _case(target, scratch, whole, expected, seed, number):
  folder = scratch / "case"
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(whole, folder)
  draw = np.random.default_rng((seed, number, *target.name.encode()))
  kinds = damage.damaged(folder, draw, target.kinds, target.files)
  # The largest it has been would hide a second case behind the first.
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before = _peak()
  try:
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
      warnings.simplefilter("ignore")
      got = fingerprint(target.read(folder))
    sure = target.sure is not None and any(folder.rglob(target.sure))
    outcome, why = ("the same", "") if got == expected else ("CHANGED" if sure else "changed", "other values")
  except UserError as e:
    outcome, why = _judged(str(e), target, folder, whole), str(e)
  except MemoryError as e:
    outcome, why = "MEMORY", f"{e!r}\n{traceback.format_exc(limit=-3)}"
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as e:  # Panics of Rust are no Exception.
    outcome, why = "CRASH", f"{type(e).__name__}: {str(e)[:300]}\n{traceback.format_exc(limit=-3)}"
  if (grown := _peak() - before) > RESIDENT:
    outcome, why = "MEMORY", f"{grown / 2**20:.0f} MiB"
  return kinds, outcome, why


def _judged(said, target, folder, whole):
  names = {re.escape(f.name) for f in (*whole.rglob("*"), folder)}
  names |= {re.escape(str(folder.parent))}
  long = len(said) > 3000 or said.count("\n") > 40
  return "UNCLEAR" if long or not said.strip() or not re.search(target.said or "|".join(names), said) else "refused"


def fingerprint(value: Any) -> str:
  """A digest of arrays, texts and numbers in dicts and lists."""
  digest = hashlib.sha256()
  _feed(value, digest)
  return digest.hexdigest()


def _feed(value, digest):
  if isinstance(value, Mapping):
    value = [(str(k), value[k]) for k in sorted(value, key=str)]
  if isinstance(value, np.ndarray) and value.dtype != object:
    digest.update(f"{value.dtype}{value.shape}".encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  elif isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes)):
    digest.update(b"[")
    for one in value:
      _feed(one, digest)
    digest.update(b"]")
  else:
    digest.update(value if isinstance(value, bytes) else repr(value).encode(errors="replace"))
    digest.update(b",")


def _statm():
  page = resource.getpagesize()
  return [int(n) * page for n in pathlib.Path("/proc/self/statm").read_text().split()[:2]]


def _peak():
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])


def timed(since: float) -> str:
  return f"{time.perf_counter() - since:.0f} s"
