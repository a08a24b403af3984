"""Speed of `bigjax data tokenize`, all of it, against the `tokenizers` library's own batch encoding alone.

Command   python scripts/bench/tokenizing.py FILE... --tokenizer=FOLDER [--document=paragraph] [--encoding=latin-1]
          [--rounds=5] [--shard_mb=256]
Hardware  any; both use all cores

The library gets the documents in memory, all at once, and returns its own objects; what we do besides is to read the
files, cut them, count, write the store and its checksums. The two take turns; the numbers are medians, and the ratio is
that of neighbours in time. On a machine that others use, look at the MB a core-second. With as many shards as cores or
more, ours works in processes, whose start counts.
"""

import argparse
import contextlib
import os
import tempfile
import time

import numpy as np
import tokenizers as library

from bigjax.data import documents, tokenize, tokenizers


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("files", nargs="+")
  parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json")
  parser.add_argument("--document", default="paragraph", choices=["file", "paragraph", "line"])
  parser.add_argument("--encoding", default="utf-8")
  parser.add_argument("--piece", type=int, default=2**40, help="cuts what the library gets, at this many characters")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--shard_mb", type=float, default=256.0)
  args = parser.parse_args()
  inputs = documents.Inputs(tuple(args.files), document=args.document, encoding=args.encoding)
  texts = [
    piece for part in inputs.parts(2**40) for text in inputs.read(part) for piece in documents.cut(text, args.piece)
  ]
  size = sum(len(text.encode()) for text in texts) / 1e6
  theirs = library.Tokenizer.from_file(os.path.join(args.tokenizer, "tokenizer.json"))
  ours = tokenizers.load(args.tokenizer)
  taken = {"library": [], "bigjax": []}  # Seconds, and core-seconds.

  @contextlib.contextmanager
  def measured(name):
    began = np.array([time.perf_counter(), time.process_time()])
    yield
    taken[name].append(np.array([time.perf_counter(), time.process_time()]) - began)

  for _ in range(args.rounds + 1):  # The first is to warm up.
    with measured("library"):
      found = theirs.encode_batch(texts, add_special_tokens=False)
    count = sum(len(one) for one in found)
    del found
    with tempfile.TemporaryDirectory() as folder, measured("bigjax"):
      store = tokenize.tokenize(inputs, os.path.join(folder, "store"), ours, eos="none", shard_mb=args.shard_mb)
    assert store.num_tokens == count, (store.num_tokens, count)
  shards = len(store.index["shards"])
  print(f"{len(texts):,} texts, {size:.1f} MB, {count:,} tokens, {shards} shards, {os.cpu_count()} cores")
  for name, runs in taken.items():
    speed = size / np.median(runs[1:], axis=0)
    print(f"  {name:<8} {speed[0]:6.2f} MB/s" + (f" {speed[1]:6.2f} MB a core-second" if shards == 1 else ""))
  ratios = np.array(taken["library"][1:]) / np.array(taken["bigjax"][1:])
  for i, what in enumerate(("seconds", "core-seconds")[: 1 + (shards == 1)]):
    print(f"  ratio in {what:<12} {np.median(ratios[:, i]):.2f} ({ratios[:, i].min():.2f} to {ratios[:, i].max():.2f})")


if __name__ == "__main__":
  main()
