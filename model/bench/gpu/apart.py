"""One part of the measurements in processes of its own: a row that crashes, hangs or breaks the device costs that row.

The process says in a file which row it is about. When it ends early, that row gets an error, and another process goes
on behind it. What breaks outside of any row would break again: then the part ends.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.bench.gpu.results import BROKEN_DEVICE, Begun, Results

LEAST_SECONDS = 5.0  # with less there is no use in starting a process
ROW_SECONDS = 75.0  # kernels are compiled in the row that first needs them
LOOK_S = 0.1
GO_ON = "--go-on"  # the option of a process that keeps rows which are errors


def run_part(command: Sequence[str], environment: Mapping[str, str], rows: Path, seconds: float) -> str:
    """Have a part measured within so many seconds, and say how it ended: `done`, or why not. rows: its file."""
    deadline = time.monotonic() + seconds
    begun = Begun(rows)
    begun.clear()
    options: list[str] = []
    while True:
        process = subprocess.Popen([*command, *options], env=dict(environment), start_new_session=True)
        try:
            trouble = _watch(process, begun, deadline)
        finally:
            _end(process)
        if trouble is None:
            return "done"
        row = begun.name()
        if row is not None:
            begun.clear()
            Results(rows).add(row, error=trouble)
        elif process.returncode != BROKEN_DEVICE:  # of which the row is told already
            return trouble
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            return f"cut off after {seconds:.0f} s"
        print(f"  ({trouble}; going on behind it)", flush=True)
        options = [GO_ON]


def _watch(process: subprocess.Popen[bytes], begun: "Begun", deadline: float) -> str | None:
    """Wait for the end of a process, or for a reason to end it; None where all went well."""
    started = time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        if now >= deadline:
            return f"cut off after {now - started:.0f} s"
        if begun.seconds() > ROW_SECONDS:
            return f"hung for {ROW_SECONDS:.0f} s"
        time.sleep(LOOK_S)
    return None if process.returncode == 0 else f"broke off with exit code {process.returncode}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """A process that still runs, with all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
