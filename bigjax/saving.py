"""One save: each process writes its part, process 0 makes a checkpoint of them, and all learn how it ended.

The state is copied off the devices at once; the rest happens in a thread. A process that can't write says so to process
0, which then makes no checkpoint, instead of leaving the others to wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from bigjax import commits, digests, hosts

CHUNK = 64 * 2**20  # Bytes of a leaf that are read as one: else a device reads all that another one has written.
LIMIT = 1200  # Seconds that a process may take to write its part, and then process 0 for all of them.

_numbers = itertools.count()  # Every process begins the same saves in the same order.


class Save:
  """A checkpoint that is being written into `directory`."""

  def __init__(
    self,
    step: int,
    directory: epath.Path,
    tree: Mapping[str, Any],
    commit: Callable[[Mapping[str, digests.Digest]], None],
    before: Save | None = None,
  ):
    """Copies `tree` off the devices, and goes on in the background.

    Args:
      step: Of which it is the state.
      directory: Where all processes write.
      tree: The state by name.
      commit: For process 0, at the end, with the digests that are known already.
      before: The last save into the same place, over by now.
    """
    self.step, self._directory, self._commit = step, directory, commit
    self._name, self._before = f"save/{next(_numbers)}", before and before._name
    self._handler = ocp.PyTreeCheckpointHandler()
    self._failure: str | None = None
    try:
      self._parts = _in_a_loop(lambda: self._handler.async_save(directory / commits.STATE, args=_how(tree)))
    except Exception as e:  # Whatever it is, this process's part is not there, and the others have to know.
      self._parts, self._failure = [], said(e)
    self._thread = threading.Thread(target=self._run, name="bigjax-save")
    self._thread.start()

  def ended(self, seconds: float | None = None) -> bool:
    """Whether it's over, after waiting for that for so long; None: until it is."""
    self._thread.join(seconds)
    return not self._thread.is_alive()

  @property
  def failure(self) -> str | None:
    """Why there is no checkpoint; None if there is one. To be asked once it's over."""
    return self._failure

  def _run(self):
    for part in self._parts:
      try:
        part.result(timeout=LIMIT)
      except Exception as e:
        self._failure = self._failure or said(e)
    self._parts = []  # They hold what was copied.
    try:
      if jax.process_count() == 1:
        self._finish({})
      elif jax.process_index() == 0:
        files = self._written()
        for other in range(1, jax.process_count()):
          report = hosts.told(f"{self._name}/{other}", LIMIT)
          self._failure = self._failure or (report["failure"] and f"{report['failure']} (on process {other})")
          files |= report["files"]
        self._finish(files)
        hosts.tell_all(f"{self._name}/all", self._failure)
        if self._before:  # All have read how that one ended, or they would not have come here.
          hosts.forget(self._before)
      else:
        report = {"files": self._written(), "failure": self._failure}
        hosts.tell_all(f"{self._name}/{jax.process_index()}", report)
        self._failure = hosts.told(f"{self._name}/all", 3 * LIMIT)
    except Exception as e:
      self._failure = self._failure or said(e)

  def _written(self):
    """The digests of the files of this process alone."""
    name = f"{commits.STATE}/ocdbt.process_{jax.process_index()}"
    try:
      there = self._failure is None and (self._directory / name).exists()
      return {f"{name}/{n}": d for n, d in digests.take(self._directory / name).items()} if there else {}
    except OSError as e:
      self._failure = said(e)
      return {}

  def _finish(self, files):
    """Process 0 makes a checkpoint of all parts, or takes away those there are."""
    try:
      if self._failure is None:
        self._handler.finalize(self._directory / commits.STATE)
        self._commit(files)
    except Exception as e:
      self._failure = said(e)
    if self._failure is not None:
      with contextlib.suppress(OSError):  # The disk is what failed; the next start sweeps.
        self._directory.rmtree()


def said(error: BaseException) -> str:
  """Returns an error in one line; of the operating system's, what it says."""
  text = " ".join(str(error).split())
  number = error.errno if isinstance(error, OSError) else None
  if found := re.search(r"os_error_code='(\d+)'", text):  # So says the array library.
    number = int(found[1])
  if number:
    return os.strerror(number)
  return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _how(tree):
  chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), tree)
  return ocp.args.PyTreeSave(tree, chunks)


def _in_a_loop(call):
  """Runs the coroutine that `call` makes where no loop runs yet, as one does in a notebook's main thread."""
  found: dict[str, Any] = {}

  def run():
    loop = asyncio.new_event_loop()
    try:
      found["parts"] = loop.run_until_complete(call()) or []
    except BaseException as e:
      found["error"] = e
    finally:
      loop.close()

  thread = threading.Thread(target=run, name="bigjax-copy")
  thread.start()
  thread.join()
  if "error" in found:
    raise found["error"]
  return found["parts"]
