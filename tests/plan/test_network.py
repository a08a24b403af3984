"""Seconds on links, by hand: rings and rows of a torus, sides added up, between slices."""

import types

import numpy as np
import pytest

from bigjax.plan import collectives, hlo, network, profiles


def slice_of(*sides, slices=1):
  places = [
    types.SimpleNamespace(coords=tuple(map(int, place)) + (0,) * (3 - len(sides)), slice_index=s, core_on_chip=0)
    for s in range(slices)
    for place in np.ndindex(*sides)
  ]
  grid = np.empty(len(places), object)
  grid[:] = places
  return grid


def mesh(grid, **axes):
  return types.SimpleNamespace(devices=grid.reshape(tuple(axes.values())), axis_names=tuple(axes), shape=axes)


def collective(kind, parts, size, **options):
  empty = dict(name="c", axes=("data",), whole=True, executions=3, phase="forward", op_name="", stack=())
  return collectives.Collective(kind=kind, parts=parts, arrays=(hlo.Array("u8", (size,)),), **empty | options)


def test_a_row_of_chips_has_one_direction_and_a_full_side_of_a_flat_pod_is_a_ring():
  v5e = profiles.named("v5e")
  row = network.link(mesh(slice_of(2, 4), data=2, tensor=4), ("tensor",), v5e)
  assert (row.bandwidth, row.ring, row.sides) == (50e9, False, (1,))
  ring = network.link(mesh(slice_of(16, 16), data=16, tensor=16), ("tensor",), v5e)
  assert (ring.bandwidth, ring.ring) == (100e9, True)
  part = network.link(mesh(slice_of(16, 16), data=64, tensor=4), ("tensor",), v5e)
  assert (part.bandwidth, part.ring) == (50e9, False)


def test_an_axis_over_several_sides_has_the_links_of_all_and_cubes_are_rings_only_if_all_sides_are():
  v5p = profiles.named("v5p")
  assert network.link(mesh(slice_of(4, 4, 4), data=64), ("data",), v5p).bandwidth == 6 * 100e9
  assert network.link(mesh(slice_of(2, 4, 4), data=32), ("data",), v5p).bandwidth == 3 * 100e9


def test_between_slices_it_is_the_network_of_the_data_center():
  grid = slice_of(2, 2, 1, slices=2)
  found = network.link(mesh(grid, replica=2, data=4), ("replica",), profiles.named("v5p"), across_slices=True)
  assert (found.name, found.bandwidth) == ("DCN", 50e9 / 8)


def test_a_gather_takes_what_the_others_have_and_a_sum_twice_that():
  link = network.Link("ICI", 100e9, 50e9, (0,), ring=True)
  assert network.seconds(collective("all-gather", 4, 4 * 10**9), link) == pytest.approx(3e9 / 100e9)
  assert network.seconds(collective("all-reduce", 4, 4 * 10**9), link) == pytest.approx(6e9 / 100e9)
  assert network.seconds(collective("collective-permute", 4, 10**9), link) == pytest.approx(1e9 / 50e9)
  assert network.seconds(collective("all-to-all", 16, 10**9), link) == pytest.approx(4 * 1e9 / 100e9)
  assert network.seconds(collective("all-gather", 4, 1), network.Link("chip", None)) is None


def test_what_work_beside_it_covers_is_not_waited_for():
  assert network.exposed(collective("all-gather", 4, 1), 2.0, 1e9) == 2.0
  beside = collective("all-gather", 4, 1, overlapped=True, asynchronous=True, cover=500_000_000)
  assert network.exposed(beside, 2.0, 1e9) == 1.5


def test_totals_are_by_axis_with_executions():
  grid = mesh(slice_of(16, 16), data=16, tensor=16)
  found = network.total([collective("all-gather", 16, 16 * 10**9)] * 2, grid, profiles.named("v5e"), None)
  assert found["data"]["count"] == 6 and found["data"]["bytes"] == 6 * 16 * 10**9
  assert found["data"]["seconds"] == pytest.approx(6 * 15e9 / 100e9)
