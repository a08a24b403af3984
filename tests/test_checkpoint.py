"""A checkpoint belongs to no mesh and to no form of its layers; beside that, restoring it is strict."""

import asyncio
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigjax import paths, sharding, stacks
from bigjax import state as states
from bigjax.checkpoint import Checkpoints
from bigjax.errors import UserError

DEPTH, WIDTH = 4, 32
LAYER = {"attn": {"kernel": (WIDTH, 3 * WIDTH), "bias": (3 * WIDTH,)}, "norm": {"scale": (WIDTH,)}}
TENSOR = ((".*attn/(kernel|bias)", -1), ("embed/table", -1))


def shapes(tree, lead=()):
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct((*lead, *s), jnp.float32), tree, is_leaf=lambda s: type(s) is tuple
  )


def abstract_state(form, depth=DEPTH):
  """Adam's moments, an average and Adafactor's factors; `form` is a list, a stack, or the repeats of a pipeline."""
  layers = {"list": None, "stack": (depth,)}.get(form, (form, depth // form if isinstance(form, int) else 0))
  blocks = shapes(LAYER, layers) if layers else {str(i): shapes(LAYER) for i in range(depth)}
  params = {"embed": shapes({"table": (64, WIDTH)}), "blocks": blocks, "head": shapes({"bias": (WIDTH,)})}

  def optimizer(params):
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=16)
    return {"adam": optax.scale_by_adam().init(params), "ema": params, "factored": factored.init(params)}

  step = jax.ShapeDtypeStruct((), jnp.int32)
  return states.TrainState(step, params, {"stats": shapes((WIDTH,))}, jax.eval_shape(optimizer, params))


def expected(abstract):
  """Every layer's values by a name that is the same in all forms, stacked here by NumPy as the leaf has it."""

  def draw(name, shape, dtype):
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, 1000, shape).astype(dtype)

  def leaf(name, x):
    head, found, tail = name.partition("/blocks/")
    if not found or tail.split("/")[0].isdigit() or x.shape == (1,):
      return np.zeros(1, x.dtype) if x.shape == (1,) else draw(name, x.shape, x.dtype)
    lead = 1 if x.shape[0] == DEPTH else 2
    assert np.prod(x.shape[:lead]) == DEPTH
    layers = [draw(f"{head}/blocks/{i}/{tail}", x.shape[lead:], x.dtype) for i in range(DEPTH)]
    return np.stack(layers).reshape(x.shape)

  return paths.map_with_name(leaf, abstract)


def laid_out(abstract, axes, strategy, repeats=1):
  count = int(np.prod([size for _, size in axes]))
  mesh = sharding.make_mesh(axes, jax.devices()[:count])
  return sharding.shard_tree(abstract, strategy, mesh, roles={"tensor": TENSOR}, repeats=repeats)


PLACES = {
  "1 device": ("list", [("data", 1)], "replicated"),
  "1 device, scanned": ("stack", [("data", 1)], "replicated"),
  "DP8": ("list", [("data", 8)], "replicated"),
  "FSDP8": ("list", [("data", 8)], "fsdp"),
  "FSDP8, scanned": ("stack", [("data", 8)], "fsdp"),
  "HSDP 2x4": ("list", [("replica", 2), ("data", 4)], "hsdp"),
  "FSDP2 x TP4": ("list", [("data", 2), ("tensor", 4)], "fsdp+tensor"),
  "TP4, scanned": ("stack", [("tensor", 4)], "tensor"),
  "PP4": ("stack", [("pipe", 4)], "pipe"),
  "PP2 x FSDP2 x TP2, 2 repeats": (2, [("data", 2), ("pipe", 2), ("tensor", 2)], "pipe+fsdp+tensor"),
}


def place(name):
  form, axes, strategy = PLACES[name]
  abstract = abstract_state(form)
  return abstract, laid_out(abstract, axes, strategy, form if isinstance(form, int) else 1)


def assert_restores(tmp_path, saved_at, names):
  abstract, shardings = place(saved_at)
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(3, jax.device_put(expected(abstract), shardings), {"best": 0.5})
    checkpoints.wait()
    for name in names:
      abstract, shardings = place(name)
      state, loop = checkpoints.restore(abstract, shardings)
      assert loop == {"best": 0.5}
      assert jax.tree.structure(state) == jax.tree.structure(abstract)
      for leaf, value, where in zip(*map(jax.tree.leaves, (state, expected(abstract), shardings)), strict=True):
        assert leaf.sharding == where and leaf.dtype == value.dtype
        np.testing.assert_array_equal(leaf, value)


@pytest.mark.parametrize(
  ("saved_at", "names"),
  [
    ("1 device", ["FSDP8, scanned", "FSDP2 x TP4", "PP2 x FSDP2 x TP2, 2 repeats"]),
    ("FSDP8, scanned", ["DP8", "PP4"]),
    ("PP2 x FSDP2 x TP2, 2 repeats", ["1 device", "TP4, scanned", "HSDP 2x4"]),
  ],
)
def test_saved_on_one_mesh_in_one_form_it_restores_on_others_to_the_bit(tmp_path, saved_at, names):
  assert_restores(tmp_path, saved_at, names)


@pytest.mark.slow
@pytest.mark.parametrize("saved_at", PLACES)
def test_saved_on_any_mesh_and_in_any_form_it_restores_on_any_other_to_the_bit(tmp_path, saved_at):
  assert_restores(tmp_path, saved_at, PLACES)


def saved(tmp_path, params):
  state = states.TrainState(jnp.zeros((), jnp.int32), params, {}, {})
  with Checkpoints(str(tmp_path)) as checkpoints:
    checkpoints.save(1, state, {})


def restored(tmp_path, params):
  abstract = states.TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, {}, {})
  with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    state, _ = checkpoints.restore(abstract, laid_out(abstract, [("data", 8)], "fsdp"))
  return state.params


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def halves(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


NOT_THE_SAME = {
  "a layer more": ({"blocks": {"w": floats(3, 8, 8)}}, {"blocks": {str(i): {"w": floats(8, 8)} for i in range(4)}}),
  "a layer missing between others": (
    {"blocks": {str(i): {"w": floats(8)} for i in (0, 1, 3)}},
    {"blocks": {"w": floats(3, 8)}},
  ),
  "layers too many": ({"blocks": {str(i): {"w": floats(8)} for i in range(4)}}, {"blocks": {"w": floats(3, 8)}}),
  "layers of several shapes": (
    {"blocks": {"0": {"w": floats(8)}, "1": {"w": floats(4)}}},
    {"blocks": {"w": floats(2, 8)}},
  ),
  "another type": ({"blocks": {str(i): {"w": halves(8)} for i in range(2)}}, {"blocks": {"w": floats(2, 8)}}),
  "another width": ({"blocks": {str(i): {"w": floats(8)} for i in range(2)}}, {"blocks": {"w": floats(2, 9)}}),
  "a matrix on its side": (
    {"blocks": {"w": floats(8, 4)}, "x": floats(1)},
    {"blocks": {"w": floats(4, 8)}, "x": floats(1)},
  ),
  "one leaf of a stack in two groups, another not": (
    {"blocks": {"v": floats(4, 8), "w": floats(4, 8)}},
    {"blocks": {"v": floats(2, 2, 8), "w": floats(4, 8)}},
  ),
  "what is no stack in two groups": ({"embed": floats(4, 8)}, {"embed": floats(2, 2, 8)}),
  "a leaf over": (
    {"blocks": {"w": floats(2, 8), "v": floats(2, 8)}},
    {"blocks": {str(i): {"w": floats(8)} for i in range(2)}},
  ),
}


@pytest.mark.parametrize("case", NOT_THE_SAME)
def test_what_is_not_the_same_layers_is_refused_with_the_difference(tmp_path, case):
  there, wanted = NOT_THE_SAME[case]
  saved(tmp_path, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), there))
  with pytest.raises(UserError, match=r"not of this config's state:\n  [-+!] params/"):
    restored(tmp_path, wanted)


def test_a_leaf_of_another_precision_size_or_layout_is_told_so(tmp_path):
  saved(tmp_path, {"a": jnp.zeros((4, 6)), "b": jnp.zeros(4), "c": jnp.zeros((2, 8)), "d": jnp.zeros(4)})
  with pytest.raises(UserError) as e:
    restored(tmp_path, {"a": floats(6, 4), "b": halves(4), "c": floats(2, 9), "e": floats(4)})
  lines = [line.split()[0:2] + [line.rpartition(": another ")[2]] for line in str(e.value).splitlines()[1:6]]
  assert [line[:2] for line in lines] == [["-", "params/d"], ["+", "params/e"]] + [["!", f"params/{n}"] for n in "abc"]
  assert [line[2] for line in lines[2:]] == ["layout", "precision", "size"]


def test_a_state_is_saved_also_where_a_loop_runs_as_in_a_notebook(tmp_path):
  async def cell():
    saved(tmp_path, {"w": jnp.arange(4.0)})

  asyncio.run(cell())
  np.testing.assert_array_equal(restored(tmp_path, {"w": floats(4)})["w"], np.arange(4.0))


def test_a_placeholder_is_one_value_for_all_layers_and_refused_where_they_differ(tmp_path):
  layers = lambda *values: {"blocks": {str(i): {"v": jnp.full((1,), v)} for i, v in enumerate(values)}}
  saved(tmp_path / "same", layers(2.0, 2.0))
  assert restored(tmp_path / "same", {"blocks": {"v": floats(1)}})["blocks"]["v"] == 2.0
  saved(tmp_path / "other", layers(2.0, 3.0))
  with pytest.raises(UserError, match="one value for all layers"):
    restored(tmp_path / "other", {"blocks": {"v": floats(1)}})


def test_sources_are_spread_over_all_devices_of_the_target_and_layers_are_not():
  mesh = sharding.make_mesh([("data", 2), ("pipe", 4)])
  whole = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
  wanted = {"blocks/w": whole((4, 8, 32), "pipe", "data")}
  there = {f"blocks/{i}/w": floats(8, 32) for i in range(4)}
  (conversion,) = stacks.conversions(there, wanted)
  sources = stacks.sources(conversion, there, wanted)
  assert {s.sharding.spec for s in sources.values()} == {P(("data",), ("pipe",))}
  grouped = {"params/blocks/w": floats(2, 2, 8, 32)}, {"params/blocks/w": whole((4, 8, 32), "pipe", "data")}
  (conversion,) = stacks.conversions(*grouped)
  (source,) = stacks.sources(conversion, *grouped).values()
  assert source.sharding.spec == P(None, None, ("data",), ("pipe",))


def test_every_form_converts_into_every_other_by_name_and_shape_alone():
  for a, b in itertools.permutations(["list", "stack", 2, 4], 2):
    there, wanted = (dict(zip(paths.names(t), jax.tree.leaves(t), strict=True)) for t in map(abstract_state, (a, b)))
    found = stacks.conversions(there, wanted)
    made, used = ([n for c in found for n in names(c)] for names in (lambda c: c.targets, lambda c: c.sources))
    assert len(made) == len(set(made)) and len(used) == len(set(used))
    same = {n for n in there if n in wanted and there[n].shape == wanted[n].shape}
    assert set(made) | same == set(wanted) and set(used) | same == set(there)


def test_a_checkpoint_is_read_by_name_as_it_was_written(tmp_path):
  saved(tmp_path, {"blocks": {"w": jnp.arange(6.0).reshape(2, 3)}})
  with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
    found = checkpoints.read()
  assert set(found) == {"step", "params/blocks/w"}
  np.testing.assert_array_equal(found["params/blocks/w"], np.arange(6.0).reshape(2, 3))
