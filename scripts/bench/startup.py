"""From process start to step 1, and steady speed, of a small GPT: `bigjax train` against a bare pure-JAX script.

Usage: python scripts/bench/startup.py [--rounds=3] [--steps=30]

Runs in turn, each in a fresh process: scripts/bench/pure_jax_gpt.py; `bigjax train` of the same model with an empty
compilation cache; and again with the cache that the first start filled. Prints medians and ratios.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
BATCH, BLOCK = 16, 256

CHILD = """
import sys, time, json
started, steps, workdir, config = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
from bigjax import main, train
import jax
times = []
compile_step = train.compile_step
def timed(run):
  step = compile_step(run)
  def call(state, batch, key):
    out = step(state, batch, key)
    if len(times) < 2 or len(times) == steps - 1:
      jax.block_until_ready(out)
    times.append(time.time())
    return out
  return call
train.compile_step = timed
code = main.main(["train", "--config=" + config, "--workdir=" + workdir, f"--config.total_steps={steps}"])
end = time.time()
print(json.dumps(dict(first=times[0] - started, steady=(len(times) - 2) / (times[-1] - times[1]), code=code)))
"""


def bigjax(steps, cache, config):
  with tempfile.TemporaryDirectory() as workdir:
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    command = [sys.executable, "-c", CHILD, str(time.time()), str(steps), workdir, config]
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
  found = json.loads(out.splitlines()[-1])
  return found["first"], found["steady"] * BATCH * BLOCK


def bare(steps):
  env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  out = subprocess.run(
    [sys.executable, HERE / "pure_jax_gpt.py", f"--steps={steps}"], env=env, check=True, capture_output=True, text=True
  ).stdout
  return float(re.search(r"step 1[^\d]*([\d.]+) s", out)[1]), float(
    re.search(r"([\d,]+) tokens/s", out)[1].replace(",", "")
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=30)
  parser.add_argument("--config", default=str(HERE / "gpt.py"))
  args = parser.parse_args()
  rows = []
  for i in range(args.rounds):
    with tempfile.TemporaryDirectory() as cache:
      row = dict(
        bare=bare(args.steps), cold=bigjax(args.steps, cache, args.config), warm=bigjax(args.steps, cache, args.config)
      )
    rows.append(row)
    shown = ", ".join(f"{k} {first:.1f} s to step 1 and {speed:,.0f} tokens/s" for k, (first, speed) in row.items())
    print(f"round {i + 1}: {shown}", flush=True)
  median = lambda f: statistics.median(map(f, rows))
  print(f"to step 1, bigjax / bare script: {median(lambda r: r['cold'][0] / r['bare'][0]):.2f}")
  print(f"to step 1, second start / first start: {median(lambda r: r['warm'][0] / r['cold'][0]):.2f}")
  print(f"tokens/s, bigjax / bare script: {median(lambda r: r['cold'][1] / r['bare'][1]):.3f}")


if __name__ == "__main__":
  main()
