"""Model FLOPs held to counts by hand: products, loops, causal attention, convolutions, a whole decoder."""

import jax
import jax.numpy as jnp
import pytest

from bigjax import config as configs
from bigjax import experiment
from bigjax.plan import work


def counted(fn, *shapes, active):
  return work.count(jax.make_jaxpr(fn)(*(jnp.zeros(s) for s in shapes)), active)


def test_a_product_counts_once_forward_and_once_backward_for_each_operand_that_is_learned():
  flops = 2 * 8 * 16 * 32
  first = counted(lambda w, x: (x @ w).sum(), (16, 32), (8, 16), active=[True, False])
  assert (first.forward, first.backward) == (flops, flops)  # No gradient of the data.
  second = counted(lambda v, w, x: (x @ v @ w).sum(), (16, 16), (16, 32), (8, 16), active=[True, True, False])
  assert second.total == 2 * (2 * 8 * 16 * 16) + 3 * flops
  assert counted(lambda w, x: x @ w, (16, 32), (8, 16), active=[False, False]).backward == 0


def test_a_scan_counts_its_turns_and_knows_that_the_carry_comes_to_depend_on_parameters():
  def loss(ws, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0].sum()

  found = counted(jax.checkpoint(loss), (5, 16, 16), (8, 16), active=[True, False])
  assert found.forward == 5 * 2 * 8 * 16 * 16
  assert found.backward == 2 * found.forward  # The first turn's share of the gradient of the data is counted too.


def test_a_branch_counts_as_the_most_expensive_and_a_loop_of_unknown_length_once():
  branches = lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)
  assert counted(branches, (16, 16), (8, 16), active=[False, False]).forward == 2 * 2 * 8 * 16 * 16
  loop = lambda w, x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)
  found = counted(loop, (16, 16), (8, 16), active=[False, False])
  assert found.endless
  assert found.forward == 2 * 8 * 16 * 16


def test_a_convolution_counts_where_kernel_and_input_meet():
  kernel, image = (3, 3, 2, 8), (2, 10, 10, 4)
  layout = ("NHWC", "HWIO", "NHWC")

  def counts(strides, padding, *active):
    conv = lambda w, x: jax.lax.conv_general_dilated(
      x, w, strides, padding, dimension_numbers=layout, feature_group_count=2
    )
    return counted(conv, kernel, image, active=list(active))

  assert counts((1, 1), "VALID", False, False).forward == 2 * (2 * 8 * 8 * 8) * (3 * 3 * 2)
  # Of a row of 5 outputs at a stride of 2 the last has one place of three in the padding.
  found = counts((2, 2), "SAME", True, True)
  assert found.forward == 2 * (2 * 8 * 2) * (5 * 3 - 1) ** 2 and found.backward == 2 * found.forward


def test_the_compiler_counts_as_many_in_a_padded_network():
  def loss(kernels, x):
    for kernel in kernels:
      x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return (x**2).sum()

  kernels, image = [jnp.ones((3, 3, 4, 4))] * 2, jnp.ones((2, 4, 4, 4))
  traced = jax.make_jaxpr(loss)(kernels, image)
  step = jax.jit(jax.value_and_grad(loss)).lower(kernels, image).compile().cost_analysis()
  assert work.count(traced, [True, True, False]).total == pytest.approx(step["flops"], rel=0.05)


@pytest.mark.parametrize(
  ("causal", "window", "pairs"), [(True, None, 10), (False, None, 16), (True, 2, 7), (False, 2, 10), (True, 100, 10)]
)
def test_a_query_counts_the_keys_that_it_sees(causal, window, pairs):
  assert work.seen(4, 4, causal, window) == pairs


@pytest.mark.parametrize("options", [{}, dict(scan=True, remat="full"), dict(attention="chunked")])
def test_a_decoder_is_six_for_each_parameter_and_token_and_causal_attention(options):
  width, depth, vocab, seq, batch, hidden = 32, 3, 64, 16, 8, 96
  model = dict(name="decoder", vocab_size=vocab, context=seq, width=width, depth=depth, heads=4, kv_heads=2)
  run = built(model | dict(mlp_dim=hidden, **options), seq, batch)
  layer = width * width * 2 + 2 * width * (width // 2) + 3 * width * hidden
  matrices = 6 * (depth * layer + vocab * width) * batch * seq
  attention = 3 * depth * 2 * (2 * batch * width * seq * (seq + 1) // 2)
  found = work.of(run)
  assert (found.attention, found.total) == (attention, matrices + attention)
  assert found.visible == pytest.approx((seq + 1) / (2 * seq))


@pytest.mark.parametrize("capacity_factor", [None, 1.0, 2.0])
def test_a_token_counts_the_experts_that_it_chose_whatever_room_there_is(capacity_factor):
  width, vocab, seq, batch, hidden, experts = 32, 64, 16, 8, 48, 4
  model = dict(name="decoder", vocab_size=vocab, context=seq, width=width, depth=1, heads=4, experts=experts, top_k=2)
  found = work.of(built(model | dict(mlp_dim=hidden, capacity_factor=capacity_factor), seq, batch))
  layer = 4 * width * width + 2 * (3 * width * hidden + width) + width * experts  # The mean of two is a product, too.
  assert found.total - found.attention == 6 * (layer + vocab * width) * batch * seq


def built(model, seq, batch):
  config = dict(total_steps=10, batch_size=batch, model=model, task=dict(name="language_modeling"))
  config |= dict(data=dict(source=dict(name="synthetic", kind="tokens", length=seq)))
  config |= dict(optimizer=dict(name="adamw"), schedule=dict(name="constant", peak=1e-3))
  return experiment.build(configs.resolve(config, experiment.TrainConfig))
