"""Published decoder families as data: how a `config.json` and its weight names map onto ours.

To add a family is to add an entry to `FAMILIES` and its parity test. A field of a `config.json` that nothing here names
is refused when the checkpoint is read: it might change the result.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from model import config_json as read
from model.config import ModelConfig


@dataclass(frozen=True)
class Derived:
    """A field of ours that takes more than a copy: computed from those of theirs that it reads."""

    reads: tuple[str, ...]
    compute: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One published architecture.

    title, traits: for people.
    fields: our `ModelConfig` field -> their field; a tuple lists (their field, default when absent).
    fixed: our field -> the value that every model of the family has.
    only: their field -> the values that we compute; any other is refused.
    tensors: our parameter -> their tensors, stacked along the output dimension in this order; `{i}` is the layer,
        `{e}` the expert. A parameter that is not named here has their name and ours alike.
    transposed: endings of their tensors that are stored [in_features, out_features].
    norm_offset: added to the weights of all norms (Gemma stores weight - 1).
    prefix: what their names begin with, and what old exporters left out.
    unused: tensors that old exporters left in the file and that nothing reads.
    """

    title: str
    traits: str
    fields: Mapping[str, str | tuple[str, Any] | Derived]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tensors: Mapping[str, tuple[str, ...]]
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0
    prefix: str = ""
    unused: tuple[str, ...] = ()

    def relative(self, **changes: Any) -> "Family":
        """Another family: where it says something new about a mapping it extends ours, anything else replaces it."""
        merged: dict[str, Any] = {
            name: {**getattr(self, name), **value} if isinstance(value, Mapping) else value
            for name, value in changes.items()
        }
        return replace(self, **merged)

    def tensor_names(self, parameter: str) -> tuple[str, ...]:
        """The tensors that one of our parameters is stacked from: `layers.3.qkv.weight` -> q, k and v of layer 3."""
        numbers: dict[str, str] = {}
        pattern = parameter
        for sign, before in (("i", "layers"), ("e", "experts")):
            if found := re.search(rf"\b{before}\.(\d+)", pattern):
                numbers[sign] = found[1]
                pattern = pattern.replace(found[0], f"{before}.{{{sign}}}", 1)
        return tuple(name.format(**numbers) for name in self.tensors.get(pattern, (parameter,)))


def _projections(layer: str, ending: str) -> dict[str, tuple[str, ...]]:
    """The linear maps of a layer, their weights or their biases, as most families name them."""
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    return {
        f"layers.{{i}}.qkv.{ending}": tuple(f"{attention}.{part}_proj.{ending}" for part in "qkv"),
        f"layers.{{i}}.output.{ending}": (f"{attention}.o_proj.{ending}",),
        f"layers.{{i}}.mlp.gate_up.{ending}": (f"{mlp}.gate_proj.{ending}", f"{mlp}.up_proj.{ending}"),
        f"layers.{{i}}.mlp.down.{ending}": (f"{mlp}.down_proj.{ending}",),
    }


def _experts(block: str, gate: str, up: str, down: str) -> dict[str, tuple[str, ...]]:
    """A layer's router and the linear maps of its experts, which a family calls so."""
    expert = f"{block}.experts.{{e}}"
    return {
        "layers.{i}.mlp.router": (f"{block}.gate.weight",),
        "layers.{i}.mlp.experts.{e}.gate_up.weight": (f"{expert}.{gate}.weight", f"{expert}.{up}.weight"),
        "layers.{i}.mlp.experts.{e}.down.weight": (f"{expert}.{down}.weight",),
    }


_LAYER = "model.layers.{i}"

LLAMA = Family(
    title="Llama 2, 3, 3.1, 3.2; SmolLM2",
    traits="grouped-query heads; RoPE plain or scaled (linear, dynamic, llama3, YaRN)",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "max_position_embeddings": Derived(read.ROPE_FIELDS, read.max_positions),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "rope": Derived(read.ROPE_FIELDS, read.rope(10_000.0)),
        "activation": Derived(("hidden_act",), read.activation("hidden_act", "silu")),
        "qkv_bias": ("attention_bias", False),
        "output_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "tie_word_embeddings": ("tie_word_embeddings", False),
    },
    tensors={
        "embedding": ("model.embed_tokens.weight",),
        "layers.{i}.attention_norm.weight": (f"{_LAYER}.input_layernorm.weight",),
        "layers.{i}.mlp_norm.weight": (f"{_LAYER}.post_attention_layernorm.weight",),
        **_projections(_LAYER, "weight"),
        **_projections(_LAYER, "bias"),
        "layers.{i}.q_norm.weight": (f"{_LAYER}.self_attn.q_norm.weight",),
        "layers.{i}.k_norm.weight": (f"{_LAYER}.self_attn.k_norm.weight",),
        "norm.weight": ("model.norm.weight",),
        "head.weight": ("lm_head.weight",),
    },
    only={"rope_interleaved": (False,)},
    unused=(f"{_LAYER}.self_attn.rotary_emb.inv_freq",),
)


def _windowed(
    *,
    default: int | None,
    switched: bool = False,
    is_full: Callable[[int, Mapping[str, Any]], bool] | None = None,
    reads: tuple[str, ...] = (),
) -> dict[str, Derived]:
    """Windows of `default` tokens, if nothing else is written, in the layers that neither `layer_types` nor `is_full`
    frees from them. Without `is_full`: in all layers. The fields that `is_full` looks at are its `reads`.
    """
    window = read.sliding_window(default, switched=switched)
    switch = ("use_sliding_window",) if switched else ()
    found = {"sliding_window": Derived(("sliding_window", *switch, *reads), window)}
    if is_full is not None:
        typed = ("layer_types", "num_hidden_layers", *reads)
        found["full_attention_layers"] = Derived(typed, read.full_attention_layers(window, is_full))
    return found


_FROM_A_LAYER_ON = _windowed(
    default=4096,
    switched=True,
    is_full=lambda i, raw: i < raw.get("max_window_layers", 28),
    reads=("max_window_layers",),
)

_MISTRAL = LLAMA.relative(
    title="Mistral",
    traits="sliding window",
    fields={**_windowed(default=4096), "num_kv_heads": "num_key_value_heads"},
)

_QWEN2 = LLAMA.relative(
    title="Qwen2, Qwen2.5",
    traits="biases on queries, keys and values",
    fields={**_FROM_A_LAYER_ON, "num_kv_heads": "num_key_value_heads"},
    fixed={"qkv_bias": True},
    only={"use_mrope": (False,)},
)

_QWEN3_HEADS = {"num_kv_heads": "num_key_value_heads", "head_dim": ("head_dim", 128)}
_QWEN3 = LLAMA.relative(
    title="Qwen3",
    traits="RMSNorm on each head's query and key",
    fields={**_FROM_A_LAYER_ON, **_QWEN3_HEADS},
    fixed={"qk_norm": "head"},
)

_GEMMA2 = LLAMA.relative(
    title="Gemma 2",
    traits="soft-capped scores and logits; norms before and after; windows on every second layer; scaled embeddings",
    fields={
        **_windowed(default=4096, is_full=lambda i, raw: i % 2 == 1),
        "num_kv_heads": "num_key_value_heads",
        "head_dim": ("head_dim", 256),
        "activation": Derived(("hidden_activation",), read.activation("hidden_activation", "gelu_pytorch_tanh")),
        "attention_scale": Derived(
            ("query_pre_attn_scalar",), lambda raw: 1 / math.sqrt(raw.get("query_pre_attn_scalar", 256))
        ),
        "attention_soft_cap": ("attn_logit_softcapping", 50.0),
        "logit_soft_cap": ("final_logit_softcapping", 30.0),
        "embedding_scale": Derived(("hidden_size",), lambda raw: math.sqrt(raw["hidden_size"])),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    },
    fixed={"norm_placement": "both"},
    # `hidden_act` is what Gemma's first release wrote for the same activation; `hidden_activation` is what counts.
    only={"use_bidirectional_attention": (None, False), "hidden_act": ("gelu_pytorch_tanh",)},
    tensors={
        "layers.{i}.attention_post_norm.weight": (f"{_LAYER}.post_attention_layernorm.weight",),
        "layers.{i}.mlp_norm.weight": (f"{_LAYER}.pre_feedforward_layernorm.weight",),
        "layers.{i}.mlp_post_norm.weight": (f"{_LAYER}.post_feedforward_layernorm.weight",),
    },
    norm_offset=1.0,
)

_GEMMA3 = _GEMMA2.relative(
    title="Gemma 3 (text)",
    traits="as Gemma 2, with RMSNorm on queries and keys, five windowed layers of six, and a RoPE of their own",
    fields={
        **_windowed(
            default=4096,
            is_full=lambda i, raw: (i + 1) % raw.get("sliding_window_pattern", 6) == 0,
            reads=("sliding_window_pattern", "_sliding_window_pattern"),
        ),
        "rope": Derived(read.ROPE_FIELDS, read.rope_of("full_attention", "rope_theta", 1_000_000.0)),
        "local_rope": Derived(
            ("rope_local_base_freq", *read.ROPE_FIELDS),
            read.rope_of("sliding_attention", "rope_local_base_freq", 10_000.0),
        ),
        "attention_soft_cap": ("attn_logit_softcapping", None),
        "logit_soft_cap": ("final_logit_softcapping", None),
    },
    fixed={"qk_norm": "head"},
)

_PHI3 = LLAMA.relative(
    title="Phi-3, Phi-4",
    traits="fused weights; partial rotary; longrope up to the original length",
    fields={
        **_windowed(default=None),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "rope": Derived(read.ROPE_FIELDS, read.rope(10_000.0, partial=True)),
    },
    tensors={
        "layers.{i}.qkv.weight": (f"{_LAYER}.self_attn.qkv_proj.weight",),
        "layers.{i}.mlp.gate_up.weight": (f"{_LAYER}.mlp.gate_up_proj.weight",),
    },
    # The last three are written by Phi-4-mini and read by nothing; at these values nothing is what they stand for.
    only={"attention_bias": (False,), "full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,)},
)

_BLOCK = "transformer.h.{i}"
_GPT2 = Family(
    title="GPT-2",
    traits="learned positions; LayerNorm; GELU; biases everywhere; Conv1D weights",
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "intermediate_size": Derived(("n_inner", "n_embd"), lambda raw: raw.get("n_inner") or 4 * raw["n_embd"]),
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "num_kv_heads": "n_head",
        "head_dim": Derived(("n_embd", "n_head"), lambda raw: raw["n_embd"] // raw["n_head"]),
        "max_position_embeddings": Derived(("n_positions", "n_ctx"), lambda raw: raw["n_positions"]),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "activation": Derived(("activation_function",), read.activation("activation_function", "gelu_new")),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    },
    fixed={
        "rope": None,
        "learned_positions": True,
        "norm": "layer",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
    },
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    tensors={
        "embedding": ("transformer.wte.weight",),
        "position_embedding": ("transformer.wpe.weight",),
        **{
            f"layers.{{i}}.{ours}.{ending}": (f"{_BLOCK}.{theirs}.{ending}",)
            for ending in ("weight", "bias")
            for ours, theirs in {
                "attention_norm": "ln_1",
                "qkv": "attn.c_attn",
                "output": "attn.c_proj",
                "mlp_norm": "ln_2",
                "mlp.gate_up": "mlp.c_fc",
                "mlp.down": "mlp.c_proj",
            }.items()
        },
        "norm.weight": ("transformer.ln_f.weight",),
        "norm.bias": ("transformer.ln_f.bias",),
        "head.weight": ("lm_head.weight",),
    },
    transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    prefix="transformer.",
    unused=(f"{_BLOCK}.attn.bias", f"{_BLOCK}.attn.masked_bias"),
)

_NO_ROPE = ("no_rope_layers", "no_rope_layer_interval")
_SMOLLM3 = LLAMA.relative(
    title="SmolLM3",
    traits="every fourth layer without RoPE",
    fields={
        **_windowed(
            default=None,
            switched=True,
            is_full=lambda i, raw: i not in read.layers_without_rope(raw),
            reads=(*_NO_ROPE, "max_window_layers"),
        ),
        "num_kv_heads": "num_key_value_heads",
        "rope": Derived(read.ROPE_FIELDS, read.rope(2_000_000.0)),
        "layers_without_rope": Derived((*_NO_ROPE, "num_hidden_layers"), read.layers_without_rope),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    },
)

_OLMO2 = LLAMA.relative(
    title="OLMo 2",
    traits="norms after attention and MLP; RMSNorm on whole queries and keys",
    fields={"norm_eps": ("rms_norm_eps", 1e-5)},
    fixed={"norm_placement": "post", "qk_norm": "projection"},
    tensors={
        "layers.{i}.attention_post_norm.weight": (f"{_LAYER}.post_attention_layernorm.weight",),
        "layers.{i}.mlp_post_norm.weight": (f"{_LAYER}.post_feedforward_layernorm.weight",),
    },
)

_MIXTRAL = _MISTRAL.relative(
    title="Mixtral",
    traits="mixture of experts",
    fields={
        **_windowed(default=None),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "rope": Derived(read.ROPE_FIELDS, read.rope(1_000_000.0)),
        "num_experts": Derived(read.EXPERT_FIELDS, read.num_experts),
        "num_experts_per_token": ("num_experts_per_tok", 2),
        "expert_intermediate_size": "intermediate_size",
    },
    tensors=_experts(f"{_LAYER}.block_sparse_moe", "w1", "w3", "w2"),
)

_QWEN3_MOE = LLAMA.relative(
    title="Qwen3-MoE",
    traits="mixture of experts; RMSNorm on each head's query and key",
    fields={
        **_QWEN3_HEADS,
        # Its layers are windowed together or not at all, whatever `max_window_layers` says.
        **_windowed(default=4096, switched=True, reads=("max_window_layers",)),
        "num_experts": Derived(read.EXPERT_FIELDS, read.num_experts),
        "num_experts_per_token": ("num_experts_per_tok", 8),
        "expert_intermediate_size": "moe_intermediate_size",
        "normalize_expert_weights": ("norm_topk_prob", False),
        "dense_layers": Derived(read.EXPERT_FIELDS, read.dense_layers),
    },
    fixed={"qk_norm": "head"},
    tensors=_experts(f"{_LAYER}.mlp", "gate_proj", "up_proj", "down_proj"),
)

# What no published family can say: the other score functions, sinks, any mixture of our own options.
ATTENDANT = Family(
    title="Attendant's own",
    traits="every field of `ModelConfig`: multiplicative and additive scores, attention sinks, any mixture of options",
    fields={
        **{
            own.name: own.name if own.default is MISSING else (own.name, own.default)
            for own in fields(ModelConfig)
            if own.name not in ("bos_token_id", "eos_token_ids")
        },
        **{name: Derived((name,), read.own_rope(name)) for name in ("rope", "local_rope")},
    },
    tensors={},
)

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "mistral": _MISTRAL,
    "mixtral": _MIXTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "smollm3": _SMOLLM3,
    "olmo2": _OLMO2,
    "attendant": ATTENDANT,
}


def table() -> str:
    """The families as a table in Markdown, for people."""
    rows = [f"| {family.title} | `{name}` | {family.traits} |" for name, family in FAMILIES.items()]
    return "\n".join(["| family | `model_type` | what it adds |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
