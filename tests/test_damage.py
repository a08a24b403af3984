"""A checkpoint that is not what was written is never read; a disk that fails costs no more than it must."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from bigjax import appended, checkpoint, commits, experiment, ledger, metrics, record, train
from bigjax import config as configs
from bigjax import state as states
from bigjax.checkpoint import Checkpoints, Damaged
from bigjax.commits import Keep

ROOT = pathlib.Path(__file__).parents[1]


def state_of(step, width=16):
  draw = np.random.default_rng(step)
  params = {"a": {"kernel": jnp.asarray(draw.normal(size=(width, width)), jnp.float32)}, "b": jnp.arange(5.0) * step}
  return states.TrainState(jnp.asarray(step), params, {}, {"mu": jax.tree.map(jnp.square, params)})


def abstract():
  shapes = jax.eval_shape(lambda: state_of(0))
  return shapes, jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("saved")
  with Checkpoints(str(workdir), Keep(last=9)) as checkpoints:
    for step in (10, 20, 30):
      checkpoints.save(step, state_of(step), {"remembered": step})
      checkpoints.wait()
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def files_of(workdir, step):
  directory = workdir / "checkpoints" / f"{step:08d}"
  return sorted(f for f in directory.rglob("*") if f.is_file())


def opened(workdir, notes=None, **how):
  return Checkpoints(str(workdir), Keep(last=9), note=(lambda text: None) if notes is None else notes.append, **how)


def flip(file, byte):
  content = bytearray(file.read_bytes())
  content[byte] ^= 16
  file.write_bytes(content)


def restored_step(workdir, notes):
  with opened(workdir, notes) as checkpoints:
    step = checkpoints.latest()
    state, loop = checkpoints.restore(*abstract(), step)
  assert loop == {"remembered": step}
  jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
  return step


def test_of_a_checkpoint_that_changed_in_any_file_the_one_before_is_taken_and_it_is_said(workdir):
  for file in files_of(workdir, 30):
    intact, notes = file.read_bytes(), []
    if not intact:
      continue
    flip(file, len(intact) // 2)
    assert restored_step(workdir, notes) == 20
    (note,) = notes
    assert "checkpoint of step 30 is damaged" in note and "00000030.damaged" in note and "from that of step 20" in note
    aside = workdir / "checkpoints" / "00000030.damaged"
    assert aside.is_dir()
    aside.rename(workdir / "checkpoints" / "00000030")
    file.write_bytes(intact)
  assert restored_step(workdir, notes) == 30 and len(notes) == 1


DAMAGES = {
  "cut": lambda d: os.truncate(max(d.rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0), 10),
  "empty": lambda d: (d / "checkpoint.json").write_text(""),
  "without its manifest": lambda d: (d / "checkpoint.json").unlink(),
  "without its arrays": lambda d: shutil.rmtree(d / "state"),
  "that of another step": lambda d: shutil.rmtree(d) or shutil.copytree(d.parent / "00000010", d),
  "an empty directory": lambda d: shutil.rmtree(d) or d.mkdir(),
  "no directory": lambda d: shutil.rmtree(d) or d.write_text(""),
  "remembering something else": lambda d: (d / "checkpoint.json").write_text(
    (d / "checkpoint.json").read_text().replace('"remembered": 30', '"remembered": 31')
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(workdir, damage):
  DAMAGES[damage](workdir / "checkpoints" / "00000030")
  assert restored_step(workdir, notes := []) == 20 and len(notes) == 1


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error_that_names_the_others(workdir):
  flip(files_of(workdir, 30)[-1], 3)
  with opened(workdir) as checkpoints:
    for read in (
      lambda: checkpoints.restore(*abstract(), 30),
      lambda: checkpoints.read(30),
      lambda: checkpoints.read(),
    ):
      with pytest.raises(Damaged, match="00000030 is damaged .* there are those of steps 10, 20"):
        read()
  assert (workdir / "checkpoints" / "00000030").is_dir()


def test_what_can_not_be_read_at_the_moment_is_not_taken_for_damaged(workdir):
  before, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
  with opened(workdir) as checkpoints:
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, before[1]))
    try:
      with contextlib.suppress(OSError):
        while True:
          held.append(os.open("/dev/null", os.O_RDONLY))
      with pytest.raises(OSError, match="Too many open files") as e:
        checkpoints.verify(30)
    finally:
      resource.setrlimit(resource.RLIMIT_NOFILE, before)
      for descriptor in held:
        os.close(descriptor)
    assert not isinstance(e.value, Damaged)
    assert checkpoints.latest() == 30 and checkpoints.steps() == [10, 20, 30]


def test_without_an_intact_checkpoint_nothing_starts_anew_and_nothing_is_renamed(workdir):
  for step in (10, 20, 30):
    flip(files_of(workdir, step)[-1], 3)
  before = sorted((workdir / "checkpoints").iterdir())
  with opened(workdir) as checkpoints, pytest.raises(Damaged, match="No checkpoint in .* is intact") as e:
    checkpoints.latest()
  assert all(f"step {s}: " in str(e.value) for s in (10, 20, 30))
  assert sorted((workdir / "checkpoints").iterdir()) == before


def test_a_checkpoint_from_before_there_were_digests_is_read_and_said_to_be_unverified(workdir):
  directory = workdir / "checkpoints" / "00000030"
  (directory / "checkpoint.json").unlink()
  (directory / "_CHECKPOINT_METADATA").write_text("{}")
  (directory / "loop").mkdir()
  (directory / "loop" / "metadata").write_text('{"remembered": 30}')
  assert restored_step(workdir, notes := []) == 30
  assert "can't be verified" in notes[0]


def test_what_a_killed_run_left_is_no_checkpoint_and_goes(workdir):
  root = workdir / "checkpoints"
  for name in ("00000040.unfinished-1a2b", "00000010.unfinished-removed", "00000040.orbax-checkpoint-tmp-1"):
    shutil.copytree(root / "00000030", root / name)
  with opened(workdir, read_only=True) as checkpoints:
    assert checkpoints.steps() == [10, 20, 30]
  assert len(list(root.iterdir())) == 6
  with opened(workdir) as checkpoints:
    assert checkpoints.steps() == [10, 20, 30]
  assert len(list(root.iterdir())) == 3


KILLED = """
  import os, sys
  import jax
  from bigjax import commits
  from test_damage import opened, state_of

  count = 0
  def dying(call):
    def wrapped(*args, **kwargs):
      global count
      count += 1
      if count == int(sys.argv[2]):
        os._exit(9)
      return call(*args, **kwargs)
    return wrapped

  with opened(sys.argv[1]) as checkpoints:
    checkpoints._keep = commits.Keep(last=1)
    commits._sync, commits._write = dying(commits._sync), dying(commits._write)
    os.rename, os.rmdir, os.unlink = dying(os.rename), dying(os.rmdir), dying(os.unlink)
    checkpoints.save(40, state_of(40), {"remembered": 40})
"""


def check_killed(workdir, moment):
  """Returns whether the process was killed, rather than done before."""
  code = textwrap.dedent(KILLED)
  paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
  command = [sys.executable, "-c", code, str(workdir), str(moment)]
  ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
  assert ended.returncode in (0, 9), ended.stderr
  assert restored_step(workdir, notes := []) in (30, 40) and not notes
  return ended.returncode == 9


@pytest.mark.parametrize("moment", [12])
def test_a_crash_while_a_checkpoint_is_completed_leaves_the_one_before(workdir, moment):
  assert check_killed(workdir, moment)


class Killed(BaseException):
  """Nothing is done after it, as in a process that is gone."""


def die_at(monkeypatch, moment):
  """Has whatever completes and removes checkpoints stop at a moment; returns the number of moments so far."""
  count = [0]

  def dying(call):
    def wrapped(*args, **kwargs):
      count[0] += 1
      if count[0] >= moment:
        raise Killed
      return call(*args, **kwargs)

    return wrapped

  for module, name in ((commits, "_sync"), (commits, "_write"), (os, "rename"), (os, "rmdir"), (os, "unlink")):
    monkeypatch.setattr(module, name, dying(getattr(module, name)))
  return count


def check_killed_at(moment, workdir, monkeypatch):
  """Returns whether there was such a moment."""
  checkpoints = Checkpoints(str(workdir), Keep(last=1))
  with monkeypatch.context() as patch:
    count = die_at(patch, moment)
    checkpoints.save(40, state_of(40), {"remembered": 40})
    assert checkpoints._saving.ended()
  assert restored_step(workdir, notes := []) in (30, 40) and not notes, f"killed at moment {moment}"
  return count[0] >= moment


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_at_any_moment_of_completing_one_and_removing_others_leaves_one(saved, tmp_path, monkeypatch, every):
  moment = 1
  while check_killed_at(moment, shutil.copytree(saved, tmp_path / str(moment)), monkeypatch):
    moment += every
  assert moment > 60


# What Orbax leaves behind of a save that fails: see main.quiet.
FAILING = pytest.mark.filterwarnings("ignore:.*Exception ignored in:pytest.PytestUnraisableExceptionWarning")


class Disk:
  """A disk on which no file can grow beyond a limit while it's full."""

  def __init__(self, limit=2048):
    self.limit, self.before = limit, resource.getrlimit(resource.RLIMIT_FSIZE)

  def full(self):
    resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

  def mended(self):
    resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.fixture
def disk():
  assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
  disk = Disk()
  yield disk
  disk.mended()


@FAILING
def test_while_the_disk_is_full_nothing_is_lost_and_afterwards_checkpoints_are_written_again(
  workdir, disk, monkeypatch
):
  monkeypatch.setattr(checkpoint, "BACK_OFF", (0, 0))
  notes = []
  with opened(workdir, notes) as checkpoints:
    made = {step: state_of(step, 64) for step in (40, 50)}  # What is compiled for them is cached on disk, too.
    disk.full()
    for step, state in made.items():
      checkpoints.save(step, state, {})
      assert checkpoints._saving.ended() and checkpoints.owed()
      assert f"step {step} could not be written" in notes[-1] and "last one is that of step 30" in notes[-1]
      assert checkpoints.steps() == [10, 20, 30]
    disk.mended()
    checkpoints.save(60, state_of(60), {"remembered": 60})
    checkpoints.wait()
    assert not checkpoints.owed()
    assert notes[2:] == ["Checkpoints are written again: there is that of step 60."]
  assert restored_step(workdir, []) == 60
  assert len(list((workdir / "checkpoints").iterdir())) == 4


def test_no_checkpoint_is_begun_before_what_belongs_to_its_steps_is_on_the_disk(workdir, monkeypatch):
  monkeypatch.setattr(checkpoint, "BACK_OFF", (0, 0))

  class Rows:
    full = True

    def settle(self):
      if self.full:
        raise OSError(errno.ENOSPC, "metrics.jsonl: No space left on device")

  rows = Rows()
  with opened(workdir, notes := []) as checkpoints:
    appended.enrol(rows)
    checkpoints.save(40, state_of(40), {"remembered": 40})
    assert checkpoints.owed() and checkpoints.steps(coming=True) == [10, 20, 30]
    assert "step 40 could not be written: No space left" in notes[0]
    rows.full = False
    checkpoints.save(41, state_of(41), {"remembered": 41})
  assert restored_step(workdir, []) == 41
  appended.leave(rows)


def test_after_a_failure_it_is_tried_less_and_less_often(workdir, monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
  with opened(workdir, notes := []) as checkpoints:
    (workdir / "checkpoints").rename(workdir / "elsewhere")
    waits = []
    for step in range(40, 50):
      checkpoints.save(step, state_of(step), {})
      assert not checkpoints.owed()
      start = now[0]
      while not checkpoints.owed():
        now[0] += 5
      waits.append(now[0] - start)
    assert waits == [10, 20, 40, 80, 160, 320, 600, 600, 600, 600]
    assert len(notes) == 10 and not (workdir / "checkpoints").exists()  # The mount point of a disk that is gone.
    (workdir / "elsewhere").rename(workdir / "checkpoints")
    checkpoints.save(50, state_of(50), {"remembered": 50})
  assert restored_step(workdir, []) == 50


@FAILING
def test_what_has_to_be_saved_is_tried_a_few_times_and_then_an_error(workdir, disk, monkeypatch):
  pauses = []
  monkeypatch.setattr(checkpoint.time, "sleep", pauses.append)
  checkpoints = opened(workdir, notes := [])
  large, small = state_of(40, 64), state_of(40)  # Before: what is compiled for them is cached on disk, too.
  disk.full()
  with pytest.raises(OSError, match=r"File too large.* that of step 30.*same command again"):
    checkpoints.save(40, large, {}, insist=True)
  disk.mended()
  assert pauses == [1, 2, 4] and len(notes) == 4
  assert restored_step(workdir, []) == 30
  with opened(workdir, notes := []) as checkpoints:
    disk.full()
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: disk.mended())
    checkpoints.save(40, small, {"remembered": 40}, insist=True)
  assert restored_step(workdir, []) == 40


def test_of_a_disk_that_is_slow_the_loop_waits_so_long_and_goes_on(workdir, monkeypatch):
  monkeypatch.setattr(checkpoint, "PATIENCE", 0.05)
  gate = checkpoint.Save._finish
  slow = threading.Event()
  monkeypatch.setattr(checkpoint.Save, "_finish", lambda self, files: slow.wait() and gate(self, files))
  with opened(workdir, notes := []) as checkpoints:
    checkpoints.save(40, state_of(40), {"remembered": 40})
    checkpoints.save(50, state_of(50), {"remembered": 50})
    assert "step 40 is still being written" in notes[0] and "without one of step 50" in notes[0]
    slow.set()
  assert restored_step(workdir, []) == 40


def test_an_old_checkpoint_goes_only_after_a_newer_one_is_complete_and_intact(workdir, monkeypatch):
  original, seen = commits.remove, []

  def remove(root, step):
    assert commits.wrong(root, 40) == []
    seen.append(step)
    original(root, step)

  monkeypatch.setattr(commits, "remove", remove)
  with Checkpoints(str(workdir), Keep(last=2)) as checkpoints:
    checkpoints.save(40, state_of(40), {"remembered": 40})
    checkpoints.wait()
    assert seen == [10, 20] and checkpoints.steps() == [30, 40]


def test_an_old_checkpoint_stays_for_the_bundle_that_needs_it(workdir):
  (workdir / "bundles" / "00000015").mkdir(parents=True)
  (workdir / "bundles" / "00000015" / "bundle.json").write_text('{"checkpoint": 10}')
  with Checkpoints(str(workdir), Keep(last=1)) as checkpoints:
    checkpoints.save(40, state_of(40), {"remembered": 40})
    checkpoints.wait()
    assert checkpoints.steps() == [10, 40]


def tiny(width=16, **changes):
  images = lambda n: dict(name="synthetic", kind="images", num_examples=n, shape=(4, 4, 1), num_classes=3)
  config = dict(
    total_steps=20,
    batch_size=16,
    data=dict(source=images(40)),
    model=dict(name="mlp", in_features=16, widths=(width,), num_outputs=3),
    task=dict(name="classification"),
    optimizer=dict(name="adamw", weight_decay=0.0),
    schedule=dict(name="cosine", peak=1e-2),
    log_every=1,
    checkpoint_every=4,
    writers=("jsonl",),
  )
  return configs.resolve(config | changes, experiment.TrainConfig)


def outcome(workdir, config):
  run = experiment.build(config)
  with Checkpoints(str(workdir), read_only=True) as checkpoints:
    state, _ = checkpoints.restore(run.abstract, run.shardings)
  return jax.device_get(state), (workdir / "metrics.jsonl").read_bytes()


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a[0], b[0])
  assert a[1] == b[1]


@FAILING
@pytest.mark.parametrize("ends", ["mended", "full"])
def test_a_run_goes_on_while_its_disk_is_full(tmp_path, disk, monkeypatch, ends):
  monkeypatch.setattr(checkpoint, "BACK_OFF", (0, 0))
  monkeypatch.setattr(checkpoint, "PAUSES", (0, 0))
  config = tiny(width=256)
  train.train(config, str(tmp_path / "whole"))
  disk.limit = 16000  # Its parameters are more, the metrics less.
  original = metrics.Logger.step

  def logged(self, at, measured):
    if at == 7:
      while not (tmp_path / "parts" / "checkpoints" / "00000004").exists():
        time.sleep(0.01)
      disk.full()
    if at == 14 and ends == "mended":
      disk.mended()
    original(self, at, measured)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.Logger, "step", logged)
    if ends == "mended":
      train.train(config, str(tmp_path / "parts"))
    else:
      with pytest.raises(OSError, match="No checkpoint could be written"):
        train.train(config, str(tmp_path / "parts"))
  disk.mended()
  incidents = [i["what"] for i in record.read_run(str(tmp_path / "parts"))["incidents"]]
  assert "step 8 could not be written" in incidents[0] and "last one is that of step 4" in incidents[0]
  if ends == "mended":
    assert "written again" in incidents[-1]
  else:
    train.train(config, str(tmp_path / "parts"))
  assert_same(outcome(tmp_path / "whole", config), outcome(tmp_path / "parts", config))


@FAILING
def test_where_nothing_at_all_can_be_written_for_a_while_a_run_goes_on_to_the_same(tmp_path, disk, monkeypatch):
  monkeypatch.setattr(checkpoint, "BACK_OFF", (0, 0))
  monkeypatch.setattr(appended, "BACK_OFF", (0, 0))
  config = tiny(writers=("jsonl", "csv"))
  train.train(config, str(tmp_path / "whole"))
  disk.limit, whole = 0, tmp_path / "whole"
  original = metrics.Logger.step

  def logged(self, at, measured):
    if at == 6:
      while not (tmp_path / "parts" / "checkpoints" / "00000004").exists():
        time.sleep(0.01)
      disk.full()
    if at == 14:
      with Checkpoints(str(tmp_path / "parts"), read_only=True) as checkpoints:
        assert checkpoints.steps() == [4]
      disk.mended()
    original(self, at, measured)

  monkeypatch.setattr(metrics.Logger, "step", logged)
  train.train(config, str(tmp_path / "parts"))
  assert_same(outcome(whole, config), outcome(tmp_path / "parts", config))
  assert (whole / "metrics.csv").read_bytes() == (tmp_path / "parts" / "metrics.csv").read_bytes()
  sums = lambda workdir: {s: a.sums[a.steps == s].tolist() for s, a in ledger.History.of(str(workdir)).steps.items()}
  assert sums(whole) == sums(tmp_path / "parts") and len(sums(whole)) == 20
  incidents = [i["what"] for i in record.read_run(str(tmp_path / "parts"))["incidents"]]
  assert "Checkpoints are written again" in incidents[-1]  # What was said before then had no room itself.


def test_a_resumed_run_takes_the_newest_intact_checkpoint_and_ends_with_the_same_bits(tmp_path, capfd):
  config = tiny(keep=dict(last=3))
  train.train(config, str(tmp_path / "whole"))
  shutil.copytree(tmp_path / "whole", tmp_path / "parts")
  flip(files_of(tmp_path / "parts", 20)[-1], 3)
  capfd.readouterr()
  train.train(config, str(tmp_path / "parts"))
  assert "checkpoint of step 20 is damaged" in capfd.readouterr().err
  assert_same(outcome(tmp_path / "whole", config), outcome(tmp_path / "parts", config))
  (incident,) = record.read_run(str(tmp_path / "parts"))["incidents"]
  assert "00000020.damaged" in incident["what"]


def test_a_manifest_says_what_was_saved_when_and_by_which_rules(workdir):
  said = json.loads((workdir / "checkpoints" / "00000030" / "checkpoint.json").read_text())
  assert said["step"] == 30 and said["loop"] == {"remembered": 30} and said["keep"]["last"] == 9
  on_disk = {str(f.relative_to(workdir / "checkpoints" / "00000030")): f.stat().st_size for f in files_of(workdir, 30)}
  del on_disk["checkpoint.json"]
  assert {n: size for n, (size, _) in said["files"].items()} == on_disk
