"""Tiny random models of every family, in the shapes that tell its traits apart. `transformers` writes them itself."""

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

SHAPE: dict[str, object] = {
    "vocab_size": 320,
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
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [2.0, 3.0, 4.0, 6.0],
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

# Name of the case -> (config class, what differs from `SHAPE`).
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied, one kv head, odd sizes": (
        "LlamaConfig",
        {
            "tie_word_embeddings": True, "num_key_value_heads": 1, "hidden_size": 60, "intermediate_size": 77,
            "head_dim": 10,
        },
    ),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama, linear rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "llama, dynamic rope": (
        "LlamaConfig",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        },
    ),
    "llama, yarn rope": ("LlamaConfig", {"rope_parameters": YARN}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral, window": ("MistralConfig", {"sliding_window": 21}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, window on upper layers": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16,
         "norm_topk_prob": True, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 19, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 19, "query_pre_attn_scalar": 24,
                                    "num_hidden_layers": 7}),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.5, "sliding_window": 33}),
    "phi3, longrope": (
        "Phi3Config",
        {"partial_rotary_factor": 0.5, "rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    ),
    "gpt2": ("GPT2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "olmo2": ("Olmo2Config", {}),
}  # fmt: skip


def write(name: str, directory: Path, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Save the model of a case in `directory`, and return it."""
    config_class, differences = MODELS[name]
    shape = SHAPE | differences | changes
    if config_class == "GPT2Config":
        shape = {
            "vocab_size": 320, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "initializer_range": 0.12,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes,
        }  # fmt: skip
    config = getattr(transformers, config_class)(**shape)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # norms and biases start at 1 and 0: nothing would be seen of them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return model
