"""What the server says of itself: its model, the size of our words in its tokens, and its counters before and after.

A client that lost requests or a server that counts wrongly would go unnoticed otherwise, so a run whose counts disagree
with the server's is INVALID. It needs the server for itself: another client's requests are counted too.
"""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.results import Record

SETTLE_S = 5.0  # counters are written after the last byte, and an abandoned request is noticed a little later

SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?P<labels>\{.*\})? (?P<value>\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Dialect:
    """The names under which a kind of server counts. Empty where it does not, or counts something else.

    running, waiting, cache: gauges that the report shows beside the latencies.
    """

    requests: str
    prompt_tokens: str
    completion_tokens: str
    running: str
    waiting: str
    cache: str


def _vllm_like(prefix: str, cache: str) -> Dialect:
    return Dialect(
        requests=f"{prefix}request_success_total",
        prompt_tokens=f"{prefix}prompt_tokens_total",
        completion_tokens=f"{prefix}generation_tokens_total",
        running=f"{prefix}num_requests_running",
        waiting=f"{prefix}num_requests_waiting",
        cache=f"{prefix}{cache}",
    )


DIALECTS = (
    _vllm_like("attendant_", "kv_cache_usage_ratio"),
    _vllm_like("vllm:", "kv_cache_usage_perc"),
    Dialect(  # llama-server --metrics: counts no requests, and leaves cached tokens out of its prompts
        requests="",
        prompt_tokens="",
        completion_tokens="llamacpp:tokens_predicted_total",
        running="llamacpp:requests_processing",
        waiting="llamacpp:requests_deferred",
        cache="llamacpp:kv_cache_usage_ratio",
    ),
)


@dataclass(frozen=True)
class Counters:
    """One scrape. None where the server does not count it. when: Unix time."""

    when: float
    requests: float | None
    prompt_tokens: float | None
    completion_tokens: float | None
    running: float | None
    waiting: float | None
    cache: float | None

    @property
    def counts(self) -> tuple[float | None, ...]:
        """What only grows."""
        return self.requests, self.prompt_tokens, self.completion_tokens


@dataclass(frozen=True)
class Check:
    """One count, by the server and by the client, who may know it within bounds only. most: None for no upper one."""

    name: str
    server: int
    least: int
    most: int | None

    @property
    def agrees(self) -> bool:
        """Whether both can be right."""
        return self.least <= self.server and (self.most is None or self.server <= self.most)

    def __str__(self) -> str:
        most = "more" if self.most is None else f"{self.most}"
        ours = f"{self.least}" if self.least == self.most else f"{self.least} to {most}"
        return f"{self.name}: {self.server} by the server, {ours} by the client"


class Server:
    """An OpenAI-compatible server, asked outside of what is measured. api_key: empty for none."""

    def __init__(self, host: str, api_key: str = "") -> None:
        self._host = host.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def model(self) -> str:
        """The first model that it lists. Raises `OSError`."""
        return str(json.loads(self._send("/v1/models"))["data"][0]["id"])

    def prompt_tokens(self, path: str, body: dict[str, Any]) -> int:
        """Let it count the prompt of one request. Raises `OSError`."""
        return int(json.loads(self._send(path, body))["usage"]["prompt_tokens"])

    def counters(self) -> Counters | None:
        """A scrape of `/metrics`; None where there is none, or none that we can read."""
        try:
            return read_counters(self._send("/metrics").decode(), time.time())
        except (OSError, ValueError):
            return None

    def settled_counters(self) -> Counters | None:
        """A scrape that tells the same as the one before it: what was asked until now has been counted."""
        deadline = time.monotonic() + SETTLE_S
        scrape = self.counters()
        while scrape is not None and time.monotonic() < deadline:
            time.sleep(0.1)
            before, scrape = scrape, self.counters()
            if scrape is not None and scrape.counts == before.counts:
                break
        return scrape

    def settled_checks(self, before: Counters, records: Sequence[Record]) -> list[Check]:
        """Compare once the server has counted all that it will: as soon as all agree, or after `SETTLE_S`."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            after = self.counters()
            checks = reconcile(before, after, records) if after is not None else []
            if (checks and all(check.agrees for check in checks)) or time.monotonic() > deadline:
                return checks
            time.sleep(0.1)

    def _send(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({"Content-Type": "application/json"} if data else {})
        request = urllib.request.Request(f"{self._host}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            raise OSError(f"{path} answered {error.code}: {error.read()[:200]!r}") from None


def read_counters(text: str, when: float) -> Counters | None:
    """The counters of a Prometheus page: the first dialect of which it holds the tokens. Sums over all labels."""
    totals: dict[str, float] = {}
    for sample in SAMPLE.finditer(text):
        if 'finished_reason="abort"' in (sample["labels"] or ""):
            continue  # a client that leaves is no success, though vLLM counts it there
        totals[sample["name"]] = totals.get(sample["name"], 0.0) + float(sample["value"])
    for dialect in DIALECTS:
        if dialect.completion_tokens in totals:
            return Counters(when, **{key: totals.get(name) for key, name in vars(dialect).items()})
    return None


def reconcile(before: Counters, after: Counters, records: Sequence[Record]) -> list[Check]:
    """What the server has counted between two scrapes against what the client knows of.

    A request that has its `usage` is known exactly. One that broke or was left was perhaps finished by the server, with
    any number of tokens from those that were seen to those that were asked for, and of a prompt that nobody told us.
    """
    known = [record for record in records if record.completion_tokens]
    unsure = [record for record in records if not record.completion_tokens and record.outcome != "refused"]
    refused = len(records) - len(known) - len(unsure)
    completion = sum(record.completion_tokens for record in known)
    prompt = sum(record.prompt_tokens for record in known)
    bounds = {
        "requests": (len(known), len(known) + len(unsure)),
        "prompt_tokens": (prompt, prompt if not unsure and not refused else None),
        "completion_tokens": (
            completion + sum(record.chunks for record in unsure),
            completion + sum(record.max_tokens for record in unsure),
        ),
    }
    checks = []
    for name, (least, most) in bounds.items():
        begin, end = getattr(before, name), getattr(after, name)
        if end is not None:  # a counter with labels is not there before its first count
            checks.append(Check(name, round(end - (begin or 0.0)), least, most))
    return checks
