"""Meshes and rules: what is asked for is laid out, what can't be is said before any device works."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from bigjax import sharding
from bigjax.errors import UserError


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


def test_fsdp_leaves_small_arrays_whole_and_skips_what_does_not_divide(mesh):
  found = sharding.shard_tree({"a": leaf(8), "b": leaf(1025, 64)}, [(".*", "fsdp(data)")], mesh)
  assert found["a"].spec == P(None) and found["b"].spec == P(None, "data")


@pytest.mark.parametrize(
  ("rules", "words"),
  [
    ([("a", "replicate")], "no rule matches 'b'"),
    ([(".*", "replicate"), ("c", "replicate")], "c"),
    ([(".*", "replicat")], "Did you mean 'replicate'"),
    ([(".*", "split(tensr,-1)")], "Did you mean 'tensor'"),
    ([(".*", "split(tensor,-1)")], "do not divide"),
    ([(".*", "split(tensor,-3)")], "does not exist"),
    ([(".*", "split(tensor)")], "wrong arguments"),
    ([("(", "replicate")], "config.sharding"),
  ],
)
def test_a_rule_that_can_not_hold_is_refused(mesh, rules, words):
  with pytest.raises(UserError, match=words):
    sharding.shard_tree({"a": leaf(4, 4), "b": leaf(4, 3)}, rules, mesh)


def test_a_batch_is_split_over_the_axes_along_which_data_differs(mesh):
  assert sharding.batch_sharding(mesh).spec == P(("data",)) and sharding.batch_ways(mesh) == 4
