"""The config contract: what is wrong is said with its path, its value and the remedy, and nothing is swallowed."""

import dataclasses
import json
from typing import Annotated, Literal

import pytest

from bigjax import config as configs
from bigjax.config import Component
from bigjax.errors import UserError
from bigjax.schedules import Duration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
  every: Duration = "5%"
  mode: Literal["max", "min"] = "max"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
  size: int
  rate: float = 0.1
  model: Annotated[Component, "models"] | None = None
  inner: Inner = Inner()
  maybe: Inner | None = None
  rules: tuple[tuple[str, float | str], ...] = ()
  named: dict[str, Inner] = dataclasses.field(default_factory=dict)


def resolve(**config):
  return configs.resolve(config, Outer)


def test_a_config_resolves_to_frozen_typed_values():
  found = resolve(
    size=3,
    rate=1,
    rules=[["a", 1], ("b", "l2(1)")],
    named={"x": {"mode": "min"}},
    model=dict(name="mlp", in_features=4, num_outputs=2),
  )
  assert found.rate == 1.0 and isinstance(found.rate, float)
  assert found.rules == (("a", 1.0), ("b", "l2(1)"))
  assert found.named["x"].mode == "min"
  assert found.model.kwargs == {"in_features": 4, "num_outputs": 2}
  with pytest.raises(dataclasses.FrozenInstanceError):
    found.size = 4


@pytest.mark.parametrize(
  ("config", "words"),
  [
    (dict(size=3, sise=4), ["config.sise", "Did you mean 'size'"]),
    (dict(), ["config is missing 'size' (int)"]),
    (dict(size="3"), ["config.size must be int, not '3'"]),
    (dict(size=True), ["config.size must be int, not True"]),
    (dict(size=3, inner=dict(evry=3)), ["config.inner.evry", "Did you mean 'every'"]),
    (dict(size=3, maybe=dict(evry=3)), ["config.maybe.evry", "Did you mean 'every'"]),
    (dict(size=3, inner=dict(every="3 epoks")), ["config.inner.every", "3 epoks", "epochs"]),
    (dict(size=3, inner=dict(mode="mx")), ["config.inner.mode must be one of 'max', 'min', not 'mx'"]),
    (dict(size=3, named=dict(a=dict(mode=1))), ["config.named.a.mode"]),
    (dict(size=3, rules=[("a",)]), ["config.rules[0] must have 2 entries"]),
    (dict(size=3, rules="a"), ["config.rules must be a list"]),
    (dict(size=3, model=dict(name="vitt")), ["config.model.name", "vitt", "Did you mean 'vit'"]),
    (dict(size=3, model=dict(name="mlp", depht=2)), ["config.model.depht"]),
    (
      dict(size=3, model=dict(name="mlp", in_features="x", num_outputs=1)),
      ["config.model.in_features must be int, not 'x'"],
    ),
    (dict(size=3, model=dict(name="mlp")), ["config.model (mlp) is missing"]),
    (
      dict(size=3, model=dict(name="mlp", in_features=1, num_outputs=1, rngs=0)),
      ["config.model.rngs", "set by the program"],
    ),
    (dict(size=3, model=dict(name="no_such_package.model")), ["config.model.name", "no_such_package.model"]),
    (dict(size=3, model=7), ["config.model", "dict(name="]),
  ],
)
def test_what_is_wrong_is_said_with_its_path_and_the_remedy(config, words):
  with pytest.raises(UserError) as error:
    configs.resolve(config, Outer)
  for word in words:
    assert word in str(error.value), str(error.value)


def test_the_described_config_has_every_default_and_resolves_to_itself():
  found = resolve(size=3, model=dict(name="mlp", in_features=4, num_outputs=2))
  described = configs.describe(found)
  assert described["rate"] == 0.1 and described["inner"] == {"every": "5%", "mode": "max"}
  assert "activation" in described["model"]
  again = configs.resolve(json.loads(json.dumps(described)), Outer)
  assert configs.describe(again) == described


def test_the_hash_does_not_depend_on_spelling_defaults_out():
  short, long = resolve(size=3), resolve(rate=0.1, size=3, inner=dict(mode="max"))
  assert configs.digest(configs.describe(short)) == configs.digest(configs.describe(long))
  assert configs.digest(configs.describe(short)) != configs.digest(configs.describe(resolve(size=4)))


def test_diff_names_each_key_that_changed():
  a, b = configs.describe(resolve(size=3)), configs.describe(resolve(size=4, named=dict(x={})))
  assert ("size", 3, 4) in configs.diff(a, b)
  assert ("named.x.mode", ..., "max") in configs.diff(a, b)
  assert configs.diff(a, a) == []


def test_an_optimizer_is_any_of_optax_by_name_under_its_own_signature():
  found = configs.component("optimizers", dict(name="adabelief", b1=0.8), "config.optimizer")
  assert found(learning_rate=0.1).init is not None
  with pytest.raises(UserError, match="config.optimizer.beta1"):
    configs.component("optimizers", dict(name="adabelief", beta1=0.8), "config.optimizer")
  with pytest.raises(UserError, match="Did you mean 'adamw'"):
    configs.component("optimizers", dict(name="adamww"), "config.optimizer")


def test_a_schedule_is_a_function_of_its_file():
  assert configs.component("schedules", dict(name="cosine", peak=1e-3), "config.schedule").kwargs == {"peak": 1e-3}
  with pytest.raises(UserError, match="Did you mean 'cosine'"):
    configs.component("schedules", dict(name="cosin", peak=1e-3), "config.schedule")


@pytest.fixture
def config_file(tmp_path):
  file = tmp_path / "tiny.py"
  file.write_text(
    "import ml_collections\nfrom bigjax.config import parse_arg\n"
    "def get_config(arg=None):\n"
    "  arg = parse_arg(arg, variant='a', width=8, big=False)\n"
    "  inner = dict(mode=arg.variant, big=arg.big)\n"
    "  return ml_collections.ConfigDict(dict(size=arg.width, steps='5 epochs', inner=inner))\n"
  )
  return str(file)


def test_overrides_go_through_ml_collections_flags(config_file):
  found = configs.read(
    config_file,
    [
      "--config.size=9",
      "--config.steps=100",
      "--config.inner.mode=min",
      "--config.new=(1, 2)",
      "--config.inner.big=true",
    ],
  )
  assert found.to_dict() == {"size": 9, "steps": 100, "inner": {"mode": "min", "big": True}, "new": (1, 2)}


def test_an_override_reaches_into_a_section_that_the_config_leaves_out(config_file):
  found = configs.read(config_file, ["--config.keep.last=2", "--config.keep.best=val/loss"])
  assert found.to_dict()["keep"] == {"last": 2, "best": "val/loss"}


def test_folders_may_have_colons_in_their_names(tmp_path):
  (tmp_path / "12:30").mkdir()
  (tmp_path / "12:30" / "c.py").write_text("def get_config(arg=None): return dict(arg=arg)")
  (tmp_path / "12:30" / "config.json").write_text('{"a": 1}')
  assert configs.read(str(tmp_path / "12:30" / "c.py:x:y")).arg == "x:y"
  assert configs.read(str(tmp_path / "12:30" / "config.json")).a == 1


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("def get_config():\n  x = {}\n  return x['nope']", r"KeyError: 'nope' \(line 3\)"),
    ("x = 1 / 0", r"ZeroDivisionError.*\(line 1\)"),
    ("def get_config(): pass", "gives None"),
  ],
)
def test_what_a_config_file_raises_is_told_with_its_line(tmp_path, text, words):
  (tmp_path / "mine.py").write_text(text)
  with pytest.raises(UserError, match=words):
    configs.read(str(tmp_path / "mine.py"))


def test_a_damaged_recorded_config_is_said_so(tmp_path):
  (tmp_path / "config.json").write_text('{"a": ')
  with pytest.raises(UserError, match="can't be read"):
    configs.read(str(tmp_path / "config.json"))


def test_a_config_argument_is_read_by_name_and_by_first_word(config_file):
  assert configs.read(f"{config_file}:b,width=16,big").to_dict() == {
    "size": 16,
    "steps": "5 epochs",
    "inner": {"mode": "b", "big": True},
  }
  with pytest.raises(UserError, match="Did you mean 'width'"):
    configs.read(f"{config_file}:widht=16")


@pytest.mark.parametrize(
  ("flags", "words"),
  [(["--config.inner.mode.x=1"], "inner"), (["--conf.size=1"], "conf.size"), (["stray"], "stray")],
)
def test_an_override_that_can_not_be_is_refused(config_file, flags, words):
  with pytest.raises(UserError, match=words):
    configs.read(config_file, flags)


def test_a_missing_file_and_a_broken_one_are_said_so(config_file, tmp_path):
  with pytest.raises(UserError, match="Did you mean .*tiny.py"):
    configs.read(str(tmp_path / "tinny.py"))
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  with pytest.raises(UserError, match="SyntaxError"):
    configs.read(str(tmp_path / "broken.py"))
  (tmp_path / "empty.py").write_text("x = 1\n")
  with pytest.raises(UserError, match="no function get_config"):
    configs.read(str(tmp_path / "empty.py"))
