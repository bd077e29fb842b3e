"""The door: nobody comes in with too large a header, without a key, above the key's limits, or after closing time."""

import re
from collections.abc import Sequence
from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from model.errors import AttendantError, InvalidRequest
from service.api.errors import error_response
from service.call import Call, call_in
from service.door import Door
from service.drain import Drain
from service.errors import HeadersTooLarge
from service.keys import KeyRing
from service.quota import Quota

# What an orchestrator asks without a key; all else needs one.
PROBES = ("/health", "/ready")
DEADLINE_HEADER = "x-request-deadline-ms"
MAX_DEADLINE_MS = 24 * 3600 * 1000
SESSION_HEADER = "x-session-id"
SESSION_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
LINE_OVERHEAD = 4  # ": " and the line's end


class Gate:
    """Around every route. Without keys everybody may come in."""

    def __init__(self, app: ASGIApp, door: Door, keys: KeyRing | None, drain: Drain) -> None:
        self._app = app
        self._drain = drain
        self._limits = door.limits
        self._keys = keys
        self._share_prefixes = door.share_prefixes
        self._logs_prompts = door.log_prompts
        self._num_ingresses = door.ingresses
        self._quotas: dict[str, Quota] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = call_in(scope)
        call.logs_prompts = self._logs_prompts
        with ExitStack() as held:
            answer = self._app
            try:
                self._let_in(scope, call, held)
            except AttendantError as error:
                call.failed(error)
                answer = error_response(error)
            await answer(scope, receive, send)

    def _let_in(self, scope: Scope, call: Call, held: ExitStack) -> None:
        if scope["method"] == "POST":  # the others ask how it goes; that may be asked to the end
            held.enter_context(self._drain.work())
        self._check_size(scope["headers"])
        headers = Headers(scope=scope)
        _read_deadline(headers, call)
        _read_session(headers, call)
        if self._keys is not None and scope["path"] not in PROBES:
            self._identify(self._keys, headers, call, held)

    def _check_size(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        size = sum(len(name) + len(value) + LINE_OVERHEAD for name, value in headers)
        if size > self._limits.max_header_bytes:
            raise HeadersTooLarge(f"the header has {size} bytes, and at most {self._limits.max_header_bytes} are taken")

    def _identify(self, keys: KeyRing, headers: Headers, call: Call, held: ExitStack) -> None:
        key = keys.authenticate(headers.get("authorization"))
        quota = self._quotas.setdefault(key.id, Quota(self._limits.max_streams_per_key, self._num_ingresses))
        quota.enter(key)
        held.callback(quota.leave)
        call.key, call.quota = key, quota
        call.tenant = "" if self._share_prefixes else key.id


def _read_deadline(headers: Headers, call: Call) -> None:
    text = headers.get(DEADLINE_HEADER)
    if text is None:
        return
    if not (text.isascii() and text.isdigit() and int(text[:10]) == int(text) <= MAX_DEADLINE_MS):
        raise InvalidRequest(
            f"the header {DEADLINE_HEADER} takes whole milliseconds from 0 to {MAX_DEADLINE_MS}", param=DEADLINE_HEADER
        )
    call.limit_to(int(text))


def _read_session(headers: Headers, call: Call) -> None:
    name = headers.get(SESSION_HEADER, "")
    if SESSION_HEADER in headers and not SESSION_ID.fullmatch(name):
        raise InvalidRequest(f"the header {SESSION_HEADER} must match {SESSION_ID.pattern}", param=SESSION_HEADER)
    call.session = name
