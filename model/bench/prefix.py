"""Time to the first token of a prompt, first, and repeated with another last token.

Medians over `--prompts` random prompts of `--context` tokens, one at a time.
"""

import argparse
import statistics
import time

import torch

from model.bench import report, shapes
from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    shapes.add_arguments(parser)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "int8"], default="bf16")
    parser.add_argument("--context", type=int, default=900)
    parser.add_argument("--prompts", "--steps", type=int, default=5)
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print the table, and write it as JSON where asked."""
    config = EngineConfig(
        dtype=args.dtype,
        max_num_batched_tokens=1024,
        max_model_len=args.context + 1,
        num_threads=args.threads,
    )
    row = measure_prefix(Engine.from_checkpoint(shapes.directory_of(args), config), args.context, args.prompts)
    report.print_row("tokens", "fresh ms", "again ms", "ratio")
    report.print_row(args.context, f"{row['fresh']:.1f}", f"{row['repeated']:.1f}", f"{row['ratio']:.1f}")
    report.write(args, {"rows": [row]})


def measure_prefix(engine: Engine, context: int, prompts: int) -> dict[str, float]:
    """Median milliseconds to the first token of a fresh prompt, and of one that differs in its last token only."""
    rng = torch.Generator().manual_seed(0)
    seen: dict[str, list[float]] = {"fresh": [], "repeated": []}
    for index in range(prompts):
        shared = torch.randint(engine.model_config.vocab_size, (context - 1,), generator=rng).tolist()
        for last, name in enumerate(seen):
            request = Request(f"{name}-{index}", [*shared, last], SamplingParams(max_tokens=1, temperature=0.0))
            started = time.perf_counter()
            for _ in engine.generate(request):
                seen[name].append(time.perf_counter() - started)
    row = {name: 1e3 * statistics.median(seconds) for name, seconds in seen.items()}
    return row | {"ratio": row["fresh"] / row["repeated"]}
