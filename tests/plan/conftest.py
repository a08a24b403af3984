"""A small language model to plan for."""

import pytest

SMALL = dict(
  total_steps=1000,
  batch_size=16,
  data=dict(source=dict(name="synthetic", kind="tokens", length=64)),
  model=dict(name="decoder", vocab_size=512, context=64, width=64, depth=4, heads=4, mlp_dim=128, scan=True),
  task=dict(name="language_modeling"),
  optimizer=dict(name="adamw"),
  schedule=dict(name="constant", peak=1e-3),
  precision="mixed",
  sharding="fsdp",
)


@pytest.fixture
def small():
  """Returns a function of changes: a new config each time."""

  def make(**changes):
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in SMALL.items()}
    for path, value in changes.items():
      key, _, inner = path.partition("__")
      if inner:
        config[key][inner] = value
      else:
        config[key] = value
    return config

  return make
