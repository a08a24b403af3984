"""The compiler's text, read: shapes, loops and their turns, and the lines of Python behind it."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from bigjax.plan import hlo

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def lines_of_today():
  """Programs from the compilation cache have the lines of the code that was compiled first."""
  before = jax.config.jax_compilation_cache_include_metadata_in_key
  jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
  yield
  jax.config.update("jax_compilation_cache_include_metadata_in_key", before)


def compiled(fn, *shapes):
  return hlo.parse(jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text())


def opcodes(module, opcode):
  return [(c, i) for c in module.computations.values() for i in c if i.opcode == opcode]


def test_shapes_with_layouts_tiles_and_tuples():
  i = hlo.parse(
    "HloModule m\n\nENTRY %main (p: f32[2]) -> f32[2] {\n"
    "  ROOT %a = ((bf16[4,512]{1,0:T(8,128)(2,1)S(1)}, s4[3]{0}), /*index=1*/pred[7]{0}, f8e4m3fn[2,2]{1,0}, "
    'u32[]{:S(2)}, token[]) custom-call(%p, f32[9]{0} %q), custom_call_target="x"\n}\n'
  ).entry.root
  assert [(a.dtype, a.dims, a.bytes) for a in i.arrays] == [
    ("bf16", (4, 512), 4096),
    ("s4", (3,), 2),  # Two to a byte.
    ("pred", (7,), 7),
    ("f8e4m3fn", (2, 2), 4),
    ("u32", (), 4),
    ("token", (), 0),
  ]
  assert i.arrays[0].layout == "1,0:T(8,128)(2,1)S(1)"
  assert [p.partition("{")[0] for p in i.parts] == [
    "(bf16[4,512]",
    "/*index=1*/pred[7]",
    "f8e4m3fn[2,2]",
    "u32[]",
    "token[]",
  ]
  assert i.operands == ("p", "q") and i.root and i.attribute("custom_call_target") == "x"


def test_turns_of_loops_within_loops_are_multiplied():
  def fn(x):
    inner = lambda c, _: (jnp.sin(c @ c), None)
    outer = lambda c, _: (jax.lax.scan(inner, c, None, length=5)[0] + 1, None)
    return jax.lax.scan(outer, x, None, length=3)[0]

  module = compiled(fn, (8, 8))
  assert sorted(module.trips(c, i) for c, i in opcodes(module, "while")) == [3, 5]
  where = next(c.name for c, i in opcodes(module, "dot"))
  assert module.executions[where] == 15 and module.executions[module.entry.name] == 1
  assert module.endless == ()


def test_a_loop_of_unknown_length_is_named():
  module = compiled(lambda x: jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c * 2 + 1, x), (8,))
  loops = [i.name for _, i in opcodes(module, "while")]
  assert len(loops) == 1 and module.endless == tuple(loops)


LOOP = """HloModule m, is_scheduled=true

%add (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %s = s32[] add(%a, %b)
}, execution_thread="other"

%body (p: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {
  %p = (s32[], f32[4], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %step = s32[] constant(2)
  %next = s32[] fusion(%i, %step), kind=kLoop, calls=%add
  %k = f32[4] custom-call(%x), custom_call_target="kernel", backend_config="first {
}
  second \\"quoted\\" = line"
  ROOT %t = (s32[], f32[4], s32[]) tuple(%next, %k, %n)
}

%below (p: s32[], q: s32[]) -> pred[] {
  %q = s32[] parameter(1)
  %p = s32[] parameter(0)
  ROOT %c = pred[] compare(%p, %q), direction=LT
}

%condition (p: (s32[], f32[4], s32[])) -> pred[] {
  %p.1 = (s32[], f32[4], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] get-tuple-element(%p.1), index=2
  %huge = s32[] constant(1000)
  ROOT %f = pred[] fusion(%i.1, %n.1), kind=kLoop, calls=%below
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x.1 = f32[4] parameter(0), metadata={op_name="state.params[\\'a\\'][\\'b\\']"}
  %start = s32[] constant(1)
  %copied = s32[] copy(%start)
  %limit = s32[] constant(8)
  %init = (s32[], f32[4], s32[]) tuple(%copied, %x.1, %limit)
  %while = (s32[], f32[4], s32[]) while(%init), condition=%condition, body=%body
  ROOT %out = f32[4] get-tuple-element(%while), index=1
}
"""


def test_turns_are_counted_from_start_step_and_a_limit_that_the_state_carries():
  module = hlo.parse(LOOP)
  (where, loop), *_ = opcodes(module, "while")
  assert module.trips(where, loop) == 4  # 1, 3, 5, 7 are below 8.
  assert module.executions == {"add": 4, "body": 4, "below": 5, "condition": 5, "main": 1}


def test_a_kernel_of_several_lines_and_another_thread_do_not_end_a_computation_early():
  body = hlo.parse(LOOP).computations["body"]
  assert list(body.instructions) == ["p", "i", "x", "n", "step", "next", "k", "t"]
  assert "second" in body.instructions["k"].rest
  assert hlo.parse(LOOP).entry.instructions["x.1"].op_name == "state.params['a']['b']"


def test_a_loop_whose_first_turn_was_peeled_off_has_one_turn_less():
  # Four layers; the TPU's compiler takes the first backward step out of the loop, to overlap sends between slices.
  module = hlo.parse((HERE / "v5e_two_slices.hlo").read_text())
  assert sorted(module.trips(c, i) for c, i in opcodes(module, "while")) == [3, 4]
  assert module.devices == 4  # Of one slice.


def test_estimated_cycles_times_turns_are_what_another_reader_counts():
  module = hlo.parse((HERE / "v5e_one_slice.hlo").read_text())
  assert module.devices == 8
  counted = {name for _, i in opcodes(module, "fusion") if i.cycles for name in i.called}  # Their own have them again.
  times = {c.name: module.executions[c.name] for c in module.computations.values() if c.name not in counted}
  assert sum(i.cycles * n for name, n in times.items() for i in module.computations[name]) == 2_124_194


def test_lines_of_python_with_those_that_called_them(lines_of_today):
  def fn(x):
    return innermost(x) + 1

  def innermost(x):
    return x @ x

  module = compiled(fn, (16, 16))
  stack = next(module.stack(i) for _, i in opcodes(module, "dot"))
  assert stack[0].file.endswith("test_hlo.py") and stack[0].function.endswith("innermost")
  assert stack[0].line == innermost.__code__.co_firstlineno + 1 and stack[1].line == fn.__code__.co_firstlineno + 1


OLDER = """HloModule m

ENTRY main {
  ROOT a = f32[2]{0} add(f32[2]{0} b, c), metadata={op_name="f/add" source_file="/a/b.py" source_line=12}
}
"""


def test_the_older_way_of_printing_lines_is_read_too():
  module = hlo.parse(OLDER)
  assert module.stack(module.entry.root) == (hlo.Frame("/a/b.py", 12),)
  assert module.entry.root.operands == ("b", "c")


KERNEL = """HloModule m

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %kernel = f32[2]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"a":"b"
}}, metadata={op_name="f/pallas_call"}
  ROOT %twice = f32[2]{0} add(%kernel, %kernel)
}
"""


def test_a_kernel_whose_attributes_go_over_several_lines_does_not_end_the_computation():
  entry = hlo.parse(KERNEL).entry
  assert list(entry.instructions) == ["x", "kernel", "twice"]
  assert entry.instructions["kernel"].op_name == "f/pallas_call"


def test_what_is_no_hlo_is_refused():
  with pytest.raises(ValueError, match="no text of an HLO module"):
    hlo.parse("module @jit_f {}")
