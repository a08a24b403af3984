"""Damaged weights of others: safetensors, GGUF, config.json, tokenizers."""

from __future__ import annotations

import base64
import functools
import json
import pathlib
import struct

import damage
import numpy as np
from cases import Target

MODEL = dict(vocab_size=64, context=16, width=32, depth=2, heads=4, kv_heads=2, mlp_dim=32, tied=True, epsilon=1e-5)
ANY = {**damage.CONTENT, **damage.TEXT, **damage.PLACE}
TEXT = "the cat sat on the mat, the cat's hat; 12345 naïve cafés\n\n  the end.\n"


@functools.cache
def _model():
  import jax

  from bigjax import state as states
  from bigjax.models import decoder, decoder_block

  model = states.Model(lambda rngs: decoder.make(**MODEL, rngs=rngs))
  options = decoder_block.Options(**MODEL)
  draw = np.random.default_rng(0)
  leaves = jax.tree.map(lambda x: draw.normal(0, 0.3, x.shape).astype(np.float32), model.abstract[0])
  return model.abstract, options, leaves


def _directory(folder: pathlib.Path, *, parts: int = 1, digests: bool = False) -> None:
  """As `bigjax weights export` writes it."""
  from bigjax import weights
  from bigjax.weights import checksums

  _, options, leaves = _model()
  place = folder / "model"
  tokenizer = _trained().files()
  beside = {name: content.decode() for name, content in tokenizer.items()}
  weights.save(str(place), options, leaves, {}, shard_size=10**9 if parts == 1 else 20_000, beside=beside)
  if not digests:
    (place / checksums.SUMS).unlink()


def _loaded(path: pathlib.Path):
  """The state that a config with this model gets of them."""
  from bigjax import weights

  abstract, options, _ = _model()
  params, extras, report = weights.load(weights.open_weights(str(path)), options, *abstract)
  return {"params": _flat(params), "extras": _flat(extras), "report": report}


def _flat(tree):
  import jax

  from bigjax import paths

  return {n: np.asarray(x) for n, x in zip(paths.names(tree), jax.tree.leaves(tree), strict=True)}


def _described(path: pathlib.Path):
  """The model that `bigjax generate --weights` would build, and its shapes."""
  from bigjax.weights import published

  found = published.open_model(str(path))
  return {"model": found.weights.model, "shapes": {n: (x.shape, str(x.dtype)) for n, x in _abstract(found).items()}}


def _abstract(found):
  import jax

  from bigjax import paths

  return dict(zip(paths.names(found.abstract[0]), jax.tree.leaves(found.abstract[0]), strict=True))


# GGUF


def _string(text):
  return struct.pack("<Q", len(text.encode())) + text.encode()


def _said(value):
  if isinstance(value, str):
    return struct.pack("<I", 8) + _string(value)
  if isinstance(value, list):
    texts = isinstance(value[0], str)
    items = b"".join(_string(v) if texts else struct.pack("<i", v) for v in value)
    return struct.pack("<IIQ", 9, 8 if texts else 5, len(value)) + items
  return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def _gguf(folder: pathlib.Path, *, digests: bool = False) -> None:
  """A llama of every type that is read, with a tokenizer."""
  from bigjax.weights import checksums, gguf, huggingface
  from bigjax.weights.links import links

  _, options, leaves = _model()
  leaves, family, draw = _flat(leaves), gguf.ARCHITECTURES["llama"], np.random.default_rng(1)
  keys = {"general.architecture": "llama", "general.alignment": 32, "llama.rope.freq_base": 10000.0}
  sizes = dict(context_length=16, embedding_length=32, block_count=2, feed_forward_length=32)
  sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5}
  keys |= {f"llama.{k}": v for k, v in sizes.items()}
  byte_level = json.loads(_trained().files()["tokenizer.json"])["model"]
  names = sorted(byte_level["vocab"], key=byte_level["vocab"].get)[: MODEL["vocab_size"]]
  merges = [" ".join(pair) for pair in byte_level["merges"] if {*pair, "".join(pair)} <= {*names}]
  keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": names}
  keys |= {"tokenizer.ggml.merges": merges or ["a b"], "tokenizer.ggml.token_type": [3] + [1] * (len(names) - 1)}
  keys |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.chat_template": "{{ messages }}"}
  head, data, number = b"", b"", 0
  found = links(family, options, {n: x.shape for n, x in leaves.items()})
  for i, link in enumerate(found):
    value = huggingface._tensor(link, leaves, np.dtype(np.float32))
    kind = (0 if value.ndim == 1 else (2, 3, 8, 30, 1, 0)[i % 6]) if value.shape[-1] % 32 == 0 else 0
    name, block, size, opened = gguf.TYPES[kind]
    if isinstance(opened, np.dtype):
      content = value.astype(opened).tobytes()
    else:  # Any bytes are values, where the scales are finite.
      blocks = draw.integers(0, 256, (value.size // block, size), np.uint8)
      blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
      if name == "Q4_1":
        blocks[:, 2:4] = np.frombuffer(np.float16(-0.1).tobytes(), np.uint8)
      content = blocks.tobytes()
    head += _string(link.tensor) + struct.pack("<I", value.ndim)
    head += struct.pack(f"<{value.ndim}Q", *value.shape[::-1]) + struct.pack("<IQ", kind, len(data))
    data += content + bytes(-len(content) % 32)
    number += 1
  said = b"".join(_string(k) + _said(v) for k, v in keys.items())
  head = b"GGUF" + struct.pack("<IQQ", 3, number, len(keys)) + said + head
  (folder / "model.gguf").write_bytes(head + bytes(-len(head) % 32) + data)
  if digests:
    checksums.write(str(folder))


def _gguf_loaded(folder: pathlib.Path):
  from bigjax.weights import gguf, published

  path = folder / "model.gguf"
  said = gguf.read_header(str(path))[0]
  found = {"weights": _loaded(path), "files": gguf.tokenizer_files(said)}
  return found | {"tokens": published.open_model(str(path)).tokenizer().encode([TEXT])}


# Tokenizers


@functools.cache
def _trained():
  from bigjax.data import tokenizers

  symbols = {letter: i for i, letter in enumerate(sorted({*"".join(map(_spell, TEXT.encode().split(b"\0")))}))}
  pairs = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("a", "t"), ("Ġ", "c"), ("Ġc", "at")]
  vocab = {"<|end|>": 0, **{s: i + 1 for s, i in symbols.items()}}
  for a, b in pairs:
    vocab[a + b] = len(vocab)
  assert len(vocab) <= MODEL["vocab_size"]
  return tokenizers.bpe(vocab, pairs, special={"<|end|>": 0})


def _spell(content: bytes) -> str:
  from bigjax.data import tokenizers

  return tokenizers._spelling()(content)


def _tokenizers(folder: pathlib.Path) -> None:
  """One of each kind that is read."""
  import sentencepiece

  from bigjax.data import tokenizers

  (folder / "hf").mkdir()
  trained = tokenizers.train([TEXT * 3], 270)
  trained.save(folder / "hf")
  model = json.loads(trained.files()["tokenizer.json"])["model"]
  (folder / "gpt2").mkdir()
  (folder / "gpt2" / "vocab.json").write_text(json.dumps(model["vocab"]))
  (folder / "gpt2" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
  tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b"at", b" t", b" the"]
  lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]
  (folder / "ranks.tiktoken").write_bytes(b"\n".join(lines))
  (folder / "vocabulary.json").write_text(json.dumps({"characters": "".join(sorted(set(TEXT)))}))
  text = folder / "text.txt"
  text.write_text("\n".join([TEXT.replace("\n", " ")] * 20))
  options = dict(input=str(text), model_prefix=str(folder / "pieces"), vocab_size=60, minloglevel=5, num_threads=1)
  sentencepiece.SentencePieceTrainer.train(**options, hard_vocab_limit=False)
  text.unlink()
  (folder / "pieces.vocab").unlink()


def _tokenized(folder: pathlib.Path, place: str):
  from bigjax.data import tokenizers

  found = tokenizers.load(str(folder / place), "gpt2" if place.endswith("tiktoken") else None)
  tokens = found.encode([TEXT, "", "the end"])
  return {
    "tokens": tokens, "text": found.decode(tokens[0]), "roles": found.roles, "special": found.special,
    "size": found.vocab_size, "digest": found.digest, "files": found.files(), "begin": found.begin,
  }  # fmt: skip


def _tokenizer(name: str, place: str, files: tuple[str, ...], kinds) -> Target:
  read = functools.partial(_tokenized, place=place)
  return Target(name, __name__, _tokenizers, read, kinds, files, said=r"tokenizer: ")


def _model_folder(read, folder):
  return read(folder / "model")


TREE = {**ANY, **damage.TREE}
HEADER = {**damage.TEXT, "number": damage.CONTENT["number"]}
TENSORS = ("*.safetensors",)
loaded, described = (functools.partial(_model_folder, read) for read in (_loaded, _described))
in_parts = functools.partial(_directory, parts=2)
TARGETS = [
  Target("safetensors", __name__, _directory, loaded, damage.CONTENT | damage.PLACE, TENSORS),
  Target("safetensors header", __name__, _directory, loaded, HEADER, TENSORS),
  Target("safetensors, sharded", __name__, in_parts, loaded, TREE, (*TENSORS, "*.index.json")),
  Target("safetensors, digests", __name__, functools.partial(in_parts, digests=True), loaded, TREE, sure="SHA256SUMS"),
  Target("config.json", __name__, _directory, described, TREE, ("config.json",)),
  Target("GGUF", __name__, _gguf, _gguf_loaded, ANY),
  Target("GGUF, digests", __name__, functools.partial(_gguf, digests=True), _gguf_loaded, ANY, sure="SHA256SUMS"),
  _tokenizer("tokenizer.json", "hf", ("tokenizer*.json",), TREE),
  _tokenizer("GPT-2 vocabulary", "gpt2", ("vocab.json", "merges.txt"), TREE),
  _tokenizer("tiktoken", "ranks.tiktoken", ("ranks.tiktoken",), ANY),
  _tokenizer("sentencepiece", "pieces.model", ("pieces.model",), ANY),
  _tokenizer("characters", "vocabulary.json", ("vocabulary.json",), TREE),
]
