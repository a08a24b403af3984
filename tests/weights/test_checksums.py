"""Digests beside weights: an export has them, and what is not as they say is not read."""

import hashlib
import os
import shutil
import struct
import subprocess

import jax
import numpy as np
import pytest

from bigjax import main, weights
from bigjax import state as states
from bigjax.errors import UserError
from bigjax.models import decoder, decoder_block
from bigjax.weights import checksums, safetensors

SMALL = dict(vocab_size=24, context=16, width=16, depth=2, heads=4, kv_heads=2, mlp_dim=32, tied=True)
MODEL = states.Model(lambda rngs: decoder.make(**SMALL, rngs=rngs))
OPTIONS = decoder_block.Options(**SMALL)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  path = tmp_path_factory.mktemp("exported") / "small"
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), MODEL.abstract[0])
  weights.save(str(path), OPTIONS, params, {}, shard_size=8_000)
  return path


@pytest.fixture
def copied(exported, tmp_path):
  shutil.copytree(exported, tmp_path / "small")
  return tmp_path / "small"


def load(path):
  return weights.load(weights.open_weights(str(path)), OPTIONS, *MODEL.abstract)


def flipped(file, place=-3):
  content = bytearray(file.read_bytes())
  content[place] ^= 1
  file.write_bytes(content)


def test_an_export_has_the_digest_of_every_file_as_sha256sum_reads_it(exported):
  lines = (exported / checksums.SUMS).read_text().splitlines()
  assert {line[66:] for line in lines} == set(os.listdir(exported)) - {checksums.SUMS}
  for line in lines:
    assert line[:64] == hashlib.sha256((exported / line[66:]).read_bytes()).hexdigest()
  subprocess.run(["sha256sum", "--check", "--strict", "--quiet", checksums.SUMS], cwd=exported, check=True)


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "config.json", safetensors.INDEX])
def test_one_bit_of_any_file_is_noticed(copied, name):
  assert len(weights.open_weights(str(copied)).files) == 3
  load(copied)
  flipped(copied / name)
  with pytest.raises(UserError, match=rf"{name}: other bytes than by the digest in .*{checksums.SUMS}"):
    load(copied)


def test_without_digests_a_bit_of_a_tensor_is_not_told_from_another_weight(copied):
  (copied / checksums.SUMS).unlink()
  before = jax.tree.leaves(load(copied)[0])
  flipped(copied / "model-00001-of-00003.safetensors")
  assert any((a != b).any() for a, b in zip(before, jax.tree.leaves(load(copied)[0]), strict=True))


@pytest.mark.parametrize("sums", ["", "no digest\n", "0" * 64 + "  other.safetensors\n", "\0"])
def test_a_list_of_digests_that_lost_some_is_not_believed(copied, sums):
  (copied / checksums.SUMS).write_text(sums)
  with pytest.raises(UserError, match=checksums.SUMS):
    load(copied)


def test_a_name_in_the_cache_of_hugging_face_is_a_digest(copied):
  (copied / checksums.SUMS).unlink()
  blobs = copied.parent / "blobs"
  blobs.mkdir()
  for file in copied.glob("*.safetensors"):
    blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(blob)
    file.symlink_to(blob)
  load(copied)
  flipped(max(blobs.iterdir()))
  with pytest.raises(UserError, match="other bytes than by the digest in .*blobs"):
    load(copied)


def test_what_the_server_said_of_a_download_is_a_digest(copied):
  (copied / checksums.SUMS).unlink()
  file = copied / "model-00002-of-00003.safetensors"
  said = copied / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
  said.parent.mkdir(parents=True)
  said.write_text(f"0123abcd\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n1763800000.0\n")
  load(copied)
  flipped(file)
  with pytest.raises(UserError, match=f"{file.name}: other bytes"):
    load(copied)


def test_the_command_says_what_is_as_it_was(copied, capsys):
  assert main.main(["weights", "verify", str(copied)]) == 0
  assert "3 of 3 files of weights are as by their digests." in capsys.readouterr().out
  flipped(copied / "model-00003-of-00003.safetensors")
  assert main.main(["weights", "verify", str(copied)]) == 2
  (copied / checksums.SUMS).unlink()
  assert main.main(["weights", "verify", str(copied)]) == 1
  assert "0 of 3" in capsys.readouterr().out


def test_tensors_that_overlap_or_leave_room_are_refused(tmp_path):
  def write(first, second):
    import json

    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": first}}
    header["b"] = {"dtype": "F32", "shape": [2], "data_offsets": second}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))

  write([8, 16], [0, 8])
  assert list(safetensors.open_files(str(tmp_path))[0]) == ["a", "b"]
  for offsets in (([0, 8], [0, 8]), ([0, 8], [4, 12]), ([0, 8], [-8, 0]), ([0, 8], [8.0, 16.0]), ([0, 8], [8, 16, 24])):
    write(*offsets)
    with pytest.raises(UserError, match="cut short or no safetensors file"):
      safetensors.open_files(str(tmp_path))
