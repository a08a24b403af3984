"""The parity matrix notices what it is for: a mean of means, and a step that a ring leaves out."""

import functools
import importlib
import pathlib
import sys

import jax
import pytest

from bigjax import train
from bigjax.models import ring
from bigjax.sums import Sums

sys.path.append(str(pathlib.Path(__file__).parents[1] / "scripts"))
parity = importlib.import_module("parity")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
  monkeypatch.setattr(parity, "STEPS", 3)


@functools.cache
def reference():
  return parity.run_cell("gpt", "1")


def test_a_mean_over_local_weights_is_noticed(monkeypatch):
  accumulate = train.accumulate

  def mean_of_means(grad_fn, parts, skip=False):
    def local(params, extras, batch, key):
      grads, (sums, extras) = grad_fn(params, extras, batch, key)
      here = sums.weights["loss"]
      means = Sums({k: v / here for k, v in sums.sums.items()}, {k: v / here for k, v in sums.weights.items()})
      return jax.tree.map(lambda g: g / here, grads), (means, extras)

    return accumulate(local, parts, skip)

  monkeypatch.setattr(train, "accumulate", mean_of_means)
  loss, gradient = parity.differences(parity.run_cell("gpt", "ACC2"), reference())
  assert loss > parity.LOSSES and gradient > 10 * parity.GRADIENTS


def test_a_dropped_step_of_a_ring_is_noticed(monkeypatch):
  def rotate(tree, around):
    links = [(d, d + 1) for d in range(around.size - 1)]  # The last device sends nothing to the first.
    return jax.tree.map(lambda x: jax.lax.ppermute(x, around.axes, links), tree)

  monkeypatch.setattr(ring, "rotate", rotate)
  loss, gradient = parity.differences(parity.run_cell("gpt", "CP4"), reference())
  assert loss > parity.LOSSES and gradient > 10 * parity.GRADIENTS


@pytest.mark.parametrize("mesh", ["ACC2", "CP4"])
def test_without_the_fault_the_cell_passes(mesh):
  loss, gradient = parity.differences(parity.run_cell("gpt", mesh), reference())
  assert loss <= parity.LOSSES and gradient <= parity.GRADIENTS
