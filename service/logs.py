"""Log lines of every process of the service: one form, the id of the request in each, nothing that a client wrote.

A line is text for people or JSON for machines; in both, what is not printable is written as JSON escapes it, so that
no value can begin a line of its own or speak to a terminal.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from service.telemetry import Telemetry

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

LOGGERS = ("service", "model", "opentelemetry")

# Of the HTTP request that the running task works for; empty outside of one.
current_request: ContextVar[str] = ContextVar("current_request", default="")

# Python's own notion of it: controls, separators other than the space, surrogates, what is unassigned.
ASCII = re.compile(r"[ -~]*")


def json_line(fields: Mapping[str, Any]) -> str:
    """One line of JSON, without its end. What is not known (None) is left out."""
    known = {name: value for name, value in fields.items() if value is not None}
    return printable(json.dumps(known, ensure_ascii=False, default=str))


def printable(text: str) -> str:
    """The text with whatever is not printable in JSON's escapes."""
    if ASCII.fullmatch(text):
        return text
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def fields(**values: object) -> dict[str, dict[str, object]]:
    """What a line says beside its message: pass it as `extra`. What is not known (None) is left out."""
    return {"fields": {name: value for name, value in values.items() if value is not None}}


class _Formatter(logging.Formatter):
    """process: which one writes. quotes_errors: whether the words of an exception may be told, not only its kind."""

    def __init__(self, process: str, *, quotes_errors: bool) -> None:
        super().__init__()
        self._process = process
        self._quotes_errors = quotes_errors

    def known(self, record: logging.LogRecord) -> dict[str, Any]:
        """Everything about a record, in the order in which it is read."""
        own: dict[str, Any] = getattr(record, "fields", {})
        request_id = own.get("request_id") or current_request.get()
        known: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id:
            known["request_id"] = request_id
        known |= {name: value for name, value in own.items() if name != "request_id"}
        if record.exc_info and record.exc_info[1] is not None:
            known |= self._about(record.exc_info[1])
        return known

    def _about(self, error: BaseException) -> dict[str, Any]:
        frames = traceback.extract_tb(error.__traceback__)
        about: dict[str, Any] = {"error": type(error).__name__}
        if self._quotes_errors:
            about["error_message"] = str(error)
        return about | {"stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]}


class JsonFormatter(_Formatter):
    """An object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return json_line(self.known(record))


class TextFormatter(_Formatter):
    """Time, level, process and message; then name=value for the rest, the frames of an error on lines of their own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines."""
        known = self.known(record)
        stack = known.pop("stack", ())
        head = " ".join(str(known.pop(name)) for name in ("time", "level", "process", "logger", "message"))
        rest = "".join(f" {name}={_plain(value)}" for name, value in known.items())
        return "\n    ".join(map(printable, (head + rest, *stack)))


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return json.dumps(text, ensure_ascii=False) if isinstance(value, str) and re.search(r'[\s="]', text) else text


def install(telemetry: "Telemetry", process: str, *, quotes_errors: bool) -> None:
    """Have the loggers of this process write as the operator wants it. Once for each process.

    quotes_errors: for a process whose exceptions cannot quote what a client wrote, or where the operator wants that
    told. Raises `OSError` when the file cannot be opened.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if telemetry.log_file is not None:
        # A line is one write, behind what others wrote: processes may share the file, and it may be moved away.
        handler = WatchedFileHandler(telemetry.log_file, encoding="utf-8")
    form = JsonFormatter if telemetry.log_format == "json" else TextFormatter
    handler.setFormatter(form(process, quotes_errors=quotes_errors))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.setLevel(telemetry.log_level.upper())
        logger.propagate = False
