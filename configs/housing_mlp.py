"""House prices of California's 1990 census: an MLP on 20,640 districts, 8 numbers each.

Command   bigjax train --config=configs/housing_mlp.py --workdir=runs/housing_mlp
Data      scripts/local_data.sh data   (or --config=configs/housing_mlp.py:data=DIR for another place)
Hardware  2 CPU cores, a few minutes
Expected  test RMSE of 0.52 or less, in units of $100,000 (a linear fit has 0.727); see RESULTS.md
Source    our own; the data is R. Pace and R. Barry's, Sparse Spatial Autoregressions, 1997
"""

import ml_collections

from bigjax.config import parse_arg

TAMED = 'symlog("x")'  # A few districts have hundreds of people a household.


def get_config(arg=None):
  arg = parse_arg(arg, data="data")

  def districts(split):
    return dict(
      name="arrays",
      path=f"{arg.data}/california_housing.parquet",
      hint="run scripts/local_data.sh data",
      target="MedHouseVal",
      split=split,
      shuffle_seed=0,
      standardize="[:80%]",
    )

  config = ml_collections.ConfigDict()
  config.total_steps = "120 epochs"
  config.batch_size = 256
  config.data = dict(source=districts("[:80%]"), preprocess=TAMED)
  config.model = dict(name="mlp", in_features=8, widths=(256, 256, 128), num_outputs=1, activation="silu", dropout=0.1)
  config.task = dict(name="regression")
  config.optimizer = dict(name="adamw", weight_decay=0.0)
  config.schedule = dict(name="cosine", peak=3e-3, warmup="5%")
  config.decay = [(".*kernel", 0.05)]
  config.clip = dict(norm=1.0)
  config.evals = dict(
    test=dict(
      evaluator=dict(name="regression"),
      data=dict(source=districts("[80%:]"), preprocess=TAMED),
      every="5 epochs",
      batch_size=1024,
    )
  )
  config.claim = dict(metric="test/rmse", at_most=0.52, source="RESULTS.md")
  return config
