"""An OpenAI-compatible server of known delays that writes down when it sent each chunk, and counts like Attendant.

Times are of CLOCK_MONOTONIC, on which Python's `perf_counter` and every process of the machine agree. By itself:

    python tests/loadtest/stub.py --port 9100 --first 0.05 --gap 0.01 --tokens 8
"""

import argparse
import json
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """One request as the server saw it: its body, when its headers had come, when each chunk of text was written."""

    body: dict[str, Any]
    path: str
    arrived: float
    connection: int
    sent: list[float] = field(default_factory=list)
    left: bool = False  # the client closed the connection early


@dataclass
class Stub:
    """Delays in seconds. first: before the first token, gap: between two.

    tokens: of each answer, or as many as asked for where None. reason: for which they end. metrics: whether it counts
    at all. refuse_after: requests after which it answers 429. lies: added to its counters after `lies_after` requests.
    counts_late: seconds by which a request is counted after its answer.
    """

    first: float = 0.0
    gap: float = 0.0
    tokens: int | None = 4
    tokens_per_word: int = 1
    reason: str = "length"
    refuse_after: int | None = None
    metrics: bool = True
    lies: dict[str, int] = field(default_factory=dict)
    lies_after: int = 0
    counts_late: float = 0.0
    served: list[Served] = field(default_factory=list)
    counters: Counter = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, port: int = 0) -> str:
        stub = self

        class Bound(Handler):
            pass

        Bound.stub = stub
        self._server = Listener(("127.0.0.1", port), Bound)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def streamed(self) -> list[Served]:
        """Without the request by which the client learns how long its words are."""
        return [each for each in self.served if each.body["stream"]]

    def count(self, **amounts: int) -> None:
        def add() -> None:
            with self.lock:
                self.counters.update(amounts)

        if self.counts_late:
            threading.Timer(self.counts_late, add).start()
        else:
            add()

    def exposition(self) -> str:
        totals = Counter(self.counters)
        if len(self.served) > self.lies_after:
            totals.update(self.lies)
        return (
            f'attendant_request_success_total{{finished_reason="length"}} {totals["requests"]}\n'
            f"attendant_prompt_tokens_total {totals['prompt']}\n"
            f"attendant_generation_tokens_total {totals['completion']}\n"
            f"attendant_num_requests_running 0\nattendant_num_requests_waiting 0\nattendant_kv_cache_usage_ratio 0.5\n"
        )


class Listener(ThreadingHTTPServer):
    request_queue_size = 1024  # a burst of connections must not wait for the kernel to offer them again
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stub: Stub

    def do_GET(self) -> None:
        if self.path == "/metrics" and self.stub.metrics:
            self.reply(200, self.stub.exposition().encode())
        elif self.path == "/v1/models":
            self.reply(200, json.dumps({"data": [{"id": "stub"}]}).encode())
        else:
            self.reply(404, b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        served = Served(body, self.path, time.perf_counter(), self.client_address[1])
        with self.stub.lock:
            self.stub.served.append(served)
            number = len(self.stub.served)
        texts = [body["prompt"]] if "prompt" in body else [message["content"] for message in body["messages"]]
        prompt_tokens = self.stub.tokens_per_word * sum(len(text.split()) for text in texts)
        tokens = self.stub.tokens or body["max_tokens"]
        if not body["stream"]:
            self.stub.count(requests=1, prompt=prompt_tokens, completion=1)
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 1}
            self.reply(200, json.dumps({"choices": [{"text": "a"}], "usage": usage}).encode())
        elif self.stub.refuse_after is not None and number > self.stub.refuse_after:
            self.reply(429, b'{"error": {"message": "full"}}', ("Retry-After", "1"))
        else:
            self.stream(served, prompt_tokens, tokens)

    def stream(self, served: Served, prompt_tokens: int, tokens: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chat = served.path.endswith("chat/completions")
        due = served.arrived + self.stub.first
        written = 0
        try:
            if chat:
                self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for number in range(tokens):
                time.sleep(max(due - time.perf_counter(), 0.0))
                piece = {"delta": {"content": "a "}} if chat else {"text": "a "}
                reason = self.stub.reason if number == tokens - 1 else None
                served.sent.append(time.perf_counter())
                self.event({"choices": [{"index": 0, "finish_reason": reason, **piece}]})
                written += 1
                due += self.stub.gap
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
            self.stub.count(requests=1)
            self.event({"choices": [], "usage": usage})
            self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n")
            time.sleep(0.005)  # a real server's last write often comes apart from its last event
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            served.left = True
            self.close_connection = True
        finally:
            self.stub.count(prompt=prompt_tokens, completion=written)

    def event(self, data: dict[str, Any]) -> None:
        payload = b"data: " + json.dumps(data).encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(payload), payload))

    def reply(self, status: int, data: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9100)
    for name in ("first", "gap"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--tokens", type=int)
    options = parser.parse_args()
    print(Stub(first=options.first, gap=options.gap, tokens=options.tokens).start(options.port), flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
