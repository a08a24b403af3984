"""The bitwise table of `config.determinism = "topology"`, and what the mode costs.

Usage: python scripts/bench/topology.py [--cases=mlp,vit,gpt] [--steps=20] [--cost]

Trains every case on 1, 2, 4 and 8 devices and on 2 processes of 4, replicated, fsdp and hsdp, in 1, 2 and 4 parts, each
layout in processes of its own that have no more devices. Prints SHA-256 of all losses and other metrics and of the last
state, and fails unless they are the same wherever a case ran. The rows "run" are without the mode: they differ.

--cost compares steps with and without the mode, taken in turn in one process: time, and memory a device as compiled.
"""

import argparse
import hashlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time

IMAGES = dict(
  data=dict(source=dict(name="synthetic", kind="images", num_examples=64, shape=(8, 8, 3), num_classes=5)),
  task=dict(name="classification", class_weights=(1.0, 5.0, 0.25, 1.0, 3.0)),
)
# A token counts as much as its number: every example, and so every group, has another weight.
TOKENS = dict(
  data=dict(
    source=dict(name="synthetic", kind="tokens", num_examples=64, vocab_size=64, length=16),
    preprocess="copy('tokens', 'token_mask')|cast('token_mask', 'float32')",
  ),
  task=dict(name="language_modeling"),
)
MLP = dict(name="mlp", in_features=192, widths=(64, 32), num_outputs=5, dropout=0.2)
VIT = dict(
  name="vit", num_classes=5, image_size=8, patch_size=4, width=32, depth=2, heads=2, dropout=0.1, drop_path=0.1
)
GPT = dict(name="gpt", vocab_size=64, context=16, width=32, depth=2, heads=2, dropout=0.1)
CASES = {
  "mlp": dict(model=MLP, **IMAGES),
  "mlp lamb": dict(model=MLP, optimizer=dict(name="lamb"), decay=[], **IMAGES),
  "mlp adafactor": dict(model=MLP, optimizer=dict(name="adafactor", min_dim_size_to_factor=16), **IMAGES),
  "mlp muon": dict(model=MLP, optimizer=dict(name="muon"), **IMAGES),
  "mlp sam": dict(model=MLP, optimizer=dict(name="sam"), decay=[], **IMAGES),
  "vit": dict(model=VIT, **IMAGES),
  "vit muon": dict(model=VIT | dict(scan=True, remat="full"), optimizer=dict(name="muon"), **IMAGES),
  "gpt": dict(model=GPT, **TOKENS),
  "gpt mixed": dict(model=GPT | dict(scan=True), precision="mixed", **TOKENS),
}
COMMON = dict(
  total_steps=20,
  batch_size=32,
  optimizer=dict(name="adamw", weight_decay=0.0),
  schedule=dict(name="cosine", peak=1e-2, warmup=2),
  decay=[(".*kernel", 0.1)],
  clip=dict(norm=0.1),
)
LAYOUTS = {
  "replicated": dict(mesh=[("data", -1)]),
  "fsdp": dict(mesh=[("data", -1)], sharding=[(".*", "fsdp(data,64)")]),
  "hsdp": dict(mesh=[("replica", 2), ("data", -1)], sharding=[(".*", "fsdp(data,64)")]),
}
CELLS = (("replicated", 1), ("replicated", 4), ("fsdp", 1), ("fsdp", 2), ("hsdp", 4))  # A layout, and parts of a batch.
PLACES = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 4))  # Processes, and devices of each.


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cases", default=",".join(CASES))
  parser.add_argument("--places", default=",".join(f"{p}x{d}" for p, d in PLACES))
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--cost", action="store_true")
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    return work(**json.loads(args.worker))
  if args.cost:
    for devices in (1, 8):
      launch(1, devices, dict(cost=True))
    return 0

  rows = []
  print(f"{'case':14} {'mode':9} {'processes':9} {'devices':7} {'layout':11} {'parts':5} {'metrics':16} state")
  for case in args.cases.split(","):
    for place in args.places.split(","):
      processes, devices = map(int, place.split("x"))
      cells = [(case, "topology", *cell) for cell in CELLS]
      cells += [(case, "run", "replicated", 1)]
      cells = [cell for cell in cells if cell[2] != "hsdp" or processes * devices >= 4]
      rows += launch(processes, devices, dict(cells=cells, steps=args.steps))
  equal = {}
  for case, mode, metrics, state in rows:
    equal.setdefault((case, mode), set()).add((metrics, state))
  for (case, mode), found in equal.items():
    many = sum((case, mode) == tuple(row[:2]) for row in rows)
    print(f"{case}, {mode}: {len(found)} different of {many}")
  return int(any(len(found) > 1 for (_, mode), found in equal.items() if mode == "topology"))


def launch(processes, devices, work):
  """Runs `work` in as many processes, shows what the first prints, and returns its table."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  commands = [
    [
      sys.executable,
      __file__,
      "--worker",
      json.dumps(work | dict(me=i, processes=processes, devices=devices, port=port)),
    ]
    for i in range(processes)
  ]
  started = [subprocess.Popen(c, stdout=subprocess.PIPE if i == 0 else None, text=True) for i, c in enumerate(commands)]
  rows = []
  for line in started[0].stdout:
    if line.startswith("{"):
      rows.append(json.loads(line)["row"])
    else:
      print(line, end="", flush=True)
  if any(p.wait() for p in started):
    raise SystemExit(f"a worker of {processes} x {devices} failed")
  return rows


def work(me, processes, devices, port, cells=(), steps=0, cost=False):
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax

  jax.config.update("jax_num_cpu_devices", devices)
  if processes > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=processes, process_id=me)
  if cost:
    return compare(devices)
  for case, mode, layout, parts in cells:
    metrics, state = hashes(case, mode, layout, parts, steps)
    if me == 0:
      print(
        f"{case:14} {mode:9} {processes:9} {devices:7} {layout:11} {parts:5} {metrics[:16]} {state[:16]}", flush=True
      )
      print(json.dumps(dict(row=(case, mode, metrics, state))), flush=True)
  return 0


def hashes(case, mode, layout, parts, steps):
  """SHA-256 of the metrics of `steps` steps and of the state after them, all of its leaves."""
  import jax

  from bigjax import config as configs
  from bigjax import experiment, sharding, train

  described = COMMON | CASES[case] | LAYOUTS[layout] | dict(determinism=mode, accumulate=parts)
  run = experiment.build(configs.resolve(described, experiment.TrainConfig))
  with jax.set_mesh(run.mesh):
    state, step = run.init(jax.random.key(0)), train.compile_step(run)
    key = jax.device_put(jax.random.key(1), sharding.replicated(run.mesh))
    measured = []
    with train.train_batches(run, 0) as batches:
      for batch in itertools.islice(batches, steps):
        state, metrics = step(state, batch, key)
        measured.append(jax.device_get(metrics))
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(run.mesh))(state)
    return digest(measured), digest(jax.device_get(whole))


def digest(tree):
  import jax
  import numpy as np

  found = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    found.update(np.ascontiguousarray(leaf).tobytes())
  return found.hexdigest()


def compare(devices, rounds=9):
  """Prints what a step costs in each mode, as a ratio to the plain one."""
  import jax
  import jax.numpy as jnp

  from bigjax import config as configs
  from bigjax import experiment, sharding, train

  gpt = dict(name="gpt", vocab_size=2048, context=64, width=128, depth=4, heads=4, scan=True)
  data = dict(source=dict(name="synthetic", kind="tokens", num_examples=256, vocab_size=2048, length=64))
  steps = {}
  modes = {"run": dict(), "topology, 8 groups": dict(determinism="topology")}
  if devices == 1:
    modes |= {"run, 8 parts": dict(accumulate=8), "topology, 32 groups": dict(determinism="topology", groups=32)}
  for name, changes in modes.items():
    for layout in ("replicated", "fsdp") if devices > 1 else ("replicated",):
      described = COMMON | dict(model=gpt, data=data, task=dict(name="language_modeling")) | LAYOUTS[layout] | changes
      run = experiment.build(configs.resolve(described, experiment.TrainConfig))
      with jax.set_mesh(run.mesh):
        step = train.compile_step(run)
        state, key = run.init(jax.random.key(0)), jax.device_put(jax.random.key(1), sharding.replicated(run.mesh))
        batch = jax.device_put(
          {k: jnp.ones(v.shape, v.dtype) for k, v in run.batch.items()}, sharding.batch_sharding(run.mesh)
        )
      memory = step.compiled.memory_analysis()
      parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.abstract.params))
      held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
      steps[layout, name] = [step, state, batch, key, [], held / parameters]
  for _ in range(rounds):
    for case in steps.values():
      step, state, batch, key, seconds, _ = case
      start = time.perf_counter()
      for _ in range(2):
        state, metrics = step(state, batch, key)
      jax.block_until_ready((state, metrics))
      seconds.append((time.perf_counter() - start) / 2)
      case[1] = state
  print(f"{devices} devices, a GPT of 1 million parameters, median of {rounds} rounds in turn")
  for (layout, name), (*_, seconds, held) in steps.items():
    ratio = statistics.median(a / b for a, b in zip(seconds, steps[layout, "run"][4], strict=True))
    print(f"  {layout:10} {name:20} time {ratio:.2f}, memory a device {held:.1f} times the parameters", flush=True)


if __name__ == "__main__":
  sys.exit(main())
