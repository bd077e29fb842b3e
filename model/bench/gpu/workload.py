"""nano-vllm's workload on the small model: many sequences of mixed lengths at once, sampled, from start to end.

It is that project's `bench.py`: 256 prompts of 100 to 1,024 random ids, 100 to 1,024 tokens each, temperature 0.6, end
of sequence ignored, everything drawn from Python's generator with seed 0 (github.com/GeeeekExplorer/nano-vllm).
"""

import random
import time

from model.bench.gpu.models import engine_of, random_decoder
from model.bench.gpu.results import Results
from model.bench.gpu.scale import Scale
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams

NAME = "nano-vllm's workload"
LARGEST_ID = 10_000


def run(results: Results, scale: Scale) -> None:
    """One row: output tokens a second."""
    if not results.missing([NAME]):
        return
    prompts, lengths = draw(scale.sequences, scale.longest)
    cache = min(sum(map(len, prompts)) + sum(lengths) + 16 * len(prompts), 700_000)
    engine = engine_of(random_decoder(scale.small, scale), scale, cache, 2 * scale.longest)
    vocab_size = engine.model_config.vocab_size
    play(engine, [prompt[:8] for prompt in prompts], [2] * len(prompts), "warm", vocab_size)
    with results.row(NAME) as row:
        seconds = play(engine, prompts, lengths, "", vocab_size)
        row |= {
            "prompt_tokens": sum(map(len, prompts)),
            "output_tokens": sum(lengths),
            "seconds": seconds,
            "output_rate": sum(lengths) / seconds,
            "preemptions": engine.stats.num_preemptions,
        }


def draw(sequences: int, longest: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens to generate for each, as that project's `bench.py` draws them."""
    rng = random.Random(0)
    shortest = min(100, longest)
    prompts = [[rng.randint(0, LARGEST_ID) for _ in range(rng.randint(shortest, longest))] for _ in range(sequences)]
    return prompts, [rng.randint(shortest, longest) for _ in range(sequences)]


def play(engine: Engine, prompts: list[list[int]], lengths: list[int], name: str, vocab_size: int) -> float:
    """Seconds from the first request to the last token."""
    started = time.perf_counter()
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        params = SamplingParams(max_tokens=length, temperature=0.6, ignore_eos=True, seed=index)
        engine.add(Request(f"{name}{index}", [token_id % vocab_size for token_id in prompt], params))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - started
