"""config.json of `transformers`, and the options of a model here: one becomes the other, or it is said why not."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from bigjax.errors import UserError, shown, understood
from bigjax.models import bert, decoder, decoder_block
from bigjax.weights.families import ALIASES, DEEPSEEK_V3, FAMILIES, GEMMA3, Family
from bigjax.weights.said import typed

ACTIVATIONS = {  # Theirs: ours; the first of two names for one is written.
  "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
  "relu": "relu", "relu2": "squared_relu", "tanh": "tanh", "mish": "mish",
}  # fmt: skip
OPTIONS = {"decoder": decoder_block.Options, "bert": bert.Options}
MODELS = {"decoder": decoder, "bert": bert}

# Options that say how something is computed or trained, not what the weights mean.
FREE = frozenset("scan remat dtype dropout attention balance_loss router_z_loss capacity_factor group exchange".split())


def family_of(config: Mapping[str, Any], where: str) -> tuple[Family, Mapping[str, Any]]:
  """Returns whose architecture a config.json is of, and the config of its text model.

  Raises:
    UserError: It is not one of `FAMILIES`; the message has the nearest.
  """
  names = config.get("architectures") or []
  if not isinstance(names, list) or not all(isinstance(n, str) for n in (*names, config.get("model_type") or "")):
    raise UserError(f"{where}: architectures and model_type are a list of names and a name, not {shown(names)}.")
  by_type = {f.model_type: f.architecture for f in FAMILIES.values()}
  name = names[0] if names else by_type.get(config.get("model_type"))
  name = ALIASES.get(name, name)
  if name not in FAMILIES:
    what = name or config.get("model_type")
    if what is None:
      raise UserError(f"{where} names no architecture.")
    near = difflib.get_close_matches(what[:80], [*FAMILIES, *by_type], n=3, cutoff=0.0)
    raise UserError(f"{where}: architecture {shown(what)} is not known. The nearest are {', '.join(near)}.")
  config = config | config["text_config"] if isinstance(config.get("text_config"), Mapping) else config
  return _variant(FAMILIES[name], config.get("q_lora_rank"), config), config


def _variant(family, query_rank, config):
  """What a table leaves open."""
  if family.architecture != DEEPSEEK_V3.architecture:
    return family
  other = "q_proj" if query_rank else "q_b_proj"
  tensors = {n: leaf for n, leaf in family.tensors.items() if f".{other}." not in n}
  family = dataclasses.replace(family, tensors=tensors)
  if config.get("rope_interleave") is False:
    family = dataclasses.replace(family, interleaved={})
  if depth := config.get("num_hidden_layers"):  # After them come layers that predict further tokens.
    more = "|".join(str(depth + i) for i in range(config.get("num_nextn_predict_layers") or 1))
    family = dataclasses.replace(family, ignored=rf"{family.ignored}|model\.layers\.({more})\..*")
  return family


# Reading


def options(family: Family, config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the arguments of the model, `decoder.make` or `bert.make`, that a config.json describes.

  Raises:
    UserError: A key is missing, or says what there is no option for.
  """
  with understood(where):
    found = _options(family, config, where)
  return typed(found, OPTIONS[family.model], family.keys, where)


def _options(family, config, where):
  def get(key):
    names = key.split("|")
    return next((config[name] for name in names if name in config), family.defaults.get(names[0]))

  for key, values in family.only.items():
    if get(key) not in values:
      raise UserError(f"{where}: {key} = {get(key)!r} is nothing bigjax's {family.model} can do.")
  found = dict(family.fixed)
  for option, key in family.keys.items():
    value = get(key)
    if value is not None:
      found[option] = value
  found = typed(found, OPTIONS[family.model], family.keys, where)
  # n_inner is null where it is four times the width.
  if family.model_type == "gpt2":
    found.setdefault("mlp_dim", 4 * found.get("width", 0))
  if found.get("activation") not in ACTIVATIONS:
    raise UserError(f"{where}: the activation {found.get('activation')!r} is not one of {', '.join(ACTIVATIONS)}.")
  found["activation"] = ACTIVATIONS[found["activation"]]
  required = [f.name for f in dataclasses.fields(OPTIONS[family.model]) if f.default is dataclasses.MISSING]
  missing = [family.keys[name] for name in required if name not in found]
  if missing:
    raise UserError(f"{where} has no {', '.join(missing)}.")
  if family.rope:
    found |= _rope(family, config, where)
  if family.windows:
    found |= _windows(family, config, get, found["depth"], where)
  if family.architecture == DEEPSEEK_V3.architecture:
    found["bias_rate"] = 0.001  # It has a bias; the config doesn't say how fast it moved. The rate is the paper's.
  if found.get("head_dim") and found["head_dim"] * found["heads"] == found["width"]:
    del found["head_dim"]
  if family.model_type == "llama" and config.get("attention_bias"):
    if not config.get("mlp_bias"):
      raise UserError(f"{where}: attention_bias without mlp_bias is nothing bigjax's decoder can do.")
    found["bias"] = "all"
  if family.model == "bert":
    found |= dict(pooler=family.architecture == "BertModel", predicts=family.architecture != "BertModel")
  return found


def _rope(family, config, where):
  said = config.get("rope_parameters") or config.get("rope_scaling") or {}
  local = {}
  if "full_attention" in said:
    said, local = said["full_attention"], said.get("sliding_attention") or {}
  theta = said.get("rope_theta") or config.get("rope_theta") or family.defaults["rope_theta"]
  kind = said.get("rope_type") or said.get("type") or "default"
  found: dict[str, Any] = dict(rope_theta=float(theta))
  if local.get("rope_theta"):
    found["local_theta"] = float(local["rope_theta"])
  if family.architecture != GEMMA3.architecture:
    fraction = said.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if fraction != 1.0:
      found["rope_fraction"] = float(fraction)
  if kind == "default":
    return found
  if kind not in ("linear", "llama3", "yarn"):
    raise UserError(f"{where}: rope_scaling {kind!r} is not known; linear, llama3 and yarn are.")
  fixed = dict(beta_fast=32, beta_slow=1, low_freq_factor=1, high_freq_factor=4, truncate=True)
  for key, value in fixed.items():
    if said.get(key) not in (None, value):
      raise UserError(f"{where}: rope_scaling has {key} = {said[key]}, here it is {value}.")
  found |= dict(rope_scaling=kind, rope_factor=float(said["factor"]))
  if kind != "linear":
    trained = config.get("original_max_position_embeddings") or said.get("original_max_position_embeddings")
    found["rope_trained"] = int(trained or config["max_position_embeddings"])
  if kind == "yarn":
    scale, all_dims = said.get("mscale"), said.get("mscale_all_dim")
    amplitude = said.get("attention_factor")
    if amplitude is None and scale and all_dims:
      sharp = lambda s: decoder_block.sharpness(found["rope_factor"], s)
      amplitude = sharp(scale) / sharp(all_dims)
    if amplitude is not None:
      found["rope_amplitude"] = float(amplitude)
    if all_dims and family.architecture == DEEPSEEK_V3.architecture:
      found["rope_sharpen"] = float(all_dims)
  return found


def _windows(family, config, get, depth, where):
  window = get("sliding_window")
  if window is None:
    return {}
  if family.windows == "all":
    return dict(window=window, pattern="L")
  kinds = config.get("layer_types")
  if kinds is None:
    cycle = config.get("sliding_window_pattern") or family.cycle
    kinds = ["full_attention" if (i + 1) % cycle == 0 else "sliding_attention" for i in range(depth)]
  words = {"full_attention": "G", "sliding_attention": "L"}
  if wrong := [k for k in kinds if k not in words]:
    raise UserError(f"{where}: layers of {wrong[0]!r} are not known.")
  pattern = _shortest("".join(words[k] for k in kinds))
  return dict(pattern=pattern) | (dict(window=window) if "L" in pattern else {})


def _shortest(pattern):
  """The shortest period that repeats to the pattern."""
  repeats = lambda n: (pattern[:n] * (len(pattern) // n + 1))[: len(pattern)] == pattern
  return pattern[: next(n for n in range(1, len(pattern) + 1) if repeats(n))]


# Comparing


def meaning(o: Any) -> dict[str, Any]:
  """Returns the options that decide what weights mean, each in one form: two models are equal if these are."""
  found = {k: v for k, v in dataclasses.asdict(o).items() if k not in FREE}
  if not isinstance(o, decoder_block.Options):
    return found
  kinds = o.kinds
  found["activation"] = {"swish": "silu"}.get(o.activation, o.activation)
  found |= dict(kv_heads=o.kv_heads or o.heads, head_dim=o.head_size, scale_dim=o.scale_dim or o.head_size)
  found["pattern"] = "".join("L" if kind.local else "G" for kind in kinds)
  found["window"] = o.window if any(kind.local for kind in kinds) else None
  found["expert_dim"] = o.expert_dim or o.mlp_dim
  if all(kind.routed for kind in kinds):
    del found["mlp_dim"]
  found["bias_rate"] = o.bias_rate > 0
  if o.kv_rank:
    for name in ("kv_heads", "head_dim"):
      del found[name]
    found["scale_dim"] = o.scale_dim
  unused = []
  if not o.kv_rank:
    unused += ["query_rank", "nope_dim", "rope_dim", "value_dim", "rope_sharpen"]
  if not o.experts:
    unused += ["top_k", "expert_dim", "shared_experts", "first_dense", "moe_every", "scoring", "normalize"]
    unused += ["route_scale", "groups", "top_groups", "bias_rate"]
  elif o.scoring == "softmax" and o.groups == 1:
    unused += ["top_groups"]
  if o.positions != "rope":
    unused += ["rope_theta", "rope_fraction", "rope_scaling", "rope_factor", "rope_trained", "rope_amplitude"]
    unused += ["rope_sharpen", "local_theta"]
  if o.rope_scaling == "none":
    unused += ["rope_factor"]
  if o.rope_scaling not in ("llama3", "yarn"):
    unused += ["rope_trained"]
  if o.rope_scaling != "yarn":
    unused += ["rope_amplitude"]
  elif o.rope_amplitude is None:
    found["rope_amplitude"] = decoder_block.sharpness(o.rope_factor)
  if o.local_theta is None and o.rope_scaling == "none":
    found["local_theta"] = o.rope_theta
  if not any(kind.local for kind in kinds):
    unused += ["local_theta"]
  return {k: v for k, v in found.items() if k not in unused}


def differences(o: Any, other: Any) -> list[tuple[str, Any, Any]]:
  """Returns (option, here, there) of what differs in meaning."""
  a, b = meaning(o), meaning(other)
  return [(k, a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]


# Writing


def describe(o: Any, architecture: str | None = None) -> tuple[Family, dict[str, Any]]:
  """Returns the family that can hold a model of these options, the first one or that asked for, and its config.json.

  Raises:
    UserError: There is none; the message has the nearest, and in what it differs.
  """
  name = next(name for name, kind in OPTIONS.items() if isinstance(o, kind))
  tried = []
  for family in FAMILIES.values() if architecture is None else [_known(architecture)]:
    if family.model != name:
      continue
    config = _config(family, o)
    family = _variant(family, config.get("q_lora_rank"), config)
    try:
      again = OPTIONS[name](**options(family, config, "config.json"))
    except UserError:
      continue
    if not (wrong := differences(o, again)):
      return family, config
    tried.append((len(wrong), family.architecture, wrong))
  if not tried:
    raise UserError(f"{architecture} holds no {name}.")
  _, nearest, wrong = min(tried)
  shown = ", ".join(f"{k} = {a!r} (there {b!r})" for k, a, b in wrong[:6])
  raise UserError(f"no architecture of transformers is this model; the nearest, {nearest}, differs in {shown}.")


def _known(architecture):
  family, _ = family_of({"architectures": [architecture]}, "--architecture")
  return FAMILIES[family.architecture]


def _config(family: Family, o: Any) -> dict[str, Any]:
  found: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
  for option, key in family.keys.items():
    found[key.split("|")[0]] = getattr(o, option, None)
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  key = family.keys["activation"]
  found[key] = names.get(o.activation, o.activation)
  if family.defaults.get(key) == "gelu_new" and o.activation == "gelu_tanh":
    found[key] = "gelu_new"
  if family.model == "bert":
    return found
  resolved = dict(kv_heads=o.kv_heads or o.heads, head_dim=o.head_size, scale_dim=o.scale_dim or o.head_size)
  resolved |= dict(expert_dim=o.expert_dim or o.mlp_dim)
  for option, value in resolved.items():
    if option in family.keys:
      found[family.keys[option].split("|")[0]] = value
  if family.architecture == DEEPSEEK_V3.architecture:
    found |= dict(num_key_value_heads=o.heads, topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1)
    found |= dict(num_nextn_predict_layers=0, n_group=o.groups, topk_group=o.top_groups)
  if family.model_type == "llama" and o.bias == "all":
    found |= dict(attention_bias=True, mlp_bias=True)
  if family.windows:
    found["sliding_window"] = o.window
  if family.windows == "listed":
    found["layer_types"] = ["sliding_attention" if kind.local else "full_attention" for kind in o.kinds]
  if family.rope:
    found |= _rope_config(family, o)
  return found


def _rope_config(family, o):
  found: dict[str, Any] = dict(rope_theta=o.rope_theta)
  if o.rope_scaling == "none":
    return found | {"rope_scaling": None}
  scaling: dict[str, Any] = dict(rope_type=o.rope_scaling, factor=o.rope_factor)
  if o.rope_scaling != "linear":
    scaling["original_max_position_embeddings"] = o.rope_trained
  if o.rope_scaling == "llama3":
    scaling |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
  if o.rope_scaling == "yarn":
    scaling |= dict(beta_fast=32.0, beta_slow=1.0)
    if o.rope_amplitude is not None:
      scaling["attention_factor"] = o.rope_amplitude
    if o.rope_sharpen:
      scaling |= dict(mscale=o.rope_sharpen, mscale_all_dim=o.rope_sharpen)
  return found | {"rope_scaling": scaling}


def check_vocabulary(tokens: int, vocab_size: int, where: str) -> None:
  """Raises unless every token has a row in the embedding; rows without a token are padding."""
  if tokens > vocab_size:
    raise UserError(
      f"{where}: the tokenizer has {tokens:,} tokens, the weights have {vocab_size:,}. They are of different models."
    )


def vocabulary(tokenizer: Mapping[str, Any], where: str) -> int:
  """Returns the number of tokens of a tokenizer.json, one more than the largest id."""
  with understood(where):
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = list(vocab.values()) if isinstance(vocab, Mapping) else list(range(len(vocab)))
    ids += [t["id"] for t in tokenizer.get("added_tokens") or []]
    if not ids:
      raise UserError(f"{where} has no tokens.")
    return max(ids) + 1
