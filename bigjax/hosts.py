"""Several processes, one run: they come together, agree, and fail together.

The same command is started on every host; `bigjax.peers` finds out who they are. While they run, a thread in each looks
out once a second, by the key-value store of JAX's coordination service: a peer that failed, or of which nothing is
heard any more, ends all the others with its name, also where they wait inside a collective operation. One process alone
does nothing of this.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import itertools
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed

from bigjax import workdirs
from bigjax.errors import LOST, UserError, say
from bigjax.peers import Peers, call_roll, find, is_loopback, metadata, on_tpu_vm

SILENCE = 60  # Seconds without a sign of life after which a peer counts as lost; --peer_timeout if that is less.
GRACE = 10  # Seconds that a failed process has to tidy up in.
FAREWELL = 15  # Seconds that leaving may take once all is done.
POLL = 1.0  # Seconds between two looks at the peers.

connected = False  # Whether JAX's service can be asked: it aborts a process that asks while it comes up.


# Coming together


@contextlib.contextmanager
def joined(
  args: argparse.Namespace, same: Mapping[str, str], workdir: str, note: Callable[[str], None]
) -> Iterator[Peers | None]:
  """Runs what is within as one of the processes of a run, or plainly where there is one alone.

  Args:
    args: Has what `peers.add_flags` adds.
    same: What has to be the same everywhere by a name for it, such as the digest of the config.
    workdir: The directory of the run, which all of them must see.
    note: Called with the reason, on process 0, when peers end the run.

  Raises:
    UserError: The set-up can't be: numbers that don't fit, another config on another host, a workdir not shared.
    TimeoutError: A process did not come; says which.
  """
  peers = initialize(args.coordinator, args.processes, args.process, args.peer_timeout)
  if peers is None:
    yield None
    return
  lookout = _Lookout(peers, min(SILENCE, args.peer_timeout), note)
  try:
    _check_same(peers, same)
    _check_shared(peers, workdir, args.peer_timeout)
    _connect()
    yield peers
    _store().wait_at_barrier("bigjax/done", 3_600_000)  # Process 0 has the report to write; a failure ends this sooner.
  except BaseException as e:
    lookout.fail(e)
    raise
  lookout.close()


def initialize(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: float = 300
) -> Peers | None:
  """Finds the peers and starts `jax.distributed` with them, before anything else uses JAX; None where there are none.

  Raises:
    UserError: The flags or the environment can't be so, or the processes contradict each other.
    TimeoutError: A process did not come; says which.
  """
  attribute = metadata if on_tpu_vm() else None
  hostname = socket.getfqdn() if "JOB_COMPLETION_INDEX" in os.environ else socket.gethostname()
  peers = find(
    os.environ, coordinator=coordinator, processes=processes, process=process, attribute=attribute, hostname=hostname
  )
  if peers is None:
    return None
  host = peers.coordinator.rpartition(":")[0]
  if any(name in os.environ for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY")):
    os.environ["no_proxy"] = ",".join(filter(None, (os.environ.get("no_proxy"), host)))
    os.environ["JAX_CHECK_PROXY_ENVS"] = "0"
    jax.config.update("jax_check_proxy_envs", False)
  jax.config.update("jax_enable_preemption_service", False)  # It takes SIGTERM for itself; see stops.py.
  roll = call_roll(peers, timeout)
  if peers.process:
    _say_who_is_gone(peers, roll[0])
  jax.distributed.initialize(
    peers.coordinator,
    peers.processes,
    peers.process,
    None if peers.local_devices is None else list(peers.local_devices),
    cluster_detection_method="deactivate",
    initialization_timeout=max(10, int(timeout)),
    heartbeat_timeout_seconds=2 * SILENCE,  # Behind our own, which says more.
    coordinator_bind_address=peers.coordinator if is_loopback(host) else None,
  )
  global connected
  connected = True
  if peers.process == 0:
    for process, host in roll.items():  # Else one that is gone before its first sign of life would never be missed.
      _store().key_value_set(f"bigjax/alive/{process}", f"none {host}", allow_overwrite=True)
  return peers


def _store():
  """The key-value store of JAX's coordination service; JAX has no public name for it."""
  return distributed.global_state.client


_agreements = itertools.count()  # Every process comes to the same ones in the same order.


def agreed(value: Any) -> Any:
  """Returns what process 0 gives, such as the checkpoint to go on from; anything JSON has. Not for the hot loop."""
  store = _store()
  if store is None:
    return value
  name = f"bigjax/agreed/{next(_agreements)}"
  if distributed.global_state.process_id == 0:
    store.key_value_set(name, json.dumps(value))
  return json.loads(store.blocking_key_value_get(name, 600_000))


def place() -> tuple[int, int]:
  """Returns which process this is and of how many, without starting the devices."""
  state = distributed.global_state
  return (0, 1) if state.client is None else (state.process_id, state.num_processes)


def gathered(value: Any) -> list[Any]:
  """Returns what every process gives, in their order; anything JSON has. Not for the hot loop."""
  if _store() is None:
    return [value]
  name = f"gathered/{next(_agreements)}"
  tell_all(f"{name}/{distributed.global_state.process_id}", value)
  return [told(f"{name}/{i}", 600) for i in range(distributed.global_state.num_processes)]


def tell_all(name: str, value: Any) -> None:
  """Puts a value where all processes find it by its name; also from a thread, which can't agree in any order."""
  if _store() is not None:
    _store().key_value_set(f"bigjax/told/{name}", json.dumps(value), allow_overwrite=True)


def told(name: str, seconds: float) -> Any:
  """Returns what a process put there by `tell_all`, waiting for it.

  Raises:
    TimeoutError: It did not come.
  """
  try:
    return json.loads(_store().blocking_key_value_get(f"bigjax/told/{name}", int(1000 * seconds)))
  except jax.errors.JaxRuntimeError as e:
    if "DEADLINE" not in str(e):
      raise
    raise TimeoutError(f"nothing came within {seconds:.0f} s") from e


def told_below(name: str) -> dict[int, Any]:
  """Returns what has been told so far by names `name/0`, `name/1`, ..., by process."""
  if _store() is None:
    return {}
  found = _store().key_value_dir_get(f"bigjax/told/{name}")
  return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


def forget(name: str) -> None:
  """Takes away what was told by a name, and by all names below it."""
  if _store() is not None:
    _store().key_value_delete(f"bigjax/told/{name}/")


def _check_same(peers, same):
  """Refuses processes that would compute something else than process 0."""
  first = agreed(dict(same))
  if differing := [what for what in same if first.get(what) != same[what]]:
    raise UserError(
      f"process {peers.process} on {socket.gethostname()} has another {' and another '.join(differing)} than process "
      "0; start the same command with the same files on every host."
    )


def _check_shared(peers, workdir, timeout):
  """Refuses a workdir that is another directory on another host."""
  if workdirs.home(workdir) != workdir:
    return  # A store is the same everywhere.
  token = os.path.join(workdir, agreed(f".hosts-{secrets.token_hex(8)}"))
  if peers.process == 0:
    try:
      os.makedirs(workdir, exist_ok=True)
      with open(token, "x"):
        pass
    except OSError as e:
      raise UserError(f"--workdir={workdir} can't be written: {e.strerror}.") from e
  try:
    if not _appears(token):
      raise UserError(
        f"--workdir={workdir} on {socket.gethostname()} (process {peers.process}) is not the directory that process 0 "
        "writes to; name one that all hosts share."
      )
    _store().wait_at_barrier("bigjax/workdir", int(1000 * timeout))
  finally:
    if peers.process == 0:
      os.remove(token)


def _connect():
  """Has CPUs make the connections of collectives now that all are here: the first waits 30 s for a process, no more."""
  if jax.default_backend() == "cpu":
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (["all"], []))
    ones = jax.make_array_from_callback((mesh.size,), split, lambda _: np.ones(1, np.float32))
    jax.jit(jnp.sum, out_shardings=whole)(ones).block_until_ready()


def shared(directory: str) -> bool:
  """Returns whether all processes see one directory there; makes it. Not for the hot loop."""
  token = os.path.join(directory, agreed(f".hosts-{secrets.token_hex(8)}"))
  first = place()[0] == 0
  if first:
    os.makedirs(directory, exist_ok=True)
    with open(token, "x"):
      pass
  there = all(gathered(_appears(token)))
  if first:
    os.remove(token)
  return there


def _appears(file):
  """Whether a file is there, or soon is: a network's file system may be slow to show what is new."""
  deadline = time.monotonic() + 10
  while not (there := os.path.exists(file)) and time.monotonic() < deadline:
    time.sleep(0.2)
    with contextlib.suppress(OSError):
      os.listdir(os.path.dirname(file))
  return there


# Failing together


def tell(error: BaseException) -> None:
  """Tells the peers that this process fails, so that none waits for it; does nothing where there are none."""
  if _store() is None or _is_of_a_peer(error):
    return
  # Not by jax.process_index(), which would start the devices, and wait for all peers to do so.
  _post(distributed.global_state.process_id, _code(error), _shown(error))


@contextlib.contextmanager
def failure_told() -> Iterator[None]:
  """Tells the peers of an exception at once, before what is around it tidies up and may wait for them."""
  try:
    yield
  except BaseException as e:
    tell(e)
    raise


def _code(error):
  """The exit code, as main.py has it."""
  return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _shown(error):
  return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _is_of_a_peer(error):
  """Whether an error says no more than that someone else is gone."""
  words = r"(?i)gloo|connection|peer|unavailable|socket|coordination|deadline|barrier"
  return isinstance(error, jax.errors.JaxRuntimeError) and re.search(words, str(error)) is not None


def _post(process, code, reason, host=None):
  said = {"process": process, "code": code, "reason": reason[:2000], "host": host or socket.gethostname()}
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # Said before, or the service is gone, which ends all anyway.
    _store().key_value_set(f"bigjax/failed/{process}", json.dumps(said))


def _say_who_is_gone(peers, host):
  """Has the abort that JAX ends this process by, the moment process 0 is gone, told in words and as our exit code.

  JAX's client takes a callback instead, but jaxlib has no Python type for what it would be called with, and aborts all
  the same. So it is the signal of the abort that is caught, in the thread that raises it: Python's own handlers run in
  the main thread only, which waits for the peer.
  """

  def aborted(number):
    del number
    with contextlib.suppress(OSError), socket.create_connection(peers.coordinator.rsplit(":", 1), timeout=2):
      return  # It is there: this is something else.
    reason = "nothing answers there any more: it was killed, or its host is gone"
    say(f"bigjax: process 0 of {peers.processes} on {host} failed: {reason}")
    os._exit(LOST)

  global _aborted
  _aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)  # Kept alive for as long as the process is.
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)


def goodbye(code: int) -> None:
  """Has this process leave with `code` also when a peer dies on its way out, for which JAX would wait minutes.

  To be called when all is done, here and there.
  """
  if _store() is not None:
    timer = threading.Timer(FAREWELL, _leave, [code])
    timer.daemon = True
    timer.start()


def end(code: int, reason: str) -> NoReturn:
  """Ends the run at once, here and on all peers, from any thread and whatever the others wait for."""
  me, count = place()
  say(f"bigjax: {reason}")
  if count > 1:
    _post(me, code, reason)
    _linger(me, count)
  _leave(code)


def _linger(me, count):
  """Process 0 has the store: it goes when the others have read of it."""
  store = _store()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    store.key_value_set(f"bigjax/seen/{me}", "", allow_overwrite=True)
    deadline = time.monotonic() + 5
    while me == 0 and time.monotonic() < deadline:
      if len(store.key_value_dir_get("bigjax/seen")) == count:
        break
      time.sleep(POLL / 10)


class _Lookout:
  """A thread that ends this process when a peer has failed or is lost, and after its own failure in bounded time."""

  def __init__(self, peers: Peers, silence: float, note: Callable[[str], None]):
    self._peers, self._silence, self._note = peers, silence, note
    self._failing, self._ended, self._answered = threading.Event(), threading.Event(), threading.Event()
    self._threads = [threading.Thread(target=self._run, name="bigjax-lookout", daemon=True)]
    if peers.process:
      self._threads += [threading.Thread(target=self._listen_for_the_first, name="bigjax-lookout-0", daemon=True)]
    for thread in self._threads:
      thread.start()

  def close(self) -> None:
    self._ended.set()
    for thread in self._threads:
      thread.join()

  def fail(self, error: BaseException) -> None:
    """Tells the peers of this process's own failure; from here on it ends without waiting for them."""
    me = self._peers.process
    if _is_of_a_peer(error):
      # Whoever that was, it is known in a moment: it said so itself, or its silence will.
      time.sleep(self._silence + 4 * POLL)
    self._failing.set()
    say(f"process {me} of {self._peers.processes} on {socket.gethostname()} fails:")
    if _is_of_a_peer(error):
      _post(me, 1, _shown(error))
    else:
      tell(error)
    _linger(self._peers.process, self._peers.processes)
    atexit.register(_leave, _code(error))  # Ahead of JAX's own, which waits for all peers.

  def _run(self):
    store, me = _store(), self._peers.process
    heard: dict[str, tuple[str, float]] = {}
    failing_since = None
    for beat in itertools.count():
      if self._ended.wait(POLL):
        break
      try:
        store.key_value_set(f"bigjax/alive/{me}", f"{beat} {socket.gethostname()}", allow_overwrite=True)
        if me == 0:
          self._listen_for_life(store, heard)
        failed = [json.loads(said) for _, said in store.key_value_dir_get("bigjax/failed")]
        self._answered.set()
      except jax.errors.JaxRuntimeError:
        continue  # The service is gone, and JAX is about to end this process.
      mine = next((f for f in failed if f["process"] == me), None)
      if mine is not None:
        failing_since = failing_since or time.monotonic()
        if time.monotonic() - failing_since > GRACE:
          self._end(mine)
      elif failed and not self._failing.wait(POLL):  # What is wrong everywhere is known here in a moment, too.
        self._end(failed[0])
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      store.key_value_delete(f"bigjax/alive/{me}")

  def _listen_for_the_first(self):
    """Ends this process when process 0, which has the store, is there but does not answer any more.

    Then whoever asks it waits: JAX's client gives up after minutes, and aborts. What counts are looks, not the clock,
    which goes on while this process itself is held.
    """
    looks = 0
    while not self._ended.wait(POLL):
      looks = 0 if self._answered.is_set() else looks + 1
      self._answered.clear()
      if looks * POLL > self._silence + 2 * POLL:  # It says so itself of others, who are asked first.
        first = f"process 0 of {self._peers.processes} at {self._peers.coordinator}"
        say(f"bigjax: {first} failed: no answer for {looks * POLL:g} s; it or its host hangs, or is cut off")
        _leave(LOST)

  def _listen_for_life(self, store, heard):
    now = time.monotonic()
    for key, beat in store.key_value_dir_get("bigjax/alive"):
      if heard.get(key, ("", 0))[0] != beat:
        heard[key] = (beat, now)
      elif now - heard[key][1] > self._silence:
        reason = f"nothing was heard of it for {self._silence:g} s: it was killed, or its host is gone"
        _post(int(key.rpartition("/")[2]), LOST, reason, beat.partition(" ")[2])

  def _end(self, failed):
    """Ends this process, whatever its other threads wait for."""
    process = failed["process"]
    reason = f"process {process} of {self._peers.processes} on {failed['host']} failed: {failed['reason']}"
    if process == self._peers.process:
      reason = f"{reason} (and did not end by itself)"
    say(f"bigjax: {reason}")
    if self._peers.process == 0:
      with contextlib.suppress(Exception):  # The disk may be what failed.
        self._note(reason)
    _linger(self._peers.process, self._peers.processes)
    _leave(failed["code"])


def _leave(code):
  with contextlib.suppress(OSError, ValueError):  # The log may be on a disk that is full.
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)
