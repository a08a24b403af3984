"""GPT-2 124M on OpenWebText: nanoGPT's reproduction, batches of half a million tokens for 600,000 steps.

Prepare   bigjax data tokenize --help makes a token store of OpenWebText's documents with GPT-2's vocabulary
Command   bigjax train --config=configs/gpt2_124m.py:tokens=STORE --workdir=runs/gpt2_124m
Data      OpenWebText, 8,013,769 documents, 9 billion tokens; the last 1% of documents are held out
Hardware  TPU v5e, 4x4 (16 chips), or any other: the mesh takes what there is
Expected  claimed, not run: validation loss of 2.85 nats a token
Source    github.com/karpathy/nanoGPT, README, "reproducing GPT-2", and config/train_gpt2.py
"""

import ml_collections

from bigjax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, tokens="data/openwebtext")
  config = ml_collections.ConfigDict()
  config.seed = 1337
  config.total_steps = 600_000
  config.batch_size = 480  # Times 1,024 tokens.
  rows = dict(name="tokens", path=arg.tokens, block=1024)
  config.data = dict(source=dict(**rows, split="[:99%]"))
  config.model = dict(name="gpt", variant="gpt2", vocab_size=50304, bias=False, scan=True)
  config.task = dict(name="language_modeling")
  config.optimizer = dict(name="adamw", b2=0.95, weight_decay=0.0)
  config.schedule = dict(name="cosine", peak=6e-4, warmup=2000, final=6e-5)
  config.decay = [(".*(kernel|embedding)", 0.1)]
  config.clip = dict(norm=1.0)
  config.precision = "mixed"
  config.mesh = [("data", -1)]
  config.evals = dict(
    val=dict(
      evaluator=dict(name="perplexity"), data=dict(source=dict(**rows, split="[99%:]")), every=1000, batch_size=480
    )
  )
  config.checkpoint_every = 5000
  config.claim = dict(metric="val/loss", at_most=2.85, source="github.com/karpathy/nanoGPT README")
  return config
