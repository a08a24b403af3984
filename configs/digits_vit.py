"""A small ViT on scikit-learn's handwritten digits (8 x 8 pixels, 1,797 of them), the default of `make train`.

Command   bigjax train --config=configs/digits_vit.py --workdir=runs/digits_vit
Hardware  2 CPU cores, about a minute
Expected  98.5% or more of the 359 test digits at the last step (fixed 80/20 split); see RESULTS.md
Source    our own; the data is E. Alpaydin and C. Kaynak's, UCI 1998, inside the scikit-learn package (BSD)
"""

import ml_collections

SCALE = "value_range(-1,1,in_max=16)"


def digits(split):
  """Rows of 64 pixels and a label; the split is cut out of a fixed permutation."""
  return dict(
    name="arrays",
    path="package:sklearn/datasets/data/digits.csv.gz",
    hint="pip install scikit-learn",
    header="none",
    label=-1,
    feature="image",
    shape=(8, 8, 1),
    num_classes=10,
    split=split,
    shuffle_seed=0,
  )


def get_config():
  config = ml_collections.ConfigDict()
  config.total_steps = "110 epochs"
  config.batch_size = 64
  config.data = dict(source=digits("[:80%]"), preprocess=f"random_affine(12,0.08,(0.9,1.1),8.0)|{SCALE}")
  config.model = dict(
    name="vit",
    num_classes=10,
    image_size=8,
    channels=1,
    patch_size=2,
    width=96,
    depth=3,
    heads=4,
    mlp_dim=192,
    head="gap",
    positions="sincos2d",
  )
  config.task = dict(name="classification", label_smoothing=0.1)
  config.optimizer = dict(name="adamw", b2=0.99, weight_decay=0.0)
  config.schedule = dict(name="cosine", peak=2e-3, warmup="10%")
  config.decay = [(".*kernel", 0.3)]
  config.clip = dict(norm=1.0)
  config.evals = dict(
    test=dict(
      evaluator=dict(name="classification", num_classes=10, confusion=True),
      data=dict(source=digits("[80%:]"), preprocess=SCALE),
      every="10 epochs",
      batch_size=120,
    )
  )
  config.keep = dict(best="test/accuracy")
  config.plan = dict(topology="v5e:2x2", hbm_gib=0.025, collective_gib=0.001, mfu_bound=0.12)
  config.claim = dict(metric="test/accuracy", at_least=0.985, source="RESULTS.md")
  return config
