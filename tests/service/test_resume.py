"""A replica dies in the middle of an answer, and another one finishes it: the whole HTTP application over two real
engines, without Ray. Whatever was asked for, the answer is the one of an undisturbed run, log-probabilities and all.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio

from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from service import replica as replica_module
from service.api.routes import create_api
from service.completion import Service
from service.dispatch import Dispatcher
from service.door import Door
from service.limits import Limits
from service.metrics import IngressMetrics
from service.replica import EngineReplica, Queue
from tests.service.fakes import LocalFleet

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPTIONS: dict[str, Any] = {
    "dtype": "fp32",
    "device": "cpu",
    "kv_cache_tokens": 4096,
    "num_threads": 1,
    "max_num_seqs": 8,
    "deterministic": True,  # log-probabilities are compared to the last bit
}
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "owl"]}, "name": {"type": "string", "maxLength": 12}},
    "required": ["animal", "name"],
    "additionalProperties": False,
}
PET = {"name": "pet", "schema": SCHEMA}
EXACT = {"max_tokens": 24, "ignore_eos": True}
LONG = {"max_tokens": 400, "ignore_eos": True}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {**EXACT, "temperature": 0},
    "seeded": {**EXACT},
    "top-p and top-k": {**EXACT, "top_p": 0.9, "top_k": 40, "min_p": 0.001},
    "penalties": {**EXACT, "presence_penalty": 0.7, "frequency_penalty": 0.9, "repetition_penalty": 1.3},
    "bias": {**EXACT, "logit_bias": {"70": 3.0, "80": -50}},
    "least tokens": {"max_tokens": 24, "min_tokens": 20, "logit_bias": {"1": 30}},
    "choices": {**EXACT, "n": 3},
    "the best of": {**EXACT, "n": 2, "best_of": 4},
    "log-probabilities": {**EXACT, "logprobs": 3},
    "the prompt's log-probabilities": {**EXACT, "logprobs": 2, "echo": True},
    "attention weights": {**EXACT, "attention": {"layers": [0, 2], "heads": [1], "top_k": 3}},
    "a schema": {
        "max_tokens": 60,
        "response_format": {"type": "json_schema", "json_schema": PET},
    },
    "an expression": {"max_tokens": 40, "structured_outputs": {"regex": "[a-z]{4}( [a-z]{3}){5}"}},
}


@asynccontextmanager
async def two_replicas(model: Path, **options: Any) -> AsyncIterator[LocalFleet]:
    replicas = []
    for name in "ab":
        context = SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replica_module.serve, "get_replica_context", lambda context=context: context)
            replicas.append(EngineReplica(str(model), "tiny", OPTIONS | options, Queue(max_waiting=64)))
    yield LocalFleet(*replicas)
    for replica in replicas:
        replica.__del__()


@asynccontextmanager
async def application(fleet: LocalFleet, model: Path) -> AsyncIterator[httpx.AsyncClient]:
    metrics = IngressMetrics("tiny")
    dispatcher = Dispatcher(fleet, metrics)  # type: ignore[arg-type]
    template = ChatTemplate.from_directory(model)
    service = Service("tiny", 0, Tokenizer.from_directory(model), template, dispatcher, metrics, Limits())
    transport = httpx.ASGITransport(create_api(service, Door()))
    async with httpx.AsyncClient(transport=transport, base_url="http://attendant", timeout=60) as client:
        yield client
    dispatcher.close()
    template.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines(tiny_model: Path) -> AsyncIterator[LocalFleet]:
    async with two_replicas(tiny_model) as fleet:
        yield fleet


@pytest.fixture
def fleet(engines: LocalFleet) -> LocalFleet:
    engines.revive()
    return engines


@pytest_asyncio.fixture(loop_scope="module")
async def api(fleet: LocalFleet, tiny_model: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with application(fleet, tiny_model) as client:
        yield client


async def complete(api: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """An answer without what differs from call to call."""
    body = {"model": "tiny", "prompt": "Once upon a time", "seed": 11, "receipt": True, **fields}
    answer = await api.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    for name in ("id", "created"):
        del whole[name]
    del whole["usage"]["prompt_tokens_details"]  # what the cache held depends on who was asked before
    return whole


async def busy(fleet: LocalFleet) -> EngineReplica:
    """The replica that has begun to compute; it is slow enough for that to be seen."""
    async with asyncio.timeout(20):
        while True:
            for replica in fleet.replicas.values():
                if any(owner.request.num_output_tokens > 3 for owner in replica._owners.values()):
                    return replica
            await asyncio.sleep(0)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
async def test_an_answer_whose_replica_died_is_the_undisturbed_one(
    api: httpx.AsyncClient, fleet: LocalFleet, fields: dict[str, Any]
) -> None:
    undisturbed = await complete(api, **fields)
    fleet.lifetime = 7
    disturbed = await complete(api, **fields)
    receipts = [whole.pop("receipt") for whole in (undisturbed, disturbed)]
    assert disturbed == undisturbed
    assert [receipt["resumes"] for receipt in receipts] == [0, 1]


async def test_an_answer_is_the_same_where_a_channel_takes_a_call_for_each_item(
    api: httpx.AsyncClient, fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = await complete(api, **LONG)
    monkeypatch.setattr("service.link.ITEMS_A_CALL", 1)
    for lifetime in (None, 7):
        fleet.lifetime = lifetime
        disturbed = await complete(api, **LONG)
        assert disturbed["choices"] == undisturbed["choices"]
    assert disturbed["receipt"]["resumes"] == 1


async def test_a_stop_string_that_a_death_falls_into_is_found_and_never_shown(
    api: httpx.AsyncClient, fleet: LocalFleet
) -> None:
    fields = {**LONG, "max_tokens": 150}
    text = (await complete(api, **fields))["choices"][0]["text"]
    stop = text[-30:-20]
    undisturbed = await complete(api, **fields, stop=stop)
    fleet.lifetime = undisturbed["usage"]["completion_tokens"] - 3  # the stop string has begun
    disturbed = await complete(api, **fields, stop=stop)
    assert disturbed["receipt"]["resumes"] == 1
    assert disturbed["choices"] == undisturbed["choices"]
    assert disturbed["choices"][0]["text"] == text[: text.index(stop)]


async def test_a_guessing_engine_goes_on_with_the_same_tokens(tiny_model: Path) -> None:
    fields = {**EXACT, "prompt": "the fox and the fox and the fox and", "max_tokens": 60, "temperature": 0}
    async with two_replicas(tiny_model, speculative_tokens=4) as fleet, application(fleet, tiny_model) as api:
        undisturbed = await complete(api, **fields)
        fleet.lifetime = 9
        disturbed = await complete(api, **fields)
    assert disturbed["receipt"]["resumes"] == 1
    assert disturbed["choices"] == undisturbed["choices"]


async def test_an_answer_whose_engine_thread_died_while_its_replica_lived_is_the_undisturbed_one(
    tiny_model: Path,
) -> None:
    async with two_replicas(tiny_model) as fleet, application(fleet, tiny_model) as api:
        undisturbed = await complete(api, **LONG)
        answer = asyncio.create_task(complete(api, **LONG))
        victim = await busy(fleet)
        await asyncio.to_thread(victim._loop.stop)
        disturbed = await answer
    assert disturbed["receipt"]["resumes"] == 1
    assert disturbed["choices"] == undisturbed["choices"]


async def test_an_answer_whose_engine_sticks_in_a_step_is_the_undisturbed_one(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.step_watch.LEAST_S", 0.5)
    go_on = threading.Event()

    async with two_replicas(tiny_model) as fleet, application(fleet, tiny_model) as api:
        undisturbed = await complete(api, **LONG)
        answer = asyncio.create_task(complete(api, **LONG))
        engine = (await busy(fleet))._engine
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: (go_on.wait(30), step())[1])
        disturbed = await answer
        go_on.set()
    assert disturbed["receipt"]["resumes"] == 1
    assert disturbed["choices"] == undisturbed["choices"]
