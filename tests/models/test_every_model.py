"""What the loop relies on, held for every model: pure state, float32 outputs, randomness from the key alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigjax.errors import UserError
from bigjax.models import bert, cnn, decoder, gpt, linear, mixer, mlp, resnet, rnn, vit

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 11, size=(4, 6)).astype(np.int32)
VIT = dict(num_classes=5, image_size=8, patch_size=4, width=16, depth=2, heads=2)
LM = dict(vocab_size=11, context=8, width=16, depth=2, heads=2, dropout=0.5)

# Each with everything random and everything stateful that it has.
MODELS = {
  "linear": (linear.make, dict(in_features=192, num_outputs=5), IMAGES, (4, 5)),
  "mlp": (mlp.make, dict(in_features=192, num_outputs=5, widths=(16, 8), dropout=0.5, batch_norm=True), IMAGES, (4, 5)),
  "cnn": (
    cnn.make,
    dict(num_classes=5, in_shape=(8, 8, 3), channels=(4, 6), dropout=0.5, conv_dropout=0.1, batch_norm=True),
    IMAGES,
    (4, 5),
  ),
  "resnet": (resnet.make, dict(num_classes=5, stages=(1, 1), width=4, stem="small", dropout=0.5), IMAGES, (4, 5)),
  "vit": (vit.make, VIT | dict(registers=2, dropout=0.5, drop_path=0.5, pre_logits=12), IMAGES, (4, 5)),
  "vit_map": (vit.make, VIT | dict(head="map", dropout=0.5, scan=True, remat="full"), IMAGES, (4, 5)),
  "mixer": (
    mixer.make,
    dict(num_classes=5, image_size=8, patch_size=4, width=8, depth=2, tokens_dim=6, channels_dim=12, dropout=0.5),
    IMAGES,
    (4, 5),
  ),
  "rnn": (
    rnn.make,
    dict(num_outputs=5, vocab_size=11, width=8, depth=2, bidirectional=True, dropout=0.5),
    TOKENS,
    (4, 5),
  ),
  "rnn_lm": (
    rnn.make,
    dict(num_outputs=11, vocab_size=11, width=8, output="position", dropout=0.5),
    TOKENS,
    (4, 6, 11),
  ),
  "gpt": (gpt.make, LM, TOKENS, (4, 6, 11)),
  "decoder": (decoder.make, LM | dict(mlp_dim=24, kv_heads=1, window=3, pattern="LG", scan=True), TOKENS, (4, 6, 11)),
  "bert": (bert.make, LM | dict(mlp_dim=24), TOKENS, (4, 6, 11)),
}
HEAVY = ("bert", "decoder")  # They drop through the same functions as vit and gpt.
DROPPING = [
  pytest.param(name, marks=[pytest.mark.slow] * (name in HEAVY))
  for name, (_, arguments, *_) in MODELS.items()
  if "dropout" in arguments
]


@functools.cache
def built(name):
  """Random parameters (a head that starts at zero would hide the rest), fresh statistics, and the graph."""
  make, arguments, *_ = MODELS[name]
  graphdef, params, extras = nnx.split(nnx.eval_shape(lambda: make(**arguments, rngs=nnx.Rngs(0))), nnx.Param, ...)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), nnx.to_pure_dict(params))
  extras = jax.tree.map_with_path(
    lambda path, e: jnp.full(e.shape, path[-1].key == "var", e.dtype), nnx.to_pure_dict(extras)
  )
  return params, extras, graphdef


@functools.cache
def outputs_fn(name, train):
  *_, graphdef = built(name)

  @jax.jit
  def outputs(params, extras, inputs, key):
    module = nnx.merge(graphdef, params, extras)
    return module(inputs, key=key, train=train), nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.Param)))

  return outputs


@pytest.mark.parametrize("name", MODELS)
def test_a_module_holds_parameters_and_batch_statistics_and_nothing_else(name):
  make, arguments, *_ = MODELS[name]
  module = nnx.eval_shape(lambda: make(**arguments, rngs=nnx.Rngs(0)))
  variables = jax.tree.leaves(nnx.state(module), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
  assert {type(variable) for variable in variables} <= {nnx.Param, nnx.BatchStat}
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(module)))


@pytest.mark.parametrize("name", MODELS)
def test_logits_have_their_shape_and_are_float32(name):
  *_, inputs, shape = MODELS[name]
  params, extras, _ = built(name)
  for train in (False, True):
    logits, _ = jax.eval_shape(outputs_fn(name, train), params, extras, inputs, jax.random.key(0))
    assert (logits.shape, logits.dtype) == (shape, jnp.float32)


@pytest.mark.parametrize("name", DROPPING)
def test_what_is_dropped_depends_on_the_key_alone_and_only_in_training(name):
  params, extras, _ = built(name)
  inputs = MODELS[name][2]
  train, evaluate = outputs_fn(name, True), outputs_fn(name, False)
  first, again, other = (train(params, extras, inputs, jax.random.key(seed))[0] for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3
  with_key, without = (evaluate(params, extras, inputs, key)[0] for key in (jax.random.key(1), None))
  np.testing.assert_array_equal(with_key, without)


@pytest.mark.parametrize("name", DROPPING)
def test_training_without_a_key_is_an_error_where_something_is_dropped(name):
  params, extras, graphdef = built(name)
  with pytest.raises(ValueError, match="key="):
    jax.eval_shape(lambda: nnx.merge(graphdef, params, extras)(jnp.asarray(MODELS[name][2]), train=True))


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_batch_statistics_move_in_training_and_only_there(name):
  params, extras, _ = built(name)
  inputs = MODELS[name][2]
  key = jax.random.key(0)
  _, kept = outputs_fn(name, False)(params, extras, inputs, key)
  jax.tree.map(np.testing.assert_array_equal, kept, extras)
  _, moved = outputs_fn(name, True)(params, extras, inputs, key)
  assert all(np.abs(a - b).max() > 0 for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(extras)))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("rnn_lm", "linear", "vit_map")])
def test_a_gradient_reaches_every_parameter(name):
  params, extras, graphdef = built(name)
  inputs = jnp.asarray(MODELS[name][2])

  @jax.jit
  def gradient(params):
    return jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p, extras)(inputs)).sum())(params)

  for path, leaf in jax.tree.leaves_with_path(gradient(params)):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "linear"])
def test_bfloat16_products_keep_float32_parameters_and_logits(name):
  make, arguments, inputs, _ = MODELS[name]
  params, extras, _ = built(name)
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(**arguments, dtype="bfloat16", rngs=nnx.Rngs(0))))

  @jax.jit
  def outputs(params, extras, inputs):
    module = nnx.merge(graphdef, params, extras)
    return module(inputs), module.features(inputs) if hasattr(module, "features") else module.hidden(inputs)[0]

  logits, features = outputs(params, extras, inputs)
  exact, _ = outputs_fn(name, False)(params, extras, inputs, None)
  assert logits.dtype == jnp.float32
  assert 0 < np.abs(logits - exact).max() < 0.06 * np.abs(exact).max()
  jaxpr = str(jax.make_jaxpr(outputs)(params, extras, inputs))
  assert "bf16" in jaxpr
  assert features.shape[0] == 4


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("rnn_lm", "gpt", "decoder", "bert", "linear")])
def test_the_head_is_a_dense_layer_on_the_features(name):
  params, extras, graphdef = built(name)
  inputs = jnp.asarray(MODELS[name][2])
  features = jax.jit(lambda: nnx.merge(graphdef, params, extras).features(inputs))()
  logits, _ = outputs_fn(name, False)(params, extras, inputs, None)
  head = params["head"]
  np.testing.assert_allclose(features @ head["kernel"] + head["bias"][None], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("make", "arguments", "remedy"),
  [
    (gpt.make, dict(variant="gpt3"), "model.variant: 'gpt3' is not known. Did you mean 'gpt2'"),
    (gpt.make, dict(width=64, depth=2), "model.heads is missing"),
    (gpt.make, dict(width=384, depth=2, heads=5), "model.heads: 5 does not divide width 384. .* is 4"),
    (gpt.make, dict(variant="gpt2", dropout=1.5), "model.dropout: 1.5 is not a rate"),
    (gpt.make, dict(variant="gpt2", remat="all"), "model.remat: 'all' is not known"),
    (gpt.make, dict(variant="gpt2", dtype="bf16"), "model.dtype: 'bf16' is not known. Did you mean 'bfloat16'"),
    (vit.make, dict(num_classes=10, variant="X/16"), "model.variant: 'X' is not known"),
    (vit.make, dict(num_classes=10, variant="B/"), "has no patch size after the slash"),
    (vit.make, dict(num_classes=10, variant="B"), "model.patch_size is missing"),
    (vit.make, dict(num_classes=10, variant="B/16", image_size=230), "16 does not divide image_size 230. .* to 224"),
    (vit.make, VIT | dict(width=18, positions="sincos2d"), "model.width: 18 is no multiple of 4"),
    (vit.make, VIT | dict(registers=-1), "model.registers"),
    (mixer.make, dict(num_classes=10, variant="B/15"), "model.patch_size: 15 does not divide image_size 224"),
    (resnet.make, dict(num_classes=10, depth=19), "model.depth: 19 is not known. Known: 101, 152, 18, 34, 50"),
    (resnet.make, dict(num_classes=10), "model.stages is missing"),
    (
      mlp.make,
      dict(in_features=4, num_outputs=2, activation="rellu"),
      "model.activation: 'rellu'.*Did you mean 'relu'",
    ),
    (mlp.make, dict(in_features=4, num_outputs=2, kernel_init="he"), "model.kernel_init: 'he'"),
    (mlp.make, dict(in_features=4, num_outputs=2, widths=(8, 0)), r"model.widths: \(8, 0\) must be above 0"),
    (linear.make, dict(in_features=0, num_outputs=2), "model.in_features: 0 must be above 0"),
    (cnn.make, dict(num_classes=2, in_shape=(4, 4, 1), channels=(8, 8, 8)), r"nothing is left of \(4, 4, 1\) after 3"),
    (cnn.make, dict(num_classes=2, in_shape=(4, 4, 1), kernel=(3, 3)), "model.kernel"),
    (cnn.make, dict(num_classes=2, in_shape=(784,)), "model.in_shape"),
    (rnn.make, dict(num_outputs=2), "give one"),
    (rnn.make, dict(num_outputs=2, in_features=1, pad_id=0), "are for tokens"),
    (rnn.make, dict(num_outputs=2, in_features=1, output="flat"), "model.seq_len"),
    (rnn.make, dict(num_outputs=9, vocab_size=9, output="position", bidirectional=True), "model.bidirectional"),
  ],
)
def test_an_argument_that_makes_no_model_is_named_with_the_remedy(make, arguments, remedy):
  with pytest.raises(UserError, match=remedy):
    nnx.eval_shape(lambda: make(**arguments, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
  ("name", "inputs", "remedy"),
  [
    ("linear", (4, 9), "model.in_features: 192, but an example of shape"),
    ("mlp", (4, 8, 8, 1), "model.in_features: 192"),
    ("cnn", (4, 8, 8, 1), "model.in_shape"),
    ("resnet", (4, 8, 8, 1), "model.channels: 3, but the images have 1"),
    ("vit", (4, 12, 8, 3), "model.image_size"),
    ("mixer", (4, 8, 8, 1), "model.image_size"),
  ],
)
def test_inputs_of_another_shape_than_the_models_are_named_with_the_remedy(name, inputs, remedy):
  params, extras, graphdef = built(name)
  with pytest.raises(UserError, match=remedy):
    nnx.merge(graphdef, params, extras)(jnp.zeros(inputs))
