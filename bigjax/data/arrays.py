"""Examples from local files of numbers: npz, npy, IDX, CSV, parquet.

The columns of a table become one feature, `x` or what it is named; the arrays of the other formats are features as
they are. All of it is held in memory (an .npy file is mapped), so that a batch is one gather.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from bigjax.data import absent, formats, splits
from bigjax.errors import UserError, shown, suggest


@dataclasses.dataclass(frozen=True)
class Arrays:
  """A split of examples in memory."""

  features: Mapping[str, np.ndarray]
  rows: np.ndarray | None  # Which rows of the features make up the split; None if all.
  classes: tuple[str, ...] | None  # Names of the labels, if the file has them.

  def __len__(self) -> int:
    return len(next(iter(self.features.values()))) if self.rows is None else len(self.rows)

  def fetch(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    rows = ids if self.rows is None else self.rows[ids]
    batch = {name: values[rows] for name, values in self.features.items()}
    return {name: v.astype(np.float32) if v.dtype == np.float64 else v for name, v in batch.items()}


def make(
  path: str | tuple[str, ...],
  *,
  split: str = "train",
  shuffle_seed: int | None = None,
  columns: tuple[str | int, ...] | None = None,
  drop: tuple[str | int, ...] = (),
  label: str | int | None = None,
  target: str | int | None = None,
  feature: str | None = None,
  shape: tuple[int, ...] | None = None,
  standardize: str | None = None,
  num_classes: int | None = None,
  header: formats.Header = "auto",
  delimiter: str | None = None,
  hint: str = "",
) -> Arrays:
  """Reads examples from files; several files are read side by side, such as images and their labels.

  Columns and arrays are named by their names in the file or numbers, from 0 or, backwards, from -1. An array of an IDX
  file is called `image` or `label`, that of an .npy file after the file.

  Args:
    path: The file or files; `package:NAME/FILE` is a file inside an installed Python package.
    split: All examples (`train`) or some: `[:80%]`, `[100:]`, `fold(0,5)`, `not_fold(0,5)`.
    shuffle_seed: Cuts splits out of this permutation of the examples instead of their order in the file.
    columns: What to take; all but label, target and `drop` if None.
    drop: What to leave out.
    label: Where the class is, given as `label` int32; names of classes are numbered in alphabetical order. What is
      called `label` needs no telling.
    target: Where the number to predict is, given as `target` float32. What is called `target` needs no telling.
    feature: What the columns, or the one array there is, are called in a batch; `x` for columns if None.
    shape: The shape of one example of this feature, such as (8, 8, 1).
    standardize: The split whose means and deviations the feature is standardized by; name that of training, also to
      evaluate.
    num_classes: Checks that labels are below this.
    header: The first line of a CSV: `names` of columns, `counts` (scikit-learn's: rows, columns, names of classes),
      `none` if it has values; `auto` looks.
    delimiter: Between the cells of a CSV; a comma, or for .tsv a tab, if None.
    hint: Where the file can be had, for the error when it isn't there.
  """
  paths = (path,) if isinstance(path, str) else path
  fields = formats.unique_fields([formats.open_file(formats.locate(p, hint), header, delimiter) for p in paths])
  label, target = _answer("label", label, fields, columns), _answer("target", target, fields, columns)
  left_out = {_find(name, fields, "drop") for name in drop} | {label, target}
  taken = (
    [n for n in fields if n not in left_out] if columns is None else [_find(c, fields, "columns") for c in columns]
  )
  found = _read(fields, [*taken, *filter(None, (label, target))])
  features, main = _inputs(found, taken, fields, feature)
  if shape is not None:
    features[main] = _shaped(_only(features, main, "shape"), shape)
  classes = None
  if label is not None:
    features["label"], classes = _labels(found[label], fields[label][0], num_classes)
  if target is not None:
    features["target"] = _numbers(found[target], target).astype(np.float32)
  sizes = {name: len(values) for name, values in features.items()}
  if len(set(sizes.values())) != 1:
    raise UserError(f"path: {', '.join(paths)} should have as many examples each, not {sizes}.")
  size = {"train": next(iter(sizes.values()))}
  if standardize is not None:
    rows = splits.parse(standardize, size, shuffle_seed)[1].rows()
    features[main] = _standardized(_only(features, main, "standardize"), rows)
  rows = splits.parse(split, size, shuffle_seed)[1].rows()
  if isinstance(rows, slice):
    return Arrays({name: values[rows] for name, values in features.items()}, None, classes)
  return Arrays(features, rows, classes)


def stand_in(
  path: str | tuple[str, ...], *, shape: tuple[int, ...] | None = None, num_classes: int | None = None, **_
) -> absent.Absent | None:
  """Returns images and labels of the same shapes where IDX files aren't here, for a plan; None where that isn't so."""
  paths = (path,) if isinstance(path, str) else path
  if shape is None or num_classes is None or not all("-ubyte" in p for p in paths) or not absent.files(paths):
    return None
  return absent.Absent({"image": (shape, "uint8"), "label": ((), "int32")})


def _answer(role, given, fields, columns):
  """Returns the field of the label or the target; without being told, the one called so."""
  if given is not None:
    return _find(given, fields, role)
  return role if role in fields and role not in (columns or ()) else None


def _find(name, fields, where):
  """Returns the name of the field that a name or a number stands for."""
  names = list(fields)
  if isinstance(name, int):
    if not -len(names) <= name < len(names):
      raise UserError(f"{where}: there is no column {name}; there are {len(names)}.")
    return names[name]
  if name not in fields:
    raise UserError(f"{where}: there is no {name!r} in the file.{suggest(name, names)}")
  return name


def _read(fields, names):
  found = {}
  for file in {id(file): file for file, _ in fields.values()}.values():
    wanted = [name for name in names if fields[name][0] is file]
    if wanted:
      found |= dict(zip(wanted, file.read([fields[name][1] for name in wanted])))
  return found


def _inputs(found, taken, fields, feature):
  """Returns the features that aren't the answer, and which of them is meant by `feature`, None if that isn't clear."""
  columns = [name for name in taken if fields[name][0].table]
  features = {name: found[name] for name in taken if name not in columns}
  if columns:
    main = feature or "x"
    values = np.stack([_numbers(found[name], name) for name in columns], axis=1)
    return {main: values.astype(np.float32), **features}, main
  if feature is not None and len(features) != 1:
    raise UserError(
      f"feature={feature!r} is the name for one array; there are {', '.join(features) or 'none'}: see columns."
    )
  if len(features) != 1:
    return features, None
  ((name, values),) = features.items()
  return {feature or name: values}, feature or name


def _only(features, main, where):
  if main is None:
    raise UserError(f"{where} is for one feature; there are {', '.join(features) or 'none'}: choose one by columns.")
  return features[main]


def _shaped(values, shape):
  if math.prod(values.shape[1:]) != math.prod(shape):
    raise UserError(f"shape={shape} takes {math.prod(shape)} values; an example has {math.prod(values.shape[1:])}.")
  return values.reshape(len(values), *shape)


def _numbers(values, name):
  if values.dtype.kind not in "biuf":
    text = shown(str(values[0]))
    raise UserError(f"column {name!r} holds text, such as {text}: add it to drop, or make numbers of it.")
  return values


def _labels(values, file, num_classes):
  """Returns labels as int32, or as they are if an example has several, and the names of the classes, if known."""
  if values.ndim > 1:
    return values, file.classes
  names, shown = file.classes, "{:g}".format
  if values.dtype.kind in "OSU":
    texts = [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    unique, values = np.unique(texts, return_inverse=True)
    names, shown = tuple(unique.tolist()), lambda value: repr(names[value])
  labels = values.astype(np.int32)
  limit = math.inf if num_classes is None else num_classes
  wrong = np.flatnonzero((labels != values) | (labels < 0) | (labels >= limit))
  if wrong.size:
    row = int(wrong[0])
    known = (
      "whole number from 0 on" if num_classes is None else f"class from 0 to {num_classes - 1}, as num_classes says"
    )
    raise UserError(f"{file.path}: the label {shown(values[row])} in row {row} (counted from 0) is no {known}.")
  return labels, names


def _standardized(values, rows):
  """Returns float32 with mean 0 and deviation 1 over `rows`; what is constant there becomes 0."""
  mean, deviation = values[rows].mean(0, dtype=np.float64), values[rows].std(0, dtype=np.float64)
  return ((values - mean) / np.where(deviation == 0, 1, deviation)).astype(np.float32)
