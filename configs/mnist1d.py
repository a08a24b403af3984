"""MNIST-1D, 4,000 signals of 40 numbers in 10 classes: the four models of the paper's table.

Command   for m in linear mlp cnn gru; do
            bigjax train --config=configs/mnist1d.py:$m --workdir=runs/mnist1d_$m; done
Hardware  2 CPU cores, under two minutes each
Expected  test accuracy of 32 (linear), 68 (mlp), 94 (cnn), 91 (gru) percent, each matched or beaten; see RESULTS.md
Source    S. Greydanus and D. Kobak, Scaling Down Deep Learning with MNIST-1D, https://arxiv.org/abs/2011.14439, table 1
"""

import ml_collections

from bigjax.config import parse_arg

# Test accuracy of the paper's table 1, by model.
PUBLISHED = {"linear": 0.32, "mlp": 0.68, "cnn": 0.94, "gru": 0.91}

# The sizes are the paper's (github.com/greydanus/mnist1d, models.py).
CONVOLUTIONS = dict(channels=(25, 25, 25), kernel=(5, 3, 3), stride=2, pool=1, dense=(), conv_dropout=0.1)
GRU = dict(cell="gru", width=6, bidirectional=True, output="flat")
MODELS = {
  "linear": dict(name="linear", in_features=40, num_outputs=10),
  "mlp": dict(name="mlp", in_features=40, widths=(100, 100), num_outputs=10, dropout=0.2),
  "cnn": dict(name="cnn", in_shape=(40, 1), num_classes=10, **CONVOLUTIONS),
  "gru": dict(name="rnn", in_features=1, seq_len=40, num_outputs=10, **GRU),
}
# What is ours: a decaying rate, weight decay and dropout against overfitting 4,000 signals. (Peak rate, weight decay.)
RATES = {"linear": (0.01, 0.0), "mlp": (0.005, 0.3), "cnn": (0.005, 0.1), "gru": (0.01, 0.1)}


def get_config(arg=None):
  arg = parse_arg(arg, model="cnn")
  if arg.model not in MODELS:
    raise ValueError(f"configs/mnist1d.py:{arg.model}: one of {', '.join(MODELS)}")
  config = ml_collections.ConfigDict()
  config.total_steps = 6000
  config.batch_size = 100
  config.data = dict(source=dict(name="mnist1d", split="train"))
  config.model = MODELS[arg.model]
  config.task = dict(name="classification", inputs="x")
  peak, decay = RATES[arg.model]
  config.optimizer = dict(name="adam")
  config.schedule = dict(name="cosine", peak=peak, warmup="2%")
  config.decay = [(".*kernel", decay)]
  config.evals = dict(
    test=dict(
      evaluator=dict(name="classification", num_classes=10),
      data=dict(source=dict(name="mnist1d", split="test")),
      every=500,
      batch_size=500,
    )
  )
  config.log_every = 100
  config.claim = dict(metric="test/accuracy", at_least=PUBLISHED[arg.model], source="arXiv 2011.14439, table 1")
  return config
