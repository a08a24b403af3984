"""What a mesh can't do is said before anything is compiled: one message, with the numbers and the nearest that work."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from bigjax import config as configs
from bigjax import experiment
from bigjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]

GPT = dict(name="gpt", vocab_size=32, context=16, width=48, depth=4, heads=6, scan=True)
MOE = dict(name="decoder", vocab_size=32, context=16, width=32, depth=2, heads=4, mlp_dim=32, experts=6, top_k=2)

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: COMPILED.append(event))


def config(model=GPT, length=16, **changes):
  source = dict(name="synthetic", kind="tokens", num_examples=64, length=length, vocab_size=32)
  return dict(
    total_steps=2,
    batch_size=8,
    data=dict(source=source),
    model=model,
    task=dict(name="language_modeling"),
    optimizer=dict(name="adamw"),
    schedule=dict(name="constant", peak=1e-3),
  ) | dict(changes)


def built(**changes):
  return experiment.build(configs.resolve(config(**changes), experiment.TrainConfig))


REFUSED = {
  "an axis product that is not the device count": (
    dict(mesh=(("data", 4), ("tensor", 4))),
    "config.mesh: {'data': 4, 'tensor': 4} does not make up the 8 devices.*such as {'data': 2, 'tensor': 4}",
  ),
  "an axis that does not divide it": (
    dict(mesh=(("data", -1), ("tensor", 3))),
    "config.mesh: .* 8 devices .*such as {'data': 4, 'tensor': 2}",
  ),
  "heads over tensor": (
    dict(mesh=(("data", 2), ("tensor", 4))),
    "'heads' has 6 .* the 4 devices of tensor do not divide; 4 or 8 would",
  ),
  "heads dealt out by an all-to-all": (
    dict(mesh=(("data", 2), ("seq", 4)), sequence="ulysses"),
    "6 heads on each device can't be dealt to the 4 of axis seq.* 4 or 8 heads could",
  ),
  "a sequence over seq": (
    dict(mesh=(("data", 2), ("seq", 4)), length=12),
    "config.mesh: a sequence of 12 can't be split evenly: 4 devices of axis seq hold 8 chunks.*8 or 16",
  ),
  "experts over expert": (
    dict(mesh=(("data", 2), ("expert", 4)), model=MOE),
    "model.experts: 6 experts can't be divided over the expert axis of 4 devices; .* are 4 and 8",
  ),
  "a vocabulary over tensor": (
    dict(mesh=(("data", 1), ("tensor", 8)), sharding="tensor", model=GPT | dict(heads=8, vocab_size=33)),
    "'vocab' has 33 in .* 8 devices of tensor do not divide; 32 or 40 would",
  ),
  "a batch per microbatch of zero": (
    dict(mesh=(("data", 4), ("pipe", 2)), pipeline=dict(microbatches=4)),
    "config.batch_size: 8 examples in 4 microbatches over 4 data-parallel devices are 0.5 each.* Use 16",
  ),
  "microbatches that stages can't share": (
    dict(mesh=(("data", 4), ("pipe", 2)), pipeline=dict(microbatches=3)),
    "config.pipeline.microbatches: 3 .* 2 stages .*Use 2 or 4",
  ),
  "layers over stages": (
    dict(mesh=(("data", 1), ("pipe", 8))),
    "model.depth: 4 layers can't be 8 stages x 1 repeats. Take 8 layers",
  ),
  "layers that are not one stack": (dict(mesh=(("data", 4), ("pipe", 2)), model=GPT | dict(scan=False)), "scan=True"),
  "a batch over data": (
    dict(mesh=(("data", 8),), batch_size=12),
    "config.batch_size: 12 examples can't be split evenly over 8 .* such as 8 or 16",
  ),
  "parts of a batch without examples": (
    dict(mesh=(("data", 8),), accumulate=4),
    "config.batch_size: 8 examples .* over 8 data-parallel devices times accumulate=4; use a multiple of 32",
  ),
  "a large leaf that stays whole": (
    dict(mesh=(("data", 8),), sharding="fsdp", model=GPT | dict(vocab_size=50257, width=402)),
    "'params/token_embed/embedding': 77 MiB (50257, 402) would be whole on each of 8 devices",
  ),
  "a preset without its axis": (dict(mesh=(("data", 8),), sharding="fsdp+tensor"), "the mesh has no axis 'tensor'"),
  "a preset misspelt": (dict(mesh=(("data", 8),), sharding="fdsp"), "Did you mean 'fsdp'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_compiling_with_the_numbers_and_the_nearest_that_work(case):
  changes, words = REFUSED[case]
  COMPILED.clear()
  with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")) as said:
    built(**changes)
  assert "\n" not in str(said.value)
  assert not [event for event in COMPILED if "backend_compile" in event]


def test_bigjax_train_leaves_with_2_and_says_what_to_write(tmp_path):
  file = tmp_path / "heads.py"
  found = config(mesh=(("data", 2), ("tensor", 4)))
  file.write_text(f"import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({found!r})\n")
  command = [sys.executable, "-m", "bigjax", "train", f"--config={file}", f"--workdir={tmp_path / 'run'}"]
  env = os.environ | dict(JAX_NUM_CPU_DEVICES="8")
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
  assert done.returncode == 2
  assert re.fullmatch(r"bigjax train: .*'heads' has 6 .* 4 devices of tensor .*4 or 8 would.*\n", done.stderr)
  assert not list(tmp_path.glob("run/checkpoints*"))


def test_a_preset_lays_out_a_model_and_its_moments_by_the_models_own_table():
  run = built(mesh=(("data", 2), ("tensor", 4)), sharding="fsdp+tensor", model=GPT | dict(heads=4))
  params, moments = run.shardings.params, run.shardings.opt_state
  block = params["blocks"]
  specs = {
    "qkv": block["attn"]["qkv"]["kernel"].spec,
    "out": block["attn"]["out"]["kernel"].spec,
    "up": block["mlp"]["up"]["kernel"].spec,
    "down": block["mlp"]["down"]["kernel"].spec,
  }
  columns, rows = (None, "data", "tensor"), (None, "tensor", "data")
  assert {name: tuple(spec) for name, spec in specs.items()} == dict(qkv=columns, out=rows, up=columns, down=rows)
  assert tuple(params["token_embed"]["embedding"].spec) == ("tensor", "data")
  mu = next(x.mu for x in jax.tree.leaves(moments, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
  assert jax.tree.map(lambda a, b: a.spec == b.spec, params, mu) == jax.tree.map(lambda _: True, params)
