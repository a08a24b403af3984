"""A checkpoint on disk: a directory that is complete or not there, and says itself what is in it.

It is written under another name beside its own. The last file, `checkpoint.json`, has what the loop remembered and the
digest of every other file, and of itself. Then the directory gets its name, at once; what was there before goes only
after that. Where names can't be changed at once, as in object stores, `checkpoint.json` is what completes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from bigjax import digests, stores

FILE = "checkpoint.json"
STATE = "state"  # Where the arrays are.
UNFINISHED = ".unfinished-"
# Errors that tell of what was written: it's gone, something else in its place, or the disk can't read it.
LOSSES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)


class Damaged(OSError):
  """A checkpoint is not what was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
  """Which checkpoints stay: the last ones, one every so often, and the best by a metric."""

  last: int = 2
  every: int | None = None  # Steps.
  best: str | None = None  # A metric such as "val/accuracy"; the state is saved whenever it improves.
  mode: str = "max"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What a checkpoint says of itself."""

  step: int
  time: str = ""  # When it was complete, in UTC.
  loop: Mapping[str, Any]  # What the loop remembered.
  metric: float | None = None  # What it is the best by; more is better.
  of: str | None = None  # And of which metric that is.
  keep: Mapping[str, Any] | None = None  # The rules of the run that it is of.
  files: Mapping[str, digests.Digest] | None = None  # None where it was written before there were digests.

  @property
  def size(self) -> int | None:
    """Bytes on disk."""
    return None if self.files is None else sum(size for size, _ in self.files.values())


def place(root: epath.Path, step: int) -> epath.Path:
  """Returns the directory of the checkpoint of `step`."""
  return root / f"{step:08d}"


def steps(root: epath.Path) -> list[int]:
  """Returns the steps of the checkpoints there are."""
  found = [p for p in stores.listed(root) if re.fullmatch(r"\d{8,}", p.name)]
  if stores.is_remote(root):
    found = [p for p in found if _is_complete(p)]
  return sorted(int(p.name) for p in found)


def begin(root: epath.Path, step: int, token: str) -> epath.Path:
  """Makes the directory that the checkpoint of `step` is written in."""
  if stores.is_remote(root):
    directory = place(root, step)
    if directory.exists():  # Without the file that completes it: what a run left that was killed.
      directory.rmtree()
  else:
    directory = root / f"{step:08d}{UNFINISHED}{token}"
  # Not the root: where that is gone, so is the disk, and its mount point is no place for checkpoints.
  directory.mkdir()
  (directory / STATE).mkdir()
  return directory


def commit(
  unfinished: epath.Path, root: epath.Path, manifest: Manifest, known: Mapping[str, digests.Digest] | None = None
) -> Manifest:
  """Makes what is in `unfinished` the checkpoint of its step; returns the manifest with digests, some `known`."""
  _make_durable(unfinished)
  manifest = dataclasses.replace(manifest, files=digests.take(unfinished, known), time=_now())
  _write(unfinished / FILE, _text(manifest))
  if not stores.is_remote(root):
    _sync(unfinished)
    os.rename(unfinished, place(root, manifest.step))
    _sync(root)
  return manifest


def amend(root: epath.Path, manifest: Manifest) -> None:
  """Has a checkpoint say what `manifest` does, all of it or none."""
  file = place(root, manifest.step) / FILE
  if stores.is_remote(root):
    _write(file, _text(manifest))
    return
  amended = root / f"{manifest.step:08d}{UNFINISHED}amended"
  _write(amended, _text(manifest))
  os.replace(amended, file)
  _sync(place(root, manifest.step))


def read(root: epath.Path, step: int) -> Manifest:
  """Returns what the checkpoint of `step` says of itself.

  Raises:
    Damaged: It is not there or can't be read, or is of another step.
  """
  directory = place(root, step)
  try:
    said = json.loads((directory / FILE).read_text())
    if said.pop("format") != 1:
      raise ValueError(f"{FILE} is of a later format")
    if said.pop("digest") != _digest(said):
      raise ValueError(f"{FILE} is not what was written")
    found = Manifest(**said | {"files": {n: (size, digest) for n, (size, digest) in said["files"].items()}})
  except FileNotFoundError:
    found = _of_old(directory, step)
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    _refuse_others(e)
    raise Damaged(f"{FILE}: {_one_line(e)}") from e
  if found.step != step:
    raise Damaged(f"it is that of step {found.step}")
  return found


def wrong(root: epath.Path, step: int, share: tuple[int, int] = (0, 1)) -> list[str]:
  """Returns what is wrong with the checkpoint of `step`, or with the i-th of n parts of it; nothing if it's intact.

  Raises:
    OSError: It can't be read at the moment, for a reason that says nothing of it.
  """
  try:
    files = read(root, step).files
    return [] if files is None else digests.wrong(place(root, step), files, share)
  except OSError as e:
    _refuse_others(e)
    return [_one_line(e)]


def set_aside(root: epath.Path, step: int) -> epath.Path:
  """Gives a damaged checkpoint another name, under which it is none; returns that."""
  for i in range(100):
    aside = root / f"{step:08d}.damaged{f'-{i}' if i else ''}"
    if not aside.exists():
      place(root, step).rename(aside)
      return aside
  raise OSError(f"There are 100 damaged checkpoints of step {step} in {root} already; remove some.")


def remove(root: epath.Path, step: int) -> None:
  """Removes a checkpoint such that half of one is none."""
  directory = place(root, step)
  if stores.is_remote(root):
    (directory / FILE).unlink(missing_ok=True)
  else:
    directory = directory.rename(root / f"{step:08d}{UNFINISHED}removed")
  directory.rmtree()


def sweep(root: epath.Path) -> None:
  """Removes what runs left that were killed while they wrote or removed."""
  for path in stores.listed(root):
    left = UNFINISHED in path.name or ".orbax-checkpoint-tmp" in path.name
    if left or (stores.is_remote(root) and re.fullmatch(r"\d{8,}", path.name) and not _is_complete(path)):
      with contextlib.suppress(OSError):  # It's in nobody's way.
        path.rmtree() if path.is_dir() else path.unlink()


def reasons(manifests: Iterable[Manifest], keep: Keep, needed: Mapping[int, str] | None = None) -> dict[int, list[str]]:
  """Returns why each checkpoint stays, by its step; those that needn't have no reason. `needed` are further ones."""
  found = sorted(manifests, key=lambda m: m.step)
  why: dict[int, list[str]] = {m.step: [] for m in found}
  for m in found[-keep.last :] if keep.last else []:
    why[m.step].append("last")
  for m in found:
    if keep.every and m.step % keep.every == 0:
      why[m.step].append(f"every {keep.every}")
  # What was the best by another metric, before the config changed, is no candidate.
  rated = [m for m in found if m.metric is not None and m.of == measure(keep)]
  if keep.best and rated:
    why[max(rated, key=lambda m: (m.metric, m.step)).step].append(f"best {keep.best}")
  for step in why.keys() & (needed or {}).keys():
    why[step].append(needed[step])
  return why


def measure(keep: Keep) -> str:
  """Returns what checkpoints are compared by."""
  return f"{keep.mode} {keep.best}"


def _refuse_others(error):
  """Raises an error of a disk that is gone or of a permission again: what was written may well be there."""
  if isinstance(error, OSError) and error.errno is not None and error.errno not in LOSSES:
    raise error


def _of_old(directory, step):
  """What there is to know of a checkpoint from before there were digests."""
  if not (directory / "_CHECKPOINT_METADATA").exists():
    raise Damaged(f"{FILE} is missing")
  try:
    said = json.loads((directory / "loop" / "metadata").read_text())
    metric = directory / "metrics" / "metrics"
    best = json.loads(metric.read_text()) if metric.exists() else {}
  except (OSError, ValueError) as e:
    _refuse_others(e)
    raise Damaged(_one_line(e)) from e
  return Manifest(step=step, loop=said, metric=best.get("best"), of=best.get("of"))


def _text(manifest):
  said = dataclasses.asdict(manifest)
  return json.dumps({"format": 1, **said, "digest": _digest(said)}, indent=1) + "\n"


def _digest(said: Mapping[str, Any]) -> str:
  return digests.of_text(json.dumps(said, sort_keys=True, separators=(",", ":")))


def _is_complete(directory):
  return (directory / FILE).exists() or (directory / "_CHECKPOINT_METADATA").exists()


def _write(path, text):
  with path.open("w") as file:
    file.write(text)
    if not stores.is_remote(path):
      file.flush()
      os.fsync(file.fileno())


def _make_durable(directory: epath.Path) -> None:
  """What is written reaches the disk itself before anything older goes."""
  if stores.is_remote(directory):
    return
  for folder, _, files in os.walk(directory):
    for path in (*(os.path.join(folder, f) for f in files), folder):
      _sync(path)


def _sync(path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _now():
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _one_line(error: BaseException) -> str:
  return " ".join(str(error).split())[:300] or type(error).__name__


def joined(lines: Sequence[str]) -> str:
  """Returns what is wrong in one line."""
  more = f" and {len(lines) - 2} more" if len(lines) > 2 else ""
  return "; ".join(lines[:2]) + more
