"""What hangs ends the run with everyone's stacks and the name of the host; who is slow, and who died, is named."""

import concurrent.futures
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from bigjax.metrics import Progress, Stopwatch
from bigjax.watchdog import Watchdog, WatchdogConfig, straggler

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
import ml_collections
def get_config():
  return ml_collections.ConfigDict(dict(
      total_steps=1000000, batch_size=8, log_every=1, checkpoint_every=1000000, writers=("jsonl",),
      data=dict(source=dict(name="mine.odd")), model=dict(name="linear", in_features=16, num_outputs=3),
      task=dict(name="classification"), optimizer=dict(name="sgd"), schedule=dict(name="constant", peak=0.1),
      watchdog=dict(at_least=60.0, every=2.0),
  ))
"""
HASTY = "--config.watchdog.at_least=4.0"
ODD = """
import os, pathlib, time
from bigjax.data import synthetic
def make():
  if os.environ.get("ODD") == "start":
    pathlib.Path(os.environ["STALLED"]).touch()
    time.sleep(600)
  class Odd(synthetic.Synthetic):
    fetched = 0
    def fetch(self, ids):
      Odd.fetched += 1
      if os.environ.get("ODD") == "slow":
        time.sleep(0.05)
      if os.environ.get("ODD") == "hangs" and Odd.fetched > 60:
        time.sleep(600)
      return super().fetch(ids)
  return Odd(**vars(synthetic.make(kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)))
"""


class Processes:
  """`bigjax train` as the `count` processes of a run; `odd` is what each is up to."""

  def __init__(self, folder, *flags, count=2, odd=(), patience=60):
    (folder / "mine").mkdir()
    (folder / "mine" / "odd.py").write_text(ODD)
    (folder / "config.py").write_text(CONFIG)
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    self.started = []
    self.stalled = folder / "stalled"
    for i in range(count):
      several = [
        f"--coordinator=127.0.0.1:{port}",
        f"--processes={count}",
        f"--process={i}",
        f"--peer_timeout={patience}",
      ]
      env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(folder), "STALLED": str(self.stalled)}
      env |= {"ODD": dict(odd).get(i, "")}
      command = [sys.executable, "-m", "bigjax", "train", f"--config={folder / 'config.py'}"]
      command += [f"--workdir={folder / 'run'}", *(several if count > 1 else []), *flags]
      self.started.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.started:
      process.kill()
      process.communicate()

  def wait_for(self, there):
    deadline = time.monotonic() + 240
    while not there():
      assert time.monotonic() < deadline
      if any(p.poll() is not None for p in self.started):
        pytest.fail(str(self.ended()))
      time.sleep(0.1)

  def ended(self):
    """Returns exit codes and what was written to the standard error streams."""
    with concurrent.futures.ThreadPoolExecutor(len(self.started)) as pool:
      said = list(pool.map(lambda p: p.communicate(timeout=240)[1], self.started))
    return [p.returncode for p in self.started], said


def has_rows(folder, count):
  file = folder / "run" / "metrics.jsonl"
  return lambda: file.exists() and file.read_text().count("\n") >= count


def test_a_step_that_hangs_ends_the_process_with_its_stacks(tmp_path):
  with Processes(tmp_path, HASTY, count=1, odd={0: "hangs"}) as run:
    (code,), (err,) = run.ended()
  assert code == 76
  assert "hangs: it waits for input for" in err and "most recent call first" in err
  (file,) = (tmp_path / "run").glob("stacks-*.txt")
  assert "odd.py" in file.read_text() and str(file) in err
  assert "hangs" in json.loads((tmp_path / "run" / "run.json").read_text())["error"]


@pytest.mark.slow
@pytest.mark.parametrize("hanging", [0, 1])
def test_a_process_that_hangs_is_named_and_all_leave(tmp_path, hanging):
  with Processes(tmp_path, HASTY, odd={hanging: "hangs"}) as run:
    codes, said = run.ended()
  (tmp_path / "said").write_text("\n=====\n".join(map(str, [codes, *said])))
  assert codes == [76, 76], tmp_path / "said"
  host = socket.gethostname()
  assert f"process {hanging} on {host} waits for input" in said[0] + said[1]
  assert f"process {1 - hanging} on {host} waits for the devices" in said[0] + said[1]


def test_a_process_that_is_slow_is_named_and_goes_on_and_all_stop_together(tmp_path):
  with Processes(tmp_path, odd={1: "slow"}) as run:
    run.wait_for(has_rows(tmp_path, 100))
    noted = lambda: json.loads((tmp_path / "run" / "run.json").read_text()).get("incidents")
    run.wait_for(noted)
    run.started[1].send_signal(signal.SIGTERM)
    codes, said = run.ended()
  assert codes == [75, 75], said
  line = noted()[0]["what"]
  assert line.startswith(f"process 1 on {socket.gethostname()} holds the others up") and "most of it input" in line
  assert line in said[0] and line not in said[1]
  stop = json.loads((tmp_path / "run" / "run.json").read_text())["stop"]
  assert "SIGTERM, process 1 on" in stop["why"] and stop["seconds_to_save"] < 10


@pytest.mark.parametrize("asked", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stop_before_the_first_step_ends_all_processes_at_once(tmp_path, asked):
  with Processes(tmp_path, odd={1: "start"}) as run:
    run.wait_for(run.stalled.exists)
    time.sleep(2)
    run.started[asked].send_signal(signal.SIGTERM)
    codes, said = run.ended()
  assert codes == [75, 75], said
  assert all("nothing to save" in err for err in said)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_was_killed_is_named_in_less_than_30_seconds(tmp_path, killed):
  with Processes(tmp_path, patience=15) as run:
    run.wait_for(has_rows(tmp_path, 20))
    run.started[killed].kill()
    began = time.monotonic()
    codes, said = run.ended()
    took = time.monotonic() - began
  assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 76, said
  assert f"process {killed} of 2 on {socket.gethostname()} failed: " in said[1 - killed]
  assert took < 30


def pace(own, device=0.0, on="h"):
  return {"input": own * 0.9, "host": own * 0.1, "device": device, "on": on}


def test_only_a_host_that_takes_much_longer_than_the_others_is_a_straggler():
  alike = {i: pace(0.010 + 0.001 * i, device=0.1) for i in range(8)}
  assert straggler(alike, 1.5) is None and straggler({0: pace(1.0)}, 1.5) is None
  assert straggler(alike | {3: pace(0.030, device=1.0)}, 1.5) is None  # It hides behind the devices.
  line = straggler(alike | {3: pace(0.130, on="h3")}, 1.5)
  assert line == (
    "process 3 on h3 holds the others up: its side of a step takes 130 ms (most of it input), theirs 14 ms."
  )


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


def test_in_a_notebook_what_hangs_is_told_of_once_and_a_pause_has_a_limit_of_its_own(tmp_path):
  clock, told = Clock(), []
  progress = Progress(1000, watch=Stopwatch(clock), quiet=True)
  config = WatchdogConfig(times=10.0, at_least=0.1, pause=50.0)
  with Watchdog(config, progress, str(tmp_path), told.append, ends=False):
    for step in range(1, 5):
      progress.update(step)
      clock.now += 1.0
      time.sleep(0.1)
    with progress.pause("eval"):
      clock.now += 20.0
      time.sleep(0.2)
      assert not told
    clock.now += 9.0
    time.sleep(0.2)
    assert not told
    clock.now += 5.0
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
      time.sleep(0.05)
  assert len(told) == 1 and told[0].startswith("step 5 hangs: it is at work on the host for 1")
  assert "a step takes 1 s" in told[0] and next(tmp_path.iterdir()).name in told[0]
  assert not [t for t in threading.enumerate() if t.name == "bigjax-watchdog"]
