"""A stub server, and Locust in a process of its own: it patches the standard library of the one it is imported into."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stub import Stub

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Outcome:
    exit_code: int
    output: str
    report: dict[str, Any]


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[Stub, str]]]:
    """Start a stub with the given delays: the stub, and where it listens."""
    stubs: list[Stub] = []

    def start(**options: object) -> tuple[Stub, str]:
        stubs.append(Stub(**options))  # type: ignore[arg-type]
        return stubs[-1], stubs[-1].start()

    yield start
    for stub in stubs:
        stub.stop()


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Outcome]:
    """Run the load test to its end. The machine of a test is busy, so the client may be late unless a test says."""

    def run(host: str, *options: str, interrupt_when: Callable[[], bool] | None = None) -> Outcome:
        file = tmp_path / "report.json"
        command = [sys.executable, "-m", "loadtest", "run", "--host", host]
        command += ["--max-lag", "60s", "--report", str(file), *options]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            if interrupt_when is not None:
                while not interrupt_when():
                    time.sleep(0.01)
                process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=120)
        report = json.loads(file.read_text()) if file.exists() else {}
        return Outcome(process.returncode, output, report)

    return run
