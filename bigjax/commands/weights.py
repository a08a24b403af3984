"""Show or verify published weights; write those of a run, or of a GGUF file, for `transformers`."""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import pprint

from bigjax import config as configs
from bigjax import record
from bigjax.errors import UserError


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax weights", description=__doc__, allow_abbrev=False)
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  one = commands.add_parser("show", help="what is in a directory of transformers or a GGUF file", allow_abbrev=False)
  one.add_argument("source", help="a directory with config.json and safetensors, or a GGUF file")
  one.add_argument("--tensors", action="store_true", help="list each")
  one = commands.add_parser("verify", help="hold files against the digests beside them", allow_abbrev=False)
  one.add_argument("source", help="a directory with config.json and safetensors, or a GGUF file")
  one = commands.add_parser("export", help="write config.json and safetensors", allow_abbrev=False)
  one.add_argument("source", help="a run's workdir, a GGUF file, or a directory of transformers")
  one.add_argument("directory", help="to write; not there yet, or empty")
  one.add_argument("--step", type=int, help="of a workdir's checkpoint; the last one otherwise")
  one.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
  one.add_argument("--architecture", help="of transformers, such as LlamaForCausalLM; the first that is this model")
  one.add_argument("--like", metavar="DIR", help="directory to take the tokenizer and what else config.json says from")
  one.add_argument("--shard_size", type=float, default=5e9, metavar="BYTES", help="of a file")
  args = parser.parse_args(argv)
  return {"show": _show, "verify": _verify, "export": _export}[args.command](args)


def _show(args) -> int:
  from bigjax import weights

  found = weights.open_weights(args.source)
  kinds = collections.Counter()
  for tensor in found.tensors.values():
    kinds[tensor.stored] += math.prod(tensor.shape)
  print(f"architecture  {found.family.architecture}")
  print("values        " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.items()))
  print(f"files         {len(found.files)}, {sum(f.size for f in found.files):,} bytes")
  print(f"tokenizer     {'none' if found.vocabulary is None else f'{found.vocabulary:,} tokens'}")
  print(f"config.model = {pprint.pformat(found.model, width=100, sort_dicts=False, compact=True)}")
  print(f"config.init_from = {{'weights': {args.source!r}}}")
  if args.tensors:
    width = max(map(len, found.tensors))
    for name, tensor in found.tensors.items():
      print(f"  {name:<{width}}  {tensor.stored} {list(tensor.shape)}")
  return 0


def _verify(args) -> int:
  from bigjax import weights
  from bigjax.weights import checksums

  files = [file.path for file in weights.open_weights(args.source).files]
  held = checksums.verify(files)
  without = [os.path.basename(f) for f in files if checksums.known(f) is None]
  print(f"{args.source}: {held} of {len(files)} files of weights are as by their digests", end="")
  print(f"; there is none of {', '.join(without[:5])}." if without else ".")
  return 1 if without else 0


def _export(args) -> int:
  from bigjax import weights

  like, beside = args.like, {}
  if os.path.isdir(os.path.join(args.source, "checkpoints")):
    options, params, extras, came_from = _run(args)
    like = like or (came_from if came_from and os.path.isdir(came_from) else None)
  else:
    if args.step is not None:
      raise UserError("--step is for a workdir.")
    from bigjax.weights import published

    found = published.open_model(args.source)
    options, (params, extras) = found.options, found.read()
    like = like or (args.source if os.path.isdir(args.source) else None)
    beside = _tokenizer(found.weights)
  how = dict(dtype=args.dtype, architecture=args.architecture, like=like, beside=beside)
  family = weights.save(args.directory, options, params, extras, shard_size=int(args.shard_size), **how)
  files = sorted(os.listdir(args.directory))
  size = sum(os.path.getsize(os.path.join(args.directory, f)) for f in files)
  print(f"{args.directory}: {family.architecture}, {size:,} bytes in {', '.join(files)}")
  return 0


def _run(args):
  """The options and the leaves of a run's checkpoint, and the weights it started from."""
  from flax import nnx

  from bigjax import experiment
  from bigjax.checkpoint import Checkpoints

  record.read_config(args.source)
  config = configs.resolve(configs.read(os.path.join(args.source, "config.json"), []), experiment.TrainConfig)
  module = nnx.eval_shape(lambda: config.model(rngs=nnx.Rngs(0)))
  if not hasattr(module, "options"):
    raise UserError(
      f"{args.source}: the model {config.model.name!r} is none of transformers; 'decoder' and 'bert' are."
    )
  if config.lora is not None:
    return module.options, *_merged(config, args), config.init_from and config.init_from.weights
  with Checkpoints(args.source, read_only=True, where="SOURCE") as checkpoints:
    leaves = checkpoints.read(args.step, only=("params/", "extras/"))
  of = lambda kind: {n.partition("/")[2]: x for n, x in leaves.items() if n.startswith(f"{kind}/")}
  return module.options, of("params"), of("extras"), config.init_from and config.init_from.weights


def _merged(config, args):
  """The leaves of a tuned run, its adapters added to what they are for."""
  from bigjax import experiment, tuned
  from bigjax.checkpoint import Checkpoints

  run = experiment.build(config)
  with Checkpoints(args.source, read_only=True, where="SOURCE") as checkpoints:
    found = tuned.restore(run, checkpoints, args.step)
  if found is None:
    raise UserError(f"{args.source} has no checkpoint yet.")
  return run.model.merged(found[0].params, found[0].extras)


def _tokenizer(found):
  """The files that `transformers` wants of a GGUF file's tokenizer."""
  from bigjax.weights import gguf

  said = gguf.tokenizer_files(found.config) if found.path.endswith(".gguf") else {}
  return {name: json.dumps(content, ensure_ascii=False) for name, content in said.items()}
