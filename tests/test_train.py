"""One experiment end to end: exact resume, sums and weights, what the loop keeps and when it stops."""

import copy
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import config as configs
from bigjax import experiment, initialise, metrics, record, train
from bigjax.errors import UserError

TINY = dict(
  total_steps=12,
  batch_size=16,
  data=dict(
    source=dict(name="synthetic", kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3),
    preprocess="random_shift(1)",
  ),
  model=dict(name="mlp", in_features=16, widths=(8,), num_outputs=3, dropout=0.2),
  task=dict(name="classification"),
  optimizer=dict(name="adamw", weight_decay=0.0),
  schedule=dict(name="cosine", peak=1e-2, warmup="10%"),
  decay=[(".*kernel", 0.1)],
  clip=dict(norm=1.0),
  ema=0.9,
  log_every=1,
  checkpoint_every=4,
  writers=("jsonl",),
  evals=dict(
    val=dict(
      evaluator=dict(name="classification", num_classes=3),
      data=dict(source=dict(name="synthetic", kind="images", num_examples=21, shape=(4, 4, 1), num_classes=3)),
      every=4,
      batch_size=8,
    )
  ),
)


def tiny(**changes):
  config = copy.deepcopy(TINY) | changes
  return configs.resolve(config, experiment.TrainConfig)


def final(workdir, config):
  run = experiment.build(config)
  with train.Checkpoints(workdir, read_only=True) as checkpoints:
    state, loop = checkpoints.restore(run.abstract, run.shardings)
  return jax.device_get(state), loop


def rows(workdir):
  with open(os.path.join(workdir, "metrics.jsonl")) as f:
    return [json.loads(line) for line in f]


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


class StopAfter:
  """Sends this process a SIGTERM while step `step` is being logged, as a preempted machine would."""

  def __init__(self, monkeypatch, step):
    original = metrics.Logger.step

    def logged(self, at, measured):
      original(self, at, measured)
      if at == step:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.Logger, "step", logged)


def test_a_run_learns_and_says_what_it_did(tmp_path):
  config = tiny(total_steps=60, data=TINY["data"] | {"preprocess": ""})
  assert train.train(config, str(tmp_path)) == "finished"
  found = rows(tmp_path)
  losses = [r["loss"] for r in found if "loss" in r]
  assert len(losses) == 60 and losses[-1] < losses[0] / 2
  last = [r for r in found if "val/accuracy" in r][-1]
  assert last["step"] == 60 and last["val/accuracy"] > 0.9 and "val/ema/accuracy" in last
  run = record.read_run(str(tmp_path))
  assert run["status"] == "finished" and run["parameter_count"] == 16 * 8 + 8 + 8 * 3 + 3
  assert run["versions"]["jax"] == jax.__version__
  assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(configs.describe(config)))


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_a_run_stopped_anywhere_and_resumed_is_bitwise_the_same(tmp_path, monkeypatch, stop_at):
  whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
  train.train(tiny(), whole)
  with monkeypatch.context() as patch:
    StopAfter(patch, stop_at)
    assert train.train(tiny(), parts) == "stopped"
  assert record.read_run(parts)["status"] == "stopped"
  assert final(parts, tiny())[0].step == stop_at
  assert train.train(tiny(), parts) == "finished"
  assert_equal(final(whole, tiny()), final(parts, tiny()))
  assert rows(whole) == rows(parts)


def test_a_run_that_failed_goes_on_from_its_last_checkpoint_bitwise(tmp_path, monkeypatch):
  whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
  train.train(tiny(), whole)
  original = metrics.Logger.step

  def killed(self, step, measured):
    original(self, step, measured)
    if step == 7:
      raise RuntimeError("pulled the plug")

  with monkeypatch.context() as patch:
    patch.setattr(metrics.Logger, "step", killed)
    with pytest.raises(RuntimeError, match="plug"):
      train.train(tiny(), parts)
  assert record.read_run(parts)["status"] == "failed" and "plug" in record.read_run(parts)["error"]
  train.train(tiny(), parts)
  assert_equal(final(whole, tiny()), final(parts, tiny()))
  assert rows(whole) == rows(parts)


def test_a_finished_run_is_left_as_it_is(tmp_path):
  train.train(tiny(), str(tmp_path))
  before = rows(tmp_path)
  assert train.train(tiny(), str(tmp_path)) == "finished"
  assert rows(tmp_path) == before


@pytest.mark.parametrize(
  "mesh_and_rules",
  [
    ((("data", 1), ("tensor", 8)), ((".*hidden.*kernel", "split(tensor,-1)"), (".*", "replicated"))),
    ((("data", -1),), ((".*", "fsdp(data,8)"),)),
  ],
)
def test_the_mesh_does_not_change_what_is_learned(tmp_path, mesh_and_rules):
  mesh, rules = mesh_and_rules
  plain = tiny(data=TINY["data"] | {"preprocess": ""})
  other = tiny(
    data=TINY["data"] | {"preprocess": ""},
    mesh=mesh,
    sharding=rules if "hidden" not in rules[0][0] else ((".*", "replicated"),),
  )
  train.train(plain, str(tmp_path / "a"))
  train.train(other, str(tmp_path / "b"))
  a, b = rows(tmp_path / "a"), rows(tmp_path / "b")
  np.testing.assert_allclose([r["loss"] for r in a if "loss" in r], [r["loss"] for r in b if "loss" in r], rtol=2e-5)


def test_a_checkpoint_restores_on_another_mesh(tmp_path):
  train.train(tiny(), str(tmp_path))
  fsdp = tiny(sharding=((".*", "fsdp(data,8)"),))
  assert_equal(final(str(tmp_path), tiny())[0], final(str(tmp_path), fsdp)[0])


def one_step(config, batch):
  run = experiment.build(config)
  state, measured = train.make_step(run)(run.init(jax.random.key(0)), batch, jax.random.key(1))
  return jax.device_get((state.params, measured))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_large_batch_with_padding_and_uneven_weights(parts):
  changes = dict(
    batch_size=32, optimizer=dict(name="sgd"), schedule=dict(name="constant", peak=1.0), clip=None, ema=None, decay=[]
  )
  changes |= dict(
    model=TINY["model"] | {"dropout": 0.0},
    task=dict(name="classification", class_weights=(1.0, 5.0, 0.25)),
    mesh=(("data", 1), ("tensor", 8)),
  )
  rng = np.random.default_rng(0)
  batch = {
    "image": jnp.asarray(rng.normal(size=(32, 4, 4, 1)), jnp.float32),
    "label": jnp.asarray(rng.integers(3, size=32), jnp.int32),
    "mask": jnp.asarray(np.arange(32) < 19, jnp.float32),
  }
  whole, measured = one_step(tiny(**changes), batch)
  split, measured_split = one_step(tiny(**changes, accumulate=parts), batch)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, split)
  np.testing.assert_allclose(measured["loss"], measured_split["loss"], rtol=1e-6)


def test_the_step_compiles_once(tmp_path, monkeypatch):
  traces = []
  accumulate = train.accumulate
  monkeypatch.setattr(train, "accumulate", lambda *args, **kwargs: traces.append(1) or accumulate(*args, **kwargs))
  train.train(tiny(), str(tmp_path))
  assert len(traces) == 1


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
  config = tiny(total_steps=20, keep=dict(last=1, best="val/loss", mode="max"), checkpoint_every=4)
  train.train(config, str(tmp_path))
  values = {r["step"]: r["val/loss"] for r in rows(tmp_path) if "val/loss" in r}
  best = max(values, key=values.get)
  with train.Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    assert checkpoints.steps() == sorted({best, 20})


def test_one_checkpoint_every_so_often_is_kept_also_between_the_others(tmp_path):
  train.train(tiny(keep=dict(last=1, every=3), checkpoint_every=8), str(tmp_path))
  with train.Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    assert checkpoints.steps() == [3, 6, 9, 12]


def test_the_best_by_another_metric_is_forgotten_when_the_config_changes(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    StopAfter(patch, 6)
    train.train(tiny(keep=dict(last=1, best="val/loss", mode="max")), str(tmp_path))
  train.train(tiny(keep=dict(last=1, best="val/loss", mode="min")), str(tmp_path))
  values = {r["step"]: r["val/loss"] for r in rows(tmp_path) if "val/loss" in r and r["step"] > 6}
  with train.Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    assert checkpoints.steps() == sorted({min(values, key=values.get), 12})


def test_early_stopping_waits_its_patience_and_survives_a_resume(tmp_path, monkeypatch):
  stop = dict(metric="val/accuracy", mode="max", patience=2, min_delta=1.0)  # No accuracy gains more than 1.
  config = tiny(total_steps=100, early_stop=stop)
  assert train.train(config, str(tmp_path / "a")) == "stopped early"
  assert max(r["step"] for r in rows(tmp_path / "a")) == 12  # First seen at 4, then two evaluations without a gain.
  with monkeypatch.context() as patch:
    StopAfter(patch, 9)
    train.train(config, str(tmp_path / "b"))
  assert train.train(config, str(tmp_path / "b")) == "stopped early"
  assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_run_that_stopped_early_is_left_as_it_is(tmp_path):
  stop = dict(metric="val/accuracy", mode="max", patience=1, min_delta=1.0)
  assert train.train(tiny(early_stop=stop), str(tmp_path)) == "stopped early"
  before = rows(tmp_path), final(str(tmp_path), tiny())
  assert train.train(tiny(early_stop=stop), str(tmp_path)) == "stopped early"
  assert rows(tmp_path) == before[0]
  assert_equal(final(str(tmp_path), tiny()), before[1])


def test_evaluating_a_checkpoint_gives_what_training_wrote(tmp_path):
  train.train(tiny(), str(tmp_path))
  step, found = train.evaluate(tiny(), str(tmp_path))
  written = [r for r in rows(tmp_path) if r["step"] == step and "val/loss" in r][-1]
  assert step == 12 and found == {k: v for k, v in written.items() if k.startswith("val/")}


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(tmp_path):
  config = tiny(
    schedule=dict(name="constant", peak=1e38), optimizer=dict(name="sgd"), clip=None, log_every=1, checkpoint_every=1
  )
  with pytest.raises(FloatingPointError, match="config.clip"):
    train.train(config, str(tmp_path))
  assert rows(tmp_path)


def test_a_broken_state_is_not_saved_between_two_logged_steps(tmp_path):
  config = tiny(
    schedule=dict(name="constant", peak=1e38), optimizer=dict(name="sgd"), clip=None, log_every=12, checkpoint_every=4
  )
  with pytest.raises(FloatingPointError, match="at step 1 "):
    train.train(config, str(tmp_path))
  with train.Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    assert not checkpoints.steps()


def test_a_start_that_is_refused_leaves_the_recorded_config(tmp_path):
  train.train(tiny(), str(tmp_path))
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(UserError, match="config.sharding"):
    train.train(tiny(sharding=[("params.*", "replicated")]), str(tmp_path))
  assert (tmp_path / "config.json").read_bytes() == before


def test_a_damaged_record_and_a_bucket_are_said_so(tmp_path):
  (tmp_path / "run.json").write_text('{"a": ')
  with pytest.raises(UserError, match="run.json can't be read"):
    train.train(tiny(), str(tmp_path))
  with pytest.raises(UserError, match="mount the bucket"):
    train.train(tiny(), "gs://bucket/run")


def test_init_from_takes_what_the_rules_name(tmp_path):
  train.train(tiny(), str(tmp_path / "a"))
  source = final(str(tmp_path / "a"), tiny())[0].params
  init = dict(workdir=str(tmp_path / "a"))
  run = experiment.build(tiny(init_from=init, seed=7))
  state = initialise.from_config(run, run.init(jax.random.key(7)))
  assert_equal(jax.device_get(state.params), source)
  wider = experiment.build(tiny(init_from=init, model=TINY["model"] | {"widths": (16,)}))
  state = wider.init(jax.random.key(0))
  with pytest.raises(UserError, match="give it a rule with None"):
    initialise.from_config(wider, state)


def test_init_from_lays_the_state_out_as_the_step_wants_it_and_reports_each_leaf(tmp_path, capsys):
  train.train(tiny(), str(tmp_path / "a"))
  moments_apart = ((".*/mu/.*kernel", "fsdp(data,8)"), (".*", "replicated"))
  config = tiny(init_from=dict(workdir=str(tmp_path / "a")), sharding=moments_apart)
  capsys.readouterr()
  train.train(config, str(tmp_path / "b"))  # The compiled step takes one layout and no other.
  said = capsys.readouterr().out
  assert "4 of 4 leaves taken" in said and "head/kernel <- head/kernel" in said
  with pytest.raises(UserError, match="config.init_from.workdir=.*none holds no checkpoints"):
    train.train(tiny(init_from=dict(workdir=str(tmp_path / "none"))), str(tmp_path / "c"))
  with pytest.raises(UserError, match="config.init_from.step=5"):
    train.train(tiny(init_from=dict(workdir=str(tmp_path / "a"), step=5)), str(tmp_path / "d"))


def test_init_from_takes_batch_statistics_with_the_parameters(tmp_path):
  model = TINY["model"] | dict(batch_norm=True)
  train.train(tiny(model=model), str(tmp_path))
  source = final(str(tmp_path), tiny(model=model))[0].extras
  run = experiment.build(tiny(model=model, init_from=dict(workdir=str(tmp_path)), seed=7))
  state = initialise.from_config(run, run.init(jax.random.key(7)))
  assert jax.tree.leaves(source)
  assert_equal(jax.device_get(state.extras), source)


def test_a_damaged_checkpoint_is_a_fault_told_in_words(tmp_path):
  train.train(tiny(), str(tmp_path))
  shutil.rmtree(tmp_path / "checkpoints" / "00000012" / "state")
  with pytest.raises(OSError, match="00000012 is damaged.*take an earlier one"):
    train.evaluate(tiny(), str(tmp_path))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (dict(batch_size=12), "multiple of 8"),
    (dict(batch_size=16, accumulate=4), "accumulate=4"),
    (dict(total_steps=0), "config.total_steps"),
    (dict(model=TINY["model"] | {"in_features": 9}), "config.model"),
    (dict(task=dict(name="classification", label="lable")), "lable"),
    (dict(decay=[("nothing", 0.1)]), "config.decay"),
    (dict(freeze=["nothing"]), "config.freeze"),
    (dict(keep=dict(best="test/accuracy")), "config.keep.best"),
    (dict(sharding=[("params.*", "replicated")]), "config.sharding"),
    (dict(log_every="5 tokens"), "config.log_every"),
    (dict(log_every=0), "config.log_every must be positive"),
    (dict(claim=dict(metric="val/accuracy")), "config.claim needs one"),
    (dict(claim=dict(metric="test/accuracy", at_least=1.0)), "config.claim.metric"),
    (dict(keep=dict(last=0)), "config.keep.last must be positive"),
    (dict(early_stop=dict(metric="val/loss", patience=0)), "config.early_stop.patience must be positive"),
    (dict(evals=dict(val=TINY["evals"]["val"] | dict(batch_size=0))), "config.evals.val.batch_size must be positive"),
  ],
)
def test_what_can_not_work_is_refused_and_nothing_is_trained(tmp_path, changes, words):
  with pytest.raises(UserError, match=words):
    train.train(tiny(**changes), str(tmp_path))
  assert not (tmp_path / "metrics.jsonl").exists() or not rows(tmp_path)


def test_a_workdir_of_another_config_is_refused_and_kept(tmp_path):
  train.train(tiny(), str(tmp_path))
  before = sorted(p.name for p in tmp_path.rglob("*"))
  with pytest.raises(UserError, match="seed: 0 -> 1"):
    train.train(tiny(seed=1), str(tmp_path))
  assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_what_only_observes_may_change_on_resume(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    StopAfter(patch, 5)
    train.train(tiny(), str(tmp_path))
  assert train.train(tiny(log_every=2, evals={}), str(tmp_path)) == "finished"


def test_a_workdir_that_can_not_be_written_is_said_so(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="can't be written"):
    train.train(tiny(), str(tmp_path / "file" / "run"))


def test_an_evaluator_may_read_a_second_stream(tmp_path):
  data = dict(source=TINY["data"]["source"])
  fewshot = dict(
    evaluator=dict(name="fewshot", shots=(2,)), data=data, extra_data=dict(train_batches=data), every=12, batch_size=8
  )
  train.train(tiny(evals=dict(probe=fewshot)), str(tmp_path / "a"))
  assert any("probe/2shot" in r for r in rows(tmp_path / "a"))
  wrong = fewshot | dict(extra_data=dict(trane_batches=data))
  with pytest.raises(UserError, match="Did you mean 'train_batches'"):
    train.train(tiny(evals=dict(probe=wrong)), str(tmp_path / "b"))


def test_a_mixture_of_sources_is_a_source(tmp_path):
  source = lambda seed: TINY["data"]["source"] | dict(seed=seed)
  mixed = dict(source=dict(name="mixture", sources=[source(0), source(1)], weights=[0.75, 0.25]))
  train.train(tiny(data=mixed), str(tmp_path))
  assert record.read_run(str(tmp_path))["examples"] == 80


@pytest.mark.slow
def test_a_run_goes_on_with_its_layers_in_another_form_on_another_mesh(tmp_path):
  vit = dict(name="vit", image_size=4, channels=1, num_classes=3, patch_size=2, width=16, depth=2, heads=2, mlp_dim=32)
  unbroken, broken = str(tmp_path / "unbroken"), str(tmp_path / "broken")
  train.train(tiny(model=vit, evals={}), unbroken)
  train.train(tiny(model=vit, evals={}), broken)
  # As if it had been stopped at step 8.
  shutil.rmtree(os.path.join(broken, "checkpoints", "00000012"))
  scanned = tiny(
    model=vit | dict(scan=True, remat="full"), evals={}, mesh=(("data", 4), ("pipe", 2)), sharding="fsdp+pipe"
  )
  train.train(scanned, broken)
  losses = [[row["loss"] for row in rows(workdir) if "loss" in row] for workdir in (unbroken, broken)]
  assert len(losses[1]) == 12
  np.testing.assert_allclose(*losses, rtol=2e-5)


def test_a_disk_that_is_full_for_a_moment_in_the_end_fails_nothing(tmp_path, monkeypatch):
  write, full = record.write_json, []

  def filling(file, value):
    if value.get("status") in ("finished", "failed") and len(full) < 2:
      full.append(value["status"])
      raise OSError(28, "No space left on device")
    write(file, value)

  monkeypatch.setattr(record, "write_json", filling)
  monkeypatch.setattr(record, "PAUSES", (0.01, 0.01))
  record.finish(str(tmp_path), "finished", step=3)
  assert full == ["finished"] * 2 and record.read_run(str(tmp_path))["status"] == "finished"
  full.clear()
  with pytest.raises(OSError, match="No space"):  # What failed has no time to lose.
    record.finish(str(tmp_path), "failed")
