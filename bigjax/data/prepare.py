"""Datasets on disk in TFDS's format, from TFDS itself, from a folder of images, or from any source.

What is made here is read by `tfds.load` and by `bigjax/data/tfds.py` alike. Examples are shuffled while they are
written, by a hash of what identifies them, so that a slice such as `train[:10%]` is a fair sample and the same files
give the same dataset.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from bigjax.data import tfds as tfds_source
from bigjax.errors import UserError, suggest

FileFormat = Literal["array_record", "tfrecord"]

_IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".bmp")  # What `decode` reads.
_OTHER_IMAGES = (".webp", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".ppm", ".pgm", ".svg")


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A dataset that is on disk now: its name with its version, and what it holds."""

  dataset: str
  data_dir: str
  file_format: str
  splits: dict[str, int]
  features: dict[str, str]
  ignored: tuple[str, ...] = ()


def from_tfds(
  dataset: str,
  *,
  data_dir: str | None = None,
  file_format: FileFormat = "array_record",
  manual_dir: str | None = None,
) -> Prepared:
  """Downloads one of TFDS's datasets and prepares it.

  Args:
    dataset: TFDS's name, such as "mnist", "glue/sst2" or "imagenet2012:5.1.0".
    data_dir: Folder of the datasets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    file_format: How examples are stored.
    manual_dir: Where the files are that TFDS may not download, such as ImageNet's.

  Raises:
    UserError: There is no such dataset, or it can't be downloaded.
  """
  tfds = _tfds()
  try:
    builder = tfds.builder(dataset, data_dir=_writable(data_dir), file_format=file_format)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(download_config=config, file_format=file_format)
  except tfds.core.registered.DatasetNotFoundError:
    known = tfds.list_builders(
      with_community_datasets=False
    )  # For those it would ask the internet, minutes without one.
    raise UserError(
      f"TFDS has no dataset {dataset!r}.{_near(dataset, known)} All of them: "
      "https://www.tensorflow.org/datasets/catalog"
    ) from None
  except AssertionError as e:  # Where files have to be fetched by hand, TFDS says which and how.
    raise UserError(f"{dataset}: {e}\nIf you have the files, name their folder by --manual_dir.") from None
  except (OSError, tfds.download.DownloadError) as e:
    raise UserError(
      f"{dataset} can't be downloaded: {str(e).splitlines()[0][:300]}\n"
      "Prepare it on a machine that reaches the internet and copy its folder into data_dir; or, if you have the data "
      "in files, use `bigjax data prepare images` or `files`."
    ) from None
  return _described(builder)


def from_images(
  folder: str,
  *,
  dataset: str,
  test: float = 0.0,
  data_dir: str | None = None,
  file_format: FileFormat = "array_record",
  version: str = "1.0.0",
) -> Prepared:
  """Makes a dataset of `image` and `label` from a folder of folders of images, one for each class.

  Above the classes may be a folder for each split: `train/cat/1.jpg`, `test/cat/2.jpg`. Files are stored as they are,
  after a look at whether they are whole. Labels are numbered in the order of the classes' names.

  Args:
    folder: Holds the folders.
    dataset: Name of the dataset to make: small letters, digits and _.
    test: Part of each class that becomes the split `test`, where the folders don't say.
    data_dir: Folder of the datasets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    file_format: How examples are stored.
    version: Of the dataset.

  Raises:
    UserError: The folders are not laid out so, or a file is damaged or of a kind that can't be decoded.
  """
  root = pathlib.Path(folder).expanduser()
  if not root.is_dir():
    raise UserError(f"there is no folder {folder}.")
  files, ignored = _image_files(root)
  depths = {len(path.parts) for path in files}
  if depths == {2}:
    splits = _held_out(files, test)
  elif depths == {3}:
    if test:
      raise UserError(
        f"{folder} has splits already ({', '.join(sorted({p.parts[0] for p in files}))}): leave test out."
      )
    splits = {name: [p for p in files if p.parts[0] == name] for name in sorted({p.parts[0] for p in files})}
  else:
    raise UserError(
      f"{folder} holds {len(files)} images in folders {sorted(d - 1 for d in depths)} deep. Lay them out as "
      "CLASS/1.jpg, or as train/CLASS/1.jpg and test/CLASS/1.jpg."
    )
  _check_whole(root, files)
  classes = sorted({path.parts[-2] for path in files})
  tfds = _tfds()
  features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=classes)}

  def examples(paths):
    for path in paths:
      yield path.as_posix(), {"image": os.fspath(root / path), "label": path.parts[-2]}

  made = _write(dataset, version, features, {k: examples(v) for k, v in splits.items()}, data_dir, file_format)
  return dataclasses.replace(made, ignored=tuple(p.as_posix() for p in ignored))


def from_sources(
  sources: Mapping[str, Any],
  *,
  dataset: str,
  data_dir: str | None = None,
  file_format: FileFormat = "array_record",
  version: str = "1.0.0",
) -> Prepared:
  """Makes a dataset of the examples of sources, one for each split, each with `len` and `fetch`.

  Numbers and arrays keep their types (but float64 becomes float32), and are stored so that reading needs no decoding.
  """
  tfds = _tfds()
  kinds = {split: _features(tfds, source) for split, source in sources.items()}
  first = next(iter(kinds))
  for split, features in kinds.items():
    one, other = (
      {k: (_told(f), getattr(f, "names", None)) for k, f in kind.items()} for kind in (features, kinds[first])
    )
    if one != other:
      name = next(k for k in sorted({*one, *other}) if one.get(k) != other.get(k))
      raise UserError(
        f"the splits {first} and {split} differ in {name!r}: give them the same columns, types and classes."
      )
  return _write(dataset, version, kinds[first], {k: _examples(s) for k, s in sources.items()}, data_dir, file_format)


def _tfds() -> Any:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  import tensorflow_datasets as tfds

  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  return tfds


def _writable(data_dir: str | None) -> str:
  folder = tfds_source.folder(data_dir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"data_dir={os.fspath(folder)!r} can't be made: {e.strerror}. Name another folder.") from None
  if not os.access(folder, os.W_OK | os.X_OK):
    raise UserError(f"data_dir={os.fspath(folder)!r} can't be written to. Name another folder.")
  return os.fspath(folder)


def _image_files(root: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """Returns the images below `root` and what else is there, both as sorted relative paths; hidden files don't count."""
  found = [p.relative_to(root) for p in sorted(root.rglob("*")) if p.is_file()]
  found = [p for p in found if not any(part.startswith(".") for part in p.parts)]
  images = [p for p in found if p.suffix.lower() in _IMAGES]
  other = [p for p in found if p.suffix.lower() in _OTHER_IMAGES]
  if other:
    raise UserError(
      f"{root / other[0]} and {len(other) - 1} more are of a kind that `decode` can't read: make them PNG or JPEG."
    )
  if not images:
    raise UserError(f"{root} holds no images ({', '.join(_IMAGES)}).")
  return images, [p for p in found if p.suffix.lower() not in _IMAGES]


def _held_out(files: list[pathlib.Path], test: float) -> dict[str, list[pathlib.Path]]:
  """Splits each class by a hash of the file names: the same files, the same split."""
  if not 0 <= test < 1:
    raise UserError(f"test={test} is not a part of the images, from 0 to less than 1.")
  if not test:
    return {"train": files}
  splits: dict[str, list[pathlib.Path]] = {"train": [], "test": []}
  for name in sorted({path.parts[0] for path in files}):
    of_class = [path for path in files if path.parts[0] == name]
    of_class.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    count = round(test * len(of_class))
    splits["test"] += of_class[:count]
    splits["train"] += of_class[count:]
  empty = [name for name, paths in splits.items() if not paths]
  if empty:
    raise UserError(f"test={test} leaves no images for {empty[0]}.")
  return splits


def _check_whole(root: pathlib.Path, files: Iterable[pathlib.Path]) -> None:
  """Raises for images that are cut short or none at all: better here than a day into training."""
  damaged = [path for path in files if not _whole(root / path)]
  if damaged:
    shown = "\n".join(f"  {root / path}" for path in damaged[:20])
    more = f"\n  and {len(damaged) - 20} more" if len(damaged) > 20 else ""
    raise UserError(
      f"{len(damaged)} of the images are cut short or damaged. Get them again, or take them out of the folder:\n"
      f"{shown}{more}"
    )


def _whole(path: pathlib.Path) -> bool:
  with open(path, "rb") as file:
    head = file.read(8)
    file.seek(max(0, os.path.getsize(path) - 16))
    tail = file.read().rstrip(b"\0")
  # The end mark of a whole file. A few have something after it; these are decoded, which takes a hundred times as long.
  if (head.startswith(b"\xff\xd8\xff") and tail.endswith(b"\xff\xd9")) or (
    head == b"\x89PNG\r\n\x1a\n" and tail.endswith(b"IEND\xaeB`\x82")
  ):
    return True
  from PIL import Image

  try:
    with Image.open(path) as image:
      image.verify()  # The checksums of a PNG, nothing of a JPEG;
    with Image.open(path) as image:
      image.load()  # the pixels of either.
  except (OSError, SyntaxError, ValueError):
    return False
  return True


def _features(tfds: Any, source: Any) -> dict[str, Any]:
  """Returns the kinds of features that hold the examples of a source, as its first example shows them."""
  features = {}
  for name, values in source.fetch(np.arange(1)).items():
    shape, dtype = values.shape[1:], np.float32 if values.dtype == np.float64 else values.dtype.type
    if name == "label" and not shape and getattr(source, "classes", None):
      features[name] = tfds.features.ClassLabel(names=source.classes)
    elif values.dtype.kind in "OSU":
      features[name] = tfds.features.Text()
    elif values.dtype.kind not in "biuf":
      raise UserError(f"the feature {name!r} is of type {values.dtype}, which a dataset can't hold.")
    elif shape:  # As bytes: a uint8 image else takes twice its size, and many times as long to read.
      features[name] = tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES)
    else:
      features[name] = tfds.features.Scalar(dtype=dtype)
  return features


def _examples(source: Any) -> Iterator[tuple[int, dict[str, Any]]]:
  for start in range(0, len(source), 1024):
    ids = np.arange(start, min(start + 1024, len(source)))
    batch = source.fetch(ids)
    batch = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in batch.items()}
    for i, example in zip(ids.tolist(), zip(*batch.values())):
      yield i, dict(zip(batch, example))


def _write(
  dataset: str,
  version: str,
  features: dict[str, Any],
  splits: Mapping[str, Iterable],
  data_dir: str | None,
  file_format: FileFormat,
) -> Prepared:
  if not re.fullmatch(r"[a-z][a-z0-9_]*", dataset):
    raise UserError(f"{dataset!r} can't be the name of a dataset: small letters, digits and _, a letter first.")
  for name in splits:
    if not re.fullmatch(r"[a-zA-Z]\w*", name) or name == "all":
      raise UserError(f"{name!r} can't be the name of a split: letters, digits, _, a letter first, not 'all'.")
  if not re.fullmatch(r"\d+\.\d+\.\d+", version):
    raise UserError(f"version={version!r} must be three numbers, such as 1.0.0.")
  tfds, folder = _tfds(), _writable(data_dir)
  place = pathlib.Path(folder) / dataset / version
  if place.exists():
    raise UserError(f"{place} is there already. Choose another --version or --name, or delete that folder first.")
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells of a download, of which there is none.
    builder = tfds.dataset_builders.store_as_tfds_dataset(
      name=dataset,
      version=version,
      features=tfds.features.FeaturesDict(features),
      split_datasets=splits,
      data_dir=folder,
      file_format=file_format,
      description="Made by `bigjax data prepare` from local files.",
    )
  return _described(builder)


def _described(builder: Any) -> Prepared:
  info = builder.info
  name = "/".join(filter(None, (builder.name, builder.builder_config and builder.builder_config.name)))
  return Prepared(
    dataset=f"{name}:{info.version}",
    data_dir=os.fspath(pathlib.Path(builder.data_dir).parents[name.count("/") + 1]),
    file_format=info.file_format.file_suffix,
    splits={k: v.num_examples for k, v in info.splits.items()},
    features={k: _told(f) for k, f in info.features.items()},
  )


def _told(feature: Any) -> str:
  return " ".join(repr(feature).split())


def _near(dataset: str, known: Iterable[str]) -> str:
  near = suggest(re.split("[/:]", dataset)[0], known)
  return near if near.startswith(" Did") else ""
