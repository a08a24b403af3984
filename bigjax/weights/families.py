"""What the open models call their tensors, and how their config.json says what bigjax's options say.

A table has one row a tensor: its name there, and the leaf here; or the leaves, where several lie one after another in
one tensor. `{layer}` and `{expert}` are numbers. A row whose leaves a model lacks, such as a bias, is not its. Names
are those of the published weights at https://huggingface.co/, in the repositories that decoder_sizes.py names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

Leaves = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """One architecture of `transformers`."""

  architecture: str  # In config.json: {"architectures": [this]}.
  model_type: str
  model: str = "decoder"  # The model here.
  tensors: Mapping[str, Leaves]
  prefix: str = "model."  # What names but those of heads begin with,
  prefixes: tuple[str, ...] = ()  # and what else they may begin with: names within a wrapper, or without one.
  transposed: bool = True  # A kernel is [out, in] there; here, and in GPT-2, it is [in, out].
  interleaved: Mapping[str, tuple[str | int, str | int, str]] = dataclasses.field(default_factory=dict)
  # By leaf: heads, and the dimensions of each that don't turn and that do. These are neighbours in pairs there.
  offset: float = 0.0  # What the scales of norms have more there.
  ignored: str = r".*\.rotary_emb\.inv_freq"  # Regex of tensors that hold nothing that is learned.
  # Of config.json.
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # Options that all of the family have.
  keys: Mapping[str, str] = dataclasses.field(default_factory=dict)  # Option: its key, or the names it has had.
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # What a missing key means.
  only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)  # Values that there is a model for.
  windows: str = ""  # Which layers have the `sliding_window`: "all", "listed", or none.
  cycle: int = 1  # Of listed layers: every so many is global where `layer_types` is missing.
  rope: bool = True


_TOP = {
  "model.embed_tokens.weight": "token_embed/embedding",
  "model.norm.weight": "norm/scale",
  "lm_head.weight": "head/embedding",
}
_NORMS = {"input_layernorm.weight": "norm1/scale", "post_attention_layernorm.weight": "norm2/scale"}
_OUT = {"self_attn.o_proj.weight": "attn/out/kernel", "self_attn.o_proj.bias": "attn/out/bias"}
_ATTENTION = _OUT | {
  "self_attn.q_proj.weight": "attn/query/kernel",
  "self_attn.k_proj.weight": "attn/key/kernel",
  "self_attn.v_proj.weight": "attn/value/kernel",
  "self_attn.q_proj.bias": "attn/query/bias",
  "self_attn.k_proj.bias": "attn/key/bias",
  "self_attn.v_proj.bias": "attn/value/bias",
}
_QK_NORM = {"self_attn.q_norm.weight": "attn/query_norm/scale", "self_attn.k_norm.weight": "attn/key_norm/scale"}
_MLP = {
  f"mlp.{there}_proj.{kind}": f"mlp/{there}/{leaf}"
  for there in ("gate", "up", "down")
  for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
}
_SANDWICH = {
  "input_layernorm.weight": "norm1/scale",
  "post_attention_layernorm.weight": "post1/scale",
  "pre_feedforward_layernorm.weight": "norm2/scale",
  "post_feedforward_layernorm.weight": "post2/scale",
}
_POST = {"post_attention_layernorm.weight": "post1/scale", "post_feedforward_layernorm.weight": "post2/scale"}


def _experts(names: str, gate: str, up: str, down: str) -> dict[str, Leaves]:
  words = {"gate": gate, "up": up, "down": down}
  return {f"{names}.{{expert}}.{word}.weight": f"mlp/experts/{leaf}/kernel" for leaf, word in words.items()}


def _tensors(top: Mapping[str, Leaves], layer: Mapping[str, Leaves], name: str = "model.layers.{layer}."):
  """The table: rows of a layer name the tensor and the leaf within it."""
  put = lambda leaf: "{layer}/" + leaf if isinstance(leaf, str) else tuple("{layer}/" + one for one in leaf)
  return dict(top) | {name + there: put(leaf) for there, leaf in layer.items()}


_KEYS = dict(
  vocab_size="vocab_size",
  context="max_position_embeddings",
  width="hidden_size",
  depth="num_hidden_layers",
  heads="num_attention_heads",
  kv_heads="num_key_value_heads",
  mlp_dim="intermediate_size",
  epsilon="rms_norm_eps",
  activation="hidden_act",
  tied="tie_word_embeddings",
)
_HEAD = _KEYS | dict(head_dim="head_dim")
_DEFAULTS = dict(hidden_act="silu", tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=10_000.0)
_PLAIN = dict(attention_bias=(False, None), mlp_bias=(False, None))
_GEMMA = dict(norm_place="sandwich", norm_offset=True, embed_scale=True)
_GEMMA_KEYS = _HEAD | dict(
  activation="hidden_activation",
  scale_dim="query_pre_attn_scalar",
  softcap="attn_logit_softcapping",
  logit_softcap="final_logit_softcapping",
)
_GEMMA_DEFAULTS = _DEFAULTS | dict(
  hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True, head_dim=256, query_pre_attn_scalar=256,
  num_attention_heads=8, num_key_value_heads=4, sliding_window=4096,
)  # fmt: skip
_GEMMA_ONLY = dict(attention_bias=(False, None), use_bidirectional_attention=(False, None))

LLAMA = Family(
  architecture="LlamaForCausalLM",
  model_type="llama",
  tensors=_tensors(_TOP, _NORMS | _ATTENTION | _MLP),
  keys=_HEAD,
  defaults=_DEFAULTS,
)
MISTRAL = dataclasses.replace(
  LLAMA,
  architecture="MistralForCausalLM",
  model_type="mistral",
  defaults=_DEFAULTS | dict(sliding_window=4096, num_key_value_heads=8),
  windows="all",
)
QWEN2 = Family(
  architecture="Qwen2ForCausalLM",
  model_type="qwen2",
  tensors=_tensors(_TOP, _NORMS | _ATTENTION | _MLP),
  fixed=dict(bias="qkv"),
  keys=_KEYS,
  defaults=_DEFAULTS,
  only=dict(use_sliding_window=(False, None)),
)
QWEN3 = Family(
  architecture="Qwen3ForCausalLM",
  model_type="qwen3",
  tensors=_tensors(_TOP, _NORMS | _ATTENTION | _QK_NORM | _MLP),
  fixed=dict(qk_norm="head"),
  keys=_HEAD,
  defaults=_DEFAULTS | dict(head_dim=128),
  only=_PLAIN | dict(use_sliding_window=(False, None)),
)
QWEN3_MOE = Family(
  architecture="Qwen3MoeForCausalLM",
  model_type="qwen3_moe",
  tensors=_tensors(
    _TOP,
    _NORMS
    | _ATTENTION
    | _QK_NORM
    | _MLP
    | _experts("mlp.experts", "gate_proj", "up_proj", "down_proj")
    | {"mlp.gate.weight": "mlp/router/kernel"},
  ),
  fixed=dict(qk_norm="head", scoring="softmax"),
  keys=_HEAD
  | dict(experts="num_experts|num_local_experts", top_k="num_experts_per_tok", expert_dim="moe_intermediate_size")
  | dict(normalize="norm_topk_prob", moe_every="decoder_sparse_step"),
  defaults=_DEFAULTS | dict(norm_topk_prob=False, decoder_sparse_step=1),
  only=_PLAIN | dict(use_sliding_window=(False, None), mlp_only_layers=((), [], None)),
)
MIXTRAL = Family(
  architecture="MixtralForCausalLM",
  model_type="mixtral",
  tensors=_tensors(
    _TOP,
    _NORMS
    | _ATTENTION
    | _experts("block_sparse_moe.experts", "w1", "w3", "w2")
    | {"block_sparse_moe.gate.weight": "mlp/router/kernel"},
  ),
  fixed=dict(scoring="softmax", normalize=True),
  keys=_HEAD | dict(experts="num_local_experts", top_k="num_experts_per_tok"),
  defaults=_DEFAULTS | dict(rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
  windows="all",
)
GEMMA2 = Family(
  architecture="Gemma2ForCausalLM",
  model_type="gemma2",
  tensors=_tensors(_TOP, _SANDWICH | _ATTENTION | _MLP),
  fixed=_GEMMA,
  keys=_GEMMA_KEYS,
  defaults=_GEMMA_DEFAULTS
  | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, vocab_size=256000, max_position_embeddings=8192),
  only=_GEMMA_ONLY,
  windows="listed",
  cycle=2,
)
GEMMA3 = Family(
  architecture="Gemma3ForCausalLM",
  model_type="gemma3_text",
  tensors=_tensors(_TOP, _SANDWICH | _ATTENTION | _QK_NORM | _MLP),
  prefixes=("language_model.model.", "model.language_model."),
  ignored=r".*\.rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*",
  fixed=_GEMMA | dict(qk_norm="head"),
  keys=_GEMMA_KEYS | dict(local_theta="rope_local_base_freq"),
  defaults=_GEMMA_DEFAULTS
  | dict(rope_theta=1e6, rope_local_base_freq=10_000.0, vocab_size=262208, max_position_embeddings=131072),
  only=_GEMMA_ONLY,
  windows="listed",
  cycle=6,
)
OLMO2 = Family(
  architecture="Olmo2ForCausalLM",
  model_type="olmo2",
  tensors=_tensors(_TOP, _POST | _ATTENTION | _QK_NORM | _MLP),
  fixed=dict(norm_place="post", qk_norm="all"),
  keys=_KEYS,
  defaults=_DEFAULTS | dict(rms_norm_eps=1e-5),
  only=_PLAIN,
)
PHI3 = Family(
  architecture="Phi3ForCausalLM",
  model_type="phi3",
  tensors=_tensors(
    _TOP,
    _NORMS
    | _OUT
    | {
      "self_attn.qkv_proj.weight": ("attn/query/kernel", "attn/key/kernel", "attn/value/kernel"),
      "mlp.gate_up_proj.weight": ("mlp/gate/kernel", "mlp/up/kernel"),
      "mlp.down_proj.weight": "mlp/down/kernel",
    },
  ),
  keys=_KEYS | dict(rope_fraction="partial_rotary_factor"),
  defaults=_DEFAULTS | dict(rms_norm_eps=1e-5, partial_rotary_factor=1.0),
  windows="all",
)
DEEPSEEK_V3 = Family(
  architecture="DeepseekV3ForCausalLM",
  model_type="deepseek_v3",
  tensors=_tensors(
    _TOP,
    _NORMS
    | _OUT
    | _MLP
    | {
      "self_attn.q_proj.weight": "attn/query_up/kernel",
      "self_attn.q_a_proj.weight": "attn/query_down/kernel",
      "self_attn.q_a_layernorm.weight": "attn/query_norm/scale",
      "self_attn.q_b_proj.weight": "attn/query_up/kernel",
      "self_attn.kv_a_proj_with_mqa.weight": "attn/kv_down/kernel",
      "self_attn.kv_a_layernorm.weight": "attn/kv_norm/scale",
      "self_attn.kv_b_proj.weight": "attn/kv_up/kernel",
      "mlp.gate.weight": "mlp/router/kernel",
      "mlp.gate.e_score_correction_bias": "mlp/bias",
    }
    | {f"mlp.shared_experts.{w}_proj.weight": f"mlp/shared/{w}/kernel" for w in ("gate", "up", "down")}
    | _experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
  ),
  interleaved={
    "attn/query_up/kernel": ("heads", "nope_dim", "rope_dim"),
    "attn/kv_down/kernel": (1, "kv_rank", "rope_dim"),
  },
  fixed=dict(scoring="sigmoid"),
  keys={k: v for k, v in _KEYS.items() if k != "kv_heads"}
  | dict(query_rank="q_lora_rank", kv_rank="kv_lora_rank", nope_dim="qk_nope_head_dim", rope_dim="qk_rope_head_dim")
  | dict(value_dim="v_head_dim", experts="n_routed_experts", top_k="num_experts_per_tok")
  | dict(expert_dim="moe_intermediate_size", shared_experts="n_shared_experts", first_dense="first_k_dense_replace")
  | dict(normalize="norm_topk_prob", route_scale="routed_scaling_factor", groups="n_group", top_groups="topk_group"),
  defaults=_DEFAULTS,
  only=_PLAIN | dict(moe_layer_freq=(1, None), topk_method=("noaux_tc", None), scoring_func=("sigmoid", None)),
)
GPT2 = Family(
  architecture="GPT2LMHeadModel",
  model_type="gpt2",
  tensors=_tensors(
    {
      "transformer.wte.weight": "token_embed/embedding",
      "transformer.wpe.weight": "position_embed/embedding",
      "transformer.ln_f.weight": "norm/scale",
      "transformer.ln_f.bias": "norm/bias",
      "lm_head.weight": "head/embedding",
    },
    {
      "ln_1.weight": "norm1/scale",
      "ln_1.bias": "norm1/bias",
      "attn.c_attn.weight": ("attn/query/kernel", "attn/key/kernel", "attn/value/kernel"),
      "attn.c_attn.bias": ("attn/query/bias", "attn/key/bias", "attn/value/bias"),
      "attn.c_proj.weight": "attn/out/kernel",
      "attn.c_proj.bias": "attn/out/bias",
      "ln_2.weight": "norm2/scale",
      "ln_2.bias": "norm2/bias",
      "mlp.c_fc.weight": "mlp/up/kernel",
      "mlp.c_fc.bias": "mlp/up/bias",
      "mlp.c_proj.weight": "mlp/down/kernel",
      "mlp.c_proj.bias": "mlp/down/bias",
    },
    "transformer.h.{layer}.",
  ),
  prefix="transformer.",
  prefixes=("",),  # OpenAI's own files have no "transformer.".
  transposed=False,
  ignored=r".*\.attn\.(bias|masked_bias)",  # The causal mask.
  fixed=dict(norm="layer", bias="all", positions="learned", gated=False),
  keys=dict(vocab_size="vocab_size", context="n_positions", width="n_embd", depth="n_layer", heads="n_head")
  | dict(mlp_dim="n_inner", epsilon="layer_norm_epsilon", activation="activation_function", tied="tie_word_embeddings"),
  defaults=dict(layer_norm_epsilon=1e-5, activation_function="gelu_new", tie_word_embeddings=True),
  only=dict(scale_attn_by_inverse_layer_idx=(False, None), scale_attn_weights=(True, None)),
  rope=False,
)

_NORM = lambda there, here: {f"{there}.weight": f"{here}/scale", f"{there}.bias": f"{here}/bias"}
_DENSE = lambda there, here: {f"{there}.weight": f"{here}/kernel", f"{there}.bias": f"{here}/bias"}
BERT = Family(
  architecture="BertForMaskedLM",
  model_type="bert",
  model="bert",
  tensors=_tensors(
    {
      "bert.embeddings.word_embeddings.weight": "token_embed/embedding",
      "bert.embeddings.position_embeddings.weight": "position_embed/embedding",
      "bert.embeddings.token_type_embeddings.weight": "type_embed/embedding",
      **_NORM("bert.embeddings.LayerNorm", "embed_norm"),
      **_DENSE("bert.pooler.dense", "pooler"),
      **_DENSE("cls.predictions.transform.dense", "predict"),
      **_NORM("cls.predictions.transform.LayerNorm", "predict_norm"),
      "cls.predictions.bias": "predict_bias",
    },
    {
      **_DENSE("attention.self.query", "attn/query"),
      **_DENSE("attention.self.key", "attn/key"),
      **_DENSE("attention.self.value", "attn/value"),
      **_DENSE("attention.output.dense", "attn/out"),
      **_NORM("attention.output.LayerNorm", "norm1"),
      **_DENSE("intermediate.dense", "mlp/up"),
      **_DENSE("output.dense", "mlp/down"),
      **_NORM("output.LayerNorm", "norm2"),
    },
    "bert.encoder.layer.{layer}.",
  ),
  prefix="bert.",
  prefixes=("",),  # BertModel's own files have no "bert.".
  ignored=r".*embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)|cls\.seq_relationship\..*|bert\.pooler\..*",
  keys=dict(vocab_size="vocab_size", context="max_position_embeddings", width="hidden_size", depth="num_hidden_layers")
  | dict(heads="num_attention_heads", mlp_dim="intermediate_size", epsilon="layer_norm_eps", activation="hidden_act")
  | dict(types="type_vocab_size"),
  defaults=dict(layer_norm_eps=1e-12, hidden_act="gelu", type_vocab_size=2),
  only=dict(position_embedding_type=("absolute", None), is_decoder=(False, None), tie_word_embeddings=(True, None)),
  rope=False,
)
BERT_MODEL = dataclasses.replace(
  BERT,
  architecture="BertModel",
  ignored=r".*embeddings\.position_ids|cls\..*",
  tensors={n.removeprefix("bert."): leaf for n, leaf in BERT.tensors.items() if not n.startswith("cls.")},
  prefix="",
  prefixes=("bert.",),
)

# In this order one is looked for that can hold a model.
FAMILIES = {
  f.architecture: f
  for f in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, PHI3, MIXTRAL, QWEN3_MOE, DEEPSEEK_V3, GPT2)
  + (BERT, BERT_MODEL)
}
ALIASES = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM", "GPT2Model": "GPT2LMHeadModel"}
