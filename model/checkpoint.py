"""Reads and writes standard Hugging Face directories: `config.json` and safetensors, whole or sharded. Never pickle.

Everything that can be wrong with a directory is a `CheckpointError` that names the file, and the tensor where there is
one. `inspect_checkpoint` finds most of it from the headers alone, before anything is started.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import ModelConfig, RopeConfig
from model.decoder import Decoder, DecoderLayer
from model.directory import read_config, read_json
from model.errors import CheckpointError
from model.families import ATTENDANT, LLAMA, Derived, Family
from model.layers import Int8Linear, replace_linears
from model.tensor_file import DTYPES, TensorFile

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose config and tensor headers were read and agree.

    files: tensor name -> the file that holds it.
    bare: whether the names in the files lack the family's prefix, as old exporters left it out.
    """

    directory: Path
    config: ModelConfig
    family: Family
    files: Mapping[str, TensorFile]
    bare: bool

    @property
    def num_weights(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(file.entries[self.stored_name(name)].shape) for name, file in self.files.items())

    def stored_name(self, tensor: str) -> str:
        """What the file calls a tensor."""
        return tensor.removeprefix(self.family.prefix) if self.bare else tensor


def inspect_checkpoint(directory: Path) -> Checkpoint:
    """Check a model directory by its config and headers, without reading weights. Raises `CheckpointError`."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such model directory")
    family, config = read_config(directory)
    files = _tensor_files(directory)
    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in files)
    if bare:
        files = {name if name == "lm_head.weight" else family.prefix + name: file for name, file in files.items()}
    checkpoint = Checkpoint(directory, config, family, files, bare)
    _check_headers(checkpoint)
    return checkpoint


def load_checkpoint(
    directory: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", int8: bool = False
) -> Decoder:
    """Build the decoder of a model directory, its weights in `dtype` on `device`. Raises `CheckpointError`.

    int8: its linear maps are quantized layer by layer as they come, so that it never stands in memory in `dtype`.
    """
    checkpoint = inspect_checkpoint(directory)
    decoder = _build(checkpoint, "cpu").requires_grad_(False).eval()  # memory that nobody has touched yet
    decoder.rotaries.to(device)
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        _fill(checkpoint, layer.named_parameters(f"layers.{index}"), dtype, device)
        if int8:
            layer.fold_scores()
            replace_linears(layer, Int8Linear)
    around = [(name, parameter) for name, parameter in decoder.named_parameters() if not name.startswith("layers.")]
    _fill(checkpoint, around, dtype, device)
    if int8:
        decoder.quantize()
    return decoder


def save_checkpoint(decoder: Decoder, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `config.json` and `model.safetensors`: a Llama directory that `transformers` loads unchanged, or, for what
    Llama does not have, one of our own family. Raises `CheckpointError` for a decoder that was changed for serving.
    """
    config = decoder.config
    with torch.device("meta"):
        whole = dict(Decoder(config).named_parameters())
    if lost := sorted(whole.keys() - dict(decoder.named_parameters()).keys()):
        raise CheckpointError(f"{directory}: not written: folded or quantized, the decoder has no {lost[0]!r} any more")
    family = LLAMA if _is_llama(config) else ATTENDANT
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to("cpu", dtype).clone() for name, tensor in published_tensors(decoder, family)}
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


def published_tensors(decoder: Decoder, family: Family) -> Iterator[tuple[str, Tensor]]:
    """A decoder's weights under the names and in the pieces that a family publishes them in: views of ours. Families
    that store norms or transposed weights in another way are none of these.
    """
    for name, parameter in decoder.named_parameters():
        parts = _parts(decoder.config, family, name, len(parameter))
        yield from zip(parts, parameter.detach().split(list(parts.values())), strict=True)


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


def _tensor_files(directory: Path) -> dict[str, TensorFile]:
    """Tensor name -> file, from the one file or from the index of a sharded checkpoint."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists():
        file = TensorFile(single)
        return dict.fromkeys(file.entries, file)
    if not index.exists():
        raise CheckpointError(f"{single}: missing (and no {INDEX}); only safetensors weights are loaded")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise CheckpointError(f"{index}: {name!r} is not the name of a safetensors file in this directory")
    shards = {name: TensorFile(directory / name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in shards[name].entries:
            raise CheckpointError(f"{directory / name}: tensor {tensor!r} is missing, though {INDEX} names it there")
    for name, shard in shards.items():
        if stray := sorted(tensor for tensor in shard.entries if weight_map.get(tensor) != name):
            raise CheckpointError(f"{shard.path}: tensor {stray[0]!r} is there, though {INDEX} does not name it there")
    return {tensor: shards[name] for tensor, name in weight_map.items()}


def _check_headers(checkpoint: Checkpoint) -> None:
    """Every tensor that the decoder needs is there with the right shape and a dtype we load; and nothing else is."""
    wanted: set[str] = set()
    for name, parameter in _build(checkpoint, "meta").named_parameters():
        parts = _parts(checkpoint.config, checkpoint.family, name, len(parameter))
        for tensor, rows in parts.items():
            _check_header(checkpoint, tensor, (rows, *parameter.shape[1:]))
        wanted.update(parts)
    if checkpoint.config.tie_word_embeddings:
        wanted.update(checkpoint.family.tensors.get("head.weight", ()))  # some write the tied head a second time
    unused = {name.format(i=i) for name in checkpoint.family.unused for i in range(checkpoint.config.num_layers)}
    if extra := sorted(set(checkpoint.files) - wanted - unused):
        path = checkpoint.files[extra[0]].path
        raise CheckpointError(f"{path}: tensor {extra[0]!r} has no place in this architecture")


def _build(checkpoint: Checkpoint, device: str) -> Decoder:
    """The decoder, its weights undefined. A config may name any sizes: what the files cannot hold is not even begun."""
    config, file = checkpoint.config, checkpoint.directory / "config.json"
    for name in ("num_layers", "num_experts"):
        if getattr(config, name) > len(checkpoint.files):
            raise CheckpointError(
                f"{file}: {name} is {getattr(config, name)}, but the weights have {len(checkpoint.files)} tensors"
            )
    try:
        with torch.device(device):
            return Decoder(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{file}: a model of this shape cannot be built: {error}") from error


def _check_header(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    file = checkpoint.files.get(name)
    if file is None:
        raise CheckpointError(f"{checkpoint.directory}: tensor {name!r} is missing")
    entry = file.entries[checkpoint.stored_name(name)]
    if name.endswith(checkpoint.family.transposed):
        shape = shape[::-1]
    if entry.shape != shape:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} has shape {list(entry.shape)}, the config asks for {list(shape)}"
        )
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{file.path}: tensor {name!r} has dtype {entry.dtype}; {', '.join(DTYPES)} are loaded")


def _fill(
    checkpoint: Checkpoint,
    parameters: Iterable[tuple[str, nn.Parameter]],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Give parameters their memory and copy the weights into it, fusing what we keep in one piece."""
    for name, parameter in parameters:
        parameter.data = torch.empty(parameter.shape, dtype=dtype, device=device)
        parts = _parts(checkpoint.config, checkpoint.family, name, len(parameter))
        for tensor, place in zip(parts, parameter.data.split(list(parts.values())), strict=True):
            _copy(checkpoint, tensor, place)
        if name.endswith("norm.weight"):
            parameter.data += checkpoint.family.norm_offset


def _copy(checkpoint: Checkpoint, name: str, place: Tensor) -> None:
    """Copy a tensor of the files. Raises `CheckpointError` where it holds what is no number."""
    file = checkpoint.files[name]
    if name.endswith(checkpoint.family.transposed):
        place = place.t()
    first = 0
    for piece in file.pieces(checkpoint.stored_name(name)):
        if not all(extreme.isfinite() for extreme in piece.aminmax()):  # either is NaN where anything is
            raise CheckpointError(f"{file.path}: tensor {name!r} holds NaN or infinite values")
        place[first : first + len(piece)].copy_(piece)
        first += len(piece)


def _parts(config: ModelConfig, family: Family, parameter: str, num_rows: int) -> dict[str, int]:
    """The published tensors that one of our parameters is stacked from, in order, and the rows of each."""
    names = family.tensor_names(parameter)
    if ".qkv." in parameter and len(names) == 3:
        kv_rows = config.num_kv_heads * config.head_dim
        return dict(zip(names, (num_rows - 2 * kv_rows, kv_rows, kv_rows), strict=True))
    return dict.fromkeys(names, num_rows // len(names))
