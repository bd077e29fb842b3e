"""Tiny random models of every family, in the shapes that tell its traits apart. `transformers` writes them itself."""

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB_SIZE = 320
SHAPE: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What GPT-2 calls the same; it has no fewer key/value heads than query heads.
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def rope(rope_type: str, **parameters: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **parameters}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
}
GEMMA = {"head_dim": 16, "sliding_window": 19, "query_pre_attn_scalar": 24}
MOE = {
    "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16, "norm_topk_prob": True,
}  # fmt: skip
PHI = {"partial_rotary_factor": 0.5}
WINDOWS_ON_ALL = {"use_sliding_window": True, "sliding_window": 17}

# Name of the family -> (config class, what its plainest model differs in from `SHAPE`).
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3_moe": ("Qwen3MoeConfig", MOE),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 7}),
    "phi3": ("Phi3Config", PHI),
    "gpt2": ("GPT2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "olmo2": ("Olmo2Config", {"initializer_range": 0.3}),
}

# Name of the case, which begins with its family -> what differs from the family's plainest model.
TRAITS: dict[str, dict[str, object]] = {
    "llama, one kv head, odd sizes": {
        "num_key_value_heads": 1, "hidden_size": 60, "intermediate_size": 77, "head_dim": 10,
    },
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, llama3 rope": LLAMA3,
    "llama, linear rope": rope("linear", factor=4.0),
    "llama, dynamic rope": {**rope("dynamic", factor=4.0), "max_position_embeddings": 64},
    "llama, yarn rope": rope("yarn", **YARN),
    "llama, yarn rope, attention factor": rope("yarn", **YARN, attention_factor=1.3, beta_fast=16.0, beta_slow=2.0),
    "llama, yarn rope, mscale": rope("yarn", **YARN, mscale=0.8, mscale_all_dim=0.4),
    "llama, yarn rope, not truncated": rope("yarn", **YARN, truncate=False),
    "llama, gelu": {"hidden_act": "gelu"},
    "mistral, window": {"sliding_window": 21},
    "mistral, window of one block, own head_dim": {"sliding_window": 4, "head_dim": 24},
    "mixtral, window": {"sliding_window": 21},
    "mixtral, one expert": {"num_experts_per_tok": 1},
    "qwen2, window on upper layers": {**WINDOWS_ON_ALL, "max_window_layers": 2},
    "qwen2, yarn rope": rope("yarn", **YARN),
    "qwen3, biases": {"attention_bias": True},
    "qwen3, window on chosen layers": {
        **WINDOWS_ON_ALL,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    },
    "qwen3_moe, one layer dense": {"mlp_only_layers": [1]},
    "qwen3_moe, every second layer dense": {"decoder_sparse_step": 2},
    "qwen3_moe, weights not normalized": {"norm_topk_prob": False},
    "qwen3_moe, window on all layers": {**WINDOWS_ON_ALL, "max_window_layers": 2},
    "gemma2, no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2, tight caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "gemma2, biases": {"attention_bias": True},
    "gemma3, linear rope on global layers": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
        },
    },
    "gemma3, every third layer global": {"sliding_window_pattern": 3},
    "phi3, whole heads turn, window": {"partial_rotary_factor": 1.0, "sliding_window": 33},
    "phi3, longrope": {**rope("longrope", **LONGROPE), "original_max_position_embeddings": 128},
    "phi3, longrope with its own scale": {
        **rope("longrope", **LONGROPE, attention_factor=1.4), "original_max_position_embeddings": 128,
    },
    "gpt2, wide": {"n_inner": 100},
    "gpt2, exact gelu": {"activation_function": "gelu"},
    "smollm3, chosen layers without rope": {"no_rope_layers": [0, 1, 1, 0]},
    "smollm3, window where there is no rope": {**WINDOWS_ON_ALL, "no_rope_layer_interval": 2},
    "olmo2, biases": {"attention_bias": True},
}  # fmt: skip

# Each family again with the other kind of head, and with other counts of heads, layers and channels.
TIED_BY_DEFAULT = {"gemma2", "gemma3", "gpt2", "smollm3"}
ONE_KV_HEAD = {"num_key_value_heads": 1}
ALL_KV_HEADS = {
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 6, "vocab_size": 257,
}  # fmt: skip
VARIANTS: dict[str, dict[str, object]] = {
    f"{family}, {name}": changes
    for family in FAMILIES
    for name, changes in (
        ("untied" if family in TIED_BY_DEFAULT else "tied", {"tie_word_embeddings": family not in TIED_BY_DEFAULT}),
        ("one kv head", ONE_KV_HEAD),
        ("all kv heads", ALL_KV_HEADS),
    )
    if family != "gpt2" or "num_key_value_heads" not in changes or name == "all kv heads"
}

CASES: dict[str, dict[str, object]] = {**{family: {} for family in FAMILIES}, **TRAITS, **VARIANTS}


def build(case: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """The model of a case, in fp32, with attention as `transformers` spells it out."""
    config_class, differences = FAMILIES[case.split(",")[0]]
    shape = SHAPE | differences | CASES[case] | changes
    if config_class == "GPT2Config":
        if "n_inner" not in shape:
            del shape["intermediate_size"]
        shape = {GPT2_NAMES.get(name, name): value for name, value in shape.items() if name != "num_key_value_heads"}
    config = getattr(transformers, config_class)(**shape)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases start at 1 and 0: nothing would be seen of them
                parameter.add_(torch.randn_like(parameter) * (0.1 if name.endswith("bias") else 0.2))
                if ".post_" in name:  # what bounds how far a layer moves a token from where it was
                    parameter.add_(2.0)
            elif ".layers." in name or ".h." in name:  # or else a token is mostly followed by itself
                parameter.mul_(2.0)
    return model


def write(case: str, directory: Path, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Save the model of a case in `directory`, and return it."""
    model = build(case, seed=seed, **changes)
    model.save_pretrained(directory)
    return model
