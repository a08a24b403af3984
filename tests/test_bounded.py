"""A run leaves nothing behind but its workdir, and takes no more memory the longer it goes on."""

import copy
import ctypes
import gc
import os
import pathlib
import tempfile
import threading

import numpy as np
import pytest

from bigjax import config as configs
from bigjax import experiment, metrics, train

IMAGES = dict(name="synthetic", kind="images", num_examples=400, shape=(8, 8, 1), num_classes=3)
TINY = dict(
  total_steps=12,
  batch_size=16,
  data=dict(source=IMAGES, preprocess="random_shift(1)"),
  model=dict(name="mlp", in_features=64, widths=(32,), num_outputs=3),
  task=dict(name="classification"),
  optimizer=dict(name="adamw", weight_decay=0.0),
  schedule=dict(name="constant", peak=1e-3),
  log_every=5,
  checkpoint_every=4,
  writers=("jsonl", "csv"),
  evals=dict(val=dict(evaluator=dict(name="classification"), data=dict(source=IMAGES), every=6)),
)


def run(workdir, **changes):
  config = configs.resolve(copy.deepcopy(TINY) | changes, experiment.TrainConfig)
  assert train.train(config, str(workdir)) == "finished"


def handles():
  """What this process has open."""
  found = []
  for number in os.listdir("/proc/self/fd"):
    try:
      found.append(os.readlink(f"/proc/self/fd/{number}"))
    except OSError:  # That of the listing itself.
      continue
  return sorted(found)


def threads():
  return sorted(t.name for t in threading.enumerate())


@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_file_handle_or_temporary_file_is_left_behind(tmp_path, monkeypatch, fails):
  run(tmp_path / "first")  # JAX's own threads stay for as long as the process does.
  temporary = tmp_path / "temporary"
  temporary.mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(temporary))
  monkeypatch.setenv("TMPDIR", str(temporary))
  gc.collect()
  before = handles(), threads()
  if fails:
    original = metrics.Logger.step

    def failing(self, step, measured):
      original(self, step, measured)
      if step == 7:
        raise RuntimeError("unplugged")

    monkeypatch.setattr(metrics.Logger, "step", failing)
    with pytest.raises(RuntimeError, match="unplugged"):
      run(tmp_path / "second")
  else:
    run(tmp_path / "second")
  gc.collect()
  assert (handles(), threads()) == before
  assert not list(temporary.iterdir())
  left = [p.name for p in (tmp_path / "second").rglob("*") if "tmp" in p.name or "unfinished" in p.name]
  assert not left


@pytest.mark.slow
def test_host_memory_is_flat_over_2000_steps_with_a_save_every_20(tmp_path, monkeypatch):
  page, resident = os.sysconf("SC_PAGESIZE"), []
  original = metrics.Logger.step

  def measured(self, step, values):
    original(self, step, values)
    if step % 100 == 90:
      gc.collect()
      ctypes.CDLL(None).malloc_trim(0)  # What the C library keeps for later is no part of the run.
      resident.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * page)

  monkeypatch.setattr(metrics.Logger, "step", measured)
  # 2.4 MB of state: one that leaked at each save would be 240 MB.
  model = TINY["model"] | dict(widths=(512, 256))
  run(tmp_path, total_steps=2000, checkpoint_every=20, log_every=10, model=model, evals={}, writers=("jsonl",))
  later = np.array(resident[len(resident) // 4 :]) / 2**20
  growth = np.polyfit(np.arange(len(later)), later, 1)[0] * len(later)
  print(f"{later[0]:.0f} MiB after 500 steps, {later[-1]:.0f} MiB after 2,000; fitted growth {growth:.1f} MiB")
  assert abs(growth) < 16 and later.max() - later[0] < 32
