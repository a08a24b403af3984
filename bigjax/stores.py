"""Folders and object stores by one kind of path: `runs/a`, `gs://bucket/runs/a`.

What is in a store is read and written by fsspec (gcsfs), arrays by TensorStore's own driver. A store has no folders,
nothing in it is renamed at once, and who lists it must not be shown what was there a minute ago.
"""

from __future__ import annotations

import importlib.util
import os

from etils import epath

from bigjax.errors import UserError

# Read once, by whoever comes first. TensorFlow takes its time to import, and knows nothing of an emulator.
os.environ["EPATH_USE_TF"] = "false"

LIBRARIES = {"gs": "gcsfs"}  # By the URL's scheme; in the extra of the same name.


def place(path: str) -> epath.Path:
  """Returns the path of a folder or of a place in a store.

  Raises:
    UserError: A store of a kind that is not known, or whose library is not installed.
  """
  scheme = path.partition("://")[0] if "://" in path else None
  if scheme is None:
    return epath.Path(os.path.abspath(path))
  if scheme not in LIBRARIES:
    raise UserError(
      f"{path}: {scheme}:// is not known, gs:// is; of another store, mount the bucket and name the folder."
    )
  if importlib.util.find_spec(LIBRARIES[scheme]) is None:
    raise UserError(f"{path} needs {LIBRARIES[scheme]}: pip install 'bigjax[{scheme}]'.")
  import fsspec.config

  for protocol in ("gs", "gcs"):
    fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
  return epath.Path(path)


def is_remote(path: os.PathLike | str) -> bool:
  """Whether it is a place in a store."""
  return "://" in os.fspath(path)


def listed(directory: epath.Path) -> list[epath.Path]:
  """Returns what is in a folder; nothing of one in a store that nothing was ever put into."""
  try:
    return list(directory.iterdir())
  except FileNotFoundError:
    if is_remote(directory):
      return []
    raise
