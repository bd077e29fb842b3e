"""What a model directory says of itself: `config.json` and `generation_config.json`, field by field."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.families import FAMILIES, Derived, Family

# Fields of a config.json that say where it came from or how it was trained, never what it computes.
HARMLESS = frozenset(
    {
        "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "attn_implementation",
        "attn_pdrop", "auto_map", "cache_implementation", "chunk_size_feed_forward", "dtype", "embd_pdrop",
        "gradient_checkpointing", "id2label", "initializer_range", "is_encoder_decoder", "is_llama_config", "label2id",
        "model_type", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
        "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
        "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
        "task_specific_params", "torch_dtype", "transformers.js_config", "transformers_version", "unsloth_fixed",
        "unsloth_version", "use_cache",
    }
)  # fmt: skip


def read_config(directory: Path) -> tuple[Family, ModelConfig]:
    """The family of a model and its shape. Raises `CheckpointError`, also for a field that nothing here knows."""
    file = directory / "config.json"
    raw = read_json(file)
    family = _family(file, raw)
    _refuse_unknown_fields(file, raw, family)
    values: dict[str, Any] = {}
    try:
        for ours, theirs in family.fields.items():
            values[ours] = _field(raw, theirs)
        values.update(family.fixed)
        if values["num_kv_heads"] is None:
            values["num_kv_heads"] = values["num_heads"]
        if values["head_dim"] is None:
            values["head_dim"] = values["hidden_size"] // values["num_heads"]
        eos = _eos_token_ids(directory, raw)
        return family, ModelConfig(**values, bos_token_id=raw.get("bos_token_id"), eos_token_ids=eos)
    except KeyError as error:
        raise CheckpointError(f"{file}: field {error.args[0]!r} is missing") from None
    except (ConfigError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `CheckpointError`."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: holds no JSON object")
    return raw


def _family(file: Path, raw: Mapping[str, Any]) -> Family:
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{file}: model_type {name!r} is not known; known are: {known}")
    return FAMILIES[name]


def _refuse_unknown_fields(file: Path, raw: Mapping[str, Any], family: Family) -> None:
    known = {"bos_token_id", "eos_token_id", *HARMLESS, *family.only}
    for theirs in family.fields.values():
        if isinstance(theirs, Derived):
            known.update(theirs.reads)
        else:
            known.add(theirs if isinstance(theirs, str) else theirs[0])
    for name, allowed in family.only.items():
        if name in raw and raw[name] not in allowed:
            raise CheckpointError(f"{file}: {name} = {raw[name]!r} is not supported; only {list(allowed)} are")
    if unknown := sorted(set(raw) - known):
        raise CheckpointError(f"{file}: field {unknown[0]!r} is not known and might change the result")


def _field(raw: Mapping[str, Any], theirs: str | tuple[str, Any] | Derived) -> Any:
    if isinstance(theirs, Derived):
        return theirs.compute(raw)
    value = raw[theirs] if isinstance(theirs, str) else raw.get(*theirs)
    return tuple(value) if isinstance(value, list) else value


def _eos_token_ids(directory: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a completion: those of `generation_config.json` where it names any, else those of the config."""
    eos = raw.get("eos_token_id")
    if (directory / "generation_config.json").exists():
        generation = read_json(directory / "generation_config.json")
        eos = generation["eos_token_id"] if generation.get("eos_token_id") is not None else eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)
