"""A tensor in a file: its name, its shape, and any slice of it on request."""

import dataclasses
import mmap
import os
from collections.abc import Callable

import numpy as np

from bigjax.errors import UserError

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """What a file has under a name; nothing of it is in memory."""

  name: str
  file: str
  shape: tuple[int, ...]
  dtype: np.dtype  # Of what `read` returns.
  stored: str  # What the file's format calls it: "BF16", "Q4_1".
  read: Callable[[Index], np.ndarray]  # A slice in each dimension. May be a view of the file.


class Mapped:
  """A file in the address space. Pages come in as they are read; `drop` gives them back."""

  def __init__(self, path: str):
    self.path = path
    try:
      with open(path, "rb") as file:
        self.size = os.fstat(file.fileno()).st_size
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
    except FileNotFoundError:
      raise UserError(f"{path}: there is no such file.") from None
    except OSError as e:
      raise UserError(f"{path} can't be read: {e.strerror}.") from e
    self.bytes = np.frombuffer(self._map, np.uint8)

  def drop(self) -> None:
    """Lets the system take the pages back that were read so far; they can be read again."""
    if self.size and hasattr(mmap, "MADV_DONTNEED"):
      self._map.madvise(mmap.MADV_DONTNEED)


def whole(shape: tuple[int, ...]) -> Index:
  """The index of all of it."""
  return tuple(slice(0, n) for n in shape)
