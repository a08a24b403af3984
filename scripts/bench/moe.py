"""A dropless mixture of experts against a loop over experts that computes each for every token, in one process.

Usage: python scripts/bench/moe.py [--tokens=2048] [--width=256] [--hidden=512] [--experts=8] [--top_k=2] [--rounds=7]

Forward and backward of the layer, routing included; the two are timed in turn and agree in loss and gradients, or it
stops. A dense gated MLP of the `top_k` experts' size stands beside them: what the same arithmetic costs without a
choice. Prints the median ratios.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bigjax.models import moe


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  sizes = dict(tokens=2048, width=256, hidden=512, experts=8, top_k=2, rounds=7)
  for name, size in sizes.items():
    parser.add_argument(f"--{name}", type=int, default=size)
  a = parser.parse_args()
  build = lambda **options: nnx.split(
    moe.MoE(a.width, a.hidden, experts=a.experts, top_k=a.top_k, rngs=nnx.Rngs(0), **options)
  )
  graphdef, params = build()
  capped, _ = build(capacity_factor=1.25)
  keys = jax.random.split(jax.random.key(0))
  x = jax.random.normal(keys[0], (8, a.tokens // 8, a.width))

  def loop(params, x):
    """The plain way: a loop over experts, each on all tokens, weighted by what was chosen."""
    module = nnx.merge(graphdef, params)
    index, weight, _ = module.route(x, jnp.ones(x.shape[:2], bool))
    flat, out = x.reshape(-1, a.width), 0.0
    kernels = [getattr(module.experts, name).kernel for name in ("gate", "up", "down")]
    for e in range(a.experts):
      gate, up, down = (kernel[e] for kernel in kernels)
      count = jnp.where(index == e, weight, 0).sum(-1).reshape(-1, 1)
      out += count * ((jax.nn.silu(flat @ gate) * (flat @ up)) @ down)
    return out.reshape(x.shape)

  def dense(params, x):
    wide = lambda kernel: jnp.concatenate(list(kernel[: a.top_k]), axis=1)
    experts, flat = nnx.merge(graphdef, params).experts, x.reshape(-1, a.width)
    down = experts.down.kernel[: a.top_k].reshape(-1, a.width)
    return ((jax.nn.silu(flat @ wide(experts.gate.kernel)) * (flat @ wide(experts.up.kernel))) @ down).reshape(x.shape)

  ways = {
    "loop over experts": loop,
    "dropless": lambda params, x: nnx.merge(graphdef, params)(x)[0],
    "capacity 1.25": lambda params, x: nnx.merge(capped, params)(x)[0],
    "dense MLP": dense,
  }
  run = {n: jax.jit(jax.value_and_grad(lambda p, x, f=f: jnp.sin(f(p, x)).sum(), (0, 1))) for n, f in ways.items()}
  first = {name: jax.block_until_ready(f(params, x)) for name, f in run.items()}
  close = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
  jax.tree.map(close, first["dropless"], first["loop over experts"])
  seconds = {name: [] for name in run}
  for _ in range(a.rounds):
    for name, f in run.items():
      start = time.perf_counter()
      jax.block_until_ready(f(params, x))
      seconds[name].append(time.perf_counter() - start)
  for name, measured in seconds.items():
    ratio = statistics.median(m / d for m, d in zip(measured, seconds["dropless"]))
    print(f"{name:18} {1e3 * statistics.median(measured):7.1f} ms   {ratio:.2f} x dropless")


if __name__ == "__main__":
  main()
