"""Prepared TFDS datasets in both file formats: random access equals what TFDS itself reads, and needs no TensorFlow."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds_library  # noqa: TID253

from bigjax.data import tfds
from bigjax.errors import UserError

FORMATS = ("array_record", "tfrecord")
SPLITS = (
  "train",
  "test",
  "train[:80%]",
  "train[10:35]+test",
  "test[-3:]+train[90%:]",
  "train[:10]+train[20:30]",
  "all",
)


def examples(split, count):
  rng = np.random.default_rng(len(split))
  for i in range(count):
    yield (
      f"{split}-{i}",
      {
        "image": rng.integers(256, size=(5, 6, 3)).astype(np.uint8),
        "label": i % 4,
        "weight": rng.normal(),
        "vector": rng.normal(size=(3, 2)).astype(np.float32),
        "raw": rng.integers(256, size=(4, 4)).astype(np.uint8),
        "boxes": np.sort(rng.uniform(size=(i % 3, 4)), -1).astype(np.float32),
        "nested": {"flag": i % 2 == 0, "text": f"{split} {i} é", "words": ["a"] * (i % 3)},
        "small": [rng.integers(256, size=(2, 2, 3)).astype(np.uint8)] * (i % 2),
      },
    )


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """The same dataset in both formats, its training split in three files."""
  root = tmp_path_factory.mktemp("tfds")
  features = tfds_library.features
  for file_format in FORMATS:
    connector = features.FeaturesDict(
      {
        "image": features.Image(shape=(5, 6, 3), encoding_format="png"),
        "label": features.ClassLabel(names=["a", "b", "c", "d"]),
        "weight": np.float32,
        "vector": features.Tensor(shape=(3, 2), dtype=np.float32),
        "raw": features.Tensor(shape=(4, 4), dtype=np.uint8, encoding="bytes"),
        "boxes": features.Sequence(features.BBoxFeature()),
        "nested": {"flag": np.bool_, "text": features.Text(), "words": features.Sequence(features.Text())},
        "small": features.Sequence(features.Image(shape=(2, 2, 3), encoding_format="png")),
      }
    )
    builder = tfds_library.dataset_builders.AdhocBuilder(
      name=f"toy_{file_format}",
      version="1.2.0",
      features=connector,
      split_datasets={"train": list(examples("train", 50)), "test": list(examples("test", 7))},
      data_dir=os.fspath(root),
      file_format=file_format,
    )
    builder.download_and_prepare(download_config=tfds_library.download.DownloadConfig(num_shards=3))
  return os.fspath(root)


@pytest.fixture(scope="session")
def expected(data_dir):
  """What tfds.load reads of each split, file after file."""
  config = tfds_library.ReadConfig(interleave_cycle_length=1)
  decoders = {"image": tfds_library.decode.SkipDecoding()}
  load = tfds_library.load
  return {
    split: list(
      load(
        "toy_tfrecord", split=split, data_dir=data_dir, download=False, read_config=config, decoders=decoders
      ).as_numpy_iterator()
    )
    for split in SPLITS
  }


def assert_same(batch, row, example):
  for name in ("image", "label", "weight"):
    assert batch[name][row] == example[name]
  for name in ("vector", "raw", "boxes"):
    np.testing.assert_array_equal(batch[name][row], example[name])
    assert batch[name][row].dtype == example[name].dtype
  for name in ("flag", "text"):
    assert batch[f"nested/{name}"][row] == example["nested"][name]
  assert list(batch["nested/words"][row]) == list(example["nested"]["words"])
  np.testing.assert_array_equal(np.reshape(batch["small"][row], (-1, 2, 2, 3)), example["small"])


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_slice_is_what_tfds_reads_in_any_order(data_dir, expected, file_format, split):
  source = tfds.make(f"toy_{file_format}", split=split, data_dir=data_dir)
  assert len(source) == len(expected[split])
  ids = np.random.default_rng(0).permutation(len(source)).astype(np.int64)
  ids = np.concatenate([ids, ids[:2]])
  batch = source.fetch(ids)
  for row, i in enumerate(ids):
    assert_same(batch, row, expected[split][i])


@pytest.mark.parametrize("file_format", FORMATS)
def test_types_are_ready_for_ops_and_devices(data_dir, file_format):
  batch = tfds.make(f"toy_{file_format}", split="train", data_dir=data_dir).fetch(np.arange(3))
  assert list(batch) == sorted(batch)
  assert {name: (v.dtype.name, v.shape) for name, v in batch.items()} == {
    "boxes": ("object", (3,)),
    "image": ("object", (3,)),
    "label": ("int64", (3,)),
    "nested/flag": ("bool", (3,)),
    "nested/text": ("object", (3,)),
    "nested/words": ("object", (3,)),
    "raw": ("uint8", (3, 4, 4)),
    "small": ("object", (3,)),
    "vector": ("float32", (3, 3, 2)),
    "weight": ("float32", (3,)),
  }
  assert batch["image"][0].startswith(b"\x89PNG")


def test_only_the_features_named_are_read(data_dir):
  source = tfds.make("toy_tfrecord", split="train", data_dir=data_dir, features=("image", "nested/flag"))
  assert set(source.fetch(np.arange(2))) == {"image", "nested/flag"}
  with pytest.raises(UserError, match="features: there is no 'imag' in this dataset. Did you mean 'image'"):
    tfds.make("toy_tfrecord", split="train", data_dir=data_dir, features=("imag",))


def test_a_dataset_is_found_by_name_version_folder_and_environment(data_dir, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
  for dataset in ("toy_tfrecord", "toy_tfrecord:1.2.0", "toy_tfrecord:1.*.*", f"{data_dir}/toy_tfrecord/1.2.0"):
    assert len(tfds.make(dataset, split="train")) == 50


def test_reading_needs_no_tensorflow(data_dir):
  script = f"""
import sys, numpy as np
from bigjax.data import tfds
for name in {FORMATS}:
  tfds.make("toy_" + name, split="train[:10%]", data_dir={data_dir!r}).fetch(np.arange(3))
assert "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


@pytest.fixture
def copied(data_dir, tmp_path):
  """A copy that a test may damage, with the cache folder in `tmp_path` too."""
  shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns(".tfrecord*"))
  return tmp_path / "data"


def shards(folder, name="tfrecord"):
  return sorted((folder / f"toy_{name}/1.2.0").glob("*-train.*"))


def test_the_index_is_made_once_and_again_when_a_file_has_changed(copied, monkeypatch):
  tfds.make("toy_tfrecord", split="train", data_dir=os.fspath(copied))
  (index,) = (copied / "toy_tfrecord/1.2.0").glob(".tfrecord-*.npz")
  made = index.stat().st_mtime_ns
  before = tfds.make("toy_tfrecord", split="train", data_dir=os.fspath(copied)).records(np.arange(50))
  assert index.stat().st_mtime_ns == made
  # The same file names, other records: all of the first file's data one byte longer would not be found again.
  shard = shards(copied)[0]
  data = shard.read_bytes()
  size = int.from_bytes(data[:8], "little")
  shard.write_bytes(data[16 + size :] + data[: 16 + size])
  os.utime(shard, ns=(1, 1))
  after = tfds.make("toy_tfrecord", split="train", data_dir=os.fspath(copied)).records(np.arange(50))
  assert index.stat().st_mtime_ns != made
  first = len(before) - after[::-1].index(before[0]) - 1
  assert after[:first] == before[1 : first + 1] and after[first + 1 :] == before[first + 1 :]


def test_the_index_goes_to_the_users_cache_where_the_data_cannot_be_written(copied, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))
  replace = os.replace

  def refusing(source, target):
    if os.fspath(target).startswith(os.fspath(copied)):
      raise PermissionError(13, "read-only")
    replace(source, target)

  monkeypatch.setattr(os, "replace", refusing)  # This test may run as root, whom no folder refuses.
  source = tfds.make("toy_tfrecord", split="test", data_dir=os.fspath(copied))
  assert len(list((tmp_path / "cache/bigjax/tfrecord").iterdir())) == 1
  again = tfds.make("toy_tfrecord", split="test", data_dir=os.fspath(copied))
  assert again.records(np.arange(7)) == source.records(np.arange(7))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_missing_or_shortened_file_is_an_error_that_names_it(copied, file_format):
  victim = shards(copied, file_format)[1]
  victim.write_bytes(victim.read_bytes()[:-100])
  with pytest.raises(UserError, match=rf"{victim.name} is damaged.*Copy it again, or prepare"):
    tfds.make(f"toy_{file_format}", split="train", data_dir=os.fspath(copied)).fetch(np.arange(50))
  victim.unlink()
  with pytest.raises(UserError, match=rf"{victim.name} is damaged: it is missing"):
    tfds.make(f"toy_{file_format}", split="train", data_dir=os.fspath(copied))


@pytest.mark.parametrize("place", [9, 12, 40, -1])  # The length's checksum, the data, their checksum.
def test_a_flipped_bit_of_a_tfrecord_is_found_by_its_checksums(copied, place):
  victim = shards(copied)[0]
  data = bytearray(victim.read_bytes())
  length = int.from_bytes(data[:8], "little")
  data[place if place > 0 else length + 16 + place] ^= 4
  victim.write_bytes(data)
  source = tfds.make("toy_tfrecord", split="train", data_dir=os.fspath(copied))
  with pytest.raises(UserError, match=rf"{victim.name} is damaged: the record at byte 0 is not as its checksums say"):
    source.fetch(np.arange(50))
  assert len(source.fetch(np.arange(1, 50))["label"]) == 49


def test_a_missing_dataset_says_where_it_was_looked_for_what_is_there_and_what_to_run(data_dir):
  with pytest.raises(UserError) as error:
    tfds.make("mnist", split="train", data_dir=data_dir)
  assert f"dataset='mnist' is not in {data_dir} (data_dir)" in str(error.value)
  assert "toy_array_record:1.2.0 (array_record; train 50, test 7)" in str(error.value)
  assert f"bigjax data prepare tfds mnist --data_dir={data_dir}" in str(error.value)


@pytest.mark.parametrize(
  ("split", "message"),
  [
    ("trian", "Unknown split 'trian'.*There are train \\(50\\), test \\(7\\)"),
    ("train[:80%", "Error parsing split.*as in 'train\\[:80%\\]'"),
    ("train[40:60]", "incompatible with 50 examples"),
    ("train[5:5]", "has no examples"),
  ],
)
def test_a_wrong_split_says_which_there_are(data_dir, split, message):
  with pytest.raises(UserError, match=message):
    tfds.make("toy_tfrecord", split=split, data_dir=data_dir)


def test_a_format_without_random_access_says_what_to_do(copied):
  info = copied / "toy_tfrecord/1.2.0/dataset_info.json"
  info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "riegeli"}))
  for shard in (copied / "toy_tfrecord/1.2.0").glob("*.tfrecord-*"):
    shard.rename(pathlib.Path(os.fspath(shard).replace(".tfrecord-", ".riegeli-")))
  with pytest.raises(UserError, match="stored as riegeli.*--file_format=array_record"):
    tfds.make("toy_tfrecord", split="train", data_dir=os.fspath(copied))


def test_a_format_that_is_not_there_says_which_is(data_dir):
  with pytest.raises(UserError, match="array_record does not match.*tfrecord"):
    tfds.make("toy_tfrecord", split="train", data_dir=data_dir, file_format="array_record")
