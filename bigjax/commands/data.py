"""Prepare datasets on disk: TFDS's own, a folder of images, local files; tokenize text; list what is there."""

from __future__ import annotations

import argparse
import ast
import re
from typing import Any

from bigjax import config as configs
from bigjax.data import documents, prepare, tfds, token_store, tokenize, tokenizers
from bigjax.errors import UserError


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax data", description=__doc__, allow_abbrev=False)
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  one = commands.add_parser("list", help="the datasets of a folder", allow_abbrev=False)
  one.add_argument("--data_dir", help="folder of the datasets; otherwise $TFDS_DATA_DIR, else ~/tensorflow_datasets")
  kinds = commands.add_parser("prepare", help="make one", allow_abbrev=False)
  kinds = kinds.add_subparsers(dest="kind", required=True, metavar="KIND")

  def add(name: str, text: str) -> argparse.ArgumentParser:
    kind = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
    kind.add_argument("--data_dir", help="folder of the datasets; otherwise $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    kind.add_argument("--file_format", default="array_record", choices=["array_record", "tfrecord"])
    return kind

  one = add("tfds", "Download one of TFDS's datasets and prepare it.")
  one.add_argument("dataset", help="TFDS's name, such as mnist, glue/sst2 or imagenet2012:5.1.0")
  one.add_argument("--manual_dir", help="where the files are that TFDS may not download")

  one = add(
    "images", "Make a dataset from a folder with a folder of images for each class, or train/ and test/ of these."
  )
  one.add_argument("folder")
  one.add_argument("--name", required=True, help="of the dataset to make")
  one.add_argument("--version", default="1.0.0")
  one.add_argument("--test", type=float, default=0.0, metavar="PART", help="of each class to hold out, such as 0.1")

  text = (
    "Make a dataset from local files (IDX, CSV, parquet, npz, npy), read as by the source `arrays`, whose arguments "
  )
  one = add("files", text + "are flags: --label=species, --drop=\"('id',)\".")
  text = (
    "train=train.csv test=test.csv, train=images.idx,labels.idx, or parts: train=all.csv[:80%%] test=all.csv[80%%:]"
  )
  one.add_argument("files", nargs="+", metavar="SPLIT=FILE", help=text)
  one.add_argument("--name", required=True, help="of the dataset to make")
  one.add_argument("--version", default="1.0.0")
  _add_text(commands)
  args, options = parser.parse_known_args(argv)
  if options and getattr(args, "kind", None) != "files":
    parser.error(f"unrecognized arguments: {' '.join(options)}")
  if args.command == "prepare":
    return _prepare(args, options)
  return {"list": _list, "tokenizer": _tokenizer, "tokenize": _tokenize, "verify": _verify}[args.command](args)


def _add_text(commands: Any) -> None:
  def add(name: str, text: str) -> argparse.ArgumentParser:
    one = commands.add_parser(name, help=text[0].lower() + text[1:-1], description=text, allow_abbrev=False)
    text = "text, JSON lines (.jsonl) or parquet, compressed or not; patterns too"
    one.add_argument("files", nargs="*", metavar="FILE", help=text)
    one.add_argument("--out", required=True, help="folder to make")
    one.add_argument("--field", default="text", help="what holds the text in JSON lines, parquet and TFDS")
    text = "what a document is in files of text"
    one.add_argument("--document", default="file", choices=["file", "paragraph", "line"], help=text)
    one.add_argument("--encoding", default="utf-8", help="of files of text")
    one.add_argument("--tfds", metavar="NAME", help="a prepared dataset, in place of files")
    one.add_argument("--split", default="train", help="of the dataset")
    one.add_argument("--data_dir", help="folder of the datasets; otherwise $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    return one

  one = add("tokenizer", "Make a vocabulary from text.")
  one.add_argument("--kind", default="bpe", choices=["bpe", "characters"])
  one.add_argument("--vocab_size", type=int, help="of a bpe: its control tokens, 256 bytes and merges")
  text = "how a bpe cuts text into words: gpt2, cl100k, o200k or a regular expression"
  one.add_argument("--pattern", default="gpt2", help=text)
  text = "control tokens of a bpe; <|endoftext|> if none is named"
  one.add_argument("--special", action="append", metavar="NAME", help=text)

  one = add("tokenize", "Make a token store from text, or go on making it.")
  text = "tokenizer.json, a SentencePiece model, GPT-2's vocab.json, a tiktoken file, a folder of one, or byte"
  one.add_argument("--tokenizer", required=True, help=text)
  one.add_argument("--pattern", help="of a tiktoken file that isn't known: as of `bigjax data tokenizer`")
  one.add_argument("--bos", default="none", help="control token before each document: a name, auto or none")
  one.add_argument("--eos", default="auto", help="control token after each document: a name, auto or none")
  one.add_argument("--shard_mb", type=float, default=256.0, help="megabytes of input a shard is made of, about")
  one.add_argument("--workers", type=int, help="processes; one a core unless given")

  text = "read a token store whole and compare it with its checksums"
  commands.add_parser("verify", help=text, allow_abbrev=False).add_argument("store")


def _inputs(args: argparse.Namespace) -> documents.Inputs:
  names = ("tfds", "split", "data_dir", "field", "document", "encoding")
  return documents.Inputs(tuple(args.files), **{name: getattr(args, name) for name in names})


def _tokenizer(args: argparse.Namespace) -> int:
  inputs = _inputs(args)
  texts = (piece for part in inputs.parts(2**26) for text in inputs.read(part) for piece in documents.cut(text))
  if args.kind == "characters":
    made = tokenizers.characters("".join(sorted({symbol for text in texts for symbol in set(text)})))
  elif args.vocab_size is None:
    raise UserError("--vocab_size says how many tokens a bpe has, such as 8192.")
  else:
    special = args.special or ["<|endoftext|>"]
    made = tokenizers.train(texts, args.vocab_size, special=special, pattern=args.pattern)
  made.save(args.out)
  print(f"{made.vocab_size:,} tokens in {args.out}, digest {made.digest[:12]}")
  return 0


def _tokenize(args: argparse.Namespace) -> int:
  inputs, tokenizer = _inputs(args), tokenizers.load(args.tokenizer, args.pattern)
  made = tokenize.tokenize(
    inputs,
    args.out,
    tokenizer,
    bos=args.bos,
    eos=args.eos,
    shard_mb=args.shard_mb,
    workers=args.workers,
    tell=lambda line: print(line, flush=True),
  )
  print(
    f"{made.num_tokens:,} tokens of {made.vocab_size:,} in {made.num_documents:,} documents, "
    f"{made.bytes_per_token:.3f} bytes a token, in {args.out}\nIn a config:\n"
    f'  config.data = dict(source=dict(name="tokens", path="{args.out}", block=1024))'
  )
  return 0


def _verify(args: argparse.Namespace) -> int:
  wrong = list(token_store.verify(args.store))
  print("\n".join(wrong) or f"{args.store} is as it was written.")
  return 1 if wrong else 0


def _list(args: argparse.Namespace) -> int:
  found = tfds.prepared(args.data_dir)
  width = max(map(len, found), default=0)
  print("\n".join(f"{name:<{width}}  {what}" for name, what in found.items()) or "none", end="")
  print(f"\n{len(found)} dataset{'s' * (len(found) != 1)} in {tfds.folder(args.data_dir)}")
  return 0


def _prepare(args: argparse.Namespace, options: list[str]) -> int:
  where = {"data_dir": args.data_dir, "file_format": args.file_format}
  if args.kind == "tfds":
    made = prepare.from_tfds(args.dataset, manual_dir=args.manual_dir, **where)
  elif args.kind == "images":
    made = prepare.from_images(args.folder, dataset=args.name, version=args.version, test=args.test, **where)
  else:
    sources = _sources(args.files, options)
    made = prepare.from_sources(sources, dataset=args.name, version=args.version, **where)
  _tell(made, args.data_dir)
  return 0


def _sources(items: list[str], options: list[str]) -> dict[str, Any]:
  """Opens each SPLIT=FILE[PART] by the source `arrays`; its other arguments are flags, --key=value."""
  arguments = {}
  for option in options:
    key, equals, value = option.removeprefix("--").partition("=")
    if not option.startswith("--") or not equals or key in ("path", "split"):
      raise UserError(f"{option!r} is not understood: write SPLIT=FILE, or --key=value for an argument of `arrays`.")
    arguments[key] = _literal(value)
  sources = {}
  for item in items:
    name, equals, rest = item.partition("=")
    paths, part = re.fullmatch(r"(.*?)(\[[-%\d]*:[-%\d]*\])?", rest).groups()
    if not equals or not paths:
      raise UserError(f"{item!r} is not SPLIT=FILE, such as train={item.strip('=')}.")
    if name in sources:
      raise UserError(f"the split {name!r} is given twice.")
    spec = {"name": "arrays", "path": tuple(paths.split(",")), "split": f"train{part or ''}", **arguments}
    sources[name] = configs.component("data", spec, "files")()
  return sources


def _literal(value: str) -> Any:
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return value


def _tell(made: prepare.Prepared, data_dir: str | None) -> None:
  if made.ignored:
    shown = ", ".join(made.ignored[:5]) + (", ..." if len(made.ignored) > 5 else "")
    print(f"Left out {len(made.ignored)} files that are no images: {shown}")
  splits = ", ".join(f"{name} {count:,}" for name, count in made.splits.items())
  print(f"{made.dataset} in {made.data_dir}: {splits} examples ({made.file_format})")
  width = max(map(len, made.features))
  print("\n".join(f"  {name:<{width}}  {what}" for name, what in made.features.items()))
  where = f", data_dir={made.data_dir!r}" if data_dir else ""
  encoded = [name for name, what in made.features.items() if what.startswith("Image(")]
  decode = "|".join("decode" if name == "image" else f"decode(key={name!r})" for name in encoded)
  preprocess = f', preprocess="{decode}|..."' if decode else ""
  split = next(iter(made.splits))
  print("In a config:")
  print(f'  config.data = dict(source=dict(name="tfds", dataset="{made.dataset}", split="{split}"{where}){preprocess})')
