"""What is kept of the tokens before gives the logits that going through all of them gives, in every kind of model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import decoder, gpt

SMALL = dict(vocab_size=13, context=16, width=16, depth=4, heads=4, kv_heads=2, mlp_dim=24)
EXPERTS = dict(experts=4, top_k=2, expert_dim=12)
LATENT = dict(kv_rank=8, nope_dim=8, rope_dim=4, value_dim=6)
KINDS = {
  "learned positions": dict(norm="layer", bias="all", positions="learned", gated=False, tied=True, kv_heads=4),
  "groups of heads": dict(rope_scaling="llama3", rope_factor=8.0, rope_trained=8),
  "one head of keys": dict(kv_heads=1),
  "windows": dict(window=3, pattern="L"),
  "norms of queries and keys": dict(qk_norm="head", head_dim=8, bias="qkv"),
  "norms over all heads": dict(qk_norm="all", norm_place="post"),
  "soft-capping": dict(window=3, pattern="LG", softcap=2.0, logit_softcap=3.0, norm_place="sandwich", embed_scale=True),
  "two speeds of turning": dict(window=3, pattern="LLG", local_theta=100.0, rope_fraction=0.5),
  "experts": EXPERTS | dict(first_dense=1),
  "some experts": EXPERTS | dict(moe_every=2, window=3, pattern="LG", bias_rate=0.01),
  "latent": LATENT | dict(rope_scaling="yarn", rope_factor=4.0, rope_sharpen=1.0),
  "latent and experts": LATENT | EXPERTS | dict(query_rank=6, first_dense=1, shared_experts=1, scoring="sigmoid"),
}
GPT = dict(vocab_size=13, context=16, width=16, depth=4, heads=4)
TOKENS = np.random.default_rng(0).integers(0, 13, (3, 15)).astype(np.int32)


@functools.cache
def built(kind, **changes):
  """A model whose parameters are far from where they start."""
  arguments = (GPT if kind == "gpt" else SMALL | KINDS[kind]) | changes
  make = lambda: (gpt if kind == "gpt" else decoder).make(**arguments, rngs=nnx.Rngs(0))
  graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
  rng = np.random.default_rng(0)
  drawn = lambda path, p: jnp.asarray(rng.normal(0, 0.3, p.shape) + (path[-1].key == "scale"), jnp.float32)
  params = jax.tree.map_with_path(drawn, nnx.to_pure_dict(params))
  return graphdef, params, jax.tree.map(lambda e: jnp.zeros(e.shape), nnx.to_pure_dict(rest))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def cached_logits(graphdef, params, rest, tokens, first, dtype, padding):
  """Of the tokens from `first` on, one at a time, after those before it at once."""
  module = nnx.merge(graphdef, params, rest)
  cache = module.empty_cache(padding, 16, dtype)
  if first:
    _, cache = module.extend(tokens[:, :first], cache)

  def step(cache, token):
    hidden, cache = module.extend(token[:, None], cache)
    return cache, module.unembed(hidden)[:, 0]

  return jax.lax.scan(step, cache, tokens[:, first:].T)[1].swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=0)
def plain_logits(graphdef, params, rest, tokens):
  return nnx.merge(graphdef, params, rest)(tokens)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", ["gpt", *KINDS])
def test_cached_logits_are_those_of_the_whole_sequence(kind, scan):
  model = built(kind, scan=scan)
  padding = np.array([0, 2, 5], np.int32)  # Rows of different length, which end together.
  cached = cached_logits(*model, TOKENS, 8, None, padding)
  for row, start in enumerate(padding):
    whole = plain_logits(*model, TOKENS[row : row + 1, start:])[0, 8 - start :]
    np.testing.assert_allclose(cached[row], whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["windows", "latent"])
def test_a_cache_may_start_with_one_token(kind):
  cached = cached_logits(*built(kind), TOKENS, 0, None, np.zeros(3, np.int32))
  np.testing.assert_allclose(cached, plain_logits(*built(kind), TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["groups of heads", "windows", "latent"])
def test_a_cache_in_int8_is_near(kind):
  whole = plain_logits(*built(kind), TOKENS)[:, 8:]
  cached = cached_logits(*built(kind), TOKENS, 8, "int8", np.zeros(3, np.int32))
  assert 0 < np.abs(cached - whole).max() < 0.05 * np.abs(whole).max()


def test_a_window_keeps_a_ring_of_its_size():
  graphdef, params, rest = built("two speeds of turning")
  module = nnx.merge(graphdef, params, rest)
  cache = jax.eval_shape(lambda: module.empty_cache(jnp.zeros(2, jnp.int32), 16, "int8"))
  assert [layer["key"].shape for layer in cache.layers] == [(2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 16, 4), (2, 2, 3, 4)]
  assert cache.layers[0]["key"].dtype == jnp.int8
  assert cache.layers[0]["key_scale"].shape == (2, 2, 3, 1)


def test_latent_attention_keeps_the_latent_vector_and_what_turns():
  graphdef, params, rest = built("latent")
  module = nnx.merge(graphdef, params, rest)
  cache = jax.eval_shape(lambda: module.empty_cache(jnp.zeros(2, jnp.int32), 16))
  assert {name: kept.shape for name, kept in cache.layers[0].items()} == {
    "latent": (2, 1, 16, 8),
    "turning": (2, 1, 16, 4),
  }


def test_experts_with_a_capacity_take_every_token_when_decoding():
  tight, dropless = (
    cached_logits(*built("experts", capacity_factor=factor, group=5), TOKENS, 8, None, np.zeros(3, np.int32))
    for factor in (0.1, None)
  )
  np.testing.assert_array_equal(tight, dropless)


@pytest.mark.parametrize("kind", ["groups of heads", "latent and experts"])
def test_a_cache_is_split_over_a_mesh(kind):
  graphdef, params, rest = built(kind, scan=True, vocab_size=14)
  mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)
  roles = {"tensor": decoder.TENSOR + decoder.moe.TENSOR, "expert": decoder.EXPERT}
  layout = sharding.shard_tree(params, "fsdp(data,4)+tensor+expert", mesh, roles=roles)
  tokens, padding = np.tile(TOKENS, (2, 1))[:4], np.array([0, 2, 5, 0], np.int32)
  alone = cached_logits(graphdef, params, rest, tokens, 8, None, padding)
  with sharding.use(sharding.Layout(mesh=mesh)):
    split = jax.jit(cached_logits.__wrapped__, static_argnums=(0, 4, 5))(
      graphdef, jax.device_put(params, layout), rest, tokens, 8, None, padding
    )
    cache = jax.jit(lambda: nnx.merge(graphdef, params, rest).empty_cache(jnp.asarray(padding), 16))()
  np.testing.assert_allclose(split, alone, atol=1e-5, rtol=1e-5)
  batch, heads = (4, 2) if kind == "groups of heads" else (4, 1)
  name = "key" if kind == "groups of heads" else "latent"
  shape = cache.layers[-1][name].sharding.shard_shape(cache.layers[-1][name].shape)
  assert shape[-4:-2] == (batch // 4, max(1, heads // 2))


@pytest.mark.parametrize("axis", ["seq", "pipe"])
def test_a_mesh_that_splits_a_token_at_a_time_is_refused(axis):
  graphdef, params, rest = built("windows", scan=True)
  mesh = jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,))
  with sharding.use(sharding.Layout(mesh=mesh)), pytest.raises(UserError, match=axis):
    nnx.merge(graphdef, params, rest).empty_cache(jnp.zeros(2, jnp.int32), 16)
