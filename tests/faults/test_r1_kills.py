"""R1: `kill -9` of a replica under 24 open streams, half of them greedy, half seeded, again and again.

Without the journal every stream of the dead replica ends in the middle; without sampling by (seed, position) the seeded
ones go on with another text.
"""

import asyncio
import signal

import pytest

from tests.faults.conftest import FULL, scaled
from tests.faults.survivors import Told, pause_at, same, tell_all, until_engines
from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STREAMS, TOKENS = 24, 256
PAUSE_S = 2.0


async def test_streams_of_killed_replicas_are_what_they_would_have_been(fleet: Running) -> None:
    undisturbed = await tell_all(fleet, STREAMS, TOKENS)
    disturbed: list[Told] = []
    kills = scaled(1, 20)
    resumes = fleet.metrics()["attendant_stream_resumes_total"]

    async def kill() -> None:
        victim, *_ = await asyncio.to_thread(fleet.engines_at_work)
        victim.send_signal(signal.SIGKILL)

    for _ in range(kills):
        await until_engines(fleet, 2)
        disturbed += await tell_all(fleet, STREAMS, TOKENS, kill)
    moved = fleet.metrics()["attendant_stream_resumes_total"] - resumes
    identical = same(disturbed, undisturbed * kills)
    print(
        f"{identical} of {len(disturbed)} identical, {moved:g} moved, "
        f"pause p50 {pause_at(disturbed, 0.5):.2f} s, p99 {pause_at(disturbed, 0.99):.2f} s"
    )
    assert identical == len(disturbed)
    assert moved >= kills
    if FULL:
        assert pause_at(disturbed, 0.99) <= PAUSE_S
