"""A line through 100 points: y = 3 x + 2 + noise. The smallest experiment there is, with an exact answer.

Command   bigjax train --config=configs/linear_regression.py --workdir=runs/linear_regression
Hardware  anything, seconds
Expected  w within 0.1 of 3, b within 0.3 of 2, both within 1e-3 of the least-squares solution; see RESULTS.md
Source    arithmetic: tests/test_experiments.py compares with numpy.linalg.lstsq
"""

import ml_collections


def get_config():
  line = dict(name="synthetic", kind="linear", num_examples=100, weights=(3.0,), bias=2.0, noise=0.5)
  config = ml_collections.ConfigDict()
  config.total_steps = 1000
  config.batch_size = 200  # All points, twice: the exact gradient, on any number of devices up to 8 but 3, 6 and 7.
  config.data = dict(source=line)
  config.model = dict(name="linear", in_features=1, num_outputs=1)
  config.task = dict(name="regression")
  config.optimizer = dict(name="sgd", momentum=0.9)
  config.schedule = dict(name="constant", peak=0.02)
  config.evals = dict(fit=dict(evaluator=dict(name="regression"), data=dict(source=line), every=100))
  config.log_every = 20
  return config
