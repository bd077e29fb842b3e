"""An ingress that is to go: what it has is finished, nothing new is taken, and those who ask how it goes are told."""

import asyncio
from pathlib import Path

import pytest

from service.completion import Service
from service.door import Door
from service.limits import Limits
from tests.service.fakes import FakeFleet
from tests.service.test_dispatch import until
from tests.service.test_gate import client_of, complete, service_with


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet("a")


@pytest.fixture
def service(tiny_model: Path, fleet: FakeFleet) -> Service:
    return service_with(tiny_model, Limits(), fleet)


async def test_what_is_open_is_finished_and_what_is_new_is_sent_away(service: Service, fleet: FakeFleet) -> None:
    async with client_of(service, Door()) as client:
        open_one = asyncio.create_task(complete(client))
        await until(lambda: fleet.replicas["a"].submitted)
        closing = asyncio.create_task(service.drain.close())
        await until(lambda: service.drain.is_closed)
        refused = await complete(client)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert refused.json()["error"]["code"] == "draining"
        assert not closing.done()
        fleet.replicas["a"].say(0, 70, finish_reason="length")
        assert (await open_one).status_code == 200
        await asyncio.wait_for(closing, 5)


async def test_an_idle_ingress_may_go_at_once(service: Service) -> None:
    await asyncio.wait_for(service.drain.close(), 5)


async def test_a_refused_request_is_not_waited_for(service: Service) -> None:
    async with client_of(service, Door()) as client:
        assert (await complete(client, max_tokens=-1)).status_code == 400
    await asyncio.wait_for(service.drain.close(), 5)


@pytest.mark.parametrize(
    ("path", "status"), [("/ready", 503), ("/health", 200), ("/metrics", 200), ("/v1/models", 200)]
)
async def test_behind_closed_doors_balancers_are_sent_away_and_scrapers_are_not(
    service: Service, path: str, status: int
) -> None:
    await service.drain.close()
    async with client_of(service, Door()) as client:
        assert (await client.get(path)).status_code == status
