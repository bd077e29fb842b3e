"""A fleet of engine replicas without Ray: Serve's handle, as far as the dispatcher uses it, over scripted engines."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from service.balance import RouteHint, Standing, rank
from service.channel import Accepted, EngineInfo, Outbox, Refused, Submission
from service.receipt import EngineReceipt
from service.replica import EngineReplica
from service.router import NoReplica, ReplicaGone


class FakeReplica:
    """Accepts everything; the test decides what it says, when it dies, and when it stands still."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outbox = Outbox()
        self.submitted: list[Submission] = []
        self.aborted: list[str] = []
        self.pings: list[tuple[int | None, int]] = []
        self.answer: Accepted | Refused = Accepted(name)
        self.awake = asyncio.Event()
        self.awake.set()

    def new_session(self) -> None:
        """Give up the channel as a replica does that has not heard of its ingress: what was on it is forgotten."""
        self.outbox.close(discard=True)
        self.outbox = Outbox(session=self.outbox.session + 1)
        self.answer = Accepted(self.name, self.outbox.session)

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
        self.submit = Method(self._route)
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

    def leave(self, name: str) -> FakeReplica:
        """This replica is to go: it gets no more calls, and its channel goes on."""
        return self.replicas.pop(name)

    def broadcast(self, method: str, *args: Any) -> "Broadcast":
        return Broadcast([self._abort(*args, pin=name) for name in self.replicas] if method == "abort" else ())

    async def _route(self, *args: Any, hint: RouteHint, chosen: list[str]) -> Any:
        while not self.replicas:  # as Serve does
            await asyncio.sleep(0)
        chosen += rank(dict.fromkeys(self.replicas, Standing()), hint)[:1]
        return await self._submit(*args, hint=hint)

    async def _submit(self, channel_id: str, submissions: list[Submission], hint: RouteHint) -> Any:
        self.hints.append(hint)
        order = rank(dict.fromkeys(self.replicas, Standing()), hint)
        if not order:
            raise NoReplica
        replica = self.replicas[order[0]]
        await replica.awake.wait()
        if isinstance(replica.answer, Accepted):
            replica.submitted += submissions
        return replica.answer

    async def _abort(self, request_ids: list[str], pin: str) -> None:
        self._pinned(pin).aborted += request_ids

    async def _ping(self, channel_id: str, session: int | None, num_read: int, pin: str) -> bool:
        replica = self._pinned(pin)
        await replica.awake.wait()
        replica.pings.append((session, num_read))
        return isinstance(replica.answer, Accepted)

    async def _receipt(self, request_id: str, pin: str) -> EngineReceipt:
        self._pinned(pin)
        return EngineReceipt(queue=0.25, prefill=0.5, decode=None, weights_sha256="ab")

    async def _describe(self, hint: RouteHint, chosen: list[str]) -> EngineInfo:
        while not self.replicas:  # as Serve does
            await asyncio.sleep(0)
        order = rank(dict.fromkeys(self.replicas, Standing()), hint)
        if not order:
            raise NoReplica
        chosen.append(order[0])
        await self.replicas[order[0]].awake.wait()
        return EngineInfo(max_model_len=64, capacity=16, kv_cache_tokens=4096)

    def _channel(self, channel_id: str, session: int, pin: str) -> AsyncIterator[Any]:
        """The call is made at once, as Serve's are, and its error is met by who iterates."""
        replica = self.replicas.get(pin)
        call = None if replica is None or replica.outbox.session != session else replica.outbox.answer()

        async def items() -> AsyncIterator[Any]:
            if replica is None:
                raise ReplicaGone(pin)
            while call is not None and (outputs := await replica.outbox.take(call)) is not None:
                await replica.awake.wait()
                yield outputs

        return items()

    def _pinned(self, pin: str) -> FakeReplica:
        if pin not in self.replicas:
            raise ReplicaGone(pin)
        return self.replicas[pin]


class LocalFleet:
    """Real replicas in this process, without Ray between them and the ingress.

    lifetime: after so many outputs, a replica dies; only the first one.
    """

    def __init__(self, *replicas: EngineReplica) -> None:
        self._all = replicas
        self.revive()
        self.submit = Method(self._submit)
        self.describe = Method(replicas[0].describe)
        self.channel = Stream(self._channel)
        for name in ("abort", "ping", "receipt"):
            setattr(self, name, Method(partial(self._pinned, name)))

    def options(self, stream: bool) -> "LocalFleet":
        return self

    def broadcast(self, method: str, *args: object) -> "Broadcast":
        return Broadcast([getattr(replica, method)(*args) for replica in self.replicas.values()])

    def revive(self) -> None:
        """All replicas live, as long as they may."""
        self.replicas = {replica._replica_id: replica for replica in self._all}
        self.deaths = {name: asyncio.Event() for name in self.replicas}
        self.lifetime: int | None = None

    def kill(self, name: str) -> None:
        """Nothing more from this replica, not even the end of its channel."""
        del self.replicas[name]
        self.deaths[name].set()

    async def _submit(self, channel_id: str, submissions: list[Submission], hint: RouteHint, chosen: list[str]) -> Any:
        order = rank(dict.fromkeys(self.replicas, Standing()), hint)
        if not order:
            raise NoReplica
        chosen.append(order[0])
        return await self.replicas[order[0]].submit(channel_id, submissions, hint)

    async def _pinned(self, method: str, *args: Any, pin: str) -> Any:
        if pin not in self.replicas:
            raise ReplicaGone(pin)
        return await getattr(self.replicas[pin], method)(*args, pin=pin)

    def _channel(self, channel_id: str, session: int, pin: str) -> AsyncIterator[Any]:
        """The call is made at once, as Serve's are, and its error is met by who iterates."""
        if pin not in self.replicas:
            return self._items(pin, None)
        channel = self.replicas[pin].channel(channel_id, session, pin)
        return self._items(pin, channel, asyncio.ensure_future(anext(channel)))

    async def _items(self, pin: str, channel: Any, item: "asyncio.Future[Any] | None" = None) -> AsyncIterator[Any]:
        if item is None or pin not in self.replicas:
            raise ReplicaGone(pin)
        died = asyncio.ensure_future(self.deaths[pin].wait())
        while True:
            await asyncio.wait({item, died}, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                item.cancel()
                await asyncio.gather(item, return_exceptions=True)
                raise ReplicaGone(pin)
            try:
                outputs = item.result()
            except StopAsyncIteration:
                return
            if self.lifetime is not None:
                outputs = outputs[: self.lifetime]  # the rest dies with it
                self.lifetime -= len(outputs)
                if not self.lifetime:
                    self.lifetime = None
                    self.kill(pin)
            yield outputs
            item = asyncio.ensure_future(anext(channel))


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
