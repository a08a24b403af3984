"""Published decoders, as arguments of `decoder.make`.

Sizes and options are those of the `config.json` that stands with the published weights at https://huggingface.co/, in
the repository named beside each; a test holds the number of parameters to that of the weights. What a family shares
stands once, above it.
"""

# https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf, table 2.
_GPT2 = dict(
  vocab_size=50257, context=1024, norm="layer", epsilon=1e-5, bias="all", positions="learned", gated=False,
  activation="gelu_tanh", tied=True,
)  # fmt: skip

# https://arxiv.org/abs/2307.09288, https://arxiv.org/abs/2407.21783
_LLAMA2 = dict(vocab_size=32000, context=4096, epsilon=1e-5)
_LLAMA3 = dict(vocab_size=128256, context=8192, epsilon=1e-5, rope_theta=500_000.0, kv_heads=8)
_LLAMA31 = _LLAMA3 | dict(context=131072, rope_scaling="llama3", rope_factor=8.0, rope_trained=8192)
_LLAMA32 = _LLAMA31 | dict(rope_factor=32.0, tied=True)
_LLAMA_8B = dict(width=4096, depth=32, heads=32, mlp_dim=14336)
_LLAMA_70B = dict(width=8192, depth=80, heads=64, mlp_dim=28672)

# https://arxiv.org/abs/2310.06825, https://arxiv.org/abs/2401.04088
_MISTRAL = dict(width=4096, depth=32, heads=32, kv_heads=8, mlp_dim=14336, context=32768, epsilon=1e-5)
_MIXTRAL = dict(vocab_size=32000, epsilon=1e-5, rope_theta=1e6, kv_heads=8, experts=8, top_k=2)

# https://arxiv.org/abs/2412.15115, https://arxiv.org/abs/2505.09388
_QWEN25 = dict(vocab_size=151936, context=32768, epsilon=1e-6, rope_theta=1e6, bias="qkv")
_QWEN25_BIG = _QWEN25 | dict(vocab_size=152064)
_QWEN25_LARGE = _QWEN25_BIG | dict(context=131072, epsilon=1e-5, kv_heads=8)
_QWEN3 = dict(vocab_size=151936, context=40960, epsilon=1e-6, rope_theta=1e6, qk_norm="head", head_dim=128)
_QWEN3_MOE = _QWEN3 | dict(experts=128, top_k=8)

# https://arxiv.org/abs/2408.00118, https://arxiv.org/abs/2503.19786
_GEMMA = dict(
  epsilon=1e-6, norm_place="sandwich", norm_offset=True, activation="gelu_tanh", tied=True, embed_scale=True
)
_GEMMA2 = _GEMMA | dict(
  vocab_size=256000, context=8192, window=4096, pattern="LG", softcap=50.0, logit_softcap=30.0, head_dim=256
)
_GEMMA3 = _GEMMA | dict(
  vocab_size=262208, context=131072, window=1024, pattern="LLLLLG", qk_norm="head", head_dim=256, rope_theta=1e6,
  local_theta=10_000.0, rope_scaling="linear", rope_factor=8.0,
)  # fmt: skip
_GEMMA3_SMALL = _GEMMA3 | dict(vocab_size=262144, context=32768, window=512, rope_scaling="none", rope_factor=1.0)

# https://arxiv.org/abs/2501.00656
_OLMO2 = dict(vocab_size=100352, context=4096, epsilon=1e-6, rope_theta=500_000.0, norm_place="post", qk_norm="all")

# https://arxiv.org/abs/2502.02737
_SMOLLM = dict(vocab_size=49152, context=2048, epsilon=1e-5, tied=True)
_SMOLLM2 = _SMOLLM | dict(context=8192, rope_theta=100_000.0)
_SMOLLM_135M = dict(width=576, depth=30, heads=9, kv_heads=3, mlp_dim=1536)
_SMOLLM_360M = dict(width=960, depth=32, heads=15, kv_heads=5, mlp_dim=2560)
_SMOLLM_1_7B = dict(width=2048, depth=24, heads=32, mlp_dim=8192)

# https://arxiv.org/abs/2404.14219
_PHI3 = dict(vocab_size=32064, context=4096, epsilon=1e-5, window=2047, pattern="L")

# https://arxiv.org/abs/2412.19437; context and YaRN as released. The balance loss is the paper's alpha.
_DEEPSEEK_V3 = dict(
  vocab_size=129280, context=163840, width=7168, depth=61, heads=128, mlp_dim=18432, epsilon=1e-6,
  query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128,
  rope_scaling="yarn", rope_factor=40.0, rope_trained=4096, rope_amplitude=1.0, rope_sharpen=1.0,
  experts=256, top_k=8, expert_dim=2048, shared_experts=1, first_dense=3, scoring="sigmoid", route_scale=2.5,
  groups=8, top_groups=4, bias_rate=0.001, balance_loss=1e-4,
)  # fmt: skip

VARIANTS = {
  "gpt2": _GPT2 | dict(width=768, depth=12, heads=12, mlp_dim=3072),  # openai-community/gpt2
  "gpt2-medium": _GPT2 | dict(width=1024, depth=24, heads=16, mlp_dim=4096),  # openai-community/gpt2-medium
  "gpt2-large": _GPT2 | dict(width=1280, depth=36, heads=20, mlp_dim=5120),  # openai-community/gpt2-large
  "gpt2-xl": _GPT2 | dict(width=1600, depth=48, heads=25, mlp_dim=6400),  # openai-community/gpt2-xl
  "llama2-7b": _LLAMA2 | dict(width=4096, depth=32, heads=32, mlp_dim=11008),  # meta-llama/Llama-2-7b-hf
  "llama2-13b": _LLAMA2 | dict(width=5120, depth=40, heads=40, mlp_dim=13824),  # meta-llama/Llama-2-13b-hf
  "llama2-70b": _LLAMA2 | _LLAMA_70B | dict(kv_heads=8),  # meta-llama/Llama-2-70b-hf
  "llama3-8b": _LLAMA3 | _LLAMA_8B,  # meta-llama/Meta-Llama-3-8B
  "llama3-70b": _LLAMA3 | _LLAMA_70B,  # meta-llama/Meta-Llama-3-70B
  "llama3.1-8b": _LLAMA31 | _LLAMA_8B,  # meta-llama/Llama-3.1-8B
  "llama3.1-70b": _LLAMA31 | _LLAMA_70B,  # meta-llama/Llama-3.1-70B
  "llama3.1-405b": _LLAMA31 | dict(width=16384, depth=126, heads=128, mlp_dim=53248),  # meta-llama/Llama-3.1-405B
  "llama3.2-1b": _LLAMA32 | dict(width=2048, depth=16, heads=32, mlp_dim=8192),  # meta-llama/Llama-3.2-1B
  "llama3.2-3b": _LLAMA32 | dict(width=3072, depth=28, heads=24, mlp_dim=8192),  # meta-llama/Llama-3.2-3B
  "llama3.3-70b": _LLAMA31 | _LLAMA_70B,  # meta-llama/Llama-3.3-70B-Instruct
  "mistral-7b": _MISTRAL | dict(vocab_size=32000, window=4096, pattern="L"),  # mistralai/Mistral-7B-v0.1
  "mistral-7b-v0.3": _MISTRAL | dict(vocab_size=32768, rope_theta=1e6),  # mistralai/Mistral-7B-v0.3
  # mistralai/Mixtral-8x7B-v0.1, mistralai/Mixtral-8x22B-v0.1
  "mixtral-8x7b": _MIXTRAL | dict(context=32768, width=4096, depth=32, heads=32, mlp_dim=14336),
  "mixtral-8x22b": _MIXTRAL | dict(context=65536, width=6144, depth=56, heads=48, mlp_dim=16384),
  # Qwen/Qwen2.5-0.5B to Qwen/Qwen2.5-72B
  "qwen2.5-0.5b": _QWEN25 | dict(width=896, depth=24, heads=14, kv_heads=2, mlp_dim=4864, tied=True),
  "qwen2.5-1.5b": _QWEN25 | dict(context=131072, width=1536, depth=28, heads=12, kv_heads=2, mlp_dim=8960, tied=True),
  "qwen2.5-3b": _QWEN25 | dict(width=2048, depth=36, heads=16, kv_heads=2, mlp_dim=11008, tied=True),
  "qwen2.5-7b": _QWEN25_BIG | dict(context=131072, width=3584, depth=28, heads=28, kv_heads=4, mlp_dim=18944),
  "qwen2.5-14b": _QWEN25_BIG
  | dict(context=131072, epsilon=1e-5, width=5120, depth=48, heads=40, kv_heads=8, mlp_dim=13824),
  "qwen2.5-32b": _QWEN25_BIG
  | dict(context=131072, epsilon=1e-5, width=5120, depth=64, heads=40, kv_heads=8, mlp_dim=27648),
  "qwen2.5-72b": _QWEN25_BIG
  | dict(context=131072, epsilon=1e-5, width=8192, depth=80, heads=64, kv_heads=8, mlp_dim=29568),
  # Qwen/Qwen3-0.6B to Qwen/Qwen3-235B-A22B
  "qwen3-0.6b": _QWEN3 | dict(width=1024, depth=28, heads=16, kv_heads=8, mlp_dim=3072, tied=True),
  "qwen3-1.7b": _QWEN3 | dict(width=2048, depth=28, heads=16, kv_heads=8, mlp_dim=6144, tied=True),
  "qwen3-4b": _QWEN3 | dict(width=2560, depth=36, heads=32, kv_heads=8, mlp_dim=9728, tied=True),
  "qwen3-8b": _QWEN3 | dict(width=4096, depth=36, heads=32, kv_heads=8, mlp_dim=12288),
  "qwen3-14b": _QWEN3 | dict(width=5120, depth=40, heads=40, kv_heads=8, mlp_dim=17408),
  "qwen3-32b": _QWEN3 | dict(width=5120, depth=64, heads=64, kv_heads=8, mlp_dim=25600),
  "qwen3-30b-a3b": _QWEN3_MOE | dict(width=2048, depth=48, heads=32, kv_heads=4, mlp_dim=768),
  "qwen3-235b-a22b": _QWEN3_MOE | dict(width=4096, depth=94, heads=64, kv_heads=4, mlp_dim=1536),
  # google/gemma-2-2b, -9b, -27b
  "gemma2-2b": _GEMMA2 | dict(width=2304, depth=26, heads=8, kv_heads=4, mlp_dim=9216),
  "gemma2-9b": _GEMMA2 | dict(width=3584, depth=42, heads=16, kv_heads=8, mlp_dim=14336),
  "gemma2-27b": _GEMMA2 | dict(width=4608, depth=46, heads=32, kv_heads=16, mlp_dim=36864, head_dim=128, scale_dim=144),
  # google/gemma-3-270m, -1b-pt, and the text part of -4b-pt, -12b-pt, -27b-pt
  "gemma3-270m": _GEMMA3_SMALL | dict(width=640, depth=18, heads=4, kv_heads=1, mlp_dim=2048),
  "gemma3-1b": _GEMMA3_SMALL | dict(width=1152, depth=26, heads=4, kv_heads=1, mlp_dim=6912),
  "gemma3-4b": _GEMMA3 | dict(width=2560, depth=34, heads=8, kv_heads=4, mlp_dim=10240),
  "gemma3-12b": _GEMMA3 | dict(width=3840, depth=48, heads=16, kv_heads=8, mlp_dim=15360),
  "gemma3-27b": _GEMMA3 | dict(width=5376, depth=62, heads=32, kv_heads=16, mlp_dim=21504, head_dim=128, scale_dim=168),
  # allenai/OLMo-2-0425-1B, OLMo-2-1124-7B, OLMo-2-1124-13B, OLMo-2-0325-32B
  "olmo2-1b": _OLMO2 | dict(width=2048, depth=16, heads=16, mlp_dim=8192),
  "olmo2-7b": _OLMO2 | dict(width=4096, depth=32, heads=32, mlp_dim=11008),
  "olmo2-13b": _OLMO2 | dict(width=5120, depth=40, heads=40, mlp_dim=13824),
  "olmo2-32b": _OLMO2 | dict(width=5120, depth=64, heads=40, kv_heads=8, mlp_dim=27648),
  # HuggingFaceTB/SmolLM-135M, -360M, -1.7B; HuggingFaceTB/SmolLM2-135M, -360M, -1.7B
  "smollm-135m": _SMOLLM | _SMOLLM_135M,
  "smollm-360m": _SMOLLM | _SMOLLM_360M,
  "smollm-1.7b": _SMOLLM | _SMOLLM_1_7B,
  "smollm2-135m": _SMOLLM2 | _SMOLLM_135M,
  "smollm2-360m": _SMOLLM2 | _SMOLLM_360M,
  "smollm2-1.7b": _SMOLLM2 | _SMOLLM_1_7B | dict(rope_theta=130_000.0),
  # microsoft/Phi-3-mini-4k-instruct, microsoft/Phi-3-medium-4k-instruct
  "phi3-mini": _PHI3 | dict(width=3072, depth=32, heads=32, mlp_dim=8192),
  "phi3-medium": _PHI3 | dict(width=5120, depth=40, heads=40, kv_heads=10, mlp_dim=17920),
  "deepseek-v3": _DEEPSEEK_V3,  # deepseek-ai/DeepSeek-V3
}
