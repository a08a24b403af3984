"""Stopping on request: SIGTERM, Ctrl-C, a notice that the machine is taken away, time that is up.

A request is heard by a thread, whatever the process is at. Before the first step is done there is nothing to save, and
the process leaves at once, also while it compiles or restores. From then on it is noticed between two steps, between
two batches of an evaluation, and while a batch does not come. Several processes stop at the same place whichever of
them is asked: through JAX's key-value store they tell each other how far they are, nobody goes on meanwhile, and the
next place is where they stop; or this one, if all of them wait for a batch.

Where only some do, the others' devices wait for them inside a step. The state before it can't be saved: it was given to
the step, to write the next one into, and keeping a copy of every state would double the memory. Nor can a batch be left
out by some. So whoever waits reads it anew: a batch is a function of its number, and what stands still is often one
connection, not what is at its other end. With it all come to the place where they stop. Where it does not come so
either, there is no state to save, and all leave with what was saved before.

JAX's own listener to SIGTERM does the last part only, and can't be left at once by a second signal.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from bigjax import peers
from bigjax.errors import STOPPED, say

# Seconds from the notice to the end: of a preempted VM (https://cloud.google.com/compute/docs/instances/preemptible),
# and of a pod unless it says otherwise (https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle).
GRACE = 30.0
POLL = 1.0  # Seconds between two looks at what the peers were asked.
NOTICE = 5.0  # Seconds between two looks at what the machine says.
SOON = 0.1  # Seconds between two looks while a batch does not come.
ANEW = 1.0  # Seconds after which a batch that the others wait for in a step is read anew.
PATIENCE = 15.0  # Seconds that a place to stop at may take to reach, where a batch of some process does not come.
TOGETHER = 0.3  # Seconds within which signals are one: schedulers send it to a process and to its group.


_numbers = itertools.count()  # Every process makes its stops in the same order.


class Stopped(Exception):
  """Raised out of an evaluation that a stop has cut short, or a wait for a batch."""


class Stops:
  """Hears requests while it is entered, and says where to stop.

  Args:
    hours: Asks by itself after so many hours from now.
    ends: Whether this is the process's own: then a request before there is something to save ends it with exit code
      75, and a second signal with 130 or 143. Else, as in a notebook, a second signal does what it did before.
  """

  def __init__(self, *, hours: float | None = None, ends: bool = False):
    self._hours, self.ends, self._began = hours, ends, time.monotonic()
    self._why, self._asked, self._signalled = None, 0.0, None
    self._saving = False  # Whether there is something to save.
    self._looks, self._at, self._lock, self._stopping = 0, None, threading.Lock(), False
    self._waits, self._here, self._decided = False, False, float("inf")  # For a batch; to stop without it; since when.
    self._thread, self._over, self._closed = None, threading.Event(), False
    self._told = f"bigjax/stop/{next(_numbers)}"

  def __enter__(self) -> Stops:
    here = threading.current_thread() is threading.main_thread()  # Python gives signals to no other.
    self._reading, self._writing = os.pipe()
    os.set_blocking(self._writing, False)
    self._thread = threading.Thread(target=self._run, name="bigjax-stops", daemon=True)
    self._thread.start()
    self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT) if here}
    # Written to by the operating system's handler, so that nothing the main thread waits for can hold a signal up.
    self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False) if here and self.ends else None
    return self

  def __exit__(self, *_) -> None:
    if self._wakeup is not None:
      signal.set_wakeup_fd(self._wakeup)
    for number, handler in self._before.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._closed = True
    self._over.set()
    self._wake()
    self._thread.join()
    os.close(self._reading)
    os.close(self._writing)

  @contextlib.contextmanager
  def heeded(self) -> Iterator[Stops]:
    """Within, there is something to save: requests are noticed by `look`. Listens too, if it does not yet.

    Entered again inside, as when a run goes back, it does nothing.
    """
    if self._saving:
      yield self
      return
    with contextlib.nullcontext() if self._thread else self:
      if not self._saving and peers.on_tpu_vm():
        threading.Thread(target=self._watch_machine, name="bigjax-notice", daemon=True).start()
      self._saving = True
      try:
        yield self
      finally:
        self._over.set()
        if group := _group(self._saving):  # A peer that is asked now would wait for an answer.
          with contextlib.suppress(Exception):
            self._tell_how_far(*group[:2])

  def look(self) -> bool:
    """Whether to stop here; to be called at the same places, equally often, by every process."""
    with self._lock:
      self._looks += 1
    self._stopping = self._at is not None and self._looks >= self._at
    return self._stopping

  def between(self, batches: Any) -> Iterator[Any]:
    """Yields the batches, as of `awaited`; raises `Stopped` where it is time to stop."""
    with contextlib.suppress(StopIteration):
      while True:
        batch = self.awaited(batches)
        if self.look():
          raise Stopped
        yield batch

  def awaited(self, batches: Any) -> Any:
    """Returns the next batch of a `pipeline.Ahead`; raises `Stopped` where it is time to stop and it does not come."""
    try:
      return batches.take(SOON)
    except queue.Empty:
      pass
    with self._lock:
      self._waits = True
    try:
      while not self._here:
        try:
          batch = batches.take(SOON)
          break
        except queue.Empty:
          self._lose_patience(batches)
    finally:
      with self._lock:
        self._waits = False
    if self._here:  # Also if the batch has come: the others stop here.
      self._stopping = True
      batches.abandon()
      raise Stopped
    return batch

  def _lose_patience(self, batches):
    """Where the others wait for this process in a step that it has no batch for: reads anew, at last ends the run."""
    late = 0.0 if self._at is None or self._here else time.monotonic() - self._decided
    if late > ANEW:
      batches.begin_again()
    if late > PATIENCE and self.ends:
      _, me, count = _group(True)
      why = f"stopped ({self._why}) with what was saved before: process {me} of {count} waits for input"
      sys.modules["bigjax.hosts"].end(STOPPED, f"{why}, and the others for it")

  def ask(self, why: str) -> None:
    """Asks the run to stop; from any thread."""
    if self._why is None:
      self._why, self._asked = why, time.monotonic()
      if self._saving and _group(True) is None:
        self._at, self._here = 0, True
    self._wake()

  def outcome(self) -> dict[str, Any]:
    """What is to be noted of a stop once all is saved; tells of one that took longer than machines are given."""
    if not self._stopping:
      return {}
    seconds = time.monotonic() - self._asked
    if seconds > GRACE:
      say(
        f"bigjax: it took {seconds:.0f} s from the request ({self._why}) until all was saved; a preempted VM is given "
        f"{GRACE:.0f} s. Save nearer (a faster disk for --workdir), or set config.keep.temporary."
      )
    return {"stop": {"why": self._why, "seconds_to_save": round(seconds, 3)}}

  def _handle(self, number, frame):
    del frame
    if self.ends:
      return  # The thread does it.
    self.ask(signal.Signals(number).name)
    signal.signal(number, self._before[number] or signal.SIG_DFL)

  def _wake(self):
    with contextlib.suppress(OSError):  # Full: it is awake then. Closed: it is over.
      os.write(self._writing, b"\0")

  def _run(self):
    while not self._over.is_set():
      ready, *_ = select.select([self._reading], [], [], POLL)
      for number in os.read(self._reading, 4096) if ready else b"":
        if number:
          self._hear(number)
      if self._hours is not None and time.monotonic() - self._began > 3600 * self._hours:
        self.ask(f"--max_hours={self._hours:g}")
      if self._at is None:
        group = _group(self._saving)
        self._decide_alone() if group is None else self._decide_together(*group)
    # Past the loop a request has nothing to stop; a person may still want out.
    while not self._closed and self.ends:
      for number in os.read(self._reading, 4096):
        if number:
          self._hear(number)

  def _hear(self, number):
    name, now = signal.Signals(number).name, time.monotonic()
    if self._signalled is None:
      self._signalled = now
      self.ask(name)
    elif now - self._signalled > TOGETHER:
      _leave(128 + number, f"left at once, at a second signal ({name}); what was not saved is lost")

  def _decide_alone(self):
    if self._why is None:
      return
    if self.ends and (not self._saving or (self._waits and not self._looks)):
      _leave(STOPPED, f"stopped ({self._why}) before the first step; there is nothing to save")
    self._at, self._here = 0, True

  def _decide_together(self, store, me, count):
    with contextlib.suppress(Exception):  # JAX's service is gone, and so is a process: hosts.py has that.
      if self._why is None:
        said = store.key_value_dir_get(f"{self._told}/asked")
        if not said:
          return
        self._why, self._asked = json.loads(sorted(said)[0][1]), time.monotonic()
      else:
        why = f"{self._why}, process {me} on {socket.gethostname()}"
        store.key_value_set(f"{self._told}/asked/{me}", json.dumps(why), allow_overwrite=True)
      with self._lock:  # Until all have said how far they are, nobody goes on.
        self._tell_how_far(store, me)
        while len(said := store.key_value_dir_get(f"{self._told}/at")) < count:
          time.sleep(0.02)
        looks, wait = zip(*(json.loads(place) for _, place in said))
        self._here = all(wait) and len(set(looks)) == 1
        self._at, self._decided = max(looks) + 1, time.monotonic()
      if self.ends and min(looks) == 0:  # Without all of them no step is done.
        store.key_value_set(f"{self._told}/left/{me}", "", allow_overwrite=True)
        deadline = time.monotonic() + 5
        # Process 0 has the store: it goes when the others have read.
        while me == 0 and len(store.key_value_dir_get(f"{self._told}/left")) < count and time.monotonic() < deadline:
          time.sleep(0.02)
        _leave(STOPPED, f"stopped ({self._why}) before the first step; there is nothing to save")

  def _tell_how_far(self, store, me):
    place = json.dumps([self._looks, self._waits])
    store.key_value_set(f"{self._told}/at/{me}", place, allow_overwrite=True)

  def _watch_machine(self):
    while not self._over.is_set():
      if why := peers.notice():
        self.ask(why)
        return
      self._over.wait(NOTICE)


def _group(connected):
  """JAX's key-value store, which process this is, and of how many; None where it is alone.

  While it comes up the store can't be asked: JAX aborts a process that does. Nor is anything imported here, which may
  be under way and take its time.
  """
  jax, hosts = (sys.modules.get(name) for name in ("jax._src.distributed", "bigjax.hosts"))
  state = getattr(jax, "global_state", None)
  connected = connected or getattr(hosts, "connected", False)
  if not connected or state is None or state.client is None or state.num_processes == 1:
    return None
  return state.client, state.process_id, state.num_processes


def _leave(code, message):
  say(f"\nbigjax: {message}")
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.flush()
  os._exit(code)
