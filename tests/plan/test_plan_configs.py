"""Every config in configs/ is planned, its data here or not; where the TPU's compiler is, by compiling it."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

import bigjax
from bigjax.errors import UserError
from bigjax.plan import analytic, prepare, work

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
# Batches of 12, 100 and 500 are for fewer devices than the others'; a table's columns can't be told without it.
FEW = {"shakespeare_char": 4, "mnist1d": 4, "mnist_cnn": 4, "fashion_resnet": 4}
TABLES = ("housing_mlp",)
CHIPS = {"llama31_8b": "v5p:2x4x4", "llama31_70b": "v5p:4x4x8", "mixtral_8x7b": "v5p:4x4x8", "gpt2_124m": "v5e:4x4"}
CHIPS |= {"imagenet_resnet50": "v5e:8x8", "imagenet21k_vit_g14": "v5e:8x16"}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_a_config_is_estimated_wherever_its_data_are(file, monkeypatch, tmp_path):
  if file.stem == "mnist1d":
    pytest.importorskip("mnist1d", reason="the mnist1d package makes the data")
  monkeypatch.chdir(tmp_path)  # Where there are none.
  config = bigjax.resolve(str(file))
  topology = f"h100:{FEW.get(file.stem, 8)}"
  if file.stem in TABLES:
    with pytest.raises(UserError, match="local_data"):
      prepare.prepare(config, topology)
    return
  prepared = prepare.prepare(config, topology)
  flops = work.of(prepared.run)
  found = analytic.estimate(prepared, flops)
  assert flops.total > 0
  assert found["memory"]["total"] > found["memory"]["params"] + found["memory"]["optimizer"]
  assert found["seconds"] >= found["bounds"]["compute"] > 0
  assert (config.data.source.name in ("tokens", "text", "tfds")) <= prepared.stands_in
  assert (prepared.steps is None) == (prepared.stands_in and "epoch" in str(config.total_steps))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed")
@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_a_config_is_compiled_for_a_slice_that_is_not_here(file, tmp_path):
  if file.stem in TABLES or (file.stem == "mnist1d" and importlib.util.find_spec("mnist1d") is None):
    pytest.skip(f"{file.stem} reads a table or a package that is not here, and its shapes with it")
  topology = CHIPS.get(file.stem, "v5e:2x2")
  command = [sys.executable, "-m", "bigjax", "plan", f"--config={file}", f"--topology={topology}", "--json"]
  done = subprocess.run(
    [*command, f"--keep={tmp_path}"], capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["fits"] or found["memory"]["remedies"]
  assert len(found["memory"]["buffers"]) > 0
  if found["fits"]:
    assert 0 < found["time"]["mfu_bound"] <= 1
