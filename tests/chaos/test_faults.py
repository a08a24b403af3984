"""Faults are drawn by a seed and do what they say, to processes and to files."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest

from bigjax.chaos import faults, harness
from bigjax.errors import UserError


def drawn(seed, count=50, processes=2, steps=9):
  rng = random.Random(seed)
  return [faults.draw(rng, faults.KINDS, processes, steps) for _ in range(count)]


def test_the_same_seed_draws_the_same_faults():
  assert drawn(0) == drawn(0) != drawn(1)


def test_every_kind_and_moment_and_process_comes():
  found = drawn(0, 600)
  assert {f.kind for f in found} == set(faults.KINDS)
  assert {f.moment for f in found} == set(faults.MOMENTS)
  assert {f.processes for f in found} == {(0,), (1,), (0, 1), (1, 0)}
  assert {f.kind for f in found if len(f.processes) > 1} == {*faults.ALL_AT_ONCE, "SIGTERM in a stall"}
  assert all(1 <= f.count <= 9 for f in found if f.moment in ("input", "step"))
  assert all(f.processes[0] == 0 for f in found if f.moment == "commit")


def test_alone_nothing_freezes_as_nobody_would_notice():
  assert {f.kind for f in drawn(0, 100, processes=1)} == set(faults.KINDS) - {"freeze"}


def test_an_unknown_kind_is_refused():
  with pytest.raises(UserError, match="'SIGTREM' is not known. Did you mean 'SIGTERM'"):
    faults.draw(random.Random(0), ["SIGTREM"], 1, 1)


@pytest.mark.parametrize("kind", ["flip", "truncate", "delete"])
def test_damage_changes_one_file_of_the_newest_checkpoint(tmp_path, kind):
  steps = [tmp_path / "checkpoints" / name for name in ("00000002", "00000004")]
  files = [step / name for step in steps for name in "ab"]
  for file in files:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(range(100)))
  assert faults.damage(kind, str(tmp_path), random.Random(0))
  whole = [f.exists() and f.read_bytes() == bytes(range(100)) for f in files]
  assert whole[:2] == [True, True] and sorted(whole[2:]) == [False, True]


@pytest.mark.parametrize(
  ("kind", "name"), [("torn line", "metrics.jsonl"), ("torn record", "ledger/00001-00000.ledger")]
)
def test_what_is_torn_comes_behind_what_is_whole(tmp_path, kind, name):
  (tmp_path / "ledger").mkdir()
  (tmp_path / name).write_bytes(bytes(range(100)))
  assert faults.damage(kind, str(tmp_path), random.Random(0))
  found = (tmp_path / name).read_bytes()
  assert found.startswith(bytes(range(100))) and len(found) > 100


def test_the_only_checkpoint_is_not_damaged(tmp_path):
  (tmp_path / "checkpoints" / "00000002").mkdir(parents=True)
  (tmp_path / "checkpoints" / "00000002" / "a").write_text("a")
  assert [faults.damage(kind, str(tmp_path), random.Random(0)) for kind in faults.FILES] == [None] * len(faults.FILES)


def test_a_fault_strikes_at_its_moment(config, tmp_path):
  described = dict(
    fault=dict(kind="SIGKILL", moment="step", count=3, delay=0.0, processes=(0,)), log=str(tmp_path / "log")
  )
  (tmp_path / "fault.json").write_text(json.dumps(described))
  command = [sys.executable, "-m", "bigjax.chaos.worker", str(tmp_path / "fault.json"), "train", f"--config={config}"]
  done = subprocess.run([*command, f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True)
  assert done.returncode == -signal.SIGKILL, done.stderr
  start, struck = map(json.loads, (tmp_path / "log").read_text().splitlines())
  assert start["start"] == 0 and (struck["struck"], struck["step"]) == ("SIGKILL", 3)


def test_all_processes_are_struck_at_the_moment_of_the_first(tmp_path):
  with subprocess.Popen(["sleep", "60"]) as other:
    fault = dict(kind="SIGKILL", moment="start", count=1, delay=0.0, processes=(1, 0))
    (tmp_path / "fault.json").write_text(
      json.dumps(dict(fault=fault, log=str(tmp_path / "log"), pids=str(tmp_path / "pids")))
    )
    command = [sys.executable, "-m", "bigjax.chaos.worker", str(tmp_path / "fault.json"), "train"]
    with subprocess.Popen(command) as first:
      (tmp_path / "pids.tmp").write_text(json.dumps([other.pid, first.pid]))
      os.replace(tmp_path / "pids.tmp", tmp_path / "pids")
    assert (first.returncode, other.wait()) == (-signal.SIGKILL, -signal.SIGKILL)


def start(fault=None, codes=(0,), **said):
  rest = dict(processes=len(codes), devices=1, seconds=1.0, started=0, struck=fault is not None, at=4, time=7.0)
  rest |= dict(leaving=0.5)
  fault = fault and faults.Fault(fault, "step", 4, 0.0, (0,))
  return harness.Start(fault=fault, codes=codes, **rest | said)


def test_how_a_process_left_is_accounted_for_or_a_crash():
  assert not start("SIGTERM", (75, 75)).crashed and start("SIGTERM", (1, 75)).crashed
  assert not start("SIGKILL", (-9, 76)).crashed and start("SIGKILL", (-9, 0)).crashed
  assert not start("stalled input", (76, 76)).crashed and start("stalled input", (1, 76)).crashed
  assert not start().crashed and start(codes=(1,)).crashed
  assert start(codes=(None,)).hung


def test_the_table_counts_what_was_recovered_and_what_was_lost():
  whole = (start("SIGKILL", (-9,)), start("flip", (-9,), started=3, damage="flip a"), start(started=0))
  bare = (start("flip", (-9,)), start())  # There was nothing to damage yet.
  outcome = lambda run, starts, *differences: harness.Outcome(
    run=run, starts=starts, finished=True, differences=differences, compared=10
  )
  found = harness.summary([outcome(0, whole), outcome(1, bare, "params/a")]).splitlines()
  assert found[0].startswith("| fault | step | in all | recovered | differences | hangs |")
  assert found[2] == "| SIGKILL | 2 | 2 | 1 | 1 | 0 | 0.5 | 4 |"
  assert found[3] == "| flip | 1 | 1 | 1 | 0 | 0 | 0.5 | 4 |"
  assert found[-1] == (
    "3 faults in 2 runs of 5 starts (processes x devices: 1 x 1): 2 recovered, 1 differences in 20 numbers, 0 hangs, "
    "0 crashes"
  )


def test_a_harness_that_was_cut_off_goes_on_after_the_last_run_that_was_compared(tmp_path):
  book = harness.Book(str(tmp_path), {"seed": 0})
  assert not book.begun
  book.begin()
  book.add(harness.Outcome(run=3, starts=(start("SIGKILL", (-9,)), start()), finished=True, differences=(), compared=7))
  with open(tmp_path / "faults.jsonl", "a") as f:
    f.write('{"run": 4, "sta')
  for _ in range(2):
    again = harness.Book(str(tmp_path), {"seed": 0})
    assert again.begun and again.outcomes == book.outcomes
    again.begin()
  with pytest.raises(UserError, match="of another command"):
    harness.Book(str(tmp_path), {"seed": 1})


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_recovers_from_every_kind_of_fault(config, tmp_path, processes):
  out = tmp_path / "out"
  command = [sys.executable, "-m", "bigjax", "chaos", f"--config={config}", "--faults=8", "--each=4", f"--out={out}"]
  done = subprocess.run([*command, f"--processes={processes}"], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert " 0 differences in" in done.stdout and ", 0 hangs, 0 crashes" in done.stdout
  assert os.listdir(out / "logs")
  again = subprocess.run([*command, f"--processes={processes}"], capture_output=True, text=True)
  assert again.returncode == 0 and again.stdout == done.stdout[done.stdout.index("| fault") :]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_who_is_killed_on_the_way_out_holds_nobody_up(config, tmp_path, killed):
  run = harness.Harness(config=config, overrides=[], out=str(tmp_path), places=[(2, 1)], limit=100.0)
  start = run.start(str(tmp_path / "run"), 0, faults.Fault("SIGKILL", "end", 1, 0.0, (killed,)), (2, 1))
  assert start.codes[killed] == -signal.SIGKILL and start.codes[1 - killed] in (0, 76) and start.leaving < 40


@pytest.mark.slow
def test_neither_does_it_of_an_evaluation(config, tmp_path):
  workdir = tmp_path / "run"
  subprocess.run([sys.executable, "-m", "bigjax", "train", f"--config={config}", f"--workdir={workdir}"], check=True)
  started, port = [], harness._free_port()
  for i in range(2):
    fault = dict(kind="SIGKILL", moment="end", count=1, delay=0.0, processes=(1,)) if i == 1 else None
    (tmp_path / f"{i}.json").write_text(json.dumps(dict(fault=fault, log=str(tmp_path / f"{i}.log"))))
    command = [sys.executable, "-m", "bigjax.chaos.worker", str(tmp_path / f"{i}.json"), "eval", f"--workdir={workdir}"]
    flags = [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={i}", "--peer_timeout=15"]
    started.append(subprocess.Popen([*command, *flags], env=os.environ | {"JAX_PLATFORMS": "cpu"}))
  assert started[1].wait(timeout=200) == -signal.SIGKILL
  assert started[0].wait(timeout=40) in (0, 76)
  assert (workdir / "eval-00000012.json").exists()
