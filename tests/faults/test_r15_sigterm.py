"""R15: SIGTERM with open streams. They end as they would have, what is new is sent away, and the service is gone."""

import asyncio
import signal
from pathlib import Path

import httpx
import pytest

from tests.faults.conftest import scaled
from tests.faults.streams import Story, body, read
from tests.service.conftest import start, wait_until_gone

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STREAMS = 20
DRAIN_SECONDS = 60
PLANES = ["haproxy", "default"][: scaled(1, 2)]


@pytest.mark.parametrize("plane", PLANES)
async def test_open_streams_end_and_new_work_is_sent_away(served_model: Path, plane: str) -> None:
    """Left to Serve alone, the route goes away at once: new work gets a 404 that tells a client never to come back.
    With a grace shorter than the streams, as the 20 s were that stood here once, streams end in the middle.
    """
    options = ["--kv-cache-tokens", "32768", "--drain-seconds", str(DRAIN_SECONDS), "--data-plane", plane]
    running = start(served_model, *options)
    children = running.children()
    async with httpx.AsyncClient(base_url=running.url, timeout=DRAIN_SECONDS) as client:
        stories = [Story() for _ in range(STREAMS)]
        length = scaled(300, 900)
        reading = [
            asyncio.create_task(read(client, body(running.model, number, length), story))
            for number, story in enumerate(stories)
        ]
        async with asyncio.timeout(60):
            while not all(story.text for story in stories):
                await asyncio.sleep(0)
        running.process.send_signal(signal.SIGTERM)
        refused = await refusal(client, running.model)
        still_open = sum(not story.done for story in stories)
        assert (await client.get("/ready")).status_code == 503
        await asyncio.gather(*reading)
    code = await asyncio.to_thread(wait_until_gone, running, children)

    assert (refused.status, refused.error["code"], int(refused.headers["retry-after"])) == (503, "draining", 5)
    assert still_open == STREAMS, "the refusal came while they ran"
    assert [story for story in stories if not story.is_whole] == []
    assert code == 0


async def refusal(client: httpx.AsyncClient, model: str) -> Story:
    """The answer to new work once it is no longer taken."""
    async with asyncio.timeout(DRAIN_SECONDS):
        while (answer := await read(client, body(model, 0, 1))).status == 200:
            pass
    return answer
