"""What happens to files: one way of damaging them, for every reader there is.

A damage is a function of (file, draw, folder): `draw` is a NumPy generator, so a case is a function of its seed. Some
are those of disks and copies (bits turn, ends are missing, blocks are zeros, twice or elsewhere), others those of
somebody who means harm: numbers that promise too much, nesting without end, JSON that is valid and wrong.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Damage = Callable[[pathlib.Path, np.random.Generator, pathlib.Path], None]
NUMBERS = (0, 1, -1, 255, 2**15, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63), 2**64 - 1)
NONSENSE = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e999, float("nan"), "", "x", "x" * 1000, "\0", "-1",
    "../../etc/passwd", "\ud800", "é" * 50, [], {}, [[]], [None], {"": None}, {"name": "x"}, [1, 2, 3], [0] * 300,
)  # fmt: skip
WORDS = (
    b"\0", b"\n", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3\x28", b"'", b'"', b"\\", b"{", b"}", b"[", b"]", b"(", b")",
    b",",
    b":", b"|", b"=", b".", b"-", b"%", b"#", b"\x1b[2J", b"NaN", b"inf", b"1e999", b"null", b"None", b"9" * 30, b"-1",
    b"0x10", b"1_000", b"__import__('os')", b"lambda: 0", b"<script>", b"{{7*7}}", b"${HOME}", b"\r\n", b" " * 500,
)  # fmt: skip


def damaged(
  folder: pathlib.Path, draw: np.random.Generator, kinds: Mapping[str, Damage], names: Sequence[str] = ("*",)
) -> list[str]:
  """Does one to three things to files of a folder whose names match; returns which."""
  chosen = [str(draw.choice(list(kinds))) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
  for kind in chosen:
    files = sorted(f for name in names for f in folder.rglob(name) if f.is_file() and not f.is_symlink())
    if files:
      kinds[kind](files[draw.integers(len(files))], draw, folder)
  return chosen


def _place(content, draw, length=1):
  """Somewhere; half of the time near the beginning, where formats say what follows."""
  most = max(1, len(content) - length + 1)
  return int(draw.integers(min(most, 256) if draw.random() < 0.5 else most))


def _of_bytes(change: Callable[[bytearray, np.random.Generator], bytes | bytearray]) -> Damage:
  def act(file, draw, folder):
    del folder
    file.write_bytes(change(bytearray(file.read_bytes()), draw))

  return act


def _flip(content, draw):
  for _ in range(draw.choice([1, 1, 2, 64])):
    if content:
      content[_place(content, draw)] ^= 1 << draw.integers(8)
  return content


def _overwrite(content, draw):
  at = _place(content, draw)
  new = draw.bytes(int(draw.integers(1, 200)))[: len(content) - at]
  content[at : at + len(new)] = new
  return content


def _zero(content, draw):
  at = _place(content, draw)
  length = min(len(content) - at, int(draw.choice([1, 8, 512, 4096])))
  content[at : at + length] = bytes(length)
  return content


def _block(content, draw):
  at = _place(content, draw)
  return at, at + int(draw.choice([1, 4, 8, 64, 512]))


def _twice(content, draw):
  start, stop = _block(content, draw)
  return content[:stop] + content[start:stop] * int(draw.choice([1, 1, 3, 200])) + content[stop:]


def _without(content, draw):
  start, stop = _block(content, draw)
  return content[:start] + content[stop:]


def _moved(content, draw):
  start, stop = _block(content, draw)
  there = _place(content, draw)
  content[there : there + stop - start] = content[start:stop]
  return content


def _number(content, draw):
  """A whole number as formats write them, that promises too much or too little."""
  kind = str(draw.choice(["<B", "<H", "<I", "<Q", ">H", ">I", ">Q"]))
  size = struct.calcsize(kind)
  if len(content) < size:
    return content
  at = _place(content, draw, size)
  if draw.random() < 0.5:
    value = int(draw.choice(np.array(NUMBERS, object)))
  else:  # One more, or twice as many.
    value = struct.unpack_from(kind, content, at)[0] * int(draw.choice([1, 2])) + int(draw.choice([-1, 1]))
  struct.pack_into(kind, content, at, value % 256**size)
  return content


def _digits(content, draw):
  """A number as text writes them."""
  found = list(re.finditer(rb"-?\d+(\.\d+)?", content))
  if not found:
    return content
  one = found[draw.integers(len(found))]
  new = (b"%d" % int(draw.choice(np.array(NUMBERS, object))), b"1e999", b"NaN", b"0.1", b"-0", b"9" * 400, b"")
  return content[: one.start()] + new[draw.integers(len(new))] + content[one.end() :]


def _word(content, draw):
  at = _place(content, draw)
  return content[:at] + WORDS[draw.integers(len(WORDS))] + content[at + int(draw.choice([0, 0, 1, 5])) :]


def _nested(content, draw):
  at, mark = _place(content, draw), (b"[", b"{", b"(", b'{"a":', b"[[],", b"-", b"not ")[draw.integers(7)]
  return content[:at] + mark * int(draw.choice([30, 1000, 100_000])) + content[at:]


def _tree(file, draw, folder):
  """JSON that is valid, and wrong in one place."""
  del folder
  try:
    tree = json.loads(file.read_bytes())
  except (ValueError, RecursionError):
    return
  places = list(_nodes(tree))
  if not places:
    return
  # Half of the time among the first levels, where there is less.
  shallow = [p for p in places if p[2] < 2]
  places = shallow if draw.random() < 0.5 else places
  parent, key, _ = places[draw.integers(len(places))]
  how = draw.choice(["replace", "replace", "replace", "remove", "rename", "swap", "deep"])
  if how == "remove":
    del parent[key]
  elif how == "rename" and isinstance(parent, dict):
    parent[("", "x", key + "_", "__class__", "\0")[draw.integers(5)]] = parent.pop(key)
  elif how == "swap":
    other, there, _ = places[draw.integers(len(places))]
    parent[key] = json.loads(json.dumps(other[there]))
  elif how == "deep":
    value = parent[key]
    for _ in range(int(draw.choice([2, 50, 400]))):
      value = [value] if draw.random() < 0.5 else {"a": value}
    parent[key] = value
  else:
    parent[key] = NONSENSE[draw.integers(len(NONSENSE))]
  file.write_text(json.dumps(tree, ensure_ascii=True))


def _nodes(tree, depth=0):
  keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
  for key in keys:
    yield tree, key, depth
    yield from _nodes(tree[key], depth + 1)


def _swap(file, draw, folder):
  files = sorted(f for f in folder.rglob("*") if f.is_file())
  other = files[draw.integers(len(files))]
  contents = file.read_bytes(), other.read_bytes()
  other.write_bytes(contents[0])
  file.write_bytes(contents[1])


def _spliced(file, draw, folder):
  """The beginning of one file and the end of another."""
  files = sorted(f for f in folder.rglob("*") if f.is_file())
  content, other = file.read_bytes(), files[draw.integers(len(files))].read_bytes()
  at = _place(content, draw)
  file.write_bytes(content[:at] + other[min(at, _place(other, draw)) :])


def _link(file, draw, folder):
  file.unlink()
  file.symlink_to(draw.choice([str(folder), "/nonexistent", str(file)]))


def _folder(file, draw, folder):
  file.unlink()
  file.mkdir()


CONTENT: dict[str, Damage] = {
  "flip": _of_bytes(_flip),
  "overwrite": _of_bytes(_overwrite),
  "zero": _of_bytes(_zero),
  "cut": lambda file, draw, folder: os.truncate(file, int(draw.integers(file.stat().st_size + 1))),
  "grow": _of_bytes(lambda content, draw: content + draw.bytes(int(draw.integers(1, 99)))),
  "twice": _of_bytes(_twice),
  "without": _of_bytes(_without),
  "moved": _of_bytes(_moved),
  "number": _of_bytes(_number),
  "random": _of_bytes(lambda content, draw: draw.bytes(int(draw.choice([1, 8, 100, 5000])))),
  "splice": _spliced,
}
TEXT: dict[str, Damage] = {
  "digits": _of_bytes(_digits),
  "word": _of_bytes(_word),
  "nested": _of_bytes(_nested),
}
TREE: dict[str, Damage] = {"tree": _tree, "tree ": _tree, "tree  ": _tree}  # Three times as often as the others.
PLACE: dict[str, Damage] = {
  "empty": lambda file, draw, folder: file.write_bytes(b""),
  "remove": lambda file, draw, folder: file.unlink(),
  "folder lost": lambda file, draw, folder: shutil.rmtree(file.parent) if file.parent != folder else None,
  "swap": _swap,
  "link": _link,
  "folder": _folder,
}
