"""Ops on any feature: which to keep, under what name, of what type and shape.

All of them are array ops, so none needs TensorFlow.
"""

from typing import Literal

import numpy as np

from bigjax.data.ops import array_op, feature
from bigjax.errors import UserError


@array_op(structural=True)
def keep(*names: str):
  """Keeps the features named, and `mask`, and drops every other: `keep("image", "label")`."""

  def apply(batch, keys):
    del keys
    kept = {name: feature(batch, name) for name in names}
    return {"mask": batch["mask"], **kept} if "mask" in batch else kept

  return apply


@array_op(structural=True)
def drop(*names: str):
  """Drops the features named: `drop("file_name")`."""

  def apply(batch, keys):
    del keys
    for name in names:
      feature(batch, name)
    return {k: v for k, v in batch.items() if k not in names}

  return apply


@array_op(structural=True)
def rename(*old_new: str, **names: str):
  """Gives features other names: `rename("img", "image")` or `rename(img="image", fine_label="label")`."""
  renames = _renames(old_new) | names
  if not renames:
    raise UserError('give the old name and the new: rename("img", "image").')

  def apply(batch, keys):
    del keys
    for old, new in renames.items():
      feature(batch, old)
      if new in batch and new not in renames:
        raise UserError(f"there is a feature {new!r} already; drop({new!r}) before.")
    return {renames.get(k, k): v for k, v in batch.items()}

  return apply


@array_op(structural=True)
def copy(old: str, new: str):
  """Has the feature `old` under a second name, `new`, too: `copy("image", "original")`."""

  def apply(batch, keys):
    del keys
    return {**batch, new: feature(batch, old)}

  return apply


@array_op
def cast(
  key: str,
  dtype: Literal["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32"],
):
  """Converts a feature to another type: `cast("label", "int32")`."""

  def apply(batch, keys):
    del keys
    try:
      return {**batch, key: np.asarray(feature(batch, key)).astype(dtype)}
    except (TypeError, ValueError) as e:
      raise UserError(f"{key!r} cannot become {dtype}: {e}.") from None

  return apply


@array_op
def symlog(key: str):
  """Tames long tails: sign(x) log(1 + |x|), which is x near 0 (https://arxiv.org/abs/2301.04104, equation 9)."""

  def apply(batch, keys):
    del keys
    x = np.asarray(feature(batch, key), np.float32)
    return {**batch, key: np.sign(x) * np.log1p(np.abs(x))}

  return apply


@array_op
def reshape(key: str, shape: tuple[int, ...]):
  """Gives each example's feature another shape, one size of which may be -1: `reshape("image", (28, 28, 1))`."""

  def apply(batch, keys):
    del keys
    values = feature(batch, key)
    try:
      return {**batch, key: values.reshape(len(values), *shape)}
    except ValueError:
      raise UserError(f"{key!r} has shape {values.shape[1:]}, which does not fill {shape}.") from None

  return apply


@array_op
def flatten(key: str = "image"):
  """Makes each example's feature one row of numbers: an image of [28, 28, 1] becomes [784]."""

  def apply(batch, keys):
    del keys
    values = feature(batch, key)
    return {**batch, key: values.reshape(len(values), int(np.prod(values.shape[1:])))}

  return apply


@array_op
def pad_to(key: str, length: int, value: float = 0.0):
  """Makes features of varying length, such as boxes, one array: each cut or filled up with `value` to `length`.

  Put it first, or behind others that work on batches: TensorFlow's ops take no features of varying length.
  """

  def apply(batch, keys):
    del keys
    values = feature(batch, key)
    rows = [np.asarray(row) for row in values]
    if any(row.ndim == 0 or row.dtype.kind not in "biuf" for row in rows):
      raise UserError(f"{key!r} is not a feature of numbers of varying length.")
    if not rows:
      return batch
    padded = np.full((len(rows), length, *rows[0].shape[1:]), value, rows[0].dtype)
    for i, row in enumerate(rows):
      padded[i, : min(len(row), length)] = row[:length]
    return {**batch, key: padded}

  return apply


@array_op
def one_hot(num_classes: int, key: str = "label"):
  """Turns class numbers [B, ...] into float32 [B, ..., num_classes] with a one at the class."""
  if num_classes < 1:
    raise UserError("num_classes must be 1 or more.")
  classes = np.eye(num_classes, dtype=np.float32)

  def apply(batch, keys):
    del keys
    labels = feature(batch, key)
    if labels.dtype.kind not in "iu":
      raise UserError(f"{key!r} is {labels.dtype}, not whole numbers of classes. Is it one-hot already?")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
      raise UserError(
        f"{key!r} {wrong[0]} is not one of the classes 0 to {num_classes - 1}. Correct num_classes or the data."
      )
    return {**batch, key: classes[labels]}

  return apply


def _renames(names: tuple[str, ...]) -> dict[str, str]:
  if len(names) % 2:
    raise UserError(f"{names[-1]!r} has no new name: give pairs of an old name and a new.")
  return dict(zip(names[::2], names[1::2]))
