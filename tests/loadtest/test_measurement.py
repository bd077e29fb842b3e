"""The load test measures what a reader of the stream sees, and refuses streams that are not complete."""

import itertools
import json
import math
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loadtest.histogram import Histogram
from loadtest.report import Report
from loadtest.stream import StreamError, Timing, read_stream

ROOT = Path(__file__).parent.parent.parent
DELAY = 0.5


def event(**chunk: object) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n"


def text(text: str) -> dict:
    return {"choices": [{"index": 0, "text": text}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}
DONE = b"data: [DONE]\n"


def read(lines: list[bytes]) -> Timing:
    """Read lines that arrive one second apart, the first a second after the send."""
    clock, arriving = itertools.count(1.0), iter([*lines, b""])
    return read_stream(lambda: next(arriving), started=0.0, clock=lambda: next(clock))


def test_latencies_are_those_of_the_chunks_with_text():
    role = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    content = [event(choices=[{"index": 0, "delta": {"content": piece}}]) for piece in ("a", "b c")]
    timing = read([role, b"\n", *content, event(**USAGE), DONE])
    assert (timing.ttft, timing.gaps, timing.e2e) == (2.0, [1.0], 5.0)
    assert timing.completion_tokens == 4
    assert timing.tpot == pytest.approx((5.0 - 2.0) / 3)


def test_a_completion_of_one_token_has_no_time_per_output_token():
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1}}
    assert read([event(**text("a")), event(**usage), DONE]).tpot is None


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([event(**text("a")), event(**USAGE)], "without \\[DONE\\]"),
        ([event(**text("a")), DONE], "no usage"),
        ([event(**USAGE), DONE], "no text"),
        ([event(**text("a")), event(error={"message": "replica lost"}), DONE], "replica lost"),
    ],
)
def test_a_stream_that_is_not_complete_is_an_error(lines, words):
    with pytest.raises(StreamError, match=words):
        read(lines)


def test_percentiles_are_within_half_a_percent_of_the_nearest_rank():
    values = [random.Random(0).lognormvariate(-5, 2) for _ in range(5000)]
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    ordered = sorted(values)
    for percent in (1, 50, 90, 99, 99.9, 100):
        exact = ordered[math.ceil(len(values) * percent / 100) - 1]
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.005)
    assert histogram.mean == pytest.approx(sum(values) / len(values))
    assert histogram.longest == max(values)


def test_reports_of_workers_add_up_to_the_report_of_one():
    whole, merged = Report(), Report()
    for i in range(4):
        worker = Report()
        for j in range(5):
            timing = Timing(ttft=0.125 * (i + 1), e2e=1.0 + j, completion_tokens=8, prompt_tokens=3, gaps=[0.25, 0.5])
            worker.add(timing, ended=100.0 + i + j)
            whole.add(timing, ended=100.0 + i + j)
        merged.merge(json.loads(json.dumps(worker.to_dict())))
    assert merged.summary() == whole.summary()


class Stub(BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose second token comes `DELAY` seconds after the first."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    served = 0

    def do_GET(self) -> None:
        self.reply(json.dumps({"data": [{"id": "stub"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert body["model"] == "stub"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i, data in enumerate((event(**text("a")), event(**text("b")), event(**USAGE), DONE)):
            if i == 1:
                time.sleep(DELAY)
            self.wfile.write(b"%x\r\n%s\n\r\n" % (len(data) + 1, data))
        self.wfile.write(b"0\r\n\r\n")
        Stub.served += 1

    def reply(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def stub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run_locust(host: str, *options: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: Locust patches the standard library of the one it is imported into.
    command = [sys.executable, "-m", "locust", "--config", "loadtest/locust.conf", "--host", host, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [(), ("--processes", "2")], ids=["one process", "two workers"])
def test_locust_sees_the_first_token_before_the_second_is_sent(stub, tmp_path, processes):
    Stub.served = 0
    result = run_locust(stub, "-u", "2", "-t", "3s", "--report", str(tmp_path / "report.json"), *processes)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "report.json").read_text())
    assert summary["requests"] == Stub.served > 0
    assert summary["completion_tokens"] == 4 * Stub.served
    assert summary["ttft"]["p99"] < DELAY / 2  # read in blocks of 1,024 bytes it would be the whole delay
    assert DELAY < summary["e2e"]["p50"] < 2 * DELAY
    assert summary["tpot"]["p50"] == pytest.approx(DELAY / 3, rel=0.2)
    assert "TTFT" in result.stdout


def test_a_server_that_is_not_there_fails_the_run():
    result = run_locust("http://127.0.0.1:9", "-u", "1", "-t", "1s")
    assert result.returncode != 0
