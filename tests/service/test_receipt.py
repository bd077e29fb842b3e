"""Receipts and the access log: where the time went, which weights answered, and one line for each request."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.completion import Service
from service.door import Door
from service.limits import Limits
from service.receipt import WeightsDigest
from tests.service.test_api import events, fleet_of
from tests.service.test_gate import client_of, complete, service_with

PARTS = {"admission", "queue", "prefill", "decode", "detokenize", "transport", "total"}


@pytest.fixture
def service(tiny_model: Path) -> Service:
    return service_with(tiny_model, Limits())


async def test_an_answer_carries_a_receipt_when_asked_to(service: Service) -> None:
    async with client_of(service, Door()) as client:
        answer = await complete(client, {"x-request-id": "mine"}, receipt=True)
    receipt = answer.json()["receipt"]
    assert receipt["request_id"] == "mine"
    assert receipt["weights_sha256"] == "ab"
    assert receipt["cached_prompt_tokens"] == 0
    assert set(receipt["seconds"]) == PARTS
    assert (receipt["seconds"]["queue"], receipt["seconds"]["decode"]) == (0.25, None)
    assert receipt["seconds"]["admission"] <= receipt["seconds"]["total"]


@pytest.mark.parametrize("with_usage", [True, False])
async def test_a_stream_has_its_receipt_in_the_last_chunk(service: Service, with_usage: bool) -> None:
    async with client_of(service, Door()) as client:
        asked = {"stream_options": {"include_usage": True}} if with_usage else {}
        answer = await complete(client, stream=True, receipt=True, **asked)
    *chunks, last, done = events(answer.text)
    assert done == "[DONE]"
    assert not any("receipt" in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["receipt"]["weights_sha256"] == "ab"
    assert ("usage" in last) == with_usage


async def test_a_chat_has_one_too(service: Service) -> None:
    async with client_of(service, Door()) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "receipt": True}
        answer = await client.post("/v1/chat/completions", json=body)
    assert set(answer.json()["receipt"]["seconds"]) == PARTS


@pytest.mark.parametrize("receipt", [None, False])
async def test_nobody_gets_a_receipt_unasked_and_no_engine_is_asked_for_one(
    service: Service, receipt: bool | None
) -> None:
    del fleet_of(service).receipt  # type: ignore[attr-defined]
    async with client_of(service, Door()) as client:
        assert "receipt" not in (await complete(client, receipt=receipt)).json()
    assert not fleet_of(service).replicas["a"].submitted[0].timed


async def test_a_replica_that_is_gone_leaves_its_part_of_the_receipt_empty(service: Service) -> None:
    async def gone(request_id: str, pin: str) -> Any:
        raise RuntimeError("gone")

    fleet_of(service).receipt.remote = gone  # type: ignore[attr-defined]
    async with client_of(service, Door()) as client:
        receipt = (await complete(client, receipt=True)).json()["receipt"]
    assert receipt["weights_sha256"] is None
    assert receipt["seconds"]["queue"] is None
    assert receipt["seconds"]["transport"] <= receipt["seconds"]["total"]


def test_the_digest_of_one_file_is_what_sha256sum_says(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 1_000_000)
    said = subprocess.run(["sha256sum", "model.safetensors"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert WeightsDigest(tmp_path).wait() == said.stdout.split()[0]


def test_the_digest_of_several_files_is_that_of_sha256sums_listing(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    command = "sha256sum *.safetensors | sha256sum"
    said = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert WeightsDigest(tmp_path).wait() == said.stdout.split()[0]


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    file = tmp_path / "access.log"
    return lambda: [json.loads(line) for line in file.read_text().splitlines()]


async def test_each_request_has_one_line_in_the_log(
    service: Service, tmp_path: Path, log: Callable[[], list[dict[str, Any]]]
) -> None:
    async with client_of(service, Door(access_log=str(tmp_path / "access.log"))) as client:
        await complete(client, {"x-request-id": "mine"})
        await complete(client, max_tokens=-1)
        await client.get("/nowhere/secret")
    served, refused, lost = log()
    assert served["request_id"] == "mine"
    assert (served["method"], served["route"], served["status"]) == ("POST", "/v1/completions", 200)
    assert (served["prompt_tokens"], served["completion_tokens"], served["finish_reasons"]) == (2, 8, ["length"])
    assert (refused["route"], refused["status"]) == ("/v1/completions", 400)
    assert refused["error"] == "InvalidRequest"
    assert "error" not in served
    assert (lost["route"], lost["status"]) == ("none", 404)


@pytest.mark.parametrize("enabled", [False, True])
async def test_the_log_tells_what_was_asked_only_when_enabled(
    service: Service, tmp_path: Path, log: Callable[[], list[dict[str, Any]]], enabled: bool
) -> None:
    async with client_of(service, Door(access_log=str(tmp_path / "access.log"), log_prompts=enabled)) as client:
        await complete(client, prompt="the secret of the fox\n")
        await client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "the secret of the fox"}]}
        )
    lines = [json.dumps(line) for line in log()]
    assert ["secret" in line for line in lines] == [enabled, enabled]


async def test_the_log_names_the_key_and_never_holds_it(
    service: Service, tmp_path: Path, log: Callable[[], list[dict[str, Any]]]
) -> None:
    from service import keys

    key = keys.add(tmp_path / "keys.json", "team-a")
    door = Door(access_log=str(tmp_path / "access.log"), api_keys_file=str(tmp_path / "keys.json"))
    async with client_of(service, door, key) as client:
        await complete(client)
    assert [line["key"] for line in log()] == ["team-a"]
    assert key.split("-", 2)[2] not in (tmp_path / "access.log").read_text()
