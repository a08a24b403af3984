"""Profiles: every figure has a source, rates add up, what nobody published is said to be unknown."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax.errors import UserError
from bigjax.plan import hlo, profiles, program, topology

FIGURES = ("flops", "hbm", "hbm_bandwidth", "vmem", "clock", "links", "link_bandwidth", "dcn")


@pytest.mark.parametrize("name", profiles.PROFILES)
def test_every_figure_has_a_source_and_every_other_is_unknown(name):
  profile = profiles.named(name)
  for figure in FIGURES:
    if getattr(profile, figure) is None:
      assert figure in profile.unknown and figure not in profile.sources
    else:
      assert re.search(r"https://\S+", profile.sources[figure]), figure


def test_there_is_a_profile_of_every_chip_that_can_be_planned_for():
  assert set(topology.SLICES) <= set(profiles.PROFILES)


@pytest.mark.parametrize(("name", "units"), [("v4", 8), ("v5e", 4), ("v5p", 8)])
def test_the_clock_times_the_multipliers_is_the_peak(name, units):
  profile = profiles.named(name)
  assert profile.clock * units * 128 * 128 * 2 == pytest.approx(profile.flops["bfloat16"], rel=0.01)


def test_the_links_of_a_chip_add_up_to_the_published_bandwidth():
  both_ways = {n: p.links * p.link_bandwidth * 2 for n, p in profiles.PROFILES.items()}
  assert (both_ways["v5e"], both_ways["v5p"], both_ways["v6e"], both_ways["h100"]) == (400e9, 1200e9, 800e9, 900e9)


@pytest.mark.parametrize(("name", "margin"), [("v4", 1.078), ("v5e", 1.142), ("v5p", 1.110)])
def test_a_product_at_the_peak_takes_the_compiler_s_cycles_which_are_more_than_the_clock_s(name, margin):
  profile = profiles.named(name)
  assert profile.cycles / profile.rate == pytest.approx(2 * 8192**3 / profile.flops["bfloat16"])
  assert profile.rate / profile.clock == pytest.approx(margin, abs=1e-3)
  assert "clock" in profiles.named("v6e").unknown and profiles.named("v6e").rate > 2e9


@pytest.mark.slow
@pytest.mark.parametrize("topology_name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_cycles_of_a_profile_are_what_the_compiler_says(topology_name):
  pytest.importorskip("libtpu")
  device = topology.devices(topology_name)[0]
  mesh = jax.sharding.Mesh(np.array([device]), ("data",))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=whole)
  text = jax.jit(jnp.matmul, out_shardings=whole).lower(x, x).compile().as_text()
  assert program.cycles(hlo.parse(text)) == profiles.of(device).cycles


def test_a_device_finds_its_profile_and_a_cpu_is_told_nothing():
  device = lambda kind: types.SimpleNamespace(device_kind=kind)
  assert profiles.of(device("TPU v5 lite")).name == "v5e"
  assert profiles.compiler_options(device("TPU v5e"))["xla_tpu_enable_latency_hiding_scheduler"] is True
  assert profiles.compiler_options(device("cpu")) is None


def test_an_unknown_chip_is_refused_with_those_that_are_known():
  with pytest.raises(UserError, match="Did you mean 'v5p'"):
    profiles.named("v5q")
