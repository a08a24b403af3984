"""Tokens on disk, mapped into memory: documents after another in shards, with an index of where each begins.

A store is a folder:

  index.json            what it was made of, and for each shard its sizes and the SHA-256 of its files; written last
  00000.tokens          little-endian uint16, or uint32 for vocabularies above 65,536
  00000.documents       int64 [documents + 1, 2]: tokens and bytes of UTF-8 before each document of the shard
  tokenizer/            what `tokenizers.load` makes the tokenizer from

Opening one looks at the sizes of all files; `verify` reads them.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from bigjax.data import tokenizers
from bigjax.data.tfrecord import OPEN_FILES
from bigjax.errors import UserError, shown, understood

FORMAT = "bigjax tokens 1"


@dataclasses.dataclass(frozen=True)
class Store:
  """An opened store; made by `open_store`."""

  path: pathlib.Path
  index: Mapping[str, Any]

  @property
  def vocab_size(self) -> int:
    return self.index["vocab_size"]

  @property
  def num_tokens(self) -> int:
    return int(self._ends[-1])

  @property
  def num_documents(self) -> int:
    return sum(shard["documents"] for shard in self.index["shards"])

  @property
  def bytes_per_token(self) -> float:
    """Mean, of UTF-8: a loss in bits a byte is loss / ln 2 / bytes_per_token."""
    return sum(shard["bytes"] for shard in self.index["shards"]) / self.num_tokens

  @functools.cached_property
  def documents(self) -> Int64[np.ndarray, "documents_and_one two"]:
    """Tokens and bytes before each document, and of all."""
    before, found = np.zeros(2, np.int64), [np.zeros((1, 2), np.int64)]
    for i in range(len(self.index["shards"])):
      inside = np.fromfile(self.path / f"{i:05}.documents", "<i8").reshape(-1, 2)
      ends = [self.index["shards"][i][name] for name in ("tokens", "bytes")]
      if inside[0].any() or (np.diff(inside, axis=0) < 0).any() or inside[-1].tolist() != ends:
        raise UserError(f"path: the token store {str(self.path)!r} is damaged: {i:05}.documents. {_REMEDY}")
      found.append(inside[1:] + before)
      before = before + inside[-1]
    return np.concatenate(found)

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    return tokenizers.load(str(self.path / "tokenizer"))

  def read(self, start: int, out: np.ndarray) -> None:
    """Fills `out` with the tokens from `start` on, through as many shards as it takes; from any number of threads."""
    done = 0
    shard = int(np.searchsorted(self._ends, start, side="right"))
    while done < len(out):
      place = start + done - (int(self._ends[shard - 1]) if shard else 0)
      some = self._tokens(shard)[place : place + len(out) - done]
      out[done : done + len(some)] = some
      done, shard = done + len(some), shard + 1

  @functools.cached_property
  def _ends(self) -> np.ndarray:
    return np.cumsum([shard["tokens"] for shard in self.index["shards"]], dtype=np.int64)

  @functools.cached_property
  def _tokens(self) -> Any:
    # As many are mapped at a time as a process may have files open.
    @functools.lru_cache(OPEN_FILES)
    def mapped(shard):
      empty = not self.index["shards"][shard]["tokens"]
      return np.empty(0) if empty else np.memmap(self.path / f"{shard:05}.tokens", self.index["dtype"], "r")

    return mapped


def open_store(path: str) -> Store:
  """Opens a store.

  Raises:
    UserError: It isn't one, is unfinished, or a file is missing or cut short.
  """
  place = pathlib.Path(path).expanduser()
  file = place / "index.json"
  if not file.is_file():
    unfinished = "; `bigjax data tokenize` with the same arguments goes on with it" if place.is_dir() else ""
    raise UserError(f"path: {str(place)!r} holds no finished token store (there is no index.json){unfinished}.")
  with understood(f"path: {str(file)!r}", _REMEDY):
    index = json.loads(file.read_text(encoding="utf-8"))
    if index.get("format") != FORMAT:
      raise UserError(f"path: {str(file)!r} is of format {shown(index.get('format'))}; this bigjax reads {FORMAT!r}.")
    width = {"<u2": 2, "<u4": 4}[index["dtype"]]
    numbers = [index["vocab_size"], *(shard[name] for shard in index["shards"] for name in _COUNTS)]
    digests = [index["vocabulary"], *(d for shard in index["shards"] for d in shard["sha256"].values())]
    if not all(type(n) is int and n >= 0 for n in numbers) or not all(isinstance(d, str) for d in digests):
      raise UserError(f"path: {str(file)!r} is damaged: counts and digests are none. {_REMEDY}")
  for i, shard in enumerate(index["shards"]):
    sizes = {f"{i:05}.tokens": shard["tokens"] * width, f"{i:05}.documents": (shard["documents"] + 1) * 16}
    for name, size in sizes.items():
      found = (place / name).stat().st_size if (place / name).is_file() else None
      if found != size:
        how = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
        raise UserError(f"path: the token store {str(place)!r} is damaged: {name} {how}. {_REMEDY}")
  if not sum(shard["tokens"] for shard in index["shards"]):
    raise UserError(f"path: the token store {str(place)!r} holds no tokens.")
  return Store(place, index)


_COUNTS = ("tokens", "documents", "bytes")
_REMEDY = "Copy it again, or delete the folder and run `bigjax data tokenize` again."


def verify(path: str) -> Iterator[str]:
  """Reads a whole store; yields what is wrong with it, a line for each damaged file."""
  store = open_store(path)
  for i, shard in enumerate(store.index["shards"]):
    for kind, digest in shard["sha256"].items():
      with open(store.path / f"{i:05}.{kind}", "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
          yield f"{i:05}.{kind} is not what was written: its SHA-256 differs. {_REMEDY}"
  if store.tokenizer.digest != store.index["vocabulary"]:
    yield "tokenizer/ is not the one the tokens were made with: its vocabulary's digest differs."
