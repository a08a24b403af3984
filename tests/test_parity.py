"""The parity matrix, scripts/parity.py: a subset that has every axis, model and variant; all of it among slow tests."""

import functools
import importlib
import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "scripts"))
parity = importlib.import_module("parity")

COVERING = [
  ("mlp", "FSDP8", "scan"),
  ("resnet", "DP8", "scan+remat"),
  ("vit", "HSDP2x4", "scan+remat"),
  ("gpt", "ACC4xFSDP4", ""),
  ("gpt", "FSDP2xCP4", "scan"),
  ("gpt", "PP2xFSDP2xTP2", "scan+remat"),
  ("moe", "FSDP2xEP4", ""),
]
ALL = [
  (model, mesh, variant)
  for model in parity.MODELS
  for mesh in parity.MESHES
  for variant in parity.VARIANTS
  if (mesh, variant) != ("1", "") and not parity.why_not(model, mesh, variant)
]


@functools.cache
def reference(model):
  return parity.run_cell(model, "1")


def assert_trains_alike(model, mesh, variant):
  cell = parity.run_cell(model, mesh, variant)
  loss, gradient = parity.differences(cell, reference(model))
  assert loss <= parity.LOSSES
  assert gradient <= parity.GRADIENTS
  assert parity.moved(cell)


def test_the_subset_has_every_model_every_axis_and_every_variant():
  models, meshes, variants = map(set, zip(*COVERING, strict=True))
  axes = lambda meshes: {axis for mesh in meshes for axis, size in parity.MESHES[mesh]["mesh"] if size > 1}
  assert models == set(parity.MODELS) and variants == set(parity.VARIANTS)
  assert axes(meshes) == axes(parity.MESHES) == {"replica", "data", "pipe", "expert", "seq", "tensor"}
  assert any(parity.MESHES[mesh].get("accumulate", 1) > 1 for mesh in meshes)
  assert set(COVERING) <= set(ALL)


@pytest.mark.parametrize("cell", COVERING, ids="-".join)
def test_it_trains_as_on_one_device(cell):
  assert_trains_alike(*cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in ALL if cell not in COVERING], ids="-".join)
def test_so_does_every_other_cell_that_can_be(cell):
  assert_trains_alike(*cell)
