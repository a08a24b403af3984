"""Checkpoints in an object store are what they are in a folder: complete or not there, verified, in their order."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from bigjax import stores
from bigjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
# In a process of its own: the libraries read their addresses once, and leave connections behind.
STORE = """
  import contextlib, http.server, io, json, logging, os, socket, threading

  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  address = f"http://127.0.0.1:{port}"
  os.environ.update(
    STORAGE_EMULATOR_HOST=address, TENSORSTORE_GCS_HTTP_URL=address, GOOGLE_AUTH_TOKEN_FOR_TESTING="none"
  )
  import gcsfs.retry
  from gcp_storage_emulator.server import Router, create_server

  # The emulator answers one connection after the other, and of those that wait keeps five: who connects ahead of what
  # it has to say holds the others up. Here each has a thread, and answers are made one at a time.
  class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

  answer, one_at_a_time = Router.handle, threading.Lock()
  def handle(router, method):
    with one_at_a_time:
      answer(router, method)

  http.server.HTTPServer, Router.handle = Server, handle
  # The emulator knows no moveTo, for which gcsfs has another way; it would ask for it half a minute before it takes it.
  again = gcsfs.retry.is_retriable
  gcsfs.retry.is_retriable = lambda e: getattr(e, "code", None) != 501 and again(e)
  logging.disable(logging.CRITICAL)
  server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
  server.start()

"""
PROGRAM = """
  import jax
  import jax.numpy as jnp

  from bigjax import main, sharding, stores
  from bigjax import state as states
  from bigjax.checkpoint import Checkpoints
  from bigjax.commits import Keep

  URL = "gs://bucket/runs/a"
  abstract = states.TrainState(
    jax.ShapeDtypeStruct((), jnp.int32), {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}, {}, {}
  )
  shardings = sharding.shard_tree(abstract, "fsdp", sharding.make_mesh([("data", 4)]))

  def state_of(step):
    fill = lambda: states.TrainState(jnp.int32(step), {"w": jax.random.normal(jax.random.key(step), (64, 64))}, {}, {})
    return jax.jit(fill, out_shardings=shardings)()

  def said(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as out:
      code = main.main(["checkpoint", *argv])
    return code, out.getvalue()

  found, notes = {}, []
  root = stores.place(URL) / "checkpoints"
  with Checkpoints(URL, Keep(last=2), note=notes.append) as checkpoints:
    found["at first"] = checkpoints.steps(), checkpoints.latest()
    for step in (10, 20, 30):
      checkpoints.save(step, state_of(step), {"at": step})
      checkpoints.wait()
  found["after saving"] = sorted(p.name for p in root.iterdir())
  found["verified"] = said("verify", URL)

  (root / "00000040" / "state" / "d").write_text("what a killed run left")
  with Checkpoints(URL, read_only=True) as checkpoints:
    found["of a killed run"] = checkpoints.steps()
    found["left by who reads"] = sorted(p.name for p in root.iterdir())

  with Checkpoints(URL, Keep(last=2), note=notes.append) as checkpoints:
    found["swept"] = sorted(p.name for p in root.iterdir())
    state, loop = checkpoints.restore(abstract, shardings)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state, state_of(30))
    found["the same"] = loop, all(jax.tree.leaves(same))

  part = max((root / "00000030/state/ocdbt.process_0/d").iterdir(), key=lambda p: p.stat().length)
  content = bytearray(part.read_bytes())
  content[len(content) // 2] ^= 1
  part.write_bytes(bytes(content))
  found["damaged"] = said("verify", URL)[0]
  with Checkpoints(URL, Keep(last=2), note=notes.append) as checkpoints:
    found["latest"] = checkpoints.latest()
  found["aside"] = sorted(p.name for p in root.iterdir())
  print(json.dumps([found, notes]), flush=True)
  os._exit(0)  # Without waiting for connections that nobody needs any more.
"""


# Each start has nothing but the store.
RUNS = """
  import sys

  from bigjax import main, stores

  config, here = sys.argv[1:3]
  URL = "gs://bucket/runs/b"
  train = lambda workdir: main.main(["train", f"--config={config}", f"--workdir={workdir}"])
  found = {"codes": [train(here)]}

  from bigjax import metrics
  logged = metrics.Logger.step
  def stop(self, at, measured):
    logged(self, at, measured)
    if at == 10:
      raise KeyboardInterrupt

  metrics.Logger.step = stop
  found["codes"].append(train(URL))
  metrics.Logger.step = logged
  found["stopped with"] = sorted(p.name for p in (stores.place(URL) / "checkpoints").iterdir())
  found["codes"].append(train(URL))
  for command in (["report", URL], ["ledger", URL], ["checkpoint", "verify", URL], ["eval", f"--workdir={URL}"]):
    found["codes"].append(main.main(command))
  found["files"] = [sorted(p.name for p in stores.place(w).iterdir() if "events." not in p.name) for w in (here, URL)]
  found["metrics"] = [(stores.place(w) / "metrics.jsonl").read_text() for w in (here, URL)]
  found["differ"] = main.main(["checkpoint", "diff", here, URL])
  print(json.dumps(found), flush=True)
  os._exit(0)
"""


def run(program, *args):
  for library in ("gcsfs", "gcp_storage_emulator"):
    pytest.importorskip(library)
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4"}
  command = [sys.executable, "-c", textwrap.dedent(STORE) + textwrap.dedent(program), *map(str, args)]
  ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250, check=False)
  assert ended.returncode == 0, ended.stderr[-3000:]
  return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
  return run(PROGRAM)


def test_in_a_store_they_are_saved_kept_verified_and_restored_to_the_bit(found):
  found, _ = found
  assert found["at first"] == [[], None]
  assert found["after saving"] == ["00000020", "00000030"]
  code, said = found["verified"]
  assert code == 0 and said.count("intact") == 2
  assert found["the same"] == [{"at": 30}, True]


def test_what_a_killed_run_left_in_a_store_is_no_checkpoint_and_goes(found):
  found, _ = found
  assert found["of a killed run"] == [20, 30]
  assert found["left by who reads"] == ["00000020", "00000030", "00000040"]
  assert found["swept"] == ["00000020", "00000030"]


def test_damage_in_a_store_is_found_and_the_one_before_taken(found):
  found, notes = found
  assert found["damaged"] == 1 and found["latest"] == 20
  assert found["aside"] == ["00000020", "00000030.damaged"]
  assert len(notes) == 1 and "step 30 is damaged (state/ocdbt.process_0/d/" in notes[0]


CONFIG = """
import ml_collections
def get_config():
  images = lambda n: dict(name="synthetic", kind="images", num_examples=n, shape=(4, 4, 1), num_classes=3)
  return ml_collections.ConfigDict(dict(
      total_steps=12, batch_size=16, log_every=1, checkpoint_every=4,
      data=dict(source=images(40)), model=dict(name="mlp", in_features=16, widths=(8,), num_outputs=3),
      task=dict(name="classification"), optimizer=dict(name="adamw", weight_decay=0.0),
      schedule=dict(name="cosine", peak=1e-2),
      evals=dict(val=dict(evaluator=dict(name="classification", num_classes=3), data=dict(source=images(21)), every=4)),
  ))
"""


@pytest.mark.slow
def test_a_run_in_a_store_that_broke_off_goes_on_and_leaves_what_one_in_a_folder_does(tmp_path):
  (tmp_path / "config.py").write_text(CONFIG)
  found = run(RUNS, tmp_path / "config.py", tmp_path / "here")
  assert found["codes"] == [0, 130, 0, 0, 0, 0, 0]
  assert found["stopped with"] == ["00000004", "00000008"]
  folder, store = found["files"]
  assert set(store) == {*folder, "eval-00000012.json"} and "metrics.csv" in store
  assert found["metrics"][0] == found["metrics"][1] and found["metrics"][0].count("\n") >= 12
  assert found["differ"] == 0


def test_a_store_that_is_not_known_is_said_so():
  with pytest.raises(UserError, match="mount the bucket"):
    stores.place("ftp://host/run")


def test_a_folder_is_a_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert os.fspath(stores.place("runs/a")) == str(tmp_path / "runs" / "a")
  with pytest.raises(FileNotFoundError):
    stores.listed(stores.place("not_there"))
