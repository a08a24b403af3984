"""Temporary checkpoints: a killed run loses no more than their interval, and they are gone when it is over."""

import copy
import json
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from bigjax import commits, experiment, metrics, record, tiers, train
from bigjax import config as configs
from bigjax.errors import UserError
from bigjax.stops import Stops

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = dict(name="synthetic", kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
TINY = dict(
  total_steps=12,
  batch_size=16,
  data=dict(source=IMAGES, preprocess="random_shift(1)"),
  model=dict(name="mlp", in_features=16, widths=(8,), num_outputs=3, dropout=0.2),
  task=dict(name="classification"),
  optimizer=dict(name="adamw", weight_decay=0.0),
  schedule=dict(name="cosine", peak=1e-2, warmup="10%"),
  log_every=1,
  checkpoint_every=12,
  writers=("jsonl",),
)


def tiny(near, every="0.001s", **changes):
  keep = dict(temporary=dict(directory=str(near), every=every))
  return configs.resolve(copy.deepcopy(TINY) | dict(keep=keep) | changes, experiment.TrainConfig)


def final(workdir):
  with train.Checkpoints(str(workdir), read_only=True) as checkpoints:
    return checkpoints.read(12)


def rows(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def crash(monkeypatch, config, workdir, at):
  original = metrics.Logger.step

  def crashing(self, step, measured):
    original(self, step, measured)
    if step == at:
      raise RuntimeError("unplugged")

  with monkeypatch.context() as patch:
    patch.setattr(metrics.Logger, "step", crashing)
    with pytest.raises(RuntimeError, match="unplugged"):
      train.train(config, str(workdir))


def temporary(near):
  return sorted(int(p.name) for p in near.glob("*/checkpoints/*") if p.name.isdigit())


def test_a_run_goes_on_from_the_newer_of_the_two_and_ends_as_if_nothing_had_been(tmp_path, monkeypatch):
  near, whole, parts = (tmp_path / name for name in ("near", "whole", "parts"))
  train.train(configs.resolve(copy.deepcopy(TINY), experiment.TrainConfig), str(whole))
  crash(monkeypatch, tiny(near), parts, at=9)
  (step,) = temporary(near)
  assert step >= 5 and commits.steps(train.Checkpoints(str(parts))._root) == []
  before = (parts / "metrics.jsonl").stat().st_size
  with monkeypatch.context() as patch:
    asked = []
    restore = train.tuned.restore
    patch.setattr(train.tuned, "restore", lambda *args: asked.append(args[2]) or restore(*args))
    assert train.train(tiny(near), str(parts)) == "finished"
  assert asked == [step] and (parts / "metrics.jsonl").stat().st_size > before
  assert rows(whole) == rows(parts)
  jax.tree.map(np.testing.assert_array_equal, final(whole), final(parts))
  assert not list(near.iterdir())


def test_those_of_a_workdir_that_was_removed_are_nobodys(tmp_path, monkeypatch):
  near, workdir = tmp_path / "near", tmp_path / "run"
  crash(monkeypatch, tiny(near), workdir, at=9)
  assert temporary(near)
  shutil.rmtree(workdir)
  assert train.train(tiny(near), str(workdir)) == "finished"
  assert [row["step"] for row in rows(workdir)] == list(range(1, 13)) and not list(near.iterdir())
  assert len(record.read_run(str(workdir))["starts"]) == 1


def test_a_damaged_one_is_passed_over(tmp_path, monkeypatch):
  near, workdir = tmp_path / "near", tmp_path / "run"
  crash(monkeypatch, tiny(near), workdir, at=9)
  for file in near.glob("*/checkpoints/*/state/**/*"):
    if file.is_file():
      file.write_bytes(b"")
  assert train.train(tiny(near), str(workdir)) == "finished"
  assert [row["step"] for row in rows(workdir)] == list(range(1, 13))


@pytest.mark.parametrize("every", ["5", "m", "0s", "5 minutes", "-1s"])
def test_what_is_no_time_is_refused(every):
  with pytest.raises(UserError, match="config.keep.temporary.every.*'5m'"):
    tiers.TemporaryConfig(directory="x", every=every)
  assert tiers.TemporaryConfig(directory="x", every="1.5 h").seconds == 5400


class Looks(Stops):
  """Remembers the newest checkpoint there was when each step was done."""

  def __init__(self, workdir):
    super().__init__()
    self.workdir, self.newest = workdir, []

  def look(self):
    found = (int(p.name) for p in (self.workdir / "checkpoints").iterdir() if p.name.isdigit())
    self.newest.append(max(found, default=0))
    return super().look()


@pytest.mark.parametrize("synchronous", [False, True])
def test_where_saves_are_synchronous_no_step_begins_before_the_last_one_is_on_disk(tmp_path, monkeypatch, synchronous):
  commit = commits.commit

  def slow(*args):
    time.sleep(0.3)
    return commit(*args)

  monkeypatch.setattr(commits, "commit", slow)
  looks = Looks(tmp_path)
  config = copy.deepcopy(TINY) | dict(checkpoint_every=3, keep=dict(synchronous=synchronous))
  assert train.train(configs.resolve(config, experiment.TrainConfig), str(tmp_path), looks) == "finished"
  at_once = [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]
  assert looks.newest == at_once if synchronous else looks.newest != at_once
  lost = [step - newest for step, newest in enumerate(looks.newest, 1)]
  assert max(lost) <= (3 if synchronous else 6)


@pytest.mark.slow
def test_a_killed_run_loses_no_more_than_the_interval(tmp_path):
  near, workdir, interval = tmp_path / "near", tmp_path / "run", 4.0
  (tmp_path / "config.json").write_text(
    json.dumps(configs.describe(tiny(near, f"{interval}s", total_steps=10**6, checkpoint_every=10**6)))
  )
  command = [sys.executable, "-m", "bigjax", "train", f"--config={tmp_path / 'config.json'}", f"--workdir={workdir}"]
  with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
    done, began = {}, None
    deadline = time.monotonic() + 120
    while (began is None or time.monotonic() < began + 5 * interval) and time.monotonic() < deadline:
      time.sleep(0.02)
      if (workdir / "metrics.jsonl").exists():
        tail = (workdir / "metrics.jsonl").read_bytes()[-4096:].splitlines()
        if len(tail) > 2:
          done[json.loads(tail[-2])["step"]] = time.monotonic()
          began = began or time.monotonic()
    process.kill()
    killed = time.monotonic()
  saved = max(temporary(near))
  lost = killed - next(at for step, at in sorted(done.items()) if step >= saved)
  print(f"killed after step {max(done):,}; saved {saved:,}; {lost:.2f} s of work lost, of {interval:g} at most")
  assert 0 <= lost <= interval
  assert len(temporary(near)) <= 2  # That one, and perhaps the one before it.
  assert not list((workdir / "checkpoints").glob("[0-9]*"))
