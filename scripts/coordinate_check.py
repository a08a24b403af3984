"""Coordinate check of muP: how far activations move from where they started, over widths, after 1 to 4 steps.

With muP (`config.model.mup_base`) the size of a change is the same at any width; without, logits and the residual
stream move the further the wider the model, and a learning rate found on a small one is too high for a large one.
Tensor Programs V, appendix D.1, https://arxiv.org/abs/2203.03466.

  python scripts/coordinate_check.py --widths=64,128,256

prints the root mean square of each change, and the slope of its logarithm over that of the width.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigjax import state, updates
from bigjax.models import decoder

CONTEXT, VOCABULARY, BATCH = 16, 64, 8
SEEN = ("stream", "logits")


def changes(
  width: int, base: int | None, *, steps: int = 4, peak: float = 0.02, seed: int = 0
) -> dict[str, list[float]]:
  """Returns the root mean square of the change of the residual stream and of the logits after each step of Adam."""
  sizes = dict(vocab_size=VOCABULARY, context=CONTEXT, width=width, depth=2, heads=4, mlp_dim=4 * width)
  model = state.Model(lambda rngs: decoder.make(**sizes, mup_base=base, rngs=rngs))
  params, extras = model.init(jax.random.key(seed))
  optimizer = updates.make(optax.adam, lambda step: jnp.asarray(peak), params, lr_multipliers=model.lr_multipliers).tx
  tokens = jax.random.randint(jax.random.key(1), (BATCH, CONTEXT + 1), 0, VOCABULARY)

  def seen(params):
    module = model.bind(params, extras)
    logits = module(tokens[:, :-1])
    module.norm = lambda x: x  # What comes before it is what moves.
    return {"stream": module.hidden(tokens[:, :-1])[0], "logits": logits}

  def loss(params):
    logits = model.bind(params, extras)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

  @jax.jit
  def step(params, opt_state, first):
    grads = jax.grad(loss)(params)
    moved, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, moved)
    now = seen(params)
    return params, opt_state, {n: jnp.sqrt(jnp.square(now[n] - first[n]).mean()) for n in SEEN}

  opt_state, first, found = optimizer.init(params), jax.jit(seen)(params), []
  for _ in range(steps):
    params, opt_state, sizes = step(params, opt_state, first)
    found.append(jax.device_get(sizes))
  return {n: [float(f[n]) for f in found] for n in SEEN}


def slopes(widths: list[int], base: int | None, **how) -> dict[str, list[float]]:
  """Returns the slope of log(change) over log(width) by what is seen, one a step, and prints the table."""
  found = [changes(width, base, **how) for width in widths]
  print(f"{'muP from ' + str(base) if base else 'standard'}: width, then the change after each step")
  fitted = {}
  for name in SEEN:
    table = np.asarray([f[name] for f in found])
    for width, row in zip(widths, table):
      print(f"  {name:<7} {width:>6}  " + "  ".join(f"{x:8.4f}" for x in row))
    fitted[name] = [float(np.polyfit(np.log(widths), np.log(column), 1)[0]) for column in table.T]
    print(f"  {name:<7}  slope  " + "  ".join(f"{x:8.2f}" for x in fitted[name]))
  return fitted


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--widths", default="64,128,256,512")
  parser.add_argument("--peak", type=float, default=0.02, help="learning rate of Adam at the first of the widths")
  given = parser.parse_args()
  sizes = [int(w) for w in given.widths.split(",")]
  for start in (None, sizes[0]):
    slopes(sizes, start, peak=given.peak)
