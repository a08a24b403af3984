"""The experiment that a plan is of: on devices that are not here, of data that need not be.

A step's shapes are all that is compiled. So where the files of a source are missing, what stands in for it has their
shapes, if the source can tell them without looking (`stand_in` beside its `make`); how many examples there are is then
not known, and neither is the length of a run that is given in epochs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

from bigjax import experiment
from bigjax.errors import UserError
from bigjax.plan import profiles
from bigjax.plan import topology as slices


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An experiment, and what it is on."""

  run: experiment.Experiment
  config: experiment.TrainConfig  # As it was given, whatever stands in for its data.
  topology: str
  num_slices: int
  profile: profiles.Profile
  stands_in: bool  # For data that isn't here.

  @property
  def steps(self) -> int | None:
    """The length of the run, if it is known."""
    unknown = self.stands_in and "epoch" in str(self.run.config.total_steps)
    return None if unknown else self.run.total_steps

  @property
  def where(self) -> tuple[str, int]:
    return self.topology, self.num_slices

  @property
  def chips(self) -> int:
    return self.run.mesh.size // self.profile.devices


def prepare(config: experiment.TrainConfig, topology: str, num_slices: int = 1) -> Prepared:
  """Returns the experiment of `config` on so many slices of a topology.

  Raises:
    UserError: There is no such topology, the mesh doesn't fit it, or data are missing that nothing can stand in for.
  """
  devices = slices.devices(topology, num_slices)
  _check_mesh(config.mesh, len(devices), topology, num_slices)
  shaped = with_stand_in(config)
  run = experiment.build(shaped, devices)
  return Prepared(run, config, topology, num_slices, slices.profile(topology), shaped is not config)


def with_stand_in(config: experiment.TrainConfig) -> experiment.TrainConfig:
  """Returns the config with what stands in for missing data; the config itself if its data are here."""
  stand_in = absent(config)
  if stand_in is None:
    return config
  return dataclasses.replace(config, data=dataclasses.replace(config.data, source=stand_in))


def _check_mesh(mesh, count, topology, num_slices):
  """Raises for sizes that don't multiply to the devices, with those that do."""
  known = math.prod(size for _, size in mesh if size != -1)
  if known == count or (any(size == -1 for _, size in mesh) and known > 0 and count % known == 0):
    return
  names, wanted = [name for name, _ in mesh], [size for _, size in mesh]
  shapes = sorted(_shapes(count, len(mesh)), key=lambda shape: _distance(shape, wanted))
  listed = ", ".join(
    "(" + ", ".join(f"{n} {s}" for n, s in zip(names, shape, strict=True)) + ")" for shape in shapes[:6]
  )
  where = f"{num_slices} x {topology}" if num_slices > 1 else topology
  raise UserError(
    f"config.mesh: {dict(mesh)} is for {known} devices or a multiple; {where} has {count}. These fit: {listed}"
    + (f", and {len(shapes) - 6} more." if len(shapes) > 6 else ".")
  )


def _shapes(count, axes):
  """Every way to write `count` as a product of so many numbers."""
  if axes == 1:
    return [(count,)]
  divisors = [d for d in range(1, count + 1) if count % d == 0]
  return [(d, *rest) for d in divisors for rest in _shapes(count // d, axes - 1)]


def _distance(shape, wanted):
  return sum(abs(math.log(size / want)) for size, want in zip(shape, wanted, strict=True) if want > 0)


def absent(config: experiment.TrainConfig) -> Any:
  """Returns the component that stands in for a source whose files are missing, if there is one."""
  source = config.data.source
  factory = getattr(sys.modules[source.factory.__module__], "stand_in", None)
  if factory is None or factory(**source.kwargs) is None:
    return None
  return dataclasses.replace(source, factory=factory)
