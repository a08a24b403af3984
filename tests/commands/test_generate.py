"""`bigjax generate` as a person meets it, on a run that was trained here."""

import json
import re

import jax
import pytest

import bigjax
from bigjax import main
from bigjax.data import tokenizers
from bigjax.infer import text
from bigjax.infer.decode import Generator

CONTEXT = 24
LINE = "the cat sat on the mat; "
OTHER = "the mat sat on the cat; "


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("generate")
  (folder / "text.txt").write_text(LINE * 40)
  source = dict(name="text", path=str(folder / "text.txt"), block=CONTEXT)
  config = dict(
    total_steps=60,
    batch_size=16,
    data=dict(source=source),
    model=dict(name="gpt", vocab_size=len(set(LINE)), context=CONTEXT, width=32, depth=1, heads=2),
    task=dict(name="language_modeling"),
    optimizer=dict(name="adamw"),
    schedule=dict(name="constant", peak=1e-2),
    mesh=[("data", 1)],
    log_every=30,
    writers=("jsonl",),
  )
  config["mesh"] = [("data", len(jax.devices()))]
  bigjax.run(config, str(folder / "run"))
  return str(folder / "run")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
  """A small Llama that learnt one line, and adapters with which it writes another."""
  folder = tmp_path_factory.mktemp("tuned")
  (folder / "one.txt").write_text(LINE * 40)
  (folder / "other.txt").write_text(OTHER * 40)
  config = dict(
    total_steps=60,
    batch_size=16,
    data=dict(source=dict(name="text", path=str(folder / "one.txt"), block=CONTEXT)),
    model=dict(name="decoder", vocab_size=len(set(LINE)), context=CONTEXT, width=32, depth=1, heads=2, mlp_dim=64),
    task=dict(name="language_modeling"),
    optimizer=dict(name="adamw", weight_decay=0.0),
    schedule=dict(name="constant", peak=2e-2),
    mesh=[("data", len(jax.devices()))],
    writers=("jsonl",),
  )
  bigjax.run(config, str(folder / "one"))
  changes = dict(
    data=dict(source=dict(name="text", path=str(folder / "other.txt"), block=CONTEXT)),
    lora=dict(rules=[(".*kernel", 4)]),
    init_from=dict(workdir=str(folder / "one")),
  )
  bigjax.run(config | changes, str(folder / "other"))
  return folder


def generate(capsys, *flags, code=0):
  capsys.readouterr()
  assert main.main(["generate", *flags]) == code
  shown = capsys.readouterr()
  return shown.err if code else shown.out


def answers(capsys, *flags):
  return [json.loads(line) for line in generate(capsys, *flags, "--json").splitlines()]


def test_a_model_of_one_line_writes_it(workdir, capsys):
  shown = generate(capsys, f"--workdir={workdir}", "--prompt=the c", "--temperature=0", "--max_tokens=18", "--flush=4")
  assert shown == LINE[:23] + "\n"


@pytest.mark.slow
def test_a_tuned_run_writes_what_it_was_tuned_on_and_so_do_its_published_weights(tuned, capsys):
  flags = ["--temperature=0", "--max_tokens=8"]
  one, other = (f"--prompt={line[12:]}the " for line in (LINE, OTHER))
  assert generate(capsys, f"--workdir={tuned}/one", one, *flags) == "on the mat; the cat sat \n"
  assert generate(capsys, f"--workdir={tuned}/other", other, *flags) == "on the cat; the mat sat \n"
  tokenizers.characters(LINE).save(tuned / "tokenizer")
  assert main.main(["weights", "export", f"{tuned}/other", f"{tuned}/published"]) == 0
  published = [f"--weights={tuned}/published", f"--tokenizer={tuned}/tokenizer"]
  assert generate(capsys, *published, other, *flags) == "on the cat; the mat sat \n"


def test_several_prompts_are_a_batch_and_strings_end_answers(workdir, capsys):
  flags = ["--prompt=the c", "--prompt=sat on the", "--temperature=0", "--stop=mat", "--flush=5"]
  found = answers(capsys, f"--workdir={workdir}", *flags)
  assert [row["prompt"] + row["text"] for row in found] == ["the cat sat on the ", "sat on the "]
  assert [row["ended"] for row in found] == ["stop", "stop"]
  assert [len(row["tokens"]) for row in found] == [len("at sat on the mat"), len(" mat")]


def test_samples_are_repeatable_and_say_how_likely_they_are(workdir, capsys):
  flags = ["--prompt=the", "--samples=3", "--max_tokens=10", "--temperature=2", "--log_probabilities"]
  first, again = (answers(capsys, f"--workdir={workdir}", *flags, "--seed=5") for _ in range(2))
  assert first == again
  assert len({row["text"] for row in first}) == 3
  assert all(len(row["log_probabilities"]) == 10 and max(row["log_probabilities"]) <= 0 for row in first)
  assert [row["ended"] for row in first] == ["length"] * 3


@pytest.mark.parametrize(
  ("flags", "said"),
  [
    (["--prompt=" + LINE * 2], f"has 48 tokens, and the model's context is {CONTEXT}"),
    (["--prompt=x"], "'x' .* is not among its"),
    (["--prompt=the", "--tokenizer=byte"], "the model has 11 tokens and the tokenizer"),
    (["--prompt=the", "--top_p=3"], "top_p: 3.0"),
    (["--prompt=the", "--cache=int7"], "int7"),
    (["--prompt=the", "--step=7"], "step"),
    (["--prompt=the", "--seed=-1"], "seed: -1 is outside"),
    (["--prompt=the", "--stop="], "stop: an empty string"),
    (["--prompt=the", "--system=Be brief."], "--system is part of a conversation"),
    (["--prompt=the", "--template=chatmle"], "Did you mean 'chatml'"),
    (["--prompts=nowhere.txt"], "nowhere.txt"),
    (["--prompt=the", "--weights=nowhere"], "one of --workdir and --weights"),
    (["--prompt=the", "--config.modle=1"], "modle"),
    (["--prompt=the", "--warmth=1"], "warmth"),
    ([], "no prompt"),
  ],
)
def test_what_can_not_be_done_is_refused_with_the_reason(workdir, capsys, flags, said):
  assert re.search(said, generate(capsys, f"--workdir={workdir}", *flags, code=2))


def test_a_model_that_writes_nothing_on_is_refused_before_its_vocabulary_is_asked_for(tmp_path, capsys):
  source = dict(name="synthetic", kind="images", num_examples=16, shape=(2, 2, 1), num_classes=2)
  config = dict(
    total_steps=1,
    batch_size=8,
    data=dict(source=source),
    model=dict(name="linear", in_features=4, num_outputs=2),
    task=dict(name="classification"),
    optimizer=dict(name="sgd"),
    schedule=dict(name="constant", peak=0.1),
    writers=("jsonl",),
  )
  bigjax.run(config, str(tmp_path))
  said = generate(capsys, f"--workdir={tmp_path}", "--prompt=the", code=2)
  assert "Linear is no model that writes on. Take gpt or decoder." in said


def test_bytes_that_are_no_symbol_yet_are_held_back():
  assert text._sure("caf\ufffd", ()) == 3
  assert text._sure("a cat s", ["sat", "dog"]) == 6
  assert text._sure("a cat", ["sat"]) == 5


def test_text_comes_as_it_is_sure(workdir):
  run = bigjax.load(workdir)
  generator = Generator(run.run.model.bind, (run.state.params, run.state.extras), run.run.layout)
  writer = text.Writer(generator, text.tokenizer_of(run.run.data.source))
  seen = [answers[0].text for answers in writer.stream(["the c"], stop=["on the sun"], max_tokens=18, flush=4)]
  assert seen == ["at s", "at sat ", "at sat ", "at sat on the ma", "at sat on the mat;", "at sat on the mat;"]
