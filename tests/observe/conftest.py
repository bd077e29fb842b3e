"""A service that is watched, and the real Prometheus that watches it."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.data_plane import free_port
from tests.service.conftest import Running, start, stop

DEPLOYED = Path(__file__).parent.parent.parent / "deploy"


@pytest.fixture(scope="session")
def watched(tiny_model: Path) -> Iterator[Running]:
    running = start(tiny_model, "--replicas", "2", "--metrics-host", "127.0.0.1", "--vllm-metrics")
    yield running
    assert stop(running) == 0


def installed(program: str) -> str:
    """One of Prometheus' programs. Debian's package `prometheus` brings them; `.ci/run` installs it."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"this machine has no {program}")
    return path


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What the condition gives once it gives something; the limit only keeps a failure from hanging."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


@dataclass
class Prometheus:
    """A server in a process of its own, as `make prometheus` starts it, but that it looks every half second."""

    directory: Path
    url: str = field(default_factory=lambda: f"http://127.0.0.1:{free_port()}")

    def start(self) -> "subprocess.Popen[bytes]":
        command = [installed("prometheus"), f"--config.file={self.directory}/prometheus.yml"]
        command += [
            f"--storage.tsdb.path={self.directory}/data",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        log = (self.directory / "log").open("wb")
        process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._is_ready)
        return process

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def vector(self, expr: str) -> list[dict[str, Any]]:
        return self.get("query", query=expr)["result"]

    def value(self, expr: str) -> float:
        (sample,) = self.vector(expr)
        return float(sample["value"][1])

    def catch_up(self) -> float:
        """Wait until everything has been scraped that had happened before this call; the time of that scrape."""
        called = time.time()
        return until(lambda: self._scraped_since(called))

    def _scraped_since(self, moment: float) -> float | None:
        found = self.vector("min(timestamp(attendant_generation_tokens_total))")
        newest = float(found[0]["value"][1]) if found else 0.0
        return newest if newest > moment else None

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


def configure(directory: Path, config: str, url: str) -> Prometheus:
    """What is deployed, in a directory of its own, pointed at a service."""
    address = url.removeprefix("http://")
    text = (DEPLOYED / "prometheus" / config).read_text()
    (directory / "prometheus.yml").write_text(
        text.replace("_interval: 5s", "_interval: 500ms")
        .replace("_interval: 15s", "_interval: 1s")
        .replace("127.0.0.1:8000", address)
    )
    (directory / "targets.json").write_text(json.dumps([{"targets": [address]}]))
    shutil.copy(DEPLOYED / "prometheus" / "rules.yml", directory)
    return Prometheus(directory)


@pytest.fixture(scope="session")
def prometheus(watched: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    server = configure(tmp_path_factory.mktemp("prometheus"), "prometheus.yml", watched.url)
    process = server.start()
    yield server
    process.terminate()
    assert process.wait(timeout=30) == 0
