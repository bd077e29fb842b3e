"""The Serve configurations, really started: `serve run` on one machine, `serve deploy` on a cluster of one node."""

import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from service import keys
from service.data_plane import environment, free_port
from tests.deploy.dockerfile import DOCKERFILE, healthcheck, stages
from tests.deploy.manifests import DEPLOY, put

pytestmark = pytest.mark.slow

SCRIPTS = Path(sysconfig.get_path("scripts"))
START_SECONDS = 120
BODY = {"prompt": "Once upon a time", "max_tokens": 12, "seed": 7, "ignore_eos": True}


def adapted(name: str, directory: Path, **changes: object) -> Path:
    """A shipped file with what this machine needs otherwise: a free port, a place for keys."""
    config = yaml.safe_load((DEPLOY / name).read_text())
    for path, value in changes.items():
        put(config, path.replace("__", "/"), value)
    file = directory / name
    file.write_text(yaml.safe_dump(config))
    return file


@contextmanager
def running(command: list[str | Path], variables: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, of which nothing is left at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        finally:
            _, alive = psutil.wait_procs(children, timeout=10)
            for survivor in alive:
                survivor.kill()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll /ready; what the process has said is the failure's reason."""
    pause = threading.Event()
    for _ in range(START_SECONDS * 5):
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert process.poll() is None, log.read_text()
        pause.wait(0.2)
    raise AssertionError(f"not ready after {START_SECONDS} s:\n{log.read_text()}")


def test_serve_run_starts_the_service_of_one_machine(tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    file = adapted("serve.yaml", tmp_path, http_options__port=port)
    variables = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    with running([SCRIPTS / "serve", "run", file], variables, log) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, log)
        answer = httpx.post(f"{url}/v1/completions", json=BODY, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 12
        with pytest.raises(httpx.ConnectError):  # as the file says, nobody else reaches it
            httpx.get(f"http://127.0.0.2:{port}/health")


@dataclass
class Cluster:
    """A service that was deployed on a cluster of one node, and a key to it."""

    port: int
    stats_port: int
    key: str

    def get(self, path: str, host: str = "127.0.0.1", key: str | None = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.get(f"http://{host}:{self.port}{path}", headers=headers, timeout=30)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    scratch = Path(tempfile.mkdtemp(prefix="att-", dir="/tmp"))  # paths of sockets are short
    port, dashboard, log = free_port(), free_port(), directory / "log"
    key_file = directory / "keys.json"
    key = keys.add(key_file, "tests")
    changes: dict[str, Any] = {
        "http_options__port": port,
        "applications__0__args__api_keys_file": str(key_file),
    }
    file = adapted("serve-cluster.yaml", directory, **changes)
    variables = environment("haproxy", scratch, drain_seconds=30) | {"RAY_AUTH_MODE": "disabled"}
    ports = ["--port", str(free_port()), "--dashboard-port", str(dashboard)]
    ports += ["--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port())]
    head = [SCRIPTS / "ray", "start", "--head", "--block", "--num-cpus", "8", "--temp-dir", scratch / "ray", *ports]
    head += ["--node-ip-address", "127.0.0.1", "--object-store-memory", str(80 << 20)]
    try:
        with running(head, variables, log) as process:
            deploy(file, f"http://127.0.0.1:{dashboard}", variables, process, log)
            wait_until_ready(f"http://127.0.0.1:{port}", process, log)
            yield Cluster(port, int(variables["RAY_SERVE_HAPROXY_STATS_PORT"]), key)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def deploy(file: Path, dashboard: str, variables: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    """`serve deploy`, once the dashboard listens."""
    pause = threading.Event()
    for _ in range(START_SECONDS * 5):
        try:
            httpx.get(f"{dashboard}/api/version", timeout=5)
            break
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
            pause.wait(0.2)
    command = [SCRIPTS / "serve", "deploy", file, "--address", dashboard]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for_engines(cluster: Cluster, number: int) -> None:
    """Until so many are on /metrics: the service is ready with the first."""
    pause = threading.Event()
    seen = 0
    for _ in range(START_SECONDS):
        metrics = cluster.get("/metrics", key=cluster.key).text
        seen = sum(line.startswith("attendant_num_requests_running{") for line in metrics.splitlines())
        if seen == number:
            return
        pause.wait(1)
    raise AssertionError(f"{seen} engines after {START_SECONDS} s, not {number}")


@pytest.mark.timeout(600)
def test_serve_deploy_puts_the_replicas_of_the_file_on_a_cluster(cluster: Cluster):
    headers = {"authorization": f"Bearer {cluster.key}"}
    url = f"http://127.0.0.1:{cluster.port}/v1/completions"
    answers = [httpx.post(url, json=BODY, headers=headers, timeout=60).json() for _ in range(4)]
    assert {answer["usage"]["completion_tokens"] for answer in answers} == {12}
    wait_for_engines(cluster, 2)


@pytest.mark.timeout(600)
def test_on_a_cluster_nobody_comes_in_without_a_key(cluster: Cluster):
    assert cluster.get("/v1/models").status_code == 401
    assert cluster.get("/v1/models", key=cluster.key).status_code == 200


@pytest.mark.timeout(600)
def test_on_a_cluster_haproxy_serves_other_machines_but_keeps_its_statistics(cluster: Cluster):
    """127.0.0.2 is this machine by another address: what listens on every interface answers there."""
    assert cluster.get("/health", host="127.0.0.2").status_code == 200
    assert httpx.get(f"http://127.0.0.1:{cluster.stats_port}/stats", timeout=30).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.2:{cluster.stats_port}/stats")


@pytest.mark.timeout(600)
def test_the_images_health_check_is_content_with_a_service_that_is_ready(cluster: Cluster):
    command = healthcheck(stages(DOCKERFILE.read_text())["base"], cluster.port)
    assert subprocess.run(command, check=False).returncode == 0
