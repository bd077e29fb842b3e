"""A client of a running service, for the terminal: text as it comes, and how fast it came."""

import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from model.errors import AttendantError

TIMEOUT = httpx.Timeout(10.0, read=120.0)


class RequestFailed(AttendantError):  # noqa: N818 - named for what happened
    """The service refused, broke off, or is not there. The text is what to tell a person."""


@dataclass
class Pace:
    """When the tokens of one answer came: seconds since it was asked for, and how many in all."""

    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first."""
        return (self.tokens - 1) / (self.last - self.first) if self.last > self.first and self.tokens > 1 else 0.0

    def __str__(self) -> str:
        rate = f", {self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""
        return f"{self.tokens} tokens{rate}, the first after {self.first * 1000:.0f} ms"


class Client:
    """Talks to one service. Close it, or use it in a `with` block."""

    def __init__(self, url: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        """url: as the service prints it, with or without `/v1`."""
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        base = url.rstrip("/").removesuffix("/v1")
        self._url = base
        self._http = httpx.Client(base_url=base, headers=headers, timeout=TIMEOUT, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def complete(self, body: dict[str, Any], pace: Pace) -> Iterator[str]:
        """The text of a completion as it comes; `pace` is filled in. Raises `RequestFailed`."""
        for choice in self._choices("/v1/completions", body, pace):
            yield choice["text"]

    def chat(self, body: dict[str, Any], pace: Pace) -> Iterator[str]:
        """The assistant's message as it comes; `pace` is filled in. Raises `RequestFailed`."""
        for choice in self._choices("/v1/chat/completions", body, pace):
            yield choice["delta"].get("content") or ""

    def metrics(self) -> str:
        """Its page for Prometheus. Raises `RequestFailed`."""
        try:
            answer = self._http.get("/metrics")
        except httpx.HTTPError as error:
            raise RequestFailed(f"{self._url} does not answer: {error}") from None
        if answer.status_code != httpx.codes.OK:
            raise RequestFailed(_message(answer))
        return answer.text

    def _choices(self, path: str, body: dict[str, Any], pace: Pace) -> Iterator[dict[str, Any]]:
        asked = time.perf_counter()
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._http.stream("POST", path, json=body) as answer:
                if answer.status_code != httpx.codes.OK:
                    answer.read()
                    raise RequestFailed(_message(answer))
                for chunk in _events(answer):
                    if chunk["choices"]:
                        (choice,) = chunk["choices"]
                        pace.last = time.perf_counter() - asked
                        pace.first = pace.first or pace.last
                        pace.finish_reason = choice["finish_reason"]
                        yield choice
                    else:
                        pace.usage = chunk["usage"]
                        pace.tokens = pace.usage["completion_tokens"]
        except httpx.HTTPError as error:
            raise RequestFailed(f"{self._url}: {error or type(error).__name__}") from error


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        if data:
            try:
                chunk = json.loads(data)
            except ValueError:
                break
            if "error" in chunk:
                raise RequestFailed(chunk["error"]["message"])
            yield chunk
    raise RequestFailed("the connection ended before the answer did")


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.url} answers with status {answer.status_code}, and not as this service does"


class Conversation:
    """A chat with its history: what was said on both sides, and is sent again with each turn."""

    def __init__(self, client: Client, *, system: str | None = None, **fields: object) -> None:
        """fields: of the request, the same in every turn."""
        self._client = client
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)

    def say(self, text: str, pace: Pace) -> Generator[str]:
        """The answer as it comes. What was heard of one that was cut short counts as said.

        Raises `RequestFailed`; the turn is then as if it had not been.
        """
        question = {"role": "user", "content": text}
        heard: list[str] = []
        try:
            for part in self._client.chat({"messages": [*self.messages, question], **self._fields}, pace):
                heard.append(part)
                yield part
        except RequestFailed:
            heard = []
            raise
        finally:
            if heard:
                self.messages += [question, {"role": "assistant", "content": "".join(heard)}]

    def forget(self) -> None:
        """Start anew."""
        self.messages = list(self._opening)
