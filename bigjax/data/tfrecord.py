"""Records of TFRecord files by number, which the format does not offer, through an index of byte offsets.

The index is made once, by going from one record's length to the next, and kept beside the files, or in the user's cache
folder where that is not allowed. It holds as long as the files' sizes and times of change are the same.

A record is its length (8 bytes, little-endian), a checksum of that (4), the data, and a checksum of these (4):
https://www.tensorflow.org/tutorials/load_data/tfrecord. Both are looked at wherever a record is read, at 10 GB/s; where
google-crc32c is without its part in C, which is 1,000 times as fast as Python, neither is.
"""

import functools
import hashlib
import itertools
import mmap
import os
import pathlib
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bigjax.errors import UserError

OPEN_FILES = 256  # At most, a source: ImageNet has 1,024 files, a process often no more descriptors than that.


class Files:
  """Some TFRecord files, of each of which the number of records is known."""

  def __init__(self, lengths: Mapping[str, int]):
    self._offsets = {}
    for folder, files in itertools.groupby(sorted(lengths), os.path.dirname):
      self._offsets |= _offsets(folder, {file: lengths[file] for file in files})
    self._open = functools.lru_cache(OPEN_FILES)(_Descriptor)

  def read(self, filename: str, positions: np.ndarray) -> list[bytes]:
    """Returns the records at `positions` of a file; may be called from many threads."""
    file, offsets = self._open(filename), self._offsets[filename]
    records = []
    for start, stop in zip(offsets[positions].tolist(), offsets[positions + 1].tolist()):
      record = os.pread(file.number, stop - start, start)
      if len(record) != stop - start:
        raise UserError(damaged(filename, "it is shorter than when it was indexed"))
      header, data = record[:8], record[12:-4]
      if _checks() and (_masked(header) != record[8:12] or _masked(data) != record[-4:]):
        raise UserError(damaged(filename, f"the record at byte {start:,} is not as its checksums say"))
      records.append(data)
    return records


def damaged(file: str, how: str) -> str:
  """Returns what to tell the person whose file can't be read."""
  return f"{file[:300]} is damaged: {how}. Copy it again, or prepare the dataset again (`bigjax data prepare`)."


def _masked(data: bytes) -> bytes:
  """The checksum as the format has it: CRC-32C, turned by 15 bits and shifted, as files hold checksums of checksums."""
  crc = _crc32c().value(data)
  return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@functools.cache
def _crc32c():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # That it is slow: then it is not used.
    import google_crc32c
  return google_crc32c


def _checks() -> bool:
  return _crc32c().implementation == "c"


class _Descriptor:
  """A file that stays open while somebody reads it, even when it has left the cache of open files."""

  def __init__(self, filename: str):
    self.number = os.open(filename, os.O_RDONLY)

  def __del__(self):
    if hasattr(self, "number"):
      os.close(self.number)


def _offsets(folder: str, lengths: dict[str, int]) -> dict[str, np.ndarray]:
  """Returns, for each file, where its records begin and where the last one ends."""
  names = "\n".join(f"{os.path.basename(file)} {length}" for file, length in lengths.items())
  digest = hashlib.sha256(names.encode()).hexdigest()[:16]
  stats = [os.stat(file) for file in lengths]
  state = np.array([(s.st_size, s.st_mtime_ns) for s in stats], np.int64)
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bigjax" / "tfrecord"
  home = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:16]
  places = [pathlib.Path(folder) / f".tfrecord-{digest}.npz", cache / f"{home}-{digest}.npz"]
  ends = np.cumsum([length + 1 for length in lengths.values()])[:-1]
  for place in places:
    if (kept := _kept(place, state)) is not None and len(kept) == sum(lengths.values()) + len(lengths):
      return dict(zip(lengths, np.split(kept, ends)))
  with ThreadPoolExecutor(8) as pool:
    offsets = list(pool.map(_scan, lengths, lengths.values()))
  for place in places:
    if write_arrays(place, state=state, offsets=np.concatenate(offsets)):
      break
  return dict(zip(lengths, offsets))


def _kept(place, state):
  """Returns the index that was made before, if there is one of these files and it is whole."""
  try:
    with open(place, "rb") as file, np.load(file) as stored:  # Its checksums are looked at.
      return stored["offsets"] if np.array_equal(stored["state"], state) else None
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
    return None


def _scan(file: str, length: int) -> np.ndarray:
  """Goes through a file from record to record."""
  offsets, end = [0], os.path.getsize(file)
  if not os.path.isfile(file):
    raise UserError(damaged(file, "it is no file"))
  if end:
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
      while offsets[-1] + 8 <= end and len(offsets) <= length:
        offsets.append(offsets[-1] + 16 + struct.unpack_from("<Q", data, offsets[-1])[0])
  if len(offsets) != length + 1 or offsets[-1] != end:
    raise UserError(damaged(file, f"it does not hold exactly the {length:,} records it should"))
  return np.array(offsets, np.int64)


def write_arrays(place: pathlib.Path, **arrays: np.ndarray) -> bool:
  """Writes `place` at once, whoever else writes it too; False where that is not allowed."""
  try:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=place.name, delete=False) as f:
      np.savez(f, **arrays)
    os.chmod(f.name, 0o644)
    os.replace(f.name, place)
  except OSError:
    return False
  return True
