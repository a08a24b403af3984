"""Safetensors: what is written can be read, by slices; what is damaged is refused."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from bigjax.errors import UserError
from bigjax.weights import safetensors
from bigjax.weights.tensors import whole


def values():
  rng = np.random.default_rng(0)
  return {
    "a.weight": rng.normal(size=(6, 4)).astype(np.float32),
    "b.weight": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
    "c.bias": rng.normal(size=7).astype(np.float16),
    "d": np.asarray(3, np.int64),
  }


def write(directory, tensors, **how):
  made = [safetensors.Made(n, v.shape, v.dtype, lambda v=v: v) for n, v in tensors.items()]
  return safetensors.write(str(directory), made, **how)


@pytest.mark.parametrize(("shard_size", "files"), [(10**9, 1), (130, 2), (1, 4)])
def test_what_is_written_is_read_whole_and_by_slices(tmp_path, shard_size, files):
  assert len(write(tmp_path, values(), shard_size=shard_size)) == files
  found, opened = safetensors.open_files(str(tmp_path))
  assert list(found) == list(values()) or files > 1
  assert len(opened) == files
  for name, value in values().items():
    tensor = found[name]
    assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
    assert tensor.read(whole(tensor.shape)).tobytes() == value.tobytes()
  np.testing.assert_array_equal(found["a.weight"].read((slice(2, 5), slice(1, 3))), values()["a.weight"][2:5, 1:3])
  opened[0].drop()  # Pages come back when they are read.
  np.testing.assert_array_equal(found["a.weight"].read(whole((6, 4))), values()["a.weight"])


def test_the_file_is_what_the_format_says(tmp_path):
  write(tmp_path, values())
  data = (tmp_path / "model.safetensors").read_bytes()
  (length,) = struct.unpack("<Q", data[:8])
  header = json.loads(data[8 : 8 + length])
  assert length % 8 == 0
  assert header["a.weight"] == {"dtype": "F32", "shape": [6, 4], "data_offsets": [0, 96]}
  assert header["b.weight"]["dtype"] == "BF16"
  assert len(data) == 8 + length + 96 + 30 + 14 + 8


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_file_cut_short_is_refused_wherever_it_ends(tmp_path, cut):
  write(tmp_path, values())
  file = tmp_path / "model.safetensors"
  file.write_bytes(file.read_bytes()[:cut])
  with pytest.raises(UserError, match="cut short or no safetensors file"):
    safetensors.open_files(str(tmp_path))


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(UserError, match="no such directory"):
    safetensors.open_files(str(tmp_path / "none"))
  with pytest.raises(UserError, match="no safetensors file"):
    safetensors.open_files(str(tmp_path))
  write(tmp_path, values(), shard_size=130)
  (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere")
  with pytest.raises(UserError, match="1 of the 2 files .* are missing: model-00002-of-00002"):
    safetensors.open_files(str(tmp_path))
  index = json.loads((tmp_path / safetensors.INDEX).read_text())
  index["weight_map"] = {"z": "model-00001-of-00002.safetensors"}
  (tmp_path / safetensors.INDEX).write_text(json.dumps(index))
  with pytest.raises(UserError, match="names tensors that no file has: z"):
    safetensors.open_files(str(tmp_path))
  (tmp_path / safetensors.INDEX).write_text("{")
  with pytest.raises(UserError, match="can't be read as JSON"):
    safetensors.open_files(str(tmp_path))


def test_a_header_that_contradicts_itself_is_refused(tmp_path):
  write(tmp_path, values())
  file = tmp_path / "model.safetensors"
  file.write_bytes(file.read_bytes().replace(b"[6,4]", b"[6,5]"))
  with pytest.raises(UserError, match="96 bytes for 'a.weight', F32"):
    safetensors.open_files(str(tmp_path))
  file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F99"'))
  with pytest.raises(UserError, match="of type 'F99'"):
    safetensors.open_files(str(tmp_path))
