"""Text into a token store, in as many processes as there are cores; killed at any moment, it goes on.

Documents are cut into parts by where they lie in the files, a part becomes a shard, and a shard that is whole has a
`.json` beside it, moved into place last. So the store is the same byte for byte, whoever made its shards and
however often that was interrupted; and to go on is to look which shards there are.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bigjax.data import documents, token_store, tokenizers
from bigjax.errors import UserError

_BATCH = 2**22  # Characters that are encoded at once; what the libraries return takes a hundred bytes a token.


@dataclasses.dataclass(frozen=True)
class _Job:
  """What makes a shard of a part, in any process."""

  out: pathlib.Path
  inputs: documents.Inputs
  dtype: str
  before: tuple[int, ...]  # Control tokens around each document.
  after: tuple[int, ...]


def tokenize(
  inputs: documents.Inputs,
  out: str,
  tokenizer: tokenizers.Tokenizer,
  *,
  bos: str = "none",
  eos: str = "auto",
  shard_mb: float = 256.0,
  workers: int | None = None,
  tell: Callable[[str], None] = lambda line: None,
) -> token_store.Store:
  """Makes a token store, or goes on making it; returns it, opened.

  Args:
    inputs: What to read.
    out: The folder.
    tokenizer: What to encode with; its files are kept in the store.
    bos: Control token before each document, by name; `auto` is the vocabulary's own, if any, `none` is none.
    eos: Control token after each document, likewise.
    shard_mb: About how many megabytes of input a shard is made of.
    workers: Processes, or threads if there is one shard; one a core if None.
    tell: Is called with a line on how far it is, now and then.

  Raises:
    UserError: A file can't be read, or the folder holds something else than a part of this very store.
  """
  if shard_mb <= 0 or (workers is not None and workers < 1):
    raise UserError(f"shard_mb={shard_mb} and workers={workers} must be above 0.")
  place = pathlib.Path(out).expanduser()
  around = {name: tokenizers.role(tokenizer, name, choice) for name, choice in (("bos", bos), ("eos", eos))}
  parts = inputs.parts(max(1, int(shard_mb * 1e6)))
  dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
  description = {
    "format": token_store.FORMAT,
    "vocabulary": tokenizer.digest,
    "vocab_size": tokenizer.vocab_size,
    "dtype": dtype,
    **around,
    "inputs": dataclasses.asdict(inputs),
    "files": {} if inputs.tfds else {file: _state(file) for file in inputs.files()},
    "parts": len(parts),
    "shard_mb": shard_mb,
  }
  description = json.loads(json.dumps(description))
  if _begun(place, description) == "finished":
    return token_store.open_store(out)
  place.mkdir(parents=True, exist_ok=True)
  _write(place / "job.json", description)
  tokenizer.save(place / "tokenizer")
  tokens = {name: () if token is None else (token,) for name, token in around.items()}
  job = _Job(place, inputs, dtype, tokens["bos"], tokens["eos"])
  missing = [i for i in range(len(parts)) if not (place / f"{i:05}.json").is_file()]
  done, began = 0, time.monotonic()
  for shard in _made(job, tokenizer, {i: parts[i] for i in missing}, workers or os.cpu_count() or 1):
    done += shard["bytes"]
    tell(
      f"{shard['name']} of {len(parts)}: {shard['tokens']:,} tokens; {done / 1e6 / (time.monotonic() - began):.1f} MB/s"
    )
  shards = [json.loads((place / f"{i:05}.json").read_text()) for i in range(len(parts))]
  shards = [{k: v for k, v in shard.items() if k != "name"} for shard in shards]
  _write(place / "index.json", {**description, "shards": shards})
  for i in range(len(parts)):
    (place / f"{i:05}.json").unlink()
  (place / "job.json").unlink()
  return token_store.open_store(out)


def _state(file: str) -> list[int]:
  found = os.stat(file)
  return [found.st_size, found.st_mtime_ns]


def _begun(place: pathlib.Path, description: dict[str, Any]) -> str:
  """Returns "no", "begun" or "finished"; raises if what is there is something else."""
  for name, state in (("index.json", "finished"), ("job.json", "begun")):
    if (place / name).is_file():
      there = json.loads((place / name).read_text(encoding="utf-8"))
      differing = [key for key, value in description.items() if there.get(key) != value]
      if differing:
        shown = "; ".join(
          f"{key}: {_short(there.get(key))} there, {_short(description[key])} here" for key in differing
        )
        raise UserError(f"{str(place)!r} holds another token store ({shown}). Take another folder, or delete it.")
      return state
  if place.is_dir() and any(file.name != "job.json.new" for file in place.iterdir()):
    raise UserError(f"{str(place)!r} holds something else. Take another folder.")
  return "no"


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) < 60 else text[:56] + "..."


def _made(job: _Job, tokenizer, parts: dict[int, Any], workers: int) -> Iterator[dict[str, Any]]:
  """Makes the shards, and yields what is known of each when it is done."""
  processes = min(workers, len(parts))
  if processes <= 1:
    for i, part in parts.items():
      yield _shard(job, tokenizer, i, part)
    return
  context = multiprocessing.get_context("spawn")  # A process that has threads must not fork.
  pool = concurrent.futures.ProcessPoolExecutor(processes, context, _share_threads, (workers // processes,))
  try:
    waiting = [pool.submit(_shard_elsewhere, job, i, part) for i, part in parts.items()]
    for found in concurrent.futures.as_completed(waiting):
      yield found.result()
  except concurrent.futures.process.BrokenProcessPool as e:
    raise UserError(
      "a process was killed from outside, as happens when memory runs out. The same command goes on; try --workers="
      f"{max(1, processes // 2)}."
    ) from e
  finally:
    pool.shutdown(cancel_futures=True)


def _share_threads(count: int) -> None:
  """Leaves the libraries in this process so many threads of their own."""
  os.environ.update(RAYON_NUM_THREADS=str(count), TOKENIZERS_PARALLELISM="true")


def _shard_elsewhere(job: _Job, i: int, part) -> dict[str, Any]:
  return _shard(job, _load(str(job.out / "tokenizer")), i, part)


_load = functools.lru_cache(1)(tokenizers.load)


def _shard(job: _Job, tokenizer: tokenizers.Tokenizer, i: int, part) -> dict[str, Any]:
  """Writes a shard's files, and last what is known of them."""
  digest, sizes = hashlib.sha256(), [np.zeros((1, 2), np.int64)]
  with open(job.out / f"{i:05}.tokens", "wb") as file, contextlib.closing(_encoded(job, tokenizer, part)) as batches:
    for tokens, of_documents in batches:
      data = tokens.astype(job.dtype).tobytes()
      file.write(data)
      digest.update(data)
      sizes.append(of_documents)
    file.flush()
    os.fsync(file.fileno())
  ends = np.concatenate(sizes).cumsum(axis=0)
  table = ends.astype("<i8").tobytes()
  (job.out / f"{i:05}.documents").write_bytes(table)
  shard = {
    "name": f"{i:05}",
    "tokens": int(ends[-1, 0]),
    "documents": len(ends) - 1,
    "bytes": int(ends[-1, 1]),
    "sha256": {"tokens": digest.hexdigest(), "documents": hashlib.sha256(table).hexdigest()},
  }
  _write(job.out / f"{i:05}.json", shard)
  return shard


def _encoded(job: _Job, tokenizer, part) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the tokens of many documents, and the tokens and bytes of each.

  The next batch is encoded, as far as the library does it without Python, while this one is used.
  """
  before, after = np.array(job.before, np.int32), np.array(job.after, np.int32)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waiting = None
    for pieces, counts, lengths in _batches(job, tokenizer, part):
      encoded = pool.submit(tokenizer.encode, pieces)
      if waiting:
        yield _joined(waiting[0].result(), *waiting[1:], before, after)
      waiting = encoded, counts, lengths
    if waiting:
      yield _joined(waiting[0].result(), *waiting[1:], before, after)


def _batches(job: _Job, tokenizer, part) -> Iterator[tuple[list[str], list[int], list[int]]]:
  """Yields pieces of documents, how many there are of each, and the bytes of each document."""
  pieces, counts, lengths, size = [], [], [], 0
  for text in job.inputs.read(part):
    cut = list(documents.cut(text, tokenizer.piece))
    pieces += cut
    counts.append(len(cut))
    lengths.append(len(text) if text.isascii() else len(text.encode()))
    size += len(text)
    if size >= _BATCH:
      yield pieces, counts, lengths
      pieces, counts, lengths, size = [], [], [], 0
  if pieces:
    yield pieces, counts, lengths


def _joined(found, counts, lengths, before, after):
  """Puts the pieces of documents together, and control tokens around each."""
  sizes = np.add.reduceat([len(tokens) for tokens in found], np.cumsum([0, *counts[:-1]]))
  if len(before) or len(after):
    pieces = iter(found)
    found = [one for count in counts for one in (before, *itertools.islice(pieces, count), after)]
  return np.concatenate(found), np.stack([sizes + len(before) + len(after), lengths], axis=1)


def _write(path: pathlib.Path, content: Any) -> None:
  """Writes JSON at once: whole, or not at all."""
  draft = path.with_name(path.name + ".new")
  draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
  os.replace(draft, path)
