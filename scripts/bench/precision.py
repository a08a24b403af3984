"""The loss after a hundred steps in every precision, beside float32 on the same batches, and what a parameter costs.

Usage: python scripts/bench/precision.py [--steps=100] [--tasks=digits_vit,shakespeare_char] [--only=NAME,...]
         [--text=tinyshakespeare.txt]

Trains the models of configs/digits_vit.py and configs/shakespeare_char.py (which wants --text) with their own recipes
at the config's peak rate, constant after 10 steps of warm-up. `loss` is the mean over the last 10 steps; `evaluation`
that of the config's evaluator; `apart` the mean distance between a step's loss and float32's, for which the measure is
"float32-last-bits-changed": all parameters times 1 + 2^-20 at the start. ms a step is of this CPU, which emulates what
an accelerator has in hardware: it says nothing of those.
"""

import argparse
import dataclasses
import pathlib
import time

import jax
import numpy as np

from bigjax import config as configs
from bigjax import experiment, train
from bigjax.evaluation import Evaluation

ROOT = pathlib.Path(__file__).parents[2]
WAYS = {
  "float32": {},
  "float32-last-bits-changed": {},
  "mixed": dict(precision="mixed"),
  "bfloat16": dict(precision="bfloat16"),
  "bfloat16+float32-moments": dict(precision=dict(mode="bfloat16", moments="float32")),
  "bfloat16_kahan": dict(precision="bfloat16_kahan"),
  "float16": dict(precision="float16"),
  "int8": dict(quantize="int8"),
  "int8_forward": dict(quantize="int8_forward"),
  "fp8": dict(quantize="fp8"),
  "fp8_forward": dict(quantize="fp8_forward"),
  "mixed+int8": dict(precision="mixed", quantize="int8"),
  "mixed+fp8": dict(precision="mixed", quantize="fp8"),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
  parser.add_argument("--steps", type=int, default=100)
  parser.add_argument("--only", default="")
  parser.add_argument("--tasks", default="digits_vit")
  parser.add_argument("--text", default="data/tinyshakespeare.txt")
  args = parser.parse_args()
  specs = {
    "digits_vit": f"{ROOT}/configs/digits_vit.py",
    "shakespeare_char": f"{ROOT}/configs/shakespeare_char.py:text={args.text}",
  }
  chosen = [w for w in WAYS if not args.only or w in ("float32", *args.only.split(","))]
  for task in args.tasks.split(","):
    print(f"\n{task}, {args.steps} steps\n")
    print("| precision | loss | apart from float32 | evaluation | bytes a parameter | ms a step |")
    print("| --- | --- | --- | --- | --- | --- |")
    baseline = None
    for way in chosen:
      losses, evaluation, size, milliseconds = measure(specs[task], args.steps, WAYS[way], "last-bits" in way)
      baseline = losses if baseline is None else baseline
      apart = np.abs(losses - baseline).mean()
      row = [way, f"{losses[-10:].mean():.4f}", f"{apart:.4f}", evaluation, f"{size:.1f}", f"{milliseconds:.0f}"]
      print("| " + " | ".join(row) + " |", flush=True)


def measure(spec, steps, changes, disturbed):
  """Returns the loss of every step, the evaluation, bytes a parameter with all that belongs to it, and ms a step."""
  config = configs.read(spec)
  config.total_steps, config.log_every = steps, steps
  config.schedule = dict(name="constant", peak=config.schedule["peak"], warmup=10)
  for key, value in changes.items():
    config[key] = value
  run = experiment.build(configs.resolve(config, experiment.TrainConfig))
  with jax.set_mesh(run.mesh), train.train_batches(run, 0) as batches:
    step_fn, state = train.compile_step(run), run.init(jax.random.key(0))
    if disturbed:
      state = dataclasses.replace(state, params=jax.tree.map(lambda p: p * (1 + 2**-20), state.params))
    key, losses = jax.random.fold_in(jax.random.key(0), 1), []
    key = jax.device_put(key, jax.sharding.NamedSharding(run.mesh, jax.sharding.PartitionSpec()))
    start = time.perf_counter()
    for _ in range(steps):
      state, measured = step_fn(state, next(batches), key)
      losses.append(measured["loss"])
    losses = np.asarray(jax.device_get(losses))
    milliseconds = (time.perf_counter() - start) / steps * 1e3
    (name, e), *_ = run.config.evals.items()
    results = Evaluation.of(run, name, e).run(state)
  evaluation = ", ".join(f"{k} {v:.4g}" for k, v in results.items() if k.endswith(("/loss", "/accuracy")))
  count = sum(p.size for p in jax.tree.leaves(state.params))
  size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state))) / count
  return losses, evaluation, size, milliseconds


if __name__ == "__main__":
  main()
