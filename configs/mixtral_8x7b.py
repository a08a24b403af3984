"""Mixtral 8x7B from scratch: the published architecture, with a schedule of our own, for theirs is not published.

Experts are balanced by a loss of 0.02, the coefficient in the published config.json (router_aux_loss_coef), and the
router's logits are held down by a z-loss (https://arxiv.org/abs/2202.08906).

Prepare   bigjax data tokenize --help makes a token store with Mistral's tokenizer, 32,000 tokens
Command   bigjax train --config=configs/mixtral_8x7b.py:tokens=STORE --workdir=runs/mixtral_8x7b
Data      any token store; how many tokens the published model saw is not known
Hardware  TPU v5p, 8x8x8 (512 chips): mesh data 64, expert 8
Expected  claimed, not run: MMLU, 5 examples, of 70.6%
Source    https://arxiv.org/abs/2401.04088, table 1 (sizes) and table 2 (MMLU)
"""

import ml_collections

from bigjax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tokens="data/tokens", block=8192)
  config = ml_collections.ConfigDict()
  config.total_steps = "5e12 tokens"
  config.batch_size = 512  # Times 8,192 tokens: 4.2 million.
  rows = dict(name="tokens", path=arg.tokens, block=arg.block)
  config.data = dict(source=dict(**rows, split="[:99%]", documents="packed"))
  config.model = dict(
    name="decoder", variant="mixtral-8x7b", scan=True, remat="full", balance_loss=0.02, router_z_loss=1e-3
  )
  config.task = dict(name="language_modeling", loss_chunks=8)
  config.optimizer = dict(name="adamw", b2=0.95, weight_decay=0.0)
  config.schedule = dict(name="wsd", peak=2e-4, warmup=2000, decay="10%", final=2e-6)
  config.decay = [(".*(kernel|embedding)", 0.1)]
  config.clip = dict(norm=1.0)
  config.precision = "mixed"
  config.mesh = [("data", -1), ("expert", 8)]
  config.sharding = "fsdp+expert"
  config.evals = dict(
    val=dict(
      evaluator=dict(name="perplexity"),
      data=dict(source=dict(**rows, split="[99%:]", documents="packed")),
      every=5000,
    )
  )
  config.checkpoint_every = 1000
  return config
