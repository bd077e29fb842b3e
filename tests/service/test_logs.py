"""Log lines: one form, the id of the request in each of them, nothing that a client wrote or that breaks a line."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from service.access_log import AccessLog
from service.door import Door
from service.logs import LOGGERS, JsonFormatter, TextFormatter, current_request, fields, install, json_line
from service.telemetry import Telemetry
from tests.service.conftest import Running, in_process, start, stop
from tests.service.test_gate import complete

HOSTILE = 'a\nlevel=error\r\x1b[31m\x85\u2028\u202e"b" \\n \x7f\udc80'
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def restored() -> Iterator[None]:
    """The loggers of this process as they were."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def line(form: type[logging.Formatter], message: str, *args: object, error: BaseException | None = None, **own: object):
    record = logging.LogRecord("service.x", logging.WARNING, "x.py", 1, message, args, None)
    record.__dict__ |= fields(**own)
    if error is not None:
        record.exc_info = (type(error), error, error.__traceback__)
    return form("engine/r1", quotes_errors=False).format(record)  # type: ignore[call-arg]


@pytest.mark.fast
def test_a_line_of_json_says_when_where_and_about_which_request() -> None:
    said = json.loads(line(JsonFormatter, "slow %s", "request", request_id="mine", seconds=0.5, nothing=None))
    assert said.pop("time").endswith("+00:00")
    assert said == {
        "level": "warning",
        "process": "engine/r1",
        "logger": "service.x",
        "message": "slow request",
        "request_id": "mine",
        "seconds": 0.5,
    }


@pytest.mark.fast
def test_a_line_of_text_says_the_same() -> None:
    _, rest = line(TextFormatter, "slow request", request_id="mine", seconds=0.5, reason="two words").split(" ", 1)
    assert rest == 'warning engine/r1 service.x slow request request_id=mine seconds=0.5 reason="two words"'


@pytest.mark.fast
@pytest.mark.parametrize("form", [JsonFormatter, TextFormatter])
def test_no_value_can_begin_a_line_of_its_own_or_speak_to_a_terminal(form: type[logging.Formatter]) -> None:
    for text in (line(form, HOSTILE), line(form, "x", field=HOSTILE), line(form, "%s", HOSTILE)):
        assert len(text.splitlines()) == 1
        assert text.isprintable()
        text.encode()  # no surrogate is left


@pytest.mark.fast
def test_what_was_escaped_is_still_what_it_was() -> None:
    assert json.loads(json_line({"x": HOSTILE, "y": "Grüße, 世界 🦊"})) == {"x": HOSTILE, "y": "Grüße, 世界 🦊"}
    assert "世界 🦊" in json_line({"y": "世界 🦊"})


def raised(message: str) -> BaseException:
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


@pytest.mark.fast
@pytest.mark.parametrize("form", [JsonFormatter, TextFormatter])
def test_of_an_exception_kind_and_place_are_told_and_its_words_only_where_that_is_allowed(form: Any) -> None:
    text = line(form, "failed", error=raised("the prompt"))
    assert "ValueError" in text
    assert f"{Path(__file__).name}" in text
    assert "the prompt" not in text
    record = logging.LogRecord("service.x", logging.ERROR, "x.py", 1, "failed", (), None)
    record.exc_info = (ValueError, raised("the\nprompt"), None)
    assert r"the\nprompt" in form("engine/r1", quotes_errors=True).format(record)


@pytest.mark.fast
def test_a_line_knows_the_request_that_its_task_works_for() -> None:
    token = current_request.set("mine")
    try:
        assert json.loads(line(JsonFormatter, "x"))["request_id"] == "mine"
        assert json.loads(line(JsonFormatter, "x", request_id="other"))["request_id"] == "other"
    finally:
        current_request.reset(token)
    assert "request_id" not in json.loads(line(JsonFormatter, "x"))


def write_many(path: str, letter: str, count: int) -> None:
    install(Telemetry(log_file=path, log_format="json"), letter, quotes_errors=False)
    for _ in range(count):
        logging.getLogger("service.x").warning(letter * 20_000)


def test_lines_of_several_processes_in_one_file_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "all.log"
    workers = [get_context("fork").Process(target=write_many, args=(str(path), letter, 50)) for letter in "abc"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    lines = path.read_text().splitlines()
    assert len(lines) == 150
    assert {(len(said), len(set(said))) for said in (json.loads(one)["message"] for one in lines)} == {(20_000, 1)}


@pytest.mark.usefixtures("restored")
def test_a_file_that_is_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "service.log"
    install(Telemetry(log_file=str(path), log_format="json"), "ingress/i1", quotes_errors=False)
    logger = logging.getLogger("service.x")
    logger.warning("one")
    path.rename(tmp_path / "old.log")
    logger.warning("two")
    assert json.loads(path.read_text())["message"] == "two"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("level", "told"), [("warning", ["b"]), ("info", ["a", "b"])])
def test_less_than_the_level_is_not_worth_a_line(tmp_path: Path, level: Any, told: list[str]) -> None:
    path = tmp_path / "service.log"
    install(Telemetry(log_file=str(path), log_format="json", log_level=level), "ingress/i1", quotes_errors=False)
    logging.getLogger("service.x").info("a")
    logging.getLogger("service.x").warning("b")
    assert [json.loads(one)["message"] for one in path.read_text().splitlines()] == told


@pytest.mark.usefixtures("restored")
def test_without_a_file_a_process_writes_to_its_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    install(Telemetry(), "ingress/i1", quotes_errors=False)
    logging.getLogger("model.x").warning("here")
    assert stderr.getvalue().endswith(" warning ingress/i1 model.x here\n")


@pytest.mark.fast
def test_the_access_log_keeps_to_its_lines_whatever_a_prompt_holds(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "access.log"))
    log.write({"prompt": HOSTILE})
    log.close()
    (one,) = (tmp_path / "access.log").read_text().splitlines()
    assert one.isprintable()
    assert json.loads(one)["prompt"] == HOSTILE


async def slow_requests(caplog: pytest.LogCaptureFixture, count: int) -> list[dict[str, Any]]:
    """What is told of slow requests, once there are so many: it is told behind the answer."""
    async with asyncio.timeout(10):
        while True:
            told = [record.__dict__["fields"] for record in caplog.records if record.message == "slow request"]
            if len(told) >= count:
                return told
            await asyncio.sleep(0)


async def test_a_slow_request_has_a_line_with_its_phases_and_a_fast_one_has_none(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for limit, count in ((1e-6, 2), (1000.0, 0)):
        caplog.clear()
        door = Door(telemetry=Telemetry(slow_request_seconds=limit))
        async with in_process(tiny_model, monkeypatch, door) as (client, _):
            await complete(client, {"x-request-id": "mine"}, ignore_eos=True, receipt=True)
            await complete(client, {"x-request-id": "other"}, max_tokens=-1)
            told = await slow_requests(caplog, count)
        assert sorted(one["request_id"] for one in told) == ["mine", "other"][:count]


async def test_the_line_of_a_slow_request_adds_up(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    door = Door(telemetry=Telemetry(slow_request_seconds=1e-6))
    async with in_process(tiny_model, monkeypatch, door) as (client, _):
        await complete(client, ignore_eos=True)
        (told,) = await slow_requests(caplog, 1)
    phases = [told[name] for name in ("admission", "queue", "prefill", "decode")]
    assert all(seconds > 0 for seconds in phases)
    assert sum(phases) <= told["seconds"]
    assert phases[0] < told["first_token"] < told["seconds"]
    assert (told["status"], told["completion_tokens"]) == (200, 8)


class Collector(BaseHTTPRequestHandler):
    """Takes spans as an OpenTelemetry collector does: OTLP, protobuf, by HTTP."""

    spans: list[tuple[dict[str, str], Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            known = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            self.spans += [(known, span) for scope in resource.scope_spans for span in scope.spans]
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def told(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Running, Path, list[Any]]:
    """A real service that tells everything, until it has been stopped: what it has sent is then complete."""
    spans: list[Any] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Collector,), {"spans": spans}))
    Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("told")
    options = ["--log-file", str(folder / "service.log"), "--log-format", "json", "--log-level", "info"]
    options += ["--slow-request", "0.001", "--trace-endpoint", f"http://127.0.0.1:{server.server_port}"]
    running = start(tiny_model, *options, "--access-log", str(folder / "access.log"), "--kv-cache-tokens", "4096")
    with httpx.Client(base_url=running.url, timeout=60) as client:
        body = {"prompt": "the secret of the fox", "max_tokens": 8, "ignore_eos": True}
        headers = {"x-request-id": "mine", "traceparent": TRACEPARENT}
        answer = client.post("/v1/completions", json=body, headers=headers)
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine")
        assert answer.headers["traceresponse"].startswith(TRACEPARENT[:35])
        client.post("/v1/completions", json={"prompt": "the secret", "max_tokens": -1})
        client.get("/secret")
    assert stop(running) == 0
    server.shutdown()
    return running, folder, spans


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in (folder / "service.log").read_text().splitlines()]


@pytest.mark.slow
def test_the_id_that_a_client_gave_is_in_the_lines_of_ingress_and_engine(told: Any) -> None:
    _, folder, _ = told
    mine = [one for one in lines_of(folder) if one.get("request_id") == "mine"]
    assert {(one["process"].split("/")[0], one["message"]) for one in mine} == {
        ("ingress", "slow request"),
        ("engine", "done"),
    }
    (slow,) = [one for one in mine if one["message"] == "slow request"]
    (done,) = [one for one in mine if one["message"] == "done"]
    assert {name: slow[name] for name in ("queue", "prefill", "decode")} == pytest.approx(
        {name: done[name] for name in ("queue", "prefill", "decode")}, abs=1e-5
    )
    access = [json.loads(one) for one in (folder / "access.log").read_text().splitlines()]
    assert access[0]["request_id"] == "mine"


@pytest.mark.slow
def test_nothing_that_a_client_wrote_is_in_any_file(told: Any) -> None:
    _, folder, spans = told
    assert len(lines_of(folder)) >= 2
    assert not any("secret" in file.read_text() for file in folder.iterdir())
    assert not any("secret" in str(span) for _, span in spans)


@pytest.mark.slow
def test_a_collector_gets_the_whole_trace_from_both_processes(told: Any) -> None:
    _, _, spans = told
    trace = bytes.fromhex(TRACEPARENT[3:35])
    ours = {span.name: (known["service.instance.id"], span) for known, span in spans if span.trace_id == trace}
    assert set(ours) == {f"text_completion {told[0].model}", "admission", "queue", "prefill", "decode"}
    server = ours.pop(f"text_completion {told[0].model}")
    assert server[1].parent_span_id == bytes.fromhex(TRACEPARENT[36:52])
    assert {span.parent_span_id for _, span in ours.values()} == {server[1].span_id}
    ingress, engine = server[0], ours["decode"][0]
    assert {name: who for name, (who, _) in ours.items()} == {
        "admission": ingress,
        "queue": engine,
        "prefill": engine,
        "decode": engine,
    }
    assert ingress != engine
    for _, span in ours.values():
        assert server[1].start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= server[1].end_time_unix_nano
