"""R17: engines of two processes each: they say what one process says, and they live and die together.

A replica that went on without its rank would hang in the next step, or end its requests with an error of the step; a
rank that went on without its replica would hold its memory, and on a GPU all of it, for nobody.
"""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams
from model.text.detokenize import Detokenizer
from model.text.tokenizer import Tokenizer
from tests.faults.conftest import scaled
from tests.faults.survivors import PROMPT, Told, pause_at, same, tell_all, until, until_engines
from tests.service.conftest import Running, command_of, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STREAMS, TOKENS = 8, 400


@pytest.fixture(scope="module")
def running(tiny_model: Path) -> Iterator[Running]:
    options = ["--replicas", "2", "--tensor-parallel", "2", "--dtype", "fp32", "--kv-cache-tokens", "16384"]
    service = start(tiny_model, *options)
    yield service
    assert stop(service) == 0, "and no rank is left: `stop` looks"


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path) -> list[Told]:
    """What one process makes of the same requests, without a service."""
    tokenizer = Tokenizer.from_directory(tiny_model)
    config = EngineConfig(dtype="fp32", device="cpu", kernels="torch", kv_cache_tokens=16384, num_threads=1)
    engine = Engine.from_checkpoint(tiny_model, config)
    told = []
    for number in range(STREAMS):
        params = SamplingParams(max_tokens=TOKENS, temperature=number % 2, seed=number, ignore_eos=True)
        text, detokenizer = "", Detokenizer(tokenizer)
        for output in engine.generate(Request(str(number), tokenizer.encode(f"{PROMPT} {number}"), params)):
            text += detokenizer.feed(output.token_ids)
        told.append(Told(text + detokenizer.flush(), "length", is_done=True))
    return told


def ranks(running: Running) -> list[psutil.Process]:
    """The processes that follow."""
    return [child for child in running.children() if "ray::Rank" in command_of(child)]


def rank_of(running: Running, engine: psutil.Process) -> psutil.Process:
    """The one that is connected to it."""
    ports = {connection.laddr.port for connection in engine.net_connections("tcp")}
    peers = {rank: {peer.raddr.port for peer in rank.net_connections("tcp") if peer.raddr} for rank in ranks(running)}
    return next(rank for rank in peers if peers[rank] & ports)


def pids(running: Running) -> set[int]:
    return {process.pid for process in (*ranks(running), *running.engine_processes())}


async def until_complete(running: Running) -> None:
    await until(lambda: (len(running.engine_processes()), len(ranks(running))) == (2, 2), 90)
    await until(lambda: running.metrics()["attendant_engine_replicas_answering"] == 2, 90)


@pytest.mark.parametrize("who", ["rank", "replica"][: scaled(1, 2)])
async def test_one_that_is_killed_takes_the_other_along_and_the_streams_go_on(
    running: Running, undisturbed: list[Told], who: str
) -> None:
    """`undisturbed` was said by one process, so this is also the proof that two say the same."""
    for _ in range(scaled(1, 5)):
        await until_complete(running)
        await until_engines(running, 2)
        before = pids(running)
        resumes = running.metrics()["attendant_stream_resumes_total"]

        async def kill() -> None:
            engine, *_ = await asyncio.to_thread(running.engines_at_work)
            victim = engine if who == "replica" else rank_of(running, engine)
            victim.send_signal(signal.SIGKILL)

        disturbed = await tell_all(running, STREAMS, TOKENS, kill)
        assert same(disturbed, undisturbed) == STREAMS
        assert running.metrics()["attendant_stream_resumes_total"] > resumes
        print(f"a {who} killed: pause p50 {pause_at(disturbed, 0.5):.2f} s, most {pause_at(disturbed, 1):.2f} s")
        await until(lambda before=before: len(pids(running) & before) == 2, 30)  # the other two belonged together
        assert len([process for process in ranks(running) if process.pid in before]) == 1
