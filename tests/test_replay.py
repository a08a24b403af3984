"""A fault is seen again on one CPU, and the tensor, the module and the line it comes from are named."""

import copy
import json
import os
import shutil
import sys

import jax
import numpy as np
import pytest

from bigjax import bundles, experiment, main, nonfinite, replay, train
from bigjax import config as configs
from bigjax.data import synthetic
from bigjax.errors import UserError

TINY = dict(
  total_steps=12,
  batch_size=16,
  data=dict(source=dict(name="synthetic", kind="images", num_examples=400, shape=(4, 4, 1), num_classes=3)),
  model=dict(name="faulty.gated"),
  task=dict(name="classification"),
  optimizer=dict(name="adamw", weight_decay=0.0),
  schedule=dict(name="cosine", peak=1e-2),
  log_every=12,
  checkpoint_every=4,
  writers=("jsonl",),
)
# What an image that is all zeros gives is 0: its logarithm breaks the loss, its root the gradient.
GATED = """
import jax
import jax.numpy as jnp
from flax import nnx

class Gate(nnx.Module):
  def __init__(self, how, rngs):
    self.how, self.scale = how, nnx.Linear(16, 8, use_bias=False, rngs=rngs)

  def __call__(self, x):
    x = self.scale(x)
    size = jnp.mean(x * x, axis=-1, keepdims=True)
    if self.how == "log":
      size = jnp.log(size)
    if self.how == "sqrt":
      size = jnp.sqrt(size)
    return jnp.tanh(x) + size

class Block(nnx.Module):
  def __init__(self, how, rngs):
    self.gate = Gate(how, rngs)

  def __call__(self, x):
    return self.gate(x)

class Gated(nnx.Module):
  def __init__(self, how, rngs):
    self.blocks = nnx.List([Block("none", rngs), Block(how, rngs)])
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, inputs, *, key=None, train=False):
    x = inputs.reshape(inputs.shape[0], -1)
    return self.head(sum(block(x) for block in self.blocks))

def make(*, how: str = "none", rngs: nnx.Rngs) -> Gated:
  return Gated(how, rngs)
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
  """Models of one's own, and a batch of the order, that of step 7, some of whose images are all `pixels`."""
  (tmp_path / "faulty").mkdir()
  (tmp_path / "faulty" / "gated.py").write_text(GATED)
  monkeypatch.syspath_prepend(str(tmp_path))
  for name in ("faulty", "faulty.gated"):  # Of another test.
    monkeypatch.delitem(sys.modules, name, raising=False)

  def spoil(pixels=0.0, rows=(5,)):
    wrong = experiment.order(tiny()).examples(16 * 6 + np.array(rows))[1]
    fetch = synthetic.Synthetic.fetch

    def fetched(self, ids):
      found = fetch(self, ids)
      there = np.isin(ids, wrong)[:, None, None, None]
      return found | {"image": np.where(there, np.float32(pixels), found["image"])}

    monkeypatch.setattr(synthetic.Synthetic, "fetch", fetched)

  return spoil


def tiny(**changes):
  return configs.resolve(copy.deepcopy(TINY) | changes, experiment.TrainConfig)


def broken(workdir, step=7, **changes):
  """Trains until it stops at `step`; returns the bundle's folder."""
  with pytest.raises(FloatingPointError, match=f"at step {step} "):
    train.train(tiny(**changes), str(workdir))
  return str(workdir / "bundles" / f"{step:08d}")


def line(tmp_path, text):
  lines = (tmp_path / "faulty" / "gated.py").read_text().splitlines()
  (found,) = [i for i, x in enumerate(lines, 1) if text in x]
  return f"{tmp_path}/faulty/gated.py:{found} (Gate.__call__)"


def test_a_logarithm_of_zero_in_a_module_is_found_by_name_and_line(tmp_path, faulty, capsys):
  faulty()
  folder = broken(tmp_path / "run", model=dict(name="faulty.gated", how="log"))
  assert main.main(["replay", folder]) == 0
  said = capsys.readouterr().out.splitlines()
  assert said[0].startswith("nonfinite at step 7 on 8 x cpu: loss ") and said[0].endswith("; the answer was to stop")
  (place,) = [i for i, x in enumerate(said) if x.startswith("step 7: loss ")]
  assert said[place + 1] == "first not finite: log float32[16, 1] in blocks/1/gate: 1 infinite", said
  assert said[place + 2] == f"  {line(tmp_path, 'jnp.log')}"
  assert said[place + 3].startswith("first NaN that came of it: ") and len(said) == place + 5


def test_a_root_of_zero_that_breaks_the_gradient_alone_is_found(tmp_path, faulty):
  faulty()
  bundle = bundles.read(broken(tmp_path / "run", model=dict(name="faulty.gated", how="sqrt")))
  assert np.isfinite(bundle["measured"]["loss"]) and np.isnan(bundle["measured"]["grad_norm"])
  found = replay.again(bundle, say=lambda line: None)
  assert found.measured["loss"] == pytest.approx(bundle["measured"]["loss"], rel=1e-5)
  assert (found.origin.operation, found.origin.module) == ("div", "blocks/1/gate")
  assert found.origin.line == line(tmp_path, "jnp.sqrt")


def test_an_image_that_is_not_finite_is_named_as_what_came_in(tmp_path, faulty):
  faulty(np.inf)
  bundle = bundles.read(broken(tmp_path / "run"))
  found = replay.again(bundle, say=lambda line: None)
  assert (found.origin.operation, found.origin.module, found.origin.infinities) == ("argument", "1/image", 16)
  assert bundle["batch"]["ids"][5] == int(experiment.order(tiny()).examples(np.array([16 * 6 + 5]))[1][0])


@pytest.mark.slow
def test_layers_of_a_scanned_and_recomputed_model_are_named(tmp_path, faulty):
  faulty(np.inf)
  vit = dict(name="vit", image_size=4, channels=1, num_classes=3, patch_size=2, width=16, depth=3, heads=2, mlp_dim=32)
  run = experiment.build(tiny(model=vit | dict(scan=True, remat="full")), jax.devices()[:1])
  run = replay.with_names(run)
  with jax.set_mesh(run.mesh), train.train_batches(run, 0) as batches:
    state, batch = run.init(jax.random.key(0)), next(batches)
    spoilt = jax.tree.map_with_path(
      lambda path, x: x.at[1].set(1e30) if "mlp" in jax.tree_util.keystr(path) and x.ndim == 3 else x,
      state.params,
    )
    state = type(state)(state.step, spoilt, state.extras, state.opt_state)
    events = nonfinite.trace(train.make_step(run).__wrapped__, state, batch, jax.random.key(1))
  origin = events["1/loss"].origins[0]
  assert origin.operation != "argument" and origin.turns == (1,) and "blocks" in origin.module, str(origin)
  assert "/bigjax/models/" in origin.line, str(origin)


def test_a_run_that_skips_or_goes_back_leaves_bundles_that_can_be_replayed(tmp_path, faulty):
  faulty()
  model = dict(name="faulty.gated", how="log")
  for action in ("skip", "rollback"):
    workdir = tmp_path / action
    config = tiny(model=model, guard=action, keep=dict(last=1, every=4))
    assert train.train(config, str(workdir)) == "finished"
    bundle = bundles.read(str(workdir / "bundles" / "00000007"))
    assert (bundle["action"], bundle["checkpoint"]) == (action, 4)
    assert replay.again(bundle, say=lambda line: None).origin.operation == "log"


def test_a_leap_is_replayed_step_by_step(tmp_path, faulty, capsys):
  faulty(3e4, range(16))
  guard = dict(spike=dict(above=20.0, window=6, patience=1, before=0), max_rollbacks=0)
  with pytest.raises(FloatingPointError, match="The loss leapt to .* from step 7 to 7.*went back 0 times"):
    train.train(tiny(guard=guard), str(tmp_path / "r"))
  (folder,) = (tmp_path / "r" / "bundles").iterdir()
  assert main.main(["replay", str(folder)]) == 0
  said = capsys.readouterr().out
  assert "spike at step 7" in said and "step 7: loss " in said and said.endswith("all of it is finite\n")


def test_where_the_checkpoint_is_gone_it_is_said_and_the_start_will_do(tmp_path, faulty):
  faulty()
  bundle = bundles.read(broken(tmp_path / "run", model=dict(name="faulty.gated", how="log")))
  shutil.move(tmp_path / "run", tmp_path / "moved")
  with pytest.raises(UserError, match="The checkpoint of step 4 in .*/run is gone.*--workdir.*--from_start"):
    replay.again(bundle)
  for how in (dict(workdir=str(tmp_path / "moved")), dict(from_start=True)):
    assert replay.again(bundle, say=lambda line: None, **how).origin.operation == "log"


def test_what_is_no_bundle_or_not_of_this_code_is_one_message(tmp_path, faulty, capsys):
  faulty()
  folder = broken(tmp_path / "run", model=dict(name="faulty.gated", how="log"))
  file = os.path.join(folder, "bundle.json")
  capsys.readouterr()
  with open(file) as f:
    text = f.read()
  whole = json.loads(text)

  def said(content):
    with open(file, "w") as f:
      f.write(content)
    assert main.main(["replay", folder]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line

  assert "can't be read, it may be cut short" in said(text[: len(text) // 2])
  assert "is no bundle of this version of bigjax (1); it says None" in said("{}")
  assert "is no bundle of this version" in said("[1]")
  parts = {k: whole[k] for k in whole if k not in ("batch", "config")}
  assert "is not whole: batch, config missing" in said(json.dumps(parts))
  other = copy.deepcopy(whole)
  other["config"]["temperature"] = 1.0
  assert "is of another version of the code" in said(json.dumps(other))
  other = copy.deepcopy(whole)
  other["batch"]["ids"][3] += 1
  assert "step 7 has other examples now than the bundle says" in said(json.dumps(other))
  assert main.main(["replay", str(tmp_path / "nothing")]) == 2
  assert "is no bundle; those of a run are the folders in WORKDIR/bundles" in capsys.readouterr().err
