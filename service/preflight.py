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


def check(directory: Path, engine_options: Mapping[str, Any]) -> None:
    """Read config, tensor headers, tokenizer and chat template, and see that the options fit model and machine.

    Raises `CheckpointError` naming the file, and `ConfigError`.
    """
    from model.checkpoint import inspect_checkpoint
    from model.config import EngineConfig
    from model.engine.memory import resolve_device, resolve_dtype, size_cache
    from model.text.chat_template import ChatTemplate
    from model.text.tokenizer import Tokenizer

    config = EngineConfig(**engine_options)
    checkpoint = inspect_checkpoint(directory)
    Tokenizer.from_directory(directory)
    ChatTemplate.from_directory(directory)
    device = resolve_device(config.device)
    size_cache(checkpoint.config, config, resolve_dtype(config.dtype, device), device)


class Preflight:
    """`check` in a process of its own, beside whatever the caller does meanwhile."""

    def __init__(self, directory: Path, engine_options: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", "service.preflight", str(directory), json.dumps(engine_options)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self) -> None:
        """Wait for the verdict. Raises `StartError` with the reason."""
        refusal, trouble = self._process.communicate()
        if self._process.returncode == REFUSED:
            raise StartError(refusal.strip())
        if self._process.returncode:
            lines = trouble.strip().splitlines() or [f"exit code {self._process.returncode}"]
            raise StartError(f"the check of the model failed: {lines[-1]}")


if __name__ == "__main__":
    try:
        check(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except AttendantError as refusal:
        print(refusal)
        sys.exit(REFUSED)
