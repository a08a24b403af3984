"""Arrays out of files: npz, npy, IDX, CSV and parquet, gzipped or not, told apart by what is in them.

A file gives fields, each an array with an entry for every example. Those of a table (CSV, parquet) are its columns, of
which only those asked for are read.
"""

import contextlib
import csv
import dataclasses
import functools
import gzip
import importlib.util
import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from bigjax.errors import UserError, shown

Header = Literal["auto", "names", "counts", "none"]


@dataclasses.dataclass(frozen=True)
class File:
  """A file's fields by name, in order, and how to read some of them."""

  path: str
  names: tuple[str, ...]
  read: Callable[[Sequence[str]], list[np.ndarray]]
  table: bool = False
  classes: tuple[str, ...] | None = None  # Names of the classes, where a CSV's first line tells them.


def locate(path: str, hint: str = "") -> str:
  """Returns where `path` lies on this machine.

  Args:
    path: A file, or `package:NAME/FILE` for one that an installed Python package holds; the package isn't imported.
    hint: Where the file can be had, for the error when it isn't there.
  """
  if not path.startswith("package:"):
    found = os.path.expanduser(path)
    if not os.path.isfile(found):
      raise UserError(f"path: there is no file {found!r}{': ' + hint if hint else '.'}")
    return found
  package, _, file = path.removeprefix("package:").partition("/")
  spec = importlib.util.find_spec(package) if package.isidentifier() else None
  if spec is None or not spec.submodule_search_locations:
    remedy = hint or f"pip install {dict(sklearn='scikit-learn').get(package, package)}"
    raise UserError(f"path: {path!r} needs the Python package {package!r}: {remedy}")
  for folder in spec.submodule_search_locations:
    if os.path.isfile(os.path.join(folder, file)):
      return os.path.join(folder, file)
  raise UserError(f"path: the installed package {package!r} has no file {file!r}; another version may have it.")


def open_file(path: str, header: Header = "auto", delimiter: str | None = None) -> File:
  """Returns what the file at `path` holds.

  Args:
    path: The file.
    header: The first line of a CSV: names of the columns, scikit-learn's counts and names of classes, or values.
    delimiter: Between the cells of a CSV; a tab for .tsv and else a comma if None.
  """
  with _told(path), _opened(path) as file:
    start = file.read(1024)
  if start.startswith(b"PK\x03\x04"):
    return _npz(path)
  if start.startswith(b"\x93NUMPY"):
    return _npy(path)
  if start.startswith(b"PAR1"):
    return _parquet(path)
  if start[:2] == b"\0\0" and start[2:3] in _IDX_TYPES and len(start) > 3:
    return _idx(path)
  if not start:
    raise UserError(f"path: {path!r} is empty.")
  if b"\0" in start:
    raise UserError(f"path: {path!r} is none of npz, npy, IDX, CSV and parquet.")
  return _csv(path, header, delimiter or ("\t" if path.removesuffix(".gz").endswith(".tsv") else ","))


@contextlib.contextmanager
def _told(path):
  """Damage that the readers of a format find, in words."""
  try:
    yield
  except UnicodeDecodeError as e:
    raise UserError(f"path: {path!r} is no UTF-8 text at byte {e.start}: convert it.") from e
  except MemoryError as e:
    raise UserError(f"path: {path!r} would take more than the memory of this machine; it may be damaged.") from e
  except (OSError, EOFError, zlib.error, zipfile.BadZipFile, csv.Error, NotImplementedError, RuntimeError) as e:
    raise UserError(f"path: {path!r} can't be read, it may be cut short: {e}") from e


def memory() -> int:
  """Returns the bytes of memory that this machine has."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits(path: str, size: int) -> None:
  """Raises `UserError` for a file that says it holds more than the memory of this machine."""
  if size > memory():
    raise UserError(
      f"path: {path!r} holds {size:,} bytes, more than the memory of this machine, {memory():,}; it may be damaged."
    )


def _opened(path, mode="rb", **kwargs):
  with open(path, "rb") as file:
    zipped = file.read(2) == b"\x1f\x8b"
  if not zipped:
    return open(path, mode, **kwargs)
  return io.TextIOWrapper(_Gzip(path), **kwargs) if "t" in mode else _Gzip(path)


class _Gzip(gzip.GzipFile):
  """Ends where more comes out than the machine holds: a thousandth of that is enough to say it."""

  def read1(self, size=-1):
    check_fits(self.name, self.tell())
    return super().read1(size)


# What NumPy raises where its headers, which are literals of Python, are none.
_DAMAGE = (ValueError, TypeError, SyntaxError, OverflowError, RecursionError, tokenize.TokenError)


def _npz(path):
  try:
    with _told(path), open(path, "rb") as file, np.load(file) as arrays:
      check_fits(path, sum(member.file_size for member in arrays.zip.infolist()))
      loaded = dict(arrays)
  except _DAMAGE as e:
    if isinstance(e, UserError):
      raise
    if "pickle" not in str(e).lower():
      raise UserError(f"path: {path!r} can't be read, it may be damaged: {e}") from e
    raise UserError(f"path: {path!r} holds pickled objects, which may run code: save plain arrays.") from e
  return File(path, tuple(loaded), lambda names: [loaded[name] for name in names])


def _npy(path):
  with _told(path), open(path, "rb") as file:
    zipped = file.read(1) == b"\x1f"
  try:
    with _told(path):
      if zipped:
        with gzip.open(path) as file:
          array = np.lib.format.read_array(file)
      else:
        array = np.load(path, mmap_mode="r")
  except _DAMAGE as e:
    if isinstance(e, UserError):
      raise
    raise UserError(f"path: {path!r} can't be read, it is cut short or holds pickled objects: {e}") from e
  name = os.path.basename(path).removesuffix(".gz").removesuffix(".npy")
  return File(path, (name,), lambda names: [array])


_IDX_TYPES = {b"\x08": "u1", b"\x09": "i1", b"\x0b": ">i2", b"\x0c": ">i4", b"\x0d": ">f4", b"\x0e": ">f8"}


def _idx(path):
  """http://yann.lecun.com/exdb/mnist, "the IDX file format": images get a channel, [n, height, width, 1]."""
  with _told(path), _opened(path) as file:
    data = file.read(4)
    rank, dtype = data[3], np.dtype(_IDX_TYPES[data[2:3]])
    data += file.read(4 * rank)
    shape = struct.unpack(f">{rank}I", data[4:]) if len(data) == 4 + 4 * rank else (0,)
    size = math.prod(shape) * dtype.itemsize
    check_fits(path, size)
    data += file.read(size + 1)
  if len(data) - 4 - 4 * rank != math.prod(shape) * dtype.itemsize:
    raise UserError(f"path: {path!r} is cut short: {len(data):,} bytes, not what {shape} of {dtype.name} takes.")
  array = np.frombuffer(data, dtype, offset=4 + 4 * rank).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
  name = {1: "label", 3: "image", 4: "image"}.get(rank, "x")
  return File(path, (name,), lambda names: [array[..., None] if rank == 3 else array])


def _parquet(path):
  import pyarrow
  import pyarrow.parquet

  try:
    with _told(path):
      names = pyarrow.parquet.read_schema(path).names
  except pyarrow.ArrowException as e:
    raise UserError(f"path: {path!r} can't be read, it may be cut short: {e}") from e

  def read(wanted):
    try:
      with _told(path):  # Pages have checksums where their writer was asked for them.
        table = pyarrow.parquet.read_table(path, columns=list(wanted), page_checksum_verification=True)
    except pyarrow.ArrowException as e:
      raise UserError(f"path: {path!r} can't be read, it may be damaged: {' '.join(str(e).split())}") from e
    return [_parquet_column(path, name, table[name]) for name in wanted]

  # pandas writes the numbers of rows as one more column.
  return File(path, tuple(n for n in names if not n.startswith("__index_level_")), read, table=True)


def _parquet_column(path, name, column):
  import pyarrow

  if column.null_count:
    row = column.is_null().index(True).as_py()
    raise UserError(
      f"{path}, row {row} (counted from 0), column {name!r}: the value is missing. Fill it or drop the row."
    )
  kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
  if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
    return np.array(column.to_pylist(), object)
  if pyarrow.types.is_decimal(kind):
    column = column.cast(pyarrow.float64())
  values = column.to_numpy()
  if values.dtype.kind not in "biuf":
    raise UserError(f"{path}, column {name!r} holds {column.type}, not numbers: add it to drop.")
  if not np.isfinite(values).all():
    row = int(np.flatnonzero(~np.isfinite(values))[0])
    raise UserError(f"{path}, row {row} (counted from 0), column {name!r}: {values[row]} is no finite number.")
  return values


def _csv(path, header, delimiter):
  with _told(path):
    first, second = _first_rows(path, delimiter)
  if header == "auto":
    header = _kind_of_header(first, second)
  classes = tuple(first[2:]) if header == "counts" else None
  width = len(second) if header == "counts" and second else len(first)
  names = tuple(name.strip() for name in first) if header == "names" else tuple(map(str, range(width)))
  body = second if header != "none" else first
  if not body:
    raise UserError(f"path: {path!r} has no line of values.")
  if len(body) != len(names):
    raise UserError(f"{path}, the first line of values: {_width(body, names)}")
  texts = [not _is_number(cell) for cell in body]
  read = functools.partial(_csv_columns, path, delimiter, header != "none", names, texts)
  return File(path, names, read, table=True, classes=classes)


def _first_rows(path, delimiter):
  with _rows(path, delimiter) as rows:
    found = [row for _, row in zip(range(2), rows)]
  return [row for _, row in found] + [[]] * (2 - len(found))


def _kind_of_header(first, second):
  if any(map(_is_number, first)):
    # "569,30,malignant,benign": rows, columns before the label, names of the classes.
    counts = len(first) > 2 and first[0].isdigit() and first[1] == str(len(second) - 1)
    return "counts" if counts and not any(map(_is_number, first[2:])) else "none"
  return "names" if second else "none"


def _csv_columns(path, delimiter, has_header, names, texts, wanted):
  """Reads some columns: as numbers, but as text where the first value is none."""
  places = [names.index(name) for name in wanted]
  with _told(path):
    if not any(texts):
      values = _numbers(path, delimiter, has_header)
      if values is not None and np.isfinite(values[:, places]).all():
        return list(values[:, places].T)
    rows = _checked_rows(path, delimiter, has_header, names, [place for place in places if not texts[place]])
  return [
    np.array([row[place].strip() for row in rows], object)
    if texts[place]
    else np.array([float(row[place]) for row in rows])
    for place in places
  ]


def _numbers(path, delimiter, has_header):
  """Returns a CSV of nothing but numbers, ten times as fast as cell by cell; None if it isn't one."""
  with _opened(path, "rt", encoding="utf-8-sig", newline="") as file:
    try:
      return np.loadtxt(file, delimiter=delimiter, skiprows=int(has_header), ndmin=2, comments=None, quotechar='"')
    except UnicodeDecodeError:
      raise
    except ValueError:
      return None


def _checked_rows(path, delimiter, has_header, names, numeric):
  """Returns the lines of a CSV; raises for the first that has a cell too few or many or, at `numeric`, no number."""
  with _rows(path, delimiter) as rows:
    found = list(rows)[has_header:]
  for line, row in found:
    if len(row) != len(names):
      raise UserError(f"{path}, line {line}: {_width(row, names)}")
    for place in numeric:
      if not _is_number(row[place]) or not math.isfinite(float(row[place])):
        column = f"{names[place]!r} (number {place})" if names[place] != str(place) else place
        raise UserError(
          f"{path}, line {line}, column {column}: {shown(row[place])} is no finite number. "
          "Correct the cell, drop the column, or say what the first line is with header."
        )
  return [row for _, row in found]


def _width(row, names):
  return f"{len(row)} cells where there are {len(names)} columns. Correct the line."


@contextlib.contextmanager
def _rows(path, delimiter) -> Iterator[Iterator[tuple[int, list[str]]]]:
  """Gives (line number, cells) of every line that isn't blank."""
  with _opened(path, "rt", encoding="utf-8-sig", newline="") as file:
    reader = csv.reader(file, delimiter=delimiter)
    yield ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))


def _is_number(cell: str) -> bool:
  try:
    float(cell)
  except ValueError:
    return False
  return "_" not in cell  # Python reads 1_000 as a number; no other program does.


def unique_fields(files: Sequence[File]) -> dict[str, tuple[File, str]]:
  """Returns the fields of all files by name; columns without names are numbered on from file to file."""
  found: dict[str, Any] = {}
  for file in files:
    start = len(found)
    for i, name in enumerate(file.names):
      shown = str(start + i) if file.table and name == str(i) else name
      if shown in found:
        raise UserError(f"path: {found[shown][0].path!r} and {file.path!r} both have {shown!r}.")
      found[shown] = (file, name)
  return found
