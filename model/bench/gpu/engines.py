"""Whole engines of the embedded model, in fp32: what they say depends neither on what computes it nor on company."""

import random
from pathlib import Path
from typing import Any

from model.bench.gpu.results import Results
from model.bench.gpu.scale import Scale
from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams

STORYTELLER = Path(__file__).parent.parent.parent / "checkpoints" / "storyteller"
GREEDY = "greedy tokens of the embedded model"
CHANGING = "the same with graphs and overlap as without, in a changing company"

# Drawn inside of a graph, all but the last two: a graph does not know their logits.
ASKS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8},
    {"temperature": 0.9, "top_p": 0.7},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.01},
    {"temperature": 0.0},
    {"temperature": 0.7, "presence_penalty": 1.0},
    {"temperature": 0.8, "logit_bias": {7: 2.0}},
)
LEAVES, LEAVES_BEHIND = "2", 3  # who is aborted, and behind how many tokens


def run(results: Results, scale: Scale) -> None:
    """Two rows: Triton's kernels against torch's, and graphs and overlapping steps against neither."""
    if results.missing([GREEDY]):
        with results.row(GREEDY) as row:
            found, expected = (greedy_tokens(scale, kernels) for kernels in ("triton", "torch"))
            row |= {"tokens": sum(map(len, expected)), "ok": found == expected}
    if scale.device == "cuda" and results.missing([CHANGING]):  # without a card there are no graphs
        with results.row(CHANGING) as row:
            plain, _ = changing_company(scale, cuda_graphs=False, overlap=False)
            said, engine = changing_company(scale, overlap=True)  # graphs wherever they can be had
            preemptions = engine.scheduler.num_preemptions
            row |= {"tokens": sum(map(len, said.values())), "preemptions": preemptions}
            row["ok"] = said == plain and preemptions > 0


def greedy_tokens(scale: Scale, kernels: Any) -> list[list[int]]:
    """What some prompts of different lengths, all there from the start, go on with."""
    on_card = scale.device == "cuda"
    # On a card the cache takes whatever is left when a step was measured.
    config = config_of(scale, kernels=kernels, kv_cache_tokens=None if on_card else 2048)
    engine = Engine.from_checkpoint(STORYTELLER, config)
    params = SamplingParams(max_tokens=32 if on_card else 3, temperature=0.0, ignore_eos=True)
    outputs: dict[str, list[int]] = {}
    for index in range(8 if on_card else 2):
        outputs[str(index)] = []
        engine.add(Request(str(index), prompt_of(5 + 9 * index), params))
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
    return list(outputs.values())


def changing_company(scale: Scale, **options: Any) -> tuple[dict[str, list[int]], Engine]:
    """A request joins at every second step, one leaves, and the cache is too small for all of them at once."""
    config = config_of(scale, kernels="triton", kv_cache_tokens=160, max_num_seqs=8, **options)
    engine = Engine.from_checkpoint(STORYTELLER, config)
    waiting = [
        Request(str(i), prompt_of(3 + i), SamplingParams(max_tokens=40, seed=i, ignore_eos=True, **ask))
        for i, ask in enumerate(ASKS)
    ]
    outputs: dict[str, list[int]] = {request.request_id: [] for request in waiting}
    step = 0
    while waiting or engine.has_work:
        if waiting and step % 2 == 0:
            engine.add(waiting.pop(0))
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
        if len(outputs[LEAVES]) >= LEAVES_BEHIND:
            engine.abort(LEAVES)
        step += 1
    outputs[LEAVES] = outputs[LEAVES][:LEAVES_BEHIND]  # more may have been on their way
    return outputs, engine


def config_of(scale: Scale, **options: Any) -> EngineConfig:
    """On this device, in fp32."""
    return EngineConfig(dtype="fp32", device="cuda" if scale.device == "cuda" else "cpu", **options)


def prompt_of(length: int) -> list[int]:
    """Random ids, others for each length."""
    return random.Random(length).choices(range(3, 300), k=length)
