"""What holds for any input, tried on many: orders, packing, durations, splits, configs, preprocessing, checksums."""

import dataclasses
import inspect
import itertools
import json
import math
import struct
from typing import Annotated, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bigjax import config as configs
from bigjax import schedules
from bigjax.data import ops, order, packing, splits
from bigjax.errors import UserError
from bigjax.weights import gguf, safetensors
from bigjax.weights.tensors import whole

# The same examples on every machine: what CI finds, everybody finds.
settings.register_profile(
  "bigjax", derandomize=True, database=None, max_examples=40, deadline=None,
  suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("bigjax")


def told(read, *args, says, **kwargs):
  """Returns what a reader makes of it, or None where it refuses, which has to be in words that name the place."""
  try:
    return read(*args, **kwargs)
  except UserError as e:
    said = str(e)
  assert said.strip() and says in said
  return None


SEEDS = st.integers(-(2**63), 2**64 - 1)
TEXTS = st.text(max_size=60)


# Orders


@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_an_epoch_has_every_example_once_for_any_size_seed_and_epoch(n, seed, epoch):
  ids = order.permute(np.arange(n), n, seed, epoch)
  assert np.array_equal(np.sort(ids), np.arange(n))


@given(n=st.integers(2, 2**50), seed=SEEDS, data=st.data())
def test_places_of_any_large_set_go_to_as_many_examples_of_it(n, seed, data):
  places = np.array(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=30))))
  ids = order.permute(places, n, seed)
  assert len(set(ids.tolist())) == len(places) and ids.min() >= 0 and ids.max() < n


@given(n=st.integers(1, 500), seed=SEEDS, start=st.integers(0, 10**6), count=st.integers(1, 200))
def test_a_part_of_the_stream_is_what_the_whole_has_there(n, seed, start, count):
  epochs, ids = order.shuffled(n, np.arange(start, start + count), seed)
  for i in (0, count - 1):
    epoch, one = order.shuffled(n, np.array([start + i]), seed)
    assert (epoch[0], one[0]) == (epochs[i], ids[i]) == ((start + i) // n, ids[i])


# Packing


@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=60), room=st.integers(2, 40))
def test_packed_rows_predict_every_token_once_and_waste_is_counted(lengths, room):
  lengths = np.array(lengths)
  starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
  plan = packing.pack(starts, lengths, room)
  assert plan.rows[0] == 0 and plan.rows[-1] == len(plan.lengths) and (np.diff(plan.rows) > 0).all()
  filled = np.add.reduceat(plan.lengths, plan.rows[:-1]) if len(plan) else np.zeros(0)
  assert (filled <= room).all() and (plan.lengths > 1).all()
  assert math.isclose(plan.efficiency, filled.sum() / (room * max(1, len(plan))))
  # A piece predicts all but its first token; no document's is predicted twice, none but its first is left out.
  predicted = [t for s, n in zip(plan.starts, plan.lengths) for t in range(s + 1, s + n)]
  wanted = [t for s, n in zip(starts, lengths) for t in range(s + 1, s + n)]
  assert sorted(predicted) == wanted
  document = np.repeat(np.arange(len(lengths)), lengths)
  assert all(document[s] == document[s + n - 1] for s, n in zip(plan.starts, plan.lengths))
  begins = plan.starts[plan.rows[:-1]] if len(plan) else plan.starts
  assert (np.diff(begins) > 0).all()  # Rows in the order of their first pieces.


# Durations and splits


@given(
  number=st.floats(0, 1e6), unit=st.sampled_from(["epochs", "examples", "tokens", "%"]), batch=st.integers(1, 4096),
  examples=st.integers(1, 10**7), total=st.integers(1, 10**6),
)  # fmt: skip
def test_a_duration_is_the_nearest_whole_number_of_steps(number, unit, batch, examples, total):
  clock = schedules.Clock(total, batch, examples, 128)
  steps = clock.steps(f"{number!r} {unit}" if unit != "%" else f"{number!r}%")
  exact = {"epochs": number * examples / batch, "examples": number / batch, "tokens": number / batch / 128}
  exact["%"] = number * total / 100
  assert (steps == 0) == (exact[unit] == 0)
  assert abs(steps - exact[unit]) <= 0.5 * (1 + 1e-9) or (steps == 1 and exact[unit] < 1)


@given(text=st.one_of(TEXTS, st.integers(), st.floats(), st.booleans()))
def test_a_duration_is_understood_or_refused_in_words(text):
  if found := told(schedules.parse_duration, text, "config.x", says="config.x: "):
    number, unit = found
    assert number >= 0 and math.isfinite(number) and unit in ("steps", "epochs", "examples", "tokens", "percent")


@given(size=st.integers(1, 5000), cuts=st.lists(st.integers(0, 100), max_size=4), seed=st.none() | st.integers(0, 9))
def test_parts_of_a_split_leave_nothing_out_and_share_nothing(size, cuts, seed):
  bounds = sorted({0, 100, *cuts})
  found = []
  for start, stop in itertools.pairwise(bounds):
    parsed = told(splits.parse, f"train[{start}%:{stop}%]", {"train": size}, seed, says="has no examples")
    if parsed is None:
      continue
    part = parsed[1]
    found.append(np.arange(size)[part.rows()])
    assert len(part) == len(found[-1])
  assert sorted(np.concatenate(found).tolist()) == list(range(size))


@given(size=st.integers(2, 2000), count=st.integers(2, 12))
def test_folds_are_as_large_as_each_other_and_the_rest_is_the_rest(size, count):
  assume(count <= size)
  rows = lambda split: set(np.arange(size)[splits.parse(split, {"train": size})[1].rows()].tolist())
  folds = [rows(f"fold({i},{count})") for i in range(count)]
  assert set.union(*folds) == set(range(size)) and sum(map(len, folds)) == size
  assert max(map(len, folds)) - min(map(len, folds)) <= 1
  assert rows(f"not_fold(1,{count})") == set(range(size)) - folds[1]


@given(text=st.one_of(TEXTS, st.from_regex(r"[a-z\[\]:%0-9+().,_-]{0,30}", fullmatch=True)))
def test_a_split_is_understood_or_refused_in_words(text):
  found = told(splits.parse, text, {"train": 100}, says="split=")
  assert found is None or 0 < len(found[1]) <= 100


# Configs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A section of a config."""

  ratio: float = 0.5
  steps: Annotated[int | float | str, "duration"] = "5%"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
  """A config with a value of each type there is."""

  count: int
  name: str = "x"
  on: bool = False
  rate: float | None = None
  word: Literal["a", "b", 3] = "a"
  sizes: tuple[int, ...] = ()
  pairs: tuple[tuple[str, float], ...] = ()
  part: Part = Part()
  parts: dict[str, Part] = dataclasses.field(default_factory=dict)
  either: Part | str | None = None


FINITE = st.floats(allow_nan=False, allow_infinity=False)
DURATIONS = st.one_of(st.integers(0, 10**9), st.sampled_from(["5%", "2 epochs", "1e6 tokens"]))
PARTS = st.fixed_dictionaries({}, optional=dict(ratio=FINITE, steps=DURATIONS))
WORDS = st.text("abcdefghij_-. 0123456789é", max_size=12)
WHOLES = st.fixed_dictionaries(
  dict(count=st.integers(-(10**12), 10**12)),
  optional=dict(
    name=WORDS, on=st.booleans(), rate=st.none() | FINITE, word=st.sampled_from(["a", "b", 3]),
    sizes=st.lists(st.integers(), max_size=4), pairs=st.lists(st.tuples(WORDS, FINITE), max_size=3), part=PARTS,
    parts=st.dictionaries(st.text("abc", min_size=1, max_size=4), PARTS, max_size=2), either=st.none() | WORDS | PARTS,
  ),
)  # fmt: skip


@given(config=WHOLES)
def test_a_config_written_down_resolves_to_the_same_again(config):
  resolved = configs.resolve(config, Whole)
  described = configs.describe(resolved)
  assert configs.resolve(described, Whole) == resolved
  through_json = json.loads(json.dumps(described))
  assert configs.describe(configs.resolve(through_json, Whole)) == described
  assert configs.digest(through_json) == configs.digest(described) and configs.diff(described, through_json) == []


@given(config=WHOLES, name=st.text(min_size=1, max_size=12))
def test_a_key_that_is_not_known_is_refused_wherever_it_stands(config, name):
  assume(name not in {f.name for f in (*dataclasses.fields(Whole), *dataclasses.fields(Part))})
  with pytest.raises(UserError, match="is not a known setting"):
    configs.resolve(config | {name: 1}, Whole)
  with pytest.raises(UserError, match=r"(?s)config\.part\..* is not a known setting"):
    configs.resolve(config | {"part": {name: 1}}, Whole)


ANYTHING = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
  max_leaves=6,
)


@given(
  config=st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Whole)]) | WORDS, ANYTHING, max_size=5)
)
def test_any_values_resolve_or_are_refused_in_words_that_name_the_key(config):
  if resolved := told(configs.resolve, config, Whole, says="config"):
    described = configs.describe(resolved)
    assert json.dumps(configs.describe(configs.resolve(described, Whole))) == json.dumps(described)


@settings(max_examples=25)
@given(
  count=st.integers(-(10**9), 10**9), rate=FINITE, on=st.booleans(),
  name=st.from_regex(r"[a-z_]{1,10}", fullmatch=True), sizes=st.lists(st.integers(-99, 99), min_size=1, max_size=4),
)  # fmt: skip
def test_what_flags_say_is_what_the_config_has(count, rate, on, name, sizes):
  assume(name not in ("true", "false", "none"))
  flags = [f"--config.count={count}", f"--config.rate={rate!r}", f"--config.on={on}", f"--config.name={name}"]
  flags += [f"--config.sizes={sizes!r}", f"--config.part.ratio={rate!r}"]
  resolved = configs.resolve(configs.override({"count": 1, "part": {}}, flags), Whole)
  assert resolved == Whole(count=count, rate=rate, on=on, name=name, sizes=tuple(sizes), part=Part(ratio=float(rate)))


@settings(max_examples=40)
@given(flag=st.one_of(TEXTS, st.builds("--config.{}={}".format, TEXTS, TEXTS), st.builds("--{}".format, TEXTS)))
def test_any_flag_is_taken_or_refused_in_words(flag):
  assume("\0" not in flag)
  found = told(lambda: configs.resolve(configs.override({"count": 1}, [flag]), Whole), says="")
  assert found is None or (isinstance(found, Whole) and type(found.count) is int)


@given(arg=st.none() | st.text("abcdefghijk=,.0123456789[]()'\"-{} \n", max_size=40))
def test_any_argument_of_a_config_is_taken_or_refused_in_words(arg):
  defaults = dict(a="x", b=1, c=0.5, d=False, e=None)
  if found := told(configs.parse_arg, arg, **defaults, says="--config=...:"):
    assert set(vars(found)) == set(defaults)
    assert all(type(getattr(found, k)) is type(v) for k, v in defaults.items() if v is not None)


# Preprocessing


KNOWN = ops.known()
LITERALS = st.recursive(
  st.integers(-1000, 1000) | st.floats(-10, 10) | st.booleans() | st.none() | st.text("abx_'\"\\ ", max_size=4),
  lambda inner: st.lists(inner, max_size=3).map(tuple),
  max_leaves=4,
)
NAMES = sorted({n for f in KNOWN.values() for n in inspect.signature(f).parameters})


@st.composite
def written_ops(draw):
  """Strings of ops with arguments that now and then fit."""
  calls = []
  for _ in range(draw(st.integers(1, 3))):
    arguments = [repr(v) for v in draw(st.lists(LITERALS, max_size=2))]
    arguments += [f"{k}={v!r}" for k, v in draw(st.dictionaries(st.sampled_from(NAMES), LITERALS, max_size=2)).items()]
    calls.append(draw(st.sampled_from(sorted(KNOWN))) + (f"({', '.join(arguments)})" if arguments else ""))
  return "|".join(calls)


@settings(max_examples=150)
@given(text=written_ops())
def test_ops_read_from_what_they_print_are_the_same(text):
  chain = told(ops.parse, text, "config.data.preprocess", says="config.data.preprocess: ")
  if chain is None:
    return
  printed = "|".join(map(str, chain))
  again = ops.parse(printed)
  assert [(op.name, op.args, op.kind) for op in again] == [(op.name, op.args, op.kind) for op in chain]
  assert "|".join(map(str, again)) == printed


@pytest.mark.parametrize(
  "text", ["value_range(-1,1)", "value_range(0, 1, 0, 16)|flip_lr(0.25)", "keep('image', 'label')|drop('id')"]
)
def test_usual_ops_are_read_so(text):
  chain = ops.parse(text)
  assert [(o.name, o.args) for o in ops.parse("|".join(map(str, chain)))] == [(o.name, o.args) for o in chain]


@given(text=st.one_of(TEXTS, st.text("abcdef_(),|='\"0123456789.[]{}-+*: \n#\\", max_size=60)))
def test_any_string_of_ops_is_understood_or_refused_in_words(text):
  chain = told(ops.parse, text, says="preprocess: ")
  assert chain is None or all(callable(o) for o in chain)


@pytest.mark.parametrize("text", ["(" * 10_000, "-" * 100_000 + "1", "keep" + "(" * 300 + ")" * 300, "f(" + "[" * 5000])
def test_nesting_without_end_is_refused(text):
  with pytest.raises(UserError, match="preprocess: "):
    ops.parse(text)
  with pytest.raises(UserError, match="--config"):
    configs.parse_arg(f"b={text}", b=1)


def test_no_argument_of_an_op_is_run(capsys):
  for call in ("print('x')", "[print(i) for i in 'ab']", "lambda: print(0)", "f'{print(1)}'", "1 if print(2) else 0"):
    with pytest.raises(UserError, match="not a number, string, tuple"):
      ops.parse(f"keep({call})")
  with pytest.raises(UserError, match="not an op"):
    ops.parse("(lambda: print(3))()")
  assert capsys.readouterr().out == ""


# Weights


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(
  shapes=st.dictionaries(st.text(min_size=1, max_size=10).filter(lambda n: n != "__metadata__"), SHAPES, max_size=5),
  kind=st.sampled_from(sorted(safetensors.DTYPES)), size=st.integers(1, 200),
)  # fmt: skip
def test_tensors_of_any_names_and_shapes_are_read_as_written(tmp_path_factory, shapes, kind, size):
  folder, dtype = tmp_path_factory.mktemp("tensors"), safetensors.DTYPES[kind]
  draw = np.random.default_rng(0)
  values = {n: draw.integers(0, 2, shape).astype(dtype) for n, shape in shapes.items()}
  made = [safetensors.Made(n, v.shape, v.dtype, lambda v=v: v) for n, v in values.items()]
  safetensors.write(str(folder), made, shard_size=size)
  found, _ = safetensors.open_files(str(folder))
  assert set(found) == set(values)
  for name, value in values.items():
    assert found[name].dtype == dtype and found[name].read(whole(value.shape)).tobytes() == value.tobytes()


JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.sampled_from(["F32", "BF16", "I8"])
  | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner, max_size=3)
  ),
  max_leaves=12,
)


@given(header=JSON | st.dictionaries(TEXTS, JSON), data=st.binary(max_size=40))
def test_any_header_of_safetensors_is_read_or_refused(tmp_path_factory, header, data):
  file = tmp_path_factory.mktemp("header") / "a.safetensors"
  text = json.dumps(header).encode()
  file.write_bytes(struct.pack("<Q", len(text)) + text + data)
  if found := told(safetensors.open_files, str(file), says=str(file)):
    assert sum(t.read(whole(t.shape)).nbytes for t in found[0].values()) == len(data)


@given(content=st.binary(max_size=200), pairs=st.integers(0, 3), count=st.integers(0, 3))
def test_any_bytes_after_the_mark_of_gguf_are_read_or_refused(tmp_path_factory, content, pairs, count):
  file = tmp_path_factory.mktemp("gguf") / "a.gguf"
  file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, count, pairs) + content)
  found = told(gguf.read_header, str(file), says=str(file))
  assert found is None or len(content) > 0 or pairs == count == 0  # Nothing is made of what is not there.
