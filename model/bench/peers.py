"""Our engine and others on the same weights and cores, taking turns in one run, so that the ratios hold on any machine.

Decode: 64 random prompt tokens and 64 generated ones for each request, EOS ignored. Prefill: prompts of 512 tokens, one
token generated. A round asks every engine once, in an order that turns around each time; one that is not installed
(`make peers`) is named as such.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.bench import contenders, ratios, report, roofline, shapes
from model.bench.contenders import CONTENDERS, Contender, Worker, WorkerError
from model.bench.rounds import Answer, Ask
from model.checkpoint import inspect_checkpoint
from model.config import ModelConfig

WARM_UP = {"prompt_tokens": 8, "output_tokens": 2}
Rounds = Mapping[Ask, Mapping[str, list[Answer | None]]]  # None: that round failed


@dataclass(frozen=True)
class Measure:
    """What one table shows. ceiling: (model, machine, dtype, ask) -> the roofline of it."""

    title: str
    asks: tuple[Ask, ...]
    rate: Callable[[Answer, Ask], float]
    ceiling: Callable[[ModelConfig, roofline.Machine, str, Ask], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    shapes.add_arguments(parser)
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--only", choices=names, nargs="+", default=names, metavar="ENGINE", help=", ".join(names))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill-rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"), help="what `make peers` built")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to this file too")
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Print the tables, and write them where asked."""
    report.warn_if_busy()
    torch.set_num_threads(args.threads)
    directory = shapes.directory_of(args)
    model = inspect_checkpoint(directory).config
    generate = tuple(Ask(batch, 64, 64, 0) for batch in args.batch)
    prefill = tuple(Ask(batch, 512, 1, 0) for batch in args.batch)
    asked = [contender for contender in CONTENDERS if contender.name in args.only]
    workers, absent = start_all(asked, directory, args)
    try:
        machine = roofline.measure_machine()
        rounds = play(workers, dict.fromkeys(generate, args.rounds) | dict.fromkeys(prefill, args.prefill_rounds))
        machine = machine.or_better(roofline.measure_machine())
    finally:
        for worker in workers:
            worker.close()
    tables = "\n\n".join(
        show(measure, rounds, model, machine, asked, absent) for measure in measures(generate, prefill)
    )
    roofline.print_machine(machine)
    print(tables)
    if args.markdown:
        args.markdown.write_text(tables + "\n")
    versions = {worker.contender.name: worker.version for worker in workers}
    kept = [{"ask": asdict(ask)} | {"answers": _plain(answers)} for ask, answers in rounds.items()]
    report.write(args, {"roofline": asdict(machine), "versions": versions, "absent": absent, "rounds": kept})


def measures(generate: tuple[Ask, ...], prefill: tuple[Ask, ...]) -> tuple[Measure, ...]:
    """The three tables."""
    return (
        Measure("decode, tokens/s", generate, lambda answer, _: answer.decode_rate(), _decode_ceiling),
        Measure("end to end, tokens/s", generate, lambda answer, ask: answer.rate(ask), _end_to_end_ceiling),
        Measure("prefill, prompt tokens/s", prefill, lambda answer, ask: answer.prefill_rate(ask), _prefill_ceiling),
    )


def start_all(asked: list[Contender], directory: Path, args: argparse.Namespace) -> tuple[list[Worker], dict[str, str]]:
    """The workers that run, one after another started and stopped; and contender -> why, for those that do not."""
    workers, absent = [], {}
    for contender in asked:
        try:
            worker = contenders.start(contender, directory, work=args.work, peers=args.peers, threads=args.threads)
        except WorkerError as error:
            absent[contender.name] = str(error)
            print(f"{contender.name}: {error}", flush=True)
        else:
            workers.append(worker)
            print(f"{contender.name}: {worker.version}", flush=True)
    return workers, absent


def play(workers: list[Worker], asks: Mapping[Ask, int]) -> Rounds:
    """So many rounds of each, after a short one that does not count. A failed round is told and leaves a None."""
    played: dict[Ask, dict[str, list[Answer | None]]] = {}
    for ask, rounds in asks.items():
        answers: dict[str, list[Answer | None]] = {worker.contender.name: [] for worker in workers}
        for worker in workers:
            _try(worker, replace(ask, **WARM_UP))
        for seed in range(1, rounds + 1):
            for worker in workers if seed % 2 else reversed(workers):
                answers[worker.contender.name].append(_try(worker, replace(ask, seed=seed)))
        played[ask] = answers
        print(f"batch {ask.batch}, {ask.prompt_tokens} in, {ask.output_tokens} out: {rounds} rounds", flush=True)
    return played


def show(
    measure: Measure,
    rounds: Rounds,
    model: ModelConfig,
    machine: roofline.Machine,
    asked: list[Contender],
    absent: Mapping[str, str],
) -> str:
    """The table of one measure."""
    columns, ceilings = {}, {}
    for ask in measure.asks:
        heading = f"batch {ask.batch}"
        columns[heading] = {
            name: [math.nan if answer is None else measure.rate(answer, ask) for answer in answers]
            for name, answers in rounds[ask].items()
        }
        ceilings[heading] = {dtype: measure.ceiling(model, machine, dtype, ask) for dtype in machine.rates}
    return ratios.table(measure.title, columns, ceilings, asked, absent)


def _try(worker: Worker, ask: Ask) -> Answer | None:
    try:
        return worker.ask(ask)
    except WorkerError as error:
        print(f"{worker.contender.name}, batch {ask.batch}: {error}", flush=True)
        return None


def _plain(answers: Mapping[str, list[Answer | None]]) -> dict[str, Any]:
    return {name: [answer and asdict(answer) for answer in seen] for name, seen in answers.items()}


def _decode_ceiling(model: ModelConfig, machine: roofline.Machine, dtype: str, ask: Ask) -> float:
    context = ask.prompt_tokens + ask.output_tokens // 2  # half-way through the round
    return roofline.decode_ceiling(model, machine, dtype, ask.batch, context)


def _prefill_ceiling(model: ModelConfig, machine: roofline.Machine, dtype: str, ask: Ask) -> float:
    return roofline.prefill_ceiling(model, machine, dtype, ask.batch, ask.prompt_tokens)


def _end_to_end_ceiling(model: ModelConfig, machine: roofline.Machine, dtype: str, ask: Ask) -> float:
    prefill = ask.batch * ask.prompt_tokens / _prefill_ceiling(model, machine, dtype, ask)
    decode = ask.batch * (ask.output_tokens - 1) / _decode_ceiling(model, machine, dtype, ask)
    return ask.batch * ask.output_tokens / (prefill + decode)
