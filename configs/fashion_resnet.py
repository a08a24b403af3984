"""Clothes in 28 x 28 pixels: Fashion-MNIST with a ResNet of 14 layers and 16 to 64 channels.

Command   bigjax train --config=configs/fashion_resnet.py --workdir=runs/fashion_resnet
Data      scripts/local_data.sh data   (or :data=DIR for another place)
Hardware  2 CPU cores, about 20 minutes
Expected  93% of the test images; see RESULTS.md
Source    the network is a CIFAR ResNet (n = 2) of https://arxiv.org/abs/1512.03385, section 4.2; the data is
          https://arxiv.org/abs/1708.07747 (MIT); the figure to reach is ours, not a published one
"""

import ml_collections

from bigjax.config import parse_arg

STANDARDIZE = "value_range(0,1)|standardize(0.2860,0.3530)"


def get_config(arg=None):
  arg = parse_arg(arg, data="data")

  def clothes(part):
    files = (f"{arg.data}/fashion/{part}-images-idx3-ubyte.gz", f"{arg.data}/fashion/{part}-labels-idx1-ubyte.gz")
    return dict(name="arrays", path=files, num_classes=10, shape=(28, 28, 1), hint="run scripts/local_data.sh data")

  config = ml_collections.ConfigDict()
  config.total_steps = "12 epochs"
  config.batch_size = 128
  config.data = dict(source=clothes("train"), preprocess=f"random_shift(2)|flip_lr|{STANDARDIZE}")
  config.model = dict(
    name="resnet", num_classes=10, channels=1, stages=(2, 2, 2), bottleneck=False, width=16, stem="small"
  )
  config.task = dict(name="classification", label_smoothing=0.05)
  config.optimizer = dict(name="sgd", momentum=0.9, nesterov=True)
  config.schedule = dict(name="cosine", peak=0.2, warmup="10%")
  config.decay = [(".*kernel", "l2(5e-4)")]
  config.evals = dict(
    test=dict(
      evaluator=dict(name="classification", num_classes=10, confusion=True),
      data=dict(source=clothes("t10k"), preprocess=STANDARDIZE),
      every="1 epoch",
      batch_size=500,
    )
  )
  config.checkpoint_every = "2 epochs"
  config.claim = dict(metric="test/accuracy", at_least=0.93, source="RESULTS.md")
  return config
