"""Safetensors: read a slice at a time from where it lies, written a tensor at a time; in one file or several.

A file is 8 bytes with the length of a header, the header in JSON (name -> type, shape, offsets), and the tensors,
https://github.com/huggingface/safetensors. Several files have an index beside them, which says what is where.
"""

import dataclasses
import glob
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from bigjax.errors import UserError, few, shown, suggest
from bigjax.weights.tensors import Mapped, Tensor

INDEX = "model.safetensors.index.json"
DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_files(path: str) -> tuple[dict[str, Tensor], list[Mapped]]:
  """Returns the tensors of a file, or of all files of a model in a directory, by name; and the files.

  Raises:
    UserError: There are none; one is cut short or no safetensors; the index names what is not there.
  """
  if os.path.isfile(path):
    return _open([path])
  index = os.path.join(path, INDEX)
  if not os.path.isfile(index):
    found = sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))
    named = [f for f in found if os.path.basename(f) == "model.safetensors"] or found
    if len(named) == 1:
      return _open(named)
    if named:
      raise UserError(f"{path} has {len(named)} safetensors files and no {INDEX} that says what is in them.")
    raise UserError(f"{path} has no safetensors file{_other(path)}.")
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f"{index} has no weight_map, which says what is in which file. Fetch it again.")
  if wrong := [
    f for f in weight_map.values() if not isinstance(f, str) or f != os.path.basename(f) or not f.strip(".")
  ]:
    raise UserError(f"{index} names a file {shown(wrong[0])}, which is none of its directory's. Fetch it again.")
  files = sorted(set(weight_map.values()))
  missing = [f for f in files if not os.path.isfile(os.path.join(path, f))]
  if missing:
    raise UserError(f"{path}: {len(missing)} of the {len(files)} files of {INDEX} are missing: {few(missing)}.")
  tensors, mapped = _open([os.path.join(path, f) for f in files])
  absent = [n for n in weight_map if n not in tensors]
  if absent:
    raise UserError(f"{index} names tensors that no file has: {few(absent)}.")
  return tensors, mapped


def _open(paths):
  mapped = [Mapped(path) for path in paths]
  tensors: dict[str, Tensor] = {}
  for file in mapped:
    for name, tensor in _header(file).items():
      if name in tensors:
        raise UserError(f"{file.path}: tensor {name!r} is in {tensors[name].file} too.")
      tensors[name] = tensor
  return tensors, mapped


def _other(path):
  """What a directory has instead."""
  if not os.path.isdir(path):
    return ": there is no such directory"
  for pattern, remedy in (("*.gguf", "name that file"), ("*.bin", "convert it with `transformers` first")):
    if found := glob.glob(os.path.join(glob.escape(path), pattern)):
      return f", but {os.path.basename(sorted(found)[0])}; {remedy}"
  return ""


def _header(file: Mapped) -> dict[str, Tensor]:
  short = lambda reason: UserError(f"{file.path} is cut short or no safetensors file: {reason}. Fetch it again.")
  if file.size < 8:
    raise short(f"it has {file.size} bytes")
  (length,) = struct.unpack("<Q", file.bytes[:8].tobytes())
  if length > file.size - 8:
    raise short(f"a header of {length:,} bytes in a file of {file.size:,}")
  try:
    header = json.loads(file.bytes[8 : 8 + length].tobytes())
    entries = {n: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items() if n != "__metadata__"}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    raise short(f"its header can't be read ({e})") from None
  found, end = {}, 0
  is_count = lambda n: type(n) is int and 0 <= n <= file.size
  for name, (stored, shape, *offsets) in entries.items():
    if not isinstance(stored, str) or stored not in DTYPES:
      raise UserError(
        f"{file.path}: {shown(name)} is of type {shown(stored)}, which is not known.{suggest(stored, DTYPES)}"
      )
    if len(offsets) != 2 or not all(map(is_count, (*shape, *offsets))):
      raise short(f"{shown(name)} has the shape {shown(list(shape))} at {shown(offsets)}")
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPES[stored].itemsize:
      raise short(f"{stop - start} bytes for {name!r}, {stored}{list(shape)}")
    if 8 + length + stop > file.size:
      raise short(f"the header speaks of {8 + length + stop:,} bytes, there are {file.size:,}")
    view = file.bytes[8 + length + start : 8 + length + stop].view(DTYPES[stored]).reshape(shape)
    found[name] = start, Tensor(name, file.path, shape, DTYPES[stored], stored, view.__getitem__)
    end += stop - start
  # They lie one after another, whatever order the header has them in.
  if 8 + length + end != file.size or not _follow([(start, t) for start, t in found.values()]):
    raise short(f"its tensors take {8 + length + end:,} bytes one after another, there are {file.size:,}")
  return {n: found[n][1] for n in entries}


def _follow(placed):
  at = 0
  for start, tensor in sorted((p for p in placed if math.prod(p[1].shape)), key=lambda p: p[0]):
    if start != at:
      return False
    at = start + math.prod(tensor.shape) * tensor.dtype.itemsize
  return True


def read_json(path: str) -> dict:
  """Returns what a JSON file says; raises `UserError` where it can't be read."""
  try:
    with open(path, encoding="utf-8") as file:
      found = json.load(file)
  except FileNotFoundError:
    raise UserError(f"{path}: there is no such file.") from None
  except OSError as e:
    raise UserError(f"{path} can't be read: {e.strerror}.") from e
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path} can't be read as JSON: {e}. Fetch it again.") from None
  if not isinstance(found, dict):
    raise UserError(f"{path} must be a JSON object.")
  return found


@dataclasses.dataclass(frozen=True)
class Made:
  """A tensor to write, made when its turn comes."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def write(directory: str, tensors: Iterable[Made], *, shard_size: int = 5 * 10**9, writes: bool = True) -> list[str]:
  """Writes `model.safetensors`, or several files and their index where they are larger than `shard_size`.

  Args:
    directory: exists.
    tensors: in the order they are written; each is made once, one at a time.
    shard_size: bytes of a file, unless a tensor is larger.
    writes: whether this process does; the others only make the tensors, which may take all of them.

  Returns:
    The names of the files.
  """
  shards: list[list[Made]] = [[]]
  size = 0
  for tensor in tensors:
    if shards[-1] and size + tensor.size > shard_size:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.size
  count = len(shards)
  one = ["model.safetensors"]
  names = one if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
  for name, shard in zip(names, shards, strict=True):
    if writes:
      _write(os.path.join(directory, name), shard)
    else:
      for tensor in shard:
        tensor.make()
  if count > 1 and writes:
    total = sum(t.size for shard in shards for t in shard)
    where = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    with open(os.path.join(directory, INDEX), "w", encoding="utf-8") as file:
      json.dump({"metadata": {"total_size": total}, "weight_map": where}, file, indent=2)
  return names


def _write(path, tensors):
  header: dict[str, Mapping] = {"__metadata__": {"format": "pt"}}
  start = 0
  for t in tensors:
    header[t.name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, start + t.size]}
    start += t.size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for t in tensors:
      value = t.make()
      assert value.shape == t.shape and value.dtype == t.dtype, t.name
      file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
