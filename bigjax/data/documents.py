"""Documents out of files of text, JSON lines and parquet, and out of TFDS, in parts that can be read apart.

Where parts begin is a function of the files alone, never of who reads them: so any number of processes makes the same
of them, and a part that is done needs not be done again.
"""

import codecs
import dataclasses
import glob
import io
import json
import mmap
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from bigjax.data import formats
from bigjax.errors import UserError, shown, suggest

Boundary = Literal["file", "paragraph", "line"]

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}  # Anything else is text.
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_ENDS = {"line": re.compile(rb"\n"), "paragraph": re.compile(rb"(?<=[^\r\n])\r?\n\r?\n[\r\n]*(?=[^\r\n])")}
# Where words end for every pattern in use: after a lone end of a line, before a lone space.
_LINE, _SPACE = r"(?<=\S)\n(?=[^\s/])", r"(?<=\S)(?= \S)"
_CUT_LINE, _CUT_SPACE, _CUT_ANY = re.compile(_LINE), re.compile(_SPACE), re.compile(f"{_LINE}|{_SPACE}")


@dataclasses.dataclass(frozen=True)
class Slice:
  """Some of the documents of one file or dataset: bytes, groups of rows or examples from `start` to `stop`."""

  kind: str
  path: str
  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What to read documents from, and how.

  Attributes:
    paths: Files and patterns such as `books/*.txt`, read in this order, a pattern's by name. JSON lines and parquet
      are told by their ends, `.jsonl` and `.parquet`; `.gz`, `.bz2`, `.zst` and `.lz4` may follow.
    tfds: A dataset that `bigjax data prepare` has made, in place of files.
    split: Of the dataset, in TFDS's notation.
    data_dir: Folder of the datasets.
    field: What holds the text in JSON lines, parquet and TFDS.
    document: What a document is in files of text: a `file`, a `paragraph` that ends with an empty line, or a `line`.
    encoding: Of files of text.
  """

  paths: tuple[str, ...] = ()
  tfds: str | None = None
  split: str = "train"
  data_dir: str | None = None
  field: str = "text"
  document: Boundary = "file"
  encoding: str = "utf-8"

  def __post_init__(self):
    try:
      plain = "\n".encode(self.encoding) == b"\n"
    except LookupError as e:
      raise UserError(f"encoding: {self.encoding!r} is none that Python knows.") from e
    if not plain:
      raise UserError(f"encoding: lines of {self.encoding!r} don't end as in ASCII; convert the files to UTF-8.")
    if bool(self.paths) == bool(self.tfds):
      raise UserError("name the files to read, or a dataset with tfds, and not both.")

  def files(self) -> list[str]:
    """Returns the files, in order."""
    found = []
    for path in map(os.path.expanduser, self.paths):
      files = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
      if not files:
        raise UserError(f"there is no file {path!r}.")
      found += files
    return found

  def parts(self, size: int) -> list[tuple[Slice, ...]]:
    """Returns all documents in parts of about `size` bytes of their files."""
    if self.tfds:
      return [(part,) for part in self._examples(size)]
    parts, room = [[]], size
    for path in self.files():
      for piece, weight in self._slices(path, size):
        if parts[-1] and weight > room:
          parts.append([])
          room = size
        parts[-1].append(piece)
        room -= weight
    return [tuple(part) for part in parts]

  def read(self, part: tuple[Slice, ...]) -> Iterator[str]:
    """Yields the documents of a part, in order; empty ones are left out."""
    readers = {"text": self._text, "jsonl": self._jsonl, "parquet": self._parquet, "tfds": self._tfds}
    for piece in part:
      yield from filter(None, readers[piece.kind](piece))

  def _slices(self, path: str, size: int) -> Iterator[tuple[Slice, int]]:
    stem, end = os.path.splitext(path)
    kind = _KINDS.get(os.path.splitext(stem if end in _COMPRESSED else path)[1], "text")
    total = os.path.getsize(path)
    if kind == "parquet":
      yield from self._row_groups(path, size)
    elif end in _COMPRESSED or not total or (kind == "text" and self.document == "file"):
      yield Slice(kind, path, 0, total), total
    else:
      ends = _ENDS["line" if kind == "jsonl" else self.document]
      with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 0
        while start < total:
          found = ends.search(data, start + size) if start + size < total else None
          stop = found.end() if found else total
          yield Slice(kind, path, start, stop), stop - start
          start = stop

  def _text(self, piece: Slice) -> Iterator[str]:
    data = _content(piece)
    if piece.start == 0 and self.encoding == "utf-8":
      data = data.removeprefix(codecs.BOM_UTF8)
    try:
      if self.document == "file":
        yield data.decode(self.encoding)
        return
      start = 0
      for found in _ENDS[self.document].finditer(data):
        yield data[start : found.end()].decode(self.encoding)
        start = found.end()
      yield data[start:].decode(self.encoding)
    except UnicodeDecodeError as e:
      raise UserError(
        f"{piece.path!r} is not {self.encoding}: {e.reason}, after {data[max(0, e.start - 20) : e.start]!r}. "
        "Set encoding, such as 'latin-1'."
      ) from e

  def _jsonl(self, piece: Slice) -> Iterator[str]:
    place = piece.start
    for line in io.BytesIO(_content(piece)):
      if line.strip():
        try:
          record = json.loads(line)
        except (ValueError, RecursionError) as e:
          raise UserError(f"{piece.path!r}, the line at byte {place:,}, is no JSON: {e}") from e
        if not isinstance(record, dict) or not isinstance(record.get(self.field), str):
          raise UserError(f"{piece.path!r}, the line at byte {place:,}: {self._no_field(record)}")
        yield record[self.field]
      place += len(line)

  def _no_field(self, record: Any) -> str:
    if not isinstance(record, dict):
      return f"it is {type(record).__name__}, not an object with a field {self.field!r}."
    if self.field in record:
      return f"the field {self.field!r} is {type(record[self.field]).__name__}, not text."
    near = suggest(self.field, [name[:80] for name in record])
    return f"there is no field {self.field!r}.{near} Say which holds the text with field."

  def _row_groups(self, path: str, size: int) -> Iterator[tuple[Slice, int]]:
    with self._parquet_file(path) as file:
      names = file.schema_arrow.names
      if self.field not in names:
        raise UserError(f"{path!r}: {self._no_field(dict.fromkeys(names))}")
      groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
      weights = [
        sum(c.total_uncompressed_size for c in columns if c.path_in_schema == self.field)
        for columns in ([g.column(i) for i in range(g.num_columns)] for g in groups)
      ]
    start = 0
    for i in range(len(weights)):
      if i + 1 == len(weights) or sum(weights[start : i + 2]) > size:
        yield Slice("parquet", path, start, i + 1), sum(weights[start : i + 1])
        start = i + 1

  def _parquet_file(self, path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
      return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as e:
      raise UserError(f"{path!r} can't be read, it may be cut short: {e}") from e

  def _parquet(self, piece: Slice) -> Iterator[str]:
    import pyarrow

    try:
      with self._parquet_file(piece.path) as file:
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(1024, row_groups=groups, columns=[self.field]):
          for text in batch.column(0).to_pylist():
            if not isinstance(text, str):
              raise UserError(f"{piece.path!r}: the column {self.field!r} holds {shown(text)}, not text: drop the row.")
            yield text
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as e:
      raise UserError(f"{piece.path!r} can't be read, it may be damaged: {' '.join(str(e).split())}") from e

  def _source(self) -> Any:
    from bigjax.data import tfds

    return tfds.make(self.tfds, split=self.split, data_dir=self.data_dir, features=(self.field,))

  def _examples(self, size: int) -> Iterator[Slice]:
    source = self._source()
    sample = source.fetch(np.arange(min(len(source), 256)))[self.field]
    if not all(isinstance(text, bytes) for text in sample):
      raise UserError(f"tfds={self.tfds!r}: the feature {self.field!r} is no text. Name another with field.")
    step = max(1, int(size * len(sample) / max(1, sum(map(len, sample)))))
    for start in range(0, len(source), step):
      yield Slice("tfds", self.tfds, start, min(start + step, len(source)))

  def _tfds(self, piece: Slice) -> Iterator[str]:
    source = self._source()
    for start in range(piece.start, piece.stop, 256):
      for text in source.fetch(np.arange(start, min(start + 256, piece.stop)))[self.field]:
        yield text.decode()


def cut(text: str, size: int = 2**16) -> Iterator[str]:
  """Yields a long text in pieces that can be encoded apart, cut between lines, or between words where there are none.

  A byte-level BPE makes the same tokens of the pieces as of the whole; SentencePiece begins each as a word. A piece has
  `size` to 2 * `size` characters, and more where nothing ends.
  """
  start = 0
  while len(text) - start > 2 * size:
    first, last = start + size, start + 2 * size
    found = _CUT_LINE.search(text, first, last) or _CUT_SPACE.search(text, first, last) or _CUT_ANY.search(text, last)
    if not found:
      break
    yield text[start : found.end()]
    start = found.end()
  yield text[start:]


def _content(piece: Slice) -> bytes:
  if os.path.splitext(piece.path)[1] in _COMPRESSED:
    return _decompressed(piece.path)
  with open(piece.path, "rb") as file:
    file.seek(piece.start)
    return file.read(piece.stop - piece.start)


def _decompressed(path: str) -> bytes:
  import pyarrow

  try:
    parts, size = [], 0
    with pyarrow.input_stream(path) as file:  # It knows the compression by the name.
      while part := file.read(2**24):
        parts.append(part)
        size += len(part)
        formats.check_fits(path, size)
    return b"".join(parts)
  except (OSError, pyarrow.ArrowException) as e:
    raise UserError(f"{path!r} can't be read, it may be cut short: {e}") from e
