"""What it costs a step to be looked after: stopwatch, stops, the check of arguments; and the watchdog beside it.

Usage: python scripts/bench/sentry.py [--steps=20000] [--step_ms=30]

Calls what the loop calls in a step and nothing else, with the watchdog's thread running, and prints microseconds a step
of the loop's thread, and what part of a step of `--step_ms` they are.
"""

import argparse
import contextlib
import queue
import statistics
import tempfile
import time
import types

import jax.numpy as jnp

from bigjax import metrics
from bigjax.sentry import Step
from bigjax.stops import Stops
from bigjax.watchdog import Watchdog, WatchdogConfig


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=20000)
  parser.add_argument("--step_ms", type=float, default=30.0)
  args = parser.parse_args()
  measured = {"loss": jnp.zeros(())}
  compiled = lambda state, batch, key: (state, measured)
  progress = metrics.Progress(10**9, quiet=True)
  stop, step_fn = Stops(), Step(compiled, {})
  rounds, items = [], queue.SimpleQueue()
  batches = types.SimpleNamespace(take=lambda seconds: items.get(timeout=seconds))
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    stack.enter_context(stop.heeded())
    stack.enter_context(Watchdog(WatchdogConfig(), progress, folder, print, ends=False))
    for _ in range(5):
      start = time.thread_time()
      for _ in range(args.steps):
        compiled(None, None, None)
      bare = time.thread_time() - start
      start = time.thread_time()
      for step in range(args.steps):
        items.put(None)
        with progress.pause("input"):
          stop.awaited(batches)
        step_fn(None, None, None)
        with progress.pause("device"):
          measured["loss"].block_until_ready()
        progress.update(step)
        stop.look()
      rounds.append(1e6 * (time.thread_time() - start - bare) / args.steps)
  cost = statistics.median(rounds)
  print(f"{cost:.1f} us a step, {cost / args.step_ms / 10:.4f}% of {args.step_ms:g} ms")


if __name__ == "__main__":
  main()
