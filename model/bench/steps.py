"""Where the time of a step goes: microseconds of each phase, medians over `--steps` steps.

For each batch size, requests of `--context` tokens decode together. Detokenizing is the ingress' work, off the engine's
thread; it is shown because every token pays it.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from model.bench import report, shapes
from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.engine.stats import StepPhases
from model.sampling.params import SamplingParams
from model.text.detokenize import Detokenizer
from model.text.tokenizer import Tokenizer

STORYTELLER = Path(__file__).parent.parent / "checkpoints" / "storyteller"
COLUMNS = (*StepPhases._fields, "step", "detokenize")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    shapes.add_arguments(parser)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "int8"], default="bf16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=64, help="prompt tokens of each request")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--deterministic", action="store_true")
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print the table, and write it as JSON where asked."""
    config = EngineConfig(
        dtype=args.dtype,
        max_num_seqs=max(args.batch),
        max_num_batched_tokens=1024,
        max_model_len=args.context + args.steps + 16,
        num_threads=args.threads,
        deterministic=args.deterministic,
        prefix_cache=False,
    )
    engine = Engine.from_checkpoint(shapes.directory_of(args), config)
    params = SamplingParams(max_tokens=args.steps + 8, temperature=args.temperature, top_p=args.top_p, ignore_eos=True)
    rows = []
    report.print_row("batch", *COLUMNS, "overhead")
    for batch in args.batch:
        row = measure_steps(engine, batch, args.context, args.steps, params)
        row["detokenize"] = measure_detokenize(batch, args.steps)
        row["overhead"] = 1.0 - row["forward"] / sum(row[phase] for phase in StepPhases._fields)
        rows.append({"batch": batch} | row)
        report.print_row(batch, *(f"{row[name]:.0f}" for name in COLUMNS), f"{row['overhead']:.1%}")
    report.write(args, {"rows": rows})


def measure_steps(engine: Engine, batch: int, context: int, steps: int, params: SamplingParams) -> dict[str, float]:
    """Median microseconds of each phase of a decode step at this batch size, and of the whole step."""
    rng = torch.Generator().manual_seed(batch)
    for index in range(batch):
        prompt = torch.randint(engine.model_config.vocab_size, (context,), generator=rng).tolist()
        engine.add(Request(f"{batch}-{index}", prompt, params))
    while engine.stats.num_generated < batch:  # prefill, until all of them decode
        engine.step()
    seen: list[tuple[float, StepPhases]] = []
    for _ in range(steps):
        engine.step()
        seen.append((engine.stats.seconds, engine.stats.phases))
    for index in range(batch):
        engine.abort(f"{batch}-{index}")
    medians = {
        phase: 1e6 * statistics.median(getattr(phases, phase) for _, phases in seen) for phase in StepPhases._fields
    }
    medians["step"] = 1e6 * statistics.median(seconds for seconds, _ in seen)
    return medians


def measure_detokenize(batch: int, steps: int) -> float:
    """Median microseconds to turn one token of each of `batch` streams into text, with two stop strings to look for."""
    tokenizer = Tokenizer.from_directory(STORYTELLER)
    token_ids = tokenizer.encode("Once upon a time there was a fox who had a lantern. " * 20)
    streams = [Detokenizer(tokenizer, ["\n\n", "The end"]) for _ in range(batch)]
    seen = []
    for step in range(steps):
        started = time.perf_counter()
        for stream in streams:
            stream.feed([token_ids[step % len(token_ids)]])
        seen.append(time.perf_counter() - started)
    return 1e6 * statistics.median(seen)
