"""What a run writes down about itself: the resolved config, versions, git state, command and parameters.

A workdir belongs to one config. Opening it checks that, so that no run goes on under another's checkpoints.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bigjax import config as configs
from bigjax.errors import UserError, say

PACKAGES = (
    "bigjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy",
    "tensorflow-cpu", "tensorflow", "tensorflow-datasets", "ml-collections", "clu",
)  # fmt: skip

INCIDENTS = 200  # The last ones are kept.
PAUSES = (1, 2, 4)  # Seconds between attempts to write what must be written before a run ends.


def open_workdir(workdir: str, described: Mapping[str, Any], free: Sequence[str]) -> None:
  """Makes `workdir`, or checks that it holds a run of the same config; what is there stays as it is.

  Args:
    workdir: The directory of the run.
    described: The config, as `config.describe` gives it.
    free: Keys that may differ from the recorded ones, and all within them.
  """
  if "://" in workdir:
    raise UserError(
      f"--workdir={workdir}: only folders can be written here. The command bigjax train takes gs://; of another store, "
      "mount the bucket and name the folder."
    )
  try:
    os.makedirs(workdir, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as e:
    raise UserError(
      f"--workdir={workdir} can't be written: {e.strerror}. Name a directory of yours with space left."
    ) from e
  file = os.path.join(workdir, "config.json")
  if os.path.exists(file) and _has_results(workdir):
    may = lambda key: any(key == name or key.startswith(f"{name}.") for name in free)
    changes = [c for c in configs.diff(read_config(workdir), described) if not may(c[0])]
    if changes:
      lines = "\n".join(f"  {k}: {_show(a)} -> {_show(b)}" for k, a, b in changes[:20])
      raise UserError(
        f"--workdir={workdir} holds the run of another config (there -> here):\n{lines}\n"
        "Name another --workdir, or start from that run's parameters with config.init_from."
      )
  elif _has_results(workdir):
    raise UserError(f"--workdir={workdir} has a run's files but no config.json to tell whose; name another --workdir.")


def _has_results(workdir):
  """A run that was refused or fell over before it made anything holds nothing that could be lost."""
  metrics, checkpoints = os.path.join(workdir, "metrics.jsonl"), os.path.join(workdir, "checkpoints")
  return (os.path.exists(metrics) and os.path.getsize(metrics) > 0) or bool(
    os.path.isdir(checkpoints) and os.listdir(checkpoints)
  )


def _show(value):
  return "(not there)" if value is ... else repr(value)


def read_config(workdir: str) -> dict[str, Any]:
  """Returns the described config of a run."""
  file = os.path.join(workdir, "config.json")
  try:
    with open(file, encoding="utf-8") as f:
      return json.load(f)
  except FileNotFoundError:
    raise UserError(f"--workdir={workdir} holds no run: there is no config.json.") from None
  except (OSError, ValueError) as e:
    raise UserError(f"{file} can't be read: {e}") from e


def start(workdir: str, described: Mapping[str, Any], **facts: Any) -> None:
  """Writes config.json, and run.json: when, from what code, by which command; a resumed run adds to `starts`."""
  file = os.path.join(workdir, "run.json")
  before = read_run(workdir)
  starts = before.get("starts", [])
  command = [os.path.basename(sys.argv[0]) if i == 0 else a for i, a in enumerate(sys.argv)]
  run = {
    "command": command,
    "config_hash": configs.digest(described),
    "git": git_state(),
    "versions": versions(),
    "python": platform.python_version(),
    "starts": [*starts, now()],
    "started": starts[0] if starts else now(),
    "status": "running",
    **{k: before[k] for k in ("incidents",) if k in before},
    **facts,
  }
  write_json(os.path.join(workdir, "config.json"), described)
  write_json(file, run)


def finish(workdir: str, status: str, **facts: Any) -> None:
  """Notes in run.json how the run ended; insists where all else went well, as a disk may be full for a moment."""
  pauses = iter(() if status == "failed" else PAUSES)
  while True:
    run = read_run(workdir) | {"status": status, "finished": now(), **facts}
    try:
      return write_json(os.path.join(workdir, "run.json"), run)
    except OSError:
      if (pause := next(pauses, None)) is None:
        raise
      time.sleep(pause)


def noting(workdir: str) -> Callable[[str], None]:
  """Returns a function that tells a person a line at once, and keeps it in run.json under `incidents`."""

  def note(text: str) -> None:
    say(f"\r\x1b[K{text}" if sys.stderr.isatty() else text)
    with contextlib.suppress(OSError, UserError):  # It may be the disk that it tells of.
      run = read_run(workdir)
      incidents = [*run.get("incidents", []), {"time": now(), "what": text}][-INCIDENTS:]
      write_json(os.path.join(workdir, "run.json"), run | {"incidents": incidents})

  return note


@contextlib.contextmanager
def failure_noted(workdir: str) -> Iterator[None]:
  """Notes in run.json what ended a run that did not end by itself."""
  try:
    yield
  except BaseException as e:
    with contextlib.suppress(OSError, UserError):  # It may be the disk that ended it.
      finish(workdir, "failed", error=f"{type(e).__name__}: {str(e)[:1000]}")
    raise


def read_run(workdir: str) -> dict[str, Any]:
  """Returns run.json; empty where there is none."""
  file = os.path.join(workdir, "run.json")
  try:
    with open(file, encoding="utf-8") as f:
      return json.load(f)
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as e:
    raise UserError(f"{file} can't be read: {e}; mend it or remove it.") from e


def versions() -> dict[str, str]:
  """Versions of the packages that decide a result, without importing them."""
  found = {}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def git_state() -> dict[str, Any]:
  """The commit that the package's code is of, and whether it was changed; empty outside a repository."""
  here = os.path.dirname(os.path.abspath(__file__))

  def git(*args):
    return subprocess.run(
      ["git", "-C", here, *args], capture_output=True, text=True, timeout=20, check=True
    ).stdout.strip()

  try:
    return {"commit": git("rev-parse", "HEAD"), "changed_files": git("status", "--porcelain").splitlines()[:50]}
  except (OSError, subprocess.SubprocessError):
    return {}


def now() -> str:
  """Returns the time in UTC, to the second."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_json(file: str, value: Any) -> None:
  """Writes whole or not at all."""
  temporary = f"{file}.tmp"
  try:
    with open(temporary, "w", encoding="utf-8") as f:
      json.dump(value, f, indent=1)
      f.write("\n")
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, file)
  except OSError as e:
    with contextlib.suppress(OSError):
      os.remove(temporary)
    raise OSError(e.errno, f"{file} could not be written: {os.strerror(e.errno) if e.errno else e}") from e
