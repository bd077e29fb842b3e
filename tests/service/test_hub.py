"""A model by its id on the Hugging Face hub: what is fetched, and what is said where nothing can be."""

import json
import subprocess
import sys

import huggingface_hub
import pytest

from model.errors import CheckpointError
from service.hub import EMBEDDED, display_name, resolve


class Hub:
    """Stands in for `snapshot_download`: remembers what it was asked for and has one repository."""

    def __init__(self, snapshot, failure=None):
        self.snapshot, self.failure = snapshot, failure
        self.asked = []

    def __call__(self, repo_id, *, allow_patterns, ignore_patterns):
        self.asked.append((repo_id, allow_patterns, ignore_patterns))
        if self.failure:
            raise self.failure
        return str(self.snapshot)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_bytes((EMBEDDED / "config.json").read_bytes())
    fake = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


@pytest.mark.fast
@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "a/b"])
def test_configs_are_fetched_first_and_then_safetensors_of_the_top_folder_alone(hub, name):
    assert resolve(name) == hub.snapshot
    assert hub.asked == [
        (name, ["*.json", "*.jinja"], ["*/*"]),
        (name, ["*.json", "*.jinja", "model*.safetensors"], ["*/*"]),
    ]


@pytest.mark.fast
def test_a_model_that_is_not_for_us_is_refused_before_its_weights_are_fetched(hub):
    (hub.snapshot / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match="model_type 'mamba' is not known"):
        resolve("state-spaces/mamba-130m-hf")
    assert len(hub.asked) == 1


@pytest.mark.fast
def test_a_directory_is_taken_as_it_is(hub):
    assert resolve(str(EMBEDDED)) == EMBEDDED
    assert hub.asked == []


@pytest.mark.fast
def test_a_model_is_called_by_the_last_part_of_its_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert display_name("Qwen/Qwen3-0.6B") == "Qwen3-0.6B"
    assert display_name(str(EMBEDDED)) == "storyteller"
    assert display_name(".") == tmp_path.name


@pytest.mark.fast
@pytest.mark.parametrize(
    "name", ["nowhere", "/no/where", "../other", "./here/there", "a/b/c", "a/../b", "a b/c", "a/.."]
)
def test_what_is_neither_a_directory_nor_a_hub_id_is_not_looked_for_on_the_hub(hub, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(CheckpointError, match=r"no such model directory$"):
        resolve(name)
    assert hub.asked == []


@pytest.mark.fast
@pytest.mark.parametrize("failure", [OSError("no route\nto host"), ValueError(""), PermissionError("gated repo")])
def test_a_failure_to_fetch_is_one_line(hub, failure):
    hub.failure = failure
    with pytest.raises(CheckpointError, match="could not be fetched from the Hugging Face hub: ") as refusal:
        resolve("Qwen/Qwen3-0.6B")
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_offline_the_command_ends_with_one_line(tmp_path):
    command = [sys.executable, "-m", "service", "generate", "--token-ids", "1", "--model", "Qwen/Qwen3-0.6B"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("attendant: Qwen/Qwen3-0.6B: no such model directory, and it could not be fetched")
