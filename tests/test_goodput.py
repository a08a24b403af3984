"""Where the time of a run went, over all its starts: it adds up, and what a killed start did in vain is counted."""

import copy
import json
import os
import time

import pytest

from bigjax import config as configs
from bigjax import experiment, goodput, metrics, record, train
from bigjax.metrics.stopwatch import Stopwatch
from bigjax.stops import Stops

IMAGES = dict(name="synthetic", kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
TINY = dict(
  total_steps=8,
  batch_size=16,
  data=dict(source=IMAGES),
  model=dict(name="linear", in_features=16, num_outputs=3),
  task=dict(name="classification"),
  optimizer=dict(name="sgd"),
  schedule=dict(name="constant", peak=0.1),
  checkpoint_every=4,
  writers=("jsonl",),
  evals=dict(val=dict(evaluator=dict(name="classification"), data=dict(source=IMAGES), every=4)),
)


class StopsAt(Stops):
  def __init__(self, step):
    super().__init__()
    self.left = step

  def look(self):
    self.left -= 1
    if self.left == 0:
      self.ask("the test")
    return super().look()


def test_every_second_of_every_start_went_somewhere(tmp_path):
  config = configs.resolve(copy.deepcopy(TINY), experiment.TrainConfig)
  began = time.perf_counter()
  assert train.train(config, str(tmp_path), StopsAt(3)) == "stopped"
  one = record.read_run(str(tmp_path))
  assert train.train(config, str(tmp_path)) == "finished"
  took = time.perf_counter() - began
  run = record.read_run(str(tmp_path))
  assert len(run["spent"]) == 2 and run["spent"][0] == one["spent"][0]
  assert run["seconds"] == goodput.totals(run["spent"])
  assert 0.7 * took < sum(run["seconds"].values()) < took
  # Each part of a run has a name, and took some time.
  assert set(run["seconds"]) == {"start", "compile", "restore", "input", "host", "device", "eval", "save"}
  assert all(seconds > 0 for seconds in run["seconds"].values())
  computed = run["seconds"]["device"] + run["seconds"]["host"]
  assert run["goodput"] == pytest.approx(computed / sum(run["seconds"].values()))
  said = metrics.summary(tmp_path)
  assert f"goodput    {run['goodput']:.1%}; " in said
  # Of the parts, those that can be seen: the compiler may be done before the state is there.
  shares = {
    name: run["seconds"][name] / sum(run["seconds"].values()) for name in run["seconds"].keys() - {"device", "host"}
  }
  assert {name for name in shares if f"{name} {shares[name]:.1%}" in said} >= {
    n for n, x in shares.items() if x >= 0.001
  }
  assert not any(f"{name} 0.0%" in said for name in shares)


def test_what_a_killed_start_did_after_its_last_note_is_lost(tmp_path):
  clock = lambda: 100.0 + len(ticks)
  ticks = []
  watch = Stopwatch(clock)
  ticks += range(10)
  record.write_json(str(tmp_path / "run.json"), {})
  spent = goodput.Spent(str(tmp_path), watch, primary=True)
  spent.note()
  noted = record.read_run(str(tmp_path))
  assert noted["seconds"]["start"] == 10 and "lost" not in noted["seconds"]
  (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")  # The last sign of life, 7 s later.
  os.utime(tmp_path / "metrics.jsonl", (time.time() + 7, time.time() + 7))
  again = goodput.Spent(str(tmp_path), Stopwatch(clock), primary=True).facts()
  assert again["seconds"]["lost"] == pytest.approx(7, abs=1.5)
  assert again["seconds"]["start"] == 10 and again["goodput"] == 0
  # It is closed then: the next start finds the same.
  record.write_json(str(tmp_path / "run.json"), again)
  os.utime(tmp_path / "metrics.jsonl", (time.time() + 700, time.time() + 700))
  third = goodput.Spent(str(tmp_path), Stopwatch(clock), primary=True).facts()
  assert third["seconds"]["lost"] > 100  # The second start, which was killed too.
  assert third["spent"][0] == again["spent"][0]
