"""The entrypoint as a person meets it: in a process of its own, by exit codes and messages."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
import ml_collections
def get_config():
  images = dict(name="synthetic", kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
  return ml_collections.ConfigDict(dict(
      total_steps=8, batch_size=8, log_every=1, checkpoint_every=4, writers=("jsonl", "csv"),
      data=dict(source=images), model=dict(name="linear", in_features=16, num_outputs=3),
      task=dict(name="classification"), optimizer=dict(name="sgd"), schedule=dict(name="constant", peak=0.1),
      evals=dict(val=dict(evaluator=dict(name="classification"), data=dict(source=images), every=4)),
  ))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  file = tmp_path_factory.mktemp("configs") / "tiny.py"
  file.write_text(CONFIG)
  return str(file)


def bigjax(*args, code=0, **env):
  command = [sys.executable, "-m", "bigjax", *map(str, args)]
  done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120)
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout, done.stderr


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "tiny"
  out, err = bigjax("train", f"--config={config}", f"--workdir={workdir}")
  return workdir, out, err


def test_a_run_ends_with_a_summary_and_where_to_look_next(finished):
  workdir, out, err = finished
  assert "Finished at step 8 of 8" in out and "val/accuracy" in out and "report.html" in out
  assert "WARNING" not in err and "Traceback" not in err
  for name in (
    "config.json",
    "run.json",
    "parameters.json",
    "metrics.jsonl",
    "metrics.csv",
    "curves.png",
    "report.html",
    "checkpoints",
  ):
    assert (workdir / name).exists(), name


def test_eval_measures_the_last_checkpoint_or_a_named_one(finished):
  workdir, *_ = finished
  out, _ = bigjax("eval", f"--workdir={workdir}")
  assert "step 8" in out and "val/accuracy" in out
  _, err = bigjax("eval", f"--workdir={workdir}", "--step=3", code=2)
  assert "--step=3" in err and "8" in err


def test_explain_shows_rules_layouts_and_bytes(config):
  out, _ = bigjax(
    "explain",
    f"--config={config}",
    "--devices=4",
    "--config.sharding=[('.*kernel', 'fsdp(data,8)'), ('.*', 'replicated')]",
  )
  line = next(row for row in out.splitlines() if row.startswith("params/") and "kernel" in row)
  assert "16x3" in line and "fsdp" in line and "48 B" in line  # 16 x 3 float32 over 4 devices.


def test_diff_of_a_workdir_and_a_config_names_what_changed(finished, config, tmp_path):
  workdir, *_ = finished
  other = tmp_path / "other.py"
  other.write_text(CONFIG.replace("peak=0.1", "peak=0.2"))
  out, _ = bigjax("diff", workdir, other)
  assert "schedule.peak" in out and "0.2" in out and "1 difference" in out
  assert "0 differences" in bigjax("diff", workdir, config)[0]


def test_repro_runs_it_again_to_the_bit(finished, tmp_path):
  workdir, *_ = finished
  out, _ = bigjax("repro", workdir, f"--into={tmp_path / 'again'}")
  assert "the same to the bit" in out


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--config.modle.width=3"], ["config.modle", "Did you mean 'model'"]),
    (["--config.model.name=linaer"], ["config.model.name", "Did you mean 'linear'"]),
    (["--config.accumulate=3"], ["config.batch_size", "accumulate=3", "multiple of"]),
    (["--config.batch_size=many"], ["config.batch_size must be int, not 'many'"]),
    (["--config.total_steps=5 epoks"], ["config.total_steps", "epochs"]),
    (["--config.decay=[('.*krenel', 0.1)]"], ["config.decay", ".*krenel"]),
    (["--config.data.source.name=tfds"], ["config.data.source"]),
    (["--config.model.num_outputs=2"], ["'label' holds 2"]),
    (["--config.schedule.peak=-1"], ["peak"]),
  ],
)
def test_a_mistake_is_one_message_and_exit_code_2(config, tmp_path, flags, words):
  _, err = bigjax("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags, code=2)
  assert "Traceback" not in err and err.splitlines()[-1].startswith("bigjax train: ")
  for word in words:
    assert word in err, err


def test_a_refused_run_does_not_occupy_its_workdir(config, tmp_path):
  bigjax("train", f"--config={config}", f"--workdir={tmp_path}", "--config.model.num_outputs=2", code=2)
  out, _ = bigjax("train", f"--config={config}", f"--workdir={tmp_path}")
  assert "Finished at step 8 of 8" in out


def test_a_workdir_of_another_config_is_refused(finished, config):
  workdir, *_ = finished
  before = (workdir / "metrics.jsonl").read_bytes()
  _, err = bigjax("train", f"--config={config}", f"--workdir={workdir}", "--config.seed=5", code=2)
  assert "seed: 0 -> 5" in err and "another --workdir" in err
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_an_unknown_command_and_a_missing_file_are_said_so(config):
  assert "Did you mean 'train'" in bigjax("trian", code=2)[1]
  assert "there is no file" in bigjax("train", "--config=nowhere.py", "--workdir=x", code=2)[1]
  assert "bigjax COMMAND" in bigjax()[0]


def test_a_loss_that_overflows_is_a_fault_of_the_run_with_exit_code_1(config, tmp_path):
  _, err = bigjax(
    "train",
    f"--config={config}",
    f"--workdir={tmp_path}",
    "--config.schedule.peak=1e38",
    "--config.task.class_weights=(1e30,1e30,1.0)",
    code=1,
  )
  assert "Traceback" not in err and "config.clip" in err


def test_sigterm_saves_and_leaves_with_75_and_the_run_goes_on(config, tmp_path):
  command = [
    sys.executable,
    "-m",
    "bigjax",
    "train",
    f"--config={config}",
    f"--workdir={tmp_path}",
    "--config.total_steps=1000000",
  ]
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    rows = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while (not rows.exists() or rows.read_text().count("\n") < 20) and time.monotonic() < deadline:
      time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
  assert process.returncode == 75, out + err
  stopped = json.loads((tmp_path / "run.json").read_text())
  assert stopped["status"] == "stopped" and stopped["step"] >= 10
  assert (tmp_path / "checkpoints" / f"{stopped['step']:08d}").is_dir()
