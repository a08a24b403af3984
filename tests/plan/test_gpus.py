"""GPUs that are not here: without the plugin stand-ins, with it a program of their compiler."""

import json
import os
import subprocess
import sys

import pytest

from bigjax.plan import gpus, profiles, topology

CONFIG = """
import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.total_steps = 10
  config.batch_size = 16
  config.data = dict(source=dict(name="synthetic", kind="tokens", length=128))
  config.model = dict(name="gpt", vocab_size=256, context=128, width=256, depth=2, heads=4, scan=True)
  config.task = dict(name="language_modeling")
  config.optimizer = dict(name="adamw")
  config.schedule = dict(name="constant", peak=1e-3)
  config.precision = "mixed"
  config.mesh = [("data", -1)]
  config.sharding = "fsdp"
  return config
"""


@pytest.mark.parametrize("chip", topology.GPUS)
def test_what_the_compiler_is_told_is_what_the_profile_has(chip):
  profile = profiles.named(chip)
  told = gpus.target(chip, profile.kinds[0])
  figure = lambda name: float(told.partition(f"{name}: ")[2].split()[0])
  assert figure("memory_bandwidth") == pytest.approx(profile.hbm_bandwidth, rel=0.01)
  assert figure("device_memory_size") == pytest.approx(profile.hbm, rel=0.08)
  assert told.count("{") == told.count("}") and profile.kinds[0] in told


def test_without_the_plugin_devices_of_the_cpu_stand_for_them(monkeypatch):
  monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
  assert gpus.compiler() is None and not topology.compiles("h100:2x4")
  assert [d.platform for d in topology.devices("h100:2x4")] == ["cpu"] * 8


@pytest.mark.slow
@pytest.mark.skipif(gpus.compiler() is None, reason="the GPUs' compiler, jax-cuda12-plugin, is not installed")
def test_a_step_is_compiled_for_gpus_that_are_not_here(tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  command = [sys.executable, "-m", "bigjax", "plan", f"--config={tmp_path}/config.py", "--topology=h100:2x4"]
  command += [f"--out={tmp_path}/out", f"--keep={tmp_path}/keep"]
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
  assert done.returncode == 0, done.stderr
  plan = json.loads((tmp_path / "out" / "plan.json").read_text())
  assert plan["compiled"] and plan["fits"] and plan["chips"] == 8
  assert plan["work"]["hardware_flops_a_device"] * 8 >= 0.9 * plan["work"]["model_flops"]
  assert {"all-gather", "all-reduce"} & {c["kind"] for c in plan["communication"]["collectives"]}
  assert plan["time"]["roofline_seconds"] > 0 and plan["time"]["expected_seconds"] is None
