"""Malignant or benign: an MLP on scikit-learn's breast cancer data (569 tumours, 30 measurements), one fold of five.

Command   python scripts/cross_validate.py --config=configs/binary_mlp.py --workdir=runs/binary_mlp --folds=5
Hardware  2 CPU cores, seconds a fold
Expected  97% mean accuracy over the 5 folds, at the last step; see RESULTS.md
Source    our own; the data is W. Wolberg, N. Street and O. Mangasarian's, UCI 1995, inside scikit-learn (BSD)
"""

import ml_collections

from bigjax.config import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, fold=0, folds=5)
  training = f"not_fold({arg.fold},{arg.folds})"

  def tumours(split):
    return dict(
      name="arrays",
      path="package:sklearn/datasets/data/breast_cancer.csv",
      hint="pip install scikit-learn",
      header="counts",
      label=-1,
      num_classes=2,
      split=split,
      shuffle_seed=0,
      standardize=training,
    )

  def measured(split):
    evaluator = dict(name="classification", num_classes=2, average="binary", positive=0, confusion=True)
    return dict(evaluator=evaluator, data=dict(source=tumours(split)), every="5 epochs", batch_size=64)

  config = ml_collections.ConfigDict()
  config.total_steps = "60 epochs"
  config.batch_size = 32
  config.data = dict(source=tumours(training))
  config.model = dict(name="mlp", in_features=30, widths=(64, 32), num_outputs=2, dropout=0.3)
  config.task = dict(name="classification", inputs="x")
  config.optimizer = dict(name="adamw", weight_decay=0.0)
  config.schedule = dict(name="cosine", peak=2e-3, warmup="5%")
  config.decay = [(".*kernel", 0.1)]
  config.evals = dict(train=measured(training), val=measured(f"fold({arg.fold},{arg.folds})"))
  config.log_every = "1 epoch"
  config.claim = dict(metric="val/accuracy", at_least=0.95, source="one fold of five; the claim is 97% on average")
  return config
