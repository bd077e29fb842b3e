"""One HTTP request on its way through the service: who sent it, until when it may run, where its time goes."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.types import Scope

from service.errors import DeadlineExceeded
from service.keys import ApiKey
from service.quota import Quota
from service.telemetry import Trail

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from service.api.schemas.sampling import GenerationFields
    from service.receipt import EngineReceipt

SCOPE_KEY = "attendant.call"


class Call:
    """Made at the door and handed down by name.

    arrived: on `time.perf_counter`'s clock. deadline: on `time.monotonic`'s, if the client set one.
    tenant: whose cached prefixes it may share; empty where everybody's are everybody's.
    session: what the client calls the requests that belong together; empty where it does not say.
    wants_receipt: whether the answer is to say where its time went. Then: admitted_at, when the engines were asked;
        detokenize_seconds, spent on turning tokens into text.
    error: what went wrong, if something did.
    log: what its line in the access log says beside the usual; logs_prompts: also what was asked.
    trail: by what other processes know it; span: in its trace, where there is one; trace_response: by what a client
        finds that.
    asked, max_tokens: how it is to be generated, once that is known. first_token_at: when that had come.
    fetch_receipt: asks the engine that answered for its part of the receipt; wants_timing: so that it has one.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.trail = Trail(request_id)
        self.span: Span | None = None
        self.trace_response: str | None = None
        self.arrived = time.perf_counter()
        self.deadline: float | None = None
        self.key: ApiKey | None = None
        self.quota: Quota | None = None
        self.tenant = ""
        self.session = ""
        self.wants_receipt = False
        self.wants_timing = False
        self.fetch_receipt: Callable[[], Awaitable[EngineReceipt | None]] | None = None
        self.asked: GenerationFields | None = None
        self.max_tokens: int | None = None
        self.admitted_at = 0.0
        self.first_token_at = 0.0
        self.detokenize_seconds = 0.0
        self.logs_prompts = False
        self.error: Exception | None = None
        self.log: dict[str, Any] = {}
        self._reserved = 0
        self._noted: EngineReceipt | None = None

    @property
    def is_timed(self) -> bool:
        """Whether the engine is to note when it came to the request."""
        return self.wants_receipt or self.wants_timing or self.trail.trace is not None

    async def engine_receipt(self) -> "EngineReceipt | None":
        """The engine's part of the receipt, asked for once; None where no engine was reached, or it is gone."""
        if self._noted is None and self.fetch_receipt is not None:
            self._noted = await self.fetch_receipt()
        return self._noted

    @property
    def seconds_left(self) -> float | None:
        """Until the deadline, negative once it has passed; None without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def limit_to(self, milliseconds: int) -> None:
        """Set a deadline, counted from the arrival. Of several the first one holds."""
        waited = time.perf_counter() - self.arrived
        deadline = time.monotonic() - waited + milliseconds / 1000
        self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Run a block until the deadline at most. Raises `DeadlineExceeded`, whatever the block waits for."""
        left = self.seconds_left
        if left is not None and left <= 0:
            raise DeadlineExceeded
        try:
            async with asyncio.timeout(left):
                yield
        except TimeoutError:
            raise DeadlineExceeded from None

    def failed(self, error: Exception) -> None:
        """Note what went wrong. The log tells its kind: the message may quote the client."""
        self.error = error
        self.log["error"] = type(error).__name__

    def reserve(self, num_tokens: int) -> None:
        """Take what the request may need from its key's tokens. Raises `Overloaded`."""
        if self.key is not None and self.quota is not None:
            self.quota.spend(self.key, num_tokens)
            self._reserved = num_tokens

    def settle(self, num_tokens: int) -> None:
        """Give back what it did not need, or take what it needed beyond. Once is enough, twice does no harm."""
        if self.quota is not None:
            self.quota.refund(self._reserved - num_tokens if self._reserved else 0)
            self._reserved = 0

    @property
    def session_key(self) -> str:
        """The session, apart from those of other tenants; empty without one."""
        return f"{self.tenant}/{self.session}" if self.session else ""

    def cache_salt(self, salt: str | None) -> str:
        """What the request's cached prefixes are kept apart by: its tenant, and its own salt. An id holds no slash."""
        return f"{self.tenant}/{salt or ''}" if self.tenant else salt or ""


def attach(scope: Scope, call: Call) -> None:
    """Make it the call of this request."""
    scope[SCOPE_KEY] = call


def call_in(scope: Scope) -> Call:
    """The call that this request belongs to."""
    call: Call = scope[SCOPE_KEY]
    return call


def call_of(request: Request) -> Call:
    """The call that this request belongs to."""
    return call_in(request.scope)
