"""GPT training in plain JAX and optax: what the framework's speed is measured against.

The same architecture as `bigjax/models/gpt.py`, written as one would write it for a CPU without any framework:
parameters in a dict, dense products on `[batch * seq, width]`, one jitted and donated step. Prints the time from the
start of the process to the end of the first step, and then the steady tokens a second.

  python scripts/bench/pure_jax_gpt.py --steps=20
"""

import argparse
import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax


def init(key, *, vocab, context, width, depth):
  """Parameters of GPT-2, initialised as its paper has it."""

  def dense(key, fan_in, fan_out, std=0.02):
    return {"kernel": std * jax.random.normal(key, (fan_in, fan_out)), "bias": jnp.zeros(fan_out)}

  def norm():
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

  def block(key):
    keys = jax.random.split(key, 4)
    residual = 0.02 / (2 * depth) ** 0.5
    return {
      "norm1": norm(),
      "qkv": dense(keys[0], width, 3 * width),
      "out": dense(keys[1], width, width, residual),
      "norm2": norm(),
      "up": dense(keys[2], width, 4 * width),
      "down": dense(keys[3], 4 * width, width, residual),
    }

  token_key, position_key, block_key = jax.random.split(key, 3)
  return {
    "token": 0.02 * jax.random.normal(token_key, (vocab, width)),
    "position": 0.02 * jax.random.normal(position_key, (context, width)),
    "blocks": [block(k) for k in jax.random.split(block_key, depth)],
    "norm": norm(),
  }


def layer_norm(p, x):
  mean = x.mean(-1, keepdims=True)
  variance = jnp.square(x - mean).mean(-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * p["scale"] + p["bias"]


def dense(p, x):
  return x @ p["kernel"] + p["bias"]


def attention(p, x, batch, seq, heads):
  qkv = dense(p["qkv"], x).reshape(batch, seq, 3, heads, -1).transpose(2, 0, 3, 1, 4)
  query, key, value = qkv
  scores = jnp.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key)
  scores = jnp.where(jnp.tril(jnp.ones((seq, seq), bool)), scores, -1e30)
  out = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), value)
  return dense(p["out"], out.transpose(0, 2, 1, 3).reshape(batch * seq, -1))


def loss_fn(params, tokens, heads):
  """Mean cross-entropy of the next token over `tokens` int32[batch, seq + 1]."""
  inputs, targets = tokens[:, :-1], tokens[:, 1:]
  batch, seq = inputs.shape
  x = (params["token"][inputs] + params["position"][:seq]).reshape(batch * seq, -1)
  for p in params["blocks"]:
    x = x + attention(p, layer_norm(p["norm1"], x), batch, seq, heads)
    x = x + dense(p["down"], jax.nn.gelu(dense(p["up"], layer_norm(p["norm2"], x))))
  logits = layer_norm(params["norm"], x) @ params["token"].T
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets.reshape(-1)).mean()


def make_step(tx, heads):
  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, tokens):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, tokens, heads)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  return step


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  for name, default in dict(steps=20, depth=6, width=384, heads=6, context=256, batch=16, vocab=65).items():
    parser.add_argument(f"--{name}", type=int, default=default)
  args = parser.parse_args()

  tx = optax.adamw(3e-4, b2=0.99, weight_decay=0.1)

  @jax.jit
  def create(key):
    params = init(key, vocab=args.vocab, context=args.context, width=args.width, depth=args.depth)
    return params, tx.init(params)

  state = create(jax.random.key(0))
  step = make_step(tx, args.heads)
  rng = np.random.default_rng(0)

  def batch():
    return rng.integers(0, args.vocab, (args.batch, args.context + 1), dtype=np.int32)

  state, loss = step(state, batch())
  loss.block_until_ready()
  print(f"step 1 after {seconds_since_process_start():.1f} s (loss {float(loss):.4f})", flush=True)
  seconds = []
  for _ in range(args.steps):
    start = time.perf_counter()
    state, loss = step(state, batch())
    loss.block_until_ready()
    seconds.append(time.perf_counter() - start)
  print(f"loss after {args.steps} more steps: {float(loss):.4f}")
  if seconds:
    print(f"steady: {args.batch * args.context / np.median(seconds):,.0f} tokens/s")


def seconds_since_process_start():
  """Includes the interpreter's start and the imports, which `time.perf_counter` at the top of a file would miss."""
  with open("/proc/self/stat") as f:
    ticks = int(f.read().rpartition(")")[2].split()[19])
  with open("/proc/uptime") as f:
    return float(f.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
  main()
