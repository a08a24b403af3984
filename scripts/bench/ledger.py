"""What it costs a step to be written down and looked at: the ledger and the guard.

Usage: python scripts/bench/ledger.py [--steps=5000] [--batch_size=1024] [--step_ms=30]

Calls what the loop calls in a step and nothing else, on numbers that are there already, and prints microseconds of CPU
a step, whatever else the machine does, and what part of a step of `--step_ms` they are. Digests are made by the thread
that feeds the devices, beside the loop; checking a whole run is timed by the example.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import jax.numpy as jnp
import numpy as np

from bigjax import config as configs
from bigjax import experiment, ledger
from bigjax.data import pipeline, synthetic
from bigjax.guard import Guard


class NoCheckpoints:
  """There is none to go back to."""

  def steps(self, coming=False):
    return []


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=5000)
  parser.add_argument("--batch_size", type=int, default=1024)
  parser.add_argument("--step_ms", type=float, default=30.0)
  args = parser.parse_args()
  source = synthetic.make(kind="images", num_examples=1_281_167)
  plan = pipeline.Plan(source, args.batch_size, 0, 1, seed=0)
  examples = plan.examples(np.arange(args.batch_size))
  measured = {k: jnp.zeros(()) for k in ("loss", "grad_norm", "update_norm")}
  spike = dict(guard=dict(spike=dict()))
  with tempfile.TemporaryDirectory() as workdir:
    with ledger.Ledger(workdir, plan, 0) as book:
      fetched = book.following(0)
      made = timed(lambda step: fetched(*examples), args.steps)
      noted = timed(book.note, args.steps)
    size = sum(file.stat().st_size for file in (pathlib.Path(workdir) / "ledger").iterdir())
    looks = {}
    for name, changes in {"guard": {}, "guard with a spike": spike}.items():
      look = Guard(_run(changes), workdir, NoCheckpoints(), {}).seen
      looks[name] = timed(lambda step, look=look: look(step, measured), args.steps)
  began = time.thread_time()
  steps = np.arange(1, 2**20 // args.batch_size + 1)
  ledger.expected(plan, steps)
  a_second = len(steps) * args.batch_size / (time.thread_time() - began)
  print(f"ledger file: {size / args.steps:.1f} bytes a step")
  print(f"digest of {args.batch_size} rows, beside the loop: {made:.1f} us")
  for name, us in {"ledger": noted, **looks}.items():
    print(f"{name:<18} {us:6.1f} us a step, {us / 10 / args.step_ms:.3f}% of {args.step_ms:g} ms")
  print(f"bigjax ledger checks {a_second / 1e6:.1f} million examples a second")


def timed(call, steps):
  """The median over ten parts of CPU microseconds a call."""
  parts, number = [], 0
  for _ in range(10):
    began = time.thread_time()
    for _ in range(steps // 10):
      number += 1
      call(number)
    parts.append((time.thread_time() - began) / (steps // 10) * 1e6)
  return statistics.median(parts)


def _run(changes):
  images = dict(name="synthetic", kind="images", num_examples=64, shape=(4, 4, 1), num_classes=3)
  return experiment.build(
    configs.resolve(
      dict(
        total_steps=10,
        batch_size=16,
        data=dict(source=images),
        model=dict(name="mlp", in_features=16, num_outputs=3),
        task=dict(name="classification"),
        optimizer=dict(name="sgd"),
        schedule=dict(name="constant", peak=0.1),
        **changes,
      ),
      experiment.TrainConfig,
    )
  )


if __name__ == "__main__":
  main()
