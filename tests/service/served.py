"""One real service for the whole session: `attendant serve` as a user starts it, with two replicas."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.conftest import STORYTELLER
from tests.service.conftest import TEMPLATE_WITH_TOOLS, Running, start, stop, write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, with a chat template that tells it of tools; what it makes of them is the grammar's work."""
    directory = tmp_path_factory.mktemp("models") / STORYTELLER.name
    shutil.copytree(STORYTELLER, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE_WITH_TOOLS)
    return directory


@pytest.fixture(scope="session")
def service(served_model: Path) -> Iterator[Running]:
    running = start(served_model, "--replicas", "2", "--kv-cache-tokens", "16384")
    yield running
    assert stop(running) == 0


@pytest.fixture(scope="session")
def client(service: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
