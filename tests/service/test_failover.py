"""Engines that die under open streams: the client sees a pause, not a seam."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from tests.service.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STREAMS = 8


def story(client: OpenAI, service: Running, number: int, *, kills: bool = False) -> tuple[str, str | None]:
    """The text and finish reason of one stream, half of them greedy. kills: an engine, after its tenth chunk."""
    stream = client.completions.create(
        model=service.model,
        prompt="Once upon a time",
        max_tokens=300,
        seed=number,
        temperature=number % 2,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text, reason = "", None
    for i, chunk in enumerate(stream):
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason
        if kills and i == 10:
            service.engines_at_work()[0].send_signal(signal.SIGKILL)
    return text, reason


def test_streams_of_a_killed_replica_go_on_as_if_nothing_had_happened(client: OpenAI, service: Running) -> None:
    undisturbed = [story(client, service, number) for number in range(STREAMS)]
    resumes = service.metrics()["attendant_stream_resumes_total"]
    with ThreadPoolExecutor(STREAMS) as pool:
        disturbed = list(pool.map(lambda i: story(client, service, i, kills=i == 0), range(STREAMS)))
    assert disturbed == undisturbed
    assert service.metrics()["attendant_stream_resumes_total"] > resumes
