"""Peak memory and time of a training step with a vocabulary of 50,257, logits whole and in chunks, in one run.

Command   python scripts/bench/loss_chunks.py [--chunks=8] [--rounds=10]
"""

import argparse
import statistics
import time

import jax

from bigjax import state as states
from bigjax.models import gpt
from bigjax.tasks import language_modeling


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--chunks", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=10)
  parser.add_argument("--width", type=int, default=256)
  args = parser.parse_args()

  sizes = dict(vocab_size=50257, context=256, width=args.width, depth=2, heads=4)
  model = states.Model(lambda rngs: gpt.make(**sizes, rngs=rngs))
  params, extras = jax.jit(model.init)(jax.random.key(0))
  batch = {"tokens": jax.random.randint(jax.random.key(1), (8, 257), 0, 50257)}

  def compiled(chunks):
    task = language_modeling.make(loss_chunks=chunks)

    def update(params, batch):
      loss = lambda params: task.loss(model.bind(params, extras), batch, key=jax.random.key(2)).sums["loss"]
      return jax.tree.map(lambda p, g: p - 1e-6 * g, params, jax.grad(loss)(params))

    return jax.jit(update).lower(params, batch).compile()

  steps = {chunks: compiled(chunks) for chunks in (1, args.chunks)}
  seconds = {chunks: [] for chunks in steps}
  for round_ in range(args.rounds + 1):
    for chunks, step in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(step(params, batch))
      seconds[chunks] += [time.perf_counter() - start] if round_ else []
  for chunks, step in steps.items():
    memory = step.memory_analysis().temp_size_in_bytes / 2**20
    print(
      f"chunks {chunks:>3}: {memory:8.0f} MiB besides parameters, {statistics.median(seconds[chunks]) * 1e3:8.0f} ms"
    )
  one, many = (steps[c].memory_analysis().temp_size_in_bytes for c in steps)
  ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
  spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
  print(f"memory {one / many:.2f} times less, time {statistics.median(ratios):.3f} (rounds {spread})")


if __name__ == "__main__":
  main()
