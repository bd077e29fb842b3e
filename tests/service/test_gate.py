"""The door of the HTTP application, without Ray: keys, their limits, deadlines, headers, ids and CORS."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from openai import APIStatusError, AsyncOpenAI

from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from service import keys
from service.api.gate import PROBES
from service.api.routes import create_api
from service.completion import Service
from service.dispatch import Dispatcher
from service.door import Door
from service.errors import Overloaded
from service.limits import Limits
from service.metrics import IngressMetrics
from tests.service.fakes import FakeFleet
from tests.service.test_api import Storyteller, events, refusal


def service_with(model: Path, limits: Limits, fleet: FakeFleet | None = None) -> Service:
    """Over engines that say what the test has them say; without any, over one that tells a story."""
    tokenizer, metrics = Tokenizer.from_directory(model), IngressMetrics("tiny")
    dispatcher = Dispatcher(fleet or Storyteller(tokenizer), metrics)  # type: ignore[arg-type]
    return Service("tiny", 0, tokenizer, ChatTemplate.from_directory(model), dispatcher, metrics, limits)


@asynccontextmanager
async def client_of(service: Service, door: Door, key: str = "") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_api(service, door), raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(transport=transport, base_url="http://attendant", headers=headers) as client:
        yield client


async def complete(client: httpx.AsyncClient, headers: Any = None, **body: object) -> httpx.Response:
    return await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 8, **body}, headers=headers)


@pytest.fixture
def service(tiny_model: Path) -> Service:
    return service_with(tiny_model, Limits())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def routes_of(routes: Iterable[Any]) -> set[tuple[str, str]]:
    """Every (method, path) that a router knows, those of the routers in it, too."""
    found = set()
    for route in routes:
        if hasattr(route, "path"):
            found |= {(method, route.path) for method in route.methods}
        else:
            found |= routes_of(route.original_router.routes)
    return found


async def test_every_route_but_the_probes_needs_a_key(service: Service, file: Path) -> None:
    """S8. A build whose door is a list of protected routes fails here with the first route that is added to it."""
    keys.add(file, "team-a")
    door = Door(api_keys_file=str(file))
    api = create_api(service, door)
    routes = routes_of(api.routes)
    assert set(api.openapi()["paths"]) <= {path.replace(":path}", "}") for _, path in routes}
    async with client_of(service, door) as client:
        for method, path in routes:
            answer = await client.request(method, path.replace("{model:path}", "tiny"))
            assert (answer.status_code == 401) == (path not in PROBES), f"{method} {path}: {answer.status_code}"


async def test_a_key_opens_every_route(service: Service, file: Path) -> None:
    key = keys.add(file, "team-a")
    async with client_of(service, Door(api_keys_file=str(file)), key) as client:
        assert (await complete(client)).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


async def test_a_refusal_for_want_of_a_key_says_how_to_send_one(service: Service, file: Path) -> None:
    keys.add(file, "team-a")
    async with client_of(service, Door(api_keys_file=str(file)), "att-wrong") as client:
        answer = await complete(client)
    assert refusal(answer, 401)["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_path_that_leads_nowhere_does_not_tell_so_without_a_key(service: Service, file: Path) -> None:
    keys.add(file, "team-a")
    async with client_of(service, Door(api_keys_file=str(file))) as client:
        assert (await client.get("/nowhere")).status_code == 401


async def test_a_key_has_no_more_requests_open_than_it_may(service: Service, file: Path) -> None:
    key = keys.add(file, "team-a", max_concurrent=1)
    fleet: Any = service.dispatcher._engines.handle
    ids, fleet.ids = fleet.ids, []  # this test speaks for the engine
    async with client_of(service, Door(api_keys_file=str(file)), key) as client:
        first = asyncio.create_task(complete(client))
        async with asyncio.timeout(5):
            while not fleet.replicas["a"].submitted:
                await asyncio.sleep(0)
        assert refusal(await complete(client), 429)["code"] == "too_many_requests_open"
        fleet.replicas["a"].say(0, *ids, finish_reason="stop")
        assert (await first).status_code == 200
        fleet.ids = ids
        assert (await complete(client)).status_code == 200


async def test_where_no_engine_has_room_a_body_is_refused_before_it_is_parsed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under overload, parsing and tokenizing what nobody will take is what keeps the ingress from answering."""

    def full() -> None:
        raise Overloaded("full", retry_after_s=3)

    monkeypatch.setattr(service.dispatcher, "check_room", full)
    async with client_of(service, Door()) as client:
        headers = {"content-type": "application/json"}
        answer = await client.post("/v1/completions", content=b"{", headers=headers)
        refusal(answer, 429)
        assert answer.headers["retry-after"] == "3"


async def test_a_key_that_has_used_its_tokens_is_told_when_to_come_back(service: Service, file: Path) -> None:
    key = keys.add(file, "team-a", tokens_per_minute=600)
    async with client_of(service, Door(api_keys_file=str(file)), key) as client:
        assert (await complete(client, prompt=[5] * 40, max_tokens=8)).status_code == 200
        answer = await complete(client, prompt=[5] * 40, max_tokens=560)
        assert refusal(answer, 429)["code"] == "token_rate_exceeded"
        assert 4 <= int(answer.headers["retry-after"]) <= 5
        assert (await complete(client, prompt=[5] * 40, max_tokens=500)).status_code == 200


async def test_one_of_two_ingresses_lets_a_key_use_half_of_its_tokens(service: Service, file: Path) -> None:
    key = keys.add(file, "team-a", tokens_per_minute=600)
    async with client_of(service, Door(api_keys_file=str(file), ingresses=2), key) as client:
        assert (await complete(client, prompt=[5] * 40, max_tokens=8)).status_code == 200
        answer = await complete(client, prompt=[5] * 40, max_tokens=280)
        assert refusal(answer, 429)["code"] == "token_rate_exceeded"


async def test_a_prompt_beyond_the_operators_limit_is_refused(tiny_model: Path) -> None:
    async with client_of(service_with(tiny_model, Limits(max_prompt_tokens=4)), Door()) as client:
        assert refusal(await complete(client, prompt=[5] * 5), 400)["param"] == "prompt"
        assert (await complete(client, prompt=[5] * 4)).status_code == 200


@pytest.mark.parametrize(
    ("limits", "body", "param"),
    [
        ({"max_choices": 2}, {"n": 3}, "n"),
        ({"max_stop_strings": 1}, {"stop": ["a", "b"]}, "stop"),
    ],
    ids=["n", "stop"],
)
async def test_what_exceeds_a_limit_is_refused_by_name(
    tiny_model: Path, limits: dict[str, int], body: dict[str, object], param: str
) -> None:
    async with client_of(service_with(tiny_model, Limits(**limits)), Door()) as client:
        assert refusal(await complete(client, **body), 400)["param"] == param


async def test_a_header_that_is_too_large_is_refused(service: Service) -> None:
    async with client_of(service, Door()) as client:
        answer = await complete(client, headers={"x-much": "x" * 9000})
    refusal(answer, 431)
    assert answer.headers["connection"] == "close", "nobody reads what else it sends"


async def test_a_body_that_comes_too_slowly_is_refused(tiny_model: Path) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        await asyncio.Event().wait()

    async with client_of(service_with(tiny_model, Limits(max_body_seconds=0.05)), Door()) as client:
        answer = await client.post("/v1/completions", content=trickle(), headers={"content-type": "application/json"})
    assert refusal(answer, 408)["code"] == "body_too_slow"


@pytest.mark.parametrize("way", ["header", "field"])
async def test_a_deadline_that_has_passed_is_refused_before_the_engine_hears_of_it(service: Service, way: str) -> None:
    headers, body = ({"x-request-deadline-ms": "0"}, {}) if way == "header" else ({}, {"deadline_ms": 0})
    async with client_of(service, Door()) as client:
        assert refusal(await complete(client, headers, **body), 408)["code"] == "deadline_exceeded"
    fleet: Any = service.dispatcher._engines.handle
    assert fleet.replicas["a"].submitted == []


async def test_openais_client_does_not_try_again_what_came_too_late(service: Service) -> None:
    asked = []

    async def note(request: httpx2.Request) -> None:
        asked.append(request)

    transport = httpx2.ASGITransport(create_api(service, Door()))
    http = httpx2.AsyncClient(transport=transport, event_hooks={"request": [note]})
    async with AsyncOpenAI(base_url="http://attendant/v1", api_key="none", http_client=http) as client:
        with pytest.raises(APIStatusError, match="deadline") as refused:
            await client.completions.create(model="tiny", prompt="x", extra_body={"deadline_ms": 0})
    assert (refused.value.status_code, len(asked)) == (408, 1)


async def test_of_two_deadlines_the_first_holds(service: Service) -> None:
    async with client_of(service, Door()) as client:
        refusal(await complete(client, {"x-request-deadline-ms": "0"}, deadline_ms=60_000), 408)
        refusal(await complete(client, {"x-request-deadline-ms": "60000"}, deadline_ms=0), 408)


async def test_a_request_within_its_deadline_is_answered(service: Service) -> None:
    async with client_of(service, Door()) as client:
        assert (await complete(client, deadline_ms=60_000)).status_code == 200


async def test_a_deadline_that_passes_while_the_request_waits_ends_it_with_a_408(service: Service) -> None:
    fleet: Any = service.dispatcher._engines.handle
    fleet.ids = []  # the engine never answers
    async with client_of(service, Door()) as client:
        refusal(await complete(client, deadline_ms=50), 408)
    async with asyncio.timeout(5):
        while not fleet.replicas["a"].aborted:
            await asyncio.sleep(0)


@pytest.mark.parametrize("text", ["soon", "-1", "1.5", "99999999999999999999", "", "1e3"])
async def test_a_deadline_that_is_no_time_is_refused_by_name(service: Service, text: str) -> None:
    async with client_of(service, Door()) as client:
        error = refusal(await complete(client, {"x-request-deadline-ms": text}), 400)
    assert error["param"] == "x-request-deadline-ms"


async def test_the_requests_of_a_session_are_told_apart_from_those_of_other_keys(service: Service, file: Path) -> None:
    fleet: Any = service.dispatcher._engines.handle
    for name in ("one", "two"):
        async with client_of(service, Door(api_keys_file=str(file)), keys.add(file, name)) as client:
            assert (await complete(client, {"x-session-id": "talk-1"})).status_code == 200
    sessions = {hint.session.partition("/")[::2] for hint in fleet.hints}
    assert len(sessions) == 2
    assert {session for _, session in sessions} == {"talk-1"}


@pytest.mark.parametrize("text", ["", "x" * 129, "two words", "uml\xe4ut"])
async def test_a_session_that_is_no_plain_name_is_refused(service: Service, text: str) -> None:
    async with client_of(service, Door()) as client:
        error = refusal(await complete(client, {"x-session-id": text.encode("latin-1")}), 400)
    assert error["param"] == "x-session-id"


async def test_an_answer_has_an_id_when_the_client_sent_none(service: Service) -> None:
    async with client_of(service, Door()) as client:
        ids = {(await client.get("/health")).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2


@pytest.mark.parametrize("text", ["x" * 129, "two words", 'quo"te', "uml\xe4ut"])
async def test_an_id_that_could_do_harm_is_refused(service: Service, text: str) -> None:
    async with client_of(service, Door()) as client:
        error = refusal(await client.get("/health", headers={"x-request-id": text.encode("latin-1")}), 400)
    assert error["param"] == "x-request-id"


async def test_a_browser_is_told_nothing_of_cors_by_default(service: Service) -> None:
    async with client_of(service, Door()) as client:
        answer = await client.get("/health", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers


async def test_a_named_origin_may_ask_and_others_may_not(service: Service, file: Path) -> None:
    keys.add(file, "team-a")
    door = Door(cors_origins=("https://a.example",), api_keys_file=str(file))
    question = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with client_of(service, door) as client:
        asked = {
            origin: await client.options("/v1/completions", headers={"origin": origin, **question})
            for origin in ("https://a.example", "https://b.example")
        }
        refused = await complete(client, {"origin": "https://a.example"})
    assert asked["https://a.example"].headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in asked["https://b.example"].headers
    assert refusal(refused, 401)
    assert refused.headers["access-control-allow-origin"] == "https://a.example", "the page may read why"


async def test_a_client_that_does_not_read_is_cut_off_and_the_engine_stopped(tiny_model: Path) -> None:
    """The server's `send` waits for the client; the engine does not."""
    service = service_with(tiny_model, Limits(max_unread_tokens=4))
    fleet: Any = service.dispatcher._engines.handle
    ids, fleet.ids = fleet.ids, []  # this test speaks for the engine
    body = json.dumps({"prompt": "x", "max_tokens": 1000, "stream": True}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    blocked = asyncio.Event()

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message.get("body"):
            blocked.set()
            await asyncio.Event().wait()

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/completions", "scheme": "http"}
    headers = [(b"content-type", b"application/json")]
    api = create_api(service, Door())
    call = asyncio.create_task(api({**scope, "headers": headers, "query_string": b""}, receive, send))
    a = fleet.replicas["a"]
    async with asyncio.timeout(5):
        while not a.submitted:
            await asyncio.sleep(0)
        a.say(0, *ids[:2])
        await blocked.wait()
        a.say(0, *ids[2:4])
        a.say(0, *ids[4:7])
        await asyncio.wait([call])  # not `await call`, which would cancel it when the time is over
        while not a.aborted:
            await asyncio.sleep(0)


async def test_a_deadline_that_passes_in_a_stream_ends_it_with_a_typed_error(service: Service) -> None:
    fleet: Any = service.dispatcher._engines.handle
    ids, fleet.ids = fleet.ids, []  # this test speaks for the engine
    async with client_of(service, Door()) as client:
        answering = asyncio.create_task(complete(client, stream=True, deadline_ms=60_000))
        a = fleet.replicas["a"]
        async with asyncio.timeout(5):
            while not a.submitted:
                await asyncio.sleep(0)
            a.say(0, ids[0])
            while 'route="/v1/completions",status="200"' not in service.metrics.expose():
                await asyncio.sleep(0)
        a.say(0, finish_reason="deadline")
        answer = await answering
    assert answer.status_code == 200
    *_, error, done = events(answer.text)
    assert (error["error"]["type"], error["error"]["code"]) == ("timeout_error", "deadline_exceeded")
    assert done == "[DONE]"
