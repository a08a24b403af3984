"""GGUF: blocks opened by the formulas of the format, architectures of llama.cpp, damaged files."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import state as states
from bigjax import weights
from bigjax.data import tokenizers
from bigjax.errors import UserError
from bigjax.models import decoder
from bigjax.weights import gguf
from bigjax.weights.tensors import whole

NUMBERS = {name: number for number, (name, *_) in gguf.TYPES.items()}


def string(text):
  return struct.pack("<Q", len(text.encode())) + text.encode()


def said(value):
  if isinstance(value, str):
    return struct.pack("<I", 8) + string(value)
  if isinstance(value, list):
    kind = 8 if isinstance(value[0], str) else 5
    items = b"".join(string(v) if kind == 8 else struct.pack("<i", v) for v in value)
    return struct.pack("<IIQ", 9, kind, len(value)) + items
  return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def pack(value, kind):
  """Values as they lie in the file; how their blocks are rounded is a matter of taste."""
  value = np.asarray(value, np.float32)
  if kind in ("F32", "F16", "BF16"):
    return value.astype(gguf.TYPES[NUMBERS[kind]][3]).tobytes()
  blocks = value.reshape(-1, 32)
  half = lambda x: np.maximum(x, 1e-4).astype(np.float16)
  if kind == "Q8_0":
    scale = half(np.abs(blocks).max(axis=1, keepdims=True) / 127)
    q = np.round(blocks / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
    return b"".join(s.tobytes() + row.tobytes() for s, row in zip(scale, q, strict=True))
  if kind == "Q4_0":
    scale, low = half(np.abs(blocks).max(axis=1, keepdims=True) / 7), [b""] * len(blocks)
    q = np.round(blocks / scale.astype(np.float32)) + 8
  else:
    least = blocks.min(axis=1, keepdims=True).astype(np.float16)
    scale, low = half((blocks.max(axis=1, keepdims=True) - least) / 15), [x.tobytes() for x in least]
    q = np.round((blocks - least.astype(np.float32)) / scale.astype(np.float32))
  q = q.clip(0, 15).astype(np.uint8)
  packed = q[:, :16] | q[:, 16:] << 4
  return b"".join(s.tobytes() + least + row.tobytes() for s, least, row in zip(scale, low, packed, strict=True))


def write(path, keys, tensors):
  """`tensors` maps names to (value, type)."""
  head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
  head += b"".join(string(k) + said(v) for k, v in keys.items())
  data = b""
  for name, (value, kind) in tensors.items():
    head += string(name) + struct.pack("<I", value.ndim) + struct.pack(f"<{value.ndim}Q", *value.shape[::-1])
    head += struct.pack("<IQ", NUMBERS[kind], len(data))
    data += pack(value, kind)
    data += bytes(-len(data) % 32)
  path.write_bytes(head + bytes(-len(head) % 32) + data)
  return str(path)


@pytest.mark.parametrize(
  ("kind", "error"), [("F32", 0), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 5e-3), ("Q4_0", 0.08), ("Q4_1", 0.07)]
)
def test_blocks_are_opened_to_what_they_were_made_of(tmp_path, kind, error):
  value = np.random.default_rng(0).uniform(-1, 1, (5, 96)).astype(np.float32)
  _, tensors, _ = gguf.read_header(write(tmp_path / "a.gguf", {}, {"a": (value, kind)}))
  found = tensors["a"].read(whole((5, 96)))
  np.testing.assert_allclose(found.astype(np.float32), value, atol=error, rtol=0)
  for index in [(slice(1, 3), slice(0, 96)), (slice(0, 5), slice(30, 70)), (slice(4, 5), slice(64, 65))]:
    np.testing.assert_array_equal(tensors["a"].read(index), found[index])


def test_a_block_of_four_bits_by_hand(tmp_path):
  """d = 0.5, m = -1; byte i holds value i below and value 16 + i above."""
  block = np.float16(0.5).tobytes() + np.float16(-1).tobytes() + bytes(i | (15 - i) << 4 for i in range(16))
  path = write(tmp_path / "a.gguf", {}, {"a": (np.zeros((1, 32), np.float32), "Q4_1")})
  data = bytearray((tmp_path / "a.gguf").read_bytes())
  data[-32:] = block + bytes(12)
  (tmp_path / "a.gguf").write_bytes(data)
  _, tensors, _ = gguf.read_header(path)
  expected = [0.5 * i - 1 for i in range(16)] + [0.5 * (15 - i) - 1 for i in range(16)]
  np.testing.assert_array_equal(tensors["a"].read(whole((1, 32)))[0], expected)


SIZES = {"context_length": 64, "embedding_length": 32, "block_count": 3, "attention.head_count": 4}
SIZES |= {"feed_forward_length": 64, "attention.layer_norm_rms_epsilon": 1e-5}
KV = {"attention.head_count_kv": 2}
KEYS = {
  "llama": SIZES | KV | {"rope.freq_base": 5e5},
  "qwen2": SIZES | KV | {"rope.freq_base": 1e6},
  "qwen3": SIZES | KV | {"attention.key_length": 16},
  "gemma2": SIZES
  | KV
  | {"block_count": 4, "attention.sliding_window": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
  "gemma3": SIZES | KV | {"attention.sliding_window": 4, "rope.freq_base": 1e6},
  "phi3": SIZES | KV | {"rope.dimension_count": 4},
  "gpt2": SIZES | {"attention.layer_norm_epsilon": 1e-5},
}


def as_llama_cpp(name, o, params):
  """The tensors that llama.cpp's convert_hf_to_gguf.py writes, each rule of it as it stands there."""
  found = {"token_embd.weight": params["token_embed/embedding"], "output_norm.weight": params["norm/scale"]}
  if "position_embed/embedding" in params:
    found |= {"position_embd.weight": params["position_embed/embedding"], "output_norm.bias": params["norm/bias"]}
  if "head/embedding" in params:
    found["output.weight"] = params["head/embedding"]
  for i in range(o.depth):
    layer = {n.removeprefix(f"blocks/{i}/"): v for n, v in params.items() if n.startswith(f"blocks/{i}/")}

    def permute(weights, heads):  # LlamaModel.permute
      return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
      )

    for leaf in layer:
      layer[leaf] = layer[leaf].T if leaf.endswith("kernel") else layer[leaf]
    if name == "llama":
      layer["attn/query/kernel"] = permute(layer["attn/query/kernel"], o.heads)
      layer["attn/key/kernel"] = permute(layer["attn/key/kernel"], o.kv_heads)
    if name in ("phi3", "gpt2"):
      for kind in ("kernel", "bias"):
        parts = [layer.pop(f"attn/{w}/{kind}", None) for w in ("query", "key", "value")]
        if parts[0] is not None:
          layer[f"attn/qkv/{kind}"] = np.concatenate(parts)
    if name == "phi3":
      layer["mlp/up/kernel"] = np.concatenate([layer.pop("mlp/gate/kernel"), layer["mlp/up/kernel"]])
    words = {"attn/query": "attn_q", "attn/key": "attn_k", "attn/value": "attn_v", "attn/out": "attn_output"}
    words |= {"attn/qkv": "attn_qkv", "attn/query_norm": "attn_q_norm", "attn/key_norm": "attn_k_norm"}
    words |= {"norm1": "attn_norm", "norm2": "ffn_norm", "post1": "post_attention_norm", "post2": "post_ffw_norm"}
    words |= {"mlp/gate": "ffn_gate", "mlp/up": "ffn_up", "mlp/down": "ffn_down"}
    for leaf, value in layer.items():
      stem, _, kind = leaf.rpartition("/")
      found[f"blk.{i}.{words[stem]}.{'bias' if kind == 'bias' else 'weight'}"] = value
  if name.startswith("gemma"):
    found = {n: v + 1 if n.endswith("norm.weight") else v for n, v in found.items()}
  return found


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", KEYS)
def test_the_model_is_the_one_that_was_converted(tmp_path, name, scan):
  keys = {"general.architecture": name} | {f"{name}.{k}": v for k, v in KEYS[name].items()}
  tied = name in ("gpt2", "gemma2", "gemma3")
  shell = {"token_embd.weight": np.zeros((40, 32), np.float32), "output_norm.weight": np.zeros(32, np.float32)}
  shell |= {} if tied else {"output.weight": shell["token_embd.weight"]}
  path = write(tmp_path / "a.gguf", keys, {n: (v, "F32") for n, v in shell.items()})
  o = weights.open_weights(path).options
  arguments = weights.open_weights(path).arguments
  model = states.Model(lambda rngs: decoder.make(**arguments, rngs=rngs))
  rng = np.random.default_rng(0)
  leaves = {n: rng.normal(0, 0.3, x.shape).astype(np.float32) for n, x in flat(model.abstract[0]).items()}
  tensors = {n: (v, "F32" if v.ndim == 1 else "F16") for n, v in as_llama_cpp(name, o, leaves).items()}
  found = weights.open_weights(write(tmp_path / "a.gguf", keys, tensors))
  stacked = states.Model(lambda rngs: decoder.make(**arguments, scan=scan, rngs=rngs))
  params, _, _ = weights.load(found, found.options, *stacked.abstract)
  for leaf, value in flat(params).items():
    by_layer = leaf.replace("blocks/", "blocks/{}/")
    expected = (
      np.stack([leaves[by_layer.format(i)] for i in range(o.depth)]) if scan and "blocks" in leaf else leaves[leaf]
    )
    # Half precision, or a float32 to which 1 was added and taken off again.
    np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-3, atol=1e-5, err_msg=leaf)
  logits = stacked.bind(params, {})(jnp.asarray([[1, 2, 3, 4, 5, 6]]))
  assert np.isfinite(np.asarray(logits)).all()


def flat(tree):
  from bigjax import paths

  return dict(zip(paths.names(tree), jax.tree.leaves(tree), strict=True))


def test_llama_3_scaling_is_told_by_its_factors(tmp_path):
  from bigjax.models.rope import Rope

  plain = Rope(dim=64, theta=5e5)
  scaled = Rope(dim=64, theta=5e5, scaling="llama3", factor=8.0, trained=8192)
  keys = {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in KEYS["llama"].items()}
  keys |= {"llama.embedding_length": 256, "llama.rope.freq_base": 5e5}
  shell = {"token_embd.weight": np.zeros((40, 256)), "output_norm.weight": np.zeros(256)}
  shell["rope_freqs.weight"] = plain.frequencies() / scaled.frequencies()
  found = weights.open_weights(write(tmp_path / "a.gguf", keys, {n: (v, "F32") for n, v in shell.items()}))
  assert (found.options.rope_scaling, found.options.rope_factor, found.options.rope_trained) == ("llama3", 8.0, 8192)


def test_the_tokenizer_in_a_file_is_that_of_the_model():
  alphabet = sorted(tokenizers._spelling()(bytes([i])) for i in range(256))
  said = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [*alphabet, "th", "the", "<|begin|>", "<|end|>"],
    "tokenizer.ggml.token_type": [1] * 258 + [3] * 2,
    "tokenizer.ggml.merges": ["t h", "th e"],
    "tokenizer.ggml.bos_token_id": 258,
    "tokenizer.ggml.eos_token_id": 259,
    "tokenizer.chat_template": "{{ messages }}",
  }
  for begins in (False, True):
    files = gguf.tokenizer_files(said | {"tokenizer.ggml.add_bos_token": begins})
    found = tokenizers.hugging_face(*files.values())
    assert (found.roles["bos"], found.roles["eos"], found.begin) == (258, 259, 258 if begins else None)
    assert found.encode(["the 12<|end|>"], special=True)[0].tolist()[0] == 257
    assert found.decode(found.encode(["the 12<|end|>"], special=True)[0]) == "the 12<|end|>"
    assert files["tokenizer_config.json"]["chat_template"] == "{{ messages }}"
  assert gguf.tokenizer_files(said | {"tokenizer.ggml.model": "llama"}) == {}


def test_damaged_and_unknown_files_are_refused(tmp_path):
  keys = {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in KEYS["llama"].items()}
  tensors = {"token_embd.weight": (np.zeros((40, 32)), "Q8_0"), "output_norm.weight": (np.zeros(32), "F32")}
  path = write(tmp_path / "a.gguf", keys, tensors)
  data = (tmp_path / "a.gguf").read_bytes()
  for cut in (2, 20, 300, len(data) - 1):
    (tmp_path / "a.gguf").write_bytes(data[:cut])
    with pytest.raises(UserError, match="cut short or no GGUF file"):
      weights.open_weights(path)
  with pytest.raises(UserError, match="no such file"):
    weights.open_weights(str(tmp_path / "none.gguf"))
  write(tmp_path / "a.gguf", keys | {"general.architecture": "lama"}, tensors)
  with pytest.raises(UserError, match="architecture 'lama' is not known. Did you mean 'llama'"):
    weights.open_weights(path)
  write(tmp_path / "a.gguf", keys | {"tokenizer.ggml.tokens": ["a"] * 41}, tensors)
  with pytest.raises(UserError, match="tokenizer has 41 tokens, the weights have 40"):
    weights.open_weights(path)
  (tmp_path / "a.gguf").write_bytes(data.replace(struct.pack("<QQI", 32, 40, 8), struct.pack("<QQI", 32, 40, 14)))
  with pytest.raises(UserError, match=r"of type Q6_K; F32, F16, Q4_0, Q4_1, Q8_0, BF16 are read"):
    weights.open_weights(path)
