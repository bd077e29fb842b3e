"""Trains a small decoder of each score function on the stories and compares them: `attendant compare-attention`.

Everything but `ModelConfig.attention` is the same for all: the seed, the documents and their order, the number of
steps, the first value of every weight that they share, and the guidance (`model.training.guidance`), which says where
the evidence stands but not how a score should find it. Keys do not start as copies of queries, as the embedded model's
do: that favours dot products, and no start does as much for an additive score.

The model is as small as a lookup allows: in the first layer an object reads its owner, in the second the word before an
answer reads the object.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from model.attention.dense import DenseCausalAttention
from model.attention.reference import causal_weights
from model.attention.scores import Scores
from model.bench.report import machine
from model.bench.steps import measure_steps
from model.cache.pool import bytes_per_token
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import Dtype, EngineConfig, ModelConfig, ScoreFunction
from model.decoder import Decoder
from model.engine.engine import Engine
from model.engine.forward import NativeForward
from model.errors import ConfigError
from model.sampling.params import SamplingParams
from model.training.batches import Collator, token_at
from model.training.comparison import Comparison, Distance, Kind, Speed, draw_curves, draw_weights
from model.training.curriculum import Stage
from model.training.curve import running_mean
from model.training.documents import BOS, EOS, Author, Document, Form
from model.training.guidance import BINDING, HOLDER_RECALL, PLACE_RECALL, Head, favour_copying
from model.training.pretrain import STATE, TrainConfig, Trainer, train
from model.training.vocabulary import train_tokenizer
from model.training.world import held_out

KINDS: tuple[ScoreFunction, ...] = get_args(ScoreFunction)
LOOKUP: Head = (1, 0)
GUIDED = {BINDING: (0, 0), HOLDER_RECALL: LOOKUP, PLACE_RECALL: (1, 1)}
# One stage without a gate: with a gate, a kind that learns sooner would read other documents.
STORIES = (Stage({"drill": 0.7, "brief": 0.3}, gate=2.0),)
FORMS: tuple[Form, ...] = ("drill", "brief")
BUCKETS = ((1, 32), (32, 64), (64, 96), (96, 128), (128, 192), (192, 256))
ROWS = 8  # documents in one forward pass
POINTS = 200  # of a curve
# A story to look at, and in it the word that an answer is looked up from.
SHOWN = (
    f"{BOS}Listen. Rufus found a lantern. Tom made a kite. So Rufus gave Mia the lantern. Mia went to the mill. "
    "Question: Who has the lantern? Answer: Now"
)
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16")  # of decoding: the second is what the native kernels compute
BATCHES = (1, 16)
CONTEXT = 128


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """One comparison. The same for each kind.

    documents: held-out ones to examine it on. rounds: how often the kinds take turns while speeds are measured; each
    round times `steps_per_round` steps.
    """

    out: Path
    steps: int = 2400
    tokens_per_batch: int = 1024
    documents: int = 800
    rounds: int = 5
    steps_per_round: int = 8
    hidden_size: int = 128
    head_dim: int = 32
    seed: int = 0
    threads: int = 0
    resume: bool = False

    def shape(self, attention: ScoreFunction, tokenizer: Tokenizer) -> ModelConfig:
        """The decoder of one kind."""
        vocabulary = tokenizer.get_vocab()
        return ModelConfig(
            vocab_size=len(vocabulary),
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=self.head_dim,
            max_position_embeddings=512,
            attention=attention,
            tie_word_embeddings=True,
            bos_token_id=vocabulary[BOS],
            eos_token_ids=(vocabulary[EOS],),
        )

    def training(self, attention: ScoreFunction, tokenizer: Tokenizer) -> TrainConfig:
        """The run of one kind."""
        out = self.out / attention
        return TrainConfig(
            out=out,
            steps=self.steps,
            tokens_per_batch=self.tokens_per_batch,
            warm_up=min(100, 1 + self.steps // 8),
            hold=self.steps * 6 // 10,
            seed=self.seed,
            device="cpu",
            threads=self.threads,
            save_every=50,
            resume=self.resume and (out / STATE).exists(),
            model=self.shape(attention, tokenizer),
            curriculum=STORIES,
            guided=GUIDED,
            start=start_alike,
        )


def start_alike(decoder: Decoder, generator: torch.Generator) -> None:
    """Give a fresh decoder a start that copies, from the same numbers whatever its score function draws."""
    plain = Decoder(replace(decoder.config, attention="scaled_dot_product"))
    favour_copying(plain, generator)
    favour_copying(decoder, generator)
    decoder.load_state_dict(plain.state_dict(), strict=False)


@dataclass
class Sheet:
    """A held-out document with the questions to mark. answers: (position of the answer's token, its distance)."""

    token_ids: list[int]
    answers: list[tuple[int, Distance]] = field(default_factory=list)


class Watching(DenseCausalAttention):
    """Dense causal attention that keeps one head's softmax weights, as the oracle computes them.

    weights: [length, length] after the forward pass.
    """

    def __init__(self, length: int, head: Head) -> None:
        super().__init__(1, length)
        self.head = head
        self.weights = torch.empty(0)

    def __call__(self, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `DenseCausalAttention`."""
        layer, head = self.head
        if scores.layer == layer:
            self.weights = causal_weights(scores, q, k)[head]
        return super().__call__(scores, q, k, v)


def compare(config: CompareConfig, tokenizer: Tokenizer, console: Console) -> Comparison:
    """Train (or go on with) every kind, examine it, measure its speed, and write everything into `config.out`."""
    kinds = []
    for attention in KINDS:
        console.print(f"[bold]{attention}[/bold]")
        directory = train(config.training(attention, tokenizer), console, tokenizer)
        kinds.append(examine(config, attention, directory, tokenizer))
    comparison = Comparison(setup(config, tokenizer), kinds)
    draw_curves(comparison, config.out)
    comparison.save(config.out)  # before the speeds: they can be measured again alone
    time_all(comparison, config, tokenizer)
    comparison.save(config.out)
    return comparison


def setup(config: CompareConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """What all kinds have in common, for the report."""
    shape = asdict(config.shape("scaled_dot_product", tokenizer))
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    names = ("steps", "tokens_per_batch", "documents", "seed")
    run = {name: value for name, value in asdict(config).items() if name in names}
    return run | {name: shape[name] for name in sizes} | {"forms": STORIES[0].forms, "torch": torch.__version__}


def examine(config: CompareConfig, attention: ScoreFunction, directory: Path, tokenizer: Tokenizer) -> Kind:
    """What a trained model knows, and a picture of where it looks."""
    decoder = load_checkpoint(directory)
    watching = watch(decoder, tokenizer)
    tokens = [tokenizer.decode([i], skip_special_tokens=False) for i in shown_ids(tokenizer)]
    draw_weights(watching.weights.numpy(), tokens, attention, config.out)
    author = Author(f"compare/{config.seed}", "held_out")
    documents = [author.write(FORMS[number % len(FORMS)]) for number in range(config.documents)]
    return Kind(
        attention=attention,
        parameters=sum(parameter.numel() for parameter in decoder.parameters()),
        kv_bytes_per_token=bytes_per_token(decoder.config, torch.float32),
        held_out_loss=held_out_loss(decoder, tokenizer, documents),
        distances=recall_by_distance(decoder, tokenizer, documents),
        curve=curve_of(directory / "loss.csv"),
    )


def curve_of(path: Path) -> list[tuple[int, float, float]]:
    """(tokens read, loss, recall), as running means, at `POINTS` steps of a run at most."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    losses, recalls = (running_mean([float(row[name]) for row in rows]) for name in ("loss", "recall"))
    points = [
        (int(row["tokens"]), round(loss, 4), round(recall, 4))
        for row, loss, recall in zip(rows, losses, recalls, strict=True)
    ]
    return points[:: -(-len(points) // POINTS)]


def shown_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens of the story to look at."""
    ids: list[int] = tokenizer.encode(SHOWN, add_special_tokens=False).ids
    return ids


@torch.inference_mode()
def watch(decoder: Decoder, tokenizer: Tokenizer) -> Watching:
    """Read the story to look at, and keep the weights of the head that looks answers up."""
    token_ids = torch.tensor(shown_ids(tokenizer))
    watching = Watching(len(token_ids), LOOKUP)
    decoder(token_ids, torch.arange(len(token_ids)), watching)
    return watching


@torch.inference_mode()
def logits_of(decoder: Decoder, token_ids: Tensor) -> Tensor:
    """token_ids: [batch, length] -> [batch, length, vocab_size]."""
    rows, length = token_ids.shape
    positions = torch.arange(length).repeat(rows)
    hidden = decoder(token_ids.flatten(), positions, DenseCausalAttention(rows, length))
    return decoder.logits(hidden).view(rows, length, -1)


def held_out_loss(decoder: Decoder, tokenizer: Tokenizer, documents: Sequence[Document]) -> float:
    """Nats a token over whole documents, each token counted alike."""
    collator = Collator(tokenizer)
    total, tokens = 0.0, 0
    for start in range(0, len(documents), ROWS):
        batch = collator.collate(documents[start : start + ROWS])
        logits = logits_of(decoder, batch.token_ids)[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), batch.token_ids[:, 1:].flatten(), reduction="none")
        real = batch.weights[:, 1:].flatten() > 0
        total += losses[real].sum().item()
        tokens += int(real.sum())
    return total / tokens


def recall_by_distance(decoder: Decoder, tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Distance]:
    """Ask who has what, and count the right answers by how many tokens lie between evidence and answer."""
    distances = [Distance(low, high) for low, high in BUCKETS]
    sheets = [sheet for document in documents if (sheet := sheet_of(document, tokenizer, distances)).answers]
    sheets.sort(key=lambda sheet: len(sheet.token_ids))  # so that a batch needs little padding
    for start in range(0, len(sheets), ROWS):
        batch = sheets[start : start + ROWS]
        length = max(len(sheet.token_ids) for sheet in batch)
        padded = torch.tensor([sheet.token_ids + [0] * (length - len(sheet.token_ids)) for sheet in batch])
        for sheet, logits in zip(batch, logits_of(decoder, padded), strict=True):
            for position, distance in sheet.answers:
                distance.right += int(logits[position - 1].argmax()) == sheet.token_ids[position]
    return distances


def sheet_of(document: Document, tokenizer: Tokenizer, distances: Sequence[Distance]) -> Sheet:
    """Count the document's questions about owners that no training document has, each at its distance."""
    encoding = tokenizer.encode(document.text, add_special_tokens=False)
    sheet = Sheet(encoding.ids)
    for question in document.questions:
        if question.recall.about == "holder" and held_out(question.answer, question.subject):
            answer, evidence = (token_at(encoding, at) for at in (question.recall.answer, question.recall.evidence))
            for distance in distances:
                if distance.low <= answer - evidence < distance.high:
                    distance.total += 1
                    distance.guessed += 1 / len(document.story.cast)
                    sheet.answers.append((answer, distance))
    return sheet


def time_all(comparison: Comparison, config: CompareConfig, tokenizer: Tokenizer) -> None:
    """Measure the speed of every kind, in turns, on fresh weights: what they hold does not matter to it."""
    if config.threads:
        torch.set_num_threads(config.threads)
    threads = torch.get_num_threads()
    comparison.measured = machine() | {"date": date.today().isoformat(), "context": CONTEXT, "rounds": config.rounds}
    shapes = {kind: config.shape(kind, tokenizer) for kind in KINDS}
    trainers = {kind: Trainer(replace(config.training(kind, tokenizer), resume=False), tokenizer) for kind in KINDS}
    engines = {(kind, dtype): engine_of(shapes[kind], config, dtype) for kind in KINDS for dtype in DTYPES}
    native = {name: isinstance(engine.runner.compute, NativeForward) for name, engine in engines.items()}
    comparison.measured["native kernels"] = [" ".join(name) for name, is_native in native.items() if is_native]
    trained: dict[str, list[float]] = {kind: [] for kind in KINDS}
    decoded: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for number in range(config.rounds + 1):
        for kind, trainer in trainers.items():
            torch.set_num_threads(threads)
            trained[kind] += training_speeds(trainer, config.steps_per_round)
        for (kind, dtype), engine in engines.items():
            # The native kernels have threads of their own, and torch's would spin beside them.
            torch.set_num_threads(1 if native[kind, dtype] else threads)
            for batch in BATCHES:
                speed = decoding_speed(engine, batch, config.steps_per_round)
                decoded[kind].setdefault(f"{dtype}, batch {batch}", []).append(speed)
        if number == 0:  # the first round warms up
            trained, decoded = {kind: [] for kind in KINDS}, {kind: {} for kind in KINDS}
    torch.set_num_threads(threads)
    for outcome in comparison.kinds:
        decode = {name: statistics.median(speeds) for name, speeds in decoded[outcome.attention].items()}
        outcome.speed = Speed(training=statistics.median(trained[outcome.attention]), decode=decode)


def training_speeds(trainer: Trainer, steps: int) -> list[float]:
    """Tokens a second of each of some steps, the writing of the documents included."""
    speeds = []
    for _ in range(steps):
        before, started = trainer.progress.tokens, time.perf_counter()
        trainer.step()
        speeds.append((trainer.progress.tokens - before) / (time.perf_counter() - started))
    return speeds


def decoding_speed(engine: Engine, batch: int, steps: int) -> float:
    """Tokens a second of some steps in which `batch` requests decode together."""
    params = SamplingParams(max_tokens=steps + 8, temperature=0.0, ignore_eos=True)
    return 1e6 * batch / measure_steps(engine, batch, CONTEXT, steps, params)["step"]


def engine_of(shape: ModelConfig, config: CompareConfig, dtype: Dtype) -> Engine:
    """An engine as it is served: from a checkpoint, scores folded, keys and values cached."""
    decoder = Decoder(shape)
    start_alike(decoder, torch.Generator().manual_seed(config.seed))
    tokens = max(BATCHES) * (CONTEXT + config.steps_per_round + 32)
    engine_config = EngineConfig(
        dtype=dtype, device="cpu", kv_cache_tokens=tokens, prefix_cache=False, num_threads=config.threads or None
    )
    with TemporaryDirectory() as directory:
        save_checkpoint(decoder, Path(directory))
        return Engine.from_checkpoint(Path(directory), engine_config)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `attendant compare-attention`."""
    parser = argparse.ArgumentParser(prog="attendant compare-attention", description="Compare the score functions.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/attention"), help="where tables and pictures are written"
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the training: a first look")
    parser.add_argument("--steps", type=int, help="length of each kind's training, instead of 2400, or 600 if quick")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in OUT")
    parser.add_argument("--speeds-only", action="store_true", help="measure the speeds in OUT/comparison.json again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")
    given = parser.parse_args(arguments)
    config = CompareConfig(out=given.out, seed=given.seed, threads=given.threads, resume=given.resume)
    if given.quick:
        config = replace(config, steps=600, documents=200, rounds=3)
    if given.steps:
        config = replace(config, steps=given.steps)
    console = Console()
    try:
        if find_spec("matplotlib") is None:  # now, and not after the training
            raise ConfigError("the comparison draws with matplotlib: pip install -r deploy/lock/train.txt")
        comparison = Comparison.load(config.out) if given.speeds_only else None
        tokenizer = train_tokenizer(config.seed)
        if comparison is None:
            comparison = compare(config, tokenizer, console)
        else:
            time_all(comparison, config, tokenizer)
            comparison.save(config.out)
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    console.print(comparison.markdown(), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
