"""A run that is asked to stop saves itself and goes on to the same result, wherever it is; asked twice, it leaves."""

import contextlib
import copy
import http.server
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from bigjax import config as configs
from bigjax import experiment, peers, record, train
from bigjax.data import pipeline
from bigjax.stops import Stopped, Stops

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = dict(name="synthetic", kind="images", shape=(4, 4, 1), num_classes=3)
TINY = dict(
  total_steps=12,
  batch_size=16,
  data=dict(source=IMAGES | dict(num_examples=40), preprocess="random_shift(1)"),
  model=dict(name="mlp", in_features=16, widths=(8,), num_outputs=3, dropout=0.2),
  task=dict(name="classification"),
  optimizer=dict(name="adamw", weight_decay=0.0),
  schedule=dict(name="cosine", peak=1e-2, warmup="10%"),
  ema=0.9,
  log_every=1,
  checkpoint_every=5,
  keep=dict(best="val/loss", mode="min"),
  writers=("jsonl", "csv"),
  evals=dict(
    val=dict(
      evaluator=dict(name="classification", num_classes=3),
      data=dict(source=IMAGES | dict(num_examples=21)),
      every=4,
      batch_size=8,
    )
  ),
)
LOOKS = 12 + 3 * 2 * 3  # Steps, and three evaluations of two views in three batches.


class AsksAt(Stops):
  """Asked at the `at`-th look."""

  def __init__(self, at):
    super().__init__()
    self.count, self.at = 0, at

  def look(self):
    self.count += 1
    if self.count == self.at:
      self.ask("the test")
    return super().look()


def tiny(**changes):
  return configs.resolve(copy.deepcopy(TINY) | changes, experiment.TrainConfig)


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def kept(workdir):
  """Every checkpoint, whole."""
  with train.Checkpoints(str(workdir), read_only=True) as checkpoints:
    return {step: checkpoints.read(step) for step in checkpoints.steps()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  stop = AsksAt(0)
  assert train.train(tiny(), str(workdir), stop) == "finished"
  assert stop.count == LOOKS
  return workdir


def assert_same(whole, parts):
  assert rows(whole) == rows(parts)
  assert (whole / "metrics.csv").read_text() == (parts / "metrics.csv").read_text()
  one, other = kept(whole), kept(parts)
  assert (max(one), len(one)) == (max(other), len(other))  # Among those that are kept may be the stop's own.
  for step in one.keys() & other.keys():
    jax.tree.map(np.testing.assert_array_equal, one[step], other[step])
  assert record.read_run(str(whole))["best"] == record.read_run(str(parts))["best"]


# Between steps, at the first batch of an evaluation, between two views, and in the last evaluation of all.
@pytest.mark.parametrize(
  "at", [n if n in (3, 4, 8, 27) else pytest.param(n, marks=pytest.mark.slow) for n in range(1, LOOKS + 1)]
)
def test_a_stop_anywhere_also_within_an_evaluation_changes_nothing(whole, tmp_path, at):
  assert train.train(tiny(), str(tmp_path), AsksAt(at)) == "stopped"
  assert record.read_run(str(tmp_path))["stop"]["why"] == "the test"
  assert train.train(tiny(), str(tmp_path)) == "finished"
  assert_same(whole, tmp_path)


def test_the_evaluation_that_is_made_up_for_may_be_stopped_again_and_a_crash_after_it_repeats_no_row(whole, tmp_path):
  assert train.train(tiny(), str(tmp_path), AsksAt(6)) == "stopped"
  assert not any("val/loss" in row for row in rows(tmp_path))
  assert train.train(tiny(), str(tmp_path), AsksAt(2)) == "stopped"
  with pytest.raises(RuntimeError, match="unplugged"):
    train.train(tiny(), str(tmp_path), Unplugged(6 + 2))
  assert [row["step"] for row in rows(tmp_path) if "val/loss" in row] == [4]
  assert train.train(tiny(), str(tmp_path)) == "finished"
  assert_same(whole, tmp_path)


class Unplugged(AsksAt):
  """Breaks the run at a look."""

  def ask(self, why):
    raise RuntimeError("unplugged")


# As processes


CONFIG = """
import ml_collections
def get_config():
  images = dict(name="synthetic", kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
  return ml_collections.ConfigDict(dict(
      total_steps=1000000, batch_size=8, log_every=1, checkpoint_every=1000000, writers=("jsonl",),
      data=dict(source=dict(name="mine.slow")), model=dict(name="linear", in_features=16, num_outputs=3),
      task=dict(name="classification"), optimizer=dict(name="sgd"), schedule=dict(name="constant", peak=0.1),
  ))
"""
SLOW = """
import os, pathlib, time
from bigjax.data import synthetic
def stall(where):
  if os.environ["STALL"] == where:  # For good.
    pathlib.Path(os.environ["STALLED"]).touch()
    time.sleep(600)
def make():
  stall("build")
  if os.environ["STALL"] == "step":
    from bigjax import ledger
    ledger.Ledger.note = lambda book, step: stall("step") if step == 5 else None
  class Slow(synthetic.Synthetic):
    fetched = 0
    def fetch(self, ids):
      Slow.fetched += 1
      if Slow.fetched > 30:
        stall("input")
      return super().fetch(ids)
  found = synthetic.make(kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
  return Slow(**vars(found))
"""


@contextlib.contextmanager
def running(tmp_path, *flags, stall=""):
  """A training process, and the file that is there once it stalls."""
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "slow.py").write_text(SLOW)
  (tmp_path / "config.py").write_text(CONFIG)
  stalled = tmp_path / "stalled"
  env = os.environ | {"PYTHONPATH": str(tmp_path), "STALL": stall, "STALLED": str(stalled)}
  command = [sys.executable, "-m", "bigjax", "train", f"--config={tmp_path / 'config.py'}"]
  with subprocess.Popen(
    [*command, f"--workdir={tmp_path / 'run'}", *flags], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
  ) as process:
    try:
      yield process, stalled
    finally:
      process.kill()


def wait_for(file, process):
  deadline = time.monotonic() + 240
  while not file.exists() or not (file.name == "stalled" or file.stat().st_size):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)


def test_before_there_is_something_to_save_a_request_ends_the_process_at_once(tmp_path):
  with running(tmp_path, stall="build") as (process, stalled):
    wait_for(stalled, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
  assert process.returncode == 75 and "nothing to save" in err and "SIGTERM" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_second_signal_ends_the_process_at_once(tmp_path, number):
  with running(tmp_path, stall="step") as (process, stalled):
    wait_for(stalled, process)
    process.send_signal(number)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
  assert process.returncode == 128 + number and "a second signal" in err


def test_where_the_input_stands_still_for_good_a_request_is_heeded_all_the_same(tmp_path):
  with running(tmp_path, stall="input") as (process, stalled):
    wait_for(stalled, process)
    time.sleep(2.0)  # Until what was made ahead is used up.
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
  assert process.returncode == 75 and time.monotonic() - asked < 20, err
  run = record.read_run(str(tmp_path / "run"))
  assert run["status"] == "stopped" and run["stop"]["seconds_to_save"] < 10
  assert 20 < run["step"] <= 30 and list(kept(tmp_path / "run")) == [run["step"]]


@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_stop_while_a_batch_does_not_come_changes_nothing(whole, tmp_path, monkeypatch, at):
  comes, stop = threading.Event(), Stops()
  checked = experiment.Experiment.checked

  def held(run, batches):
    for i, batch in enumerate(checked(run, batches), 1):
      if i == at and not comes.is_set():
        threading.Timer(0.5, stop.ask, ["the test"]).start()
        comes.wait()
      yield batch

  monkeypatch.setattr(experiment.Experiment, "checked", held)
  assert train.train(tiny(), str(tmp_path), stop) == "stopped"
  assert record.read_run(str(tmp_path))["step"] == at - 1 and at - 1 in kept(tmp_path)
  comes.set()
  assert train.train(tiny(), str(tmp_path)) == "finished"
  assert rows(whole) == rows(tmp_path)
  ours, theirs = kept(tmp_path)[12], kept(whole)[12]
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


class Store:
  """As JAX's key-value store."""

  def __init__(self):
    self.said = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite
    self.said[key] = value

  def key_value_dir_get(self, prefix):
    return [(k, v) for k, v in self.said.items() if k.startswith(f"{prefix}/")]


def stops_of_two(batches):
  """What two processes' waits for these batches give (None: it waits for none), and their stops, the first asked."""
  store, stops = Store(), [Stops(), Stops()]
  for stop in stops:
    stop._told, stop._saving = "stop", True
    for _ in range(3):
      stop.look()
  stops[0]._why = "the test"
  waits = [pipeline.Ahead(iter(b), 1) if b is not None else None for b in batches]
  found = {}

  def wait(i):
    try:
      found[i] = stops[i].awaited(waits[i])
    except Stopped:
      found[i] = "stopped"

  threads = [threading.Thread(target=wait, args=[i]) for i, b in enumerate(batches) if b is not None]
  for thread in threads:
    thread.start()
  time.sleep(0.4)
  deciding = [threading.Thread(target=stop._decide_together, args=(store, i, 2)) for i, stop in enumerate(stops)]
  deciding[0].start()
  time.sleep(0.2)
  deciding[1].start()
  for thread in [*deciding, *threads]:
    thread.join()
  return found, stops


def held(event):
  event.wait()
  yield "a batch"


def test_processes_that_all_wait_for_a_batch_stop_there_together():
  never = threading.Event()
  found, stops = stops_of_two([held(never), held(never)])
  assert found == {0: "stopped", 1: "stopped"} and all(s.outcome() for s in stops)
  never.set()


def test_where_one_does_not_wait_all_stop_at_the_next_place():
  late = threading.Event()
  threading.Timer(1.5, late.set).start()
  found, stops = stops_of_two([held(late), None])
  assert found == {0: "a batch"}
  assert [s.look() for s in stops] == [True, True]


def test_time_that_is_up_is_a_request(tmp_path):
  config = tiny(total_steps=1_000_000, evals={}, keep={}, checkpoint_every=1_000_000)
  assert train.train(config, str(tmp_path), Stops(hours=1e-4)) == "stopped"
  run = record.read_run(str(tmp_path))
  assert run["stop"]["why"] == "--max_hours=0.0001" and run["stop"]["seconds_to_save"] < 10
  assert (tmp_path / "checkpoints" / f"{run['step']:08d}").is_dir()


@pytest.mark.slow
def test_max_hours_ends_the_command_with_75(tmp_path):
  with running(tmp_path, f"--max_hours={40 / 3600}") as (process, _):
    _, err = process.communicate(timeout=240)
  assert process.returncode == 75, err
  run = json.loads((tmp_path / "run" / "run.json").read_text())
  assert run["status"] == "stopped" and run["stop"]["why"].startswith("--max_hours=")


# Notices


@pytest.fixture
def machine(monkeypatch):
  """A TPU VM's server of metadata; what it says may be changed."""
  said = {}

  class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      value = said.get(self.path.removeprefix("/computeMetadata/v1/instance/"))
      assert self.headers["Metadata-Flavor"] == "Google"
      self.send_response(404 if value is None else 200)
      self.end_headers()
      self.wfile.write((value or "").encode())

    def log_message(self, *args):
      del args

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(peers, "on_tpu_vm", lambda: True)
    yield said
    server.shutdown()


def test_what_the_machine_says_is_understood(machine):
  assert peers.notice() is None
  machine |= {"preempted": "FALSE", "maintenance-event": "NONE"}
  machine["upcoming-maintenance"] = '{"maintenanceStatus": "PENDING", "type": "SCHEDULED"}'
  assert peers.notice() is None
  for name, value, words in [
    ("upcoming-maintenance", '{"maintenanceStatus": "ONGOING"}', "in maintenance"),
    ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "goes into maintenance"),
    ("preempted", "TRUE", "preempted"),
  ]:
    machine[name] = value
    assert words in peers.notice()


def test_a_notice_of_the_machine_is_a_request(machine, tmp_path):
  machine["preempted"] = "TRUE"
  assert (
    train.train(tiny(total_steps=1_000_000, evals={}, keep={}, checkpoint_every=1_000_000), str(tmp_path)) == "stopped"
  )
  assert "preempted" in record.read_run(str(tmp_path))["stop"]["why"]


def test_handlers_of_signals_are_as_before(tmp_path):
  before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  for ends in (False, True):
    with Stops(ends=ends):
      pass
  assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
  assert signal.set_wakeup_fd(-1) == -1
  assert not [t for t in threading.enumerate() if t.name.startswith("bigjax-stops")]
