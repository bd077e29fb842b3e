"""The HTTP application over a scripted engine, without Ray: shapes, refusals and the end of streams."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.sampling.result import TokenLogprobs
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from service.api.routes import create_api
from service.channel import Details, Refused
from service.completion import Service
from service.dispatch import Dispatcher
from service.door import Door
from service.limits import Limits
from service.metrics import IngressMetrics
from tests.service.fakes import FakeFleet

TEXT = "Once upon a time there was a fox."


class Storyteller(FakeFleet):
    """Answers every request with the same text, a token at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__("a")
        self.ids = tokenizer.encode(TEXT, add_special_tokens=False)

    async def _submit(self, channel_id: str, submissions: Any, hint: Any) -> Any:
        answer = await super()._submit(channel_id, submissions, hint)
        for submission in submissions:
            limit = min(submission.work.params.max_tokens, len(self.ids))
            for i, token_id in enumerate(self.ids[:limit]):
                reason = None if i + 1 < limit else "length"
                self.replicas["a"].outbox.put([(submission.request_id, [token_id], reason, 0, None)])
        return answer


@pytest.fixture
def service(tiny_model: Path) -> Service:
    tokenizer = Tokenizer.from_directory(tiny_model)
    metrics = IngressMetrics("tiny")
    dispatcher = Dispatcher(Storyteller(tokenizer), metrics)  # type: ignore[arg-type]
    return Service("tiny", 0, tokenizer, ChatTemplate.from_directory(tiny_model), dispatcher, metrics, Limits())


@pytest.fixture
async def api(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_api(service, Door()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://attendant") as client:
        yield client


def fleet_of(service: Service) -> FakeFleet:
    return service.dispatcher._engines.handle  # type: ignore[return-value]


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def complete(api: httpx.AsyncClient, **body: object) -> httpx.Response:
    return await api.post("/v1/completions", json={"prompt": "x", "max_tokens": 1000, **body})


async def test_a_completion_has_the_openai_shape(api: httpx.AsyncClient) -> None:
    body = (await complete(api)).json()
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length"}]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_a_streamed_completion_says_what_the_whole_one_says(api: httpx.AsyncClient) -> None:
    *chunks, done = events((await complete(api, stream=True)).text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"


async def test_a_chat_stream_opens_with_the_role_and_closes_with_the_reason(api: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    *chunks, done = events((await api.post("/v1/chat/completions", json=body)).text)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    assert deltas[-1] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_usage_comes_last_when_asked_for_and_is_null_before(api: httpx.AsyncClient) -> None:
    *chunks, usage, _ = events((await complete(api, stream=True, stream_options={"include_usage": True})).text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == (await complete(api)).json()["usage"]


@pytest.mark.parametrize("stream", [False, True])
async def test_text_ends_before_a_stop_string_and_the_engine_is_stopped(
    api: httpx.AsyncClient, service: Service, stream: bool
) -> None:
    answer = await complete(api, stop=" there", stream=stream)
    text = (
        "".join(chunk["choices"][0]["text"] for chunk in events(answer.text)[:-1])
        if stream
        else answer.json()["choices"][0]["text"]
    )
    assert text == "Once upon a time"


async def test_text_held_back_for_a_stop_string_that_never_comes_is_shown_at_the_end(api: httpx.AsyncClient) -> None:
    (choice,) = (await complete(api, stop="fox. The end")).json()["choices"]
    assert choice["text"] == TEXT


async def test_a_choice_that_met_its_stop_string_is_aborted_while_the_others_go_on(
    api: httpx.AsyncClient, service: Service
) -> None:
    fleet = fleet_of(service)
    ids, fleet.ids = fleet.ids, []  # type: ignore[attr-defined]  # this test speaks for the engine
    answering = asyncio.create_task(complete(api, n=2, stop=" time"))
    a = fleet.replicas["a"]
    async with asyncio.timeout(5):
        while not a.submitted:
            await asyncio.sleep(0)
        a.say(0, *ids)
        a.say(1, ids[0])
        while not a.aborted:
            await asyncio.sleep(0)
        assert a.aborted == [a.submitted[0].request_id]
        a.say(1, finish_reason="stop")
    assert [choice["finish_reason"] for choice in (await answering).json()["choices"]] == ["stop", "stop"]


async def test_tokens_behind_a_stop_string_have_no_logprobs(api: httpx.AsyncClient, service: Service) -> None:
    fleet = fleet_of(service)
    ids, fleet.ids = fleet.ids, []  # type: ignore[attr-defined]  # this test speaks for the engine
    answering = asyncio.create_task(complete(api, stop=" time", logprobs=0))
    a = fleet.replicas["a"]
    async with asyncio.timeout(5):
        while not a.submitted:
            await asyncio.sleep(0)
        told = Details([TokenLogprobs(-1.0, []) for _ in ids], None, None)
        a.outbox.put([(a.submitted[0].request_id, ids, "stop", 0, told)])  # all in one step, as a guess gives them
    body = (await answering).json()
    tokens = body["choices"][0]["logprobs"]["tokens"]
    assert "".join(tokens) == "Once upon a time"
    assert len(tokens) == body["usage"]["completion_tokens"] < len(ids)


async def test_choices_of_several_prompts_are_indexed_prompt_by_prompt(api: httpx.AsyncClient) -> None:
    body = (await complete(api, prompt=["a", "b"], n=2)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 2 + 2, "a prompt counts once, however many choices it has"


async def test_one_seed_gives_each_choice_its_own(api: httpx.AsyncClient, service: Service) -> None:
    await complete(api, n=3, seed=5)
    seeds = [submission.work.params.seed for submission in fleet_of(service).replicas["a"].submitted]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


async def test_without_a_seed_two_requests_differ(api: httpx.AsyncClient, service: Service) -> None:
    await complete(api)
    await complete(api)
    seeds = [submission.work.params.seed for submission in fleet_of(service).replicas["a"].submitted]
    assert seeds[0] != seeds[1]


async def test_a_chat_without_a_limit_gets_the_rest_of_the_context(api: httpx.AsyncClient, service: Service) -> None:
    await api.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    (submission,) = fleet_of(service).replicas["a"].submitted
    assert submission.work.params.max_tokens == 64 - len(submission.work.prompt_ids)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": NaN}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 10_000,
        b'{"n": ' + b"9" * 9999,
    ],
    ids=["empty", "cut", "NaN", "bad UTF-8", "lone surrogate", "deep", "huge number"],
)
async def test_a_body_that_is_not_json_is_refused(api: httpx.AsyncClient, body: bytes) -> None:
    answer = await api.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert "JSON" in refusal(answer, 400)["message"]


async def test_a_body_of_another_kind_is_refused(api: httpx.AsyncClient) -> None:
    answer = await api.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert "content-type" in refusal(answer, 400)["message"]


async def test_a_body_over_the_limit_is_refused(api: httpx.AsyncClient) -> None:
    refusal(await complete(api, prompt="x" * Limits().max_body_bytes), 413)


async def test_a_body_that_hides_its_size_is_refused_all_the_same(api: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65_536

    answer = await api.post("/v1/completions", content=endless(), headers={"content-type": "application/json"})
    refusal(answer, 413)


async def test_a_refused_field_is_named(api: httpx.AsyncClient) -> None:
    assert refusal(await complete(api, suffix="the end"), 400)["param"] == "suffix"


async def test_another_model_is_not_found(api: httpx.AsyncClient) -> None:
    error = refusal(await complete(api, model="gpt-4"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405), ("GET", "/v1/models/x", 404)],
)
async def test_a_wrong_route_or_method_has_the_same_error_shape(
    api: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    refusal(await api.request(method, path), status)


async def test_a_full_engine_says_when_to_come_back(api: httpx.AsyncClient, service: Service) -> None:
    fleet_of(service).replicas["a"].answer = Refused("a", "overloaded", "full", retry_after_s=3)
    answer = await complete(api)
    assert refusal(answer, 429)["type"] == "rate_limit_error"
    assert answer.headers["retry-after"] == "3"


async def test_more_choices_than_the_engine_can_ever_hold_are_refused(api: httpx.AsyncClient) -> None:
    assert refusal(await complete(api, n=17), 400)["param"] == "n"


async def test_an_engine_error_after_the_headers_is_the_last_event_but_one(
    api: httpx.AsyncClient, service: Service
) -> None:
    fleet = fleet_of(service)
    fleet.ids = []  # type: ignore[attr-defined]  # this test speaks for the engine
    answering = asyncio.create_task(complete(api, stream=True))
    a = fleet.replicas["a"]
    async with asyncio.timeout(5):
        while not a.submitted:
            await asyncio.sleep(0)
        a.say(0, 5)
        while 'route="/v1/completions",status="200"' not in service.metrics.expose():
            await asyncio.sleep(0)
        a.say(0, finish_reason="error")
    *_, error, done = events((await answering).text)
    assert error["error"]["type"] == "server_error"
    assert done == "[DONE]"


async def test_what_nobody_foresaw_is_a_500_without_its_inside(api: httpx.AsyncClient, service: Service) -> None:
    async def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("secret")

    object.__setattr__(service.dispatcher, "open", broken)
    assert "secret" not in refusal(await complete(api), 500)["message"]


async def test_a_client_that_leaves_before_the_first_token_stops_the_engine(service: Service) -> None:
    fleet = fleet_of(service)
    fleet.ids = []  # type: ignore[attr-defined]  # the engine never answers
    body = json.dumps({"prompt": "x"}).encode()
    left = asyncio.Event()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    call = asyncio.create_task(
        create_api(service, Door())({**scope, "http_version": "1.1", "scheme": "http"}, receive, send)
    )
    async with asyncio.timeout(5):
        while not fleet.replicas["a"].submitted:
            await asyncio.sleep(0)
        left.set()
        await call
        while not fleet.replicas["a"].aborted:
            await asyncio.sleep(0)
    assert 'attendant_client_disconnects_total{deployment="Ingress",model="tiny",replica="local"} 1.0' in (
        service.metrics.expose()
    )


async def test_the_metrics_know_no_path_that_a_client_made_up(api: httpx.AsyncClient, service: Service) -> None:
    for i in range(5):
        await api.get(f"/made-up-{i}")
    assert "made-up" not in service.metrics.expose()


async def test_the_document_describes_both_bodies(api: httpx.AsyncClient) -> None:
    document = (await api.get("/openapi.json")).json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    assert {"ChatRequest", "UserMessage", "CompletionRequest", "StreamOptions"} <= set(
        document["components"]["schemas"]
    )


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/v1/models/tiny", "/metrics"])
async def test_the_other_routes_answer(api: httpx.AsyncClient, path: str) -> None:
    assert (await api.get(path)).status_code == 200
