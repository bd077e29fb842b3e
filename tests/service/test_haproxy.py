"""HAProxy's command, on configurations that Ray Serve's own code has written."""

import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from service import data_plane
from service.data_plane import HAPROXY, cluster_environment, environment, free_port

pytestmark = pytest.mark.fast


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """What Serve writes for one ingress that is to be reached from everywhere, as in a pod."""
    return write(tmp_path, [free_port()])


def write(tmp_path: Path, ports: list[int]) -> Path:
    """What Serve writes for ingresses on these ports, with the switches of a cluster."""
    switches = cluster_environment(300)
    config = HAProxyConfig(
        http_options=HTTPOptions(host="0.0.0.0", port=free_port()),
        stats_port=free_port(),
        metrics_port=free_port(),
        socket_path=str(tmp_path / "admin.sock"),
        server_state_base=str(tmp_path),
        server_state_file=str(tmp_path / "server-state"),
        metrics_enabled=False,
        retry_on=switches["RAY_SERVE_HAPROXY_RETRY_ON"],
        retries=int(switches["RAY_SERVE_HAPROXY_RETRIES"]),
        bufsize=int(switches["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]),
    )
    backend = BackendConfig(
        name="attendant",
        path_prefix="/",
        app_name="attendant",
        protocol=RequestProtocol.HTTP,
        servers=[ServerConfig(name=f"ingress{port}", host="127.0.0.1", port=port) for port in ports],
    )
    config.error_file_path = str(tmp_path / "500.http")
    file = tmp_path / "haproxy.cfg"
    HAProxyApi(config, {"attendant": backend}, config_file_path=str(file))._generate_config_file_internal()
    return file


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The installed command, as Serve runs it."""
    return subprocess.run([HAPROXY, *arguments], capture_output=True, text=True, check=False)


def lines_with(file: Path, word: str) -> list[str]:
    return [line.strip() for line in file.read_text().splitlines() if line.split()[:1] == [word]]


def test_a_port_of_ours_is_none_that_the_system_gives_to_connections(monkeypatch: pytest.MonkeyPatch):
    lowest, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert all(port < lowest for port in data_plane.PORTS)
    assert free_port() in data_plane.PORTS
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", free_port()))
        taken, free = listening.getsockname()[1], free_port()
        monkeypatch.setattr("random.sample", lambda ports, k: [taken, free])
        assert free_port() == free
        monkeypatch.setattr("random.sample", lambda ports, k: [taken])
        with pytest.raises(OSError, match="is free"):
            free_port()


def test_the_installed_command_is_the_one_beside_the_code():
    assert HAPROXY.read_text() == (Path(data_plane.__file__).parent / HAPROXY.name).read_text()


def test_haproxy_takes_what_the_command_has_amended(written: Path):
    plain = written.read_text()
    done = run("-c", "-f", written)
    assert done.returncode == 0, done.stderr
    assert written.read_text() != plain


def test_only_the_service_itself_listens_beyond_loopback(written: Path):
    run("-c", "-f", written)
    statistics, service, more_statistics = lines_with(written, "bind")
    assert service.startswith("bind *:")
    assert statistics.startswith("bind 127.0.0.1:")
    assert more_statistics.startswith("bind 127.0.0.1:")


def test_a_client_has_ten_seconds_for_its_header_and_a_minute_to_read(written: Path):
    run("-c", "-f", written)
    timeouts = lines_with(written, "timeout")
    assert [line for line in timeouts if line.startswith("timeout client")] == ["timeout client 60s"]
    assert "timeout http-request 10s" in timeouts


def test_a_body_that_haproxy_waits_for_has_the_time_that_the_service_gives_it(
    written: Path, monkeypatch: pytest.MonkeyPatch
):
    switch = environment("haproxy", written.parent, 300, max_body_seconds=0.25)["ATTENDANT_MAX_BODY_MS"]
    monkeypatch.setenv("ATTENDANT_MAX_BODY_MS", switch)
    with haproxy(written) as client:
        client.get("/health")  # it listens
        head, body = begun(client, length=5)
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["code"] == "body_too_slow"


@pytest.mark.parametrize("length", [10**6, 10**12])
def test_a_body_that_the_buffer_cannot_hold_is_the_ingress_to_refuse(written: Path, length: int):
    """At once: it may be too large. (No ingress listens here.)"""
    with haproxy(written) as client:
        client.get("/health")
        head, _ = begun(client, length)
    assert head.startswith(b"HTTP/1.1 503 ")


def begun(client: httpx.Client, length: int) -> tuple[bytes, bytes]:
    """Header and body of the answer to a request of which no more than one byte of its body ever comes."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n{" % length)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    return head, body


def test_a_malformed_request_is_refused_in_the_shape_of_all_refusals(written: Path):
    run("-c", "-f", written)
    lines = lines_with(written, "http-error")
    assert [line.split()[2] for line in lines] == ["400", "408", "502", "503", "504"]
    for line in lines:
        refusal = json.loads(line.partition(" string '")[2].partition("'")[0])
        assert set(refusal["error"]) == {"message", "type", "param", "code"}


def test_without_an_ingress_the_answer_is_when_to_come_back(written: Path):
    """Serve's own pages say 500, which is a fault of ours that no other try gets past."""
    with haproxy(written) as client:
        answer = client.get("/health")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["type"] == "server_error"


@contextmanager
def ingress(answers: bool) -> Iterator[tuple[int, list[int]]]:
    """One that is healthy, and answers, or hangs up on, each request that has come whole: its port, and the sizes of
    their bodies.
    """
    sizes: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            sizes.append(len(self.rfile.read(int(self.headers["content-length"]))))
            self.close_connection = not answers
            if answers:
                self.do_GET()

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server.server_port, sizes
        server.shutdown()


@contextmanager
def haproxy(written: Path) -> Iterator[httpx.Client]:
    """It runs, and a client of its."""
    address = next(line.split()[1] for line in lines_with(written, "bind") if line.startswith("bind *:"))
    process = subprocess.Popen([HAPROXY, "-db", "-f", written], stderr=subprocess.DEVNULL)
    try:
        transport = httpx.HTTPTransport(retries=5)  # until it listens
        with httpx.Client(base_url=f"http://127.0.0.1:{address[2:]}", transport=transport, timeout=30) as client:
            yield client
    finally:
        process.kill()
        process.wait()


def test_a_request_whose_ingress_dies_before_it_answers_is_given_to_another(tmp_path: Path):
    """Serve's own retries end where a connection is: they would be told that the service is restarting. Without waiting
    for their bodies, which come behind the headers, some are lost all the same; in Serve's buffer, the longer ones are.
    """
    bodies = [b"x" * size for size in (0, 100, 14_000, 60_000)] * 2
    with (
        ingress(answers=False) as (dying, taken),
        ingress(answers=True) as (well, answered),
        haproxy(write(tmp_path, [dying, well])) as client,
    ):
        statuses = [client.post("/v1/completions", content=body).status_code for body in bodies]
    assert statuses == [200] * len(bodies)
    assert len(answered) == len(bodies)
    assert taken, "the one that dies was asked"


def test_what_is_amended_is_amended_once(written: Path):
    run("-c", "-f", written)
    once = written.read_text()
    run("-c", "-f", written)
    assert written.read_text() == once


def test_the_command_is_haproxy_to_whoever_asks():
    assert run("-v").stdout.startswith("HAProxy version")


def test_haproxys_refusal_is_the_commands_own(written: Path):
    written.write_text(written.read_text() + "listen nonsense\n  no-such-word\n")
    assert run("-c", "-f", written).returncode == 1


def test_a_cluster_needs_what_one_machine_needs_but_for_ports_and_files(tmp_path: Path):
    own = environment("haproxy", tmp_path, 300)
    assert cluster_environment(300).items() < own.items()
    assert not any(str(tmp_path) in value for value in cluster_environment(300).values())


def test_without_haproxy_its_switches_are_off_even_where_the_environment_has_them_on(tmp_path: Path):
    switched = cluster_environment(300) | environment("default", tmp_path, 300)
    assert switched["RAY_SERVE_ENABLE_HA_PROXY"] == switched["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "0"


def test_the_environment_is_printed_for_a_shell():
    script = f'eval "$({sys.executable} -m service environment)"; env'
    shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert {f"{name}={value}" for name, value in cluster_environment(300).items()} <= set(shell.stdout.splitlines())
