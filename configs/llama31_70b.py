"""Llama 3.1 70B from scratch: the published architecture and peak rate, batches of 8 million tokens.

As configs/llama31_8b.py, with heads, hidden units and vocabulary split over 8 chips and a block recomputed whole.

Prepare   bigjax data tokenize --help makes a token store with Llama 3's tokenizer, 128,256 tokens
Command   bigjax train --config=configs/llama31_70b.py:tokens=STORE --workdir=runs/llama31_70b
Data      any token store; the published model saw 15 trillion tokens
Hardware  TPU v5p, 8x16x16 (2,048 chips): mesh data 256, tensor 8
Expected  claimed, not run: MMLU, 5 examples, of 79.3% after 15 trillion tokens
Source    https://arxiv.org/abs/2407.21783, table 3 (sizes, peak rate), section 3.4 (schedule); the model card at
          huggingface.co/meta-llama/Llama-3.1-70B (MMLU)
"""

import ml_collections

from bigjax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tokens="data/tokens", block=8192)
  config = ml_collections.ConfigDict()
  config.total_steps = "15e12 tokens"
  config.batch_size = 1024  # Times 8,192 tokens: 8.4 million.
  rows = dict(name="tokens", path=arg.tokens, block=arg.block)
  config.data = dict(source=dict(**rows, split="[:99%]", documents="packed"))
  config.model = dict(name="decoder", variant="llama3.1-70b", scan=True, remat="full")
  config.task = dict(name="language_modeling", loss_chunks=8)
  config.optimizer = dict(name="adamw", b2=0.95, weight_decay=0.0)
  config.schedule = dict(name="cosine", peak=1.5e-4, warmup=8000, final=1.5e-6)
  config.decay = [(".*(kernel|embedding)", 0.1)]
  config.clip = dict(norm=1.0)
  config.precision = "mixed"
  config.mesh = [("data", -1), ("tensor", 8)]
  config.sharding = "fsdp+tensor"
  config.evals = dict(
    val=dict(
      evaluator=dict(name="perplexity"),
      data=dict(source=dict(**rows, split="[99%:]", documents="packed")),
      every=5000,
    )
  )
  config.checkpoint_every = 1000
  return config
