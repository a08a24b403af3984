"""Slices that are not here: refused in words when there are none such; laid out and compiled for when there are."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from bigjax.errors import UserError
from bigjax.plan import topology

CONFIG = """
import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.total_steps = 10
  config.batch_size = 16
  config.data = dict(source=dict(name="synthetic", kind="tokens", length=16))
  config.model = dict(name="gpt", vocab_size=256, context=32, width=64, depth=2, heads=4, scan=True)
  config.task = dict(name="language_modeling")
  config.optimizer = dict(name="adamw")
  config.schedule = dict(name="constant", peak=1e-3)
  config.mesh = [("data", -1)]
  config.sharding = "fsdp"
  return config
"""


@pytest.mark.parametrize(
  ("name", "slices", "words"),
  [
    ("v5x:2x4", 1, "there is no chip 'v5x'. Did you mean 'v5"),
    ("v5p:4x4", 1, "a v5p has 3 dimensions, write it as one of 2x2x1 (4 chips)"),
    ("v6e", 1, "write it as one of 1x1 (1 chips), 2x2 (4 chips)"),
    ("v5e:2x4", 0, "--num_slices=0 must be positive"),
    ("v5p:0x2x2", 1, "write it as one of 2x2x1 (4 chips)"),
    ("h100:0", 1, "write GPUs, or hosts x GPUs of one"),
    ("h100:8", 2, "GPUs have no slices"),
  ],
)
def test_a_topology_that_does_not_exist_is_refused_with_those_that_do(name, slices, words):
  with pytest.raises(UserError) as e:
    topology.devices(name, slices)
  assert words in str(e.value)


def test_without_the_compiler_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install .*bigjax\[plan\]"):
    topology.environment()
  with pytest.raises(UserError, match=r"pip install .*bigjax\[plan\]"):
    topology.environment("v5p:4x4x8")
  with pytest.raises(UserError, match="no chip 'v5x'"):  # Before that, since it helps nobody who has no such chip.
    topology.environment("v5x:4x4")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed")
def test_the_step_is_compiled_for_a_slice_that_is_not_here(tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  flags = [f"--config={tmp_path}/config.py", "--topology=v5e:2x4", "--compiled", "--json"]
  command = [sys.executable, "-m", "bigjax", "explain", *flags]
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["mesh"] == {"data": 8}
  gathered = {r["leaf"] for r in found["collectives"] if r["kind"] == "all-gather"}
  assert {f"params/blocks/mlp/{name}/kernel" for name in ("up", "down")} <= gathered
  assert all(r["expected"] and r["axes"] == ["data"] for r in found["collectives"])
