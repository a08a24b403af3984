"""What it takes to see a fault again: a file in `workdir/bundles`, for `bigjax replay`.

It holds the steps, the numbers that were wrong, the examples, the config, and the checkpoint from which the steps can
be taken again, which stays for as long as the bundle does; neither data nor parameters.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigjax import config as configs
from bigjax import record, stores, workdirs
from bigjax.data import pipeline
from bigjax.errors import UserError

VERSION = 1
NEEDED = {"bundle", "steps", "kind", "measured", "workdir", "checkpoint", "skips", "config", "batch", "versions"}


def write(
  run,
  workdir: str,
  skips: pipeline.Skips,
  checkpoint: int,
  steps: tuple[int, int],
  measured: Mapping[str, float],
  kind: str,
  action: str,
) -> str:
  """Writes the bundle of a fault and returns where it is.

  Args:
    run: The experiment.
    workdir: The directory of the run.
    skips: What of the order it leaves out.
    checkpoint: The last one before the steps; 0 is the first state.
    steps: From the first one that was wrong to the one at which that was noticed.
    measured: The numbers of the last.
    kind: "nonfinite", "spike" or "overflow".
    action: What the run does about it.
  """
  config, (first, last) = run.config, steps
  plan = pipeline.Plan(run.data.source, config.batch_size, 0, 1, seed=config.seed, growth=run.growth, skips=skips)
  epochs, ids, mask = plan.examples((last - 1) * config.batch_size + np.arange(config.batch_size))
  folder = os.path.join(workdir, "bundles", f"{last:08d}")
  os.makedirs(folder, exist_ok=True)
  record.write_json(
    os.path.join(folder, "bundle.json"),
    {
      "bundle": VERSION,
      "kind": kind,
      "action": action,
      "steps": [first, last],
      "measured": {k: v if math.isfinite(v) else str(v) for k, v in measured.items()},
      "workdir": workdirs.home(os.path.abspath(workdir)),
      "checkpoint": checkpoint,
      "skips": [list(s) for s in skips],
      "seed": config.seed,
      "key": f"fold_in(fold_in(key({config.seed}), 1), {last - 1})",
      "batch": {"epochs": epochs.tolist(), "ids": ids.tolist(), "mask": mask.tolist()},
      "config": configs.describe(config),
      "mesh": dict(run.mesh.shape),
      "devices": f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}",
      "versions": record.versions(),
      "git": record.git_state(),
      "time": record.now(),
    },
  )
  return folder


def needed(workdir: str) -> dict[int, str]:
  """Returns the steps of the checkpoints that a run's bundles are replayed from, each with the reason to keep it."""
  found, place = {}, stores.place(workdir) / "bundles"
  for folder in stores.listed(place) if place.is_dir() else ():
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # It is of no use, whatever stays for it.
      found[int(json.loads((folder / "bundle.json").read_text())["checkpoint"])] = f"for bundles/{folder.name}"
  return found


def read(path: str) -> dict[str, Any]:
  """Returns a bundle, by its folder or its file; raises `UserError` for what is none, or not whole."""
  file = os.path.join(path, "bundle.json") if os.path.isdir(path) else path
  try:
    with open(file, encoding="utf-8") as f:
      found = json.load(f)
  except FileNotFoundError:
    raise UserError(f"{path} is no bundle; those of a run are the folders in WORKDIR/bundles.") from None
  except (OSError, ValueError) as e:
    raise UserError(f"{file} can't be read, it may be cut short: {e}. Bring it back from a copy.") from e
  if not isinstance(found, dict) or found.get("bundle") != VERSION:
    said = found.get("bundle") if isinstance(found, dict) else type(found).__name__
    raise UserError(f"{file} is no bundle of this version of bigjax ({VERSION}); it says {said!r}.")
  if missing := NEEDED - found.keys():
    raise UserError(f"{file} is not whole: {', '.join(sorted(missing))} missing. Bring it back from a copy.")
  found["measured"] = {k: float(v) for k, v in found["measured"].items()}
  return found
