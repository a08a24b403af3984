"""The decoder: published sizes, what each option computes, packing, scans, meshes, and experts in training."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from bigjax import sharding
from bigjax.errors import UserError
from bigjax.models import decoder, gpt
from bigjax.models.decoder_sizes import VARIANTS

SMALL = dict(vocab_size=14, context=16, width=16, depth=4, heads=4, kv_heads=2, mlp_dim=24)
EXPERTS = dict(experts=4, top_k=2, expert_dim=12)
LATENT = dict(query_rank=6, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=6)
GEMMA = dict(norm_place="sandwich", norm_offset=True, tied=True, embed_scale=True, activation="gelu_tanh")
FAMILIES = {
  "gpt2": dict(norm="layer", bias="all", positions="learned", gated=False, activation="gelu_tanh", tied=True),
  "llama": dict(rope_scaling="llama3", rope_factor=8.0, rope_trained=8),
  "mistral": dict(window=3, pattern="L"),
  "qwen": dict(bias="qkv", qk_norm="head", head_dim=8),
  "gemma2": GEMMA | dict(window=3, pattern="LG", softcap=2.0, logit_softcap=3.0, scale_dim=9),
  "gemma3": GEMMA
  | dict(window=3, pattern="LLG", qk_norm="head", local_theta=100.0, rope_scaling="linear", rope_factor=8.0),
  "olmo2": dict(norm_place="post", qk_norm="all"),
  "phi": dict(rope_fraction=0.5),
  "mixtral": EXPERTS | dict(router_z_loss=0.01),
  "deepseek": EXPERTS
  | LATENT
  | dict(first_dense=1, shared_experts=1, scoring="sigmoid", bias_rate=0.01, balance_loss=0.1, rope_scaling="yarn")
  | dict(rope_factor=4.0, rope_sharpen=1.0, rope_amplitude=1.0),
  "every other": EXPERTS | dict(moe_every=2, window=3, pattern="LG", depth=8, bias_rate=0.01),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (4, 16)), jnp.int32)


@functools.cache
def built(name, **changes):
  """The graph, and parameters far from where they start."""
  arguments = SMALL | FAMILIES[name] | changes
  make = lambda: decoder.make(**arguments, rngs=nnx.Rngs(0))
  graphdef, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
  rng = np.random.default_rng(0)
  drawn = lambda path, p: jnp.asarray(rng.normal(0, 0.3, p.shape) + (path[-1].key == "scale"), jnp.float32)
  params = jax.tree.map_with_path(drawn, nnx.to_pure_dict(params))
  return graphdef, params, jax.tree.map(lambda e: jnp.zeros(e.shape), nnx.to_pure_dict(rest))


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, params, rest, tokens, segments=None, positions=None):
  return nnx.merge(graphdef, params, rest)(tokens, segments=segments, positions=positions)


# Of the weights at https://huggingface.co/, in the repositories that decoder_sizes.py names. DeepSeek's without the
# 58 * 256 biases of its routers, which are no parameters here, and without the layer that predicts a second token.
COUNTS = {
  "gpt2": 124_439_808,
  "gpt2-medium": 354_823_168,
  "gpt2-large": 774_030_080,
  "gpt2-xl": 1_557_611_200,
  "llama2-7b": 6_738_415_616,
  "llama2-13b": 13_015_864_320,
  "llama2-70b": 68_976_648_192,
  "llama3-8b": 8_030_261_248,
  "llama3-70b": 70_553_706_496,
  "llama3.1-8b": 8_030_261_248,
  "llama3.1-70b": 70_553_706_496,
  "llama3.1-405b": 405_853_388_800,
  "llama3.2-1b": 1_235_814_400,
  "llama3.2-3b": 3_212_749_824,
  "llama3.3-70b": 70_553_706_496,
  "mistral-7b": 7_241_732_096,
  "mistral-7b-v0.3": 7_248_023_552,
  "mixtral-8x7b": 46_702_792_704,
  "mixtral-8x22b": 140_620_634_112,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2.5-3b": 3_085_938_688,
  "qwen2.5-7b": 7_615_616_512,
  "qwen2.5-14b": 14_770_033_664,
  "qwen2.5-32b": 32_763_876_352,
  "qwen2.5-72b": 72_706_203_648,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "qwen3-14b": 14_768_307_200,
  "qwen3-32b": 32_762_123_264,
  "qwen3-30b-a3b": 30_532_122_624,
  "qwen3-235b-a22b": 235_093_634_560,
  "gemma2-2b": 2_614_341_888,
  "gemma2-9b": 9_241_705_984,
  "gemma2-27b": 27_227_128_320,
  "gemma3-270m": 268_098_176,
  "gemma3-1b": 999_885_952,
  "gemma3-4b": 3_880_263_168,
  "gemma3-12b": 11_766_034_176,
  "gemma3-27b": 27_009_346_304,
  "olmo2-1b": 1_484_916_736,
  "olmo2-7b": 7_298_617_344,
  "olmo2-13b": 13_716_198_400,
  "olmo2-32b": 32_234_279_936,
  "smollm-135m": 134_515_008,
  "smollm-360m": 361_821_120,
  "smollm-1.7b": 1_711_376_384,
  "smollm2-135m": 134_515_008,
  "smollm2-360m": 361_821_120,
  "smollm2-1.7b": 1_711_376_384,
  "phi3-mini": 3_821_079_552,
  "phi3-medium": 13_960_238_080,
  "deepseek-v3": 671_026_404_352,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_sizes_have_the_published_number_of_parameters(variant):
  module = nnx.eval_shape(lambda: decoder.make(variant=variant, scan=True, rngs=nnx.Rngs(0)))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))) == COUNTS[variant]


def test_gpt2_computes_what_gpt_does():
  theirs = gpt.make(vocab_size=14, context=16, width=16, depth=4, heads=4, rngs=nnx.Rngs(3))
  params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), nnx.state(theirs, nnx.Param))
  nnx.update(theirs, params)
  pure = nnx.to_pure_dict(params)

  def apart(block):
    """Columns of the fused product are [heads, (query, key, value), dim]."""
    split = lambda leaf: leaf.reshape(*leaf.shape[:-1], 4, 3, 4)
    attn = {
      name: {leaf: split(p)[..., i, :].reshape(p.shape[:-1] + (16,)) for leaf, p in block["attn"]["qkv"].items()}
      for i, name in enumerate(("query", "key", "value"))
    }
    return block | {"attn": attn | {"out": block["attn"]["out"]}}

  graphdef, _, rest = built("gpt2", kv_heads=4, mlp_dim=64)
  converted = pure | {"blocks": {i: apart(block) for i, block in pure["blocks"].items()}}
  expected = jax.jit(lambda tokens: theirs(tokens))(TOKENS)
  np.testing.assert_allclose(logits(graphdef, converted, rest, TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_future_token_changes_nothing_before_it(name):
  model = built(name)
  before, after = (logits(*model, tokens) for tokens in (TOKENS, TOKENS.at[:, 9].add(1) % 13))
  np.testing.assert_allclose(before[:, :9], after[:, :9], rtol=1e-6, atol=1e-6)
  assert np.abs(before - after)[:, 9].max() > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_documents_packed_in_a_row_are_as_if_alone(name):
  first, second = np.random.default_rng(1).integers(0, 13, (2, 7))
  nothing = [0] * 9
  tokens = jnp.asarray([[*first, *second, 0, 0], [*first, *nothing], [*second, *nothing]], jnp.int32)
  segments = jnp.asarray([[1] * 7 + [2] * 7 + [0] * 2, [1] * 7 + nothing, [1] * 7 + nothing])
  packed, alone_first, alone_second = logits(*built(name), tokens, segments)
  np.testing.assert_allclose(packed[:7], alone_first[:7], rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(packed[7:14], alone_second[:7], rtol=2e-5, atol=2e-5)


def test_positions_can_be_given():
  segments = jnp.asarray([[1] * 7 + [2] * 6 + [0] * 3] * 4)
  positions = jnp.asarray([[*range(7), *range(6), *range(3)]] * 4)
  model = built("gpt2")
  np.testing.assert_array_equal(logits(*model, TOKENS, segments, positions), logits(*model, TOKENS, segments))
  assert np.abs(logits(*model, TOKENS, segments, positions + 1) - logits(*model, TOKENS, segments)).max() > 1e-3


def stacked(tree):
  """Parameters of layers in a list, as a scan wants them."""
  stack = lambda blocks: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[i] for i in sorted(blocks)))
  return {k: stack(v) if k in ("blocks", "dense_blocks") else v for k, v in tree.items()}


def loss_and_gradient(graphdef, params, rest, tokens=TOKENS, **more):
  """Of training on the next token, with penalties; and what the model keeps after it."""

  def loss(params):
    module = nnx.merge(graphdef, params, rest)
    hidden, penalties = module.hidden(tokens, key=jax.random.key(1), train=True, **more)
    log = jax.nn.log_softmax(module.unembed(hidden))
    chosen = jnp.take_along_axis(log[:, :-1], tokens[:, 1:, None], axis=-1)
    return -chosen.sum() + sum(penalties.values()), (penalties, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def assert_close(found, expected):
  """Up to float32's rounding, of which the largest values of a leaf are the measure."""
  for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("name", ["gemma3", "every other"])
def test_scanned_layers_compute_the_same(name):
  graphdef, params, rest = built(name)
  scanned_graphdef, _, scanned_rest = built(name, scan=True)
  plain = logits(graphdef, params, rest, TOKENS)
  scanned = logits(scanned_graphdef, stacked(params), scanned_rest, TOKENS)
  np.testing.assert_allclose(scanned, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "remat"), [("gemma3", "full"), ("deepseek", "none"), ("every other", "save(qkv,hidden)")]
)
def test_scanned_and_recomputed_layers_have_the_same_gradients(name, remat):
  rate = 0.2 if name == "gemma3" else 0.0
  (loss, (penalties, kept)), gradient = loss_and_gradient(*built(name, dropout=rate))
  graphdef, params, rest = built(name, dropout=rate, scan=True, remat=remat)
  found = loss_and_gradient(graphdef, stacked(built(name, dropout=rate)[1]), rest)
  assert jax.tree.map(jnp.shape, stacked(gradient)) == jax.tree.map(jnp.shape, params)
  assert_close(found, ((loss, (penalties, stacked(kept))), stacked(gradient)))


@pytest.mark.slow
def test_a_scanned_layer_starts_as_the_unscanned_one():
  start = lambda scan: nnx.to_pure_dict(
    nnx.state(decoder.make(**SMALL | FAMILIES["every other"], scan=scan, rngs=nnx.Rngs(0)), nnx.Param)
  )
  jax.tree.map(np.testing.assert_array_equal, stacked(start(False)), start(True))


def test_layers_are_what_their_place_says():
  def shapes(**arguments):
    module = nnx.eval_shape(lambda: decoder.make(**SMALL | arguments, scan=True, rngs=nnx.Rngs(0)))
    pure = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    count = lambda blocks: jax.tree.leaves(blocks)[0].shape[0] if "attn" in blocks else len(blocks)
    return {
      name: (count(b), "router" in b.get("mlp", b.get(0, {}).get("mlp", {})))
      for name, b in pure.items()
      if "blocks" in name
    }

  assert shapes() == {"blocks": (4, False)}
  assert shapes(**FAMILIES["gemma3"]) == {"blocks": (3, False), "last_blocks": (1, False)}
  assert shapes(**FAMILIES["deepseek"]) == {"first_blocks": (1, False), "blocks": (3, True)}
  assert shapes(**FAMILIES["every other"]) == {"blocks": (4, True), "dense_blocks": (4, False)}
  assert shapes(window=2, pattern="LLLLLG") == {"blocks": (4, False)}  # Shorter than a period.


def test_a_window_hides_what_is_further_back_and_a_global_layer_shows_it():
  for pattern, reach in {"L": 4 * 2, "LLLG": 15}.items():
    model = built("mistral", pattern=pattern)
    before, after = (logits(*model, tokens) for tokens in (TOKENS, TOKENS.at[:, 0].add(1) % 13))
    moved = np.abs(before - after).max(axis=(0, 2)) > 1e-6
    assert moved[: reach + 1].all() and not moved[reach + 1 :].any()


@pytest.mark.slow
def test_experts_penalties_are_sums_over_tokens_and_padding_adds_nothing():
  model = built("deepseek", router_z_loss=0.01)
  segments = jnp.asarray(np.random.default_rng(2).integers(0, 2, (4, 16)))
  penalties = lambda tokens, segments: loss_and_gradient(*model, tokens, segments=segments)[0][1][0]
  whole = penalties(TOKENS, segments)
  assert set(whole) == {"balance", "router_z"}
  parts = [penalties(TOKENS[i : i + 1], segments[i : i + 1]) for i in range(4)]
  jax.tree.map(lambda *x: np.testing.assert_allclose(sum(x[1:]), x[0], rtol=1e-5), whole, *parts)
  changed = penalties(jnp.where(segments != 0, TOKENS, 5), segments)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), changed, whole)
  assert built("llama")[0] and loss_and_gradient(*built("llama"))[0][1][0] == {}


@pytest.mark.parametrize(
  ("name", "scan"), [("deepseek", False), pytest.param("every other", True, marks=pytest.mark.slow)]
)
def test_training_counts_the_load_and_settling_moves_the_bias(name, scan):
  graphdef, params, rest = built(name, scan=scan)
  (_, (_, kept)), _ = loss_and_gradient(graphdef, params, rest)
  load = np.stack([b["mlp"]["load"] for b in kept["blocks"].values()]) if not scan else kept["blocks"]["mlp"]["load"]
  np.testing.assert_array_equal(load.sum(-1), np.full(len(load), TOKENS.size * 2))
  module = nnx.merge(graphdef, params, kept)
  module.settle()
  after = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))["blocks"]
  blocks = [after] if scan else list(after.values())
  bias = np.concatenate([np.asarray(b["mlp"]["bias"]).reshape(-1, 4) for b in blocks])
  np.testing.assert_allclose(bias, 0.01 * np.sign(load.mean(-1, keepdims=True) - load))
  assert not any(np.any(b["mlp"]["load"]) for b in blocks)
  untrained = nnx.merge(graphdef, params, rest)
  untrained(TOKENS)
  jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(untrained, nnx.BatchStat)), rest)


MESHES = {
  "tensor 2": dict(tensor=2),
  "data 2 expert 2 tensor 2": dict(data=2, expert=2, tensor=2),
  "data 2 seq 2 tensor 2": dict(data=2, seq=2, tensor=2),
  "pipe 2 data 2": dict(pipe=2, data=2),
}


@pytest.mark.parametrize(
  ("name", "axes"),
  [
    ("llama", "tensor 2"),
    ("gemma2", "pipe 2 data 2"),
    pytest.param("gemma2", "data 2 seq 2 tensor 2", marks=pytest.mark.slow),
    pytest.param("deepseek", "data 2 expert 2 tensor 2", marks=pytest.mark.slow),
    pytest.param("every other", "pipe 2 data 2", marks=pytest.mark.slow),
  ],
)
def test_any_mesh_gives_what_one_device_gives(name, axes):
  model = built(name, scan=True)
  segments = jnp.asarray([[1] * 9 + [2] * 7, [1] * 16, [1] * 4 + [2] * 12, [1] * 13 + [0] * 3])
  expected = loss_and_gradient(*model, segments=segments)
  sizes = {axis: MESHES[axes][axis] for axis in sharding.AXES if axis in MESHES[axes]}
  count = math.prod(sizes.values())
  mesh = jax.make_mesh(sizes.values(), sizes.keys(), (AxisType.Auto,) * len(sizes), devices=jax.devices()[:count])
  with sharding.use(sharding.Layout(mesh, microbatches=2)):
    found = loss_and_gradient(*model, segments=segments)
  assert_close(found, expected)


def test_half_precision_keeps_float32_parameters_and_logits():
  for name in ("gemma2", "deepseek"):
    graphdef, params, rest = built(name, dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    found, exact = logits(graphdef, params, rest, TOKENS), logits(*built(name), TOKENS)
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - exact).mean() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
  ("arguments", "remedy"),
  [
    (dict(variant="llama3.1-80b"), "model.variant: 'llama3.1-80b' is not known. Did you mean 'llama3.1-8b'"),
    (dict(width=16), "model.vocab_size is missing. Give it, or a variant"),
    (SMALL | dict(kv_heads=3), "model.kv_heads: 3 does not divide 4 heads. The nearest that does is 2"),
    (SMALL | dict(heads=5), "model.heads: 5 does not divide width 16. The nearest number that does is 4"),
    (SMALL | dict(rope_fraction=0.75), "model.rope_fraction: 3 of a head's 4 dimensions"),
    (SMALL | dict(pattern="LX", window=3), "model.pattern: 'LX' is no pattern"),
    (SMALL | dict(pattern="LG"), "model.window is missing"),
    (SMALL | dict(window=3), "has no layer for the window of 3"),
    (SMALL | dict(experts=4, top_k=5), "model.top_k: a token can't choose 5 of 4 experts"),
    (SMALL | dict(experts=4, first_dense=4), "4 of 4 layers leave none with experts"),
    (
      SMALL | dict(experts=4, moe_every=3),
      "4 layers after the first 0 are no whole number of periods of 3 .* 3 or 6 layers",
    ),
    (SMALL | dict(first_dense=1), "model.experts is missing"),
    (SMALL | dict(kv_rank=4, positions="none"), 'set positions="rope"'),
    (SMALL | dict(remat="all"), "model.remat: 'all' is not known"),
  ],
)
def test_options_that_make_no_model_are_named_with_the_remedy(arguments, remedy):
  with pytest.raises(UserError, match=remedy):
    nnx.eval_shape(lambda: decoder.make(**arguments, rngs=nnx.Rngs(0)))


def test_a_sequence_longer_than_the_context_is_an_error():
  with pytest.raises(UserError, match="model.context: 16 positions are too few for sequences of 17"):
    logits(*built("llama"), jnp.zeros((1, 17), jnp.int32))
