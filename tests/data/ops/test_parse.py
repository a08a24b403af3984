"""The string of ops is read exactly, checked against signatures, and wrong ones say what to write instead."""

import subprocess
import sys

import numpy as np
import pytest

from bigjax.data import ops
from bigjax.errors import UserError


def test_a_chain_is_read_in_order_with_positional_and_named_arguments():
  chain = ops.parse("decode|inception_crop(224, area_min=8)|flip_lr|value_range(-1, 1)|keep('image', 'label')")
  assert [op.name for op in chain] == ["decode", "inception_crop", "flip_lr", "value_range", "keep"]
  assert [op.kind for op in chain] == ["example", "example", "array", "array", "array"]
  assert [op.structural for op in chain] == [False, False, False, False, True]
  assert dict(chain[1].args) == {"size": 224, "area_min": 8.0}


def test_printing_an_op_gives_what_parses_to_it_again():
  text = "resize(size=(32, 40), method='area')|keep('a', 'b')|rename(img='image')|standardize(mean=(0.5,), std=2.0)"
  chain = ops.parse(text)
  assert "|".join(map(str, chain)) == text
  assert [op.args for op in ops.parse("|".join(map(str, chain)))] == [op.args for op in chain]


def test_nothing_is_no_ops_and_a_string_may_span_lines():
  assert ops.parse("") == ops.parse("  ") == ()
  assert [op.name for op in ops.parse("flip_lr\n  | value_range\n")] == ["flip_lr", "value_range"]


def test_a_bar_inside_a_string_does_not_split():
  assert ops.parse("keep('a|b')")[0].args == (("", "a|b"),)


def test_lists_become_tuples_and_whole_numbers_floats():
  op = ops.parse("standardize([1, 2, 3], 1)")[0]
  assert op.args == (("mean", (1.0, 2.0, 3.0)), ("std", 1.0))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("flip_rl", r"config.data.ops: there is no op 'flip_rl'. Did you mean 'flip_lr'\?"),
    ("flip_lr(chance=1)", r"flip_lr\(chance=1\): no argument is called 'chance'.*flip_lr\(probability: float = 0.5"),
    ("flip_lr('often')", r"probability must be float, not 'often'"),
    ("flip_lr(True)", r"probability must be float, not True"),
    ("resize", r"resize: missing a required argument: 'size'. The op is resize\(size: int \| tuple\[int, int\]"),
    ("resize(1, 'area', True, 'image', 5)", r"too many positional arguments"),
    ("resize((1, 2, 3))", r"size must be int \| tuple\[int, int\], not \(1, 2, 3\)"),
    ("resize(8, method='lanczos')", r"method must be Literal\['bilinear'"),
    ("keep('image', 3)", r"names must be"),
    ("resize(8, size=9)", r"multiple values for argument 'size'"),
    ("resize(0)", r"resize\(0\): a size is 1 pixel or more"),
    ("resize(open('x'))", r"an argument that is not a number, string"),
    ("flip_lr|", r"cannot be read"),
    ("flip_lr(|value_range", r"cannot be read"),
    ("flip_lr+value_range", r"is not an op"),
    ("__import__('os').system('true')", r"is not an op"),
    ("no_such_pkg.ops.mine", r"there is no module 'no_such_pkg'"),
    ("bigjax.data.ops.pixels.flip_rl", r"is not an op.*Did you mean 'flip_lr'"),
    ("json.dumps", r"is not an op"),
  ],
)
def test_a_mistake_is_one_message_with_the_remedy(text, message):
  with pytest.raises(UserError, match=message):
    ops.parse(text, "config.data.ops")


def test_a_dotted_name_reaches_an_op_of_the_users_own(tmp_path, monkeypatch):
  (tmp_path / "my_ops.py").write_text(
    "from bigjax.data.ops import array_op\n"
    "@array_op\n"
    "def shout(times: int = 1, key: str = 'text'):\n"
    "  return lambda batch, keys: {**batch, key: batch[key] + '!' * times}\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  (op,) = ops.parse("my_ops.shout(2)")
  assert op.apply({"text": "a"}, None) == {"text": "a!!"}
  assert str(op) == "my_ops.shout(times=2)"


def test_what_an_op_finds_wrong_in_the_data_names_the_op_and_its_place():
  (op,) = ops.parse("flip_lr(key='imag')", "config.data.ops")
  with pytest.raises(UserError, match=r"config.data.ops: flip_lr\(key='imag'\): there is no feature 'imag'.*'image'"):
    op.apply({"image": np.zeros((2, 4, 4, 1))}, np.zeros(2, np.uint64))


def test_every_op_has_a_docstring_and_typed_arguments():
  for name, function in ops.known().items():
    assert function.__doc__, name
    names = set(function.__code__.co_varnames[: function.__code__.co_argcount])
    assert names <= set(function.__annotations__), name


def test_reading_a_string_imports_no_tensorflow():
  script = (
    "import sys; from bigjax.data import ops; ops.parse('decode|inception_crop(8)|randaugment|mixup(0.2)');"
    "assert not {'tensorflow', 'jax', 'scipy'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", script], check=True)
