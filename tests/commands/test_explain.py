"""What `bigjax explain` says: leaves and rules, words, and each collective of the compiled step with its reason."""

import json
import pathlib
import subprocess
import sys

import pytest

from bigjax.commands import explain
from bigjax.errors import UserError
from bigjax.main import main

CONFIG = """
import ml_collections
from bigjax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, text="")
  config = ml_collections.ConfigDict()
  config.total_steps = 10
  config.batch_size = 16
  config.data = dict(source=dict(name="text", path=arg.text, tokenizer="char", block=16, stride=1))
  config.model = dict(name="gpt", vocab_size=16, context=16, width=32, depth=4, heads=4, scan=True, remat="full")
  config.task = dict(name="language_modeling")
  config.optimizer = dict(name="adamw")
  config.schedule = dict(name="constant", peak=1e-3)
  return config
"""


@pytest.fixture
def config(tmp_path):
  (tmp_path / "text.txt").write_text("hello world, " * 100)
  (tmp_path / "config.py").write_text(CONFIG)
  return f"--config={tmp_path}/config.py:text={tmp_path}/text.txt"


def explained(config, capsys, *flags):
  assert explain.main([config, "--json", *flags]) == 0
  return json.loads(capsys.readouterr().out)


def test_data_parallel_sends_each_gradient_once(config, capsys):
  found = explained(config, capsys, "--compiled", "--config.mesh=[('data', 8)]", "--config.model.tied=False")
  assert found["words"]["batch"] == {"axes": ["data"], "parts": 8} and found["words"]["heads"]["parts"] == 1
  params = [leaf for leaf in found["leaves"] if leaf["path"].startswith("params/")]
  large = [r for r in found["collectives"] if "gradients" in r["why"]]
  assert {(r["kind"], *r["axes"], r["pass"]) for r in large} == {("all-reduce", "data", "backward")}
  # Beside the gradients, the sums and weights of the loss.
  assert 0 <= sum(r["total"] for r in found["collectives"]) - sum(leaf["bytes"] for leaf in params) < 1024
  assert all(r["expected"] for r in found["collectives"])


@pytest.mark.parametrize(
  ("mesh", "strategy"),
  [
    pytest.param("[('data', 8)]", "fsdp", marks=pytest.mark.slow),
    ("[('replica', 2), ('data', 4)]", "hsdp"),
    pytest.param("[('data', 2), ('tensor', 4)]", "tensor", marks=pytest.mark.slow),
    ("[('data', 4), ('tensor', 2)]", "fsdp+tensor"),
  ],
)
def test_the_presets_send_nothing_that_is_not_explained(config, capsys, mesh, strategy):
  found = explained(config, capsys, "--compiled", f"--config.mesh={mesh}", f"--config.sharding={strategy}")
  assert [r for r in found["collectives"] if not r["expected"]] == []


def test_fsdp_gathers_every_layer_s_kernels_twice_by_name(config, capsys):
  found = explained(config, capsys, "--compiled", "--config.mesh=[('data', 8)]", "--config.sharding=fsdp")
  gathered = {}
  for r in found["collectives"]:
    if r["kind"] == "all-gather" and "kernel" in r["leaf"]:
      gathered.setdefault(r["leaf"].removeprefix("params/blocks/"), []).append((r["pass"], r["bytes"], r["count"]))
  # Four layers; forward, and again for the backward pass, since remat keeps nothing.
  sizes = {"attn/qkv": 32 * 96, "attn/out": 32 * 32, "mlp/up": 32 * 128, "mlp/down": 128 * 32}
  assert {name.removesuffix("/kernel") for name in gathered} == set(sizes)
  for name, size in sizes.items():
    assert [row[1:] for row in gathered[f"{name}/kernel"]] == [(4 * size, 4)] * 2


def test_a_kernel_split_the_wrong_way_is_flagged_with_the_line_of_its_product(config, capsys):
  wrong = "--config.sharding=[('.*mlp/down/kernel', 'split(tensor,-1)'), ('.*', 'tensor')]"
  assert explain.main([config, "--compiled", "--config.mesh=[('data', 2), ('tensor', 4)]", wrong]) == 0
  out = capsys.readouterr().out
  told = out.partition("that nothing in the config explains")[2]
  assert "all-gather over tensor, 4 x 64.0 KiB at bigjax/models/layers.py:" in told  # 8 x 16 tokens, 4 * 32 units.
  assert "a parameter is split the other way" in told and "words      batch over data (2); heads over tensor (4)" in out


def test_a_pipeline_tells_its_bubble(config, capsys):
  mesh = ["--config.mesh=[('data', 2), ('pipe', 4)]", "--config.sharding=pipe"]
  found = explained(config, capsys, *mesh, "--config.pipeline.microbatches=8")
  assert found["pipeline"] == {"stages": 4, "microbatches": 8, "repeats": 1, "bubble": pytest.approx(3 / 11)}
  assert explain.main([config, *mesh]) == 0
  assert "4 stages, 4 microbatches: a device waits 42.9% of the time" in capsys.readouterr().out


def test_a_dead_rule_is_refused(config):
  with pytest.raises(UserError, match="matches nothing|no name|decides nothing|config.sharding"):
    explain.main([config, "--config.sharding=[('.*kernle', 'fsdp'), ('.*', 'replicated')]"])


def test_one_device_sends_nothing(config, tmp_path):
  command = [sys.executable, "-m", "bigjax", "explain", config, "--devices=1", "--compiled"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2], check=False)
  assert done.returncode == 0, done.stderr
  assert "No device sends anything to another." in done.stdout


def test_a_mistake_leaves_with_2(config, capsys):
  assert main(["explain", config, "--config.sharding=[('.*kernle', 'fsdp'), ('.*', 'replicated')]"]) == 2
  assert "kernle" in capsys.readouterr().err
