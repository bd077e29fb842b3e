"""Leaving in order: an ingress finishes what it has, and takes nothing new meanwhile."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import Unavailable


class Drain:
    """Counts the work that an ingress has open, so that it knows when it may go. Lives on the ingress' event loop."""

    def __init__(self) -> None:
        self.is_closed = False
        self._num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def work(self) -> Iterator[None]:
        """A block that is waited for. Raises `Unavailable` once the doors are closed."""
        self.check()
        self._num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_open -= 1
            if not self._num_open:
                self._idle.set()

    def check(self) -> None:
        """Raises `Unavailable` once the doors are closed."""
        if self.is_closed:
            raise Unavailable("the service is stopping: it finishes what it has and takes no more", code="draining")

    async def close(self) -> None:
        """Take nothing from now on; return when all that was taken is done."""
        self.is_closed = True
        await self._idle.wait()
