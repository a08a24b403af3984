"""What every step was fed is written down, the same for any number of hosts and starts, and can be checked."""

import copy
import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from bigjax import config as configs
from bigjax import experiment, ledger, main, metrics, record, train, workdirs
from bigjax.commands import ledger as command
from bigjax.data import growth, mixture, pipeline, synthetic
from bigjax.errors import UserError

IMAGES = dict(name="synthetic", kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
TINY = dict(
  total_steps=12,
  batch_size=16,
  data=dict(source=IMAGES),
  model=dict(name="mlp", in_features=16, widths=(8,), num_outputs=3),
  task=dict(name="classification"),
  optimizer=dict(name="sgd"),
  schedule=dict(name="constant", peak=0.01),
  log_every=1,
  checkpoint_every=4,
  writers=("jsonl",),
)


def tiny(**changes):
  return configs.resolve(copy.deepcopy(TINY) | changes, experiment.TrainConfig)


def stopped(config, workdir, monkeypatch, step):
  """Trains until a signal comes while `step` is logged."""
  logged = metrics.Logger.step

  def log(self, at, measured):
    logged(self, at, measured)
    if at == step:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.Logger, "step", log)
    assert train.train(config, str(workdir)) == "stopped"


def fallen(config, workdir, monkeypatch, step):
  """Trains until it is as if the process was killed after `step`."""
  note = ledger.Ledger.note

  def noted(self, at):
    note(self, at)
    if at == step:
      self._write()
      raise RuntimeError("pulled the plug")

  with monkeypatch.context() as patch:
    patch.setattr(ledger.Ledger, "note", noted)
    with pytest.raises(RuntimeError, match="plug"):
      train.train(config, str(workdir))


def verified(workdir):
  config = configs.resolve(record.read_config(str(workdir)), experiment.TrainConfig)
  return command.verified(experiment.order(config), ledger.History.of(str(workdir)))


def sums(workdir):
  """The digest of every step of a run."""
  history = ledger.History.of(str(workdir))
  return {s: a.sums[a.steps == s][0].tolist() for s, a in sorted(history.steps.items())}


@pytest.mark.parametrize("grows", [None, growth.Growth(parts=4, first=1, steps=6)])
@pytest.mark.parametrize("hosts", [[(0,), (1,)], [(0,), (1,), (2,), (3,)], [(0, 3), (1, 2)]])
def test_the_sums_of_all_hosts_add_up_to_those_of_one(hosts, grows):
  source = synthetic.make(kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
  whole = pipeline.Plan(source, 16, 0, 1, seed=3, growth=grows)
  steps = np.arange(1, 12)
  parts = [dataclasses.replace(whole, host=h, hosts=sum(map(len, hosts))) for h in hosts]
  added = sum(ledger.expected(p, steps) for p in parts)
  np.testing.assert_array_equal(added, ledger.expected(whole, steps))
  assert len(np.unique(added)) == added.size


def test_what_the_batches_are_of_is_what_is_digested_and_padding_is_not():
  source = synthetic.make(kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
  plan, told = pipeline.Plan(source, 8, 0, 1, seed=0, growth=growth.Growth(4, 1, 6)), []
  with pipeline.train_batches(source, batch_size=8, seed=0, growth=plan.growth, fetched=lambda *x: told.append(x)) as b:
    batches = [next(b) for _ in range(8)]
  for step, (batch, (epochs, ids, mask)) in enumerate(zip(batches, told), 1):
    np.testing.assert_array_equal(source.fetch(ids)["image"], batch["image"])
    np.testing.assert_array_equal(mask, batch["mask"])
    elsewhere = np.where(mask == 0, 7, ids)
    for fetched in (ids, elsewhere):
      found = ledger.digest(plan.rows, epochs, fetched, mask, 8)
      np.testing.assert_array_equal(found, ledger.expected(plan, np.array([step])))
    changed = np.where(np.arange(8) == 0, ids + 1, ids)
    assert (ledger.digest(plan.rows, epochs, changed, mask, 8) != found).all()
    swapped = np.concatenate([ids[[4]], ids[1:4], ids[[0]], ids[5:]])  # Rows 0 and 4 are examples at every step.
    assert (ledger.digest(plan.rows, epochs, swapped, mask, 8) != found).all()


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_a_run_stopped_anywhere_has_the_ledger_of_one_that_was_not(tmp_path, monkeypatch, stop_at):
  train.train(tiny(), str(tmp_path / "whole"))
  stopped(tiny(), tmp_path / "parts", monkeypatch, stop_at)
  train.train(tiny(), str(tmp_path / "parts"))
  assert sums(tmp_path / "whole") == sums(tmp_path / "parts") and len(sums(tmp_path / "parts")) == 12
  lines, wrong = verified(tmp_path / "parts")
  assert not wrong and "steps 1 to 12 of 2 starts: all 12 records are as the order of the config says" in lines[0]
  assert "40 examples: 4 whole epochs, each example once; 32 of the next so far" in lines[1]  # 12 x 16 = 4 x 40 + 32.


def test_what_is_fed_again_after_a_fall_is_checked_and_counts_once(tmp_path, monkeypatch):
  fallen(tiny(), tmp_path, monkeypatch, 7)
  assert sorted(sums(tmp_path)) == [1, 2, 3, 4, 5, 6, 7]
  train.train(tiny(), str(tmp_path))
  first, second = ledger.attempts(str(tmp_path))
  assert (first.after, second.after) == (0, 4) and second.steps.tolist() == list(range(5, 13))
  np.testing.assert_array_equal(first.sums[4:], second.sums[:3])
  lines, wrong = verified(tmp_path)
  assert not wrong and "all 15 records" in lines[0] and "4 whole epochs, each example once" in lines[1]


def test_other_data_are_noticed_before_they_are_fed(tmp_path, monkeypatch):
  fallen(tiny(), tmp_path, monkeypatch, 7)
  before = sums(tmp_path)
  permute = pipeline.order.permute
  with monkeypatch.context() as patch:  # Another version of the order.
    patch.setattr(pipeline.order, "permute", lambda places, n, *rest: (permute(places, n, *rest) + 1) % n)
    with pytest.raises(UserError, match="at step 1 this run was fed other examples"):
      train.train(tiny(), str(tmp_path))
    with pytest.raises(UserError, match="config.data: at step 1"):
      train.train(tiny(), str(tmp_path))
  with monkeypatch.context() as patch:
    patch.setattr(synthetic.Synthetic, "__len__", lambda self: self.num_examples + 1)
    with pytest.raises(UserError, match="has 41 examples, and this run was fed from 40"):
      train.train(tiny(), str(tmp_path))
  assert sums(tmp_path) == before
  assert train.train(tiny(), str(tmp_path)) == "finished"


def test_a_record_that_a_crash_cut_short_is_ignored(tmp_path, monkeypatch):
  fallen(tiny(), tmp_path, monkeypatch, 7)
  (file,) = (tmp_path / "ledger").iterdir()
  whole = file.read_bytes()
  for torn, steps in [(whole[:-3], 6), (whole[:-24] + bytes(24), 6), (whole + whole[-24:-10], 7), (whole[:20], 0)]:
    file.write_bytes(torn)
    assert len(sums(tmp_path)) == steps
  (tmp_path / "ledger" / "00002-00000.ledger").write_bytes(whole[:20])  # A start that was killed at its first step.
  file.write_bytes(whole[:-3])
  train.train(tiny(), str(tmp_path))
  assert not verified(tmp_path)[1]
  assert sorted(f.name[:5] for f in (tmp_path / "ledger").iterdir()) == ["00001", "00002", "00003"]


def test_the_command_verifies_and_names_what_is_wrong(tmp_path, capsys):
  train.train(tiny(), str(tmp_path))
  assert main.main(["ledger", str(tmp_path)]) == 0
  assert "4 whole epochs, each example once" in capsys.readouterr().out
  (file,) = (tmp_path / "ledger").iterdir()
  header, _, data = file.read_bytes().partition(b"\n")
  records = np.frombuffer(data, ledger.RECORD).copy()
  found = records["sums"].copy()
  found[4] += np.uint64(1)
  file.write_bytes(header + b"\n" + ledger._records(records["step"], found).tobytes())
  assert main.main(["ledger", str(tmp_path)]) == 1
  assert "1 steps were fed other examples than the order says: 5" in capsys.readouterr().out
  assert main.main(["ledger", str(tmp_path), "--step=5"]) == 1
  file.write_bytes(header + b"\n" + np.delete(records, 2).tobytes())
  assert main.main(["ledger", str(tmp_path)]) == 1
  assert "1 steps have no record, from step 3 to 3" in capsys.readouterr().out


def test_the_command_lists_what_a_step_was_fed(tmp_path, capsys):
  train.train(tiny(), str(tmp_path))
  assert main.main(["ledger", str(tmp_path), "--step=3"]) == 0
  listed = [line.split() for line in capsys.readouterr().out.splitlines()]
  plan = experiment.order(tiny())
  epochs, ids, _ = plan.examples(np.arange(32, 48))
  assert listed[1:-1] == [[str(r), str(e), str(i)] for r, (e, i) in enumerate(zip(epochs, ids))]
  assert main.main(["ledger", str(tmp_path), "--step=13"]) == 2
  assert "--step=13: the ledger has steps 1 to 12" in capsys.readouterr().err


def test_each_source_of_a_mixture_goes_through_its_own_epochs(tmp_path, monkeypatch):
  monkeypatch.setattr(mixture, "_BLOCK", 16)
  sources = [IMAGES | dict(seed=i, num_examples=n) for i, n in enumerate((40, 8))]
  mixed = dict(name="mixture", sources=sources, weights=(0.75, 0.25), changes=((64, (0.25, 0.75)),))
  train.train(tiny(data=dict(source=mixed)), str(tmp_path))
  lines, wrong = verified(tmp_path)
  # 4 steps of 12 and 4, then 8 of 4 and 12.
  assert not wrong
  assert "source 0, 40 examples: 2 whole epochs, each example once" in lines[1]
  assert "source 1, 8 examples: 14 whole epochs, each example once" in lines[2]
  assert main.main(["ledger", str(tmp_path), "--step=1"]) == 0


def test_a_batch_that_grows_counts_what_was_there(tmp_path):
  train.train(tiny(batch_warmup=dict(until=8, first=1, parts=2)), str(tmp_path))
  lines, wrong = verified(tmp_path)
  assert not wrong and "3 whole epochs, each example once; 8 of the next so far" in lines[1]  # 8 x 8 + 4 x 16 = 128.


def test_what_was_passed_over_is_told_apart_from_what_is_missing():
  source = synthetic.make(kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
  plan = pipeline.Plan(source, 16, 0, 1, seed=0)
  part = lambda number, after, skips, steps: ledger.Attempt(
    number, after, skips, 40, 16, 0, steps, ledger.expected(dataclasses.replace(plan, skips=skips), steps)
  )
  before, since = part(1, 0, (), np.arange(1, 8)), part(2, 4, ((6, 7),), np.arange(5, 13))
  steps = dict.fromkeys(range(1, 5), before) | dict.fromkeys(range(5, 13), since)
  lines, wrong = command.verified(plan, ledger.History(steps, [before, since]))
  assert not wrong and "passed over after a fault, counted below as seen: 7" in lines[1]
  assert "5 whole epochs, each example once; 8 of the next so far" in lines[2]  # 13 x 16.
  forgotten = ledger.History(dict.fromkeys(range(1, 13), part(1, 0, (), np.arange(1, 13))), [before])
  twice = dataclasses.replace(forgotten.steps[1], skips=((-1, 0),))
  assert command.coverage(plan, ledger.History(dict.fromkeys(range(1, 13), twice), [twice]), np.arange(1, 13))[1]


def test_another_host_than_the_first_puts_its_rows_where_the_run_is_kept(tmp_path, monkeypatch):
  here, store = tmp_path / "here", tmp_path / "store"  # As a folder stands for a bucket.
  here.mkdir()
  (store / "ledger").mkdir(parents=True)
  workdirs._write(str(here), {"url": str(store), "published": {}})
  source = synthetic.make(kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)
  plan = pipeline.Plan(source, 16, 1, 2, seed=0)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with ledger.Ledger(str(here), plan, 0) as book:
    fetched = book.following(0)
    for step in range(1, 6):
      fetched(*plan.examples((step - 1) * 8 + np.arange(8)))
      book.note(step)
    book.settle()
    kept = store / "ledger" / "00001-00001.ledger"
    assert kept.read_bytes() == (here / "ledger" / kept.name).read_bytes()
  header, steps, sums = ledger._part(str(kept))
  assert header["part"] == [1] and steps.tolist() == [1, 2, 3, 4, 5]
  np.testing.assert_array_equal(sums, ledger.expected(plan, steps))


def test_a_workdir_without_a_ledger_and_one_of_a_later_version_are_said_so(tmp_path, capsys):
  train.train(tiny(total_steps=2), str(tmp_path))
  (file,) = (tmp_path / "ledger").iterdir()
  file.write_bytes(file.read_bytes().replace(b'"ledger": 1', b'"ledger": 9'))
  assert main.main(["ledger", str(tmp_path)]) == 2
  assert "can't be read as a ledger: it says version 9" in capsys.readouterr().err
  file.unlink()
  assert main.main(["ledger", str(tmp_path)]) == 2
  assert "has no ledger" in capsys.readouterr().err
  assert jax.process_count() == 1
