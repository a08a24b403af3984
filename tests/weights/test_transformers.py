"""Every family against `transformers` on PyTorch: the same logits, the same files. Needs the extra `hf` and PyTorch."""

import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bigjax
from bigjax import main, weights
from bigjax import state as states
from bigjax.models import bert, decoder

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed: scripts/bootstrap.sh hf")
torch = pytest.importorskip("torch", reason="PyTorch is not installed; a build for CPUs will do")

SIZES = dict(vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4)
SMALL = SIZES | dict(num_key_value_heads=2, max_position_embeddings=64)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=12)
LLAMA3 = dict(
  rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
GEMMA = dict(head_dim=8, query_pre_attn_scalar=9, sliding_window=5, num_hidden_layers=4)
DEEPSEEK = SIZES | dict(
  num_key_value_heads=4, max_position_embeddings=64, q_lora_rank=6, kv_lora_rank=8, qk_nope_head_dim=8,
  qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=8, n_group=4, topk_group=2, first_k_dense_replace=1,
  rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0), num_nextn_predict_layers=0, **EXPERTS,
)  # fmt: skip
CASES = {
  "gpt2": ("GPT2", dict(vocab_size=29, n_embd=16, n_layer=3, n_head=4, n_positions=64)),
  "llama2": ("Llama", SMALL),
  "llama3": ("Llama", SMALL | dict(rope_scaling=LLAMA3, rope_theta=5e5, tie_word_embeddings=True, head_dim=8)),
  "llama yarn": ("Llama", SMALL | dict(rope_scaling=YARN)),
  "llama linear": ("Llama", SMALL | dict(rope_scaling=dict(rope_type="linear", factor=2.0))),
  "llama biases": ("Llama", SMALL | dict(attention_bias=True, mlp_bias=True)),
  "mistral": ("Mistral", SMALL | dict(sliding_window=5)),
  "mistral v0.3": ("Mistral", SMALL | dict(sliding_window=None, rope_theta=1e6)),
  "qwen2.5": ("Qwen2", SMALL | dict(rope_theta=1e6)),
  "qwen3": ("Qwen3", SMALL | dict(head_dim=8, tie_word_embeddings=True)),
  "gemma2": ("Gemma2", SMALL | GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
  "gemma3": ("Gemma3", SMALL | GEMMA | dict(num_hidden_layers=7, rope_scaling=dict(rope_type="linear", factor=8.0))),
  "olmo2": ("Olmo2", SMALL),
  "phi3": ("Phi3", SMALL | dict(sliding_window=5, pad_token_id=0, original_max_position_embeddings=64)),
  "phi3 partial": ("Phi3", SMALL | dict(partial_rotary_factor=0.5, pad_token_id=0)),
  "mixtral": ("Mixtral", SMALL | dict(num_local_experts=4, num_experts_per_tok=2)),
  "qwen3-moe": ("Qwen3Moe", SMALL | EXPERTS | dict(num_experts=4, norm_topk_prob=True, head_dim=8)),
  "qwen3-moe some": ("Qwen3Moe", SMALL | EXPERTS | dict(num_experts=4, decoder_sparse_step=2, num_hidden_layers=4)),
  "deepseek-v3": ("DeepseekV3", DEEPSEEK),
  "deepseek-v3 plain": ("DeepseekV3", DEEPSEEK | dict(q_lora_rank=None, rope_scaling=None)),
}
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 24))


def far(model):
  """Weights far from where they start: a norm or a bias left out would show."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for value in [*model.parameters(), *biases]:
      value.add_(torch.randn(value.shape, generator=generator) * 0.3)
  return model.eval()


@functools.cache
def published(case, root, dtype="float32"):
  """A random model as `transformers` writes it, and its logits."""
  name, arguments = CASES[case]
  text = "Text" if name == "Gemma3" else ""
  config = getattr(transformers, f"{name}{text}Config")(**arguments, attn_implementation="eager")
  head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
  model = far(getattr(transformers, f"{name}{head}")(config)).to(getattr(torch, dtype))
  path = os.path.join(root, f"{case}-{dtype}".replace(" ", "-"))
  model.save_pretrained(path)
  with torch.no_grad():
    return path, model(torch.as_tensor(TOKENS)).logits.numpy() if dtype == "float32" else None


def opened(path, **changes):
  """(what is in the files, the model, its parameters and the rest)."""
  found = weights.open_weights(str(path))
  make = {"decoder": decoder.make, "bert": bert.make}[found.family.model]
  model = states.Model(lambda rngs: make(**found.arguments | changes, rngs=rngs))
  options = nnx.eval_shape(lambda: model.build(rngs=nnx.Rngs(0))).options
  return found, model, options, *weights.load(found, options, *model.abstract)[:2]


def logits(model, params, extras, tokens=TOKENS):
  return np.asarray(jax.jit(lambda p, e, t: model.bind(p, e)(t))(params, extras, jnp.asarray(tokens)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return str(tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, root):
  path, expected = published(case, root)
  for scan in (False, True):
    _, model, _, params, extras = opened(path, scan=scan)
    found = logits(model, params, extras)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


HALVES = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("bfloat16", "float16")]


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_bit_for_bit_what_was_read_and_transformers_loads_it(case, dtype, root, tmp_path):
  path, expected = published(case, root, dtype)
  found, _, options, params, extras = opened(path, scan=True)
  out = str(tmp_path / "out")
  weights.save(out, options, params, extras, dtype=dtype, like=path)
  again = weights.open_weights(out)
  assert again.arguments == found.arguments
  assert set(again.tensors) == {n for n in found.tensors if not n.endswith("lm_head.weight") or n in again.tensors}
  for name, tensor in again.tensors.items():
    there, whole = found.tensors[name], tuple(slice(0, n) for n in tensor.shape)
    assert (there.stored, there.shape) == (tensor.stored, tensor.shape)
    assert there.read(whole).tobytes() == tensor.read(whole).tobytes(), name
  if dtype == "float32":
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
      got = model.eval()(torch.as_tensor(TOKENS)).logits.numpy()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_a_tuned_run_speaks_as_tuned_in_transformers(root, tmp_path):
  path, before = published("qwen3", root)
  source = dict(name="synthetic", kind="tokens", num_examples=16, vocab_size=29, length=24)
  config = dict(
    total_steps=3,
    batch_size=8,
    model=weights.open_weights(path).model,
    task=dict(name="language_modeling"),
    optimizer=dict(name="adamw"),
    schedule=dict(name="constant", peak=3e-2),
    data=dict(source=source),
    init_from=dict(weights=path),
    lora=dict(rules=[(".*kernel", 2)]),
    writers=("jsonl",),
  )
  run = bigjax.run(config, str(tmp_path / "run"))
  whole = np.tile(np.pad(TOKENS, ((0, 0), (0, 1))), (4, 1))  # So many as there are devices.
  expected = np.asarray(run.predict({"tokens": whole})["logits"])[: len(TOKENS)]
  assert np.abs(expected - before).max() > 0.1
  assert main.main(["weights", "export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
  model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
  with torch.no_grad():
    found = model.eval()(torch.as_tensor(TOKENS)).logits.numpy()
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["ForMaskedLM", "Model"])
def test_bert_is_that_of_transformers(head, root, tmp_path):
  config = transformers.BertConfig(**SIZES, max_position_embeddings=32)
  there = far(getattr(transformers, f"Bert{head}")(config))
  path = f"{root}/bert-{head}"
  there.save_pretrained(path)
  mask = np.ones_like(TOKENS)
  mask[1, 17:] = 0
  with torch.no_grad():
    expected = there(torch.as_tensor(TOKENS), attention_mask=torch.as_tensor(mask))[0].numpy()
  for scan in (False, True):
    found, model, options, params, extras = opened(path, scan=scan)
    module = model.bind(params, extras)
    got, _ = module.hidden(jnp.asarray(TOKENS), segments=jnp.asarray(mask))
    got = module.unembed(got) if head == "ForMaskedLM" else got
    np.testing.assert_allclose(np.asarray(got)[mask == 1], expected[mask == 1], atol=1e-4, rtol=1e-4)
  weights.save(str(tmp_path / "out"), options, params, extras, like=path)
  again = weights.open_weights(str(tmp_path / "out"))
  for name, tensor in again.tensors.items():
    whole = tuple(slice(0, n) for n in tensor.shape)
    assert found.tensors[name].read(whole).tobytes() == tensor.read(whole).tobytes()
  _, info = getattr(transformers, f"Bert{head}").from_pretrained(str(tmp_path / "out"), output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]


def test_configs_as_they_were_published_mean_the_published_sizes():
  for variant, config in PUBLISHED.items():
    from bigjax.models.decoder_sizes import VARIANTS
    from bigjax.weights import configs

    family, said = configs.family_of(config, "config.json")
    found = configs.OPTIONS["decoder"](**configs.options(family, said, "config.json"))
    assert configs.differences(found, configs.OPTIONS["decoder"](**VARIANTS[variant])) == [], variant


# Of https://huggingface.co/, the keys that matter: older files say less than newer ones.
PUBLISHED = {
  "llama2-7b": json.loads(
    '{"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, '
    '"max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, '
    '"num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, '
    '"tie_word_embeddings": false, "vocab_size": 32000}'
  ),
  "gemma3-4b": json.loads(
    '{"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": {"hidden_size": 2560,'
    '"intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0,'
    '"rope_type": "linear"}, "sliding_window": 1024}, "vision_config": {"hidden_size": 1152}}'
  ),
}
