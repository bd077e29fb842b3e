"""Measures the engine alone, on random weights, so it needs no checkpoint.

`python -m model.bench steps`: where the time of a step goes. For each batch size, requests of `--context` tokens decode
together; medians over `--steps` steps, in microseconds. Detokenizing is the ingress' work, off the engine's thread; it
is shown because every token pays it.

`python -m model.bench prefix`: time to the first token of a prompt of `--context` tokens, first and repeated with
another last token; medians over `--steps` prompts.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch

from model.config import EngineConfig, ModelConfig, RopeConfig
from model.decoder import Decoder
from model.engine.engine import Engine
from model.engine.request import Request
from model.engine.stats import StepPhases
from model.sampling.params import SamplingParams
from model.text.detokenize import Detokenizer
from model.text.tokenizer import Tokenizer

STORYTELLER = Path(__file__).parent / "checkpoints" / "storyteller"

SHAPES = {
    "smollm2-135m": ModelConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
        head_dim=64, max_position_embeddings=8192, rope=RopeConfig(theta=100_000.0), tie_word_embeddings=True,
    ),
}  # fmt: skip


def random_engine(shape: ModelConfig, config: EngineConfig) -> Engine:
    """An engine on random weights of this shape."""
    decoder = Decoder(shape).eval().requires_grad_(False)
    decoder.init_weights(torch.Generator().manual_seed(0))
    if config.dtype == "bf16":
        decoder.bfloat16()
    elif config.dtype == "int8":
        decoder.quantize()
    if config.deterministic:
        decoder.fix_row_tiles()
    return Engine(decoder, config)


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
    return {name: 1e3 * statistics.median(seconds) for name, seconds in seen.items()}


def main() -> None:
    """Print what was measured, and write it as JSON where asked."""
    args = parse_arguments()
    config = EngineConfig(
        dtype=args.dtype,
        max_num_seqs=max(args.batch),
        max_num_batched_tokens=1024,
        max_model_len=args.context + args.steps + 16,
        num_threads=args.threads,
        deterministic=args.deterministic,
        prefix_cache=args.what == "prefix",
    )
    engine = random_engine(SHAPES[args.shape], config)
    rows = run_steps(engine, args) if args.what == "steps" else run_prefix(engine, args)
    if args.json:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
        args.json.write_text(json.dumps({"config": asdict(config), "machine": machine, "rows": rows}, indent=2) + "\n")


def run_prefix(engine: Engine, args: argparse.Namespace) -> list[dict[str, float]]:
    """The table of `prefix`."""
    row = measure_prefix(engine, args.context, args.steps)
    row["ratio"] = row["fresh"] / row["repeated"]
    print_row("tokens", "fresh ms", "again ms", "ratio")
    print_row(args.context, f"{row['fresh']:.1f}", f"{row['repeated']:.1f}", f"{row['ratio']:.1f}")
    return [row]


def run_steps(engine: Engine, args: argparse.Namespace) -> list[dict[str, float]]:
    """The table of `steps`."""
    params = SamplingParams(max_tokens=args.steps + 8, temperature=args.temperature, top_p=args.top_p, ignore_eos=True)
    rows = []
    print_row("batch", *COLUMNS, "overhead")
    for batch in args.batch:
        row = measure_steps(engine, batch, args.context, args.steps, params)
        row["detokenize"] = measure_detokenize(batch, args.steps)
        row["overhead"] = 1.0 - row["forward"] / sum(row[phase] for phase in StepPhases._fields)
        rows.append({"batch": batch} | row)
        print_row(batch, *(f"{row[name]:.0f}" for name in COLUMNS), f"{row['overhead']:.1%}")
    return rows


COLUMNS = (*StepPhases._fields, "step", "detokenize")


def print_row(*cells: object) -> None:
    """One line of the table."""
    print("".join(f"{cell:>11}" for cell in cells), flush=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m model.bench", description=__doc__)
    parser.add_argument("what", choices=["steps", "prefix"])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "int8"], default="bf16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=64, help="prompt tokens of each request")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
