"""Any TensorFlow Datasets dataset that is prepared on disk, with random access and without TensorFlow.

Both of TFDS's usual file formats are read by example number: ArrayRecord by its own reader, TFRecord, which has none,
by an index of byte offsets that is made once. Examples come as NumPy arrays, images still encoded, for `decode` or
`inception_crop` to decode in parallel. Nothing is ever downloaded here: `bigjax data prepare` does that.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from bigjax.data import absent, tfrecord
from bigjax.data.tfrecord import OPEN_FILES, damaged
from bigjax.errors import UserError, suggest


def make(
  dataset: str,
  *,
  split: str,
  data_dir: str | None = None,
  features: tuple[str, ...] | None = None,
  file_format: Literal["array_record", "tfrecord"] | None = None,
) -> "TFDS":
  """Reads a split, or parts of splits, of a prepared dataset.

  Args:
    dataset: TFDS's name, such as "mnist", "mnist:3.0.1" or "glue/sst2"; or a folder that holds a `dataset_info.json`.
    split: TFDS's notation (https://www.tensorflow.org/datasets/splits): "train", "train[:80%]", "train[10:200]+test".
    data_dir: Folder of the datasets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    features: Which to read (parts of nested ones as "objects/bbox"); all if None.
    file_format: Which to read of a dataset that is there in both.

  Raises:
    UserError: There is no such dataset, split, feature or file, or a file is damaged.
  """
  builder = _builder(dataset, data_dir, file_format)
  try:
    return TFDS(builder, split, features)
  except (UserError, OSError):
    raise
  except Exception as e:  # The library raises what it comes upon.
    raise UserError(_unreadable(dataset, data_dir, e)) from e


def stand_in(
  dataset: str, *, data_dir: str | None = None, features: tuple[str, ...] | None = None, **_
) -> absent.Absent | None:
  """Returns images and labels of a dataset that isn't here, for a plan; None where it is, or has other features."""
  if features is None or not set(features) <= {"image", "label"} or _is_here(dataset, data_dir):
    return None
  kinds = {"image": ((256, 256), "png"), "label": ((), "int64")}
  return absent.Absent({name: kinds[name] for name in features})


def _is_here(dataset, data_dir):
  inside = folder(data_dir) / dataset.partition(":")[0]
  places = (pathlib.Path(dataset).expanduser(), *inside.glob("*"))
  return any((place / "dataset_info.json").exists() for place in places)


class TFDS:
  """Examples as a dictionary of arrays: encoded images and texts as bytes, features of varying length as objects."""

  def __init__(self, builder: Any, split: str, features: tuple[str, ...] | None):
    self._instructions = _instructions(builder, split)
    self._ends = np.cumsum([i.take for i in self._instructions])
    self._parse = _Parser(builder.info.features, features)
    formats = {"array_record": _ArrayRecords, "tfrecord": _tfrecords}
    suffix = builder.info.file_format.file_suffix
    if suffix not in formats:
      raise UserError(
        f"dataset={builder.info.full_name!r} is stored as {suffix}, which has no random access here. "
        "Prepare it again with --file_format=array_record."
      )
    self._records = formats[suffix](builder, self._instructions)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def fetch(self, ids: Int64[np.ndarray, " batch"]) -> dict[str, np.ndarray]:
    """Returns the examples numbered `ids`, in that order; may be called from many threads."""
    records = self.records(ids)
    try:
      return self._parse(records)
    except Exception as e:  # Protocol buffers, NumPy and TFDS's own features each have theirs.
      where = self._instructions[0].filename
      raise UserError(damaged(where, f"its examples are not as features.json says ({_first_line(e)})")) from e

  def records(self, ids: Int64[np.ndarray, " batch"]) -> list[bytes]:
    """Returns the examples as they are stored, serialized `tf.train.Example`s."""
    if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
      raise IndexError(f"ids from {ids.min()} to {ids.max()} of {len(self)} examples")
    parts = np.searchsorted(self._ends, ids, side="right")
    records: list[bytes] = [b""] * len(ids)
    for part in np.unique(parts):
      instruction, where = self._instructions[part], np.flatnonzero(parts == part)
      positions = ids[where] - (self._ends[part] - instruction.take) + instruction.skip
      for i, record in zip(where, self._records.read(instruction.filename, positions)):
        records[i] = record
    return records


def prepared(data_dir: str | None = None) -> dict[str, str]:
  """Returns the names of the datasets in a folder, such as "glue/sst2:2.0.0", and what is in each."""
  root, found = folder(data_dir), {}
  for depth in ("*/*", "*/*/*"):
    for path in sorted(root.glob(f"{depth}/dataset_info.json")):
      *name, version = path.parent.parts[-1 - depth.count("/") :]
      try:
        info = json.loads(path.read_text())
        splits = [f"{s['name']} {sum(map(int, s['shardLengths'])):,}" for s in info.get("splits", [])]
        told = f"{info.get('fileFormat', '?')}; {', '.join(splits)}"
      except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        told = f"damaged: {path} can't be read"
      found[f"{'/'.join(name)}:{version}"] = told
  return found


def folder(data_dir: str | None = None) -> pathlib.Path:
  """Returns the folder of the datasets: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
  return pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _builder(dataset: str, data_dir: str | None, file_format: str | None) -> Any:
  import tensorflow_datasets as tfds

  try:
    if (pathlib.Path(dataset).expanduser() / "dataset_info.json").exists():
      return tfds.builder_from_directory(pathlib.Path(dataset).expanduser(), file_format=file_format)
    # From files alone: `tfds.builder` would run the dataset's own code, and may go to the network.
    return tfds.core.read_only_builder.builder_from_files(
      dataset, data_dir=os.fspath(folder(data_dir)), file_format=file_format
    )
  except tfds.core.registered.DatasetNotFoundError:
    found = prepared(data_dir)
    there = "\n".join(f"  {name} ({what})" for name, what in found.items()) or "  none"
    raise UserError(
      f"dataset={dataset!r} is not in {folder(data_dir)} (data_dir). "
      f"Prepared there:\n{there}\n"
      f"`bigjax data prepare tfds {dataset} --data_dir={folder(data_dir)}` downloads and prepares one of TFDS's; "
      "`bigjax data prepare images` and `files` make one from local files."
    ) from None
  except (ValueError, AttributeError) as e:  # A file format it hasn't got; a name that is none.
    raise UserError(f"dataset={dataset!r}: {_first_line(e)}") from None
  except Exception as e:  # The library raises what it comes upon.
    raise UserError(_unreadable(dataset, data_dir, e)) from e


def _unreadable(dataset, data_dir, error):
  return (
    f"dataset={dataset!r} in {folder(data_dir)} can't be read, its dataset_info.json or features.json may be damaged: "
    f"{_first_line(error)} Copy them again, or prepare the dataset again (`bigjax data prepare`)."
  )


def _instructions(builder: Any, split: str) -> list[Any]:
  """Returns which examples of which files, in order, make up `split`."""
  there = ", ".join(f"{name} ({info.num_examples:,})" for name, info in builder.info.splits.items())
  try:
    instructions = [i for i in builder.info.splits[split].file_instructions if i.take]
  except (ValueError, KeyError, AssertionError) as e:
    raise UserError(
      f"split={split!r} of {builder.info.full_name}: {_first_line(e)} There are {there}; parts are written as in "
      "'train[:80%]' or 'train[10:200]+test'."
    ) from None
  if not instructions:
    raise UserError(f"split={split!r} of {builder.info.full_name} has no examples. There are {there}.")
  for file in {i.filename for i in instructions}:
    if not os.path.exists(file):
      raise UserError(damaged(file, "it is missing"))
  return instructions


def _tfrecords(builder: Any, instructions: list[Any]) -> tfrecord.Files:
  used, lengths = {i.filename for i in instructions}, {}
  for info in builder.info.splits.values():
    files = dict(zip(map(os.fspath, info.filepaths), info.shard_lengths))
    lengths |= files if used & set(files) else {}
  return tfrecord.Files(lengths)


class _ArrayRecords:
  def __init__(self, builder, instructions):
    del builder, instructions
    self._open = functools.lru_cache(OPEN_FILES)(_array_record_reader)

  def read(self, filename: str, positions: np.ndarray) -> Sequence[bytes]:
    try:
      return self._open(filename).read(positions.tolist())
    except (RuntimeError, ValueError, IndexError) as e:
      raise UserError(damaged(filename, str(e).splitlines()[0])) from None


def _array_record_reader(filename: str) -> Any:
  from array_record.python import array_record_module

  # As TFDS opens them: for random access, reading ahead would be waste.
  return array_record_module.ArrayRecordReader(
    filename, options="readahead_buffer_size:0", file_reader_buffer_size=32768
  )


class _Parser:
  """Turns serialized `tf.train.Example`s into arrays with a leading axis for the batch.

  TFDS's own parser takes 100 microseconds an example; the kinds of features that nearly every dataset has, and that
  need no decoding, are read in 5.
  """

  def __init__(self, connector: Any, names: tuple[str, ...] | None):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import utils

    stored = utils.flatten_nest_dict(connector.get_serialized_info())
    decoded = utils.flatten_nest_dict(connector.get_tensor_info())
    for name in names or ():
      if name not in stored:
        raise UserError(f"features: there is no {name!r} in this dataset.{suggest(name, stored)}")
    leaves = dict(_leaves(connector))
    self._names = names or tuple(sorted(stored))
    stack = {name: _stacking(leaves.get(name), stored[name], decoded.get(name)) for name in self._names}
    self._stack = {name: how for name, how in stack.items() if how}
    self._slow = len(self._stack) < len(self._names)
    raw = {name: isinstance(leaves.get(name), tfds.features.Image) for name in stored}
    raw = {name: tfds.decode.SkipDecoding() if skip else None for name, skip in raw.items()}
    decoders = utils.pack_as_nest_dict(raw, connector.get_serialized_info())
    self._decode = lambda record: utils.flatten_nest_dict(connector.deserialize_example_np(record, decoders=decoders))

  def __call__(self, records: list[bytes]) -> dict[str, np.ndarray]:
    from tensorflow_datasets.proto import tf_example_pb2

    fields = [tf_example_pb2.Example.FromString(record).features.feature for record in records]
    slow = [self._decode(record) for record in records] if self._slow else []
    batch = {}
    for name in self._names:
      if name in self._stack:
        kind, stack = self._stack[name]
        batch[name] = stack([getattr(field[name], kind).value for field in fields])
      else:
        batch[name] = _objects([example[name] for example in slow])
    return batch


def _stacking(leaf: Any, stored: Any, decoded: Any) -> tuple[str, Callable[[list], np.ndarray]] | None:
  """Returns where the values of a feature are in an Example, and what makes an array of them for a batch.

  None is for features that TFDS has to decode.
  """
  import tensorflow_datasets as tfds

  shape, dtype = stored.shape, stored.np_dtype
  if isinstance(leaf, tfds.features.Image) and leaf.np_dtype == np.uint8:
    return "bytes_list", lambda values: _objects([v[0] for v in values])
  # Only the attribute says it, and it is private; without it the feature is read slowly.
  if getattr(leaf, "_encoding", None) == tfds.features.Encoding.BYTES and None not in leaf.shape:
    return "bytes_list", lambda values: np.frombuffer(b"".join(v[0] for v in values), leaf.np_dtype).reshape(
      len(values), *leaf.shape
    )
  if stored != decoded or list(shape).count(None) > 1:
    return None
  if dtype == np.object_:
    of_one = (lambda v: np.array(list(v), object)) if shape else (lambda v: v[0])
    return "bytes_list", lambda values: _objects([of_one(v) for v in values])
  kind = "float_list" if np.issubdtype(dtype, np.floating) else "int64_list"
  if None in shape:
    row = tuple(0 if n is None else n for n in shape), tuple(-1 if n is None else n for n in shape)
    return kind, lambda values: _objects([np.array(v, dtype).reshape(row[len(v) > 0]) for v in values])
  if not shape:
    return kind, lambda values: np.array([v[0] for v in values], dtype)
  return kind, lambda values: np.array([list(v) for v in values], dtype).reshape(len(values), *shape)


def _objects(values: list) -> np.ndarray:
  made = np.empty(len(values), object)
  for i, value in enumerate(values):  # All at once, NumPy would make one array of arrays of one shape.
    made[i] = value
  return made


def _leaves(connector: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  import tensorflow_datasets as tfds

  for name, part in connector.items():
    if isinstance(part, tfds.features.FeaturesDict):
      yield from _leaves(part, f"{prefix}{name}/")
    else:
      yield prefix + name, part


def _first_line(error: Exception) -> str:
  lines = str(error).strip("'\"").splitlines()
  return lines[0].strip()[:300] if lines else type(error).__name__
