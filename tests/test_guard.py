"""A loss or gradient that isn't finite, and a loss that leaps: the run stops, leaves out, or goes back, to the bit."""

import copy
import json
import os
import signal

import jax
import numpy as np
import pytest

from bigjax import bundles, experiment, guard, ledger, metrics, record, train
from bigjax import config as configs
from bigjax.commands import ledger as command
from bigjax.data import pipeline, synthetic
from bigjax.errors import UserError

TINY = dict(
  total_steps=12,
  batch_size=16,
  data=dict(source=dict(name="synthetic", kind="images", num_examples=400, shape=(4, 4, 1), num_classes=3)),
  model=dict(name="mlp", in_features=16, widths=(8,), num_outputs=3, dropout=0.2),
  task=dict(name="classification"),
  optimizer=dict(name="adamw", weight_decay=0.0),
  schedule=dict(name="cosine", peak=1e-2),
  clip=dict(norm=1.0),
  ema=0.9,
  log_every=1,
  checkpoint_every=4,
  keep=dict(last=20),
  writers=("jsonl",),
)


def tiny(**changes):
  return configs.resolve(copy.deepcopy(TINY) | changes, experiment.TrainConfig)


@pytest.fixture
def poison(monkeypatch):
  """Makes the images of some batches of the order infinite, or of the value that is said."""

  def poisoned(*batches, by=np.inf):
    wrong = experiment.order(tiny()).examples((16 * np.array(batches)[:, None] + np.arange(16)).reshape(-1))[1]
    fetch = synthetic.Synthetic.fetch

    def fetched(self, ids):
      found = fetch(self, ids)
      return found | {"image": np.where(np.isin(ids, wrong)[:, None, None, None], np.float32(by), found["image"])}

    monkeypatch.setattr(synthetic.Synthetic, "fetch", fetched)

  return poisoned


def final(workdir, config, step=None):
  run = experiment.build(config)
  with train.Checkpoints(str(workdir), read_only=True) as checkpoints:
    return jax.device_get(checkpoints.restore(run.abstract, run.shardings, step))


def rows(workdir):
  with open(os.path.join(workdir, "metrics.jsonl")) as f:
    return [json.loads(line) for line in f]


def steps(workdir):
  with train.Checkpoints(str(workdir), read_only=True) as checkpoints:
    return checkpoints.steps()


def stopped(config, workdir, monkeypatch, step):
  logged = metrics.Logger.step

  def log(self, at, measured):
    logged(self, at, measured)
    if at == step:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.Logger, "step", log)
    assert train.train(config, str(workdir)) == "stopped"


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def verified(workdir):
  config = configs.resolve(record.read_config(str(workdir)), experiment.TrainConfig)
  return command.verified(experiment.order(config), ledger.History.of(str(workdir)))


def test_stop_names_the_step_that_broke_and_leaves_what_was_before(tmp_path, poison):
  poison(6)  # The batch of step 7.
  with pytest.raises(FloatingPointError, match=r"at step 7 .*config.clip.*bigjax replay .*bundles/00000007"):
    train.train(tiny(log_every=12, checkpoint_every=6), str(tmp_path))
  assert steps(tmp_path) == [6]
  bundle = bundles.read(str(tmp_path / "bundles" / "00000007"))
  assert (bundle["kind"], bundle["action"], bundle["steps"], bundle["checkpoint"]) == ("nonfinite", "stop", [7, 7], 6)
  assert not np.isfinite(bundle["measured"]["loss"])
  assert bundle["batch"]["ids"] == experiment.order(tiny()).examples(np.arange(96, 112))[1].tolist()


def test_stop_is_known_two_steps_late(tmp_path, poison):
  poison(6)
  with pytest.raises(FloatingPointError, match="at step 7 "):
    train.train(tiny(), str(tmp_path))
  assert ledger.History.of(str(tmp_path)).attempts[0].last == 8  # The ninth step was on its way, not yet noted.


def test_skip_leaves_out_the_update_and_nothing_else_moves(tmp_path, poison):
  poison(6, 8)
  config = tiny(guard="skip", checkpoint_every=1)
  assert train.train(config, str(tmp_path)) == "finished"
  (before, _), (after, loop) = final(tmp_path, config, 6), final(tmp_path, config, 7)
  assert after.step == 7 and loop["guard"] == {"skipped": 1}
  assert_equal(before.params, after.params)
  both = zip(*(jax.tree.leaves(x.opt_state) for x in (before, after)))
  changed = [(a, b) for a, b in both if not np.array_equal(a, b)]
  assert [(int(a), int(b)) for a, b in changed] == [(6, 7)]  # The clock of the schedule.
  assert [r["skipped"] for r in rows(tmp_path)] == [float(s in (7, 9)) for s in range(1, 13)]
  rates = {r["step"]: r["learning_rate"] for r in rows(tmp_path)}
  assert rates[8] < rates[7] < rates[6]
  assert final(tmp_path, config)[1]["guard"] == {"skipped": 2}
  told = [i["what"] for i in record.read_run(str(tmp_path))["incidents"]]
  assert "left out (1 of at most 20)" in told[0] and "left out (2 of at most 20)" in told[1]
  assert sorted(os.listdir(tmp_path / "bundles")) == ["00000007", "00000009"]


@pytest.mark.parametrize(
  "stop_at", [pytest.param(6, marks=pytest.mark.slow), 7, pytest.param(8, marks=pytest.mark.slow)]
)
def test_skip_goes_on_to_the_bit(tmp_path, poison, monkeypatch, stop_at):
  poison(6)
  config = tiny(guard="skip")
  train.train(config, str(tmp_path / "whole"))
  stopped(config, tmp_path / "parts", monkeypatch, stop_at)
  train.train(config, str(tmp_path / "parts"))
  assert_equal(final(tmp_path / "whole", config), final(tmp_path / "parts", config))
  assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_skips_are_bounded_over_the_whole_run(tmp_path, poison, monkeypatch):
  poison(2, 6, 8)
  config = tiny(guard=dict(nonfinite="skip", max_skips=2))
  stopped(config, tmp_path, monkeypatch, 5)
  with pytest.raises(FloatingPointError, match="at step 9 .* 2 updates were left out before .config.guard.max_skips"):
    train.train(config, str(tmp_path))


def test_a_healthy_run_is_the_same_whatever_the_guard(tmp_path):
  for action in ("stop", "rollback"):
    train.train(tiny(guard=action), str(tmp_path / action))
  assert_equal(final(tmp_path / "stop", tiny()), final(tmp_path / "rollback", tiny(guard="rollback")))
  assert rows(tmp_path / "stop") == rows(tmp_path / "rollback")
  assert not (tmp_path / "stop" / "bundles").exists() and not (tmp_path / "rollback" / "rollbacks.json").exists()


def test_rollback_goes_on_without_the_batch_that_broke_it(tmp_path, poison):
  poison(6)
  config = tiny(guard="rollback")
  assert train.train(config, str(tmp_path)) == "finished"
  (entry,) = guard.passed_over(str(tmp_path))
  assert (entry["batches"], entry["step"], entry["back_to"]) == ([6, 7], 7, 4)
  assert [r["step"] for r in rows(tmp_path)] == list(range(1, 13))
  assert all(np.isfinite(r["loss"]) for r in rows(tmp_path))
  lines, wrong = verified(tmp_path)
  assert not wrong and "passed over after a fault, counted below as seen: 7" in lines[1]
  first, second = ledger.History.of(str(tmp_path)).attempts
  plan = experiment.order(config)
  np.testing.assert_array_equal(second.sums[1], first.sums[5])  # Step 6 is as it was, step 7 takes the batch of 8.
  np.testing.assert_array_equal(second.sums[2], ledger.expected(plan, np.array([8]))[0])
  assert "Back to step 4, and on without the batch of step 7" in record.read_run(str(tmp_path))["incidents"][-1]["what"]


def test_a_batch_is_a_function_of_seed_step_and_what_is_passed_over(tmp_path, poison, monkeypatch):
  config = tiny(guard="rollback")
  with monkeypatch.context():
    poison(6, 9)
    assert train.train(config, str(tmp_path / "broken")) == "finished"
    assert [e["batches"] for e in guard.passed_over(str(tmp_path / "broken"))] == [[6, 7], [9, 10]]
    stopped(config, tmp_path / "parts", monkeypatch, 10)
    train.train(config, str(tmp_path / "parts"))
  (tmp_path / "known").mkdir()
  record.write_json(str(tmp_path / "known" / "rollbacks.json"), [{"batches": [6, 7]}, {"batches": [9, 10]}])
  train.train(config, str(tmp_path / "known"))
  for other in ("parts", "known"):
    assert_equal(final(tmp_path / "broken", config), final(tmp_path / other, config))
    assert rows(tmp_path / "broken") == rows(tmp_path / other)
  assert final(tmp_path / "known", config)[1]["skips"] == [[6, 7], [9, 10]]


def test_rollback_before_the_first_checkpoint_starts_anew(tmp_path, poison):
  poison(1)
  assert train.train(tiny(guard="rollback"), str(tmp_path)) == "finished"
  assert guard.passed_over(str(tmp_path))[0]["back_to"] == 0
  assert not verified(tmp_path)[1]


def test_rollbacks_are_bounded_over_all_starts(tmp_path, poison):
  poison(5, 6, 7)
  config = tiny(guard=dict(nonfinite="rollback", max_rollbacks=2))
  for _ in range(2):
    with pytest.raises(FloatingPointError, match="at step 6 .*went back 2 times before .config.guard.max_rollbacks"):
      train.train(config, str(tmp_path))
  assert [e["batches"] for e in guard.passed_over(str(tmp_path))] == [[5, 6], [6, 7]]
  # And with a higher bound it goes on, as it does under another answer.
  assert train.train(tiny(guard=dict(nonfinite="rollback", max_rollbacks=3)), str(tmp_path)) == "finished"


LEAPS = dict(nonfinite="stop", spike=dict(above=30.0, window=8, patience=2, before=1))


def test_a_loss_that_leaps_is_left_behind_with_the_batches_around_it(tmp_path, poison):
  poison(10, 11, 12, by=1e5)
  config = tiny(total_steps=16, guard=LEAPS, log_every=3)
  assert train.train(config, str(tmp_path)) == "finished"
  (entry,) = guard.passed_over(str(tmp_path))
  # It leaps at steps 11 and 12; the batch before goes, too, so the checkpoint of step 12 is no place to go on from.
  assert (entry["batches"], entry["step"], entry["back_to"]) == ([9, 12], 12, 8)
  lines, wrong = verified(tmp_path)
  assert not wrong and "counted below as seen: 10 to 12" in lines[1]
  bundle = bundles.read(str(tmp_path / "bundles" / "00000012"))
  assert (bundle["kind"], bundle["steps"], bundle["checkpoint"]) == ("spike", [11, 12], 8)
  assert steps(tmp_path) == [4, 8, 12, 16]
  assert "skips" not in final(tmp_path, config, 8)[1] and final(tmp_path, config, 12)[1]["skips"] == [[9, 12]]


def test_a_leap_with_no_checkpoint_before_it_is_passed_over_from_the_one_there_is(tmp_path, poison):
  poison(10, 11, 12, by=1e5)
  config = tiny(total_steps=16, guard=LEAPS, checkpoint_every=11, keep=dict(last=1))
  assert train.train(config, str(tmp_path)) == "finished"
  # The checkpoint is of the first bad step, the others are left out one by one.
  assert [(e["batches"], e["back_to"]) for e in guard.passed_over(str(tmp_path))] == [([11, 12], 11), ([12, 13], 11)]
  assert not verified(tmp_path)[1]


@pytest.mark.parametrize("stop_at", [9, 11])
def test_what_is_known_of_a_loss_survives_a_stop(tmp_path, poison, monkeypatch, stop_at):
  poison(10, 11, 12, by=1e5)
  config = tiny(total_steps=16, guard=LEAPS, checkpoint_every=8)
  train.train(config, str(tmp_path / "whole"))
  stopped(config, tmp_path / "parts", monkeypatch, stop_at)
  train.train(config, str(tmp_path / "parts"))
  assert [e["batches"] for e in guard.passed_over(str(tmp_path / "parts"))] == [[9, 12]]
  assert_equal(final(tmp_path / "whole", config), final(tmp_path / "parts", config))


def test_a_leap_is_told_from_noise_a_trend_and_a_single_bad_batch():
  rule = guard.SpikeConfig(above=10.0, window=64, patience=3)
  rng = np.random.default_rng(0)
  falling = 2 + np.exp(-np.arange(2000) / 300) + 0.1 * rng.normal(size=2000)
  seen = lambda losses: [s for s, x in enumerate(losses) if spike.seen(s, float(x)) is not None]
  spike = guard.Spike(rule)
  assert seen(falling) == []
  once = falling.copy()
  once[[500, 501, 900]] += 50
  spike = guard.Spike(rule)
  assert seen(once) == []
  leap = falling.copy()
  leap[700:] += 5
  spike = guard.Spike(rule)
  assert seen(leap)[0] == 702
  spike = guard.Spike(rule)
  assert seen(np.full(200, 0.5) + 1e-6 * rng.normal(size=200)) == []  # A loss that has settled.
  a, b = guard.Spike(rule), guard.Spike(rule)
  for s, x in enumerate(leap):
    assert a.seen(s, x) == b.seen(s, x)
    saved = json.loads(json.dumps(b.to_json()))
    b = guard.Spike(rule, saved["losses"], saved.get("high", 0))


def test_batches_are_left_out_in_order():
  steps = np.arange(10)
  assert pipeline.taken(steps, ((2, 3), (5, 7), (7, 8))).tolist() == [0, 1, 3, 4, 8, 9, 10, 11, 12, 13]
  joined = guard._joined([[5, 7]], [{"batches": [2, 3]}, {"batches": [6, 9]}, {"batches": [5, 7]}])
  assert joined == ((2, 3), (5, 9))


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ("sleep", "config.guard"),
    (dict(max_skips=-1), "config.guard.max_skips: -1 must be 0 or more"),
    (dict(spike=dict(window=3)), "config.guard.spike.window: 3 must be 4 or more"),
    (dict(spike=dict(above=0.0)), "config.guard.spike.above"),
  ],
)
def test_settings_that_can_not_work_are_refused(given, words):
  with pytest.raises(UserError, match=words):
    experiment.build(tiny(guard=given))


def test_a_record_of_rollbacks_that_is_damaged_is_said_so(tmp_path):
  train.train(tiny(total_steps=2), str(tmp_path))
  (tmp_path / "rollbacks.json").write_text('[{"batches": [')
  with pytest.raises(UserError, match="rollbacks.json can't be read"):
    train.train(tiny(total_steps=2), str(tmp_path))
