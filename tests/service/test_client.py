"""The terminal client against a service that a test speaks for."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from service.cli import app
from service.cli_chat import answer, talk
from service.client import Client, Conversation, Pace, RequestFailed


class FakeService:
    """Answers each request with the next of `answers`; keeps what was asked."""

    def __init__(self, *answers: httpx.Response) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[httpx.Headers] = []
        self._answers = list(answers)

    def client(self, api_key: str | None = None) -> Client:
        return Client("http://service/v1/", api_key, httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append({"path": request.url.path, **json.loads(request.content)})
        self.headers.append(request.headers)
        return self._answers.pop(0)


def events(*parts: str, done: bool = True, error: str | None = None) -> httpx.Response:
    """A chat's stream: parts, usage, the end."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": part}, "text": part, "finish_reason": None}]} for part in parts
    ]
    if error is not None:
        chunks.append({"error": {"message": error}})
    else:
        chunks.append({"choices": [{"delta": {}, "text": "", "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": {"completion_tokens": len(parts)}})
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return httpx.Response(200, text=text + ("data: [DONE]\n\n" if done else ""))


def refusal(message: str, status: int = 400) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}})


def test_an_answer_comes_in_parts_with_its_pace() -> None:
    pace = Pace()
    client = FakeService(events("Once", " upon")).client()
    assert list(client.chat({"messages": []}, pace)) == ["Once", " upon", ""]
    assert (pace.tokens, pace.finish_reason) == (2, "stop")
    assert 0 < pace.first <= pace.last
    assert "2 tokens" in str(pace)


def test_the_key_is_sent() -> None:
    service = FakeService(events("x"))
    list(service.client("secret").complete({"prompt": "x"}, Pace()))
    assert service.headers[0]["authorization"] == "Bearer secret"
    assert service.asked[0]["path"] == "/v1/completions"


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (refusal("too long"), "too long"),
        (httpx.Response(502, text="<html>"), "status 502"),
        (events("x", error="the engine failed"), "the engine failed"),
        (httpx.Response(200, text='data: {"choices": []'), "before"),
        (httpx.Response(200, text=""), "before the answer did"),
    ],
    ids=["refused", "another server", "broken off", "cut", "empty"],
)
def test_what_goes_wrong_is_told_in_words(response: httpx.Response, words: str) -> None:
    with pytest.raises(RequestFailed, match=words):
        list(FakeService(response).client().chat({"messages": []}, Pace()))


def test_nobody_there_is_told_in_words() -> None:
    with pytest.raises(RequestFailed, match=r"127\.0\.0\.1:1"):
        list(Client("http://127.0.0.1:1").chat({"messages": []}, Pace()))


def test_a_conversation_sends_its_history() -> None:
    service = FakeService(events("Hi", "!"), events("Bye"), events("New"))
    conversation = Conversation(service.client(), system="Rhyme.", seed=7, temperature=None)
    list(conversation.say("hello", Pace()))
    list(conversation.say("go on", Pace()))
    conversation.forget()
    list(conversation.say("again", Pace()))
    system = {"role": "system", "content": "Rhyme."}
    assert service.asked[1]["messages"] == [
        system,
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "go on"},
    ]
    assert service.asked[2]["messages"] == [system, {"role": "user", "content": "again"}]
    assert service.asked[0]["seed"] == 7
    assert "temperature" not in service.asked[0]


def test_a_turn_that_failed_leaves_no_trace_and_one_cut_short_counts_as_heard() -> None:
    service = FakeService(events("x", error="dead"), events("One", " two"))
    conversation = Conversation(service.client())
    with pytest.raises(RequestFailed):
        list(conversation.say("hello", Pace()))
    assert conversation.messages == []
    parts = conversation.say("hello", Pace())
    next(parts)
    parts.close()
    assert conversation.messages[1] == {"role": "assistant", "content": "One"}


class Typed(Console):
    """A console at which somebody has typed."""

    def __init__(self, *lines: str) -> None:
        super().__init__(file=io.StringIO(), highlight=False)
        self._lines = list(lines)

    def input(self, *args: Any, **kwargs: Any) -> str:
        if not self._lines:
            raise EOFError
        return self._lines.pop(0)

    @property
    def shown(self) -> str:
        return self.file.getvalue()  # type: ignore[attr-defined]


def test_a_talk_shows_answers_their_pace_and_refusals_and_goes_on() -> None:
    service = FakeService(events("Once", " [upon]"), refusal("too long"), events("End"))
    console = Typed("tell", "", "/history", "/what", "more", "/new", "end", "/exit", "never read")
    talk(Conversation(service.client()), console)
    assert "Once [upon]" in console.shown
    assert "(2 tokens" in console.shown
    assert "user: tell" in console.shown
    assert "too long" in console.shown
    assert [len(asked["messages"]) for asked in service.asked] == [1, 3, 1]


def test_ctrl_c_cuts_an_answer_short_and_not_the_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(FakeService(events("One", " two")).client())
    console = Typed()

    def interrupted(*args: object, **kwargs: object) -> None:
        if args and args[0] == " two":
            raise KeyboardInterrupt
        Console.print(console, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(console, "print", interrupted)
    answer(conversation, "tell", console)
    assert "cut short" in console.shown
    assert conversation.messages[1]["content"] == "One two"


@pytest.fixture
def url() -> Iterator[str]:
    """A service on a port, that says the same to everybody."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = events(" there", " was").content
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_generate_asks_a_running_service(url: str) -> None:
    result = CliRunner().invoke(app, ["generate", "Once", "--url", url])
    assert result.stdout.startswith("Once there was\n")
    whole = CliRunner().invoke(app, ["generate", "--token-ids", "1,2", "--url", url, "--json"])
    assert json.loads(whole.stdout)["text"] == " there was"
    assert json.loads(whole.stdout)["usage"] == {"completion_tokens": 2}


def test_generate_refuses_what_is_the_services_own(url: str) -> None:
    result = CliRunner().invoke(app, ["generate", "Once", "--url", url, "--dtype", "int8"])
    assert "leave that out" in str(result.exception)


def test_chat_talks_to_a_running_service(url: str) -> None:
    result = CliRunner().invoke(app, ["chat", "--url", url], input="tell\n")
    assert "there was" in result.stdout
