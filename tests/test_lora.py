"""Adapters: what they add, what they leave alone, what is kept of them, and that merging can be taken back."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bigjax
from bigjax import config as configs
from bigjax import experiment, lora, paths, train
from bigjax.checkpoint import Checkpoints
from bigjax.errors import UserError

DECODER = dict(name="decoder", vocab_size=32, context=8, width=16, depth=2, heads=2, mlp_dim=32)
RULES = [(".*attn/(query|value)/kernel", 4)]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  file = tmp_path_factory.mktemp("text") / "text.txt"
  file.write_text("abcdefghijklmnopqrstuvwxyz012345" * 20)
  return str(file)


def config(text, **changes):
  source = dict(name="text", path=text, tokenizer="char", block=8, stride=3)
  return copy.deepcopy(
    dict(
      total_steps=3,
      batch_size=8,
      data=dict(source=source),
      model=DECODER,
      task=dict(name="language_modeling"),
      optimizer=dict(name="adamw", weight_decay=0.0),
      schedule=dict(name="constant", peak=1e-2),
      writers=("jsonl",),
    )
    | changes
  )


def built(text, **changes):
  return experiment.build(configs.resolve(config(text, **changes), experiment.TrainConfig))


def flat(tree):
  return dict(zip(paths.names(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))


@pytest.fixture(scope="module")
def base(text, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("base"))
  return workdir, bigjax.run(config(text), workdir)


@pytest.fixture(scope="module")
def tuned(base, text, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("tuned"))
  return workdir, bigjax.run(config(text, lora=dict(rules=RULES, alpha=8), init_from=dict(workdir=base[0])), workdir)


def some(run, seed=1):
  """A state whose B is not zero."""
  state = run.init(KEY)
  noise = lambda n, x: x + 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), len(n)), x.shape)
  return paths.map_with_name(noise, state.params), state.extras


def test_fresh_adapters_change_nothing(text):
  plain, run = built(text), built(text, lora=dict(rules=RULES))
  tokens = jnp.arange(8)[None] % 32
  expected = plain.model.bind(*plain.model.init(KEY))(tokens)
  np.testing.assert_array_equal(run.model.bind(*run.model.init(KEY))(tokens), expected)


@pytest.mark.parametrize(
  "model",
  [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param(dict(scan=True), marks=pytest.mark.slow),
    pytest.param(dict(scan=True, remat="full"), marks=pytest.mark.slow),
    dict(experts=2, expert_dim=16),
  ],
)
def test_what_an_adapter_adds_is_a_b_scaled_in_any_matrix(text, model):
  rules = [*RULES, ("token_embed/.*", 2)]
  rules += [(".*experts/up/kernel", 2)] if "experts" in model else [(".*mlp/down/kernel", 3)]
  run, plain = built(text, model=DECODER | model, lora=dict(rules=rules, alpha=6)), built(text, model=DECODER | model)
  params, extras = some(run)
  merged = run.model.merged(params, extras)[0]
  changed = [n for n, w in flat(merged).items() if (w != flat(extras["base"])[n]).any()]
  assert sorted(changed) == sorted(run.model.adapters.ranks)
  tokens = (jnp.arange(16).reshape(2, 8) * 7) % 32
  np.testing.assert_allclose(
    run.model.bind(params, extras)(tokens),
    plain.model.bind(jax.tree.map(jnp.asarray, merged), extras["kept"])(tokens),
    atol=2e-6,
  )


def test_the_base_has_no_moments_and_does_not_move(base, tuned):
  (_, before), (_, after) = base, tuned
  for name, w in flat(before.state.params).items():
    np.testing.assert_array_equal(flat(after.state.extras["base"])[name], w)
  assert all(name.endswith(("/a", "/b")) for name in paths.names(after.state.params))
  assert all(name.endswith(("/a", "/b", "count")) for name in paths.names(after.state.opt_state))
  assert all(flat(after.state.params)[f"{name}/b"].any() for name in after.run.model.adapters.ranks)


def test_a_checkpoint_holds_adapters_only(tuned):
  with Checkpoints(tuned[0], read_only=True) as checkpoints:
    names = list(checkpoints.read())
  assert names
  assert all(name == "step" or name.endswith(("/a", "/b", "/count")) for name in names)


def test_a_tuned_run_goes_on_to_the_bit_and_with_its_layers_stacked(base, text, tmp_path):
  changes = dict(lora=dict(rules=RULES, dropout=0.1), init_from=dict(workdir=base[0]))
  through = bigjax.run(
    config(text, total_steps=4, schedule=dict(name="constant", peak=1e-2), **changes), str(tmp_path / "a")
  )
  run = experiment.build(through.config)
  with jax.set_mesh(run.mesh), Checkpoints(str(tmp_path / "b")) as checkpoints:
    step, (state, _) = train.compile_step(run), train.start(run, checkpoints)
    key = jax.device_put(jax.random.fold_in(jax.random.key(0), 1), jax.NamedSharding(run.mesh, jax.P()))
    with train.train_batches(run, 0) as batches:
      state, _ = step(state, next(batches), key)
      state, _ = step(state, next(batches), key)
    checkpoints.save(2, *train.tuned.saved(run, state, {}))
    checkpoints.wait()
    state, _ = train.start(run, checkpoints)
    with train.train_batches(run, 2) as batches:
      state, _ = step(state, next(batches), key)
      state, _ = step(state, next(batches), key)
  for name, value in flat(through.state.params).items():
    np.testing.assert_array_equal(flat(state.params)[name], value)


def test_another_base_is_refused(base, text, tmp_path):
  import shutil

  there = tmp_path / "base"
  shutil.copytree(base[0], there)
  tuned = config(text, lora=dict(rules=RULES), init_from=dict(workdir=str(there)))
  bigjax.run(tuned, str(tmp_path / "tuned"))
  shutil.rmtree(there)
  bigjax.run(config(text, seed=5), str(there))
  with pytest.raises(UserError, match="is not the model that the adapters in .* were trained on"):
    bigjax.load(str(tmp_path / "tuned"))


def test_the_digest_is_of_values_and_not_of_how_they_lie(text):
  one = built(text, mesh=[("data", 8)], sharding="fsdp").init(KEY).params
  other = (
    built(text, mesh=[("data", 4), ("tensor", 2)], sharding="tensor", model=DECODER | dict(scan=True)).init(KEY).params
  )
  assert lora.digest(one) == lora.digest(other)
  changed = jax.tree.map(jnp.copy, one)
  kernel = changed["blocks"]["1"]["mlp"]["up"]["kernel"]
  changed["blocks"]["1"]["mlp"]["up"]["kernel"] = kernel.at[3, 5].set(jnp.nextafter(kernel[3, 5], 1.0))
  assert lora.digest(changed) != lora.digest(one)
  changed["blocks"]["1"]["mlp"]["up"]["kernel"] = kernel[::-1]
  assert lora.digest(changed) != lora.digest(one)


@pytest.mark.parametrize(
  "changes",
  [
    dict(mesh=[("replica", 2), ("data", 2), ("tensor", 2)], sharding="fsdp+tensor"),
    dict(mesh=[("data", 4), ("pipe", 2)], sharding="pipe"),
    dict(accumulate=2, mesh=[("data", 4), ("seq", 2)]),
  ],
  ids=["fsdp+tensor", "pipe", "accumulate+seq"],
)
def test_any_mesh_takes_the_same_step(text, changes):
  model = DECODER | dict(scan=True)
  first, second = (
    built(text, model=model, lora=dict(rules=[*RULES, (".*mlp/(up|down)/kernel", 4)]), **c)
    for c in (dict(mesh=[("replica", 8), ("data", 1)], sharding="replicated"), changes)
  )
  found = []
  for run in (first, second):
    with jax.set_mesh(run.mesh), train.train_batches(run, 0) as batches:
      key = jax.device_put(KEY, jax.NamedSharding(run.mesh, jax.P()))
      state, step = run.init(KEY), train.compile_step(run)
      for _ in range(2):
        state, measured = step(state, next(batches), key)
      found.append((float(measured["loss"]), float(measured["grad_norm"])))
  np.testing.assert_allclose(found[1], found[0], rtol=2e-5)


def test_columns_of_a_split_matrix_are_columns_of_b_and_rows_are_rows_of_a(text):
  rules = [*RULES, (".*mlp/(up|down)/kernel", 4)]
  run = built(
    text, model=DECODER | dict(scan=True), lora=dict(rules=rules), mesh=[("data", 4), ("tensor", 2)], sharding="tensor"
  )
  specs = {n: tuple(s.spec) for n, s in zip(paths.names(run.shardings), jax.tree.leaves(run.shardings), strict=True)}
  padded = lambda name: (*specs[name], None, None, None)[:3]
  assert padded("params/blocks/mlp/up/kernel/b") == (None, None, "tensor")
  assert padded("params/blocks/mlp/up/kernel/a") == (None, None, None)
  assert padded("params/blocks/mlp/down/kernel/a") == (None, "tensor", None)
  assert padded("params/blocks/mlp/down/kernel/b") == (None, None, None)
  assert padded("extras/base/blocks/mlp/up/kernel") == (None, None, "tensor")


def test_mixed_precision_a_narrow_base_and_8_bits_train(text):
  run = built(text, lora=dict(rules=RULES, base="bfloat16"), precision="mixed", quantize="int8_forward")
  assert {x.dtype for x in jax.tree.leaves(run.abstract.extras["base"])} == {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves(run.abstract.params)} == {jnp.dtype(jnp.float32)}
  key = jax.eval_shape(lambda: jax.random.key(0))
  lines = train.make_step(run).lower(run.abstract, dict(run.batch), key).as_text().splitlines()
  # 7 dense layers a block; what adapters multiply stays as it is.
  assert sum("stablehlo.dot_general" in line and "xi8>" in line for line in lines) == 14


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_merging_is_taken_back_to_the_bit(dtype):
  rng = np.random.default_rng(0)
  w = rng.normal(size=(3, 64, 48)).astype(dtype)
  w.reshape(-1)[:5] = [0.0, -0.0, 1e-30, -1e-38, 3e4]
  pair = {"a": rng.normal(size=(3, 64, 4)).astype(np.float32), "b": rng.normal(size=(3, 4, 48)).astype(np.float32)}
  merged, apart = lora.merge(w, pair, 0.5)
  near = dict(rtol=1e-5, atol=1e-5) if dtype == np.float32 else dict(rtol=1e-2, atol=5e-2)
  expected = w.astype(np.float32) + 0.5 * pair["a"] @ pair["b"]
  np.testing.assert_allclose(merged.astype(np.float32), expected, **near)
  back = lora.unmerge(merged, pair, 0.5, apart)
  assert back.dtype == w.dtype
  assert back.tobytes() == w.tobytes()


def test_mistakes_are_told(text):
  for rules, message in [
    ([("nothing/here", 4)], r"config.lora.rules\[0\]: 'nothing/here' matches no leaf"),
    ([(".*norm1/scale", 4)], "which is no matrix"),
    ([(".*query/kernel", 99)], "has at most 16"),
    ([(".*query/kernel", 0)], "give no matrix an adapter"),
  ]:
    with pytest.raises(UserError, match=message):
      built(text, lora=dict(rules=rules))
  with pytest.raises(UserError, match=r"config.lora.dropout"):
    built(text, lora=dict(rules=RULES, dropout=1.0))


def test_adapters_drop_in_training_alone(text):
  run = built(text, lora=dict(rules=RULES, dropout=0.5))
  params, extras = some(run)
  tokens = jnp.arange(8)[None] % 32
  of = lambda key: np.asarray(run.model.bind(params, extras, key)(tokens))
  assert (of(None) == of(None)).all()
  assert (of(jax.random.key(1)) == of(jax.random.key(1))).all()
  assert (of(jax.random.key(1)) != of(jax.random.key(2))).any()
