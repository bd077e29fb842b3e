"""A stub server, and Locust in a process of its own: it patches the standard library of the one it is imported into."""

import json
import subprocess
import sys
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

    def run(host: str, *options: str) -> Outcome:
        file = tmp_path / "report.json"
        command = [sys.executable, "-m", "loadtest", "run", "--host", host]
        command += ["--max-lag", "60s", "--report", str(file), *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        report = json.loads(file.read_text()) if file.exists() else {}
        return Outcome(done.returncode, done.stdout + done.stderr, report)

    return run
