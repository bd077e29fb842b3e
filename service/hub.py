"""Where a model lives: a directory as it is, or a Hugging Face hub id that is downloaded once."""

import re
from pathlib import Path

import model
from model.errors import CheckpointError

EMBEDDED = Path(model.__file__).parent / "checkpoints" / "storyteller"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
FILES = ["*.safetensors", "*.json", "*.jinja"]  # never pickle, never code


def resolve(name: str) -> Path:
    """The directory of a model. Raises `CheckpointError` when there is none and none can be had."""
    directory = Path(name)
    if directory.is_dir():
        return directory.resolve()
    if not HUB_ID.fullmatch(name) or directory.suffix:
        raise CheckpointError(f"{name}: no such model directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # a dozen kinds of network, permission and spelling
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: no such model directory, and it could not be fetched from the Hugging Face hub: {reason}"
        ) from None
