"""What the loop costs over the bare compiled step, taken in turn in one process.

Usage: python scripts/bench/loop.py [--steps=300] [--rounds=5]

The whole of `bigjax.train.train` (input, progress, metrics, writers) is run on steps of 20 ms and more and compared
with a bare `for` around the same compiled step on a batch that already lies on the device. Prints the median ratio.
Examples come from memory without preprocessing: where the CPU is the device too, work on them would count twice.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from bigjax import config as configs
from bigjax import experiment, train

WARM_UP = 20  # Steps left out at the start of a run: compilation, caches, the writers' threads.


def config(steps, width, examples):
  return configs.resolve(
    dict(
      total_steps=steps,
      batch_size=256,
      data=dict(source=dict(name="arrays", path=examples)),
      model=dict(name="mlp", in_features=784, widths=(width, width), num_outputs=10),
      task=dict(name="classification", inputs="x"),
      optimizer=dict(name="adamw", weight_decay=0.0),
      schedule=dict(name="constant", peak=1e-4),
      log_every=50,
      checkpoint_every=steps,
      writers=("jsonl", "csv"),
    ),
    experiment.TrainConfig,
  )


def loop_seconds(resolved, workdir):
  """Seconds a step of `train`, between the end of the warm-up and the last step."""
  times = []
  compile_step = train.compile_step

  def timed(run):
    step = compile_step(run)

    def call(state, batch, key):
      times.append(time.perf_counter())
      return step(state, batch, key)

    return call

  train.compile_step = timed
  try:
    with contextlib.redirect_stderr(io.StringIO()):
      train.train(resolved, workdir)
  finally:
    train.compile_step = compile_step
  return (times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP)


def bare_seconds(resolved, steps):
  run = experiment.build(resolved)
  with jax.set_mesh(run.mesh):
    state, step, key = run.init(jax.random.key(0)), train.make_step(run), jax.random.key(1)
    batch = {k: jnp.asarray(np.ones(v.shape, v.dtype)) for k, v in run.batch.items()}
    for i in range(steps):
      if i == WARM_UP:
        jax.block_until_ready(state)
        start = time.perf_counter()
      state, measured = step(state, batch, key)
    jax.block_until_ready((state, measured))
  return (time.perf_counter() - start) / (steps - WARM_UP)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--width", type=int, default=1024)
  args = parser.parse_args()
  rows = []
  for i in range(args.rounds):
    with tempfile.TemporaryDirectory() as workdir:
      examples = os.path.join(workdir, "examples.npz")
      rng = np.random.default_rng(0)
      np.savez(examples, x=rng.normal(size=(4096, 784)).astype(np.float32), label=rng.integers(10, size=4096))
      resolved = config(args.steps, args.width, examples)
      bare, loop = bare_seconds(resolved, args.steps), loop_seconds(resolved, os.path.join(workdir, "run"))
    rows.append((bare, loop))
    print(
      f"round {i + 1}: bare step {bare * 1e3:.2f} ms, loop {loop * 1e3:.2f} ms, ratio {loop / bare:.4f}", flush=True
    )
  print(f"median ratio of {args.rounds} rounds: {statistics.median(b / a for a, b in rows):.4f}")


if __name__ == "__main__":
  main()
