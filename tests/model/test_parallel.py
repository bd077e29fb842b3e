"""A model over two processes: the same tokens as in one, whatever a step is about."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from model import parallel
from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.parallel import SUM_SECONDS, ProcessGroup, run_rank
from model.sampling.params import SamplingParams
from tests.conftest import write_llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
CONFIG = EngineConfig(
    dtype="fp32", device="cpu", kernels="torch", block_size=4, kv_cache_tokens=72, max_num_seqs=4,
    max_num_batched_tokens=12,
)  # fmt: skip
PROMPT = [7, 100, 33, 250, 9, 61, 180, 44, 12, 305, 77, 201, 154, 18, 290, 5, 66, 131, 240, 88]


def requests() -> list[Request]:
    """Chunks, a shared prefix, sampling with penalties, log-probabilities of the prompt, and too little memory."""
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(max_tokens=20, seed=4, frequency_penalty=0.5, ignore_eos=True)
    scored = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=1, ignore_eos=True)
    return [
        Request("greedy", PROMPT, greedy),
        Request("shared", [*PROMPT[:16], 3], greedy),
        Request("drawn", PROMPT[:9], drawn),
        Request("scored", PROMPT[:7], scored),
        Request("long", [*PROMPT, *PROMPT], drawn),
    ]


def say(file: Path, engine: Engine) -> None:
    """Run them all, and write down what was said."""
    said: dict[str, list[int]] = {}
    scores: list[float] = []
    for request in requests():
        said[request.request_id] = []
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            said[output.request_id] += output.token_ids
            scores += [item.logprob for item in output.prompt_logprobs or () if item is not None]
        engine.check_integrity()
    found = {
        "said": said,
        "scores": scores,
        "preemptions": engine.stats.num_preemptions,
        "hits": engine.stats.prefix_hits,
        "drafts": (engine.stats.num_drafted, engine.stats.num_accepted),
    }
    file.write_text(json.dumps(found))


def start(rank: int, init_method: str, directory: Path, file: Path, config: EngineConfig) -> None:
    torch.set_num_threads(1)
    run_rank(rank, 2, init_method, directory, config, partial(warm_up_and_say, file))


def warm_up_and_say(file: Path, engine: Engine) -> None:
    """As on a GPU, where kernels are compiled before anybody asks: the others come along."""
    engine.warm_up()
    say(file, engine)


def said_by_two_and_one(tmp_path: Path, of_two: EngineConfig) -> tuple[dict, dict]:
    """What two processes said with that configuration, and what one said with the plain one."""
    directory = tmp_path / "model"
    write_llama(directory, vocab_size=321)
    spawn(start, (f"file://{tmp_path}/store", directory, tmp_path / "two.json", of_two), nprocs=2)
    say(tmp_path / "one.json", Engine.from_checkpoint(directory, CONFIG))
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    return two, one


def test_two_processes_say_what_one_says(tmp_path):
    two, one = said_by_two_and_one(tmp_path, CONFIG)
    assert two["said"] == one["said"]
    assert two["scores"] == pytest.approx(one["scores"], abs=1e-4)
    assert one["preemptions"] > 0
    assert one["hits"] > 0
    assert (two["preemptions"], two["hits"]) == (one["preemptions"], one["hits"])


def test_two_processes_that_guess_ahead_say_what_one_says_that_does_not(tmp_path):
    """The leader alone knows of guesses; to the others a step is longer. One that they did not take back would show."""
    two, one = said_by_two_and_one(tmp_path, replace(CONFIG, speculative_tokens=3))
    assert two["said"] == one["said"]
    drafted, accepted = two["drafts"]
    assert 0 < accepted < drafted, "some were right, and some had to be taken back"
    assert one["drafts"] == [0, 0]


def run_command(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "model.parallel", "--model", str(directory), "--device", "cpu", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_the_command_starts_all_processes_and_prints_what_the_model_says(tiny_llama):
    params = SamplingParams(max_tokens=5, temperature=0.0)
    engine = Engine.from_checkpoint(tiny_llama[0], EngineConfig(dtype="fp32", device="cpu", kernels="torch"))
    expected = [token_id for out in engine.generate(Request("a", PROMPT, params)) for token_id in out.token_ids]
    ids = [str(token_id) for token_id in PROMPT]
    ended = run_command(tiny_llama[0], "--max-tokens", "5", "--prompt-ids", *ids)
    assert (ended.returncode, [int(word) for word in ended.stdout.split()]) == (0, expected)


def test_more_processes_than_gpus_are_refused_with_the_numbers(tiny_llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(parallel, "spawn", lambda *args, **options: pytest.fail("processes were started"))
    with pytest.raises(SystemExit, match="2 processes need a GPU each, and torch sees 1 here"):
        parallel.main(["--model", str(tiny_llama[0]), "--prompt-ids", "5"])


def test_a_sum_waits_for_a_lost_process_no_longer_than_the_first_step_may_take(monkeypatch):
    timeouts: dict[object, timedelta] = {}
    summed: list[object] = []

    def new_group(backend, timeout):
        timeouts[group := object()] = timeout
        return group

    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(parallel.dist, "new_group", new_group)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda x, group: summed.append(group))
    ProcessGroup(0, 2, "file:///nowhere", torch.device("cpu")).add_up(torch.zeros(1))
    assert [timeouts[group].total_seconds() for group in summed] == [SUM_SECONDS]


def test_what_the_leader_cannot_begin_ends_all_processes_with_one_line(tiny_llama):
    ended = run_command(tiny_llama[0], "--kv-cache-tokens", "3", "--prompt-ids", "5")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "model.parallel: a cache of 3 tokens is smaller than one block of 16\n"


def test_a_model_that_cannot_be_split_is_refused_in_one_line_by_all_processes(tiny_llama):
    ended = run_command(tiny_llama[0], "--world-size", "3", "--prompt-ids", "5")
    assert ended.returncode == 1
    assert "model.parallel: num_heads (4) cannot be split over 3 processes" in ended.stderr
