"""Memory a device takes for a GPT's training step under FSDP on 1, 2, 4 and 8 devices, against what it should take.

Command   python scripts/bench/fsdp_memory.py [--width=256] [--depth=4] [--batch=2] [--context=128] [--remat=full]
          [--no-scan]
Hardware  8 fake devices on CPU; bytes are the compiler's

Each device has as many examples whatever their number. Measured: what the compiled step takes as arguments, gives and
does not take over from them, and needs besides (`memory_analysis`); and the bytes of the state that lie on a device
after initialisation. Computed, of N devices: parameters, moments and gradients / N (leaves too small to be split are
whole), and the activations: what one device needs besides these with as many examples. Weights that are gathered for a
layer come on top; they are the difference. Without scan it is the weights of all layers, and all of their gradients
before they are summed: XLA for CPUs gathers as early as it can, and joins the sums of all gradients into one.
"""

import argparse
import math
import sys

import jax

from bigjax import config as configs
from bigjax import experiment, sharding, train
from bigjax import main as entrypoint

DEVICES = (1, 2, 4, 8)


def built(args, devices):
  config = dict(
    total_steps=1,
    batch_size=args.batch * devices,
    data=dict(source=dict(name="synthetic", kind="tokens", num_examples=64, length=args.context, vocab_size=512)),
    model=dict(
      name="gpt",
      vocab_size=512,
      context=args.context,
      width=args.width,
      depth=args.depth,
      heads=4,
      scan=args.scan,
      remat=args.remat,
    ),
    task=dict(name="language_modeling"),
    optimizer=dict(name="adamw"),
    schedule=dict(name="constant", peak=1e-3),
    mesh=(("data", devices),),
    sharding="fsdp",
  )
  return experiment.build(configs.resolve(config, experiment.TrainConfig), jax.devices()[:devices])


def share(run, tree, shardings):
  """Bytes of a tree that one device holds, by its layout."""
  leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
  return sum(sharding.bytes_a_device(x, s) for x, s in leaves)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--width", type=int, default=256)
  parser.add_argument("--depth", type=int, default=4)
  parser.add_argument("--batch", type=int, default=2, help="examples a device")
  parser.add_argument("--context", type=int, default=128)
  parser.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument("--remat", default="full")
  args = parser.parse_args()
  entrypoint.quiet()
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", max(DEVICES))
  mib, off = 2**20, []
  print("MiB a device\n| devices | state held | state / N | step measured | step computed | measured / computed |")
  print("| --- | --- | --- | --- | --- | --- |")
  for n in DEVICES:
    run = built(args, n)
    state = share(run, run.abstract, run.shardings)
    gradients = share(run, run.abstract.params, run.shardings.params)
    found = train.compile_step(run).compiled.memory_analysis()
    measured = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    measured += found.temp_size_in_bytes
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(run.abstract))
    if n == 1:
      activations = measured - state - gradients
    computed = state + gradients + activations
    arrays = jax.tree.leaves(run.init(jax.random.key(0)))
    first = jax.devices()[0]
    held = sum(s.data.nbytes for x in arrays for s in x.addressable_shards if s.device == first)
    off.append(max(abs(measured / computed - 1), abs(held / state - 1)))
    cells = (held, whole / n, measured, computed)
    print(f"| {n} | {' | '.join(f'{c / mib:.2f}' for c in cells)} | {measured / computed:.3f} |", flush=True)
  print(f"activations {activations / mib:.2f} MiB a device; the largest difference is {max(off):.1%}")
  return 1 if max(off) > 0.1 else 0


if __name__ == "__main__":
  sys.exit(main())
