"""How long an asynchronous save of a 400 MB state holds the loop up.

Usage: python scripts/bench/save.py [--rounds=5]

Saves through `bigjax.checkpoint`, as the loop does, and prints the time until `save` returns beside the time until the
checkpoint is complete on disk.
"""

import argparse
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from bigjax import state as states
from bigjax.checkpoint import Checkpoints


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  leaves = {f"layer{i}": {"kernel": jax.random.normal(jax.random.key(i), (1024, 2048))} for i in range(16)}
  moments = {"mu": leaves, "nu": jax.tree.map(jnp.square, leaves)}
  state = jax.block_until_ready(states.TrainState(jnp.zeros((), jnp.int32), leaves, {}, moments))
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  blocked, complete = [], []
  with tempfile.TemporaryDirectory() as workdir, Checkpoints(workdir) as checkpoints:
    for step in range(args.rounds + 1):
      start = time.perf_counter()
      checkpoints.save(step, state, {})
      blocked.append(time.perf_counter() - start)
      checkpoints.wait()
      complete.append(time.perf_counter() - start)
  blocked, complete = blocked[1:], complete[1:]  # The first makes threads and directories.
  print(
    f"state {size / 1e6:.0f} MB, {args.rounds} saves: the loop waits {statistics.median(blocked):.3f} s "
    f"(most {max(blocked):.3f} s), complete after {statistics.median(complete):.2f} s"
  )


if __name__ == "__main__":
  main()
