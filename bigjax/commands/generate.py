"""Write on where a prompt ends, with the model of a run or with published weights."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys

from bigjax import config as configs
from bigjax import record, workdirs
from bigjax.commands.train import default_cache, use_cache
from bigjax.errors import UserError
from bigjax.infer import given


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="bigjax generate", description=__doc__, allow_abbrev=False)
  add = parser.add_argument
  add("--workdir", help="the directory of a run; --config.mesh=... overrides where it was trained")
  add(
    "--weights", metavar="PATH", help="published weights instead: safetensors' folder, a GGUF file; --config.mesh=..."
  )
  add("--step", type=int, help="the step of a run's checkpoint; the last one otherwise")
  add("--tokenizer", metavar="PATH", help="'byte', or the file or folder of one; that of the run's data otherwise")
  add("--prompt", action="append", default=[], help="may be given several times: one batch")
  add("--prompts", metavar="FILE", help="a prompt a line")
  add("--special", action="store_true", help="names of control tokens in a prompt stand for them")
  text = "the prompt is what a user says: chatml, llama3, gemma, phi3, mistral, plain, or the folder of a model"
  add("--template", metavar="NAME", help=text)
  add("--system", metavar="TEXT", help="what a conversation begins with, with --template")
  add("--samples", type=int, default=1, help="answers to each prompt")
  add("--max_tokens", type=int, help="of an answer; as many as the model's context has room for otherwise")
  add("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
  add("--top_k", type=int, help="draw among so many of the likeliest")
  add("--top_p", type=float, help="draw among the likeliest that make up this share")
  add("--min_p", type=float, help="draw among those with this part of the likeliest's probability")
  add("--repetition_penalty", type=float, default=1.0, help="above 1 for fewer tokens that were there")
  add("--stop", action="append", default=[], help="a string that ends an answer; may be given several times")
  add("--seed", type=int, default=0, help="with an answer's number, all that its tokens are drawn by")
  add("--log_probabilities", action="store_true", help="of each token, with --json; their sum otherwise")
  add("--json", action="store_true", help="a line of JSON for each answer, when all are there")
  add("--cache", metavar="TYPE", help="what keys and values are kept in: float32, bfloat16, float16, int8")
  add("--flush", type=int, default=16, help="tokens that are shown at a time")
  add("--compile_cache", default=default_cache(), metavar="DIR", help="'none' for none")
  args, overrides = parser.parse_known_args(argv)
  if (args.workdir is None) == (args.weights is None):
    raise UserError("give one of --workdir and --weights.")
  if args.samples < 1:
    raise UserError(f"--samples: {args.samples} is no number of answers; give 1 or more.")
  if args.system is not None and args.template is None:
    raise UserError("--system is part of a conversation; say with --template how the model reads one.")
  prompts = [prompt for prompt in given.texts(args.prompt, args.prompts, "prompt") for _ in range(args.samples)]

  use_cache(args.compile_cache)
  from bigjax.infer.sampling import Sampling

  names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
  how = dict(sampling=Sampling(**{name: getattr(args, name) for name in names}))
  names = ("stop", "special", "template", "system", "max_tokens", "seed", "log_probabilities", "cache", "flush")
  how |= {name: getattr(args, name) for name in names}
  writer = _of_run(args, overrides) if args.workdir else _of_weights(args, overrides)
  _show(writer.stream(prompts, **how), prompts, args)
  return 0


def _of_run(args, overrides):
  """The writer of a run."""
  args.workdir = workdirs.fetched(args.workdir)
  record.read_config(args.workdir)  # A directory that holds no run is said so before anything else.
  config = configs.read(os.path.join(args.workdir, "config.json"), overrides)
  if "model_type" in config:
    raise UserError(f"--workdir={args.workdir} holds published weights, no run; --weights={args.workdir} takes them.")

  from bigjax import experiment, tuned
  from bigjax.checkpoint import Checkpoints
  from bigjax.data import tokenizers
  from bigjax.infer.decode import Generator
  from bigjax.infer.text import Writer, tokenizer_of

  run = experiment.build(configs.resolve(config, experiment.TrainConfig))
  generator = Generator(run.model.bind, (run.abstract.params, run.abstract.extras), run.layout)
  generator.check([])
  tokenizer = tokenizers.load(args.tokenizer) if args.tokenizer else tokenizer_of(run.data.source)
  if tokenizer is None:
    raise UserError("config.data.source: it has no tokenizer that is known here; name one with --tokenizer.")
  writer = Writer(generator, tokenizer)  # What doesn't fit together is said before anything is read.
  # What is said of the model that adapters are for is no part of an answer.
  with Checkpoints(args.workdir, read_only=True) as checkpoints, contextlib.redirect_stdout(sys.stderr):
    found = tuned.restore(run, checkpoints, args.step)
  if found is None:
    raise UserError(f"--workdir={args.workdir} has no checkpoint yet.")
  return writer.of(found[0].params, found[0].extras)


def _of_weights(args, overrides):
  """The writer of published weights."""
  if args.step is not None:
    raise UserError("--step is for a workdir.")
  from bigjax.data import tokenizers
  from bigjax.infer.decode import Generator
  from bigjax.infer.text import Writer
  from bigjax.weights import published

  placement = configs.resolve(configs.override({}, overrides), published.Placement)
  found = published.open_model(args.weights, placement)
  generator = Generator(found.model.bind, found.abstract, found.layout)
  generator.check([])
  tokenizer = tokenizers.load(args.tokenizer) if args.tokenizer else found.tokenizer()
  return Writer(generator, tokenizer).of(*found.read())


def _show(stream, prompts, args):
  """Prints one answer as it comes, several when all of them are there."""
  alone, shown, between = len(prompts) == 1 and not args.json, None, "\n" if args.template else ""
  for answers in stream:
    if alone:
      if shown is None:  # Nothing is wrong, then.
        print(prompts[0], end=between, flush=True)
      print(answers[0].text[shown:], end="", flush=True)
      shown = len(answers[0].text)
  if alone:
    print()
  for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    if args.json:
      found = dict(prompt=prompt, text=answer.text, ended=answer.ended, tokens=answer.tokens)
      if args.log_probabilities:
        found["log_probabilities"] = answer.log_probabilities
      print(json.dumps(found, ensure_ascii=False))
      continue
    if not alone:
      print(f"{'' if i == 0 else chr(10)}--- {i}\n{prompt}{between}{answer.text}")
    if args.log_probabilities:
      count = len(answer.tokens)
      print(f"log-probability {sum(answer.log_probabilities):.4f} of {count} tokens", file=sys.stderr)
