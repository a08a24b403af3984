"""`bigjax plan`: over-memory is a result, times add up by hand, changes show; a whole plan where the compiler is."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

import bigjax
from bigjax.errors import UserError
from bigjax.plan import calibration, compiled, profiles, report, text

OOM = (
  "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
  "temporaries (32.00G) exceeds available HBM (15.75G). HLO module: jit_f.\nSee https://openxla.org/xla/errors\n"
  "  Largest program allocations in hbm:\n\n"
  '  1. Size: 16.00G\n     Operator: op_name="jit(step)/jvp()/dot_general" source_file="/x/bigjax/models/layers.py" '
  "source_line=217\n     Shape: f32[65536,65536]{1,0:T(8,128)}\n     Unpadded size: 16.00G\n     ====\n\n"
  '  2. Size: 512.00M\n     Operator: op_name="jit(step)/broadcast"\n     Shape: bf16[16384,16384]{1,0}\n'
)


def test_a_program_too_large_is_read_from_what_the_compiler_says():
  found = compiled.too_large(OOM)
  assert (found["needed"], found["available"]) == (32 * 2**30, int(15.75 * 2**30))
  assert [(b["bytes"], b["shape"], b["what"], b["line"]) for b in found["buffers"]] == [
    (16 * 2**30, "f32[65536,65536]{1,0:T(8,128)}", "dot_general", "bigjax/models/layers.py:217"),
    (512 * 2**20, "bf16[16384,16384]{1,0}", "broadcast", ""),
  ]
  assert compiled.too_large("INVALID_ARGUMENT: something else") is None


def parts(**work):
  done = dict(product_seconds=0.5, kernel_seconds=0.1, hbm_bytes=819e9 / 4, estimated_cycles=600_000_000)
  done |= dict(model_flops_a_device=0.4 * 197e12, kernels_of_unknown_work=[], endless_loops=[])
  axis = dict(link="ICI", bandwidth=50e9, seconds=0.3, exposed=0.2)
  return dict(work=done | work, communication=dict(axes={"data": axis}), chips=4)


def test_the_expected_step_is_cycles_and_kernels_and_what_is_waited_for():
  found = report.step_time((1000, "tokens"), profiles.named("v5e"), parts())
  assert found["bounds"] == {"compute": 0.5, "HBM": pytest.approx(0.25), "ICI data": 0.3}
  assert (found["bound_by"], found["mfu_bound"]) == ("compute", pytest.approx(0.8))
  seconds = (600e6 / profiles.named("v5e").rate + 0.1 + 0.2) * calibration.FACTOR
  assert found["expected_seconds"] == pytest.approx(seconds)
  assert found["mfu_expected"] == pytest.approx(0.4 / seconds)
  assert found["pace_a_chip"] == pytest.approx(1000 / seconds / 4)


def test_nothing_is_expected_to_be_faster_than_its_bound():
  found = report.step_time((1000, "tokens"), profiles.named("v5e"), parts(product_seconds=2.0))
  assert found["expected_seconds"] == 2.0


PLAN = dict(
  topology="v5e:2x2",
  slices=1,
  mesh={"data": 4},
  fits=True,
  compiler_options={},
  memory=dict(total=2**30, params=2**20),
  work=dict(estimated_cycles=1000),
  time=dict(expected_seconds=0.5),
)


def test_against_another_plan_shows_what_changed_and_nothing_else():
  other = PLAN | dict(memory=dict(total=2**31, params=2**20), fits=False)
  lines = text.compare(PLAN, other).splitlines()[1:]
  assert [line.split()[0] for line in lines] == ["memory.total", "fits"]
  assert "2.00 GiB -> 1.00 GiB  -50.0%" in lines[0]
  assert text.compare(PLAN, PLAN).endswith("nothing differs")


CONFIG = """
import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.total_steps = 1000
  config.batch_size = 8
  config.data = dict(source=dict(name="synthetic", kind="tokens", length=16))
  config.model = dict(name="gpt", vocab_size=64, context=16, width=32, depth=2, heads=2, scan=True)
  config.task = dict(name="language_modeling")
  config.optimizer = dict(name="adamw")
  config.schedule = dict(name="constant", peak=1e-3)
  config.sharding = "fsdp"
  return config
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed")
def test_a_step_is_planned_for_a_slice_that_is_not_here(tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  command = [sys.executable, "-m", "bigjax", "plan", f"--config={tmp_path}/config.py", "--topology=v5e:2x2"]
  command += [f"--out={tmp_path}/out", "--price=2"]
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
  assert done.returncode == 0, done.stderr
  plan = json.loads((tmp_path / "out" / "plan.json").read_text())
  assert plan["fits"] and plan["chips"] == 4
  layer, tokens = 12 * 32 * 32, 8 * 16
  attention = 3 * 2 * 2 * 2 * 8 * 32 * (16 * 17 // 2)
  assert plan["work"]["model_flops"] == 6 * tokens * (2 * layer + 64 * 32) + attention
  assert plan["work"]["hardware_flops_a_device"] * 4 >= 0.9 * plan["work"]["model_flops"]
  assert plan["memory"]["total"] >= plan["memory"]["params"] + plan["memory"]["optimizer"]
  assert plan["time"]["expected_seconds"] >= plan["time"]["roofline_seconds"] > 0
  assert plan["run"]["cost"] == pytest.approx(2 * plan["run"]["chip_hours"])
  assert "data" in plan["communication"]["axes"]
  assert (tmp_path / "out" / "plan.html").read_text().startswith("<!doctype html>")


def test_the_package_is_what_a_notebook_calls():
  assert callable(bigjax.plan)
  if importlib.util.find_spec("libtpu") is None:
    with pytest.raises(UserError, match=r"bigjax\[plan\]"):
      bigjax.plan({}, "v5e:2x2")
