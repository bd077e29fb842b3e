"""Published decoder families as data: how a `config.json` and its weight names map onto ours.

To add a family is to add an entry to `FAMILIES` and its parity test. A field of a `config.json` that no list here names
is refused when the checkpoint is read: it might change the result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Fields of a config.json that say where it came from or how it was trained, never what it computes.
HARMLESS = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "chunk_size_feed_forward", "dtype", "id2label",
        "initializer_range", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
        "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "torch_dtype",
        "transformers_version", "use_cache",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """One published architecture.

    fields: our `ModelConfig` field -> their field; a tuple lists (their field, default when absent).
    only: their field -> the values that we compute; any other is refused.
    tensors: our parameter -> their tensors, stacked along the output dimension in this order; `{i}` is the layer.
    unused: tensors that old exporters left in the file and that nothing reads.
    """

    fields: Mapping[str, str | tuple[str, Any]]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tensors: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...] = ()


LLAMA = Family(
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "max_position_embeddings": ("max_position_embeddings", 2048),
        "rms_norm_eps": ("rms_norm_eps", 1e-6),
        "rope_theta": ("rope_theta", 10_000.0),
        "tie_word_embeddings": ("tie_word_embeddings", False),
    },
    only={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
    },
    tensors={
        "embedding": ("model.embed_tokens.weight",),
        "layers.{i}.attention_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
        "layers.{i}.qkv.weight": (
            "model.layers.{i}.self_attn.q_proj.weight",
            "model.layers.{i}.self_attn.k_proj.weight",
            "model.layers.{i}.self_attn.v_proj.weight",
        ),
        "layers.{i}.output.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
        "layers.{i}.mlp_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
        "layers.{i}.mlp.gate_up.weight": (
            "model.layers.{i}.mlp.gate_proj.weight",
            "model.layers.{i}.mlp.up_proj.weight",
        ),
        "layers.{i}.mlp.down.weight": ("model.layers.{i}.mlp.down_proj.weight",),
        "norm.weight": ("model.norm.weight",),
        "head.weight": ("lm_head.weight",),
    },
    unused=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
)

FAMILIES: Mapping[str, Family] = {"llama": LLAMA}
