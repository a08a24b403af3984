"""A config of a few seconds, for processes."""

import pytest

CONFIG = """
import ml_collections
def get_config():
  images = lambda n: dict(name="synthetic", kind="images", num_examples=n, shape=(4, 4, 1), num_classes=3)
  return ml_collections.ConfigDict(dict(
      total_steps=12, batch_size=16, log_every=1, checkpoint_every=4, writers=("jsonl",), seed=3,
      data=dict(source=images(40), preprocess="random_shift(1)"),
      model=dict(name="mlp", in_features=16, widths=(16,), num_outputs=3, dropout=0.2),
      task=dict(name="classification"), optimizer=dict(name="adamw", weight_decay=0.0),
      schedule=dict(name="cosine", peak=1e-2, warmup="10%"), ema=0.9, keep=dict(last=2),
      evals=dict(val=dict(
        evaluator=dict(name="classification", num_classes=3), data=dict(source=images(21)), every=4, batch_size=8)),
  ))
"""  # fmt: skip


@pytest.fixture
def config(tmp_path):
  file = tmp_path / "tiny.py"
  file.write_text(CONFIG)
  return str(file)
