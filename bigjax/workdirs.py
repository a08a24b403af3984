"""A workdir in an object store, `gs://bucket/run`: a folder here stands for it while there is work on it.

Metrics and records are files that grow, which objects do not. So they are fetched, worked on here, and put back before
each checkpoint counts, which is in the store itself: what is there is enough to go on from on another machine. What a
killed run had not put back yet belongs to steps after its last checkpoint, which are taken again.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator

MARK = ".store.json"  # In a folder that stands for a store: which, and what was put there.


@contextlib.contextmanager
def opened(workdir: str) -> Iterator[str]:
  """Gives the folder to work in, which is put back at the end: the workdir itself, unless it's in a store."""
  folder = fetched(workdir)
  try:
    yield folder
  finally:
    publish(folder)


def fetched(workdir: str) -> str:
  """Returns a folder with the files of a workdir, but its checkpoints: itself, unless it's in a store."""
  if "://" not in workdir:
    return workdir
  from bigjax import stores

  remote, folder = stores.place(workdir), tempfile.mkdtemp(prefix="bigjax-")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  for path, name in _below(remote, ""):
    file = os.path.join(folder, name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "wb") as f:
      f.write(path.read_bytes())
  _write(folder, {"url": workdir, "published": _seen(folder)})
  return folder


def home(workdir: str) -> str:
  """Returns where the checkpoints of a workdir are: in it, or in the store that it stands for."""
  return _read(workdir)["url"] if "://" not in workdir and _stands_for_one(workdir) else workdir


def publish(folder: str) -> None:
  """Puts what changed into the store that a folder stands for, if it does; on process 0."""
  if "://" in folder or not _stands_for_one(folder):
    return
  from bigjax import hosts, stores

  if hosts.place()[0] != 0:
    return
  mark, now = _read(folder), _seen(folder)
  remote, before = stores.place(mark["url"]), mark["published"]
  for name in sorted(n for n in now if before.get(n) != now[n]):
    with open(os.path.join(folder, name), "rb") as f:
      (remote / name).write_bytes(f.read())
  for name in set(before) - set(now):
    (remote / name).unlink(missing_ok=True)
  _write(folder, mark | {"published": now})


def _below(directory, prefix):
  """The files of a workdir in a store, each with its name."""
  from bigjax import stores

  for path in stores.listed(directory):
    if path.is_dir():
      if prefix or path.name != "checkpoints":
        yield from _below(path, f"{prefix}{path.name}/")
    else:
      yield path, f"{prefix}{path.name}"


def _seen(folder) -> dict[str, list[int]]:
  """What tells whether a file changed, by its name; not of what is being written."""
  found = {}
  for where, _, files in os.walk(folder):
    for file in files:
      path = os.path.join(where, file)
      if file != MARK and not file.endswith(".tmp") and not file.startswith(".hosts-"):
        with contextlib.suppress(FileNotFoundError):
          stat = os.stat(path)
          found[os.path.relpath(path, folder)] = [stat.st_size, stat.st_mtime_ns]
  return found


def _stands_for_one(folder):
  return os.path.exists(os.path.join(folder, MARK))


def _read(folder):
  with open(os.path.join(folder, MARK), encoding="utf-8") as f:
    return json.load(f)


def _write(folder, mark):
  with open(os.path.join(folder, f"{MARK}.tmp"), "w", encoding="utf-8") as f:
    json.dump(mark, f)
  os.replace(os.path.join(folder, f"{MARK}.tmp"), os.path.join(folder, MARK))
