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
    "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "head_dim", "hidden_size",
    "num_attention_heads", "max_position_embeddings", "original_max_position_embeddings",
)  # fmt: skip
EXPERT_FIELDS = ("num_experts", "num_local_experts", "decoder_sparse_step", "mlp_only_layers", "num_hidden_layers")
LAYER_TYPES = {"full_attention", "sliding_attention"}

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
# What the parameters of each rope type must hold, and what they may, beside what `_COMMON_ROPE` names.
ROPE_TYPES: Mapping[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "truncate",
        },
    ),
    "longrope": (
        {"short_factor", "long_factor"}, {"factor", "attention_factor", "original_max_position_embeddings"}
    ),
}  # fmt: skip
_COMMON_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def activation(name: str, default: str) -> Callable[[Raw], str]:
    """The activation that their field `name` holds."""

    def read(raw: Raw) -> str:
        value = raw.get(name, default)
        if value not in ACTIVATIONS:
            raise ConfigError(f"{name} = {value!r} is not supported; {', '.join(ACTIVATIONS)} are")
        return ACTIVATIONS[value]

    return read


def rope(default_theta: float, *, partial: bool = False) -> Callable[[Raw], RopeConfig]:
    """Rotary positions of a family that has one kind of them. `partial`: not all dimensions of a head need turn."""

    def read(raw: Raw) -> RopeConfig:
        given = _given_rope(raw)
        if LAYER_TYPES & set(given):
            raise ConfigError("rope parameters of each layer type are not known for this model_type")
        config = _rope(raw, given, "rope_theta", default_theta)
        if config.rotary_dim is not None and not partial:
            raise ConfigError("a partial_rotary_factor other than 1 is not known for this model_type")
        return config

    return read


def rope_of(layer_type: str, theta_field: str, default_theta: float) -> Callable[[Raw], RopeConfig]:
    """Those of one type of layer, in a family where each type has its own (Gemma 3)."""

    def read(raw: Raw) -> RopeConfig:
        if raw.get("rope_parameters") and not LAYER_TYPES & set(_given_rope(raw)):
            raise ConfigError("rope_parameters must tell full_attention from sliding_attention")
        return _rope(raw, _rope_parameters(raw, layer_type), theta_field, default_theta)

    return read


def max_positions(raw: Raw) -> int:
    """How long a sequence may become: dynamic and YaRN scaling go beyond what the model was published with.

    longrope has other frequencies beyond the original length, and a sequence that grows across that border would have
    to be computed anew: it is served up to there.
    """
    length: int = raw["max_position_embeddings"]
    parameters = _rope_parameters(raw, "full_attention")
    kind, factor = _rope_type(parameters), parameters.get("factor")
    if kind == "dynamic" and factor:
        return int(length * factor)
    if kind == "yarn" and factor:
        return max(length, int(_original_length(raw, parameters) * factor))
    return min(length, _original_length(raw, parameters)) if kind == "longrope" else length


def _given_rope(raw: Raw) -> dict[str, Any]:
    """What transformers 5 writes as `rope_parameters` and earlier versions wrote as `rope_scaling`."""
    given = [raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name) is not None]
    if any(not isinstance(one, dict) for one in given):
        raise ConfigError(f"rope_parameters must be an object, not {given[0]!r}")
    if len(given) == 2 and given[0] != given[1]:
        raise ConfigError("rope_parameters and rope_scaling say different things")
    return given[0] if given else {}


def _rope_parameters(raw: Raw, layer_type: str) -> dict[str, Any]:
    """The parameters of one type of layer. Where types are not told apart, they are those of full attention."""
    given = _given_rope(raw)
    if LAYER_TYPES & set(given):
        return given.get(layer_type) or {}
    return given if layer_type == "full_attention" else {}


def _rope_type(parameters: Raw) -> str:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "su":  # what Phi-3 first called it
        kind = "longrope"
    if kind not in ROPE_TYPES:
        raise ConfigError(f"rope type {kind!r} is not supported; {', '.join(ROPE_TYPES)} are")
    return str(kind)


def _original_length(raw: Raw, parameters: Raw) -> int:
    """Phi-3 writes it beside the parameters, and that counts more than what stands among them."""
    given = raw.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    return int(given or raw["max_position_embeddings"])


def _rope(raw: Raw, parameters: Raw, theta_field: str, default_theta: float) -> RopeConfig:
    kind = _rope_type(parameters)
    needed, optional = ROPE_TYPES[kind]
    if unknown := sorted(set(parameters) - _COMMON_ROPE - needed - optional):
        raise ConfigError(f"rope parameter {unknown[0]!r} is not known for rope type {kind!r}")
    if missing := sorted(needed - set(parameters)):
        raise ConfigError(f"rope type {kind!r} needs a {missing[0]}")
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    share = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0
    values: dict[str, Any] = {
        "theta": float(parameters.get("rope_theta") or raw.get(theta_field) or default_theta),
        "rotary_dim": None if share == 1.0 else int(head_dim * share),
    }
    if kind == "default":
        return RopeConfig(**values)
    original = _original_length(raw, parameters)
    if kind == "longrope":
        return RopeConfig(**values, scaling="longrope", **_longrope(raw, parameters, original))
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
    stretch = parameters.get("factor") or raw["max_position_embeddings"] / original
    scale = parameters.get("attention_factor")
    if scale is None:
        scale = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    return {"frequency_divisors": tuple(parameters["short_factor"]), "attention_factor": scale}


def sliding_window(default: int | None, *, switched: bool = False) -> Callable[[Raw], int | None]:
    """How far a windowed layer sees. `switched`: there are such layers only where `use_sliding_window` is true."""

    def read(raw: Raw) -> int | None:
        if switched and not raw.get("use_sliding_window"):
            return None
        window: int | None = raw.get("sliding_window", default)
        return window

    return read


def full_attention_layers(
    window: Callable[[Raw], int | None], is_full: Callable[[int, Raw], bool]
) -> Callable[[Raw], tuple[int, ...]]:
    """Layers without the window: as `layer_types` says, or, where it is not written, by the family's rule."""

    def read(raw: Raw) -> tuple[int, ...]:
        types = raw.get("layer_types")
        if types is None:
            return () if window(raw) is None else tuple(i for i in _layers(raw) if is_full(i, raw))
        if strange := sorted(set(types) - LAYER_TYPES):
            raise ConfigError(f"layer_types names {strange[0]!r}; {' and '.join(sorted(LAYER_TYPES))} are known")
        if len(types) != raw["num_hidden_layers"]:
            raise ConfigError(f"layer_types names {len(types)} layers of {raw['num_hidden_layers']}")
        if window(raw) is not None:
            return tuple(i for i, kind in enumerate(types) if kind == "full_attention")
        if "sliding_attention" in types:
            raise ConfigError("layer_types names sliding_attention layers, but there is no sliding_window for them")
        return ()

    return read


def layers_without_rope(raw: Raw) -> tuple[int, ...]:
    """SmolLM3: `no_rope_layers` holds 0 where there is none; left out, each `no_rope_layer_interval`-th has none."""
    flags = raw.get("no_rope_layers")
    if flags is None:
        interval = raw.get("no_rope_layer_interval", 4)
        return tuple(i for i in _layers(raw) if (i + 1) % interval == 0)
    if len(flags) < raw["num_hidden_layers"]:
        raise ConfigError(f"no_rope_layers names {len(flags)} layers of {raw['num_hidden_layers']}")
    return tuple(i for i in _layers(raw) if not flags[i])


def _layers(raw: Raw) -> range:
    return range(raw["num_hidden_layers"])


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
    return tuple(i for i in _layers(raw) if i in named or (i + 1) % step)
