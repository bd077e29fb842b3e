"""The ingress' end of the channel to one replica: it carries what comes, hears when nothing does, and asks again later.

A replica has three ways to go. It dies, and the channel ends. Its engine dies or sticks in a step, and the replica
ends the channel itself. Or all of it stands still (SIGSTOP, a stuck event loop, a lost network), and nothing ends: then
it is its silence that tells, since a channel that has nothing to carry beats twice a second.

Time is counted in turns of our own loop, not in seconds. Who was asleep, or starved of processor time, has taken few
turns, and does not blame the others for it.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from service.channel import ITEMS_A_CALL, TURN_S, Output
from service.engines import Engines, reason
from service.router import ReplicaGone

logger = logging.getLogger(__name__)

SILENT_TURNS = 12  # 3 s, six beats: docs/decisions/0008-who-is-alive.md
PING_TURNS = 4
PING_TIMEOUT_S = 2.0


class Link:
    """One replica, from the first request it took until Serve has taken it away.

    is_open: its channel is, and has not fallen silent. A link that is not open goes on asking whether the replica is
    well again, and is done when it is, or is gone. is_leaving: Serve sends it no more calls; it finishes what
    it has.
    receive: takes outputs. lost: called once, with the link, when its streams have to move. is_idle: whether the
    replica has nothing of ours.
    """

    def __init__(
        self,
        engines: Engines,
        replica_id: str,
        channel_id: str,
        *,
        receive: Callable[[list[Output]], None],
        lost: Callable[["Link"], None],
        is_idle: Callable[[str], bool],
    ) -> None:
        self.replica_id = replica_id
        self.session = -1
        self.is_open = False
        self.is_leaving = False
        self._engines = engines
        self._channel_id = channel_id
        self._receive = receive
        self._lost = lost
        self._is_idle = is_idle
        self._num_received = 0
        self._quiet_turns = 0
        self._carrying: asyncio.Task[None] | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_done(self) -> bool:
        """Whether there is no more to do for it: the replica is gone, or well again and without a channel."""
        return self._task is None or self._task.done()

    def open(self, session: int) -> None:
        """Open the channel of that session."""
        self.session, self.is_open = session, True
        self._task = self._engines.spawn(self._run())

    def quarantine(self) -> None:
        """The replica does not work, as it says itself, or as its silence does: ask until it is well."""
        self._task = self._engines.spawn(self._until_well())

    def close(self) -> None:
        """Let go of the replica. An open channel is an open call to Serve, and would hold up its shutdown."""
        for task in (self._task, self._carrying, self._pinging):
            if task is not None:
                task.cancel()

    async def _run(self) -> None:
        self._carrying = self._engines.spawn(self._carry())
        await self._watch(self._carrying)
        self._carrying.cancel()
        self.is_open = False
        self._lost(self)
        if not self.is_leaving:
            await self._until_well()

    async def _carry(self) -> None:
        """Hand on what comes, until the channel ends."""
        calls = [self._call_channel()]
        try:
            while calls:
                await self._hear(calls)
                calls.pop(0)
            logger.info("engine replica %s closed its channel", self.replica_id)
        except Exception as error:  # whatever it is, nothing more will come through this channel
            logger.warning("lost the channel to engine replica %s: %s", self.replica_id, reason(error))
        finally:
            for call in calls:
                call.cancel()

    async def _hear(self, calls: list[Any]) -> None:
        """Until the first call ends. Once it is long, the next is added; when that has arrived there, this one ends.

        Where it never arrives (Serve sends the replica no more), this one goes on.
        """
        num_items = 0
        async for outputs in calls[0]:
            self._quiet_turns = 0
            num_items += 1
            if num_items == ITEMS_A_CALL and not self.is_leaving:
                calls.append(self._call_channel())
            if outputs:
                self._num_received += len(outputs)
                self._receive(outputs)

    def _call_channel(self) -> Any:
        return self._engines.channel(self._channel_id, self.session, self.replica_id)

    async def _watch(self, carrying: "asyncio.Task[None]") -> None:
        """Until the channel ends, falls silent, or is of no more use."""
        turn = 0
        while not carrying.done() and not (self.is_leaving and self._is_idle(self.replica_id)):
            await asyncio.wait({carrying}, timeout=TURN_S)
            turn += 1
            self._quiet_turns += 1
            if self._quiet_turns > SILENT_TURNS:
                logger.warning("engine replica %s has fallen silent", self.replica_id)
                return
            if turn % PING_TURNS == 0 and (self._pinging is None or self._pinging.done()):
                self._pinging = self._engines.spawn(self._ping())

    async def _ping(self) -> None:
        """Tell the replica that we live and how much has come, and learn whether Serve still sends it calls.

        One that leaves is not told any more, and does not ask for it: its channel beats on until it is through.
        """
        try:
            await self._call(self.session, self._num_received)
        except ReplicaGone:
            self.is_leaving = True
        except Exception as error:  # slow, or dead: the channel will tell
            logger.info("engine replica %s did not answer a ping: %s", self.replica_id, reason(error))

    async def _until_well(self) -> None:
        while True:
            await asyncio.sleep(PING_TURNS * TURN_S)
            try:
                if await self._call(None, 0):
                    logger.info("engine replica %s is well again", self.replica_id)
                    return
            except ReplicaGone:
                return
            except Exception as error:
                logger.info("engine replica %s still does not answer: %s", self.replica_id, reason(error))

    async def _call(self, session: int | None, num_received: int) -> bool:
        is_well: bool = await self._engines.call(
            "ping", self._channel_id, session, num_received, pin=self.replica_id, timeout_s=PING_TIMEOUT_S
        )
        return is_well
