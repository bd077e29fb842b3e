"""The spans of a request, for an OpenTelemetry collector. Imported only where traces are wanted.

The ingress writes one server span for each request, and `admission` below it; the engine that answered writes `queue`,
`prefill` and `decode` below the same parent, whose context came with the submission. Their times were noted anyway:
spans are made when all is over, nothing is done for them while tokens flow. Names and attributes are those of the
semantic conventions for HTTP and for generative AI; what has no name there begins with `attendant.`. No span holds
anything of a prompt or of an answer.
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Self
from urllib.parse import urlsplit

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, format_span_id, format_trace_id, set_span_in_context
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import Scope

from service import __version__
from service.api.schemas.sampling import GenerationFields
from service.call import Call
from service.receipt import Timing
from service.telemetry import Trail

CLOSE_TIMEOUT_S = 2.0
DEFAULT_PATH = "/v1/traces"
SINGULAR = ("traceparent",)  # a header that must not come twice

PHASES = ("queue", "prefill", "decode")
OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat", "/v1/responses": "chat"}
# Of the request's own fields, those that the conventions have a name for and that hold no text.
ASKED = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed", "stream")


class Tracer:
    """Makes the spans of one process. Nothing here raises for a collector that is gone: its spans are lost, then."""

    def __init__(self, processor: SpanProcessor, instance: str) -> None:
        # Sampling follows OTEL_TRACES_SAMPLER; by default the client's own decision, and else everything.
        ours = Resource.create(
            {"service.name": "attendant", "service.version": __version__, "service.instance.id": instance}
        )
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("attendant", __version__)
        # Asked for once: what begins with its parent is not to begin before it.
        self._epoch_ns = time.time_ns() - _ns(time.perf_counter())
        self._is_closed = False

    @classmethod
    def to_collector(cls, endpoint: str, instance: str) -> Self:
        """Sends them by OTLP over HTTP, in batches, from a thread."""
        url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + DEFAULT_PATH
        return cls(BatchSpanProcessor(OTLPSpanExporter(url)), instance)

    def begin(self, scope: Scope, call: Call) -> None:
        """Open the span of a request, below the client's own if it sent one; `call.trail` then leads to it."""
        headers = Headers(scope=scope)
        carrier = {name: headers.getlist(name) for name in headers}
        for name in SINGULAR:
            if len(carrier.get(name, ())) > 1:
                del carrier[name]
        call.span = self._tracer.start_span(
            scope["method"],
            context=propagate.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=self._unix_ns(call.arrived),
        )
        call.trace_response = _trace_response(call.span)
        if call.span.is_recording():
            trace: dict[str, str] = {}
            propagate.inject(trace, set_span_in_context(call.span))
            call.trail = Trail(call.request_id, trace)

    def end(self, scope: Scope, call: Call, route: str, status: int, model: str) -> None:
        """Close the span of a request. status: 0 for a client that left before there was one."""
        span = call.span
        if span is None or not span.is_recording():
            return
        span.set_attributes(dict(_http_attributes(scope, route, status)))
        if route != "none":
            span.update_name(f"{scope['method']} {route}")
        span.set_attribute("attendant.request_id", call.request_id)
        if operation := OPERATIONS.get(route):
            span.update_name(f"{operation} {model}")
            span.set_attributes(dict(_gen_ai_attributes(call, operation, model)))
        error = call.log.get("error")
        if status >= 500 or (error is not None and status == 200):  # a stream that broke off has had its 200
            span.set_attribute("error.type", error or str(status))
            span.set_status(Status(StatusCode.ERROR))
        if call.admitted_at:
            self._phase(set_span_in_context(span), "admission", call.arrived, call.admitted_at)
        span.end(self._unix_ns(time.perf_counter()))

    def phases(self, timing: Timing, trail: Trail, *, failed: bool) -> None:
        """The engine's part of a request that is over. What was not reached has no span; what was cut ends now.

        failed: whether the engine could not go on; the last phase that was reached then has the error.
        """
        if trail.trace is None:
            return
        parent, over = propagate.extract(trail.trace), time.perf_counter()
        moments = (timing.accepted_at, timing.started_at, timing.first_token_at, timing.last_token_at)
        for name, begun, ended in zip(PHASES, moments, moments[1:], strict=False):
            if begun is not None:
                self._phase(parent, name, begun, over if ended is None else ended, failed=failed and ended is None)

    def close(self) -> None:
        """Send what is left, as far as the collector takes it in time: the exporter would try for ten seconds.

        Once is enough. At the interpreter's end, when objects that were kept are deleted, no thread can start any more:
        waiting for one would be for ever.
        """
        if self._is_closed or sys.is_finalizing():
            return
        self._is_closed = True
        closing = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    def _phase(self, parent: Context, name: str, begun: float, ended: float, *, failed: bool = False) -> None:
        span = self._tracer.start_span(name, context=parent, start_time=self._unix_ns(begun))
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(self._unix_ns(ended))

    def _unix_ns(self, moment: float) -> int:
        """A moment on `time.perf_counter`'s clock, in nanoseconds of Unix time."""
        return self._epoch_ns + _ns(moment)


def _trace_response(span: Span) -> str | None:
    """The value of the header `traceresponse` (W3C Trace Context, draft of level 3): by what to look it up.

    None where OTEL_SDK_DISABLED has left it without a trace.
    """
    known = span.get_span_context()
    if not known.is_valid:
        return None
    return f"00-{format_trace_id(known.trace_id)}-{format_span_id(known.span_id)}-{known.trace_flags & 1:02x}"


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _http_attributes(scope: Scope, route: str, status: int) -> Iterator[tuple[str, AttributeValue]]:
    yield "http.request.method", scope["method"]
    yield "url.scheme", scope.get("scheme", "http")
    if route != "none":  # any other path is a stranger's text
        yield "http.route", route
        yield "url.path", scope["path"]
    if status:
        yield "http.response.status_code", status
    if scope.get("server"):
        host, port = scope["server"]
        yield "server.address", host
        if port is not None:
            yield "server.port", port


def _gen_ai_attributes(call: Call, operation: str, model: str) -> Iterator[tuple[str, AttributeValue]]:
    yield "gen_ai.operation.name", operation
    yield "gen_ai.provider.name", "attendant"
    yield "gen_ai.request.model", model
    yield "gen_ai.response.model", model
    if call.asked is not None:
        yield from _asked_attributes(call.asked, call.max_tokens)
    if call.first_token_at:
        yield "gen_ai.response.time_to_first_chunk", call.first_token_at - call.arrived
    for name, key in (
        ("gen_ai.usage.input_tokens", "prompt_tokens"),
        ("gen_ai.usage.output_tokens", "completion_tokens"),
        ("gen_ai.usage.cache_read.input_tokens", "cached_tokens"),
        ("attendant.resumes", "resumes"),
    ):
        if call.log.get(key) is not None:
            yield name, call.log[key]
    reasons: Sequence[str | None] = call.log.get("finish_reasons", ())
    if told := [reason for reason in reasons if reason is not None]:
        yield "gen_ai.response.finish_reasons", told


def _asked_attributes(asked: GenerationFields, max_tokens: int | None) -> Iterator[tuple[str, AttributeValue]]:
    for name in ASKED:
        if (value := getattr(asked, name)) is not None:
            yield f"gen_ai.request.{name}", value
    if max_tokens is not None:
        yield "gen_ai.request.max_tokens", max_tokens
    if asked.num_choices > 1:
        yield "gen_ai.request.choice.count", asked.num_choices
    grammar = asked.grammar
    if grammar is not None:
        yield "gen_ai.output.type", "json" if grammar.kind in ("json_object", "json_schema") else "text"
