"""How much of the service one key has in use: open requests, and the tokens of the last minute.

Kept by each ingress for itself. Of the tokens each has its share, since over a minute requests spread evenly. Of the
open requests each allows them all: a share of a few would refuse a client that is within its limit, when chance brings
one more of its requests here than there.
"""

import math
import time

from service.errors import Overloaded
from service.keys import ApiKey


class Quota:
    """The open requests of a key and its bucket of tokens, which fills at its rate and holds a minute's worth.

    num_ingresses: of which each has such a bucket, filled by its part.
    """

    def __init__(self, max_streams: int, num_ingresses: int = 1) -> None:
        self._num_ingresses = num_ingresses
        self._max_streams = max_streams
        self._open = 0
        self._spent = 0.0
        self._as_of = time.monotonic()

    def enter(self, key: ApiKey) -> None:
        """Open a request. Raises `Overloaded`."""
        limit = key.max_concurrent or self._max_streams
        if self._open >= limit:
            raise Overloaded(
                f"this API key has {self._open} requests open, and {limit} are allowed at once",
                retry_after_s=1,
                code="too_many_requests_open",
            )
        self._open += 1

    def leave(self) -> None:
        """Close a request."""
        self._open -= 1

    def spend(self, key: ApiKey, num_tokens: int) -> None:
        """Take what a request may need from the bucket. Raises `Overloaded`, which says when there is enough.

        A request larger than the bucket passes when that is full.
        """
        if key.tokens_per_minute is None:
            return
        capacity = key.tokens_per_minute / self._num_ingresses
        rate = capacity / 60
        now = time.monotonic()
        self._spent = max(0.0, self._spent - (now - self._as_of) * rate)
        self._as_of = now
        excess = self._spent + min(num_tokens, capacity) - capacity
        if excess > 0:
            raise Overloaded(
                f"this API key may use {key.tokens_per_minute} tokens a minute, and too few are left for the "
                f"{num_tokens} that this request may need",
                retry_after_s=max(1, math.ceil(excess / rate)),
                code="token_rate_exceeded",
            )
        self._spent += num_tokens

    def refund(self, num_tokens: int) -> None:
        """Give back what a request had reserved and did not use."""
        self._spent = max(0.0, self._spent - num_tokens)
