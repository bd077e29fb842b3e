"""A fleet of engine replicas without Ray: Serve's handle, as far as the dispatcher uses it, over scripted engines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from service.balance import RouteHint, Standing, rank
from service.channel import Accepted, EngineInfo, Outbox, Refused, Submission
from service.receipt import EngineReceipt
from service.replica import EngineReplica
from service.router import NoReplica, ReplicaGone


class FakeReplica:
    """Accepts everything; the test decides what it says and when it dies."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outbox = Outbox()
        self.submitted: list[Submission] = []
        self.aborted: list[str] = []
        self.answer: Accepted | Refused = Accepted(name)

    def say(self, number: int, *token_ids: int, finish_reason: str | None = None) -> None:
        """Emit tokens for the number-th submission."""
        self.outbox.put([(self.submitted[number].request_id, list(token_ids), finish_reason, 0, None)])


class FakeChannel:
    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items

    def cancel(self) -> None:
        pass


class FakeFleet:
    """Stands for a `DeploymentHandle`. A pinned call to a dead replica raises; another goes to the best by its hint."""

    def __init__(self, *names: str) -> None:
        self.replicas = {name: FakeReplica(name) for name in names}
        self.hints: list[RouteHint] = []
        self.submit = Method(self._submit)
        self.abort = Method(self._abort)
        self.ping = Method(self._ping)
        self.describe = Method(self._describe)
        self.receipt = Method(self._receipt)
        self.channel = Stream(self._channel)

    def options(self, stream: bool) -> "FakeFleet":
        return self

    def add(self, name: str) -> None:
        """A new replica."""
        self.replicas[name] = FakeReplica(name)

    def kill(self, name: str) -> None:
        """Nothing more from this replica; its channel ends."""
        self.replicas.pop(name).outbox.close()

    def broadcast(self, method: str, *args: object) -> "Broadcast":
        return Broadcast()

    async def _submit(self, channel_id: str, submissions: list[Submission], hint: RouteHint) -> Any:
        while not self.replicas:  # as Serve does
            await asyncio.sleep(0)
        self.hints.append(hint)
        order = rank(dict.fromkeys(self.replicas, Standing()), hint)
        if not order:
            raise NoReplica
        replica = self.replicas[order[0]]
        if isinstance(replica.answer, Accepted):
            replica.submitted += submissions
        return replica.answer

    async def _abort(self, request_ids: list[str], pin: str) -> None:
        self._pinned(pin).aborted += request_ids

    async def _ping(self, channel_id: str, pin: str) -> None:
        self._pinned(pin)

    async def _receipt(self, request_id: str, pin: str) -> EngineReceipt:
        self._pinned(pin)
        return EngineReceipt(queue=0.25, prefill=0.5, decode=None, weights_sha256="ab")

    async def _describe(self) -> EngineInfo:
        while not self.replicas:  # as Serve does
            await asyncio.sleep(0)
        return EngineInfo(max_model_len=64, capacity=16, kv_cache_tokens=4096)

    async def _channel(self, channel_id: str, pin: str) -> AsyncIterator[Any]:
        outbox = self._pinned(pin).outbox
        while (outputs := await outbox.take()) is not None:
            yield outputs

    def _pinned(self, pin: str) -> FakeReplica:
        if pin not in self.replicas:
            raise ReplicaGone(pin)
        return self.replicas[pin]


class LocalFleet:
    """One real replica in this process, without Ray between it and the ingress."""

    def __init__(self, replica: EngineReplica) -> None:
        self.replica = replica
        self.submit = Method(replica.submit)
        self.abort = Method(replica.abort)
        self.ping = Method(replica.ping)
        self.describe = Method(replica.describe)
        self.channel = Stream(replica.channel)
        self.receipt = Method(replica.receipt)

    def options(self, stream: bool) -> "LocalFleet":
        return self

    def broadcast(self, method: str, *args: object) -> "Broadcast":
        return Broadcast([getattr(self.replica, method)(*args)])


class Broadcast:
    def __init__(self, calls: Sequence[Awaitable[object]] = ()) -> None:
        self._calls = calls

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[object]:
        return [await call for call in self._calls]


class Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Stream:
    def __init__(self, call: Callable[..., AsyncIterator[Any]]) -> None:
        self.remote = lambda *args, **kwargs: FakeChannel(call(*args, **kwargs))
