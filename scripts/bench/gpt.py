"""The GPT of scripts/bench/pure_jax_gpt.py as a config: 6 layers, width 384, context 256, batch 16, AdamW, clipping.

Command   python scripts/bench/startup.py
Hardware  2 CPU cores
Expected  a ratio to the bare script, see RESULTS.md
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.total_steps = 30
  config.batch_size = 16
  config.data = dict(source=dict(name="synthetic", kind="tokens", num_examples=10_000, length=256, vocab_size=65))
  config.model = dict(name="gpt", vocab_size=65, context=256, width=384, depth=6, heads=6)
  config.task = dict(name="language_modeling")
  config.optimizer = dict(name="adamw", b2=0.95, weight_decay=0.0)
  config.schedule = dict(name="constant", peak=1e-3)
  config.decay = [(".*kernel", 0.1)]
  config.clip = dict(norm=1.0)
  config.log_every = 10
  config.checkpoint_every = "100%"
  config.writers = ("jsonl", "csv")
  return config
