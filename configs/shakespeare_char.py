"""Characters of Shakespeare: nanoGPT's recipe for a CPU, and what the same minutes can give.

`recipe=nanogpt` is a GPT of 4 layers, 4 heads, width 128, context 64, and AdamW; as published but for the peak rate,
4e-3 instead of 1e-3, with which the loss ends at 1.914. `recipe=muon` sees as many characters in the same time: four
times the context, rotary positions, gated MLPs, two heads, products in bfloat16, matrices trained by Muon.

Command   bigjax train --config=configs/shakespeare_char.py:text=tinyshakespeare.txt --workdir=runs/shakespeare_char
          bigjax train --config=configs/shakespeare_char.py:text=tinyshakespeare.txt,recipe=muon --workdir=runs/muon
Data      tinyshakespeare.txt, 1,115,394 characters, from github.com/karpathy/char-rnn; public domain
Hardware  2 CPU cores, about two minutes
Expected  validation loss of 1.88 nats a character or less after 2,000 steps of 12 x 64 characters; 1.65 or less with
          recipe=muon; see RESULTS.md
Source    github.com/karpathy/nanoGPT, README, "I only have a macbook": 1.88
"""

import ml_collections

from bigjax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, text="data/tinyshakespeare.txt", recipe="nanogpt")
  muon = {"nanogpt": False, "muon": True}[arg.recipe]
  config = ml_collections.ConfigDict()
  config.seed = 1337
  config.total_steps = 750 if muon else 2000
  config.batch_size = 8 if muon else 12
  context = 256 if muon else 64
  windows = dict(name="text", path=arg.text, tokenizer="char", block=context)
  config.data = dict(source=dict(**windows, split="[:90%]", stride=1))
  sizes = dict(vocab_size=65, context=context, width=128, depth=4)
  if muon:
    config.model = dict(name="decoder", **sizes, heads=2, mlp_dim=336, tied=True)
    config.precision = "mixed"
    config.optimizer = dict(name="muon")
    config.schedule = dict(name="linear", peak=1e-2, warmup=30)
    config.decay = [(".*kernel", 0.1)]
  else:
    config.model = dict(name="gpt", **sizes, heads=4, bias=False)
    config.optimizer = dict(name="adamw", b2=0.99, weight_decay=0.0)
    config.schedule = dict(name="cosine", peak=4e-3, warmup=100, final=1e-4)
    config.decay = [(".*(kernel|embedding)", 0.1)]
  config.task = dict(name="language_modeling")
  config.clip = dict(norm=1.0)
  config.evals = dict(
    val=dict(
      evaluator=dict(name="perplexity", bytes_per_token=1.0),
      data=dict(source=dict(**windows, split="[90%:]", stride=context)),
      every=250,
      batch_size=96 * 64 // context,
    )
  )
  config.checkpoint_every = 500
  config.log_every = 20
  source = "1.88 in github.com/karpathy/nanoGPT, README"
  config.claim = dict(metric="val/loss", at_most=1.65 if muon else 1.88, source=source)
  return config
