"""How alike texts are to a published encoder: the cosine of every two, or the vectors themselves."""

from __future__ import annotations

import argparse
import json

from bigjax import config as configs
from bigjax.commands.train import default_cache, use_cache
from bigjax.infer import given


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax embed", description=__doc__, allow_abbrev=False)
  add = parser.add_argument
  add("--weights", required=True, metavar="DIR", help="of an encoder such as BERT; --config.mesh=... lays it out")
  add("--tokenizer", metavar="PATH", help="the file or folder of one; that beside the weights otherwise")
  add("--text", action="append", default=[], help="may be given several times")
  add("--texts", metavar="FILE", help="a text a line")
  add("--json", action="store_true", help="a line of JSON for each text, with its vector of length 1")
  add("--compile_cache", default=default_cache(), metavar="DIR", help="'none' for none")
  args, overrides = parser.parse_known_args(argv)
  texts = given.texts(args.text, args.texts, "text")
  use_cache(args.compile_cache)
  from bigjax.data import tokenizers
  from bigjax.infer.embed import Embedder
  from bigjax.weights import published

  placement = configs.resolve(configs.override({}, overrides), published.Placement)
  found = published.open_model(args.weights, placement)
  tokenizer = tokenizers.load(args.tokenizer) if args.tokenizer else found.tokenizer()
  vectors = Embedder(found.model.bind, found.read(), tokenizer, found.layout).embed(texts)
  if args.json:
    for text, vector in zip(texts, vectors.tolist(), strict=True):
      print(json.dumps(dict(text=text, vector=vector), ensure_ascii=False))
    return 0
  for i, text in enumerate(texts):
    print(f"{i:>4}  {text}")
  print("cosine" + "".join(f"{i:>9}" for i in range(len(texts))))
  for i, row in enumerate(vectors @ vectors.T):
    print(f"{i:>6}" + "".join(f"{value:>9.4f}" for value in row))
  return 0
