"""The `config.json` of models that people run: each is read as what it is, or refused with the right reason.

Fields that only say who wrote the file and when are left out.
"""

import json

import pytest

from model.config import RopeConfig
from model.directory import read_config
from model.errors import CheckpointError

pytestmark = pytest.mark.fast

LLAMA3_ROPE = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
PHI3_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
SMOLLM3_ROPE = [int((i + 1) % 4 != 0) for i in range(36)]

PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "use_cache": True, "vocab_size": 32000,
    },
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": 128256,
    },
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": 32000,
    },
    "Qwen/Qwen2.5-0.5B": {
        "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_mrope": False,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen/Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "google/gemma-2-2b": {
        "model_type": "gemma2", "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
        "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216, "max_position_embeddings": 8192,
        "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
        "torch_dtype": "float32", "use_cache": True, "vocab_size": 256000,
    },
    "google/gemma-3-1b-it": {
        "model_type": "gemma3_text", "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
        "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": 262144,
    },
    "microsoft/Phi-3-mini-4k-instruct": {
        "model_type": "phi3", "attention_bias": False, "attention_dropout": 0.0, "auto_map": PHI3_CODE,
        "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32064,
    },
    "microsoft/Phi-4-mini-instruct": {
        "model_type": "phi3", "attention_bias": False, "attention_dropout": 0.0, "auto_map": PHI3_CODE,
        "bos_token_id": 199999, "embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu",
        "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1,
        "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
        "pad_token_id": 199999, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": 200064,
    },
    "openai-community/gpt2": {
        "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256,
        "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0,
        "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers.js_config": {"dtype": "q4"},
        "use_cache": True, "vocab_size": 49152,
    },
    "HuggingFaceTB/SmolLM3-3B": {
        "model_type": "smollm3", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": None,
        "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
        "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": SMOLLM3_ROPE,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004,
        "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0,
        "sliding_window": None, "torch_dtype": "bfloat16", "use_cache": False, "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "allenai/OLMo-2-0425-1B": {
        "model_type": "olmo2", "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "num_attention_heads": 16, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": False,
        "vocab_size": 100352,
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        "model_type": "mixtral", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": 32000,
    },
}  # fmt: skip

MEANS = {
    "meta-llama/Llama-2-7b-hf": {"head_dim": 128, "rope": RopeConfig(theta=10_000.0), "sliding_window": None},
    "meta-llama/Llama-3.2-1B": {
        "rope": RopeConfig(theta=500_000.0, scaling="llama3", factor=32.0, original_length=8192),
        "max_position_embeddings": 131072,
    },
    "mistralai/Mistral-7B-v0.1": {"sliding_window": 4096, "full_attention_layers": ()},
    "Qwen/Qwen2.5-0.5B": {"sliding_window": None, "qkv_bias": True, "output_bias": False, "head_dim": 64},
    "Qwen/Qwen3-0.6B": {"head_dim": 128, "qk_norm": "head", "sliding_window": None, "qkv_bias": False},
    "Qwen/Qwen3-30B-A3B": {
        "num_experts": 128, "num_experts_per_token": 8, "normalize_expert_weights": True, "dense_layers": (),
    },
    "google/gemma-2-2b": {
        "full_attention_layers": tuple(range(1, 26, 2)), "sliding_window": 4096, "attention_scale": 1 / 16,
        "embedding_scale": 48.0, "tie_word_embeddings": True, "activation": "gelu_tanh",
    },
    "google/gemma-3-1b-it": {
        "full_attention_layers": (5, 11, 17, 23), "rope": RopeConfig(theta=1_000_000.0),
        "local_rope": RopeConfig(theta=10_000.0), "attention_soft_cap": None, "eos_token_ids": (1, 106),
    },
    "microsoft/Phi-3-mini-4k-instruct": {"sliding_window": 2047, "rope": RopeConfig(), "mlp_bias": False},
    "microsoft/Phi-4-mini-instruct": {"max_position_embeddings": 4096, "tie_word_embeddings": True},
    "openai-community/gpt2": {"learned_positions": True, "intermediate_size": 3072, "tie_word_embeddings": True},
    "HuggingFaceTB/SmolLM2-135M": {"head_dim": 64, "tie_word_embeddings": True},
    "HuggingFaceTB/SmolLM3-3B": {"layers_without_rope": tuple(range(3, 36, 4)), "tie_word_embeddings": True},
    "allenai/OLMo-2-0425-1B": {"norm_placement": "post", "qk_norm": "projection", "norm_eps": 1e-6},
    "mistralai/Mixtral-8x7B-v0.1": {"num_experts": 8, "sliding_window": None, "normalize_expert_weights": True},
}  # fmt: skip


def read(directory, raw):
    (directory / "config.json").write_text(json.dumps(raw))
    return read_config(directory)[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_what_it_is(tmp_path, name):
    config = read(tmp_path, PUBLISHED[name])
    assert {field: getattr(config, field) for field in MEANS[name]} == MEANS[name]


def test_phi_4_turns_three_quarters_of_a_head_and_scales_for_the_length_it_does_not_reach(tmp_path):
    rope = read(tmp_path, PUBLISHED["microsoft/Phi-4-mini-instruct"]).rope
    assert (rope.rotary_dim, len(rope.frequency_divisors)) == (96, 48)
    assert rope.attention_factor == pytest.approx(1.1902380714238083)


REFUSED = [
    ("Qwen/Qwen3-0.6B", {"model_type": "qwen3_next"}, "model_type 'qwen3_next' is not known; known are: attendant, "),
    ("google/gemma-3-1b-it", {"model_type": "gemma3"}, "model_type 'gemma3' is not known; known are: .*gemma3_text"),
    ("google/gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("google/gemma-3-1b-it", {"rope_parameters": {"rope_type": "default"}}, "must tell full_attention from sliding"),
    ("Qwen/Qwen3-0.6B", {"layer_types": ["linear_attention"] * 28}, "layer_types names 'linear_attention'"),
    ("Qwen/Qwen3-0.6B", {"layer_types": ["full_attention"] * 27}, "names 27 layers of 28"),
    ("Qwen/Qwen3-0.6B", {"layer_types": ["sliding_attention"] * 28}, "there is no sliding_window for them"),
    ("Qwen/Qwen2.5-0.5B", {"use_mrope": True}, "use_mrope = True is not supported"),
    ("mistralai/Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "'layer_types' is not known"),
    ("meta-llama/Llama-3.2-1B", {"rope_parameters": {"rope_type": "default"}}, "say different things"),
    ("meta-llama/Llama-3.2-1B", {"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' needs a factor"),
    ("meta-llama/Llama-3.2-1B", {"rope_scaling": {"rope_type": "proportional"}}, "rope type 'proportional'"),
    ("meta-llama/Llama-3.2-1B", {"rope_scaling": {"type": "linear", "factor": 2, "by": 3}}, "rope parameter 'by'"),
    ("meta-llama/Llama-3.2-1B", {"rope_scaling": {"full_attention": {}}}, "of each layer type are not known"),
    ("meta-llama/Llama-3.2-1B", {"rope_scaling": None, "partial_rotary_factor": 0.5}, "a partial_rotary_factor other"),
    ("meta-llama/Llama-3.2-1B", {"quantization_config": {"bits": 4}}, "'quantization_config' is not known"),
    ("meta-llama/Llama-3.2-1B", {"hidden_act": "relu2"}, "hidden_act = 'relu2' is not supported"),
    ("HuggingFaceTB/SmolLM2-135M", {"rope_interleaved": True}, "rope_interleaved = True is not supported"),
    ("HuggingFaceTB/SmolLM3-3B", {"no_rope_layers": [1, 1]}, "no_rope_layers names 2 layers of 36"),
    ("openai-community/gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("openai-community/gpt2", {"n_positions": ...}, "field 'n_positions' is missing"),
    ("microsoft/Phi-4-mini-instruct", {"lm_head_bias": True}, "lm_head_bias = True"),
    ("microsoft/Phi-4-mini-instruct", {"partial_rotary_factor": 0.5}, "longrope names 48 factors for 32 pairs"),
    ("mistralai/Mixtral-8x7B-v0.1", {"num_experts_per_tok": 9}, r"num_experts_per_token \(9\) exceeds num_experts"),
    ("mistralai/Mixtral-8x7B-v0.1", {"num_local_experts": "8"}, "must be a whole number"),
    ("allenai/OLMo-2-0425-1B", {"clip_qkv": 8.0}, "'clip_qkv' is not known and might change the result"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "words"), REFUSED)
def test_what_would_be_computed_wrongly_is_refused_by_name(tmp_path, name, changes, words):
    raw = PUBLISHED[name] | changes
    with pytest.raises(CheckpointError, match=words) as refusal:
        read(tmp_path, {field: value for field, value in raw.items() if value is not ...})
    assert str(refusal.value).startswith(str(tmp_path / "config.json"))
