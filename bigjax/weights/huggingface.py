"""A directory as `transformers` has it: config.json and safetensors, into a state on any mesh and out of one."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from bigjax import paths
from bigjax.errors import UserError, few, suggest
from bigjax.weights import checksums, configs, gguf, reading, safetensors
from bigjax.weights.families import Family
from bigjax.weights.links import links, match
from bigjax.weights.tensors import Mapped, Tensor

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
# What stands beside the weights and is not about them: tokenizers, and how to generate.
BESIDE = (
  "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
  "tokenizer.model chat_template.jinja generation_config.json"
).split()


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights in files, opened and not yet read."""

  path: str
  family: Family
  config: Mapping[str, Any]  # What the file says of the model, in its own words.
  arguments: Mapping[str, Any]  # Of the model here.
  tensors: Mapping[str, Tensor]
  files: Sequence[Mapped]
  vocabulary: int | None  # Tokens of the tokenizer that came with them.

  @property
  def model(self) -> dict[str, Any]:
    """What `config.model` is for these weights."""
    return {"name": self.family.model, **self.arguments}

  @property
  def options(self) -> Any:
    return configs.OPTIONS[self.family.model](**self.arguments)


def open_weights(path: str) -> Weights:
  """Opens a directory with config.json and safetensors, or a GGUF file; reads headers, no weights.

  Raises:
    UserError: What is there is cut short, of no known architecture, or of another model than its tokenizer.
  """
  if path.endswith(".gguf"):
    found = Weights(path, *gguf.open_file(path))
  else:
    where = os.path.join(path, "config.json")
    if os.path.isfile(path):
      raise UserError(f"{path} is a file; give the directory, in which its config.json is.")
    if not os.path.isdir(path):
      raise UserError(f"{path}: there is no such directory, and no GGUF file (.gguf) of that name.")
    beside = [os.path.join(path, name) for name in ("config.json", safetensors.INDEX, "tokenizer.json")]
    checksums.verify([f for f in beside if os.path.isfile(f)])
    config = safetensors.read_json(where)
    family, config = configs.family_of(config, where)
    arguments = configs.options(family, config, where)
    tensors, files = safetensors.open_files(path)
    tokenizer = os.path.join(path, "tokenizer.json")
    there = os.path.isfile(tokenizer)
    tokens = configs.vocabulary(safetensors.read_json(tokenizer), tokenizer) if there else None
    found = Weights(path, family, config, arguments, tensors, files, tokens)
  if found.arguments["depth"] > max(256, len(found.tensors)):  # Before a model of a million layers is made.
    raise UserError(f"{path} has {len(found.tensors)} tensors, too few for {found.arguments['depth']:,} layers.")
  if found.vocabulary is not None:
    configs.check_vocabulary(found.vocabulary, found.arguments["vocab_size"], path)
  return found


def load(
  weights: Weights, options: Any, params: Any, extras: Any, *, changed: Sequence[str] = ()
) -> tuple[Any, Any, list[str]]:
  """Returns (params, extras, report): the leaves of a model as the files have them, and a line for what is left over.

  Args:
    weights: where from.
    options: of the model, `module.options`; they must mean what those of the weights do.
    params: shapes, types and shardings of its parameters; each device is sent its own part of a leaf.
    extras: likewise of what it keeps besides.
    changed: options that differ on purpose.

  Raises:
    UserError: The model is another one; tensors are missing, over, of another shape, or hold NaN; a file has other
      bytes than a digest beside it says. Nothing is returned.
  """
  leaves = _flat(params) | _flat(extras)
  arrays, report = load_leaves(weights, options, leaves, changed=changed)
  build = lambda tree: jax.tree.unflatten(jax.tree.structure(tree), [arrays[n] for n in paths.names(tree)])
  return build(params), build(extras), report


def load_leaves(
  weights: Weights, options: Any, leaves: Mapping[str, Any], *, changed: Sequence[str] = (), partial: bool = False
) -> tuple[dict[str, jax.Array], list[str]]:
  """Returns (arrays by name, report), as `load`; where it's `partial`, what is not asked for stays in the file."""
  _check_options(weights, options, changed)
  found = links(weights.family, options, {n: tuple(x.shape) for n, x in leaves.items()})
  names, over = match(found, weights.tensors, weights.family, weights.path)
  over = _without_copies(weights, names, over)
  if over and not partial:
    raise UserError(f"{weights.path} has tensors that {weights.family.architecture} does not: {few(over)}.")
  checksums.verify([f.path for f in weights.files], shared=True)
  used = set(names)
  report = [f"{n}: not read" for n in weights.tensors if n not in used]
  arrays = dict(reading.read(found, [weights.tensors[n] for n in names], leaves, weights.files))
  # What experts have counted since the last step is in no file.
  return arrays | {n: reading.zeros(leaf) for n, leaf in leaves.items() if n not in arrays}, report


def _check_options(weights, options, changed):
  if not isinstance(options, configs.OPTIONS[weights.family.model]):
    raise UserError(f"config.model: the weights of {weights.path} are for the model {weights.family.model!r}.")
  names = [f.name for f in dataclasses.fields(options)]
  for name in changed:
    if name not in names:
      raise UserError(f"config.init_from.changed: {name!r} is no option of the model.{suggest(name, names)}")
  wrong = [d for d in configs.differences(options, weights.options) if d[0] not in (*changed, "context")]
  if options.context > weights.options.context and "context" not in changed:
    wrong.append(("context", options.context, weights.options.context))
  if wrong:
    lines = [f"  config.model.{name} is {here!r}, the weights have {there!r}" for name, here, there in wrong]
    remedy = f"`bigjax weights show {weights.path}` prints the model; what differs on purpose is listed in `changed`."
    raise UserError(f"config.model is not the model of {weights.path}:\n" + "\n".join(lines) + f"\n{remedy}")


def _without_copies(weights, names, over):
  """A head that is the embedding may be in a file twice, if it is the same."""
  heads = [n for n in over if n.endswith("lm_head.weight") or n == "output.weight"]
  embeddings = [n for n in names if n.endswith(("embed_tokens.weight", "wte.weight", "token_embd.weight"))]
  for head in heads:
    if not weights.arguments.get("tied") or not embeddings:
      continue
    if not reading.same(weights.tensors[head], weights.tensors[embeddings[0]]):
      raise UserError(f"{weights.path}: {head!r} is not {embeddings[0]!r}, though the config says that they are tied.")
    over = [n for n in over if n != head]
  return over


def _flat(tree):
  return dict(zip(paths.names(tree), jax.tree.leaves(tree), strict=True))


def save(
  directory: str,
  options: Any,
  params: Any,
  extras: Any,
  *,
  dtype: str = "float32",
  architecture: str | None = None,
  like: str | None = None,
  beside: Mapping[str, str] = {},
  shard_size: int = 5 * 10**9,
) -> Family:
  """Writes config.json and safetensors that `transformers` loads, and their digests; all of it in the end, or nothing.

  Args:
    directory: to be made; must be empty or not there.
    options: of the model.
    params: its parameters.
    extras: what it keeps besides.
    dtype: of the file, "float32", "bfloat16" or "float16".
    architecture: of `transformers`; the first that can hold the model if None.
    like: a directory to take the tokenizer and what else config.json says from.
    beside: further files to write, by name.
    shard_size: bytes of a file.

  Raises:
    UserError: No architecture is this model, the directory is in use, or weights are NaN or beyond the type's range.
  """
  if dtype not in DTYPES:
    raise UserError(f"--dtype: {dtype!r} is not known.{suggest(dtype, DTYPES)}")
  if os.path.exists(directory) and (not os.path.isdir(directory) or os.listdir(directory)):
    raise UserError(f"{directory} is there already and not empty. Name another directory.")
  source = os.path.join(like, "config.json") if like else ""
  known = safetensors.read_json(source) if os.path.isfile(source) else {}
  if architecture is None and known:
    try:  # Where two can hold it, that which it came from.
      architecture = configs.describe(options, configs.family_of(known, source)[0].architecture)[0].architecture
    except UserError:
      architecture = None
  family, config = configs.describe(options, architecture)
  if "text_config" not in known:
    dropped = ("rope_parameters", "quantization_config", "dtype", "transformers_version", "layer_types")
    config = {k: v for k, v in known.items() if k not in dropped} | config
  leaves = _flat(params) | _flat(extras)
  found = links(family, options, {n: tuple(x.shape) for n, x in leaves.items()})
  made = [
    safetensors.Made(link.tensor, link.shape, DTYPES[dtype], lambda link=link: _tensor(link, leaves, DTYPES[dtype]))
    for link in found
  ]
  writes = jax.process_index() == 0
  parent = os.path.dirname(os.path.abspath(directory))
  os.makedirs(parent, exist_ok=True)
  part = tempfile.mkdtemp(prefix=f".{os.path.basename(os.path.abspath(directory))}.", dir=parent) if writes else ""
  try:
    safetensors.write(part, made, shard_size=shard_size, writes=writes)
    if writes:
      with open(os.path.join(part, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config | {"torch_dtype": dtype}, file, indent=2)
      for name in BESIDE if like else ():
        if os.path.isfile(source := os.path.join(like, name)):
          shutil.copyfile(source, os.path.join(part, name))
      for name, text in beside.items():
        with open(os.path.join(part, name), "w", encoding="utf-8") as file:
          file.write(text)
      checksums.write(part)
      os.chmod(part, 0o755)
      if os.path.isdir(directory):
        os.rmdir(directory)
      os.rename(part, directory)
  finally:
    if writes:
      shutil.rmtree(part, ignore_errors=True)
  return family


def _tensor(link, leaves, dtype):
  """One tensor as it lies in the file."""
  parts = []
  for slot in link.slots:
    value = _on_host(leaves[slot.leaf], slot.lead).astype(np.float32, copy=False)
    value = value + np.float32(link.offset) if link.offset else value
    value = value.T if link.turned else value
    if link.order is not None:
      there = np.empty_like(value)
      there[link.order] = value
      value = there
    if not np.isfinite(value).all():
      raise UserError(f"{slot.leaf} holds NaN or infinity; nothing was written.")
    with np.errstate(over="ignore"):
      parts.append(value.astype(dtype))
    if dtype != np.float32 and not np.isfinite(parts[-1]).all():
      raise UserError(f"{slot.leaf} holds values beyond the range of {dtype}; write bfloat16 or float32.")
  return np.concatenate(parts, axis=link.axis) if len(parts) > 1 else parts[0]


def _on_host(leaf, lead):
  """`leaf[lead]` as NumPy; every process of a run has to call this."""
  if isinstance(leaf, np.ndarray) or not isinstance(leaf.sharding, jax.sharding.NamedSharding):
    return np.asarray(leaf[lead] if lead else leaf)
  whole = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
  return np.asarray(_row(whole, len(lead))(leaf, lead).addressable_data(0))


@functools.cache
def _row(sharding, count):
  del count
  return jax.jit(lambda leaf, lead: leaf[tuple(lead)], out_shardings=sharding)
