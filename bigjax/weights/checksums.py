"""Digests that stand beside weights, against which these are held before they are read.

What is written here leaves `SHA256SUMS`, as `sha256sum --check SHA256SUMS` reads it. What came from Hugging Face has
digests too: in its cache a file is a link to one that is named by its own; in a folder of one's choice, what the server
said of each file is kept in `.cache/huggingface`. https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import re
from collections.abc import Sequence

from bigjax import hosts
from bigjax.errors import UserError

SUMS = "SHA256SUMS"
WHOLE = (".safetensors", ".safetensors.index.json", ".gguf", "config.json")  # What a list has to have, if there is one.
_HEXADECIMAL = re.compile(r"[0-9a-f]{64}")
_THREADS = min(8, os.cpu_count() or 1)  # hashlib lets others run meanwhile.


def write(directory: str) -> None:
  """Writes the digests of all files of a directory into it."""
  files = sorted(f for f in os.listdir(directory) if f != SUMS and os.path.isfile(os.path.join(directory, f)))
  found = _digests([os.path.join(directory, f) for f in files])
  with open(os.path.join(directory, SUMS), "w", encoding="utf-8") as file:
    file.writelines(f"{digest}  {name}\n" for name, digest in zip(files, found, strict=True))


def known(path: str) -> tuple[str, str] | None:
  """Returns the SHA-256 that a file has by what stands beside it, in hexadecimal digits, and where; None without one.

  Raises:
    UserError: There is a list of digests beside it that can't be read, or lacks weights.
  """
  folder, name = os.path.split(os.path.abspath(path))
  sums = os.path.join(folder, SUMS)
  if os.path.lexists(sums):
    listed = _listed(sums)
    if name in listed:
      return listed[name], sums
    if name.endswith(WHOLE):
      raise UserError(f"{sums} has no digest of {name}, which stands beside it. {_remedy(sums)}")
    return None  # Such as a vocabulary that was put there later.
  if os.path.islink(path):
    blob = os.path.realpath(path)
    if _HEXADECIMAL.fullmatch(os.path.basename(blob)):
      return os.path.basename(blob), blob
  fetched = os.path.join(folder, ".cache", "huggingface", "download", f"{name}.metadata")
  if os.path.isfile(fetched):
    with open(fetched, encoding="utf-8", errors="replace") as file:
      lines = file.read(1000).split()
    if len(lines) > 1 and _HEXADECIMAL.fullmatch(lines[1]):
      return lines[1], fetched
  return None


def verify(files: Sequence[str], shared: bool = False) -> int:
  """Holds files against their digests; returns how many had one.

  Args:
    files: Some of which may have none.
    shared: All processes of a run call this together, and each reads its part.

  Raises:
    UserError: One holds other bytes than its digest says.
  """
  digests = {f: d for f in files if (d := known(f)) is not None}
  index, count = hosts.place() if shared else (0, 1)
  mine = sorted(digests, key=_size, reverse=True)[index::count]
  wrong = [f for f, digest in zip(mine, _digests(mine), strict=True) if digest != digests[f][0]]
  if shared:
    wrong = [f for some in hosts.gathered(wrong) for f in some]
  if wrong:
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    where = digests[wrong[0]][1]
    raise UserError(f"{', '.join(wrong[:3])}{more}: other bytes than by the digest in {where}. {_remedy(where)}")
  return len(digests)


def _remedy(where):
  return f"Fetch them again; or if they were changed on purpose, remove {where}."


def _size(path):
  try:
    return os.path.getsize(path)
  except OSError:
    return 0


def _listed(sums):
  """The digests of a list, by name."""
  found = {}
  try:
    with open(sums, encoding="utf-8") as file:
      lines = file.read().splitlines()
  except (OSError, ValueError) as e:
    raise UserError(f"{sums} can't be read: {e}. {_remedy(sums)}") from e
  for number, line in enumerate(lines, 1):
    if not line.strip() or line.startswith("#"):
      continue
    parts = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
    if not parts:
      raise UserError(f"{sums}, line {number}, is no digest and a name, as sha256sum writes them. {_remedy(sums)}")
    found[parts[2].removeprefix("./")] = parts[1].lower()
  return found


def _digests(files: Sequence[str]) -> list[str]:
  if not files:
    return []
  with concurrent.futures.ThreadPoolExecutor(min(_THREADS, len(files)), "bigjax-digests") as pool:
    return list(pool.map(_digest, files))


def _digest(path):
  try:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as e:
    raise UserError(f"{path} can't be read: {e.strerror}.") from e
