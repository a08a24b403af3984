"""Handwritten digits: MNIST with one convolution, pool and a dense layer; and with a deeper, augmented network.

Command   bigjax train --config=configs/mnist_cnn.py --workdir=runs/mnist_cnn
          bigjax train --config=configs/mnist_cnn.py:deep --workdir=runs/mnist_cnn_deep
Data      scripts/local_data.sh data   (or :small,data=DIR for another place)
Hardware  2 CPU cores, a few minutes; `deep` some 10
Expected  99.0% of the test digits within 10 epochs; `deep` 99.5%; see RESULTS.md
Source    small: Conv 32, pool, dense 128 as in many tutorials; deep: our own; data: Y. LeCun, C. Cortes, C. Burges
"""

import ml_collections

from bigjax.config import parse_arg

STANDARDIZE = "value_range(0,1)|standardize(0.1307,0.3081)"


def get_config(arg=None):
  arg = parse_arg(arg, variant="small", data="data")
  deep = arg.variant == "deep"

  def mnist(part):
    files = (f"{arg.data}/mnist/{part}-images-idx3-ubyte", f"{arg.data}/mnist/{part}-labels-idx1-ubyte")
    return dict(name="arrays", path=files, num_classes=10, shape=(28, 28, 1), hint="run scripts/local_data.sh data")

  config = ml_collections.ConfigDict()
  config.total_steps = "8 epochs" if deep else "10 epochs"
  config.batch_size = 128
  augmentation = "random_affine(12,0.1,(0.85,1.15),8.0)|" if deep else "random_shift(1)|"
  config.data = dict(source=mnist("train"), preprocess=augmentation + STANDARDIZE)
  config.model = dict(name="cnn", num_classes=10, in_shape=(28, 28, 1), channels=(32,), dense=(128,), dropout=0.3)
  if deep:
    config.model.update(channels=(24, 48, 96), convs_per_stage=2, batch_norm=True)
  config.task = dict(name="classification", label_smoothing=0.05 if deep else 0.0)
  config.optimizer = dict(name="adamw", weight_decay=0.0)
  config.schedule = dict(name="cosine", peak=3e-3 if deep else 1e-3, warmup="5%")
  config.decay = [(".*kernel", 0.02)]
  config.evals = dict(
    test=dict(
      evaluator=dict(name="classification", num_classes=10, confusion=True),
      data=dict(source=mnist("t10k"), preprocess=STANDARDIZE),
      every="1 epoch",
      batch_size=500,
    )
  )
  config.checkpoint_every = "2 epochs"
  config.claim = dict(metric="test/accuracy", at_least=0.995 if deep else 0.99, source="RESULTS.md")
  return config
