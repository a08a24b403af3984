"""Tokens a second of training a small GPT: bigjax, plain JAX, and PyTorch with and without its compiler.

Command   python scripts/bench/training.py [--ways=bigjax,mixed,jax,torch,torch.compile] [--rounds=5] [--steps=8]
Hardware  any

The model is that of scripts/bench/gpt.py, and so are the batch, AdamW with decayed kernels, and clipping. Each way is a
process of its own that waits while the others work; they take turns, round after round, and what counts is the ratio of
medians. bigjax is its loop without the logging (scripts/bench/loop.py has that), its batches come from its pipeline;
plain JAX is scripts/bench/pure_jax_gpt.py; `mixed` is bigjax in bfloat16. PyTorch's need torch, which is not ours to
declare, and its compiler a C++ compiler.
"""

import argparse
import functools
import importlib
import importlib.util
import multiprocessing
import pathlib
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).parent
VOCAB, CONTEXT, WIDTH, DEPTH, HEADS, BATCH = 65, 256, 384, 6, 6, 16
RATE, B2, DECAY, NORM = 1e-3, 0.95, 0.1, 1.0


def bigjax(precision="float32"):
  """The step of `bigjax train` with the batches of its pipeline."""
  import jax

  from bigjax import config as configs
  from bigjax import experiment, sharding, train

  config = configs.read(str(HERE / "gpt.py"), ["--config.total_steps=100000"])
  config.precision = precision
  run = experiment.build(configs.resolve(config, experiment.TrainConfig))
  with jax.set_mesh(run.mesh):
    batches = train.train_batches(run, 0)
    state, step = run.init(jax.random.key(0)), train.compile_step(run)
    key = jax.device_put(jax.random.key(1), sharding.replicated(run.mesh))

  def steps(count):
    nonlocal state
    for _ in range(count):
      state, measured = step(state, next(batches), key)
    return float(measured["loss"])

  return steps


def plain_jax():
  """The hand-written step."""
  import jax
  import optax

  sys.path.insert(0, str(HERE))
  import pure_jax_gpt

  decayed = lambda params: jax.tree.map_with_path(lambda path, _: getattr(path[-1], "key", "") == "kernel", params)
  tx = optax.chain(optax.clip_by_global_norm(NORM), optax.adamw(RATE, b2=B2, weight_decay=DECAY, mask=decayed))
  params = pure_jax_gpt.init(jax.random.key(0), vocab=VOCAB, context=CONTEXT, width=WIDTH, depth=DEPTH)
  state, step, draw = (params, tx.init(params)), pure_jax_gpt.make_step(tx, HEADS), drawer()

  def steps(count):
    nonlocal state
    for _ in range(count):
      state, loss = step(state, draw())
    return float(loss)

  return steps


def pytorch(compiled):
  """The same in PyTorch, as its users write it: fused AdamW, its own attention, and clipping."""
  torch = importlib.import_module("torch")
  nn, functional = torch.nn, torch.nn.functional

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
      self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
      self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
      batch, seq, _ = x.shape
      heads = lambda y: y.view(batch, seq, HEADS, -1).transpose(1, 2)
      query, key, value = map(heads, self.qkv(self.norm1(x)).split(WIDTH, 2))
      mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
      x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, WIDTH))
      return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

  class GPT(nn.Module):
    def __init__(self):
      super().__init__()
      self.token, self.position = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
      self.blocks, self.norm = nn.Sequential(*[Block() for _ in range(DEPTH)]), nn.LayerNorm(WIDTH)
      for p in (self.token.weight, self.position.weight):
        nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):
      x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
      logits = self.norm(self.blocks(x)) @ self.token.weight.T
      return functional.cross_entropy(logits.view(-1, VOCAB), targets.reshape(-1))

  torch.manual_seed(0)
  model, draw = GPT(), drawer()
  kernels = [p for p in model.blocks.parameters() if p.ndim == 2]
  others = [p for p in model.parameters() if not any(p is k for k in kernels)]
  groups = [dict(params=kernels, weight_decay=DECAY), dict(params=others, weight_decay=0.0)]
  optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, B2), fused=True)
  loss_of = torch.compile(model) if compiled else model

  def steps(count):
    for _ in range(count):
      tokens = torch.from_numpy(draw()).long()
      loss = loss_of(tokens[:, :-1], tokens[:, 1:])
      optimizer.zero_grad(set_to_none=True)
      loss.backward()
      nn.utils.clip_grad_norm_(model.parameters(), NORM)
      optimizer.step()
    return float(loss)

  return steps


def drawer():
  """Returns what makes the next batch of random tokens, int32[batch, context + 1]."""
  rng = np.random.default_rng(0)
  return lambda: rng.integers(0, VOCAB, (BATCH, CONTEXT + 1), dtype=np.int32)


WAYS = {
  "bigjax": bigjax,
  "mixed": functools.partial(bigjax, "mixed"),
  "jax": plain_jax,
  "torch": functools.partial(pytorch, compiled=False),
  "torch.compile": functools.partial(pytorch, compiled=True),
}


def serve(way, connection):
  """Trains as many steps as it is told to, and says how long they took."""
  steps = WAYS[way]()
  connection.send(steps(3))  # Compiles.
  while count := connection.recv():
    start = time.perf_counter()
    steps(count)
    connection.send(time.perf_counter() - start)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument("--ways", default=",".join(WAYS))
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=8)
  args = parser.parse_args()
  ways = args.ways.split(",")
  if importlib.util.find_spec("torch") is None:
    print("torch is not installed: no comparison with it")
    ways = [w for w in ways if not w.startswith("torch")]

  context, workers = multiprocessing.get_context("spawn"), {}
  for way in ways:
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(way, theirs), daemon=True)
    process.start()
    theirs.close()  # So that we hear when it dies.
    print(f"{way}: loss {ours.recv():.4f} at its third step", flush=True)
    workers[way] = (process, ours)

  speeds = {way: [] for way in ways}
  for i in range(args.rounds):
    for way, (_, connection) in workers.items():
      connection.send(args.steps)
      seconds = connection.recv()
      speeds[way].append(args.steps * BATCH * CONTEXT / seconds)
    print(f"round {i + 1}: " + ", ".join(f"{way} {s[-1]:,.0f}" for way, s in speeds.items()), flush=True)
  for process, connection in workers.values():
    connection.send(0)
    process.join()
  for way in ways:
    ratio = np.median(np.array(speeds[ways[0]]) / np.array(speeds[way]))
    print(f"{way:<14} {np.median(speeds[way]):8,.0f} tokens/s; {ways[0]} is {ratio:.2f} times as fast")


if __name__ == "__main__":
  main()
