"""The spans of a request: what they are called, what they hold, whose trace they belong to, and when there are none."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from model.errors import ConfigError
from service import telemetry
from service.api.routes import create_api
from service.call import Call
from service.completion import Service
from service.door import Door
from service.limits import Limits
from service.replica import EngineReplica
from service.telemetry import Telemetry
from service.tracing import Tracer
from tests.service.conftest import in_process
from tests.service.test_gate import complete, service_with

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


@dataclass
class Traced:
    """The application over a real engine, with what both sides have sent to a collector."""

    client: httpx.AsyncClient
    replica: EngineReplica
    ingress_spans: InMemorySpanExporter
    engine_spans: InMemorySpanExporter

    def server_span(self) -> ReadableSpan:
        (span,) = [span for span in self.ingress_spans.get_finished_spans() if span.kind is SpanKind.SERVER]
        return span

    async def phases(self, count: int) -> dict[str, ReadableSpan]:
        """The spans below the server's, once there are so many."""
        async with asyncio.timeout(10):
            while True:
                spans = self.ingress_spans.get_finished_spans() + self.engine_spans.get_finished_spans()
                found = {span.name: span for span in spans if span.kind is SpanKind.INTERNAL}
                if len(found) >= count:
                    return found
                await asyncio.sleep(0)


@pytest.fixture
async def traced(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Traced]:
    exporters = InMemorySpanExporter(), InMemorySpanExporter()
    tracers = Tracer(SimpleSpanProcessor(exporters[0]), "i1"), Tracer(SimpleSpanProcessor(exporters[1]), "r1")
    async with in_process(tiny_model, monkeypatch, Door(), tracers=tracers) as (client, replica):
        yield Traced(client, replica, *exporters)


async def chat(client: httpx.AsyncClient, headers: Any = None, **body: object) -> httpx.Response:
    asked = {"messages": [{"role": "user", "content": "the secret fox"}], "max_tokens": 6, "ignore_eos": True, **body}
    return await client.post("/v1/chat/completions", json=asked, headers=headers)


async def test_a_request_is_a_server_span_with_its_phases_below_it(traced: Traced) -> None:
    await complete(traced.client, ignore_eos=True)
    phases, server = await traced.phases(4), traced.server_span()
    assert server.parent is None
    assert sorted(phases, key=lambda name: phases[name].start_time or 0) == [
        "admission",
        "queue",
        "prefill",
        "decode",
    ]
    for span in phases.values():
        assert span.context.trace_id == server.context.trace_id
        assert span.parent is not None
        assert span.parent.span_id == server.context.span_id
        # Each is one reading of two clocks, which are not read at the same moment.
        assert (server.start_time or 0) <= (span.start_time or 0) + 200_000
        assert (span.start_time or 0) <= (span.end_time or 0) + 200_000
    assert phases["queue"].end_time == pytest.approx(phases["prefill"].start_time, abs=200_000)
    assert phases["prefill"].end_time == pytest.approx(phases["decode"].start_time, abs=200_000)
    assert {span.name for span in traced.engine_spans.get_finished_spans()} == {"queue", "prefill", "decode"}


async def test_the_span_is_named_and_filled_as_the_conventions_say(traced: Traced) -> None:
    answer = await chat(traced.client, {"x-request-id": "mine"}, temperature=0.5, seed=7, n=2, stream=True)
    span = traced.server_span()
    held = dict(span.attributes or {})
    assert span.name == "chat tiny"
    assert held.pop("gen_ai.response.time_to_first_chunk") > 0
    assert held.pop("gen_ai.usage.input_tokens") > 3
    assert held == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": answer.status_code,
        "url.scheme": "http",
        "url.path": "/v1/chat/completions",
        "server.address": "attendant",
        "attendant.request_id": "mine",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "attendant",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length", "length"),
    }
    assert span.resource.attributes["service.name"] == "attendant"
    assert span.resource.attributes["service.instance.id"] == "i1"


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 2}, "text_completion tiny"),
        ("/v1/responses", {"input": "x", "max_output_tokens": 2}, "chat tiny"),
        ("/tokenize", {"prompt": "x"}, "POST /tokenize"),
    ],
)
async def test_each_kind_of_request_has_its_name(traced: Traced, path: str, body: Any, name: str) -> None:
    assert (await traced.client.post(path, json=body)).status_code == 200
    assert traced.server_span().name == name


async def test_an_answer_that_is_held_to_a_schema_says_so(traced: Traced) -> None:
    await chat(traced.client, response_format={"type": "json_object"})
    assert (traced.server_span().attributes or {})["gen_ai.output.type"] == "json"


async def test_nothing_that_a_client_wrote_is_in_any_span(traced: Traced) -> None:
    await chat(traced.client, stop="secret stop")
    await traced.client.get("/secret/path?secret=1")
    await traced.phases(4)
    spans = traced.ingress_spans.get_finished_spans() + traced.engine_spans.get_finished_spans()
    assert len(spans) == 6
    assert not any("secret" in span.to_json() for span in spans)


async def test_a_request_goes_on_with_the_trace_of_its_client(traced: Traced) -> None:
    answer = await complete(traced.client, {"traceparent": SAMPLED, "tracestate": "vendor=1"}, ignore_eos=True)
    phases, span = await traced.phases(4), traced.server_span()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.parent is not None
    assert (f"{span.parent.span_id:016x}", span.parent.is_remote) == (PARENT, True)
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert phases["decode"].context.trace_state.to_header() == "vendor=1", "it has crossed to the engine"
    assert phases["decode"].parent is not None
    assert phases["decode"].parent.is_remote


async def test_what_the_client_does_not_record_nobody_records(traced: Traced) -> None:
    answer = await complete(traced.client, {"traceparent": UNSAMPLED})
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-")
    assert answer.headers["traceresponse"].endswith("-00")
    assert traced.ingress_spans.get_finished_spans() == traced.engine_spans.get_finished_spans() == ()
    assert traced.replica._timings == {}, "the engine was not asked to note anything"


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "00-zz-00f067aa0ba902b7-01")],
        [("traceparent", f"00-{'0' * 32}-{PARENT}-01")],
        [("traceparent", SAMPLED), ("traceparent", SAMPLED)],
    ],
    ids=["no hexadecimal digits", "no trace", "twice"],
)
async def test_a_traceparent_that_is_none_begins_a_trace_of_our_own(traced: Traced, headers: Any) -> None:
    assert (await complete(traced.client, headers)).status_code == 200
    assert traced.server_span().parent is None


async def test_a_refused_request_is_no_error_of_the_servers(traced: Traced) -> None:
    await complete(traced.client, max_tokens=-1)
    span = traced.server_span()
    assert span.status.status_code is StatusCode.UNSET
    assert (span.attributes or {})["http.response.status_code"] == 400
    assert await traced.phases(0) == {}


async def test_a_step_that_fails_is_an_error_of_the_request_and_of_its_phase(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traced.replica._engine.runner, "forward", lambda batch: 1 / 0)
    assert (await complete(traced.client)).status_code == 500
    span = traced.server_span()
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "ServiceError"
    assert (await traced.phases(2))["queue"].status.status_code is StatusCode.ERROR


async def test_a_stream_that_breaks_off_is_an_error_though_its_status_was_200(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = traced.replica._engine.runner
    app: Any = traced.client._transport.app  # type: ignore[attr-defined]
    forward, told = runner.forward, app.state.service.metrics.expose
    monkeypatch.setattr(runner, "forward", lambda batch: 1 / 0 if 'status="200"' in told() else forward(batch))
    assert (await chat(traced.client, stream=True, max_tokens=900)).status_code == 200
    span = traced.server_span()
    assert (span.status.status_code, (span.attributes or {})["error.type"]) == (StatusCode.ERROR, "ServiceError")


async def test_an_engine_request_that_was_aborted_has_its_phases_up_to_then(traced: Traced) -> None:
    answer = await complete(traced.client, max_tokens=900, ignore_eos=True, stop=[chr(code) for code in range(97, 112)])
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert set(await traced.phases(4)) == {"admission", "queue", "prefill", "decode"}


def test_a_collector_that_is_gone_costs_no_request_and_no_time_at_the_end() -> None:
    tracer = Tracer.to_collector("http://127.0.0.1:9", "i1")
    call, scope = Call("x"), {"method": "GET", "path": "/health", "headers": []}
    tracer.begin(scope, call)
    tracer.end(scope, call, "/health", 200, "tiny")
    tracer.close()
    assert call.trace_response is not None


KEPT = """
import service.tracing, service.telemetry

class Replica:
    def __init__(self):
        self.tracer = service.telemetry.Telemetry(trace_endpoint="http://127.0.0.1:9").tracer("x")
        self.itself = self
    def __del__(self):
        print("deleted")
        self.tracer.close()

kept = Replica()
"""


def test_a_tracer_that_is_closed_as_the_interpreter_ends_does_not_hold_it_up() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "deleted\n"


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://collector/otlp/spans", "https://collector/otlp/spans"),
    ],
)
def test_an_endpoint_without_a_path_has_the_standard_one(
    endpoint: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Exporter(InMemorySpanExporter):
        def __init__(self, url: str) -> None:
            seen.append(url)
            super().__init__()

    monkeypatch.setattr("service.tracing.OTLPSpanExporter", Exporter)
    Tracer.to_collector(endpoint, "i1").close()
    assert seen == [url]


def test_the_environment_names_the_service_and_turns_sampling_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "stories")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    exporter, scope = InMemorySpanExporter(), {"method": "GET", "path": "/health", "headers": []}

    def trace() -> Any:
        tracer, call = Tracer(SimpleSpanProcessor(exporter), "i1"), Call("x")
        tracer.begin(scope, call)
        tracer.end(scope, call, "/health", 200, "tiny")
        return call.trace_response

    trace()
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == "stories"
    assert span.resource.attributes["deployment.environment.name"] == "test"
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    assert trace().endswith("-00")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert trace() is None
    assert len(exporter.get_finished_spans()) == 1


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://", "http:///v1/traces"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="trace_endpoint"):
        Telemetry.of(trace_endpoint=endpoint)


def test_an_exporter_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        Telemetry(trace_endpoint="http://collector:4318").tracer("i1")


async def test_without_an_endpoint_nothing_of_it_is_there(tiny_model: Path) -> None:
    service: Service = service_with(tiny_model, Limits())
    transport = httpx.ASGITransport(create_api(service, Door()))
    async with httpx.AsyncClient(transport=transport, base_url="http://attendant") as client:
        answer = await complete(client, {"traceparent": SAMPLED})
    assert "traceresponse" not in answer.headers


IMPORTS = """
import sys
before = None
import ray.serve
before = {name for name in sys.modules if name.startswith("opentelemetry")}
import service.ingress, service.replica, service.app
from service.telemetry import Telemetry
assert Telemetry().tracer("x") is None
print(sorted(name for name in sys.modules if name.startswith("opentelemetry") and name not in before))
print("service.tracing" in sys.modules)
"""


def test_without_an_endpoint_nothing_is_imported_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False"]
