"""The OpenAPI document is exact, says schemathesis: what it allows is not refused for its form, what it forbids is
refused, and what comes back is as described. Nothing fails with a 5xx and nothing hangs, whatever is sent.

A dozen examples for each operation and mode here, 500 in `make faults`.
"""

import asyncio
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from service import replica as replica_module
from service.api.document import OPERATIONS
from service.api.routes import create_api
from service.completion import Service
from service.data_plane import free_port
from service.dispatch import Dispatcher
from service.door import Door
from service.limits import Limits
from service.metrics import IngressMetrics
from service.replica import EngineReplica, Queue
from tests.service.conftest import ENGINE_OPTIONS
from tests.service.fakes import LocalFleet

pytestmark = [pytest.mark.slow, pytest.mark.faults]

EXAMPLES = 500 if os.environ.get("ATTENDANT_FAULTS") == "full" else 12
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)
# How a value is refused for its form alone, which a schema can say; anything else that we refuse, it cannot.
FOR_ITS_FORM = re.compile(r"should |unknown field|is required|not supported here|must be a string|none\", \"auto")


@pytest.fixture(scope="module")
def address(tiny_model: Path) -> Iterator[str]:
    """The application over a real engine with a short context, on a port of its own, in a thread of its own."""
    port = free_port()
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica_module.serve, "get_replica_context", lambda: context)
        options = ENGINE_OPTIONS | {"max_num_seqs": 8, "max_model_len": 96}
        replica = EngineReplica(str(tiny_model), "tiny", options, Queue(max_waiting=64))

    async def serve() -> None:
        metrics = IngressMetrics("tiny")
        dispatcher = Dispatcher(LocalFleet(replica), metrics)  # type: ignore[arg-type]
        template, tokenizer = ChatTemplate.from_directory(tiny_model), Tokenizer.from_directory(tiny_model)
        service = Service("tiny", 0, tokenizer, template, dispatcher, metrics, Limits())
        await server_of(create_api(service, Door())).serve()
        dispatcher.close()

    started: list[uvicorn.Server] = []

    def server_of(api: Any) -> uvicorn.Server:
        started.append(uvicorn.Server(uvicorn.Config(api, port=port, log_level="critical")))
        return started[0]

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    while not started or not started[0].started:
        threading.Event().wait(0.02)
    yield f"http://127.0.0.1:{port}"
    started[0].should_exit = True
    thread.join()
    replica.__del__()


@pytest.fixture(scope="module")
def document(address: str) -> Any:
    return schemathesis.openapi.from_dict(httpx.get(f"{address}/openapi.json").json())


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: " ".join(operation))
def test_schemathesis_agrees_with_the_document(
    operation: tuple[str, str], mode: GenerationMode, address: str, document: Any
) -> None:
    method, path = operation
    described = document[path][method.upper()]
    body = OPERATIONS[operation].body
    valid = None
    if body is not None:
        schema = {**document.raw_schema, "$ref": f"#/components/schemas/{body.__name__}"}
        valid = jsonschema.Draft202012Validator(schema)
    if mode is GenerationMode.NEGATIVE and OPERATIONS[operation].body is None:
        return  # nothing can be wrong with a path

    @given(case=described.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        phases=[Phase.generate],
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        answer = case.call(base_url=address, timeout=30)
        case.validate_response(answer, checks=CHECKS)
        # Not schemathesis' own word for what is wrong: what one branch of a union forbids, another may allow.
        if valid is not None and valid.is_valid(case.body):
            assert answer.status_code < 400 or not FOR_ITS_FORM.search(answer.json()["error"]["message"]), answer.text
        elif valid is not None:
            assert 400 <= answer.status_code < 500, answer.text

    check()


def test_the_document_describes_every_route(address: str) -> None:
    described = httpx.get(f"{address}/openapi.json").json()
    assert {(method, path) for path, methods in described["paths"].items() for method in methods} == set(OPERATIONS)
    assert described["openapi"].startswith("3.1")


def test_the_page_shows_the_document_and_loads_nothing_from_elsewhere(address: str) -> None:
    page = httpx.get(f"{address}/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "openapi.json" in page.text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.text)
