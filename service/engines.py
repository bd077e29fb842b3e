"""The engine deployment as its callers see it: Serve's handle, in any context, with a time limit on each call."""

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

T = TypeVar("T")


class Engines:
    """All replicas together, or one of them, named by `pin`. Lives on the ingress' event loop."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self.handle = handle
        self._tasks: set[asyncio.Task[Any]] = set()

    async def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """One call to one replica. Raises `TimeoutError`, `ReplicaGone` for a pin, and whatever Ray has to say."""

        async def send() -> Any:
            return await getattr(self.handle, method).remote(*args, **kwargs)

        return await within(timeout_s, self.spawn(send()))

    async def broadcast(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """The same call to every replica: what they answer, or the exception instead."""

        async def send() -> list[Any]:
            answers: list[Any] = await self.handle.broadcast(method, *args).results_async(
                timeout_s=timeout_s, return_exceptions=True
            )
            return answers

        return await self.spawn(send())

    def channel(self, channel_id: str, session: int, pin: str) -> Any:
        """Open the channel: iterate over it, and cancel it, since dropping it would leave the replica's side running.

        Any: what the call returns depends on `stream`, and Serve's annotations do not follow that.
        """
        return self.handle.options(stream=True).channel.remote(channel_id, session, pin=pin)

    def spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run outside the HTTP request's context.

        Serve cancels every call made in the context of a request when its client leaves. A channel opened on behalf
        of the first request would die with it, and an abort would be aborted.
        """
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)
        return task


async def within(timeout_s: float, task: "asyncio.Task[T]") -> T:
    """What comes of it in time. Raises `TimeoutError`.

    Unlike `asyncio.wait_for`, this does not wait until the task has been cancelled, for as long as what it runs likes.
    """
    task.add_done_callback(lambda task: task.cancelled() or task.exception())  # or asyncio warns that nobody looked
    try:
        if not (await asyncio.wait({task}, timeout=timeout_s))[0]:
            raise TimeoutError
        return task.result()
    finally:
        task.cancel()
        del task  # its error knows this frame: the two would keep one another


def reason(error: BaseException) -> str:
    """One line: Ray's errors carry whole tracebacks in their text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
