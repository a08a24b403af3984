"""`bigjax checkpoint`: what is there, what differs, what is damaged, and what may go."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from bigjax import config as configs
from bigjax import experiment, main, train
from bigjax.checkpoint import Checkpoints

IMAGES = lambda n: dict(name="synthetic", kind="images", num_examples=n, shape=(4, 4, 1), num_classes=3)
CONFIG = dict(
  total_steps=8,
  batch_size=16,
  data=dict(source=IMAGES(40)),
  model=dict(name="mlp", in_features=16, widths=(8,), num_outputs=3),
  task=dict(name="classification"),
  optimizer=dict(name="adamw", weight_decay=0.0),
  schedule=dict(name="cosine", peak=1e-2),
  checkpoint_every=2,
  writers=("jsonl",),
  keep=dict(last=2, every=4),
  ema=0.9,
)


def resolved(**changes):
  return configs.resolve(CONFIG | changes, experiment.TrainConfig)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained") / "run"
  train.train(resolved(), str(workdir))
  return workdir


@pytest.fixture
def workdir(trained, tmp_path):
  return pathlib.Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def command(capsys):
  def run(*argv):
    capsys.readouterr()
    code = main.main(["checkpoint", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out + said.err

  return run


def damage(workdir, step):
  file = max((workdir / "checkpoints" / f"{step:08d}" / "state").rglob("*"), key=lambda f: f.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def steps(workdir):
  with Checkpoints(str(workdir), read_only=True) as checkpoints:
    return checkpoints.steps()


def test_ls_says_why_each_is_kept(workdir, command):
  code, said = command("ls", workdir)
  rows = {line.split()[0]: line for line in said.splitlines()}
  assert code == 0 and list(rows) == ["step", "4", "6", "8"]
  assert "every 4" in rows["4"] and " last " in rows["6"] and "last, every 4" in rows["8"] and "digests" in rows["8"]


def test_show_lists_every_leaf_with_its_size(workdir, command):
  code, said = command("show", f"{workdir}@6", "--match=params/.*|step")
  assert code == 0 and "step 6" in said
  (kernel,) = [line for line in said.splitlines() if "float32" in line and "[16, 8]" in line]
  assert kernel.startswith("params/") and "512 B" in kernel
  assert f"params: 4 leaves, {16 * 8 + 8 + 8 * 3 + 3:,} values" in said


def test_diff_measures_every_leaf_that_is_not_the_same_to_the_bit(workdir, command):
  code, said = command("diff", workdir, f"{workdir}@8")
  assert code == 0 and "leaves are the same to the bit" in said and "~" not in said
  code, said = command("diff", f"{workdir}@6", workdir, "--match=params/.*")
  assert code == 1 and said.count("~") == 4 and "0 of 4 leaves" in said
  with Checkpoints(str(workdir), read_only=True) as checkpoints:
    a, b = checkpoints.read(6), checkpoints.read(8)
  name = next(n for n in a if n.startswith("params/") and a[n].ndim == 2)
  (line,) = [line for line in said.splitlines() if f" {name} " in line]
  most = np.abs(a[name].astype(float) - b[name]).max()
  assert f"differs by {most:.3g}" in line and f"{most / np.abs(a[name]).max():.3g} of the largest" in line


def test_verify_finds_what_changed_and_leaves_it_where_it_is(workdir, command):
  code, said = command("verify", workdir)
  assert code == 0 and said.count("intact") == 3
  damage(workdir, 6)
  code, said = command("verify", workdir)
  assert code == 1 and "step 6: DAMAGED\n  state/" in said and said.count("intact") == 2
  assert steps(workdir) == [4, 6, 8]
  assert command("verify", f"{workdir}@8")[0] == 0
  code, said = command("verify", f"{workdir}@5")
  assert code == 2 and "of steps 4, 6, 8" in said


def test_a_damaged_checkpoint_is_neither_shown_nor_compared(workdir, command):
  damage(workdir, 6)
  for argv in (("show", f"{workdir}@6"), ("diff", workdir, f"{workdir}@6")):
    code, said = command(*argv)
    assert code == 1 and "00000006 is damaged" in said and "Traceback" not in said


def test_prune_says_first_and_never_removes_the_last_that_is_intact(workdir, command):
  code, said = command("prune", workdir, "--dry_run")
  assert code == 0 and "step 4: would go" in said and "step 6: would go" in said and steps(workdir) == [4, 6, 8]
  damage(workdir, 8)
  code, said = command("prune", workdir)
  assert code == 0 and "6 (newest that is intact)" in said and steps(workdir) == [6, 8]
  damage(workdir, 6)
  code, said = command("prune", workdir)
  assert code == 2 and "nothing is removed" in said and steps(workdir) == [6, 8]


def test_what_a_bundle_is_replayed_from_stays_for_as_long_as_the_bundle(workdir, command):
  bundle = workdir / "bundles" / "00000005"
  bundle.mkdir(parents=True)
  (bundle / "bundle.json").write_text('{"checkpoint": 4}')
  assert "for bundles/00000005" in command("ls", workdir)[1]
  assert "4 (for bundles/00000005)" in command("prune", workdir)[1] and steps(workdir) == [4, 8]
  shutil.rmtree(bundle)
  command("prune", workdir)
  assert steps(workdir) == [8]


def test_prune_removes_what_was_set_aside_only_when_asked_to(workdir, command):
  aside = workdir / "checkpoints" / "00000009.damaged"
  shutil.copytree(workdir / "checkpoints" / "00000008", aside)
  assert "set aside as damaged" in command("ls", workdir)[1]
  command("prune", workdir, "--every=4")
  assert aside.is_dir() and steps(workdir) == [4, 8]
  command("prune", workdir, "--every=4", "--damaged")
  assert not aside.exists()


def test_convert_writes_a_workdir_of_another_config_that_trains_on(workdir, tmp_path, command):
  code, said = command("convert", f"{workdir}@6", tmp_path / "new", "--config.ema=None")
  assert code == 2 and "drop=" in said and not (tmp_path / "new").exists()
  code, said = command("convert", f"{workdir}@6", tmp_path / "new", "--config.ema=None", "--drop=opt_state/.*ema.*")
  assert code == 0 and "left behind" in said and steps(tmp_path / "new") == [6]
  assert json.loads((tmp_path / "new" / "config.json").read_text())["ema"] is None
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(tmp_path)
    train.train(resolved(ema=None), str(tmp_path / "new"))
  whole, converted = (
    Checkpoints(str(d), read_only=True).read(8, only=("params/",)) for d in (workdir, tmp_path / "new")
  )
  jax.tree.map(np.testing.assert_array_equal, whole, converted)
  code, said = command("convert", workdir, tmp_path / "new")
  assert code == 2 and "there already" in said


def test_what_is_no_run_is_said_so(tmp_path, command):
  for name in ("ls", "show", "verify", "prune"):
    code, said = command(name, tmp_path)
    assert code == 2 and "no checkpoints" in said
