"""Several processes are one run: the same numbers, one set of files, one end, and no one waits for who is gone."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from bigjax import config as configs
from bigjax import experiment, ledger, main, peers, sharding, train
from bigjax.data import pipeline, synthetic
from bigjax.errors import UserError
from bigjax.peers import Peers, call_roll, find

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
import ml_collections
def get_config():
  images = lambda n: dict(name="synthetic", kind="images", num_examples=n, shape=(4, 4, 1), num_classes=3)
  return ml_collections.ConfigDict(dict(
      total_steps=8, batch_size=16, log_every=1, checkpoint_every=4, writers=("jsonl",), seed=3,
      data=dict(source=images(40), preprocess="random_shift(1)"),
      model=dict(name="mlp", in_features=16, widths=(16,), num_outputs=3, dropout=0.2),
      task=dict(name="classification"), optimizer=dict(name="adamw", weight_decay=0.0),
      schedule=dict(name="cosine", peak=1e-2, warmup="10%"), ema=0.9, clip=dict(norm=1.0),
      keep=dict(best="val/loss", mode="min"),
      evals=dict(val=dict(
        evaluator=dict(name="classification", num_classes=3), data=dict(source=images(21)), every=4, batch_size=8)),
  ))
"""  # fmt: skip
# The order in which eight devices' gradients are added up is another over a network.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  file = tmp_path_factory.mktemp("configs") / "tiny.py"
  file.write_text(CONFIG)
  return str(file)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
  """The same run by one process with eight devices."""
  workdir = tmp_path_factory.mktemp("alone")
  train.train(resolved(config), str(workdir))
  return workdir


def resolved(config, *flags):
  return configs.resolve(configs.read(config, list(flags)), experiment.TrainConfig)


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


class Processes:
  """`bigjax COMMAND` as some of the `count` processes of a run, with `devices` each."""

  def __init__(self, *command, count, devices=2, which=None, timeout=60, env=lambda i: {}, flags=lambda i: ()):
    port, which = free_port(), range(count) if which is None else which
    devices = {"JAX_NUM_CPU_DEVICES": str(devices)}
    self.started = {}
    for i in which:
      args = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={i}", f"--peer_timeout={timeout}"]
      self.started[i] = subprocess.Popen(
        [sys.executable, "-m", "bigjax", *map(str, command), *args, *flags(i)],
        cwd=ROOT,
        env=os.environ | devices | env(i),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.started.values():
      process.kill()
      process.wait()
      process.stdout.close()
      process.stderr.close()

  def ended(self, code, within=150):
    """Returns what each wrote, once all have left with `code`; a dict by process if they differ."""
    with concurrent.futures.ThreadPoolExecutor(len(self.started)) as pool:  # Nobody's pipe may fill up.
      found = dict(zip(self.started, pool.map(lambda p: p.communicate(timeout=within), self.started.values())))
    codes = {i: p.returncode for i, p in self.started.items()}
    wanted = code if isinstance(code, dict) else dict.fromkeys(codes, code)
    assert codes == wanted, found
    return found


def rows(workdir):
  with open(pathlib.Path(workdir) / "metrics.jsonl") as f:
    return [json.loads(line) for line in f]


def fed(workdir):
  """The digest of what each step was fed."""
  history = ledger.History.of(str(workdir))
  return {s: a.sums[a.steps == s][0].tolist() for s, a in sorted(history.steps.items())}


def assert_same_rows(a, b):
  a, b = rows(a), rows(b)
  assert [(r["step"], *sorted(r)) for r in a] == [(r["step"], *sorted(r)) for r in b]
  for one, other in zip(a, b):
    for name, value in one.items():
      np.testing.assert_allclose(other[name], value, rtol=TOLERANCE, err_msg=f"{name} at {one['step']}")
      if name in ("val/accuracy", "val/recall", "accuracy"):  # Ratios of counts.
        assert other[name] == value


@pytest.mark.parametrize(
  ("count", "devices", "flags"),
  [
    (2, 4, []),
    pytest.param(4, 2, [], marks=pytest.mark.slow),
    # Two processes then feed the same half of the batch, and hold different halves of the kernels.
    pytest.param(
      4, 1, ["--config.mesh=[('data', 2), ('tensor', 2)]", "--config.sharding=fsdp(tensor,8)"], marks=pytest.mark.slow
    ),
  ],
)
def test_several_processes_compute_what_one_does_and_write_it_once(config, alone, tmp_path, count, devices, flags):
  command = ("train", f"--config={config}", f"--workdir={tmp_path}", *flags)
  with Processes(*command, count=count, devices=devices) as run:
    written = run.ended(0)
  assert_same_rows(alone, tmp_path)
  assert [i for i, (out, _) in written.items() if "Finished at step 8" in out] == [0]
  record = json.loads((tmp_path / "run.json").read_text())
  assert record["status"] == "finished" and record["processes"] == count and len(record["starts"]) == 1
  assert len(fed(tmp_path)) == 8 and fed(tmp_path) == fed(alone)
  # And what they saved together, one process reads: every leaf, to the bit what the same run had measured.
  assert train.evaluate(resolved(config), str(tmp_path))[1] == pytest.approx(
    {k: v for k, v in rows(tmp_path)[-1].items() if k.startswith("val/")}, rel=TOLERANCE
  )


def test_two_processes_evaluate_what_one_saved_each_example_once(config, alone):
  with Processes("eval", f"--workdir={alone}", count=2, devices=2) as run:
    written = run.ended(0)
  found = json.loads((alone / "eval-00000008.json").read_text())
  last = {k: v for k, v in rows(alone)[-1].items() if k.startswith("val/")}
  assert found == pytest.approx(last, rel=TOLERANCE)
  assert found["val/accuracy"] == last["val/accuracy"] and round(21 * found["val/accuracy"]) == pytest.approx(
    21 * found["val/accuracy"]
  )
  assert "val/accuracy" in written[0][0] and "val/accuracy" not in written[1][0]


def wait_for_rows(workdir, count, run):
  file, deadline = pathlib.Path(workdir) / "metrics.jsonl", time.monotonic() + 120
  while not file.exists() or file.read_text().count("\n") < count:
    assert time.monotonic() < deadline and all(p.poll() is None for p in run.started.values())
    time.sleep(0.1)


def test_sigterm_to_one_stops_all_at_one_step_and_another_number_of_processes_goes_on(config, tmp_path):
  flags = ["--config.total_steps=400", "--config.checkpoint_every=400", "--config.evals.val.every=400"]
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  with Processes("train", f"--config={config}", f"--workdir={parts}", *flags, count=2, devices=4) as run:
    wait_for_rows(parts, 3, run)
    run.started[1].send_signal(signal.SIGTERM)
    run.ended(75)
  stopped = json.loads((parts / "run.json").read_text())
  assert stopped["status"] == "stopped" and 3 <= stopped["step"] < 400
  assert (parts / "checkpoints" / f"{stopped['step']:08d}").is_dir()
  train.train(resolved(config, *flags), str(whole))
  assert train.train(resolved(config, *flags), str(parts)) == "finished"
  assert len(fed(whole)) == 400 and fed(whole) == fed(parts)
  assert main.main(["ledger", str(parts)]) == 0
  a, b = rows(whole), rows(parts)
  assert [r["step"] for r in a] == [r["step"] for r in b]
  np.testing.assert_allclose([r.get("loss", 0) for r in a], [r.get("loss", 0) for r in b], rtol=2e-5)


STALLED = """
import os, pathlib, time
from bigjax.data import synthetic
def make(kind: str = "images", num_examples: int = 40, shape: tuple[int, ...] = (4, 4, 1), num_classes: int = 3):
  class Stalled(synthetic.Synthetic):
    fetched = 0
    def fetch(self, ids):
      Stalled.fetched += 1
      stalls = os.environ.get("STALLS")
      if stalls and (Stalled.fetched > 28 if stalls == "always" else Stalled.fetched == 28):
        pathlib.Path(os.environ["STALLED"]).touch()
        time.sleep(600)
      return super().fetch(ids)
  return Stalled(**vars(synthetic.make(kind=kind, num_examples=num_examples, shape=shape, num_classes=num_classes)))
"""


@pytest.mark.parametrize(
  ("asked", "stalls", "goes_on"),
  [
    (0, "once", False),
    pytest.param(0, "once", True, marks=pytest.mark.slow),
    pytest.param(1, "once", True, marks=pytest.mark.slow),
    pytest.param(0, "always", True, marks=pytest.mark.slow),
  ],
)
def test_a_stop_while_one_waits_for_input_that_stands_still_changes_nothing(config, tmp_path, asked, stalls, goes_on):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "stalled.py").write_text(STALLED)
  flags = ["--config.total_steps=40", "--config.checkpoint_every=20", "--config.evals.val.every=100"]
  flags.append("--config.data.source.name=mine.stalled")
  env = {"PYTHONPATH": str(tmp_path), "STALLED": str(tmp_path / "stalled")}

  def started(workdir, stalls=""):
    command = ("train", f"--config={config}", f"--workdir={tmp_path / workdir}", *flags)
    return Processes(*command, count=2, env=lambda i: env | {"STALLS": stalls if i == 1 else ""})

  with started("parts", stalls) as run:
    deadline = time.monotonic() + 120
    while not (tmp_path / "stalled").exists():
      assert time.monotonic() < deadline and all(p.poll() is None for p in run.started.values())
      time.sleep(0.05)
    time.sleep(1.0)  # Until what was made ahead is used up: process 0 is in a step that 1 has no batch for.
    begun = time.monotonic()
    run.started[asked].send_signal(signal.SIGTERM)
    written = run.ended(75)
  said = json.loads((tmp_path / "parts" / "run.json").read_text())
  saved = max(map(int, os.listdir(tmp_path / "parts" / "checkpoints")))
  if stalls == "always":
    assert any("process 1 of 2 waits for input" in err for _, err in written.values()) and saved == 20
  else:
    assert said["status"] == "stopped" and said["step"] == saved > 20 and time.monotonic() - begun < 20
  if not goes_on:
    return
  for workdir in ("parts", "whole"):
    with started(workdir) as run:
      run.ended(0)
  assert (tmp_path / "parts" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
  assert main.main(["checkpoint", "diff", str(tmp_path / "whole"), str(tmp_path / "parts")]) == 0
  assert fed(tmp_path / "parts") == fed(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_stopped_and_started_again_write_the_same_bits(config, tmp_path):
  flags = ["--config.total_steps=300", "--config.checkpoint_every=300", "--config.evals.val.every=100"]
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  train_two = lambda workdir: Processes("train", f"--config={config}", f"--workdir={workdir}", *flags, count=2)
  with train_two(whole) as run:
    run.ended(0)
  with train_two(parts) as run:
    wait_for_rows(parts, 3, run)
    run.started[0].send_signal(signal.SIGTERM)
    run.ended(75)
  assert 3 <= json.loads((parts / "run.json").read_text())["step"] < 300
  with train_two(parts) as run:
    run.ended(0)
  assert (parts / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
  assert main.main(["checkpoint", "diff", str(whole), str(parts)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["stacked", "listed"])
def test_two_processes_go_on_with_layers_in_another_form(tmp_path, scan):
  vit = "name='vit', image_size=4, channels=1, num_classes=3, patch_size=2, width=16, depth=2, heads=2, mlp_dim=32"
  mlp = "name='mlp', in_features=16, widths=(16,), num_outputs=3, dropout=0.2"
  assert mlp.replace("'", '"') in CONFIG
  config, workdir = tmp_path / "vit.py", tmp_path / "run"
  config.write_text(CONFIG.replace(mlp.replace("'", '"'), f"{vit}, scan={scan}"))
  assert train.train(resolved(str(config)), str(workdir)) == "finished"
  before = rows(workdir)
  shutil.rmtree(workdir / "checkpoints" / "00000008")  # As if it had been stopped at step 4.
  flags = [f"--config.model.scan={not scan}", "--config.sharding=fsdp(data,8)"]
  with Processes("train", f"--config={config}", f"--workdir={workdir}", *flags, count=2, devices=4) as run:
    run.ended(0)
  after = rows(workdir)
  assert [r["step"] for r in after] == [r["step"] for r in before]
  losses = [[r["loss"] for r in found if "loss" in r] for found in (before, after)]
  assert losses[0] != losses[1]  # They were computed again.
  np.testing.assert_allclose(*losses, rtol=2e-5)


def test_who_does_not_come_is_named_to_all_who_did(config, tmp_path):
  command = ("train", f"--config={config}", f"--workdir={tmp_path / 'run'}")
  with Processes(*command, count=4, which=(0, 2), timeout=12) as run:
    written = run.ended(1)
  for _, err in written.values():
    assert err.startswith("bigjax train: processes 1, 3 of 4 did not come within 12 s")
    assert "0 on" in err and "2 on" in err and "Traceback" not in err
  assert not (tmp_path / "run").exists()


BROKEN = """
import os
from bigjax.data import synthetic
def make(kind: str = "images", num_examples: int = 40, shape: tuple[int, ...] = (4, 4, 1), num_classes: int = 3):
  class Broken(synthetic.Synthetic):
    fetched = 0
    def fetch(self, ids):
      Broken.fetched += 1
      if Broken.fetched > 30 and os.environ.get("BREAKS"):
        raise RuntimeError("the tape is torn")
      return super().fetch(ids)
  return Broken(**vars(synthetic.make(kind=kind, num_examples=num_examples, shape=shape, num_classes=num_classes)))
"""


POISONED = """
import numpy as np
from bigjax.data import synthetic
def make(kind: str = "images", num_examples: int = 40, shape: tuple[int, ...] = (4, 4, 1), num_classes: int = 3):
  class Poisoned(synthetic.Synthetic):
    def fetch(self, ids):
      found = super().fetch(ids)
      return found | {"image": np.where((ids == 17)[:, None, None, None], np.float32(np.inf), found["image"])}
  return Poisoned(**vars(synthetic.make(kind=kind, num_examples=num_examples, shape=shape, num_classes=num_classes)))
"""


@pytest.mark.slow
def test_two_processes_go_back_together_and_are_fed_alike(config, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "poisoned.py").write_text(POISONED)
  flags = [
    "--config.data.source.name=mine.poisoned",
    "--config.data.source.num_examples=128",
    "--config.guard=rollback",
  ]
  command = ("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags)
  with Processes(*command, count=2, devices=4, env=lambda i: {"PYTHONPATH": str(tmp_path)}) as run:
    run.ended(0)
  (entry,) = json.loads((tmp_path / "run" / "rollbacks.json").read_text())
  first, second = ledger.History.of(str(tmp_path / "run")).attempts
  assert first.steps[-1] >= entry["step"] and second.after == entry["back_to"] and second.steps[-1] == 8
  checked = [sys.executable, "-m", "bigjax", "ledger", str(tmp_path / "run")]
  assert subprocess.run(checked, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}).returncode == 0


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_of_one_ends_all_with_its_name(config, tmp_path, broken):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "torn.py").write_text(BROKEN)
  command = ("train", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.data.source.name=mine.torn")
  env = lambda i: {"PYTHONPATH": str(tmp_path)} | ({"BREAKS": "1"} if i == broken else {})
  with Processes(*command, "--config.total_steps=100000", count=2, env=env) as run:
    written = run.ended(1)
  assert "RuntimeError: the tape is torn" in written[broken][1]
  last = written[1 - broken][1].splitlines()[-1]
  assert last.startswith(f"bigjax: process {broken} of 2 on ") and "the tape is torn" in last
  record = json.loads((tmp_path / "run" / "run.json").read_text())
  assert record["status"] == "failed" and "the tape is torn" in record["error"]


def test_a_peer_that_is_killed_is_missed_in_bounded_time(config, tmp_path):
  flags = ["--config.total_steps=100000", "--config.evals.val.every=100000", "--config.checkpoint_every=100000"]
  with Processes("train", f"--config={config}", f"--workdir={tmp_path}", *flags, count=2, timeout=10) as run:
    wait_for_rows(tmp_path, 3, run)
    run.started[1].kill()
    written = run.ended({0: 76, 1: -signal.SIGKILL})
  assert "process 1 of 2 on" in written[0][1] and "nothing was heard of it for 10 s" in written[0][1]
  assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


GONE_AT_ONCE = """
import os, signal, sys, time
from bigjax import hosts
coordinator, process = sys.argv[1], int(sys.argv[2])
peers = hosts.initialize(coordinator, 2, process, 60)
if process == 1:
  os.kill(os.getpid(), signal.SIGKILL)
hosts._Lookout(peers, 4, print)
time.sleep(60)
"""


def test_a_peer_that_is_gone_before_its_first_sign_of_life_is_missed_too():
  address = f"127.0.0.1:{free_port()}"
  command = [sys.executable, "-c", GONE_AT_ONCE, address]
  started = [
    subprocess.Popen([*command, str(i)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  (_, said), _ = (process.communicate(timeout=100) for process in started)
  assert [process.returncode for process in started] == [76, -signal.SIGKILL], said
  assert f"process 1 of 2 on {socket.gethostname()} failed: nothing was heard of it for 4 s" in said


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_peer_that_is_there_but_does_nothing_any_more_is_missed_in_bounded_time(config, tmp_path, frozen):
  flags = ["--config.total_steps=100000", "--config.evals.val.every=100000", "--config.checkpoint_every=100000"]
  with Processes("train", f"--config={config}", f"--workdir={tmp_path}", *flags, count=2, timeout=10) as run:
    wait_for_rows(tmp_path, 3, run)
    begun = time.monotonic()
    run.started[frozen].send_signal(signal.SIGSTOP)
    assert run.started[1 - frozen].wait(timeout=60) == 76
    assert time.monotonic() - begun < 30
    run.started[frozen].kill()
    written = run.ended({frozen: -signal.SIGKILL, 1 - frozen: 76})
  assert f"process {frozen} of 2" in written[1 - frozen][1]


def test_another_config_is_refused(config, tmp_path):
  def flags(i):
    return [f"--config.seed={i}", f"--workdir={tmp_path / 'run'}"]

  with Processes("train", f"--config={config}", count=2, timeout=20, flags=flags) as run:
    written = run.ended(2)
  assert "process 1 on" in written[1][1] and "another config than process 0" in written[1][1]
  assert "process 1 of 2 on" in written[0][1] and "another config" in written[0][1]


def test_a_workdir_that_is_not_shared_is_refused(config, tmp_path):
  with Processes(
    "train", f"--config={config}", count=2, timeout=20, flags=lambda i: [f"--workdir={tmp_path / str(i)}"]
  ) as run:
    written = run.ended(2)
  assert f"--workdir={tmp_path / '1'}" in written[1][1] and "all hosts share" in written[1][1]


PERMUTED = """
import sys, jax, numpy as np
from jax.sharding import AxisType, Mesh
from bigjax import sharding
from bigjax.data import pipeline, synthetic
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), cluster_detection_method="deactivate")
# As on a TPU, where the ring through all chips goes back and forth between hosts.
mesh = Mesh(np.array(jax.devices())[[0, 2, 3, 1]], ("data",), axis_types=(AxisType.Auto,))
mine, parts = sharding.data_part(mesh)
assert (mine, parts) == (((0, 3), 4) if jax.process_index() == 0 else ((1, 2), 4)), (mine, parts)
batches = lambda host, hosts: pipeline.train_batches(
  synthetic.make(kind="linear", num_examples=40), batch_size=8, seed=1, host=host, hosts=hosts)
whole, local = next(batches(0, 1)), next(batches(mine, parts))
with pipeline.to_device(iter([local]), sharding.batch_sharding(mesh)) as placed:
  for name, value in next(placed).items():
    assert value.shape == whole[name].shape
    for shard in value.addressable_shards:
      np.testing.assert_array_equal(np.asarray(shard.data), whole[name][shard.index])
print("the same")
"""


def test_parts_that_do_not_lie_together_reach_their_places(tmp_path):
  (tmp_path / "permuted.py").write_text(PERMUTED)
  address = f"127.0.0.1:{free_port()}"
  env = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
  started = [
    subprocess.Popen([sys.executable, tmp_path / "permuted.py", address, str(i)], env=env, stdout=subprocess.PIPE)
    for i in range(2)
  ]
  assert all(b"the same" in p.communicate(timeout=100)[0] for p in started)


class Chip:
  """As much of a device as a mesh looks at."""

  platform, device_kind = "cpu", "chip"

  def __init__(self, id, a_process):
    self.id, self.process_index = id, id // a_process


@pytest.mark.parametrize(
  ("a_process", "sizes", "expected"),
  [
    (4, dict(data=8), [((0,), 2), ((1,), 2)]),
    (2, dict(data=8), [((i,), 4) for i in range(4)]),
    (2, dict(data=2, tensor=4), [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]),
    (4, dict(tensor=8), [((0,), 1), ((0,), 1)]),
    (2, dict(replica=2, data=1, expert=2, seq=2), [((0,), 4), ((1,), 4), ((2,), 4), ((3,), 4)]),
    (2, dict(data=2, pipe=2, expert=2), [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]),
  ],
)
def test_what_a_process_feeds_is_where_its_devices_sit(a_process, sizes, expected):
  chips = np.array([Chip(i, a_process) for i in range(8)]).reshape(*sizes.values())
  mesh = jax.sharding.Mesh(chips, tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
  assert [sharding.data_part(mesh, i) for i in range(8 // a_process)] == expected


@pytest.mark.parametrize("sized", [16, 48])
def test_all_parts_together_are_the_batch(sized):
  source = synthetic.make(kind="linear", num_examples=37)
  plan = lambda host, hosts, seed: pipeline.Plan(source, sized, host, hosts, seed=seed)
  for seed in (None, 5):
    whole = plan(0, 1, seed).examples(np.arange(2 * sized))
    split = [plan(parts, 8, seed) for parts in ((0, 3), (1, 2), (4, 5, 6, 7))]
    found = [p.examples(np.arange(2 * p.local_size)) for p in split]
    for i, wanted in enumerate(whole):
      blocks = wanted.reshape(2, 8, -1)
      for p, got in zip(split, found):
        np.testing.assert_array_equal(got[i].reshape(2, len(p.parts), -1), blocks[:, p.parts])


# Who the peers are


TPU_ATTRIBUTES = {
  "worker-network-endpoints": "unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6",
  "agent-worker-number": "1",
  "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
  "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.2:8081'\n",
}
SLURM = dict(SLURM_JOB_ID="1234567", SLURM_STEP_NODELIST="gpu[007-009,12],big1", SLURM_PROCID="3", SLURM_LOCALID="0")
OMPI = dict(
  OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="2"
)
URI = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"


@pytest.mark.parametrize(
  ("env", "given", "expected"),
  [
    ({}, {}, None),
    ({}, dict(coordinator="a:1", processes=2, process=1), Peers("a:1", 2, 1)),
    ({}, dict(coordinator="a:1", processes=1, process=0), None),
    (dict(BIGJAX_COORDINATOR="a:1", BIGJAX_PROCESSES="3", BIGJAX_PROCESS="2"), {}, Peers("a:1", 3, 2)),
    # GKE and TPU VMs, one slice and several.
    (dict(TPU_WORKER_HOSTNAMES="h0,h1", TPU_WORKER_ID="1"), {}, Peers("h0:8482", 2, 1, None, "Cloud TPU")),
    (dict(TPU_WORKER_HOSTNAMES="h0,h1", TPU_WORKER_ID="1", JAX_PLATFORMS="cpu"), {}, None),
    (dict(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0"), {}, None),
    ({}, dict(attribute=TPU_ATTRIBUTES.get), Peers("10.0.0.2:8482", 4, 3, None, "Cloud TPU")),
    ({}, dict(attribute={"worker-network-endpoints": "w0,w1"}.get), Peers("w0:8482", 2, 0, None, "Cloud TPU")),
    # Slurm: one task a node has all its devices, several share them.
    (SLURM | dict(SLURM_NTASKS="5", SLURM_STEP_NUM_NODES="5"), {}, Peers("gpu007:63111", 5, 3, None, "Slurm")),
    (SLURM | dict(SLURM_NTASKS="10", SLURM_STEP_NUM_NODES="5"), {}, Peers("gpu007:63111", 10, 3, (0,), "Slurm")),
    (SLURM | dict(SLURM_NTASKS="1", SLURM_PROCID="0"), {}, None),
    (SLURM | dict(SLURM_NTASKS="5", SLURM_STEP_NODELIST="a,b", JAX_COORDINATOR_PORT="99", SLURM_STEP_NUM_NODES="5"),
     {}, Peers("a:99", 5, 3, None, "Slurm")),
    (dict(SLURM_JOB_ID="1", SLURM_NTASKS="5", SLURM_PROCID="0"), {}, None),  # A batch script, outside of srun.
    # Open MPI, before and from version 5.
    (OMPI | dict(OMPI_MCA_orte_hnp_uri=URI), {}, Peers("10.96.0.1:61440", 4, 3, (1,), "Open MPI")),
    (OMPI, dict(coordinator="b:5"), Peers("b:5", 4, 3, (1,), "Open MPI")),
    (OMPI | dict(OMPI_COMM_WORLD_LOCAL_SIZE="4", PMIX_NAMESPACE="prterun-7"), {},
     Peers("127.0.0.1:61447", 4, 3, (1,), "Open MPI")),
    # Kubernetes: without a number, the pods of an indexed job are runs of their own.
    (dict(JOB_COMPLETION_INDEX="2", BIGJAX_PROCESSES="4"), dict(hostname="run-2.pods.ns.svc.cluster.local"),
     Peers("run-0.pods.ns.svc.cluster.local:8476", 4, 2, None, "Kubernetes")),
    (dict(JOB_COMPLETION_INDEX="2"), {}, None),
  ],
)  # fmt: skip
def test_peers_are_found_by_what_started_them(env, given, expected):
  assert find(env, **given) == expected


@pytest.mark.parametrize(
  ("env", "given", "words"),
  [
    ({}, dict(coordinator="a:1", processes=2), "--process: not given"),
    ({}, dict(coordinator="a:1", processes=2, process=2), "from 0 to 1"),
    ({}, dict(coordinator="a", processes=2, process=0), "give HOST:PORT"),
    (dict(BIGJAX_PROCESSES="two"), {}, "BIGJAX_PROCESSES=two"),
    (OMPI, {}, "-x BIGJAX_COORDINATOR"),
  ],
)
def test_a_set_up_that_can_not_be_is_refused(env, given, words):
  with pytest.raises(UserError, match=words):
    find(env, **given)


def roll(*called, timeout=20.0):
  """What each of the callers (processes, process) gets told."""
  address = f"127.0.0.1:{free_port()}"

  def one(who):
    try:
      return call_roll(Peers(address, *who), timeout)
    except (UserError, TimeoutError) as e:
      return e

  with concurrent.futures.ThreadPoolExecutor(len(called)) as pool:
    return list(pool.map(one, called))


def test_the_roll_is_complete_once_all_have_come():
  here = socket.gethostname()
  assert roll(*((5, i) for i in reversed(range(5)))) == [dict.fromkeys(range(5), here)] * 5


def test_the_roll_names_who_is_missing_twice_there_or_of_another_number():
  for e in roll((3, 0), (3, 2), timeout=1.0):
    assert isinstance(e, TimeoutError) and str(e).startswith("process 1 of 3 did not come within 1 s")
  (alone,) = roll((3, 1), timeout=0.5)
  assert isinstance(alone, TimeoutError) and "process 0 of 3 did not answer at 127.0.0.1" in str(alone)
  twice = roll((3, 0), (3, 1), (3, 1))
  assert all(isinstance(e, UserError) and "--process=1 was given twice" in str(e) for e in twice)
  other = roll((2, 0), (3, 1))
  assert all(isinstance(e, UserError) and "was told 3 and process 0" in str(e) for e in other)


def test_whoever_else_knocks_is_not_counted_and_a_peer_may_come_again():
  address = f"127.0.0.1:{free_port()}"
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    answer = pool.submit(call_roll, Peers(address, 2, 0), 20.0)
    for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": 1, "processes": 2, "host": "first"}\n'):
      while True:
        try:
          with socket.create_connection(("127.0.0.1", int(address.partition(":")[2]))) as s:
            s.sendall(said)
          break
        except OSError:
          time.sleep(0.05)
    assert len(answer.result()) == 2  # It hung up, but all had come.


def test_a_process_alone_asks_nobody(monkeypatch):
  from bigjax import hosts

  for name in ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "BIGJAX_COORDINATOR", "JOB_COMPLETION_INDEX"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(socket, "create_connection", None)
  monkeypatch.setattr(peers, "call_roll", None)
  assert hosts.initialize() is None
