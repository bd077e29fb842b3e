"""How fast our engine prefills and decodes, and which part of the roofline that is.

Every dtype, batch size and context: `--rounds` rounds that take turns, medians. `--context` prompt tokens each, then
`--output` tokens each; EOS is ignored. The engine runs as it is shipped: its own token budget, prefix cache on.
"""

import argparse
import itertools
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from model.bench import report, roofline, shapes
from model.bench.rounds import Answer, Ask
from model.config import CacheDtype, Dtype, EngineConfig, Kernels, ModelConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams

COLUMNS = ("dtype", "batch", "context", "prefill", "of roof", "decode", "of roof", "end to end")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    shapes.add_arguments(parser)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "int8"], nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[64], help="prompt tokens of each request")
    parser.add_argument("--output", type=int, default=64, help="tokens to generate for each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", choices=get_args(Kernels), default="auto", help="what computes a step")
    parser.add_argument("--kv-cache-dtype", choices=get_args(CacheDtype), default="auto")
    for name in ("overlap", "cuda-graphs"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help="as for `serve`")
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print a table of tokens a second, and write it as JSON where asked."""
    report.warn_if_busy()
    directory = shapes.directory_of(args)
    torch.set_num_threads(args.threads)
    machine = roofline.measure_machine()
    roofline.print_machine(machine)
    report.print_row(*COLUMNS)
    rows = [row for dtype in args.dtype for row in measure_dtype(directory, dtype, machine, args)]
    print_kept(rows)
    report.write(args, {"roofline": asdict(machine), "rows": rows})


def measure_dtype(
    directory: Path, dtype: Dtype, machine: roofline.Machine, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one dtype, printed as well. Its engine is gone when this returns: two need not fit the memory."""
    asks = [Ask(batch, context, args.output, 0) for batch, context in itertools.product(args.batch, args.context)]
    engine = load(directory, dtype, args, asks)
    answers = measure(engine, asks, args.rounds)
    rows = []
    for ask in asks:
        row = summarize(engine.model_config, machine, dtype, ask, answers[ask], args.kv_cache_dtype)
        rows.append(row | {"rounds": [asdict(answer) for answer in answers[ask]]})
        report.print_row(
            dtype,
            ask.batch,
            ask.prompt_tokens,
            f"{row['prefill']:.0f}",
            f"{row['prefill_of_roofline']:.0%}",
            f"{row['decode']:.0f}",
            f"{row['decode_of_roofline']:.0%}",
            f"{row['end_to_end']:.0f}",
        )
    return rows


def print_kept(rows: list[dict[str, Any]]) -> None:
    """How much of its decode rate a batch keeps at longer contexts: one line for each dtype and batch size."""
    for (dtype, batch), group in itertools.groupby(rows, key=lambda row: (row["dtype"], row["batch"])):
        shortest, *longer = sorted(group, key=lambda row: row["context"])
        for row in longer:
            kept = row["decode"] / shortest["decode"]
            print(
                f"{dtype}, batch {batch}: decode at context {row['context']} keeps {kept:.0%} of its rate "
                f"at {shortest['context']}"
            )


def load(directory: Path, dtype: Dtype, args: argparse.Namespace, asks: list[Ask]) -> Engine:
    """The engine as it is shipped, with a cache that holds the largest of these rounds."""
    longest = max(ask.prompt_tokens + ask.output_tokens for ask in asks)
    block_size = EngineConfig.block_size
    cache = max(ask.batch * (ask.prompt_tokens + ask.output_tokens + block_size) for ask in asks)
    config = EngineConfig(
        dtype=dtype,
        max_model_len=longest,
        kv_cache_tokens=cache,
        max_num_seqs=max(EngineConfig.max_num_seqs, *(ask.batch for ask in asks)),
        num_threads=args.threads,
        kernels=args.kernels,
        kv_cache_dtype=args.kv_cache_dtype,
        overlap=args.overlap,
        cuda_graphs=args.cuda_graphs,
    )
    return Engine.from_checkpoint(directory, config)


def measure(engine: Engine, asks: list[Ask], rounds: int) -> dict[Ask, list[Answer]]:
    """`rounds` answers to each, taking turns, after one short round of each that does not count."""
    answers: dict[Ask, list[Answer]] = {ask: [] for ask in asks}
    for ask in asks:
        measure_round(engine, Ask(ask.batch, 8, 2, 0))
    for seed in range(1, rounds + 1):
        for ask in asks:
            answers[ask].append(measure_round(engine, Ask(ask.batch, ask.prompt_tokens, ask.output_tokens, seed)))
    return answers


def measure_round(engine: Engine, ask: Ask) -> Answer:
    """Run one round to its end, greedily."""
    params = SamplingParams(max_tokens=ask.output_tokens, temperature=0.0, ignore_eos=True)
    prompts = ask.prompts(engine.model_config.vocab_size)
    arrivals: dict[str, list[float]] = {str(index): [] for index in range(ask.batch)}
    started = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), prompt, params))
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            arrivals[output.request_id] += [now] * len(output.token_ids)
    return Answer.of(started, list(arrivals.values()))


def summarize(
    model: ModelConfig,
    machine: roofline.Machine,
    dtype: str,
    ask: Ask,
    answers: list[Answer],
    cache: CacheDtype = "auto",
) -> dict[str, Any]:
    """Medians in tokens a second, and the part of the roofline that they are."""
    decode = statistics.median(answer.decode_rate() for answer in answers)
    prefill = statistics.median(answer.prefill_rate(ask) for answer in answers)
    context = ask.prompt_tokens + ask.output_tokens // 2  # half-way through the round
    ceiling = roofline.decode_ceiling(model, machine, dtype, ask.batch, context, cache)
    return {
        "dtype": dtype,
        "kv_cache_dtype": cache,
        "batch": ask.batch,
        "context": ask.prompt_tokens,
        "prefill": prefill,
        "prefill_of_roofline": prefill / roofline.prefill_ceiling(model, machine, dtype, ask.batch, ask.prompt_tokens),
        "decode": decode,
        "decode_of_roofline": decode / ceiling,
        "end_to_end": statistics.median(answer.rate(ask) for answer in answers),
    }
