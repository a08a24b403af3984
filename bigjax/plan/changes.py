"""A config with some values changed, and the flags that say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigjax import config as configs
from bigjax import experiment


def apply(config: experiment.TrainConfig, changes: Mapping[str, Any]) -> experiment.TrainConfig:
  """Returns the config with new values at dotted paths, such as {"model.remat": "full"}, checked as any other."""
  described = configs.describe(config)
  for path, value in changes.items():
    *parts, last = path.split(".")
    place = described
    for part in parts:
      place = place[part]
    place[last] = value
  return configs.resolve(described, experiment.TrainConfig)


def flags(changes: Mapping[str, Any]) -> str:
  """Returns them as overrides of a command."""
  return " ".join(f"--config.{path}={_quoted(value)}" for path, value in changes.items())


def _quoted(value):
  text = str(value).replace(" ", "") if not isinstance(value, str) else value
  return f'"{text}"' if any(c in text for c in "()[]{}'* ") else text
