"""A small ViT on scikit-learn's handwritten digits (8 x 8 pixels, 1,797 of them), the default of `make train`.

Command   bigjax train --config=configs/digits_vit.py --workdir=runs/digits_vit
Hardware  2 CPU cores, about a minute
Expected  98.5% or more on the 360 test digits (fixed 80/20 split); see RESULTS.md
Source    our own; the data is E. Alpaydin, C. Kaynak, UCI ML repository, 1998, in scikit-learn's package
"""

import ml_collections


def get_config():
  digits = dict(
    name="arrays",
    path="package:sklearn/datasets/data/digits.csv.gz",
  )
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = "60 epochs"
  config.batch_size = 64
  config.data = dict(source=digits, preprocess="random_shift(1)|value_range(-1,1,in_max=16)")
  config.model = dict(
      name="vit", num_classes=10, image_size=8, channels=1, patch_size=2, width=64, depth=4, heads=4, head="gap", mlp_dim=128, dropout=0.1,
  )  # fmt: skip
  config.task = dict(name="classification", label_smoothing=0.1)
  config.optimizer = dict(name="adamw", b2=0.99, weight_decay=0.0)
  config.schedule = dict(name="cosine", peak=2e-3, warmup="10%")
  config.decay = [(".*kernel", 0.05)]
  config.clip = dict(norm=1.0)
  config.evals = dict(
    test=dict(
      evaluator=dict(name="classification", num_classes=10, confusion=True),
      data=dict(source=digits, preprocess="value_range(-1,1,in_max=16)"),
      every="5 epochs",
      batch_size=120,
    )
  )
  config.keep = dict(last=1, best="test/accuracy")
  config.claim = dict(metric="test/accuracy", at_least=0.985, source="RESULTS.md")
  return config
