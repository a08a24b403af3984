"""What holding a checkpoint's files against their digests costs, as a ratio to restoring it, for a 400 MB state.

Usage: python scripts/bench/verify.py [--rounds=5] [--megabytes=400]

Saves, verifies and restores in turn, and prints the medians, what verifying is to restoring, and how much of a save the
digests are. All is in the page cache: from a disk or a network that is slower than the digests, the ratio is smaller.
"""

import argparse
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from bigjax import commits, digests, sharding
from bigjax import state as states
from bigjax.checkpoint import Checkpoints


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--megabytes", type=float, default=400)
  args = parser.parse_args()
  rows = max(1, int(args.megabytes * 1e6 / (3 * 16 * 4 * 2048)))
  leaves = {f"layer{i}": {"kernel": jax.random.normal(jax.random.key(i), (rows, 2048))} for i in range(16)}
  moments = {"mu": leaves, "nu": jax.tree.map(jnp.square, leaves)}
  state = jax.block_until_ready(states.TrainState(jnp.zeros((), jnp.int32), leaves, {}, moments))
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  abstract = jax.eval_shape(lambda: state)
  shardings = sharding.shard_tree(abstract, "replicated", sharding.make_mesh([("data", 1)], jax.devices()[:1]))
  times = {"save": [], "digest": [], "verify": [], "restore": []}

  def timed(name, call):
    start = time.perf_counter()
    result = call()
    times[name].append(time.perf_counter() - start)
    return result

  with tempfile.TemporaryDirectory() as workdir, Checkpoints(workdir) as checkpoints:
    for step in range(args.rounds):
      timed("save", lambda step=step: checkpoints.save(step, state, {}, insist=True))
      root = commits.place(checkpoints._root, step)
      timed("digest", lambda root=root: digests.take(root / commits.STATE))
      timed("verify", lambda step=step: checkpoints.verify(step))
      # Once verified, it is not verified again.
      timed("restore", lambda step=step: jax.block_until_ready(checkpoints.restore(abstract, shardings, step)))
  found = {name: statistics.median(t) for name, t in times.items()}
  print(f"state {size / 1e6:.0f} MB, {args.rounds} rounds, {digests.ALGORITHM}, {digests.THREADS} threads")
  print("  ".join(f"{name} {t:.2f} s" for name, t in found.items()))
  print(f"verifying costs {found['verify'] / found['restore']:.2f} of restoring")
  print(f"digests are {found['digest'] / found['save']:.2f} of a save, in the background")


if __name__ == "__main__":
  main()
