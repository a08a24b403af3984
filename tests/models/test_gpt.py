"""GPT-2: published sizes, its equations in NumPy, causality, and scan against no scan."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigjax.errors import UserError
from bigjax.models import gpt

SMALL = dict(vocab_size=13, context=8, width=16, depth=2, heads=2)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 8)), jnp.int32)


@functools.cache
def parameters(**changes):
  """Initialised, with noise on what starts at 0 or 1."""
  graphdef, params = jax.jit(lambda: nnx.split(gpt.make(**SMALL | changes, rngs=nnx.Rngs(0)), nnx.Param))()
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda p: p + 0.2 * rng.normal(size=p.shape).astype(np.float32), nnx.to_pure_dict(params))
  return graphdef, params


def logits(tokens, **changes):
  graphdef, params = parameters(**changes)
  return jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens))(tokens)


# The sizes of the published checkpoints, https://huggingface.co/openai-community/gpt2 and its three sisters: what their
# safetensors hold without the causal masks.
@pytest.mark.parametrize(
  ("variant", "count"),
  [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_sizes_are_the_published_ones(variant, count):
  for scan in (False, True):
    module = nnx.eval_shape(lambda scan=scan: gpt.make(variant=variant, scan=scan, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))) == count


def test_the_logits_are_those_of_the_equations():
  _, params = parameters()
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

  def norm(x, q):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * q["scale"] + q["bias"]

  def dense(x, q):
    return x @ q["kernel"] + q["bias"]

  def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  x = p["token_embed"]["embedding"][TOKENS] + p["position_embed"]["embedding"][None, :8]
  for block in p["blocks"].values():
    query, key, value = (
      dense(norm(x, block["norm1"]), block["attn"]["qkv"]).reshape(2, 8, 2, 3, 8).transpose(3, 0, 2, 1, 4)
    )
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(8)
    weights = np.where(np.tri(8), np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    x = x + dense((weights @ value).swapaxes(1, 2).reshape(2, 8, 16), block["attn"]["out"])
    x = x + dense(gelu(dense(norm(x, block["norm2"]), block["mlp"]["up"])), block["mlp"]["down"])
  expected = norm(x, p["norm"]) @ p["token_embed"]["embedding"].T
  np.testing.assert_allclose(logits(TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", [1, 4, 7])
def test_a_future_token_changes_no_past_logits(position):
  changed = np.array(TOKENS)
  changed[:, position] = (changed[:, position] + 1) % 13
  before, after = logits(TOKENS), logits(changed)
  np.testing.assert_array_equal(before[:, :position], after[:, :position])
  assert (np.abs(before - after)[:, position:].max(axis=(0, 2)) > 1e-4).all()


def test_a_shorter_sequence_has_the_logits_of_the_longer_one():
  np.testing.assert_allclose(logits(TOKENS[:, :5]), logits(TOKENS)[:, :5], rtol=1e-5, atol=1e-5)


def test_a_sequence_longer_than_the_context_is_an_error():
  with pytest.raises(UserError, match="model.context: 8 positions are too few for sequences of 9"):
    logits(np.zeros((1, 9), np.int32))


def test_scanned_layers_give_the_same_logits_and_gradients():
  _, params = parameters()
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: gpt.make(**SMALL, dropout=0.3, rngs=nnx.Rngs(0))))
  scanned_graphdef = nnx.graphdef(nnx.eval_shape(lambda: gpt.make(**SMALL, dropout=0.3, scan=True, rngs=nnx.Rngs(0))))

  def stacked(tree):
    return tree | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree["blocks"].values())}

  def loss(params, graphdef):
    found = nnx.merge(graphdef, params)(TOKENS, key=jax.random.key(3), train=True)
    return jnp.square(found).mean(), found

  both = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  (_, plain), gradient = both(params, graphdef)
  (_, scanned), scanned_gradient = both(stacked(params), scanned_graphdef)
  np.testing.assert_allclose(scanned, plain, rtol=1e-4, atol=1e-4)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), scanned_gradient, stacked(gradient))


def test_what_enters_the_residual_stream_starts_smaller():
  _, params = jax.jit(lambda: nnx.split(gpt.make(**SMALL | dict(width=128), scan=True, rngs=nnx.Rngs(0)), nnx.Param))()
  blocks = nnx.to_pure_dict(params)["blocks"]
  for kernel, std in {("attn", "qkv"): 0.02, ("mlp", "up"): 0.02}.items():
    np.testing.assert_allclose(np.std(blocks[kernel[0]][kernel[1]]["kernel"]), std, rtol=0.02)
  for kernel in (("attn", "out"), ("mlp", "down")):
    np.testing.assert_allclose(np.std(blocks[kernel[0]][kernel[1]]["kernel"]), 0.02 / np.sqrt(2 * 2), rtol=0.02)


def test_biases_can_go_and_the_head_can_be_its_own():
  def names(**changes):
    module = nnx.eval_shape(lambda: gpt.make(**SMALL, **changes, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}

  assert {name for name in names() if name.startswith("blocks/0/") and "norm" not in name} == {
    f"blocks/0/{name}/{leaf}" for name in ("attn/qkv", "attn/out", "mlp/up", "mlp/down") for leaf in ("kernel", "bias")
  }
  assert not any("bias" in name for name in names(bias=False))
  assert names(tied=False) - names() == {"head/embedding"}


@pytest.mark.parametrize("backend", ["chunked", "jax"])
def test_backends_of_attention_agree(backend):
  tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 11)

  def logits(attention):
    sizes = dict(vocab_size=11, context=8, width=16, depth=2, heads=2)
    return gpt.make(**sizes, attention=attention, rngs=nnx.Rngs(0))(tokens)

  np.testing.assert_allclose(logits(backend), logits("reference"), rtol=1e-5, atol=1e-5)


def test_an_unknown_backend_is_refused():
  with pytest.raises(UserError, match="model.attention: 'chunkd' is not known. Did you mean 'chunked'"):
    gpt.make(vocab_size=11, context=8, width=16, depth=2, heads=2, attention="chunkd", rngs=nnx.Rngs(0))
