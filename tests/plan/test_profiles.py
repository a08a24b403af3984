"""Profiles: every figure has a source, rates add up, what nobody published is said to be unknown."""

import re
import types

import pytest

from bigjax.errors import UserError
from bigjax.plan import profiles, topology

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


def test_where_no_clock_is_published_the_compiler_s_estimate_of_a_product_gives_the_rate():
  assert profiles.named("v5e").rate == profiles.named("v5e").clock
  v6e = profiles.named("v6e")
  assert "clock" in v6e.unknown
  assert v6e.cycles / v6e.rate == pytest.approx(2 * 8192**3 / 918e12)


def test_a_device_finds_its_profile_and_a_cpu_is_told_nothing():
  device = lambda kind: types.SimpleNamespace(device_kind=kind)
  assert profiles.of(device("TPU v5 lite")).name == "v5e"
  assert profiles.compiler_options(device("TPU v5e"))["xla_tpu_enable_latency_hiding_scheduler"] is True
  assert profiles.compiler_options(device("cpu")) is None


def test_an_unknown_chip_is_refused_with_those_that_are_known():
  with pytest.raises(UserError, match="Did you mean 'v5p'"):
    profiles.named("v5q")
