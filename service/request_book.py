"""What is written down about each HTTP request when it is over: a span, a line in the access log, another if slow."""

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from starlette.types import Scope

from service.access_log import AccessLog
from service.call import Call
from service.logs import fields

if TYPE_CHECKING:
    from service.tracing import Tracer

logger = logging.getLogger(__name__)


class RequestBook:
    """slow_seconds: from when on a request was slow; None for never. The engine is then asked for its phases."""

    def __init__(
        self, model_name: str, log: AccessLog | None, tracer: "Tracer | None", slow_seconds: float | None
    ) -> None:
        self._model_name = model_name
        self._log = log
        self._tracer = tracer
        self._slow_seconds = slow_seconds
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, scope: Scope, call: Call) -> None:
        """A request has come."""
        call.wants_timing = self._slow_seconds is not None
        if self._tracer is not None:
            self._tracer.begin(scope, call)

    def close(self, scope: Scope, call: Call, route: str, status: int) -> None:
        """It is over. route: of ours, or "none"; status: 0 where the client left before there was one."""
        seconds = time.perf_counter() - call.arrived
        if self._tracer is not None:
            self._tracer.end(scope, call, route, status, self._model_name)
        if self._log is not None:
            self._log.write(
                {
                    "request_id": call.request_id,
                    "key": call.key and call.key.name,
                    "method": scope["method"],
                    "route": route,
                    "status": status or None,
                    "seconds": round(seconds, 6),
                    **call.log,
                }
            )
        if self._slow_seconds is not None and seconds > self._slow_seconds:
            task = asyncio.get_running_loop().create_task(self._tell_slow(call, route, status, seconds))
            self._tasks.add(task)  # the loop itself holds tasks only weakly
            task.add_done_callback(self._tasks.discard)

    async def _tell_slow(self, call: Call, route: str, status: int, seconds: float) -> None:
        noted = await call.engine_receipt()
        phases = {
            "admission": call.admitted_at - call.arrived if call.admitted_at else None,
            "queue": noted and noted.queue,
            "prefill": noted and noted.prefill,
            "decode": noted and noted.decode,
            "first_token": call.first_token_at - call.arrived if call.first_token_at else None,
        }
        logger.warning(
            "slow request",
            extra=fields(
                request_id=call.request_id,
                route=route,
                status=status or None,
                seconds=round(seconds, 6),
                **{name: round(value, 6) for name, value in phases.items() if value is not None},
                prompt_tokens=call.log.get("prompt_tokens"),
                completion_tokens=call.log.get("completion_tokens"),
                error=call.log.get("error"),
            ),
        )
