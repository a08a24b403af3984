"""What a program does, held to counts by hand: TPU convolutions, kernels, loops, bytes; and on a real TPU program."""

import pathlib

import pytest

from bigjax.plan import hlo, program

HERE = pathlib.Path(__file__).parent


def module(body, shapes="x: f32[2]", header=""):
  return hlo.parse(f"HloModule m\n{header}\nENTRY %main ({shapes}) -> f32[2] {{\n{body}\n}}\n")


def test_a_product_written_as_a_convolution_counts_as_the_product():
  found = module(
    """
  %a = bf16[8,512,256]{2,1,0} parameter(0)
  %b = bf16[256,1024]{1,0} parameter(1)
  ROOT %c = bf16[8,512,1024]{2,1,0} convolution(%a, %b), window={size=1}, dim_labels=b0f_io0->b0f
""".replace("bf16[256,1024]{1,0}", "bf16[256,1024,1]{2,1,0}")
  )
  (product,) = program.products(found)
  assert product.flops == 2 * 8 * 512 * 256 * 1024


def test_padding_multiplies_nothing():
  # Two matrices on a spatial dimension: the window of 2 with padding of 1 meets each of both outputs' inputs twice.
  found = module("""
  %a = bf16[4,256,1]{2,1,0} parameter(0)
  %b = bf16[256,2,64]{2,1,0} parameter(1)
  ROOT %c = bf16[4,2,64]{2,1,0} convolution(%a, %b), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->b0f
""")
  (product,) = program.products(found)
  assert product.flops == 2 * 4 * 256 * 2 * 64


def test_float32_at_the_highest_precision_is_six_products():
  dot = "dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
  body = "  %a = f32[8,16]{1,0} parameter(0)\n  %b = f32[16,4]{1,0} parameter(1)\n  ROOT %c = f32[8,4]{1,0} "
  (plain,) = program.products(module(body + dot))
  (exact,) = program.products(module(body + dot + ", operand_precision={highest,highest}"))
  assert (plain.flops, exact.flops) == (2 * 8 * 16 * 4, 6 * 2 * 8 * 16 * 4)


SPLASH = """
  %q = bf16[2,4,512,128]{3,2,1,0} parameter(0)
  %k = bf16[2,2,512,128]{3,2,1,0} parameter(1)
  ROOT %splash_mha_NAME.1 = bf16[2,4,512,128]{3,2,1,0} custom-call(%q, %k), custom_call_target="tpu_custom_call", \
operand_layout_constraints={s8[1,1,1]{2,1,0}, bf16[2,4,512,128]{3,2,1,0}, bf16[2,2,512,128]{3,2,1,0}}
"""


@pytest.mark.parametrize(("name", "count"), [("fwd_residuals", 2), ("dq_no_residuals", 3), ("dkv_no_residuals", 4)])
def test_attention_kernels_count_the_scores_that_are_wanted(name, count):
  found = module(SPLASH.replace("NAME", name))
  (product,) = program.products(found, visible=0.5)
  assert product.kernel and product.flops == count * 2 * (2 * 4) * 512 * 512 * 128 // 2
  assert program.silent(found) == []
  assert program.silent(module(SPLASH.replace("splash_mha_NAME", "own"))) == ["own.1"]


def test_bytes_are_those_in_main_memory_and_of_slices_no_more_than_is_read():
  found = hlo.parse("""HloModule m

%fused (a: f32[100,64], i: s32[]) -> f32[1,64] {
  %a = f32[100,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %row = f32[1,64]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,64}
}

ENTRY %main (a: f32[100,64], i: s32[]) -> f32[1,64] {
  %a = f32[100,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %near = f32[1,64]{1,0:S(1)} fusion(%a, %i), kind=kLoop, calls=%fused
  ROOT %far = f32[1,64]{1,0} copy(%near)
}
""")
  assert program.traffic(found) == (256 + 4) + 256  # A row and its number come, a row goes.


def test_a_real_program_of_two_layers_and_their_gradients():
  found = hlo.parse((HERE / "v5e_one_slice.hlo").read_text())
  assert program.cycles(found) == pytest.approx(2_124_194, rel=1e-3)  # As another reader counts.
  phases = {p.phase for p in program.products(found)}
  assert phases <= {"forward", "backward", "recompute", "update"} and "backward" in phases
  assert 0 < program.traffic(found) < 2**34
  largest = program.buffers(found)
  assert largest[0].what == "ws[0]" and largest[0].bytes == 4 * 512 * 1024 * 2
  assert [b.bytes for b in largest] == sorted((b.bytes for b in largest), reverse=True)
