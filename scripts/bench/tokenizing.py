"""Speed of `bigjax data tokenize`, all of it, against the `tokenizers` library's own batch encoding alone.

Command   python scripts/bench/tokenizing.py FILE... --tokenizer=FOLDER [--document=paragraph] [--encoding=latin-1]
          [--rounds=5] [--shard_mb=256]
Hardware  any; both use all cores

The library gets the documents in memory, all at once, and returns its own objects; what we do besides is to read the
files, cut them, count, write the store and its checksums. The two take turns; the numbers are medians, and the ratio is
that of neighbours in time. With as many shards as cores or more, ours works in processes, whose start counts.
"""

import argparse
import os
import statistics
import tempfile
import time

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
  times = {"library": [], "bigjax": []}
  for _ in range(args.rounds + 1):  # The first is to warm up.
    began = time.perf_counter()
    found = theirs.encode_batch(texts, add_special_tokens=False)
    times["library"].append(time.perf_counter() - began)
    count = sum(len(one) for one in found)
    del found
    with tempfile.TemporaryDirectory() as folder:
      began = time.perf_counter()
      store = tokenize.tokenize(inputs, os.path.join(folder, "store"), ours, eos="none", shard_mb=args.shard_mb)
      times["bigjax"].append(time.perf_counter() - began)
      assert store.num_tokens == count, (store.num_tokens, count)
  print(
    f"{len(texts):,} texts, {size:.1f} MB, {count:,} tokens, "
    f"{len(store.index['shards'])} shards, {os.cpu_count()} cores"
  )
  for name, taken in times.items():
    print(f"  {name:<8} {size / statistics.median(taken[1:]):6.2f} MB/s")
  ratios = [a / b for a, b in zip(times["library"][1:], times["bigjax"][1:])]
  print(f"  ratio    {statistics.median(ratios):6.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
  main()
