"""A run on one page: `report.html` and `curves.png` in its workdir, made from nothing but the workdir's files.

The page needs no network and no second file, so it can be mailed, archived or printed; it follows the reader's light or
dark scheme. It can be written at any time, also while the run goes on or after it broke.
"""

from __future__ import annotations

import os
from pathlib import Path

from bigjax.errors import understood
from bigjax.report import curves, page
from bigjax.report.run import Run


def write_report(workdir: str | os.PathLike) -> Path:
  """Writes `curves.png` and `report.html` into `workdir` and returns the page's path.

  Reads `metrics.jsonl`, `config.json`, `run.json` and `parameters.json`; what is missing is left out of the page.

  Raises:
    UserError: when `workdir` is no folder, or one of the files cannot be read.
  """
  with understood(f"{workdir}: its run.json, config.json or parameters.json", "Mend it or remove it."):
    run = Run.read(Path(workdir))
    if run.panels:
      _replace(run.workdir / "curves.png", curves.png(run))
    path = run.workdir / "report.html"
    _replace(path, page.html(run).encode(errors="backslashreplace"))
  return path


def _replace(path: Path, content: bytes) -> None:
  """A reader finds the old file or the new one, never half of one."""
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_bytes(content)
  os.replace(temporary, path)
