"""Products in 8 bits: that they are in the program, what they change, and what they leave alone."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import config as configs
from bigjax import experiment, paths, train
from bigjax.errors import UserError

# As many examples as a kernel has rows: which factor is the weight must not be guessed from shapes.
VIT = dict(name="vit", num_classes=3, image_size=4, channels=1, patch_size=2, width=16, depth=2, heads=2, head="gap")
TINY = dict(
  total_steps=8,
  batch_size=16,
  data=dict(source=dict(name="synthetic", kind="images", num_examples=40, shape=(4, 4, 1), num_classes=3)),
  model=VIT,
  task=dict(name="classification"),
  optimizer=dict(name="adamw", weight_decay=0.0),
  schedule=dict(name="constant", peak=1e-2),
)
MLP = dict(name="mlp", in_features=16, widths=(16, 16), num_outputs=3)
KEY = jax.eval_shape(lambda: jax.random.key(0))


def built(**changes):
  return experiment.build(configs.resolve(copy.deepcopy(TINY) | changes, experiment.TrainConfig))


def losses(run, steps=6):
  with jax.set_mesh(run.mesh), train.train_batches(run, 0) as batches:
    step, state, found = train.compile_step(run), run.init(jax.random.key(0)), []
    key = jax.device_put(jax.random.key(1), jax.NamedSharding(run.mesh, jax.P()))
    for _ in range(steps):
      state, measured = step(state, next(batches), key)
      found.append(measured["loss"])
  return np.asarray(jax.device_get(found))


def arguments(run):
  return run.abstract, dict(run.batch), KEY


def products(run, operation="dot_general"):
  """How many products the step has by the types of their factors, as it is handed to the compiler."""
  text = train.make_step(run).lower(*arguments(run)).as_text()
  found = {}
  for line in text.splitlines():
    if f"stablehlo.{operation}" in line:
      types = re.findall(r"tensor<[\dx]*?(i8|f8\w+|f32|bf16)>", line.rsplit(" : ", 1)[1].split("->")[0])
      found["x".join(types)] = found.get("x".join(types), 0) + 1
  return found


def test_a_word_makes_the_products_of_every_dense_layer_8_bits_wide_but_of_the_first_and_the_last():
  plain = products(built())
  assert set(plain) == {"f32xf32"}
  # 2 blocks of 4 layers, each with a product forward and two backward; the last by a kernel is of the gradient.
  assert products(built(quantize="int8")) == {"f32xf32": plain["f32xf32"] - 24, "i8xi8": 24}
  forward = products(built(quantize="int8_forward"))
  assert forward == {"f32xf32": plain["f32xf32"] - 8, "i8xi8": 8}
  float8 = products(built(quantize="fp8", precision="mixed"))
  assert float8["f8E4M3FNxf8E4M3FN"] == 8
  assert float8["f8E5M2xf8E4M3FN"] == 16


def test_a_scanned_stack_and_a_recomputed_one_have_them_too():
  assert products(built(model=VIT | dict(scan=True), quantize="int8"))["i8xi8"] == 12
  assert products(built(model=VIT | dict(remat="full"), quantize="int8"))["i8xi8"] > 24


def test_convolutions_take_part():
  cnn = dict(name="cnn", num_classes=3, in_shape=(8, 8, 1), channels=(8, 8))
  source = dict(name="synthetic", kind="images", num_examples=40, shape=(8, 8, 1), num_classes=3)
  run = built(model=cnn, data=dict(source=source), quantize=[("convs/1", "int8")])
  assert products(run, "convolution")["i8xi8"] == 3


@pytest.mark.parametrize("capacity_factor", [None, 2.0], ids=["dropless", "capacity"])
def test_experts_take_part(capacity_factor):
  sizes = dict(vocab_size=16, context=8, width=16, depth=1, heads=2, mlp_dim=32, experts=4, top_k=2)
  decoder = dict(name="decoder", **sizes, capacity_factor=capacity_factor)
  source = dict(name="synthetic", kind="tokens", num_examples=40, vocab_size=16, length=8)
  changes = dict(model=decoder, data=dict(source=source), task=dict(name="language_modeling"))
  plain, experts = built(**changes), built(**changes, quantize=[(".*/mlp", "int8"), (".*", None)])
  assert "xi8>" in train.make_step(experts).lower(*arguments(experts)).as_text()
  assert "xi8>" not in train.make_step(plain).lower(*arguments(plain)).as_text()
  expected, found = losses(plain), losses(experts)
  assert (found != expected).any()
  np.testing.assert_allclose(found, expected, atol=0.02)


def test_parameters_keep_names_types_and_values():
  plain, quantized = built(), built(quantize="int8")
  assert paths.names(plain.abstract) == paths.names(quantized.abstract)
  types = lambda run: [(x.shape, x.dtype) for x in jax.tree.leaves(run.abstract)]
  assert types(plain) == types(quantized)
  a, b = (jax.device_get(run.init(jax.random.key(0)).params) for run in (plain, quantized))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_product_is_one_of_integers_times_the_scales_of_row_and_column():
  run = built(model=MLP, quantize=[("first/dense", "int8")])
  params, extras = jax.device_get(run.model.init(jax.random.key(0)))
  x, kernel = np.asarray(jax.random.normal(jax.random.key(1), (16, 16))), params["first"]["dense"]["kernel"]
  product = np.asarray(run.model.bind(params, extras).first.dense(jnp.asarray(x))) - params["first"]["dense"]["bias"]
  row, column = (np.abs(v).max(axis, keepdims=True) / 127.5 for v, axis in ((x, 1), (kernel, 0)))
  integers = product / row / column
  np.testing.assert_allclose(integers, np.round(integers), atol=0.02)
  # Each factor is off by a half at most, and by one where it is the largest of its row or column.
  bound = 0.5 * (np.abs(x / row).sum(1, keepdims=True) + np.abs(kernel / column).sum(0, keepdims=True)) + 16 / 4 + 128
  assert (np.abs(integers - x @ kernel / row / column) < bound).all()
  assert np.abs(integers - x @ kernel / row / column).max() > 10


def test_rules_choose_by_first_match_and_none_spares():
  rules = [("blocks/0/.*", None), (".*/(up|down)", "fp8"), ("blocks/.*", "int8_forward")]
  found = products(built(quantize=rules))
  assert found["f8E4M3FNxf8E4M3FN"] == 2
  assert found["i8xi8"] == 2


def test_a_rule_that_names_no_layer_is_an_error():
  with pytest.raises(UserError, match=r"config\.quantize\[1\]: 'blocks/\.\*/ffn' matches no leaf"):
    built(quantize=[("blocks/.*/up", "int8"), ("blocks/.*/ffn", "int8")])
  with pytest.raises(UserError, match=r"config\.quantize: 'int8' leaves every layer of the model as it is"):
    built(model=dict(name="linear", in_features=16, num_outputs=3), quantize="int8")
  with pytest.raises(UserError, match=r"config\.quantize"):
    built(quantize="int4")


@pytest.mark.parametrize("word", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_training_stays_close_to_what_it_is_without(word):
  expected = losses(built(), 8)
  found = losses(built(quantize=word), 8)
  np.testing.assert_allclose(found, expected, atol=0.03)
  assert (found != expected).any()
  assert found[-1] < found[0] - 0.05


@pytest.mark.parametrize(
  ("mesh", "rule"),
  [
    pytest.param([("data", 8)], "fsdp", marks=pytest.mark.slow),
    pytest.param([("data", 4), ("tensor", 2)], "fsdp+tensor", marks=pytest.mark.slow),
    pytest.param([("tensor", 8)], "tensor", marks=pytest.mark.slow),
  ],
)
def test_scanned_and_recomputed_on_any_mesh_it_is_the_same(mesh, rule):
  model = VIT | dict(heads=8, width=32)
  expected = losses(built(model=model, quantize="int8"))
  found = losses(built(model=model | dict(scan=True, remat="full"), quantize="int8", mesh=mesh, sharding=rule))
  # A value at the edge between two integers may round either way, which float32's own sums then decide.
  np.testing.assert_allclose(found, expected, rtol=2e-3)
  np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
