"""Damaged configs, flags and strings of configs, and what a run leaves: metrics, records, ledgers, bundles."""

from __future__ import annotations

import json
import pathlib
import shutil

import damage
import numpy as np
from cases import Target

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "digits_vit.py"
ANY = {**damage.CONTENT, **damage.TEXT, **damage.PLACE}
TREE = {**ANY, **damage.TREE}
STRINGS = {**damage.CONTENT, **damage.TEXT}
FLAGS = [
  "--config.total_steps=20",
  "--config.model.depth=2",
  '--config.optimizer={"name": "sgd", "momentum": 0.9}',
  "--config.evals.test.every=5%",
  "--config.decay=[('.*kernel', 0.1)]",
  "--config.keep.last=3",
]
OPS = [
  "decode|inception_crop(224)|flip_lr|value_range(-1,1)",
  "random_affine(12,0.08,(0.9,1.1),8.0)|value_range(-1, 1, 0, 16)|keep('image', 'label')",
  "resize_small(256)|central_crop(224)|value_range(0, 1)|drop('id')",
]
SPLITS = ["train", "train[:80%]", "[100:200]", "[:10%]+[90%:]", "fold(0,5)", "not_fold(0,5)", "[10:-20]"]
DURATIONS = ["1000", "90 epochs", "2e9 tokens", "5%", "2.5 epochs", "1e6 examples", "0"]


# Configs


def _resolved(config):
  from bigjax import config as configs
  from bigjax import experiment

  return configs.describe(configs.resolve(config, experiment.TrainConfig))


def _json(folder: pathlib.Path) -> None:
  from bigjax import config as configs

  (folder / "config.json").write_text(json.dumps(_resolved(configs.read(str(CONFIG))), indent=1))


def _read_json(folder: pathlib.Path):
  from bigjax import config as configs

  return _resolved(configs.read(str(folder / "config.json")))


def _python(folder: pathlib.Path) -> None:
  shutil.copyfile(CONFIG, folder / "config.py")


def _read_python(folder: pathlib.Path):
  from bigjax import config as configs

  return _resolved(configs.read(str(folder / "config.py")))


def _flags(folder: pathlib.Path) -> None:
  (folder / "flags").write_text("\n".join(FLAGS))


def _read_flags(folder: pathlib.Path):
  from bigjax import config as configs

  return _resolved(configs.read(str(CONFIG), _text(folder / "flags").split("\n")))


def _text(file):
  """What a shell passes on: no NUL, and bytes that are no UTF-8 as Python has them."""
  return file.read_bytes().replace(b"\0", b"").decode(errors="surrogateescape")


def _argument(folder: pathlib.Path) -> None:
  (folder / "argument").write_text("cnn,width=64,rate=0.5,flag=true,depth=3")


def _read_argument(folder: pathlib.Path):
  from bigjax import config as configs

  found = configs.parse_arg(_text(folder / "argument"), variant="mlp", width=1, rate=0.1, flag=False, depth=None)
  return vars(found)


def _ops(folder: pathlib.Path) -> None:
  (folder / "ops").write_text("\n".join(OPS))


def _read_ops(folder: pathlib.Path):
  from bigjax.data import ops

  found = [ops.parse(line) for line in _text(folder / "ops").split("\n")]
  written = ["|".join(map(str, chain)) for chain in found]
  assert written == ["|".join(map(str, ops.parse(line))) for line in written]
  return written


def _words(folder: pathlib.Path) -> None:
  (folder / "splits").write_text("\n".join(SPLITS))
  (folder / "durations").write_text("\n".join(DURATIONS))


def _read_words(folder: pathlib.Path):
  from bigjax import schedules
  from bigjax.data import splits

  clock = schedules.Clock.of(1000, 32, 50_000, 128)
  durations = [clock.steps(line) for line in _text(folder / "durations").split("\n")]
  parts = [splits.parse(line, {"train": 1000})[1] for line in _text(folder / "splits").split("\n")]
  return [durations, [p.ranges for p in parts]]


# What a run leaves


def _workdir(folder: pathlib.Path) -> None:
  from bigjax import record
  from bigjax.ledger import Ledger
  from bigjax.metrics import Writers

  with Writers(folder, ("jsonl", "csv")) as writers:
    for step in range(10, 201, 10):
      writers.write(step, {"loss": 2 / step, "accuracy": 1 - 1 / step, "learning_rate": 1e-3, "grad_norm": 1.0})
      if step % 100 == 0:
        values = {"test/loss": 3 / step, "test/accuracy": 0.9, "test/recall/7": 0.8}
        writers.write(step, values | {"test/confusion_matrix": [[12, 5], [0, 7]], "test/ema/accuracy": 0.5})
  _json(folder)
  facts = dict(step=200, total_steps=200, mesh={"data": 1}, seconds={"start": 5.0, "train": 9.0, "input": 1.0})
  record.write_json(
    str(folder / "run.json"),
    facts | {"status": "finished", "versions": {"jax": "0.12"}, "git": {"commit": "0123", "changed_files": []},
             "command": ["bigjax"], "started": "2026-11-22T03:10:02+00:00", "starts": ["2026-11-22T03:10:02+00:00"],
             "incidents": [{"time": "2026-11-22T03:10:02+00:00", "what": "a line"}], "goodput": 0.9},
  )  # fmt: skip
  leaf = {"path": "head/kernel", "shape": [64, 10], "dtype": "float32", "count": 640, "bytes": 2560}
  record.write_json(str(folder / "parameters.json"), [leaf])
  for first, last in ((0, 20), (15, 40)):
    plan = _plan()
    with Ledger(str(folder), plan, first) as ledger:
      fetched = ledger.following(first)
      for step in range(first, last):
        fetched(*plan.examples(np.arange(step * 8, step * 8 + 8)))
        ledger.note(step + 1)
  found = {
    "bundle": 1, "steps": [3, 4], "kind": "nonfinite", "measured": {"loss": "nan", "grad_norm": 1.0}, "workdir": "w",
    "checkpoint": 0, "skips": [[3, 4]], "config": _resolved_digits(), "batch": {"epochs": [0], "ids": [1], "mask": [1]},
    "versions": {}, "action": "stop",
  }  # fmt: skip
  record.write_json(str(folder / "bundle.json"), found)


def _resolved_digits():
  from bigjax import config as configs

  return _resolved(configs.read(str(CONFIG)))


class _Source:
  def __len__(self):
    return 50


def _plan():
  from bigjax.data import pipeline

  return pipeline.Plan(_Source(), 8, 0, 1, seed=0)


def _metrics(folder: pathlib.Path):
  """As at the end of a run, and on the report page."""
  from bigjax import record
  from bigjax.errors import understood
  from bigjax.metrics import reading
  from bigjax.report import page
  from bigjax.report.run import Run

  rows = reading.read_rows(folder)
  reading.summary(folder)
  record.read_run(str(folder))
  with understood(str(folder)):  # As `write_report`, without the curves.
    html = page.html(Run.read(folder))
  assert "<script" not in html.lower()
  return rows


def _ledger(folder: pathlib.Path):
  """As `bigjax ledger` has it, and a run that goes on."""
  from bigjax import ledger
  from bigjax.errors import UserError

  history, plan = ledger.History.of(str(folder)), _plan()
  steps = np.array(sorted(history.steps), np.int64)
  for attempt, own in history.by_attempt(steps):
    if (attempt.examples, attempt.batch_size, attempt.seed, attempt.skips) != (50, 8, 0, ()):
      raise UserError(f"{attempt.number:05d}-00000.ledger is of other data.")
    if len(wrong := ledger.differing(plan, own, attempt.sums[np.isin(attempt.steps, own)])):
      raise UserError(f"{attempt.number:05d}-00000.ledger: step {wrong[0]} was fed other examples.")
  with ledger.Ledger(str(folder), plan, 30):
    pass
  return steps


def _bundle(folder: pathlib.Path):
  from bigjax import bundles

  return bundles.read(str(folder / "bundle.json"))


def _target(name, make, read, kinds, files=("*",), **how) -> Target:
  return Target(name, __name__, make, read, kinds, files, **how)


RECORDS = ("metrics.jsonl", "run.json", "parameters.json", "config.json")
TARGETS = [
  _target("config.json of a run", _json, _read_json, TREE, said=r"config"),
  _target("config in Python", _python, _read_python, STRINGS, said=r"config"),
  _target("flags", _flags, _read_flags, STRINGS, said=r"(?s).{20}"),
  _target("a config's argument", _argument, _read_argument, STRINGS, said=r"--config=\.\.\.:"),
  _target("preprocessing", _ops, _read_ops, STRINGS, said=r"preprocess: "),
  _target("splits, durations", _words, _read_words, STRINGS, said=r"split=|duration: "),
  _target("metrics and records", _workdir, _metrics, TREE, RECORDS),
  _target("ledger", _workdir, _ledger, ANY, ("*.ledger",), said=r"ledger|config\.data"),
  _target("bundle", _workdir, _bundle, TREE, ("bundle.json",)),
]
