"""GGUF, the files of llama.cpp: everything of a model in one, its matrices often in blocks of 4 or 8 bits.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A block is 32 neighbours of a row that share a scale (and a
least value); it is opened as it is read, in float32. llama.cpp's converter changes some tensors: queries and keys of
the architecture "llama" lie for pairs of neighbours, Gemma's norms have their 1 added, GPT-2's kernels are [out, in].
"""

import dataclasses
import itertools
import math
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from bigjax.errors import UserError, shown, suggest, understood
from bigjax.models.decoder_block import Options
from bigjax.models.rope import Rope
from bigjax.weights.families import GEMMA2, GEMMA3, GPT2, LLAMA, PHI3, QWEN2, QWEN3, Family
from bigjax.weights.said import typed
from bigjax.weights.tensors import Index, Mapped, Tensor, whole

BLOCK = 32


def _q4_0(blocks):
  scale, packed = _half(blocks[:, :2]), blocks[:, 2:]
  return scale * (_nibbles(packed).astype(np.float32) - 8)


def _q4_1(blocks):
  scale, least, packed = _half(blocks[:, :2]), _half(blocks[:, 2:4]), blocks[:, 4:]
  return scale * _nibbles(packed).astype(np.float32) + least


def _q8_0(blocks):
  return _half(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _half(two):
  return np.ascontiguousarray(two).view(np.float16).astype(np.float32)


def _nibbles(packed):
  """The lower halves of 16 bytes are the first 16 values, the upper halves the others."""
  return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


# By ggml's number: name, values and bytes of a block, and how it is opened or which type it is.
TYPES = {
  0: ("F32", 1, 4, np.dtype(np.float32)),
  1: ("F16", 1, 2, np.dtype(np.float16)),
  2: ("Q4_0", BLOCK, 18, _q4_0),
  3: ("Q4_1", BLOCK, 20, _q4_1),
  8: ("Q8_0", BLOCK, 34, _q8_0),
  30: ("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
}
OTHERS = {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS"}

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class _Reader:
  """What stands before the tensors, value by value."""

  def __init__(self, data):
    self.data, self.at = data, 0

  def take(self, count):
    if self.at + count > len(self.data):
      raise IndexError
    self.at += count
    return self.data[self.at - count : self.at]

  def number(self, kind):
    value = struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)).tobytes())[0]
    # As a person would have written it: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(value))) if kind == "f" else value

  def string(self):
    return self.take(self.number("Q")).tobytes().decode("utf-8", errors="replace")

  def value(self, kind):
    if kind == 8:
      return self.string()
    if kind != 9:
      return self.number(_NUMBERS[kind])
    inner, count = self.number("I"), self.number("Q")
    if inner not in (8, 9):
      size = struct.calcsize("<" + _NUMBERS[inner])
      return np.frombuffer(self.take(size * count).tobytes(), "<" + _NUMBERS[inner]).tolist()
    return [self.value(inner) for _ in range(count)]


def read_header(path: str) -> tuple[dict[str, Any], dict[str, Tensor], Mapped]:
  """Returns (what the file says, its tensors, the file).

  Raises:
    UserError: It is cut short, or no GGUF file, or has tensors of a type that is not read.
  """
  file = Mapped(path)
  reader = _Reader(file.bytes)
  short = lambda reason: UserError(f"{path} is cut short or no GGUF file: {reason}. Fetch it again.")
  try:
    if reader.take(4).tobytes() != b"GGUF":
      raise short("it doesn't begin with GGUF")
    version = reader.number("I")
    if version not in (2, 3):
      raise UserError(f"{path} is GGUF of version {version}; 2 and 3 are read.")
    count, pairs = reader.number("Q"), reader.number("Q")
    said = {}
    for _ in range(pairs):
      key = reader.string()
      said[key] = reader.value(reader.number("I"))
    entries = []
    for _ in range(count):
      name = reader.string()
      shape = tuple(reader.number("Q") for _ in range(reader.number("I")))[::-1]
      entries.append((name, shape, reader.number("I"), reader.number("Q")))
  except (IndexError, KeyError, struct.error, OverflowError, RecursionError):
    raise short(f"it ends at {file.size:,} bytes, before its tensors") from None
  align = said.get("general.alignment", 32)
  if type(align) is not int or not 1 <= align <= 2**20:
    raise short(f"general.alignment is {shown(align)}")
  base = -(-reader.at // align) * align
  tensors, taken = {}, []
  for name, shape, kind, offset in entries:
    if kind not in TYPES:
      known = ", ".join(t[0] for t in TYPES.values())
      raise UserError(f"{path}: {name!r} is of type {OTHERS.get(kind, kind)}; {known} are read.")
    stored, values, size, opened = TYPES[kind]
    count, start = math.prod(shape), base + offset
    if not shape or max(shape) > 2**40 or shape[-1] % values:
      raise short(f"{name!r}, {stored}, has the shape {shown(list(shape))}")
    length = count // values * size
    if start + length > file.size:
      raise short(f"{name!r} ends at {start + length:,} bytes, there are {file.size:,}")
    if name in tensors:
      raise short(f"{shown(name)} is in it twice")
    taken.append((start, start + length, name))
    data = file.bytes[start : start + length]
    if isinstance(opened, np.dtype):
      read, dtype = data.view(opened).reshape(shape).__getitem__, opened
    else:
      read, dtype = _opener(data.reshape(*shape[:-1], shape[-1] // values, size), opened), np.dtype(np.float32)
    tensors[name] = Tensor(name, path, shape, dtype, stored, read)
  taken.sort()
  for (_, end, one), (start, _, other) in itertools.pairwise(taken):
    if start < end:
      raise short(f"{one!r} and {other!r} lie in the same place")
  return said, tensors, file


def _opener(blocks, opened):
  """Reads slices: of whole rows or of parts, which begin and end somewhere in a block."""

  def read(index: Index) -> np.ndarray:
    *rows, columns = index
    first, last = columns.start // BLOCK, -(-columns.stop // BLOCK)
    part = blocks[(*rows, slice(first, last))]
    values = opened(np.ascontiguousarray(part).reshape(-1, part.shape[-1])).reshape(*part.shape[:-2], -1)
    return values[..., columns.start - first * BLOCK : columns.stop - first * BLOCK]

  return read


# Architectures


_LAYER = {
  "attn_norm": "norm1/scale",
  "ffn_norm": "norm2/scale",
  "attn_q": "attn/query/kernel",
  "attn_k": "attn/key/kernel",
  "attn_v": "attn/value/kernel",
  "attn_output": "attn/out/kernel",
  "attn_q_norm": "attn/query_norm/scale",
  "attn_k_norm": "attn/key_norm/scale",
  "post_attention_norm": "post1/scale",
  "post_ffw_norm": "post2/scale",
  "ffn_gate": "mlp/gate/kernel",
  "ffn_up": "mlp/up/kernel",
  "ffn_down": "mlp/down/kernel",
}
_FUSED = {n: leaf for n, leaf in _LAYER.items() if n not in ("attn_q", "attn_k", "attn_v")} | {
  "attn_qkv": ("attn/query/kernel", "attn/key/kernel", "attn/value/kernel")
}
_PHI3 = {n: leaf for n, leaf in _FUSED.items() if n != "ffn_gate"} | {"ffn_up": ("mlp/gate/kernel", "mlp/up/kernel")}


def _family(of: Family, layer: Mapping[str, Any] = _LAYER, **changes: Any) -> Family:
  """The family with the names that llama.cpp gives its tensors."""
  tensors = {
    "token_embd.weight": "token_embed/embedding",
    "position_embd.weight": "position_embed/embedding",
    "output_norm.weight": "norm/scale",
    "output_norm.bias": "norm/bias",
    "output.weight": "head/embedding",
  }
  for name, leaves in layer.items():
    leaves = (leaves,) if isinstance(leaves, str) else leaves
    put = lambda leaf: "{layer}/" + leaf
    tensors[f"blk.{{layer}}.{name}.weight"] = tuple(map(put, leaves))
    biases = tuple(put(leaf.replace("scale", "bias").replace("kernel", "bias")) for leaf in leaves)
    tensors[f"blk.{{layer}}.{name}.bias"] = biases
  return dataclasses.replace(
    of, tensors=tensors, prefix="", prefixes=(), transposed=True, ignored=r"rope_freqs\.weight", **changes
  )


_PAIRS = {
  f"attn/{which}/{kind}": (heads, 0, "head_size")
  for which, heads in (("query", "heads"), ("key", "kv_count"))
  for kind in ("kernel", "bias")
}
ARCHITECTURES = {
  "llama": _family(LLAMA, interleaved=_PAIRS),
  "qwen2": _family(QWEN2),
  "qwen3": _family(QWEN3),
  "gemma2": _family(GEMMA2, offset=1.0),
  "gemma3": _family(GEMMA3, offset=1.0),
  "phi3": _family(PHI3, _PHI3),
  "gpt2": _family(GPT2, _FUSED),
}


def open_file(path: str) -> tuple[Family, dict[str, Any], dict[str, Any], dict[str, Tensor], list[Mapped], int | None]:
  """Returns (family, what the file says, arguments of the model, tensors, files, tokens of its tokenizer).

  Raises:
    UserError: As `read_header`; or the architecture is not known.
  """
  said, tensors, file = read_header(path)
  name = said.get("general.architecture")
  if not isinstance(name, str) or name not in ARCHITECTURES:
    raise UserError(f"{path}: architecture {shown(name)} is not known.{suggest(str(name)[:80], ARCHITECTURES)}")
  tokens = said.get("tokenizer.ggml.tokens")
  with understood(path):
    tokens = list(tokens or [])
    arguments = typed(_arguments(name, said, tensors, path), Options, {}, path)
  return ARCHITECTURES[name], said, arguments, tensors, [file], len(tokens) if tokens else None


def _arguments(name, said, tensors, path):
  family = ARCHITECTURES[name]

  def get(key, default=None):
    value = said.get(f"{name}.{key}", default)
    if value is None:
      raise UserError(f"{path} does not say {name}.{key}.")
    return value

  for needed in ("token_embd.weight", "output_norm.weight"):
    if needed not in tensors:
      raise UserError(f"{path} has no tensor {needed!r}.")
  if said.get(f"{name}.expert_count"):
    raise UserError(f"{path}: experts are read from safetensors only.")
  epsilon = "attention.layer_norm_epsilon" if name == "gpt2" else "attention.layer_norm_rms_epsilon"
  found = dict(family.fixed) | dict(
    vocab_size=tensors["token_embd.weight"].shape[0],
    context=get("context_length"),
    width=get("embedding_length"),
    depth=get("block_count"),
    heads=get("attention.head_count"),
    mlp_dim=get("feed_forward_length"),
    epsilon=get(epsilon),
    tied="output.weight" not in tensors,
    activation="gelu_tanh" if name in ("gpt2", "gemma2", "gemma3") else "silu",
  )
  if name == "gpt2":
    return found
  found["kv_heads"] = get("attention.head_count_kv", found["heads"])
  size = get("attention.key_length", found["width"] // found["heads"])
  if size * found["heads"] != found["width"]:
    found["head_dim"] = size
  found["rope_theta"] = get("rope.freq_base", 10_000.0)
  turning = get("rope.dimension_count", size)
  if turning != size:
    found["rope_fraction"] = turning / size
  found |= _scaling(name, said, tensors, found, size, path)
  if window := said.get(f"{name}.attention.sliding_window"):
    pattern = {"gemma2": "LG", "gemma3": "LLLLLG", "phi3": "L"}.get(name)
    found |= dict(window=window, pattern=pattern) if pattern else {}
  if name in ("gemma2", "gemma3"):
    large = {"gemma2": 46, "gemma3": 62}[name]  # The 27B models, of that many layers, divide scores by another root.
    found["scale_dim"] = found["width"] // found["heads"] if found["depth"] == large else size
  if name == "gemma2":
    found |= dict(softcap=get("attn_logit_softcapping", 50.0), logit_softcap=get("final_logit_softcapping", 30.0))
  if name == "gemma3":
    found["local_theta"] = get("rope.freq_base_swa", 10_000.0)
  return found


def _scaling(name, said, tensors, found, size, path):
  """How rotary positions are stretched. Llama 3's way is told by its factors alone, one for each pair."""
  kind = said.get(f"{name}.rope.scaling.type", "none")
  if kind == "linear":
    return dict(rope_scaling="linear", rope_factor=said[f"{name}.rope.scaling.factor"])
  if kind != "none" or any(n.startswith("rope_factors") for n in tensors):
    raise UserError(f"{path}: rope scaling {kind!r} is not read from GGUF; take the safetensors.")
  if "rope_freqs.weight" not in tensors:
    return {}
  factors = np.asarray(tensors["rope_freqs.weight"].read(whole(tensors["rope_freqs.weight"].shape)), np.float32)
  factor = float(factors.max())
  plain = Rope(dim=size, theta=found["rope_theta"])
  for trained in (8192, 4096, 16384, 32768):
    scaled = dataclasses.replace(plain, scaling="llama3", factor=factor, trained=trained)
    if np.allclose(plain.frequencies() / scaled.frequencies(), factors, rtol=1e-4):
      return dict(rope_scaling="llama3", rope_factor=factor, rope_trained=trained)
  raise UserError(f"{path}: the factors in rope_freqs.weight are not Llama 3's.")


# Tokenizer

_LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPLIT = lambda words: [
  {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
  _BYTES | {"use_regex": False},
]
WORDS = {  # How each kind splits text before it merges bytes: what `tokenizers` calls a pre-tokenizer.
  "gpt-2": [_BYTES],
  "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
  "llama-bpe": _SPLIT(_LLAMA3_WORDS),
  "qwen2": _SPLIT(_LLAMA3_WORDS.replace("{1,3}", "")),
}


def tokenizer(said: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns the tokenizer.json of what a file says; None where it is of a kind that isn't known."""
  if said.get("tokenizer.ggml.model") != "gpt2" or said.get("tokenizer.ggml.pre", "gpt-2") not in WORDS:
    return None
  tokens, kinds = said["tokenizer.ggml.tokens"], said.get("tokenizer.ggml.token_type", [])
  added = [i for i, kind in enumerate(kinds) if kind in (3, 4)]  # Control, user defined.
  flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": i, "content": tokens[i], "special": kinds[i] == 3, **flags} for i in added],
    "normalizer": None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": WORDS[said.get("tokenizer.ggml.pre", "gpt-2")]},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "vocab": {token: i for i, token in enumerate(tokens)},
      "merges": [merge.split(" ", 1) for merge in said.get("tokenizer.ggml.merges", [])],
    },
  }


def tokenizer_files(said: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what `transformers` keeps of a tokenizer, as JSON by the name of its file; {} for a kind not known.

  Raises:
    UserError: What the file says of its tokenizer is damaged.
  """
  with understood("The tokenizer in the GGUF file"):
    return _tokenizer_files(said)


def _tokenizer_files(said):
  found = tokenizer(said)
  if found is None:
    return {}
  tokens, named = said["tokenizer.ggml.tokens"], {"tokenizer_class": "PreTrainedTokenizerFast"}
  for kind, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
    if (number := said.get(f"tokenizer.ggml.{kind}_token_id")) is not None:
      named[f"{name}_token"] = tokens[number]
  if template := said.get("tokenizer.chat_template"):
    named["chat_template"] = template
  # Llama 3's converter leaves the flag out; llama.cpp then puts the token there for this kind.
  begins = said.get("tokenizer.ggml.add_bos_token", said.get("tokenizer.ggml.pre") == "llama-bpe")
  if begins and "bos_token" in named:
    bos = {"id": named["bos_token"], "type_id": 0}
    parts = [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}]
    number = said["tokenizer.ggml.bos_token_id"]
    control = {named["bos_token"]: {"id": named["bos_token"], "ids": [number], "tokens": [named["bos_token"]]}}
    pair = [*parts, {"SpecialToken": bos | {"type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    found["post_processor"] = {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": control}
  return {"tokenizer.json": found, "tokenizer_config.json": named}
