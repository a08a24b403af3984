"""MFU is model FLOPs a second over the chips' peak, and is not told where there is no peak."""

import dataclasses

import pytest

import bigjax
from bigjax import experiment
from bigjax.plan import mfu, profiles, work


@pytest.fixture(scope="module")
def run():
  config = dict(
    total_steps=2,
    batch_size=8,
    data=dict(source=dict(name="synthetic", kind="images", num_examples=16, shape=(4, 4, 1), num_classes=3)),
    model=dict(name="mlp", in_features=16, widths=(16,), num_outputs=3),
    task=dict(name="classification"),
    optimizer=dict(name="sgd"),
    schedule=dict(name="constant", peak=1e-2),
  )
  return experiment.build(bigjax.resolve(config))


def test_a_cpu_has_none(run):
  assert mfu.of(run)(3.0) == {}


def test_it_is_the_models_flops_over_the_peak_of_all_chips(run, monkeypatch):
  chip = dataclasses.replace(profiles.PROFILES["v5e"], kinds=(run.mesh.devices.flat[0].device_kind,))
  monkeypatch.setitem(profiles.PROFILES, "v5e", chip)
  told = mfu.of(run)
  assert told(None) == {}
  assert told(3.0)["mfu"] == pytest.approx(work.of(run).total * 3.0 / (8 * chip.peak("float32")))
  # Two layers: forward, kernels' gradients, and the second layer's to its input; 8 examples.
  assert work.of(run).total == 2 * 8 * (2 * 16 * 16 + 3 * 16 * 3)
