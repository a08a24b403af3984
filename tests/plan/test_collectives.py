"""What devices send, held against counts by hand: small programs compiled here, and text of the TPU's compiler."""

import functools
import inspect
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigjax import sharding
from bigjax.plan import collectives, hlo, reasons

HERE = pathlib.Path(__file__).parent
KIB = 1024


@pytest.fixture
def mesh():
  return sharding.make_mesh([("data", 2), ("tensor", 4)])


@pytest.fixture(autouse=True)
def lines_of_today():
  """Programs from the compilation cache have the lines of the code that was compiled first."""
  before = jax.config.jax_compilation_cache_include_metadata_in_key
  jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
  yield
  jax.config.update("jax_compilation_cache_include_metadata_in_key", before)


def sent(fn, mesh, *arguments):
  """The collectives of `fn` on arguments `(shape, axis, axis, ...)`, compiled for `mesh`."""
  lay = lambda a: jax.ShapeDtypeStruct(a[0], jnp.float32, sharding=NamedSharding(mesh, P(*a[1:])))
  shapes = jax.tree.map(lay, list(arguments), is_leaf=lambda a: isinstance(a, tuple))
  return collectives.find(hlo.parse(jax.jit(fn).lower(*shapes).compile().as_text()), mesh)


def only(found):
  (one,) = found
  return one


def line_of(fn, words):
  lines, first = inspect.getsourcelines(fn)
  return first + next(i for i, line in enumerate(lines) if words in line)


def everywhere(fn, mesh, spec_in, spec_out):
  return jax.shard_map(fn, mesh=mesh, in_specs=spec_in, out_specs=spec_out, check_vma=False)


def test_a_sum_in_a_scan_of_five_is_five_times_32_kib_over_tensor_at_its_line(mesh):
  def fn(x):
    add = lambda c: jax.lax.psum(c, "tensor")  # Here.
    turn = lambda c, _: (0.5 * everywhere(add, mesh, P(), P())(c), None)
    return jax.lax.scan(turn, x, None, length=5)[0]

  c = only(sent(fn, mesh, ((128, 64),)))
  assert (c.kind, c.axes, c.parts, c.whole) == ("all-reduce", ("tensor",), 4, True)
  assert (c.bytes, c.executions, c.total) == (32 * KIB, 5, 160 * KIB)
  assert c.sent == 2 * 32 * KIB * 3 // 4  # In a ring, three quarters out and three quarters back.
  assert pathlib.Path(c.source.file).name == "test_collectives.py" and c.source.line == line_of(fn, "# Here.")
  assert c.phase == "update" and not c.asynchronous and not c.slow


def test_turns_of_nested_loops_multiply(mesh):
  def fn(x):
    add = everywhere(lambda c: jax.lax.psum(c, ("data", "tensor")), mesh, P(), P())
    inner = lambda c, _: (add(c) * 0.1, None)
    outer = lambda c, _: (jax.lax.scan(inner, c, None, length=7)[0] + 1, None)
    return jax.lax.scan(outer, x, None, length=3)[0]

  c = only(sent(fn, mesh, ((16, 16),)))
  assert (c.axes, c.parts, c.executions, c.total) == (("data", "tensor"), 8, 21, 21 * KIB)


@pytest.mark.parametrize(
  ("fn", "out", "kind", "axes", "result"),
  [
    (lambda x: jax.lax.all_gather(x, "tensor", tiled=True), P("data"), "all-gather", ("tensor",), 64 * 32 * 4),
    (lambda x: jax.lax.all_gather(x, "data", tiled=True), P(None, "tensor"), "all-gather", ("data",), 128 * 8 * 4),
    (
      lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True),
      P(("data", "tensor")),
      "reduce-scatter",
      ("tensor",),
      16 * 8 * 4,
    ),
    (lambda x: jax.lax.all_to_all(x, "tensor", 0, 1, tiled=True), P("data"), "all-to-all", ("tensor",), 64 * 8 * 4),
    (
      lambda x: jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)]),
      P("data", "tensor"),
      "collective-permute",
      ("tensor",),
      64 * 8 * 4,
    ),
    (lambda x: jax.lax.ppermute(x, "data", [(0, 1)]), P("data", "tensor"), "collective-permute", ("data",), 64 * 8 * 4),
  ],
)
def test_bytes_are_those_of_the_result_on_a_device(mesh, fn, out, kind, axes, result):
  c = only(sent(everywhere(fn, mesh, P("data", "tensor"), out), mesh, ((128, 32), "data", "tensor")))
  assert (c.kind, c.axes, c.bytes, c.executions) == (kind, axes, result, 1)


def test_what_the_partitioner_puts_in_is_found_with_the_line_of_the_product(mesh):
  def fn(x, w):
    return jnp.einsum("bi,io->bo", x, w)

  c = only(sent(fn, mesh, ((32, 64), "data", "tensor"), ((64, 16), "tensor")))
  assert (c.kind, c.axes, c.bytes) == ("all-reduce", ("tensor",), 16 * 16 * 4)
  assert c.source.line == line_of(fn, "einsum")


def test_a_gather_names_the_argument_that_it_gathers_also_from_within_a_scan(mesh):
  def fn(params, x):
    layer = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None)
    return jax.lax.scan(layer, x, params)[0]

  c = only(sent(fn, mesh, ((3, 64, 64), None, "data"), ((32, 64), "tensor")))
  assert (c.kind, c.axes, c.bytes, c.executions) == ("all-gather", ("data",), 64 * 64 * 4, 3)
  assert c.origin == "params"


def test_a_part_of_an_axis_is_told_from_the_whole(mesh):
  pairs = everywhere(
    lambda x: jax.lax.psum(x, "tensor", axis_index_groups=[[0, 1], [2, 3]]), mesh, P("data"), P("data")
  )
  c = only(sent(pairs, mesh, ((128, 32), "data")))
  assert (c.axes, c.parts, c.whole) == (("tensor",), 2, False)


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("[4,2]<=[2,2,2]T(2,1,0)", [[0, 4], [2, 6], [1, 5], [3, 7]]),
    ("mesh['data'=2,'tensor'=4] {'tensor'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("mesh['data'=2,'tensor'=4] {'data'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['data'=2,'tensor'=4] {'tensor':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("mesh['data'=2,'tensor'=4] {'tensor':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['a'=2,'b'=2], device_ids=([4]<=[2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2], device_ids=([3,2,1,0]) {'b'}", [[3, 2], [1, 0]]),
  ],
)
def test_every_way_of_writing_groups(text, groups):
  np.testing.assert_array_equal(collectives.groups(text, 8), groups)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("jit(step)/jvp()/while/body/dot_general", "forward"),
    ("jit(step)/transpose(jvp())/while/body/dot_general", "backward"),
    ("jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/dot_general", "recompute"),
    ("jit(step)/mul", "update"),
  ],
)
def test_the_pass_is_in_the_name_of_the_operation(name, words):
  assert collectives.phase(name) == words


def tpu(name):
  """Four layers of `x + relu(x @ up) @ down`, FSDP over data=2, split over tensor=4; its gradients taken off.

  All is bfloat16, `up` is 1024 x 4096, `x` is 8 x 512 x 1024.
  """
  mesh = types.SimpleNamespace(axis_names=("data", "tensor"), shape={"data": 2, "tensor": 4})
  return collectives.find(hlo.parse((HERE / name).read_text()), mesh)


def totals(found):
  sums = {}
  for c in found:
    key = (c.kind, "+".join(c.axes))
    sums[key] = sums.get(key, 0) + c.total
  return sums


MIB = 2**20
# A gathered kernel is 1024 x 1024 and a gradient's half of it, an activation 4 x 512 x 1024, all of 2 bytes: for each
# of four layers two kernels are gathered forward and backward, and one activation is summed forward and backward.
BY_HAND = {
  ("all-gather", "data"): 4 * 2 * 2 * 2 * MIB,
  ("reduce-scatter", "data"): 4 * 2 * MIB,
  ("all-reduce", "tensor"): 4 * 2 * 4 * MIB,
}


def test_a_tpu_program_is_counted_as_by_hand_though_it_spreads_gathers_over_fusions():
  found = tpu("v5e_one_slice.hlo")
  assert totals(found) == BY_HAND
  gathers = [c for c in found if c.kind == "all-gather"]
  assert sorted(c.overlapped for c in gathers) == [False, True, True, True]  # Those in pieces stand beside a product.
  assert all(c.asynchronous and c.cover > 0 for c in gathers if c.overlapped)
  assert {c.origin for c in gathers} == {"ws[0]", "ws[1]"} and {c.phase for c in gathers} == {"forward", "backward"}
  assert all(c.source and c.source.line for c in found)


def test_what_crosses_slices_is_counted_as_by_hand_and_known_as_slow():
  found = tpu("v5e_two_slices.hlo")
  assert totals(found) == BY_HAND
  assert {c.slow for c in found if c.axes == ("data",)} == {True}
  assert {c.slow for c in found if c.axes == ("tensor",)} == {False}
  assert all(c.asynchronous for c in found if c.slow) and all(c.source for c in found)


# Reasons


def intent(mesh, leaves=(), words=None, vocab=None, optimizer="adamw", sequence="ring"):
  layout = sharding.Layout(mesh=mesh, words=sharding.WORDS if words is None else words, sequence=sequence)
  described = {}
  for name, shape, *spec in leaves:
    sizes = [mesh.shape[a] if a else 1 for a in (*spec, *[None] * (len(shape) - len(spec)))]
    part = tuple(s // n for s, n in zip(shape, sizes, strict=True))
    described[name] = reasons.Leaf(tuple(shape), frozenset(a for a in spec if a), part)
  return reasons.Intent(layout, described, vocab, optimizer)


def constrained(mesh, x, *spec):
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def test_what_the_sparsecore_sends_is_under_way_from_when_it_is_given_it():
  mesh = types.SimpleNamespace(axis_names=("data",), shape={"data": 4})
  # As libtpu 0.0.50 writes them, without most of what it says of each.
  gather, scatter = collectives.find(hlo.parse((HERE / "v6e_sparsecore.hlo").read_text()), mesh)
  assert (gather.kind, gather.bytes, gather.axes) == ("all-gather", 1024 * 1024 * 2, ("data",))
  assert gather.origin == "state.params['up']['kernel']" and gather.overlapped and gather.cover == 700
  assert (scatter.kind, scatter.bytes, scatter.phase) == ("reduce-scatter", 256 * 1024 * 2, "backward")
  assert scatter.asynchronous and not scatter.overlapped


def test_gradients_over_the_batch_are_explained(mesh):
  def fn(w, x):
    return jax.grad(lambda w: (jnp.tanh(x @ w) ** 2).sum())(w)

  c = only(sent(fn, mesh, ((64, 48),), ((32, 64), "data")))
  verdict = reasons.judge(c, intent(mesh, [("params/w", (64, 48))]))
  assert c.phase == "backward" and verdict == reasons.Verdict(True, "gradients, summed over the batch")
  # The same sum where no parameter has that shape is not one of gradients.
  assert not reasons.judge(c, intent(mesh, [("params/w", (31, 48))])).expected


def test_an_activation_that_changes_its_layout_is_flagged_at_its_line(mesh):
  def fn(w, x):
    h = constrained(mesh, jnp.tanh(x @ w), "data", None)
    return (constrained(mesh, h * 2, None, "data") @ w.T).sum()  # Here.

  found = sent(jax.grad(fn), mesh, ((64, 48),), ((32, 64), "data"))
  c = next(c for c in found if c.kind == "all-to-all" and c.phase == "forward")
  verdict = reasons.judge(c, intent(mesh, [("params/w", (64, 48))]))
  assert not verdict.expected and "changes its layout" in verdict.why
  assert line_of(fn, "tanh") <= c.source.line <= line_of(fn, "# Here.")


def test_a_parameter_is_gathered_over_what_fsdp_splits_and_over_nothing_else(mesh):
  def fn(state, x):
    return x @ constrained(mesh, state["params"]["w"], None, None)

  def verdict(axis, *spec):
    c = only(sent(fn, mesh, {"params": {"w": ((64, 64), axis)}}, ((32, 64),)))
    return reasons.judge(c, intent(mesh, [("params/w", (64, 64), *spec)]))

  assert verdict("data", "data") == reasons.Verdict(True, "parameters, gathered for use (FSDP)")
  assert verdict("data") == reasons.Verdict(False, "gathers params/w over data, over which it is not split")
  assert "its product wants it whole" in verdict("tensor", "tensor").why


def test_gathering_parameters_across_slices_is_flagged_and_summing_gradients_is_not(mesh):
  meant = intent(mesh, [("0", (4, 1024, 4096), None, "data", "tensor"), ("1", (4, 4096, 1024), None, "tensor", "data")])
  for c in tpu("v5e_two_slices.hlo"):
    verdict = reasons.judge(c, meant)
    assert verdict.expected == (c.kind != "all-gather")
    assert verdict.expected or "across slices for every use" in verdict.why


def judged(kind, axes, dims, mesh, *, phase="forward", op_name="jit(step)/jvp()/dot_general", origin="", **kwargs):
  c = collectives.Collective(
    name="c",
    kind=kind,
    axes=axes,
    parts=math.prod(mesh.shape[a] for a in axes),
    whole=True,
    arrays=(hlo.Array("f32", dims),),
    executions=1,
    phase=phase,
    op_name=op_name,
    stack=(),
    origin=origin,
  )
  return reasons.judge(c, intent(mesh, **kwargs))


WHOLE = [("params/experts/up", (8, 64, 64), "expert"), ("params/blocks/up", (4, 64, 64), "pipe")]
STATE = "state.params['{}']['up']".format


@pytest.mark.parametrize(
  ("axes", "call", "expected", "words"),
  [
    ([("pipe", 4)], ("collective-permute", (8, 64)), True, "next stage"),
    ([("seq", 4)], ("collective-permute", (8, 64, 16)), True, "around the ring"),
    ([("seq", 4)], ("all-to-all", (8, 64, 16)), False, 'config.sequence is "ring"'),
    ([("seq", 4)], ("all-gather", (8, 64, 16)), False, "whole sequences"),
    ([("expert", 4)], ("all-to-all", (8, 64, 16)), True, "tokens go to their experts"),
    ([("expert", 4)], ("all-gather", (8, 64, 64), dict(origin=STATE("experts"))), False, "tokens should go to them"),
    ([("pipe", 4)], ("all-gather", (4, 64, 64), dict(origin=STATE("blocks"))), False, "each holds all layers"),
    ([("tensor", 4)], ("all-reduce", (512, 64)), True, "partial products"),
    ([("tensor", 4)], ("all-gather", (512, 50000), dict(vocab=50000)), False, "whole logits"),
    ([("tensor", 4)], ("collective-permute", (512, 64)), True, "collective matmul"),
    (
      [("tensor", 4)],
      ("collective-permute", (512, 64), dict(op_name="jit(step)/jvp()/add")),
      False,
      "changes its layout",
    ),
    ([("data", 4)], ("all-reduce", (512, 64)), False, "a parameter should have been gathered"),
    ([("data", 4)], ("all-gather", (512, 60)), False, "examples of other devices"),
    ([("data", 4)], ("all-gather", (512, 60), dict(op_name="jit(step)/jvp()/shard_map/all_gather")), True, "shard_map"),
    ([("data", 4)], ("all-reduce", (16,)), True, "at most 1 KiB"),
    ([("data", 2), ("tensor", 4)], ("all-gather", (512, 60)), False, "examples of other devices"),
  ],
)
def test_every_axis_has_its_reasons(axes, call, expected, words):
  kind, dims, *rest = call
  count = math.prod(n for _, n in axes)
  mesh = sharding.make_mesh(axes, jax.devices()[:count])
  leaves = [leaf for leaf in WHOLE if leaf[2] in mesh.shape]
  verdict = judged(kind, tuple(mesh.axis_names), dims, mesh, leaves=leaves, **(rest[0] if rest else {}))
  assert verdict.expected == expected and words in verdict.why


def test_columns_of_a_table_are_looked_up_for_the_tokens_of_all_where_it_is_split_so():
  mesh = sharding.make_mesh([("data", 8)])
  where = dict(op_name="jit(step)/jvp(jit(_take))/gather")
  exchanged = lambda *spec: judged("all-to-all", ("data",), (2, 64, 8, 8), mesh, leaves=[TABLE + spec], **where)
  assert exchanged(None, "data").expected and "columns" in exchanged(None, "data").why
  assert not exchanged("data", None).expected


TABLE = ("params/embed/embedding", (256, 64))


def test_the_gradient_of_a_kernel_is_known_when_its_columns_stand_by_head():
  mesh = sharding.make_mesh([("data", 8)])
  kernel = ("params/blocks/qkv/kernel", (4, 96, 288))
  summed = lambda *dims: judged("all-reduce", ("data",), dims, mesh, leaves=[kernel], phase="backward")
  assert summed(96, 9, 32).expected and "gradients" in summed(96, 9, 32).why
  assert not summed(96, 9, 64).expected


def test_gradients_laid_end_to_end_are_known():
  mesh = sharding.make_mesh([("data", 8)])
  leaves = [("params/a/kernel", (96, 288)), ("params/b/kernel", (96, 96))]
  summed = lambda *dims: judged("all-reduce", ("data",), dims, mesh, leaves=leaves, phase="backward")
  assert summed(96 * 288 + 96 * 96).expected and "many as one" in summed(96 * 288 + 96 * 96).why
  assert summed(96 * 288 + 96 * 96 + 3).expected  # The loss's sums go along.
  assert not summed(96 * 288 + 96 * 96 + 1000).expected


def test_whole_matrices_in_the_update_are_muons_business():
  mesh = sharding.make_mesh([("data", 8)])
  arguments = dict(phase="update", op_name="jit(step)/dot_general", leaves=[("params/w", (64, 64), "data")])
  call = functools.partial(judged, "all-gather", ("data",), (64, 64), mesh, **arguments)
  assert call(optimizer="muon") == reasons.Verdict(True, "muon works on whole matrices")
  assert not call(optimizer="adamw").expected


def test_names_of_arguments_are_paths_of_leaves():
  assert hlo.leaf("state.params['blocks']['attn']['qkv']['kernel']") == "params/blocks/attn/qkv/kernel"
  assert hlo.leaf("state.opt_state['base'][0].mu['w']") == "opt_state/base/0/mu/w"
