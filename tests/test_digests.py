"""Whatever happens to a file after it was digested is found."""

import hashlib
import os

import numpy as np
import pytest
from etils import epath

from bigjax import digests


@pytest.fixture(params=[digests.PIECE, 100], ids=["whole", "in pieces"])
def files(request, tmp_path, monkeypatch):
  monkeypatch.setattr(digests, "PIECE", request.param)
  draw = np.random.default_rng(0)
  for name, size in {"a": 1000, "d/b": 250, "d/e/c": 100, "empty": 0}.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(draw.bytes(size))
  return epath.Path(tmp_path), digests.take(epath.Path(tmp_path))


def test_a_digest_is_that_of_the_digests_of_the_pieces(files):
  directory, taken = files
  assert list(taken) == ["a", "d/b", "d/e/c", "empty"]
  for name, (size, digest) in taken.items():
    content = (directory / name).read_bytes()
    pieces = [content[i : i + digests.PIECE] for i in range(0, max(1, size), digests.PIECE)]
    by_hand = hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in pieces)).hexdigest()
    assert (size, digest) == (len(content), f"sha256:{by_hand}")
  assert digests.wrong(directory, taken) == []


def flip(path, byte, bit=0):
  content = bytearray(path.read_bytes())
  content[byte] ^= 1 << bit
  path.write_bytes(content)


DAMAGES = {
  "a bit at the start": (lambda d: flip(d / "a", 0), "a is not what was written"),
  "a bit at the end": (lambda d: flip(d / "d/b", -1, 7), "d/b is not what was written"),
  "shorter by a byte": (lambda d: os.truncate(d / "a", 999), "a has 999 bytes instead of 1,000"),
  "longer by a byte": (lambda d: os.truncate(d / "empty", 1), "empty has 1 bytes instead of 0"),
  "gone": (lambda d: (d / "d/e/c").unlink(), "d/e/c is missing"),
  "its folder gone": (lambda d: (d / "d/e").rmtree(), "d/e/c is missing"),
  "another's content": (lambda d: (d / "d/e/c").write_bytes((d / "a").read_bytes()[:100]), "d/e/c is not what"),
  "pieces in another order": (
    lambda d: (d / "a").write_bytes((d / "a").read_bytes()[100:200] * 10),
    "a is not what was written",
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_and_named(files, damage):
  directory, taken = files
  do, said = DAMAGES[damage]
  do(directory)
  (line,) = digests.wrong(directory, taken)
  assert line.startswith(said)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_several_hosts_find_together_what_one_finds_each_file_once(files, count):
  directory, taken = files
  for name in taken:
    (directory / name).unlink()
  parts = [digests.wrong(directory, taken, (i, count)) for i in range(count)]
  assert sorted(line for part in parts for line in part) == digests.wrong(directory, taken)


def test_what_another_host_has_digested_is_not_read_again(files):
  directory, taken = files
  flip(directory / "a", 0)
  assert digests.take(directory, known={"a": taken["a"]}) == taken


def test_a_digest_of_a_kind_that_is_not_known_is_not_believed(files):
  directory, taken = files
  assert "not known" in digests.wrong(directory, {"a": (taken["a"][0], "crc99:00")})[0]
