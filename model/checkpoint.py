"""Reads and writes standard Hugging Face directories: `config.json` and safetensors, whole or sharded. Never pickle.

Everything that can be wrong with a directory is a `CheckpointError` that names the file, and the tensor where there is
one. `inspect_checkpoint` finds most of it from the headers alone, before anything is started.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.decoder import Decoder
from model.errors import CheckpointError, ConfigError
from model.families import FAMILIES, HARMLESS, LLAMA, Family

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LOADABLE = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose config and tensor headers were read and agree.

    files: tensor name -> the safetensors file that holds it.
    """

    directory: Path
    config: ModelConfig
    family: Family
    files: Mapping[str, Path]


def inspect_checkpoint(directory: Path) -> Checkpoint:
    """Check a model directory by its config and headers, without reading weights. Raises `CheckpointError`."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such model directory")
    raw = _read_json(directory / "config.json")
    family = _family(directory, raw)
    config = _model_config(directory, raw, family)
    files = _weight_files(directory)
    checkpoint = Checkpoint(directory, config, family, files)
    _check_headers(checkpoint)
    return checkpoint


def load_checkpoint(
    directory: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """Build the decoder of a model directory, its weights in `dtype` on `device`. Raises `CheckpointError`."""
    checkpoint = inspect_checkpoint(directory)
    with torch.device(device):
        decoder = Decoder(checkpoint.config)
    for parameter in decoder.parameters():
        parameter.data = torch.empty_like(parameter, dtype=dtype)
        parameter.requires_grad_(False)
    handles = {file: _open(file) for file in set(checkpoint.files.values())}
    for name, parameter in decoder.named_parameters():
        row = 0
        for tensor_name in _their_names(checkpoint.family, name):
            file = checkpoint.files[tensor_name]
            tensor = _read_tensor(handles[file], file, tensor_name)
            parameter.data[row : row + len(tensor)].copy_(tensor)
            row += len(tensor)
    return decoder.eval()


def save_checkpoint(decoder: Decoder, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `config.json` and `model.safetensors` as a Llama directory that `transformers` loads unchanged."""
    config = decoder.config
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, parameter in decoder.named_parameters():
        theirs = _their_names(LLAMA, name)
        rows = [_expected_rows(config, their) or len(parameter) for their in theirs]
        for their, part in zip(theirs, parameter.detach().split(rows), strict=True):
            tensors[their] = part.to("cpu", dtype).clone()
    eos = config.eos_token_ids
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{
            theirs if isinstance(theirs, str) else theirs[0]: getattr(config, ours)
            for ours, theirs in LLAMA.fields.items()
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: holds no JSON object")
    return raw


def _family(directory: Path, raw: Mapping[str, Any]) -> Family:
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{directory / 'config.json'}: model_type {name!r} is not known; known are: {known}")
    return FAMILIES[name]


def _model_config(directory: Path, raw: Mapping[str, Any], family: Family) -> ModelConfig:
    file = directory / "config.json"
    raw = _flatten_rope(file, raw)
    values: dict[str, Any] = {}
    known = {"bos_token_id", "eos_token_id", *HARMLESS, *family.only}
    for ours, theirs in family.fields.items():
        name, default = (theirs, None) if isinstance(theirs, str) else theirs
        known.add(name)
        if isinstance(theirs, str) and name not in raw:
            raise CheckpointError(f"{file}: field {name!r} is missing")
        values[ours] = raw.get(name, default)
    for name, allowed in family.only.items():
        if name in raw and raw[name] not in allowed:
            raise CheckpointError(f"{file}: {name} = {raw[name]!r} is not supported; only {list(allowed)} are")
    if unknown := sorted(set(raw) - known):
        raise CheckpointError(f"{file}: field {unknown[0]!r} is not known and might change the result")
    if values["num_kv_heads"] is None:
        values["num_kv_heads"] = values["num_heads"]
    try:
        if values["head_dim"] is None:
            values["head_dim"] = values["hidden_size"] // values["num_heads"]
        eos = _eos_token_ids(directory, raw)
        return ModelConfig(**values, bos_token_id=raw.get("bos_token_id"), eos_token_ids=eos)
    except (ConfigError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _flatten_rope(file: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Transformers 5 writes `rope_parameters: {rope_type, rope_theta}` for what was `rope_theta` and `rope_scaling`."""
    flat = dict(raw)
    rope = flat.pop("rope_parameters", None) or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or set(rope) - _PLAIN_ROPE:
        raise CheckpointError(f"{file}: rope_parameters {rope!r} are not supported; only rope_type 'default' is")
    if "rope_theta" in rope:
        flat["rope_theta"] = rope["rope_theta"]
    return flat


_PLAIN_ROPE = {"rope_type", "rope_theta"}


def _eos_token_ids(directory: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a completion: those of `generation_config.json` where it names any, else those of the config."""
    eos = raw.get("eos_token_id")
    if (directory / "generation_config.json").exists():
        generation = _read_json(directory / "generation_config.json")
        eos = generation["eos_token_id"] if generation.get("eos_token_id") is not None else eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, from the one file or from the index of a sharded checkpoint."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists():
        return dict.fromkeys(_open(single).keys(), single)
    if not index.exists():
        raise CheckpointError(f"{single}: missing (and no {INDEX}); only safetensors weights are loaded")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no weight_map")
    if stray := [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{index}: {stray[0]!r} is not the name of a file in this directory")
    held = {file: set(_open(directory / file).keys()) for file in sorted(set(weight_map.values()))}
    for tensor, file in weight_map.items():
        if tensor not in held[file]:
            raise CheckpointError(f"{directory / file}: tensor {tensor!r} is missing, though {INDEX} names it there")
    return {tensor: directory / file for tensor, file in weight_map.items()}


def _check_headers(checkpoint: Checkpoint) -> None:
    """Every tensor that the decoder needs is there with the right shape and a dtype we load; and nothing else is."""
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config)
    handles = {file: _open(file) for file in set(checkpoint.files.values())}
    wanted: set[str] = set()
    for name, parameter in decoder.named_parameters():
        theirs = _their_names(checkpoint.family, name)
        for their in theirs:
            rows = _expected_rows(checkpoint.config, their) or len(parameter)
            _check_header(checkpoint, handles, their, [rows, *parameter.shape[1:]])
        wanted.update(theirs)
    if checkpoint.config.tie_word_embeddings:
        wanted.add("lm_head.weight")  # some exporters write the tied head a second time
    unused = {u.format(i=i) for u in checkpoint.family.unused for i in range(checkpoint.config.num_layers)}
    if extra := sorted(set(checkpoint.files) - wanted - unused):
        raise CheckpointError(f"{checkpoint.files[extra[0]]}: tensor {extra[0]!r} has no place in this architecture")


def _check_header(checkpoint: Checkpoint, handles: Mapping[Path, Any], name: str, shape: list[int]) -> None:
    file = checkpoint.files.get(name)
    if file is None:
        raise CheckpointError(f"{checkpoint.directory}: tensor {name!r} is missing")
    header = handles[file].get_slice(name)
    if header.get_shape() != shape:
        raise CheckpointError(f"{file}: tensor {name!r} has shape {header.get_shape()}, the config asks for {shape}")
    if header.get_dtype() not in LOADABLE:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {header.get_dtype()}; {sorted(LOADABLE)} are loaded")


def _expected_rows(config: ModelConfig, tensor_name: str) -> int | None:
    """Rows of a tensor that is a part of one of our fused parameters; None for a tensor that is not fused."""
    rows = {
        "q_proj": config.num_heads * config.head_dim,
        "k_proj": config.num_kv_heads * config.head_dim,
        "v_proj": config.num_kv_heads * config.head_dim,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
    }
    return next((count for part, count in rows.items() if f".{part}." in tensor_name), None)


def _their_names(family: Family, parameter: str) -> tuple[str, ...]:
    """The published tensors that make up one of our parameters: `layers.3.qkv.weight` -> q, k and v of layer 3."""
    for ours, theirs in family.tensors.items():
        before, _, after = ours.partition("{i}")
        if parameter == ours:
            return theirs
        if after and parameter.startswith(before) and parameter.endswith(after):
            index = parameter.removeprefix(before).removesuffix(after)
            return tuple(name.format(i=index) for name in theirs)
    raise AssertionError(f"no family tensor for our own parameter {parameter!r}")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a valid safetensors file: {error}") from error


def _read_tensor(handle: Any, file: Path, name: str) -> Tensor:
    try:
        tensor: Tensor = handle.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: tensor {name!r} cannot be read: {error}") from error
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{file}: tensor {name!r} holds NaN or infinite values")
    return tensor
