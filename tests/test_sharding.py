"""Meshes and rules: what is asked for is laid out, what can't be is said before any device works."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.state import TrainState


@pytest.fixture
def mesh():
  return sharding.make_mesh([("data", -1), ("tensor", 2)])


def leaf(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_minus_one_takes_the_devices_left(mesh):
  assert dict(mesh.shape) == {"data": 4, "tensor": 2}


@pytest.mark.parametrize(
  ("axes", "words"),
  [
    ([("date", -1)], "Did you mean 'data'"),
    ([("data", 3)], "8 devices"),
    ([("data", -1), ("tensor", 3)], "8 devices"),
    ([("data", -1), ("tensor", -1)], "at most one is -1"),
    ([("tensor", 2), ("data", -1)], "in the order"),
    ([("data", 0)], "positive"),
  ],
)
def test_a_mesh_that_can_not_be_is_refused(axes, words):
  with pytest.raises(UserError, match=words):
    sharding.make_mesh(axes)


def test_the_first_rule_that_matches_decides_and_moments_follow_their_parameter(mesh):
  state = {
    "params": {"up": {"kernel": leaf(64, 128), "bias": leaf(128)}},
    "opt": {"mu": {"up": {"kernel": leaf(64, 128)}}},
  }
  found = sharding.shard_tree(state, [(".*up/kernel", "split(tensor,-1)"), (".*", "fsdp(data,64)")], mesh)
  assert found["params"]["up"]["kernel"].spec == found["opt"]["mu"]["up"]["kernel"].spec == P(None, "tensor")
  assert found["params"]["up"]["bias"].spec == P("data")
  assert sharding.bytes_a_device(state["params"]["up"]["kernel"], found["params"]["up"]["kernel"]) == 64 * 128 * 4 // 2


def test_dimensions_count_from_the_right_so_a_scanned_stack_needs_no_rule(mesh):
  found = sharding.shard_tree({"k": leaf(12, 64, 128)}, [(".*", "split(tensor,-2)")], mesh)
  assert found["k"].spec == P(None, "tensor", None)


def test_fsdp_splits_the_dimension_that_the_model_names_and_another_where_that_does_not_divide(mesh):
  tables = {"embed": {"embedding": leaf(1024, 64)}, "odd": {"embedding": leaf(1024, 63)}}
  found = sharding.shard_tree(tables, "fsdp", mesh, roles={"fsdp": ((r".*/embedding", -1),)})
  assert found["embed"]["embedding"].spec == P(None, "data")
  assert found["odd"]["embedding"].spec == P("data", None)


def test_fsdp_leaves_small_arrays_whole_and_skips_what_does_not_divide(mesh):
  found = sharding.shard_tree({"a": leaf(8), "b": leaf(1025, 64)}, [(".*", "fsdp(data)")], mesh)
  assert found["a"].spec == P(None) and found["b"].spec == P(None, "data")


@pytest.mark.parametrize(
  ("rules", "words"),
  [
    ([("a", "replicated")], "no rule matches 'b'"),
    ([(".*", "replicated"), ("c", "replicated")], "c"),
    ([(".*", "replicatd")], "Did you mean 'replicated'"),
    ([(".*", "split(tensr,-1)")], "Did you mean 'tensor'"),
    ([(".*", "split(tensor,-1)")], "do not divide"),
    ([(".*", "split(tensor,-3)")], "does not exist"),
    ([(".*", "split(tensor)")], "wrong arguments"),
    ([("(", "replicated")], "config.sharding"),
  ],
)
def test_a_rule_that_can_not_hold_is_refused(mesh, rules, words):
  with pytest.raises(UserError, match=words):
    sharding.shard_tree({"a": leaf(4, 4), "b": leaf(4, 3)}, rules, mesh)


def test_a_batch_is_split_over_the_axes_along_which_data_differs(mesh):
  assert sharding.batch_sharding(mesh).spec == P(("data",)) and sharding.batch_ways(mesh) == 4


ROLES = {"tensor": ((".*up/kernel", -1), (".*down/kernel", -2)), "expert": ((".*experts/.*", -3),)}
BLOCKS = {
  "blocks": {
    "up": {"kernel": leaf(4, 64, 128)},
    "down": {"kernel": leaf(4, 128, 64)},
    "experts": {"up": leaf(4, 8, 64, 64)},
  }
}


def laid_out(rules, axes, tree=BLOCKS, **options):
  mesh = sharding.make_mesh(axes)
  return sharding.shard_tree({"params": tree}, rules, mesh, roles=ROLES, **options)["params"]


def test_words_joined_by_plus_each_take_what_the_others_leave_in_any_order():
  axes = [("data", 2), ("pipe", 2), ("tensor", 2)]
  for rules in ("pipe+fsdp+tensor", "fsdp + tensor + pipe", [(".*", "tensor+pipe+fsdp")]):
    found = laid_out(rules, axes)["blocks"]
    assert found["up"]["kernel"].spec == P("pipe", "data", "tensor")
    assert found["down"]["kernel"].spec == P("pipe", "tensor", "data")
  experts = laid_out("expert+fsdp", [("data", 4), ("expert", 2)])["blocks"]
  assert experts["experts"]["up"].spec == P(None, "expert", "data", None)
  assert experts["up"]["kernel"].spec == P(None, None, ("data", "expert"))  # No experts there: one more data axis.


def test_layers_are_stages_whose_dimension_is_the_second_in_a_circular_pipeline():
  grouped = jax.tree.map(lambda x: leaf(2, 2, *x.shape[1:]), BLOCKS)
  assert laid_out("pipe", [("pipe", 2), ("tensor", 4)])["blocks"]["up"]["kernel"].spec == P("pipe", None, None)
  assert laid_out("pipe", [("pipe", 2), ("tensor", 4)], grouped, repeats=2)["blocks"]["up"]["kernel"].spec[:2] == (
    None,
    "pipe",
  )


def test_a_moment_of_another_shape_takes_no_part_in_its_parameters_roles():
  mesh = sharding.make_mesh([("tensor", 8)])
  params, moments = {"up": {"kernel": leaf(64, 128)}}, {"v_row": {"up": {"kernel": leaf(64)}}}
  state = TrainState(leaf(), params, {}, moments | {"mu": params})
  found = sharding.shard_tree(state, "tensor", mesh, roles={"tensor": ((".*up/kernel", -1),)})
  assert found.opt_state["v_row"]["up"]["kernel"].spec == P(None)
  assert found.opt_state["mu"]["up"]["kernel"].spec == P(None, "tensor")


def test_hsdp_splits_within_a_replica():
  found = laid_out("hsdp", [("replica", 2), ("data", 4)])["blocks"]
  assert found["up"]["kernel"].spec == P(None, None, "data")
  with pytest.raises(UserError, match="no axis 'replica'"):
    laid_out("hsdp", [("data", 8)])


def test_auto_puts_every_axis_to_its_use_and_splits_what_is_large(monkeypatch):
  mesh = sharding.make_mesh([("data", 4), ("tensor", 2)])
  assert sharding.as_rules("auto", BLOCKS, mesh) == ((".*", "tensor"),)
  assert sharding.as_rules("auto", BLOCKS, sharding.make_mesh([("data", 8)])) == ((".*", "replicated"),)
  monkeypatch.setattr(sharding, "ROOM", 2**10)
  assert sharding.as_rules([("a", "auto"), (".*", "fsdp")], BLOCKS, mesh) == (("a", "tensor+fsdp"), (".*", "fsdp"))


def test_what_is_large_is_not_left_whole_by_accident():
  large = {"table": leaf(50257, 337)}  # 65 MiB, and no dimension is even.
  with pytest.raises(UserError, match="65 MiB .* whole on each of 8 devices"):
    laid_out("fsdp", [("data", 8)], large)
  assert laid_out("replicated", [("data", 8)], large)["table"].spec == P(None, None)


@dataclasses.dataclass(frozen=True)
class Chip:
  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "gpu"  # TPUs have places in a torus too.
  device_kind: str = "made up"


def test_slices_lie_along_the_outermost_axes():
  chips = [Chip(i, i // 4) for i in (5, 1, 0, 4, 2, 3, 7, 6)]
  mesh = sharding.make_mesh([("replica", 2), ("tensor", 4)], chips)
  assert [[c.slice_index for c in row] for row in mesh.devices] == [[0] * 4, [1] * 4]
  mesh = sharding.make_mesh([("data", -1), ("tensor", 2)], chips)
  assert [row[0].slice_index for row in mesh.devices] == [0, 0, 1, 1] and mesh.devices.shape == (4, 2)
  with pytest.raises(UserError, match="2 slices; give the outermost axis a multiple of 2"):
    sharding.make_mesh([("replica", 1), ("tensor", -1)], [Chip(i, i % 2) for i in range(3)])


def test_an_activation_is_laid_out_by_words_and_told_what_does_not_divide_it():
  layout = sharding.Layout(sharding.make_mesh([("data", 2), ("seq", 2), ("tensor", 2)]))
  assert layout.spec("batch", "seq", "heads", None) == P("data", "seq", "tensor", None)
  assert layout.size("batch") == 2 and layout.size("experts") == 1
  with sharding.use(layout):
    x = jax.jit(lambda x: sharding.constrain(x, "batch", "seq", "hidden"))(jnp.ones((2, 4, 6)))
    assert x.sharding.spec == P("data", "seq", "tensor")
    with pytest.raises(UserError, match="'heads' has 3 .* 2 devices of tensor do not divide; 2 or 4 would"):
      sharding.constrain(jnp.ones((2, 4, 3, 8)), "batch", "seq", "heads", None)
  assert sharding.constrain(jnp.ones((3, 3)), "batch", "embed").shape == (3, 3)  # No devices, no matter.


def test_words_are_mapped_anew_by_a_config():
  assert sharding.words({"seq": ["seq", "tensor"], "vocab": None}) | {} == sharding.WORDS | {
    "seq": ("seq", "tensor"),
    "vocab": (),
  }
  with pytest.raises(UserError, match="Did you mean 'heads'"):
    sharding.words({"head": "tensor"})
  with pytest.raises(UserError, match="Did you mean 'tensor'"):
    sharding.words({"heads": "tensr"})
