"""Characters of Shakespeare: nanoGPT's recipe for a CPU, a GPT of 4 layers, 4 heads, width 128, context 64.

The recipe but for the peak rate, 4e-3 instead of 1e-3: with 1e-3 the loss ends at 1.914.

Command   bigjax train --config=configs/shakespeare_char.py:text=tinyshakespeare.txt --workdir=runs/shakespeare_char
Data      tinyshakespeare.txt, 1,115,394 characters, from github.com/karpathy/char-rnn; public domain
Hardware  2 CPU cores, about two minutes
Expected  validation loss of 1.88 nats a character or less after 2,000 steps of 12 x 64 characters; see RESULTS.md
Source    github.com/karpathy/nanoGPT, README, "I only have a macbook": 1.88
"""

import ml_collections

from bigjax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, text="data/tinyshakespeare.txt")
  config = ml_collections.ConfigDict()
  config.seed = 1337
  config.total_steps = 2000
  config.batch_size = 12
  windows = dict(name="text", path=arg.text, tokenizer="char", block=64)
  config.data = dict(source=dict(**windows, split="[:90%]", stride=1))
  config.model = dict(name="gpt", vocab_size=65, context=64, width=128, depth=4, heads=4, bias=False)
  config.task = dict(name="language_modeling")
  config.optimizer = dict(name="adamw", b2=0.99, weight_decay=0.0)
  config.schedule = dict(name="cosine", peak=4e-3, warmup=100, final=1e-4)
  config.decay = [(".*(kernel|embedding)", 0.1)]
  config.clip = dict(norm=1.0)
  config.evals = dict(
    val=dict(
      evaluator=dict(name="perplexity", bytes_per_token=1.0),
      data=dict(source=dict(**windows, split="[90%:]", stride=64)),
      every=250,
      batch_size=96,
    )
  )
  config.checkpoint_every = 500
  config.log_every = 20
  config.claim = dict(metric="val/loss", at_most=1.88, source="github.com/karpathy/nanoGPT README")
  return config
