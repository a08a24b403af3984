"""What README.md and CONTRIBUTING.md say can be done, can be done: their configs and components are trained here."""

import contextlib
import io
import pathlib
import re
import shlex
import sys
import tomllib

import ml_collections
import pytest
import tokenizers

import bigjax
from bigjax import config as configs
from bigjax import main
from bigjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LIGHT = "--config.writers=('jsonl','csv')"  # TensorBoard's writer imports TensorFlow.


def blocks(text, language):
  return [code for found, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if found == language]


def commands(text):
  """What is to be typed: the lines of the shell blocks, and code in the text that starts with a command."""
  lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
  lines += re.findall(r"`((?:make|sh|python|bigjax|\.ci/run) [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
  return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = commands(README) + commands(CONTRIBUTING)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  file = tmp_path_factory.mktemp("first") / "first.py"
  file.write_text(next(block for block in blocks(README, "python") if "def get_config" in block))
  return file


@pytest.fixture(scope="module")
def workdir(first, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("runs") / "first")
  bigjax.run(configs.read(str(first), ["--config.total_steps=2 epochs", LIGHT]), workdir)
  return pathlib.Path(workdir)


def test_the_first_config_trains(workdir):
  assert bigjax.read_metrics(str(workdir))["test/accuracy"][-1][1] > 0.3


def test_a_workdir_holds_what_the_readme_says(workdir):
  table = README.partition("## A workdir")[2].partition("\n## ")[0]
  files = re.findall(r"^\| (.*?) \|", table, re.M)[2:]
  names = [name for cell in files for name in re.findall(r"`(.*?)`", cell) if not name.startswith("eval-")]
  assert len(names) > 5
  assert [name for name in names if not (workdir / name).exists()] == []


def test_the_components_of_contributing_train_by_their_dotted_names(tmp_path, monkeypatch):
  for block in blocks(CONTRIBUTING, "python"):
    file = tmp_path / re.match(r"# (shapes/\w+\.py)\n", block)[1]
    file.parent.mkdir(exist_ok=True)
    file.write_text(block)
  monkeypatch.syspath_prepend(tmp_path)
  config = configs.read(str(tmp_path / "shapes" / "config.py"), ["--config.total_steps=12 epochs", LIGHT])
  try:
    bigjax.run(config, str(tmp_path / "run"))
  finally:
    for name in [name for name in sys.modules if name.partition(".")[0] == "shapes"]:
      del sys.modules[name]
  found = bigjax.read_metrics(str(tmp_path / "run"))
  assert found["test/accuracy"][-1][1] > 0.9
  assert 0 <= found["calibration/calibration_error"][-1][1] < 0.5


@pytest.mark.parametrize("line", sorted({shlex.join(w) for w in COMMANDS if w[0] == "bigjax" and w[1] != "COMMAND"}))
def test_a_command_knows_its_flags(line):
  words = shlex.split(line)
  flags = {word.partition("=")[0] for word in words if word.startswith("--") and not word.startswith("--config.")}
  with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit, match="0"):
    main.main([*words[1:], "--help"])
  assert flags <= set(re.findall(r"--[\w.]+", shown.getvalue()))


def test_configs_and_overrides_of_commands_resolve(first, monkeypatch):
  monkeypatch.chdir(ROOT)
  lines = [words for words in COMMANDS if words[:2] in (["bigjax", "train"], ["bigjax", "explain"]) and words[2:]]
  for words in lines:
    file = next(w.removeprefix("--config=") for w in words if w.startswith("--config="))
    file = file.replace("first.py", str(first))
    if file != "FILE":
      bigjax.resolve(configs.read(file, [w for w in words if w.startswith("--config.")]))
  assert len(lines) >= 4


def test_parts_of_configs_that_are_shown_resolve(tmp_path, monkeypatch):
  """Each line that sets a key, on top of those before it."""
  (tmp_path / "data" / "bert").mkdir(parents=True)
  vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[MASK]": 1}, unk_token="[PAD]"))
  vocabulary.add_special_tokens(["[PAD]", "[MASK]"])
  vocabulary.save(str(tmp_path / "data" / "bert" / "tokenizer.json"))
  monkeypatch.chdir(tmp_path)
  parts = [block for block in blocks(README, "python") if "config." in block and "def " not in block]
  parts = [block for block in parts if "import bigjax" not in block]
  assert len(parts) >= 3
  model = dict(name="decoder", vocab_size=256, context=1025, width=8, depth=1, heads=1, mlp_dim=8)
  for part in parts:
    config = ml_collections.ConfigDict(dict(total_steps=1, batch_size=8, model=model, optimizer="adamw"))
    config.data = dict(source=dict(name="synthetic", kind="tokens"))
    config.task, config.schedule = dict(name="language_modeling"), dict(name="constant", peak=1e-3)
    found = {"config": config}
    for line in part.splitlines():
      exec(line, found)  # The README is ours.
      bigjax.resolve(config)


def test_every_command_is_told_of():
  assert set(main.COMMANDS) <= {words[1] for words in COMMANDS if words[0] == "bigjax"}


def test_targets_of_make_and_extras_of_the_set_up_exist():
  targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
  assert {words[1] for words in COMMANDS if words[0] == "make"} <= targets
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  assert {words[2] for words in COMMANDS if words[:2] == ["sh", "scripts/bootstrap.sh"]} <= set(extras)


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_paths_that_are_named_exist(text):
  links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
  code = re.findall(r"`((?:bigjax|configs|scripts|tests|notebooks|\.ci)/[\w./]*)`", text)
  assert sorted({path for path in links + code if not (ROOT / path).exists()}) == []


def test_the_tree_shows_what_there_is():
  tree = next(block for block in blocks(README, "") if block.startswith("bigjax/"))
  paths = [("bigjax/" if line.startswith("  ") else "") + line.split()[0] for line in tree.splitlines()]
  assert len(paths) > 15
  assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_table_of_components_is_right_and_complete():
  rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", README.partition("What there is to name")[2], re.M))
  kinds = {"data.source": "data", "model": "models", "task": "tasks", "evals.NAME.evaluator": "evaluators"}
  kinds |= {"optimizer": "optimizers", "schedule": "schedules"}
  for key, kind in kinds.items():
    names = set(re.findall(r"`(\w+)`", rows[key])) - {"optax"}
    for name in names:
      assert callable(configs.load(kind, name))
    files = (ROOT / "bigjax" / kind).glob("*.py")
    assert {file.stem for file in files if "\ndef make(" in file.read_text()} <= names


def test_the_error_that_is_quoted_is_what_is_said(first):
  quoted = re.search(r"\(`(config\.model\.chanels .*?)`", README, re.S)[1]
  with pytest.raises(UserError) as error:
    bigjax.resolve(configs.read(str(first), ["--config.model.chanels=3"]))
  assert str(error.value) == " ".join(quoted.split())


def test_the_functions_for_notebooks_are_all_shown():
  shown = re.findall(r"bigjax\.(\w+)\(", "".join(blocks(README, "python")))
  assert set(shown) == set(bigjax.__all__)
  assert all(callable(getattr(bigjax, name)) for name in shown)
