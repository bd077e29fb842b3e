"""What the processes of the service tell of themselves beside their metrics: logs, and traces if asked for."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.errors import ConfigError
from service.logs import LogFormat, LogLevel

if TYPE_CHECKING:
    from service.tracing import Tracer


class Telemetry(BaseModel):
    """Set from the top, read by every process of the service.

    log_file: takes the lines of all processes; without one, each writes to its standard error, which Ray keeps among
        the logs of its session. log_format, log_level: of these lines.
    slow_request_seconds: a request that took longer gets a line with its phases.
    trace_endpoint: an OpenTelemetry collector, by OTLP over HTTP; where the URL has no path, /v1/traces is meant. All
        else about traces is read from the variables that OpenTelemetry has for it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    log_file: str | None = None
    log_format: LogFormat = "text"
    log_level: LogLevel = "warning"
    slow_request_seconds: Annotated[float, Field(gt=0)] | None = None
    trace_endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s]+(/\S*)?$")] | None = None

    @classmethod
    def of(cls, **values: object) -> Self:
        """From options. Raises `ConfigError`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise ConfigError(f"{fault['loc'][0]}: {fault['msg']}") from None

    def check(self) -> None:
        """Raises `ConfigError` where traces were asked for and what sends them is not installed."""
        if self.trace_endpoint is not None and not _has_exporter():
            raise ConfigError(
                "trace_endpoint needs the packages of the `trace` extra: pip install -r deploy/lock/trace.txt"
            )

    def tracer(self, instance: str) -> "Tracer | None":
        """Sends the spans of the process `instance`; None where nobody wants them, and then nothing is imported.

        Raises `ConfigError`.
        """
        if self.trace_endpoint is None:
            return None
        self.check()
        from service.tracing import Tracer

        return Tracer.to_collector(self.trace_endpoint, instance)


class Trail(NamedTuple):
    """By what the logs and traces of all processes know a request.

    trace: the headers of W3C Trace Context, of a request whose trace is recorded.
    """

    request_id: str = ""
    trace: Mapping[str, str] | None = None


NO_TRAIL = Trail()


def _has_exporter() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # a part of the path is missing
        return False
