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

CONFIG = """
import ml_collections
def get_config():
  images = lambda n: dict(name="synthetic", kind="images", num_examples=n, shape=(4, 4, 1), num_classes=3)
  return ml_collections.ConfigDict(dict(
      total_steps=12, batch_size=16, log_every=1, checkpoint_every=4, writers=("jsonl",), seed=3,
      data=dict(source=images(40), preprocess="random_shift(1)"),
      model=dict(name="mlp", in_features=16, widths=(16,), num_outputs=3, dropout=0.2),
      task=dict(name="classification"), optimizer=dict(name="adamw", weight_decay=0.0),
      schedule=dict(name="cosine", peak=1e-2, warmup="10%"), ema=0.9, keep=dict(last=2),
      evals=dict(val=dict(
        evaluator=dict(name="classification", num_classes=3), data=dict(source=images(21)), every=4, batch_size=8)),
  ))
"""  # fmt: skip


@pytest.fixture
def config(tmp_path):
  file = tmp_path / "tiny.py"
  file.write_text(CONFIG)
  return str(file)


def drawn(seed, count=50, processes=2, steps=9):
  rng = random.Random(seed)
  return [faults.draw(rng, faults.KINDS, processes, steps) for _ in range(count)]


def test_the_same_seed_draws_the_same_faults():
  assert drawn(0) == drawn(0) != drawn(1)


def test_every_kind_and_moment_and_process_comes():
  found = drawn(0, 400)
  assert {f.kind for f in found} == set(faults.KINDS)
  assert {f.moment for f in found} == set(faults.MOMENTS)
  assert {f.process for f in found} == {0, 1}
  assert all(1 <= f.count <= 9 for f in found)


def test_an_unknown_kind_is_refused():
  with pytest.raises(UserError, match="'SIGTREM' is not known. Did you mean 'SIGTERM'"):
    faults.draw(random.Random(0), ["SIGTREM"], 1, 1)


@pytest.mark.parametrize("kind", faults.FILES)
def test_damage_changes_one_file(tmp_path, kind):
  step = tmp_path / "checkpoints" / "00000004"
  step.mkdir(parents=True)
  (tmp_path / "checkpoints" / "00000002").mkdir()
  files = [step / "a", step / "b", tmp_path / "metrics.jsonl"]
  for file in files:
    file.write_bytes(bytes(range(100)))
  assert faults.damage(kind, str(tmp_path), random.Random(0))
  whole = [f for f in files if f.exists() and f.read_bytes() == bytes(range(100))]
  assert len(whole) == 2
  assert (files[2] in whole) == (kind != "torn line")


def test_there_may_be_nothing_to_damage(tmp_path):
  assert [faults.damage(kind, str(tmp_path), random.Random(0)) for kind in faults.FILES] == [None] * len(faults.FILES)


def test_a_fault_strikes_at_its_moment(config, tmp_path):
  described = dict(fault=dict(kind="SIGKILL", moment="input", count=3, delay=0.0, process=0), log=str(tmp_path / "log"))
  (tmp_path / "fault.json").write_text(json.dumps(described))
  command = [sys.executable, "-m", "bigjax.chaos.worker", str(tmp_path / "fault.json"), "train", f"--config={config}"]
  done = subprocess.run([*command, f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True)
  assert done.returncode == -signal.SIGKILL, done.stderr
  start, struck = map(json.loads, (tmp_path / "log").read_text().splitlines())
  assert start["start"] == 0 and (struck["struck"], struck["step"]) == ("SIGKILL", 3)


@pytest.mark.slow
def test_a_run_recovers_from_every_kind_of_fault(config, tmp_path):
  out = tmp_path / "out"
  command = [sys.executable, "-m", "bigjax", "chaos", f"--config={config}", "--faults=10", "--each=5", f"--out={out}"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert ": 10 recovered, 0 differences in" in done.stdout and ", 0 hangs, 0 crashes" in done.stdout
  assert os.listdir(out / "logs")


@pytest.mark.slow
def test_a_changed_number_is_found(config, tmp_path):
  run = harness.Harness(config=config, overrides=[], out=str(tmp_path), places=[(1, 1)], limit=120)
  first = run.undisturbed()
  other = harness.Harness(
    config=config, overrides=["--config.seed=4"], out=str(tmp_path / "b"), places=[(1, 1)], limit=120
  )
  differences, compared = run.compare(first, other.undisturbed())
  assert compared > 100 and any("params" in d for d in differences)
