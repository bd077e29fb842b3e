"""Where a model lives: a directory as it is, or a Hugging Face hub id that is downloaded once."""

import re
from collections.abc import Sequence
from pathlib import Path

import model
from model.directory import read_config
from model.errors import CheckpointError

EMBEDDED = Path(model.__file__).parent / "checkpoints" / "storyteller"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
CONFIGS = ["*.json", "*.jinja"]
WEIGHTS = ["model*.safetensors"]  # never pickle, never code, nor the same weights again in their authors' own format


def resolve(name: str) -> Path:
    """The directory of a model. Raises `CheckpointError` when there is none and none can be had.

    Of a model on the hub the configs come first, so that one which is not for us is refused before its gigabytes.
    """
    directory = Path(name)
    if directory.is_dir():
        return directory.resolve()
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such model directory")
    read_config(_fetch(name, CONFIGS))
    return _fetch(name, CONFIGS + WEIGHTS)


def display_name(name: str) -> str:
    """What clients call a model: the last part of its directory or of its hub id, never a snapshot's hash."""
    directory = Path(name)
    return directory.resolve().name if directory.is_dir() else directory.name


def _fetch(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:  # a dozen kinds of network, permission and spelling
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: no such model directory, and it could not be fetched from the Hugging Face hub: {reason}"
        ) from None
