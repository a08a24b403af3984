"""What files held when they were written: their sizes and digests, against which they are held before they are read.

A disk that loses half a file says so late, one that turns a bit says nothing, and the array library reads changed
weights without a word. A file is digested in pieces, so that several threads share a large one; its digest is that of
the digests of its pieces.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping

from etils import epath

from bigjax import stores

ALGORITHM = "sha256"  # The fastest of hashlib where the processor has instructions for it, as most of ten years have.
PIECE = 64 * 2**20  # Bytes that are digested as one; part of the format.
THREADS = min(8, os.cpu_count() or 1)  # hashlib lets others run meanwhile.

Digest = tuple[int, str]  # Bytes, and "ALGORITHM:hexadecimal digits".


def take(directory: epath.Path, known: Mapping[str, Digest] | None = None) -> dict[str, Digest]:
  """Returns the digest of every file below `directory` by its path from there; of what is `known`, as it's known."""
  known = {n: (size, digest) for n, (size, digest) in (known or {}).items()}
  names = sorted(set(_files(directory)) - set(known))
  sizes = {n: (directory / n).stat().length for n in names}
  found = _digests(directory, [(n, i) for n in names for i in range(_pieces(sizes[n]))], ALGORITHM)
  taken = {n: (sizes[n], f"{ALGORITHM}:{_joined(ALGORITHM, n, sizes[n], found)}") for n in names}
  return dict(sorted((taken | known).items()))


def of_text(text: str) -> str:
  """Returns the digest of a text."""
  return f"{ALGORITHM}:{hashlib.new(ALGORITHM, text.encode()).hexdigest()}"


def wrong(directory: epath.Path, files: Mapping[str, Digest], share: tuple[int, int] = (0, 1)) -> list[str]:
  """Returns what is wrong with some files, a line for each that is; nothing where all are as they were.

  Args:
    directory: Where they are.
    files: The digest of each, as `take` gives it.
    share: `(i, n)`: only those of the i-th of n parts of about as many bytes.
  """
  mine, (index, count) = {}, share
  loads = [0] * count
  for name, (size, digest) in sorted(files.items(), key=lambda f: (-f[1][0], f[0])):
    least = loads.index(min(loads))
    loads[least] += size + 2**16  # Opening one takes time, too.
    if least == index:
      mine[name] = (size, digest)
  lines, whole = [], []
  for name, (size, _) in sorted(mine.items()):
    if (there := _size(directory / name)) is None:
      lines.append(f"{name} is missing")
    elif there != size:
      lines.append(f"{name} has {there:,} bytes instead of {size:,}")
    else:
      whole.append(name)
  for algorithm in {mine[n][1].partition(":")[0] for n in whole}:
    names = [n for n in whole if mine[n][1].startswith(f"{algorithm}:")]
    if algorithm not in hashlib.algorithms_available:
      lines += [f"{n} has a digest by {algorithm}, which is not known here" for n in names]
      continue
    found = _digests(directory, [(n, i) for n in names for i in range(_pieces(mine[n][0]))], algorithm)
    for n in names:
      if _joined(algorithm, n, mine[n][0], found) != mine[n][1].partition(":")[2]:
        lines.append(f"{n} is not what was written: other bytes")
  return lines


def _files(directory) -> Iterator[str]:
  for path in stores.listed(directory):
    if path.is_dir():
      yield from (f"{path.name}/{name}" for name in _files(path))
    else:
      yield path.name


def _size(path):
  try:
    return path.stat().length
  except (FileNotFoundError, NotADirectoryError):
    return None


def _pieces(size):
  return max(1, -(-size // PIECE))


def _joined(algorithm, name, size, found):
  whole = hashlib.new(algorithm)
  for i in range(_pieces(size)):
    whole.update(found[name, i])
  return whole.hexdigest()


def _digests(directory, pieces: Collection[tuple[str, int]], algorithm) -> dict[tuple[str, int], bytes]:
  if not pieces:
    return {}
  with concurrent.futures.ThreadPoolExecutor(min(THREADS, len(pieces)), "bigjax-digests") as pool:
    one = lambda piece: _digest(directory / piece[0], piece[1], algorithm)
    return dict(zip(pieces, pool.map(one, pieces), strict=True))


def _digest(path, index, algorithm) -> bytes:
  digest, left = hashlib.new(algorithm), PIECE
  with path.open("rb") as file:
    file.seek(index * PIECE)
    while left and (block := file.read(min(left, 2**20))):
      digest.update(block)
      left -= len(block)
  return digest.digest()
