"""Dropping and the stack of blocks against NumPy and hand counts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigjax import precision
from bigjax.errors import UserError
from bigjax.models import layers


def test_dropout_zeroes_at_its_rate_and_keeps_the_mean():
  x = np.asarray(layers.dropout(jnp.ones((200, 200)), 0.25, jax.random.key(0)))
  assert set(np.unique(x)) == {np.float32(0), np.float32(4 / 3)}
  assert abs((x == 0).mean() - 0.25) < 0.01
  assert abs(x.mean() - 1) < 0.01


def test_stochastic_depth_drops_whole_examples():
  x = np.asarray(layers.drop_path(jnp.ones((300, 2, 3)), jnp.float32(0.4), jax.random.key(0))).reshape(300, 6)
  assert (x == x[:, :1]).all()
  np.testing.assert_allclose(np.unique(x), [0, 1 / 0.6], rtol=1e-6)
  assert abs((x[:, 0] == 0).mean() - 0.4) < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_to_and_from_heads_are_the_same_split_up_or_in_a_row(dtype, monkeypatch):
  make = lambda *sizes: layers.Dense(*sizes, dtype=layers.DTYPES[dtype], rngs=nnx.Rngs(0))
  split = lambda dense: nnx.split(precision.summed(dense), nnx.Param)
  (first, into), (last, out) = split(make(12, 24)), split(make(24, 12))
  x = jax.random.normal(jax.random.key(1), (2, 5, 12))

  def value(into, out, x):
    heads = nnx.merge(first, into).to_heads(x, 4)
    assert heads.shape == (2, 5, 4, 6)
    return (nnx.merge(last, out).from_heads(jnp.tanh(heads)).astype(jnp.float32) ** 2).sum()

  row = jax.value_and_grad(value, argnums=(0, 1, 2))(into, out, x)
  monkeypatch.setattr(layers.blockwise, "platform", lambda: "tpu")
  by_head = jax.value_and_grad(value, argnums=(0, 1, 2))(into, out, x)
  program = str(jax.make_jaxpr(jax.grad(value, argnums=(0, 1, 2)))(into, out, x))
  assert "f32[12,4,6]" in program and "f32[4,6,12]" in program  # Gradients of kernels stay float32 here as well.
  tolerance = dict(float32=1e-5, bfloat16=2e-2)[dtype]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), row, by_head)


class AddRate(nnx.Module):
  """Adds its own number, and ten times the rate at which it is dropped."""

  def __init__(self, *, rngs):
    self.number = nnx.Param(jax.random.uniform(rngs.params(), (1,)))

  def __call__(self, x, *, key, drop_rate):
    del key
    return x + self.number[...] + 10 * (0 if drop_rate is None else drop_rate), {"number": self.number[...]}


@pytest.mark.parametrize("scan", [False, True])
def test_a_stack_drops_more_the_deeper_it_gets_and_nothing_without_a_key(scan):
  blocks = layers.stack(AddRate, 3, scan=scan, rngs=nnx.Rngs(0))
  plain, aux = layers.run_stack(blocks, jnp.zeros(1), drop_path_rate=0.4)
  training, _ = layers.run_stack(blocks, jnp.zeros(1), key=jax.random.key(0), drop_path_rate=0.4)
  assert aux["number"].shape == (3, 1)  # What blocks return besides, by layer.
  np.testing.assert_allclose(aux["number"].sum(0), plain, rtol=1e-6)
  np.testing.assert_allclose(training - plain, 10 * (0.0 + 0.2 + 0.4), rtol=1e-5)


def test_a_scanned_stack_starts_with_the_values_of_an_unscanned_one():
  build = functools.partial(layers.Block, 8, 2, 16, init=layers.BlockInit(*[nnx.initializers.lecun_normal()] * 4))
  unscanned, scanned = (
    jax.jit(lambda scan=scan: nnx.to_pure_dict(nnx.state(layers.stack(build, 3, scan=scan, rngs=nnx.Rngs(0)))))()
    for scan in (False, True)
  )
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *unscanned.values())
  jax.tree.map(np.testing.assert_array_equal, stacked, scanned)
  assert np.std(scanned["attn"]["qkv"]["kernel"], axis=0).min() > 0  # No two layers are the same.


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("scan", [False, True])
def test_recomputing_in_the_backward_pass_changes_no_gradient(remat, scan):
  build = functools.partial(layers.Block, 8, 2, 16, init=layers.BlockInit(*[nnx.initializers.lecun_normal()] * 4))
  graphdef, state = nnx.split(nnx.eval_shape(lambda: layers.stack(build, 2, scan=scan, rngs=nnx.Rngs(0))))
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), nnx.to_pure_dict(state))
  x = jax.random.normal(jax.random.key(1), (2, 3, 8))

  def loss(state, remat):
    y, _ = layers.run_stack(nnx.merge(graphdef, state), x, key=jax.random.key(2), drop_path_rate=0.2, remat=remat)
    return jnp.square(y).sum()

  kept, recomputed = (jax.jit(jax.grad(functools.partial(loss, remat=r)))(state) for r in ("none", remat))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), recomputed, kept)
  jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, remat=remat)))(state)
  assert "remat" in str(jaxpr)


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_are_finite_with_finite_slopes(name):
  x = jnp.linspace(-30.0, 30.0, 101)
  values, slopes = jax.vmap(jax.value_and_grad(layers.ACTIVATIONS[name]))(x)
  assert np.isfinite(values).all() and np.isfinite(slopes).all()


@pytest.mark.parametrize("x", [-1.5, 0.7, 4.0])
def test_activations_are_those_the_field_means(x):
  sigmoid, softplus = 1 / (1 + math.exp(-x)), math.log1p(math.exp(x))
  selu_scale, selu_alpha = 1.0507009873554805, 1.6732632423543772
  expected = dict(
    relu=max(x, 0),
    relu6=min(max(x, 0), 6),
    leaky_relu=x if x > 0 else 0.01 * x,
    elu=x if x > 0 else math.expm1(x),
    selu=selu_scale * (x if x > 0 else selu_alpha * math.expm1(x)),
    gelu=0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    gelu_tanh=0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    silu=x * sigmoid,
    swish=x * sigmoid,
    mish=x * math.tanh(softplus),
    tanh=math.tanh(x),
    sigmoid=sigmoid,
    softplus=softplus,
    hard_tanh=min(max(x, -1), 1),
    squared_relu=max(x, 0) ** 2,
  )
  for name, value in expected.items():
    np.testing.assert_allclose(layers.ACTIVATIONS[name](jnp.float32(x)), value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  ("remat", "kept"),
  [("full", []), ("save(qkv,hidden)", ["qkv", "hidden"]), ("offload(qkv)+save(attention)", ["attention"])],
)
def test_a_policy_names_the_tensors_that_the_backward_pass_does_not_compute_again(remat, kept, capsys):
  build = functools.partial(layers.Block, 8, 2, 16, init=layers.BlockInit(*[nnx.initializers.lecun_normal()] * 4))
  blocks = layers.stack(build, 2, scan=False, rngs=nnx.Rngs(0))
  jax.ad_checkpoint.print_saved_residuals(
    lambda x: layers.run_stack(blocks, x, remat=remat)[0].sum(), jnp.ones((2, 3, 8))
  )
  said = capsys.readouterr().out
  assert [said.count(f"named '{name}'") for name in layers.NAMED] == [2 * (name in kept) for name in layers.NAMED]
  assert said.count("<host>[2,3,6,4]") == 2 * ("offload(qkv)" in remat)


@pytest.mark.parametrize(
  ("remat", "words"),
  [("ful", "Did you mean 'full'"), ("save(qvk)", "Did you mean 'qkv'"), ("save(qkv)+keep(hidden)", "is not known")],
)
def test_a_policy_that_is_not_known_is_refused(remat, words):
  with pytest.raises(UserError, match=words):
    layers.remat_policy(remat)
