"""Can this model directory be served? Asked in a process of its own: `python -m service.preflight DIRECTORY`.

The check needs torch, and the process that starts the service lives as long as the service does: what it imported it
would hold for ever.
"""

import subprocess
import sys
from pathlib import Path

from model.errors import AttendantError, CheckpointError

REFUSED = 2


def check(directory: Path) -> None:
    """Read config, tensor headers, tokenizer and chat template. Raises `CheckpointError` naming the file."""
    from model.checkpoint import inspect_checkpoint
    from model.text.chat_template import ChatTemplate
    from model.text.tokenizer import Tokenizer

    inspect_checkpoint(directory)
    Tokenizer.from_directory(directory)
    ChatTemplate.from_directory(directory)


class Preflight:
    """`check` in a process of its own, beside whatever the caller does meanwhile."""

    def __init__(self, directory: Path) -> None:
        command = [sys.executable, "-m", "service.preflight", str(directory)]
        self._directory = directory
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self) -> None:
        """Wait for the verdict. Raises `CheckpointError`."""
        refusal, trouble = self._process.communicate()
        if self._process.returncode == REFUSED:
            raise CheckpointError(refusal.strip())
        if self._process.returncode:
            lines = trouble.strip().splitlines() or [f"exit code {self._process.returncode}"]
            raise CheckpointError(f"{self._directory}: the check of the checkpoint failed: {lines[-1]}")


if __name__ == "__main__":
    try:
        check(Path(sys.argv[1]))
    except AttendantError as refusal:
        print(refusal)
        sys.exit(REFUSED)
