"""`attendant generate --model DIR --token-ids ... --temperature 0 --json`: how parity is checked from outside."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from service.cli import app
from tests.parity.conftest import NUM_NEW, pair_of, prompt_of
from tests.parity.models import FAMILIES

PROMPT = prompt_of(23)


def options(directory, *more):
    token_ids = ",".join(map(str, PROMPT))
    return ["--model", str(directory), "--token-ids", token_ids, "--temperature", "0", "--json", *more]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_writes_the_greedy_tokens_of_transformers(tmp_path, family):
    pair = pair_of(family, tmp_path)
    result = CliRunner().invoke(
        app, ["generate", *options(tmp_path, "--max-tokens", str(NUM_NEW), "--ignore-eos")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["token_ids"] == pair.greedy(PROMPT)
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == len(PROMPT) + NUM_NEW


@pytest.mark.slow
def test_in_a_process_of_its_own_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    pair = pair_of("qwen3", tmp_path)
    run = [sys.executable, "-m", "service", "generate"]
    nine = options(tmp_path, "--max-tokens", "9", "--ignore-eos")
    done = subprocess.run([*run, *nine], capture_output=True, text=True)
    assert json.loads(done.stdout)["token_ids"] == pair.greedy(PROMPT, 9), done.stderr
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"qwen3"', '"qwen9"'))
    done = subprocess.run([*run, *options(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "model_type 'qwen9' is not known; known are: attendant, gemma2," in done.stderr
