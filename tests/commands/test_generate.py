"""`bigjax generate` as a person meets it, on a run that was trained here."""

import json
import re

import pytest

import bigjax
from bigjax import main
from bigjax.infer import text
from bigjax.infer.decode import Generator

CONTEXT = 24
LINE = "the cat sat on the mat; "


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
  import jax

  config["mesh"] = [("data", len(jax.devices()))]
  bigjax.run(config, str(folder / "run"))
  return str(folder / "run")


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
    (["--prompt=the", "--config.modle=1"], "modle"),
    (["--prompt=the", "--warmth=1"], "warmth"),
    ([], "no prompt"),
  ],
)
def test_what_can_not_be_done_is_refused_with_the_reason(workdir, capsys, flags, said):
  assert re.search(said, generate(capsys, f"--workdir={workdir}", *flags, code=2))


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
