"""Reads and writes standard Hugging Face directories: `config.json` and safetensors, whole or sharded. Never pickle.

Everything that can be wrong with a directory is a `CheckpointError` that names the file, and the tensor where there is
one. `inspect_checkpoint` finds most of it from the headers alone, before anything is started.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig, RopeConfig
from model.decoder import Decoder
from model.errors import CheckpointError, ConfigError
from model.families import ATTENDANT, FAMILIES, HARMLESS, LLAMA, Derived, Family

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LOADABLE = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose config and tensor headers were read and agree.

    files: tensor name -> the safetensors file that holds it.
    bare: whether the names in the files lack the family's prefix, as old exporters left it out.
    """

    directory: Path
    config: ModelConfig
    family: Family
    files: Mapping[str, Path]
    bare: bool = False

    def stored_name(self, tensor: str) -> str:
        """What the file calls a tensor."""
        return tensor.removeprefix(self.family.prefix) if self.bare else tensor

    def parts(self, parameter: str, num_rows: int) -> dict[str, int]:
        """The tensors that one of our parameters is stacked from, in order, and the rows of each."""
        return _parts(self.config, self.family, parameter, num_rows)


def inspect_checkpoint(directory: Path) -> Checkpoint:
    """Check a model directory by its config and headers, without reading weights. Raises `CheckpointError`."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such model directory")
    raw = _read_json(directory / "config.json")
    family = _family(directory, raw)
    config = _model_config(directory, raw, family)
    files = _weight_files(directory)
    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in files)
    if bare:
        files = {name if name == "lm_head.weight" else family.prefix + name: file for name, file in files.items()}
    checkpoint = Checkpoint(directory, config, family, files, bare)
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
        for tensor_name, rows in checkpoint.parts(name, len(parameter)).items():
            tensor = _read_tensor(checkpoint, handles, tensor_name)
            parameter.data[row : row + rows].copy_(tensor)
            row += rows
        if name.endswith("norm.weight"):
            parameter.data += checkpoint.family.norm_offset
    return decoder.eval()


def save_checkpoint(decoder: Decoder, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `config.json` and `model.safetensors`: a Llama directory that `transformers` loads unchanged, or, for what
    Llama does not have, one of our own family.
    """
    config = decoder.config
    family = LLAMA if _is_llama(config) else ATTENDANT
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, parameter in decoder.named_parameters():
        parts = _parts(config, family, name, len(parameter))
        for their, part in zip(parts, parameter.detach().split(list(parts.values())), strict=True):
            tensors[their] = part.to("cpu", dtype).clone()
    eos = config.eos_token_ids
    raw = {
        **(_llama_fields(config) if family is LLAMA else {"model_type": "attendant", **asdict(config)}),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    raw.pop("eos_token_ids", None)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def _is_llama(config: ModelConfig) -> bool:
    """Whether all that sets this model apart is among what a Llama's config can say (as `_llama_fields` writes it)."""
    theta = config.rope.theta if config.rope is not None else 1.0
    plain = replace(config, rope=RopeConfig(theta=theta), qkv_bias=False, output_bias=False, activation="silu")
    others = [own for own in fields(ModelConfig) if own.name not in LLAMA.fields and own.default is not MISSING]
    ids = ("bos_token_id", "eos_token_ids")
    return config == plain and all(getattr(config, own.name) == own.default for own in others if own.name not in ids)


def _llama_fields(config: ModelConfig) -> dict[str, Any]:
    copied = {
        theirs if isinstance(theirs, str) else theirs[0]: getattr(config, ours)
        for ours, theirs in LLAMA.fields.items()
        if not isinstance(theirs, Derived)
    }
    assert config.rope is not None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **copied,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope.theta,
        "hidden_act": "silu",
    }


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
        return ModelConfig(**values, bos_token_id=raw.get("bos_token_id"), eos_token_ids=eos)
    except KeyError as error:
        raise CheckpointError(f"{file}: field {error.args[0]!r} is missing") from None
    except (ConfigError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _field(raw: Mapping[str, Any], theirs: str | tuple[str, Any] | Derived) -> Any:
    if isinstance(theirs, Derived):
        return theirs.compute(raw)
    value = raw[theirs] if isinstance(theirs, str) else raw.get(*theirs)
    return tuple(value) if isinstance(value, list) else value


def _refuse_unknown_fields(file: Path, raw: Mapping[str, Any], family: Family) -> None:
    known = {"bos_token_id", "eos_token_id", *HARMLESS, *family.only}
    for theirs in family.fields.values():
        known.update(
            theirs.reads if isinstance(theirs, Derived) else [theirs if isinstance(theirs, str) else theirs[0]]
        )
    for name, allowed in family.only.items():
        if name in raw and raw[name] not in allowed:
            raise CheckpointError(f"{file}: {name} = {raw[name]!r} is not supported; only {list(allowed)} are")
    if unknown := sorted(set(raw) - known):
        raise CheckpointError(f"{file}: field {unknown[0]!r} is not known and might change the result")


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
        parts = checkpoint.parts(name, len(parameter))
        for their, rows in parts.items():
            _check_header(checkpoint, handles, their, [rows, *parameter.shape[1:]])
        wanted.update(parts)
    if checkpoint.config.tie_word_embeddings:
        wanted.update(checkpoint.family.tensors.get("head.weight", ()))  # some write the tied head a second time
    unused = {u.format(i=i) for u in checkpoint.family.unused for i in range(checkpoint.config.num_layers)}
    if extra := sorted(set(checkpoint.files) - wanted - unused):
        raise CheckpointError(f"{checkpoint.files[extra[0]]}: tensor {extra[0]!r} has no place in this architecture")


def _check_header(checkpoint: Checkpoint, handles: Mapping[Path, Any], name: str, shape: list[int]) -> None:
    file = checkpoint.files.get(name)
    if file is None:
        raise CheckpointError(f"{checkpoint.directory}: tensor {name!r} is missing")
    header = handles[file].get_slice(checkpoint.stored_name(name))
    if name.endswith(checkpoint.family.transposed or (" ",)):
        shape = shape[::-1]
    if header.get_shape() != shape:
        raise CheckpointError(f"{file}: tensor {name!r} has shape {header.get_shape()}, the config asks for {shape}")
    if header.get_dtype() not in LOADABLE:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {header.get_dtype()}; {sorted(LOADABLE)} are loaded")


def _parts(config: ModelConfig, family: Family, parameter: str, num_rows: int) -> dict[str, int]:
    names = _tensor_names(family, parameter)
    kv_rows = config.num_kv_heads * config.head_dim
    if ".qkv." in parameter and len(names) == 3:
        return dict(zip(names, (num_rows - 2 * kv_rows, kv_rows, kv_rows), strict=True))
    return dict.fromkeys(names, num_rows // len(names))


def _tensor_names(family: Family, parameter: str) -> tuple[str, ...]:
    """The published tensors that make up one of our parameters: `layers.3.qkv.weight` -> q, k and v of layer 3."""
    numbers = dict(zip("ie", re.findall(r"(?<=\.)\d+(?=\.)", parameter), strict=False))
    pattern = re.sub(r"^layers\.\d+", "layers.{i}", parameter)
    pattern = re.sub(r"\.experts\.\d+", ".experts.{e}", pattern)
    return tuple(name.format(**numbers) for name in family.tensors.get(pattern, (parameter,)))


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a valid safetensors file: {error}") from error


def _read_tensor(checkpoint: Checkpoint, handles: Mapping[Path, Any], name: str) -> Tensor:
    file = checkpoint.files[name]
    try:
        tensor: Tensor = handles[file].get_tensor(checkpoint.stored_name(name))
    except SafetensorError as error:
        raise CheckpointError(f"{file}: tensor {name!r} cannot be read: {error}") from error
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{file}: tensor {name!r} holds NaN or infinite values")
    return tensor.t() if name.endswith(checkpoint.family.transposed or (" ",)) else tensor
