"""Two processes save, fail, verify and go on together: what one of them finds, both act on."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
  import json, pathlib, resource, sys, time
  import jax
  import jax.numpy as jnp
  import numpy as np

  port, me, workdir = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, me)

  from bigjax import checkpoint, sharding
  from bigjax import state as states
  from bigjax.checkpoint import Checkpoints
  from bigjax.commits import Keep

  abstract = states.TrainState(
    jax.ShapeDtypeStruct((), jnp.int32), {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}, {}, {}
  )
  shardings = sharding.shard_tree(abstract, "fsdp", sharding.make_mesh([("data", 4)]))

  def state_of(step):
    fill = lambda: states.TrainState(jnp.int32(step), {"w": jax.random.normal(jax.random.key(step), (64, 64))}, {}, {})
    return jax.jit(fill, out_shardings=shardings)()

  def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

  found, notes = {}, []
  with Checkpoints(workdir, Keep(last=3), note=notes.append) as checkpoints:
    checkpoints.save(10, state_of(10), {"at": 10})
    checkpoints.wait()
    if me == 1:
      limit(512)
    start = time.monotonic()
    checkpoints.save(20, state_of(20), {"at": 20})
    checkpoints.settle()
    found["seconds to know of a failure"] = time.monotonic() - start
    found["after a failure"] = checkpoints.steps()
    limit(resource.RLIM_INFINITY)
    checkpoints.save(30, state_of(30), {"at": 30})
    checkpoints.save(40, state_of(40), {"at": 40})
    checkpoints.wait()
    found["after it was mended"] = checkpoints.steps()

  jax.experimental.multihost_utils.sync_global_devices("saved")
  if me == 0:
    part = max((pathlib.Path(workdir) / "checkpoints/00000040/state/ocdbt.process_1").rglob("*"),
               key=lambda f: f.stat().st_size if f.is_file() else 0)
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
  jax.experimental.multihost_utils.sync_global_devices("damaged")

  with Checkpoints(workdir, Keep(last=3), note=notes.append) as checkpoints:
    try:
      checkpoints.restore(abstract, shardings, 40)
    except checkpoint.Damaged as e:
      found["asked for"] = str(e)
    found["latest"] = checkpoints.latest()
    jax.experimental.multihost_utils.sync_global_devices("aside")
    found["left"] = checkpoints.steps()
    state, loop = checkpoints.restore(abstract, shardings, found["latest"])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), state, state_of(30))
    found["the same"] = [loop, all(jax.tree.leaves(same))]
  print(json.dumps([found, notes]))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
  """What each of two processes found."""
  workdir = tmp_path_factory.mktemp("shared")
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
  command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(port)]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  processes = [subprocess.Popen([*command, str(i), str(workdir)], env=env, **pipes) for i in (0, 1)]
  try:
    written = [p.communicate(timeout=200) for p in processes]
  finally:
    for p in processes:
      p.kill()
  assert [p.returncode for p in processes] == [0, 0], written
  return workdir, *(json.loads(out.splitlines()[-1]) for out, _ in written)


def test_where_one_can_not_write_no_checkpoint_is_made_and_none_waits_for_it(ends):
  _, (found, notes), (other, _) = ends
  assert found["after a failure"] == other["after a failure"] == [10]
  assert max(f["seconds to know of a failure"] for f in (found, other)) < 60
  assert "step 20 could not be written: File too large (on process 1)" in notes[0]
  assert notes[1] == "Checkpoints are written again: there is that of step 30."
  assert found["after it was mended"] == other["after it was mended"] == [10, 30, 40]


def test_damage_to_the_part_of_one_is_known_to_all_and_all_go_on_from_the_one_before(ends):
  workdir, *both = ends
  for found, _ in both:
    assert "00000040 is damaged (state/ocdbt.process_1/" in found["asked for"]
    assert found["latest"] == 30 and found["left"] == [10, 30] and found["the same"] == [{"at": 30}, True]
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["00000010", "00000030", "00000040.damaged"]


def test_process_0_speaks_for_all(ends):
  _, (_, notes), (_, silent) = ends
  assert len(notes) == 3 and silent == []


def test_each_process_digested_its_own_files(ends):
  workdir, *_ = ends
  said = json.loads((workdir / "checkpoints" / "00000030" / "checkpoint.json").read_text())
  assert {f"state/ocdbt.process_{i}" for i in (0, 1)} <= {"/".join(n.split("/")[:2]) for n in said["files"]}
