"""Can this model be served with these options? Asked in a process of its own, before anything is deployed.

The check needs torch, and the process that starts the service lives as long as the service does: what it imported it
would hold for ever.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import AttendantError
from service.errors import StartError

REFUSED = 2


class Verdict(NamedTuple):
    """It can be served. dtype: of the numbers that engines compute in, and why not in faster ones; device: where."""

    dtype: str
    device: str


def check(directory: Path, engine_options: Mapping[str, Any], num_ranks: int = 1, max_ranks: int = 1) -> Verdict:
    """Read config, tensor headers, tokenizer and chat template, and see that the options fit model and machine.

    num_ranks: processes of one engine; max_ranks: of all of them. Raises `CheckpointError` naming the file, and
    `ConfigError`.
    """
    import torch

    from model.checkpoint import inspect_checkpoint
    from model.config import EngineConfig
    from model.engine.memory import expected_block_bytes, for_serving, resolve_device, resolve_dtype, size_cache
    from model.errors import ConfigError
    from model.parallel import check_split
    from model.text.chat_template import ChatTemplate
    from model.text.tokenizer import Tokenizer

    asked = EngineConfig(**engine_options)
    checkpoint = inspect_checkpoint(directory)
    model, config, reason = checkpoint.config, asked, None
    if num_ranks == 1:
        config, reason = for_serving(model, asked)
    else:
        model = check_split(model, asked, num_ranks)
    Tokenizer.from_directory(directory)
    ChatTemplate.from_directory(directory)
    device = resolve_device(config)
    dtype = resolve_dtype(config.dtype, device)
    if device.type == "cuda" and max_ranks > torch.cuda.device_count():
        raise ConfigError(
            f"{max_ranks} GPUs are needed, one for each process of an engine, and there are "
            f"{torch.cuda.device_count()}: fewer replicas, or a smaller tensor_parallel"
        )
    size_cache(model, config, expected_block_bytes(model, config, device), device)
    name = config.dtype if config.dtype != "auto" else "bf16" if dtype == torch.bfloat16 else "fp32"
    return Verdict(name if reason is None else f"{name} on torch ({reason.partition(chr(10))[0]})", device.type)


class Preflight:
    """`check` in a process of its own, beside whatever the caller does meanwhile."""

    def __init__(self, directory: Path, *options: Any) -> None:
        """options: of `check`, behind the directory."""
        command = [sys.executable, "-m", "service.preflight", str(directory), json.dumps(options)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self) -> Verdict:
        """Wait for the verdict; returns what `check` does. Raises `StartError` with the reason."""
        verdict, trouble = self._process.communicate()
        if self._process.returncode == REFUSED:
            raise StartError(verdict.strip())
        if self._process.returncode:
            lines = trouble.strip().splitlines() or [f"exit code {self._process.returncode}"]
            raise StartError(f"the check of the model failed: {lines[-1]}")
        return Verdict(*json.loads(verdict))


if __name__ == "__main__":
    try:
        print(json.dumps(check(Path(sys.argv[1]), *json.loads(sys.argv[2]))))
    except AttendantError as refusal:
        print(refusal)
        sys.exit(REFUSED)
