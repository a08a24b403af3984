"""What a call of the compiled step costs the host, against a bare `jax.jit` of the same program.

Command   python scripts/bench/dispatch.py [--layers=2,12,48] [--devices=1,2,8] [--calls=100]
Hardware  fake devices on CPU

An MLP with Adam. All run the same computation on the same arrays. "jit" is `jax.jit` on the same tree of dicts, as any
loop by hand would have it; "lists" is `jax.jit` on plain lists of the leaves, the least that JAX can cost. Timed is
what the calling thread computes until the call returns, not the work: the batch that it is given is still being made,
so no device can start, where XLA would otherwise run a program as small as these within the call. Calls alternate, in
one run.
"""

import argparse
import gc
import statistics
import sys
import time

import jax
import numpy as np

from bigjax import config as configs
from bigjax import experiment, sharding, train
from bigjax import main as entrypoint


def built(layers, devices, scan):
  config = dict(
    total_steps=1,
    batch_size=8,
    data=dict(source=dict(name="synthetic", num_examples=16, shape=(8,), num_classes=8)),
    model=dict(name="mlp", in_features=8, widths=(8,) * layers, num_outputs=8, scan=scan),
    task=dict(name="classification"),
    optimizer=dict(name="adamw"),
    schedule=dict(name="constant", peak=1e-3),
    mesh=(("data", devices),),
    sharding="replicated",
  )
  return experiment.build(configs.resolve(config, experiment.TrainConfig), jax.devices()[:devices])


def calls(run):
  """Returns the number of leaves, and timed calls of the step, `jit` on the tree and on lists, each on what it gave."""
  replicated = sharding.replicated(run.mesh)
  with jax.set_mesh(run.mesh):
    key = jax.device_put(jax.random.key(1), replicated)
    batch = {k: np.zeros(v.shape, v.dtype) for k, v in run.batch.items()}
    batch = jax.device_put(batch, sharding.batch_sharding(run.mesh))
    state, step = run.init(jax.random.key(0)), train.compile_step(run)
    leaves, tree = jax.tree.flatten(state)
    own = lambda: [jax.device_put(np.asarray(x), x.sharding) for x in leaves]  # What a step is given is gone.
    whole = train.make_step(run)

    def flat(leaves, batch, key):
      state, measured = whole(jax.tree.unflatten(tree, leaves), batch, key)
      return jax.tree.leaves(state), list(measured.values())

    def late(batch, x):
      x = jax.lax.fori_loop(0, 20, lambda _, x: x @ x, x)  # Some milliseconds of zeros.
      return jax.tree.map(lambda b: b + x[0, 0].astype(b.dtype), batch)

    bare = jax.jit(flat, donate_argnums=0, out_shardings=([x.sharding for x in leaves], None))
    late = jax.jit(late, out_shardings=sharding.batch_sharding(run.mesh))
    zeros = jax.device_put(np.zeros((256, 256), np.float32), replicated)

    def repeated(fn, carry):
      def call():
        nonlocal carry
        coming = late(batch, zeros)
        start = time.thread_time()
        carry, measured = fn(carry, coming, key)
        seconds = time.thread_time() - start
        jax.block_until_ready((carry, measured))
        return seconds

      return call

    copies = own(), own()
    return len(leaves), (repeated(step, state), repeated(whole, tree.unflatten(copies[0])), repeated(bare, copies[1]))


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  numbers = lambda text: [int(n) for n in text.split(",")]
  parser.add_argument("--layers", type=numbers, default=[2, 12, 48])
  parser.add_argument("--devices", type=numbers, default=[1, 2, 8])
  parser.add_argument("--calls", type=int, default=100)
  args = parser.parse_args()
  entrypoint.quiet()
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", max(args.devices))
  print("| layers | devices | leaves | step, us | jit, us | lists, us | step / jit (quarters) | step / lists |")
  print("| --- | --- | --- | --- | --- | --- | --- | --- |")
  for layers in args.layers:
    for scan in (True, False):
      for devices in args.devices:
        leaves, timed = calls(built(layers, devices, scan))
        gc.disable()
        rounds = [[call() for call in timed] for _ in range(args.calls + 20)][20:]
        gc.enable()
        ratios = statistics.quantiles([step / jit for step, jit, _ in rounds], n=4)
        step, jit, lists = (statistics.median(times) * 1e6 for times in zip(*rounds, strict=True))
        print(
          f"| {layers}{', scanned' if scan else ''} | {devices} | {leaves} | {step:.0f} | {jit:.0f} | {lists:.0f} "
          f"| {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f}) | {step / lists:.2f} |",
          flush=True,
        )
  return 0


if __name__ == "__main__":
  sys.exit(main())
