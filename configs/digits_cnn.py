"""A small convolutional network on scikit-learn's handwritten digits.

Command   bigjax train --config=configs/digits_cnn.py --workdir=runs/digits_cnn
Hardware  2 CPU cores, under a minute
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
  config.total_steps = "60 epochs"
  config.batch_size = 64
  config.data = dict(source=digits("[:80%]"), preprocess=f"random_affine(10,0.06,(0.9,1.1),8.0)|{SCALE}")
  config.model = dict(
    name="cnn",
    num_classes=10,
    in_shape=(8, 8, 1),
    channels=(32, 64),
    convs_per_stage=2,
    dense=(128,),
    batch_norm=True,
    dropout=0.3,
  )
  config.task = dict(name="classification", label_smoothing=0.1)
  config.optimizer = dict(name="adamw", weight_decay=0.0)
  config.schedule = dict(name="cosine", peak=3e-3, warmup="10%")
  config.decay = [(".*kernel", 0.05)]
  config.evals = dict(
    test=dict(
      evaluator=dict(name="classification", num_classes=10, confusion=True),
      data=dict(source=digits("[80%:]"), preprocess=SCALE),
      every="5 epochs",
      batch_size=120,
    )
  )
  config.claim = dict(metric="test/accuracy", at_least=0.985, source="RESULTS.md")
  return config
