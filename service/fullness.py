"""What the engines last said of their room, so that under overload most calls end at the ingress.

Asking costs an engine's process time that its requests need, and waits for its event loop behind a step.
"""

import time
from collections.abc import Collection

from service.channel import Refused
from service.errors import Overloaded

# An engine's places are also filled and left by requests of other ingresses, whose ends are not seen here.
MEMORY_S = 0.1


class Fullness:
    """Which replicas have said within the last moment that they have no place, and nobody of ours has left since."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[float, Refused]] = {}

    def note(self, refused: Refused) -> None:
        """A replica has refused. That a request was too large says nothing of the next one; that it was full does."""
        if refused.kind == "full":
            self._said[refused.replica_id] = time.monotonic(), refused

    def left(self, replica_id: str | None) -> None:
        """A request of ours has ended there."""
        if replica_id is not None:
            self._said.pop(replica_id, None)

    def check(self, replica_ids: Collection[str]) -> None:
        """Raises `Overloaded` when all of these are known to be full."""
        if not self._said:
            return
        since = time.monotonic() - MEMORY_S
        self._said = {name: said for name, said in self._said.items() if said[0] > since}
        if self._said and self._said.keys() >= set(replica_ids):
            _, refused = next(reversed(self._said.values()))
            raise Overloaded(refused.message, retry_after_s=refused.retry_after_s)
