"""Reads what in a published `config.json` takes more than a copy: rotary positions, windows, experts.

Each function takes the raw fields and gives the value of one field of `ModelConfig`. Raises `ConfigError` for what is
not known: it would change the result.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from model.config import RopeConfig
from model.errors import ConfigError

Raw = Mapping[str, Any]

ROPE_FIELDS = (
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "head_dim",
    "hidden_size", "num_attention_heads", "max_position_embeddings", "original_max_position_embeddings",
)  # fmt: skip
WINDOW_FIELDS = (
    "sliding_window", "use_sliding_window", "layer_types", "max_window_layers", "sliding_window_pattern",
    "_sliding_window_pattern", "num_hidden_layers",
)  # fmt: skip
EXPERT_FIELDS = ("num_experts", "num_local_experts", "decoder_sparse_step", "mlp_only_layers", "num_hidden_layers")

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
# The parameters that each rope type may come with, beside `rope_type`, `rope_theta` and `partial_rotary_factor`.
ROPE_TYPES: Mapping[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
    "longrope": {"short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"},
}  # fmt: skip


def activation(name: str, default: str) -> Callable[[Raw], str]:
    """The activation that their field `name` holds."""

    def read(raw: Raw) -> str:
        value = raw.get(name, default)
        if value not in ACTIVATIONS:
            raise ConfigError(f"{name} = {value!r} is not supported; {', '.join(ACTIVATIONS)} are")
        return ACTIVATIONS[value]

    return read


def rope(default_theta: float) -> Callable[[Raw], RopeConfig]:
    """Rotary positions of a model that has one kind of them, or of its full-attention layers."""

    def read(raw: Raw) -> RopeConfig:
        return _rope(raw, _rope_parameters(raw, "full_attention"), default_theta)

    return read


def local_rope(raw: Raw) -> RopeConfig | None:
    """Those of the windowed layers where they have their own (Gemma 3): never scaled."""
    if isinstance(raw.get("rope_parameters"), dict):
        parameters = raw["rope_parameters"].get("sliding_attention")
        return None if parameters is None else _rope(raw, dict(parameters), 10_000.0)
    return RopeConfig(theta=float(raw.get("rope_local_base_freq", 10_000.0)))


def max_positions(raw: Raw) -> int:
    """How long a sequence may become: dynamic and YaRN scaling go beyond what the model was published with.

    longrope has other frequencies beyond the original length, and a sequence that grows across that border would have
    to be computed anew: it is served up to there.
    """
    length = raw["max_position_embeddings"]
    parameters = _rope_parameters(raw, "full_attention")
    kind, factor, original = _rope_type(parameters), parameters.get("factor"), _original_length(raw, parameters)
    if kind == "dynamic":
        return int(length * factor)
    if kind == "yarn":
        return max(length, int(original * factor)) if factor else int(length)
    return min(length, original) if kind == "longrope" else int(length)


def _rope_parameters(raw: Raw, layer_type: str) -> dict[str, Any]:
    """One flat record: transformers 5 writes `rope_parameters`, earlier `rope_theta` and `rope_scaling` stood apart."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"rope_parameters must be an object, not {given!r}")
    given = given.get(layer_type) or ({} if "sliding_attention" in given else given)
    parameters = dict(given)
    for name in ("rope_theta", "partial_rotary_factor"):
        if raw.get(name) is not None:
            parameters.setdefault(name, raw[name])
    return parameters


def _rope_type(parameters: Raw) -> str:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "su":  # what Phi-3 first called it
        kind = "longrope"
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rope type {kind!r} is not supported; {', '.join(ROPE_TYPES)} are")
    return str(kind)


def _original_length(raw: Raw, parameters: Raw) -> int:
    given = parameters.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings")
    return int(given or raw["max_position_embeddings"])


def _rope(raw: Raw, parameters: dict[str, Any], default_theta: float) -> RopeConfig:
    kind = _rope_type(parameters)
    common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(set(parameters) - common - ROPE_TYPES[kind]):
        raise ConfigError(f"rope parameter {unknown[0]!r} is not known for rope type {kind!r}")
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    share = parameters.get("partial_rotary_factor", 1.0)
    values: dict[str, Any] = {
        "theta": float(parameters.get("rope_theta", default_theta)),
        "rotary_dim": None if share == 1.0 else int(head_dim * share),
    }
    if kind == "default":
        return RopeConfig(**values)
    original = _original_length(raw, parameters)
    if kind == "longrope":
        return RopeConfig(**values, scaling="longrope", **_longrope(raw, parameters, original))
    if "factor" not in parameters:
        raise ConfigError(f"rope type {kind!r} needs a factor")
    if kind == "dynamic":  # transformers measures from the published length, whatever the original one was
        original = raw["max_position_embeddings"]
    for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"):
        if parameters.get(name) is not None:
            values[name] = parameters[name]
    if kind == "yarn":
        values["attention_factor"] = _yarn_attention_factor(parameters)
    return RopeConfig(**values, scaling=kind, factor=parameters["factor"], original_length=original)  # type: ignore[arg-type]


def _yarn_attention_factor(parameters: Raw) -> float:
    """Peng et al. 2023, eq. 22, and DeepSeek's ratio of two such factors."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def factor(scale: float) -> float:
        return 1.0 if parameters["factor"] <= 1 else 0.1 * scale * math.log(parameters["factor"]) + 1.0

    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return factor(numerator) / factor(denominator) if numerator and denominator else factor(1.0)


def _longrope(raw: Raw, parameters: Raw, original: int) -> dict[str, Any]:
    """Up to the original length: the short factors, and the scale of a stretched context (Ding et al. 2024)."""
    stretch = raw["max_position_embeddings"] / original
    scale = parameters.get("attention_factor")
    if scale is None:
        scale = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    return {"frequency_divisors": tuple(parameters["short_factor"]), "attention_factor": scale}


def sliding_window(raw: Raw) -> int | None:
    """Their `sliding_window`, unless `use_sliding_window` or `layer_types` switch it off."""
    if raw.get("use_sliding_window") is False:
        return None
    types = raw.get("layer_types")
    if types is not None and "sliding_attention" not in types:
        return None
    window: int | None = raw.get("sliding_window")
    if types is not None and window is None:
        raise ConfigError("layer_types names sliding_attention layers, but there is no sliding_window")
    return window


def full_attention_layers(is_full: Callable[[int, Raw], bool]) -> Callable[[Raw], tuple[int, ...]]:
    """Layers without the window: as `layer_types` says, or, where it is not written, by the family's rule."""

    def read(raw: Raw) -> tuple[int, ...]:
        types = raw.get("layer_types")
        if sliding_window(raw) is None:
            return ()
        if types is None:
            return tuple(i for i in range(raw["num_hidden_layers"]) if is_full(i, raw))
        if strange := sorted(set(types) - {"full_attention", "sliding_attention"}):
            raise ConfigError(f"layer_types names {strange[0]!r}; full_attention and sliding_attention are known")
        if len(types) != raw["num_hidden_layers"]:
            raise ConfigError(f"layer_types names {len(types)} layers of {raw['num_hidden_layers']}")
        return tuple(i for i, kind in enumerate(types) if kind == "full_attention")

    return read


def layers_without_rope(raw: Raw) -> tuple[int, ...]:
    """SmolLM3: `no_rope_layers` holds 0 where there is none; left out, each `no_rope_layer_interval`-th has none."""
    flags = raw.get("no_rope_layers")
    if flags is None:
        interval = raw.get("no_rope_layer_interval", 4)
        return tuple(i for i in range(raw["num_hidden_layers"]) if (i + 1) % interval == 0)
    return tuple(i for i, has_rope in enumerate(flags) if not has_rope)


def own_rope(name: str) -> Callable[[Raw], RopeConfig | None]:
    """A `RopeConfig` as we write it ourselves."""

    def read(raw: Raw) -> RopeConfig | None:
        given = raw.get(name)
        return None if given is None else RopeConfig(**{key: _tupled(value) for key, value in given.items()})

    return read


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def num_experts(raw: Raw) -> int:
    """Under either of its names."""
    value = raw.get("num_experts", raw.get("num_local_experts"))
    if type(value) is not int:
        raise ConfigError(f"num_experts (or num_local_experts) must be a whole number, not {value!r}")
    return value


def dense_layers(raw: Raw) -> tuple[int, ...]:
    """Qwen3-MoE: layers named in `mlp_only_layers`, and those between the sparse steps."""
    step, named = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or ()
    return tuple(i for i in range(raw["num_hidden_layers"]) if i in named or (i + 1) % step)
