"""Peak host memory of restoring a sharded 400 MB state, as a multiple of the state, on eight CPU devices under FSDP.

Usage: python scripts/bench/restore.py [--megabytes=400] [--layers=24]

A state is saved from one device or from eight, its layers each a leaf or stacked, and restored over eight in either
form, each time in a fresh process. The devices' memory is the host's here: 1.00 is the state itself, and what is above
it is what restoring took besides. On accelerators only that is the host's.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from bigjax import sharding
from bigjax import state as states
from bigjax.checkpoint import Checkpoints


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--megabytes", type=int, default=400)
  parser.add_argument("--layers", type=int, default=24)
  parser.add_argument("--part", nargs=4, metavar=("WHAT", "FORM", "DEVICES", "WORKDIR"), help=argparse.SUPPRESS)
  args = parser.parse_args()
  logging.disable(logging.WARNING)  # That a directory is opened to be read only.
  jax.config.update("jax_num_cpu_devices", 8)
  if args.part:
    part(args, *args.part)
    return
  for saved_as, devices in (("list", 1), ("list", 8), ("stack", 1), ("stack", 8)):
    with tempfile.TemporaryDirectory() as workdir:
      run(args, "save", saved_as, devices, workdir)
      for wanted in ("list", "stack"):
        print(f"{saved_as} on {devices} -> {wanted} on 8: {run(args, 'restore', wanted, 8, workdir)}")


def run(args, *words):
  """Does one part in a process of its own, and returns what it printed."""
  sizes = [f"--megabytes={args.megabytes}", f"--layers={args.layers}"]
  command = [sys.executable, __file__, *sizes, "--part", *map(str, words)]
  return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def part(args, what, form, devices, workdir):
  abstract = state_of(form, args.layers, args.megabytes)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
  mesh = sharding.make_mesh([("data", int(devices))], jax.devices()[: int(devices)])
  shardings = sharding.shard_tree(abstract, "fsdp", mesh)
  if what == "save":
    with Checkpoints(workdir) as checkpoints:
      checkpoints.save(1, jax.jit(lambda: fill(abstract), out_shardings=shardings)(), {})
    return
  with Checkpoints(workdir, read_only=True) as checkpoints, Peak() as peak:
    start = time.perf_counter()
    jax.block_until_ready(checkpoints.restore(abstract, shardings))
    seconds = time.perf_counter() - start
  print(f"{size / 1e6:.0f} MB, peak {peak.above / size:.2f} of it, {seconds:.1f} s")


def state_of(form, layers, megabytes):
  """Parameters and Adam's moments, shapes only."""
  width = int((megabytes * 1e6 / (3 * layers * 2 * 4 * 4)) ** 0.5) // 64 * 64
  shape = lambda *s: jax.ShapeDtypeStruct((layers, *s) if form == "stack" else s, jnp.float32)
  layer = {"up": {"kernel": shape(width, 4 * width)}, "down": {"kernel": shape(4 * width, width)}}
  params = {"blocks": layer if form == "stack" else {str(i): layer for i in range(layers)}}
  return states.TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, {}, {"mu": params, "nu": params})


def fill(abstract):
  """Noise, which does not compress."""
  return jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape).astype(x.dtype), abstract)


class Peak:
  """The most memory this process had above what it had before, in bytes."""

  def __enter__(self):
    self._before = self._most = resident()
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self):
    while not self._over.wait(0.002):
      self._most = max(self._most, resident())

  def __exit__(self, *_):
    self._over.set()
    self._thread.join()
    self.above = self._most - self._before


def resident():
  with open("/proc/self/statm") as f:
    return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
  main()
