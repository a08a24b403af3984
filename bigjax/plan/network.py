"""How long a collective takes on the links that its axis of the mesh lies on.

Bandwidth alone, no latency, nothing else under way: https://jax-ml.github.io/scaling-book/sharding/. A ring uses its
links in both directions, a row of chips without the closing link half of that; an axis over several sides of the torus
has the links of all of them; between slices it is the chips' share of their host's network.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from bigjax.plan.collectives import Collective
from bigjax.plan.profiles import Profile


@dataclasses.dataclass(frozen=True)
class Link:
  """What an axis of the mesh, or several, lie on."""

  name: str  # "ICI", "DCN", "chip" (devices of one), "switch".
  bandwidth: float | None  # Bytes a second that a device sends along it; None if that is not published.
  one_way: float | None = None  # What it sends to one neighbour.
  sides: tuple[int, ...] = ()  # Of the torus.
  ring: bool = False


def link(mesh: Any, axes: tuple[str, ...], profile: Profile, across_slices: bool = False) -> Link:
  """Returns what the devices that differ along `axes` are joined by."""
  if across_slices:
    return Link("DCN", _share(profile.dcn, profile), _share(profile.dcn, profile))
  group = _group(mesh, axes)
  if not profile.dimensions:
    hosts = {d.id // profile.chips_a_host for d in group}
    fast = profile.links * profile.link_bandwidth
    return Link("switch", fast, fast) if len(hosts) == 1 else Link("DCN", profile.dcn, profile.dcn)
  slices = {getattr(d, "slice_index", 0) for d in group}
  if len(slices) > 1:
    group = [d for d in group if getattr(d, "slice_index", 0) == min(slices)]
  places = np.array([d.coords for d in group])
  everything = np.array([d.coords for d in mesh.devices.flat])
  lengths = everything.max(axis=0) - everything.min(axis=0) + 1
  sides = tuple(int(s) for s in range(places.shape[1]) if len(set(places[:, s])) > 1)
  if not sides:
    return Link("DCN" if len(slices) > 1 else "chip", _share(profile.dcn, profile) if len(slices) > 1 else None)
  wraps = [_wraps(profile, lengths, s) and len(set(places[:, s])) == int(lengths[s]) for s in sides]
  one_way = _share(profile.link_bandwidth, profile)
  return Link("ICI", sum(one_way * (2 if w else 1) for w in wraps), one_way, sides, all(wraps))


def _share(bandwidth, profile):
  """Devices of one chip share what it has."""
  return None if bandwidth is None else bandwidth / profile.devices


def _wraps(profile, lengths, side) -> bool:
  """A flat pod closes its full sides; cubes of 4 x 4 x 4 are joined to rings along all sides, or none."""
  if profile.dimensions == 2:
    return bool(lengths[side] % profile.wraps == 0)
  return bool(np.all(lengths % profile.wraps == 0))


def _group(mesh, axes):
  """The devices that differ from the first along some axes."""
  index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
  return list(np.asarray(mesh.devices[index]).flat)


def seconds(c: Collective, link: Link) -> float | None:
  """Returns how long the collective takes each time; None if its link's bandwidth is not known."""
  if not link.bandwidth:
    return None
  if c.kind == "collective-permute":
    return c.bytes / (link.one_way or link.bandwidth)
  if c.kind in ("all-to-all", "ragged-all-to-all") and link.name == "ICI":
    # Bytes travel a quarter of the way around a ring, half as far again along a row, on average.
    side = max(2, round(c.parts ** (1 / max(1, len(link.sides)))))
    return c.bytes * max(1.0, side / (4 if link.ring else 3)) / link.bandwidth
  return c.sent / link.bandwidth


def exposed(c: Collective, each: float, rate: float | None) -> float:
  """Returns how long devices wait for it each time: what no work scheduled beside it covers."""
  if not c.overlapped:
    return each
  if not rate or not c.cover:
    return 0.0
  return max(0.0, each - c.cover / rate)


def total(collectives: list[Collective], mesh: Any, profile: Profile, rate: float | None) -> dict[str, dict[str, Any]]:
  """Returns, by axis, what a device gets and sends in a step, how long that takes, and how long it waits."""
  found: dict[str, dict[str, Any]] = {}
  for c in collectives:
    joined = link(mesh, c.axes, profile, c.slow)
    name = "+".join(c.axes) + (" across slices" if c.slow else "")
    row = found.setdefault(
      name,
      {
        "link": joined.name,
        "bandwidth": joined.bandwidth,
        "ring": joined.ring,
        "sides": len(joined.sides),
        "bytes": 0,
        "sent": 0,
        "seconds": 0.0,
        "exposed": 0.0,
        "count": 0,
      },
    )
    each = seconds(c, joined)
    row["bytes"] += c.total
    row["sent"] += c.sent * c.executions
    row["count"] += c.executions
    if each is None or math.isnan(each):
      row["seconds"] = row["exposed"] = None
    elif row["seconds"] is not None:
      row["seconds"] += each * c.executions
      row["exposed"] += exposed(c, each, rate) * c.executions
  return found
