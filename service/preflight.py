"""Can this model be served with these options? Asked in a process of its own, before anything is deployed.

The check needs torch, and the process that starts the service lives as long as the service does: what it imported it
would hold for ever.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import AttendantError
from service.errors import StartError

REFUSED = 2


def check(directory: Path, engine_options: Mapping[str, Any]) -> str:
    """Read config, tensor headers, tokenizer and chat template, and see that the options fit model and machine.

    Returns the dtype that engines compute in, and why it is not a faster one. Raises `CheckpointError` naming the
    file, and `ConfigError`.
    """
    import torch

    from model.checkpoint import inspect_checkpoint
    from model.config import EngineConfig
    from model.engine.memory import for_serving, resolve_device, resolve_dtype, size_cache
    from model.text.chat_template import ChatTemplate
    from model.text.tokenizer import Tokenizer

    asked = EngineConfig(**engine_options)
    checkpoint = inspect_checkpoint(directory)
    config, reason = for_serving(checkpoint.config, asked)
    Tokenizer.from_directory(directory)
    ChatTemplate.from_directory(directory)
    device = resolve_device(config)
    dtype = resolve_dtype(config.dtype, device)
    size_cache(checkpoint.config, config, dtype, device)
    name = config.dtype if config.dtype != "auto" else "bf16" if dtype == torch.bfloat16 else "fp32"
    return name if reason is None else f"{name} on torch ({reason.partition(chr(10))[0]})"


class Preflight:
    """`check` in a process of its own, beside whatever the caller does meanwhile."""

    def __init__(self, directory: Path, engine_options: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", "service.preflight", str(directory), json.dumps(engine_options)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self) -> str:
        """Wait for the verdict; returns what `check` does. Raises `StartError` with the reason."""
        verdict, trouble = self._process.communicate()
        if self._process.returncode == REFUSED:
            raise StartError(verdict.strip())
        if self._process.returncode:
            lines = trouble.strip().splitlines() or [f"exit code {self._process.returncode}"]
            raise StartError(f"the check of the model failed: {lines[-1]}")
        return verdict.strip()


if __name__ == "__main__":
    try:
        print(check(Path(sys.argv[1]), json.loads(sys.argv[2])))
    except AttendantError as refusal:
        print(refusal)
        sys.exit(REFUSED)
