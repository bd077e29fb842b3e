"""Scores a model on stories that training never saw: `python -m model.training.evaluate DIRECTORY`.

Three things are measured. Perplexity on held-out documents. Recall: is the answer to "Who has the lantern?" right, by
how many tokens lie between the answer and the sentence that tells it, beside two ways to guess. And form: of stories
sampled through the engine, how many does the generator's own checker accept.
"""

import argparse
import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from model.attention.dense import DenseCausalAttention
from model.checkpoint import WEIGHTS, load_checkpoint
from model.config import Device, EngineConfig
from model.decoder import Decoder
from model.engine.engine import Engine
from model.engine.request import Request
from model.errors import AttendantError, CheckpointError
from model.sampling.params import SamplingParams
from model.training.batches import Collator, token_at
from model.training.card import write_card
from model.training.checker import check, one_of
from model.training.documents import ASSISTANT, BOS, REQUESTS, USER, Author, Document, Form, Question
from model.training.report import SCORES, Bucket, Report, Samples
from model.training.world import KINDS, NAMES, OBJECTS, held_out, with_article

# Distances in tokens from the answer back to its evidence: the lower bound belongs to the bucket, the upper does not.
BUCKETS = ((50, 100), (100, 200), (200, 300), (300, 400), (400, 500))
ROWS = 8  # documents in one forward pass
NAME = re.compile(rf"\b(?:{one_of(NAMES)})\b")


@dataclass
class Sheet:
    """A document with the answers to mark. spans: (first token, last token, the bucket that counts it)."""

    token_ids: list[int]
    spans: list[tuple[int, int, Bucket]] = field(default_factory=list)


class Examiner:
    """One model and the held-out material it is asked about."""

    def __init__(self, directory: Path, device: Device, seed: int) -> None:
        """Raises `CheckpointError` for a directory that cannot be used."""
        file = directory / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(f"{file}: missing")
        self.directory = directory
        self.tokenizer = Tokenizer.from_file(str(file))
        self.engine = Engine.from_checkpoint(directory, EngineConfig(dtype="fp32", device=device, max_num_seqs=32))
        self.decoder: Decoder = load_checkpoint(directory, device=self.engine.device)
        self.seed = seed

    @torch.inference_mode()
    def hidden(self, token_ids: Tensor) -> Tensor:
        """token_ids: [batch, length], on any device -> final hidden states, [batch, length, hidden_size]."""
        rows, length = token_ids.shape
        token_ids = token_ids.to(self.engine.device)
        positions = torch.arange(length, device=token_ids.device).repeat(rows)
        flat: Tensor = self.decoder(token_ids.flatten(), positions, DenseCausalAttention(rows, length))
        return flat.view(rows, length, -1)

    def perplexity(self, num_documents: int = 120) -> float:
        """exp of the mean loss over all tokens of held-out documents, the request's and the questions' included."""
        author, collator = Author(f"perplexity/{self.seed}", "held_out"), Collator(self.tokenizer)
        forms: tuple[Form, ...] = ("brief", "plain", "long")
        total, tokens = 0.0, 0
        for number in range(0, num_documents, ROWS):
            form = forms[number // ROWS % len(forms)]
            batch = collator.collate([author.write(form) for _ in range(ROWS)])
            logits = self.decoder.logits(self.hidden(batch.token_ids)[:, :-1]).cpu()
            losses = F.cross_entropy(logits.flatten(0, 1), batch.token_ids[:, 1:].flatten(), reduction="none")
            real = batch.weights[:, 1:].flatten() > 0
            total += losses[real].sum().item()
            tokens += int(real.sum())
        return math.exp(total / tokens)

    def recall(self, per_bucket: int) -> tuple[list[Bucket], Bucket]:
        """Ask until every bucket of holder questions is full. Returns them, and one bucket for the place questions."""
        author = Author(f"recall/{self.seed}", "held_out")
        forms: tuple[Form, ...] = ("plain", "long", "longest")
        buckets = [Bucket(low, high) for low, high in BUCKETS]
        places = Bucket(BUCKETS[0][0], BUCKETS[-1][1])
        sheets: list[Sheet] = []
        while any(bucket.total < per_bucket for bucket in buckets):
            sheet = self.sheet(author.write(author.rng.choice(forms)), buckets, places, per_bucket)
            if sheet.spans:
                sheets.append(sheet)
        sheets.sort(key=lambda sheet: len(sheet.token_ids))  # so that a batch needs little padding
        for start in range(0, len(sheets), ROWS):
            self.mark(sheets[start : start + ROWS])
        return buckets, places

    def sheet(self, document: Document, buckets: Sequence[Bucket], places: Bucket, per_bucket: int) -> Sheet:
        """Pick the document's questions that a bucket has room for, and count them and what the guesses say."""
        encoding = self.tokenizer.encode(document.text, add_special_tokens=False)
        sheet = Sheet(encoding.ids)
        for question in document.questions:
            first, last, distance = place(document, question, encoding)
            if question.recall.about == "place":
                if places.total < per_bucket and places.low <= distance < places.high:
                    places.total += 1
                    sheet.spans.append((first, last, places))
            elif held_out(question.answer, question.subject):
                for bucket in buckets:
                    if bucket.low <= distance < bucket.high and bucket.total < per_bucket:
                        count(bucket, document, question)
                        sheet.spans.append((first, last, bucket))
        return sheet

    def mark(self, sheets: Sequence[Sheet]) -> None:
        """Count the answers that greedy decoding gets right, word for word.

        One forward pass serves them all: greedy decoding writes an answer exactly when each of its tokens is ranked
        first after the tokens before it.
        """
        length = max(len(sheet.token_ids) for sheet in sheets)
        padded = [sheet.token_ids + [0] * (length - len(sheet.token_ids)) for sheet in sheets]
        for sheet, hidden in zip(sheets, self.hidden(torch.tensor(padded)), strict=True):
            for first, last, bucket in sheet.spans:
                guesses = self.decoder.logits(hidden[first - 1 : last]).argmax(-1).tolist()
                bucket.right += guesses == sheet.token_ids[first : last + 1]

    def sample(self, total: int, temperature: float) -> Samples:
        """Ask the engine for stories about held-out pairs and judge what comes."""
        subjects = list(self.subjects(total))
        stories: list[list[int]] = [[] for _ in subjects]
        for number, (request, _) in enumerate(subjects):
            prompt = self.tokenizer.encode(f"{BOS}{USER}{request}{ASSISTANT}", add_special_tokens=False).ids
            params = SamplingParams(max_tokens=600, temperature=temperature, seed=self.seed * 10_000 + number)
            self.engine.add(Request(str(number), prompt, params))
        while self.engine.has_work:
            for output in self.engine.step():
                stories[int(output.request_id)] += output.token_ids
        flaws: Counter[str] = Counter()
        on_subject = 0
        for (_, wanted), ids in zip(subjects, stories, strict=True):
            text = self.tokenizer.decode(ids)
            verdict = check(text)
            flaws[verdict.reason] += 1
            on_subject += all(re.search(rf"\b{word}\b", text) is not None for word in wanted)
        well_formed = flaws.pop("", 0)
        mean = sum(map(len, stories)) / total
        return Samples(temperature, total, well_formed, on_subject, mean, dict(flaws.most_common()))

    def subjects(self, total: int) -> Iterator[tuple[str, tuple[str, str]]]:
        """Requests for a story, each with the two words that the story has to hold."""
        rng = Author(f"subjects/{self.seed}", "held_out").rng
        for number in range(total):
            kind, name, thing = (rng.choice(pool) for pool in (KINDS, NAMES, OBJECTS))
            while not held_out(name, thing):
                thing = rng.choice(OBJECTS)
            hero, word = (with_article(kind), kind) if number % 2 else (name, name)
            request = REQUESTS[number % len(REQUESTS)].format(size="", subject=f"{hero} and {with_article(thing)}")
            yield request, (word, thing)


def place(document: Document, question: Question, encoding: Encoding) -> tuple[int, int, int]:
    """The first and the last token of the answer's sentence, and how many tokens back its evidence stands."""
    recall, text = question.recall, document.text
    starts = (text.rindex("Now", 0, recall.answer), text.index(".", recall.answer), recall.answer, recall.evidence)
    first, last, answer, evidence = (token_at(encoding, start) for start in starts)
    return first, last, answer - evidence


def count(bucket: Bucket, document: Document, question: Question) -> None:
    """Count one holder question, and what the two guesses would have said."""
    bucket.total += 1
    bucket.last_name += NAME.findall(document.tale)[-1] == question.answer
    for sentence in reversed(re.split(r"(?<=[.!?]) ", document.tale)):
        named = NAME.findall(sentence)
        if named and re.search(rf"\b{question.subject}\b", sentence):
            bucket.last_sentence += named[-1] == question.answer
            break


def evaluate(
    directory: Path,
    *,
    device: Device = "auto",
    seed: int = 1,
    per_bucket: int = 200,
    num_samples: int = 200,
    temperature: float = 0.8,
) -> Report:
    """Score the model of a directory. Raises `CheckpointError` and `ConfigError`."""
    began = time.perf_counter()
    examiner = Examiner(directory, device, seed)
    holders, places = examiner.recall(per_bucket)
    return Report(
        sha256=hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest(),
        seed=seed,
        perplexity=examiner.perplexity(),
        holders=holders,
        places=places,
        samples=examiner.sample(num_samples, temperature),
        seconds=time.perf_counter() - began,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `python -m model.training.evaluate`."""
    parser = argparse.ArgumentParser(prog="attendant evaluate", description="Score a model on held-out stories.")
    embedded = Path(__file__).parents[1] / "checkpoints" / "storyteller"
    parser.add_argument("directory", type=Path, nargs="?", default=embedded, help="default: the embedded model")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=1, help="of the held-out material")
    parser.add_argument("--questions", type=int, default=200, help="for each bucket of distances")
    parser.add_argument("--samples", type=int, default=200, help="stories to sample")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--json", type=Path, help="write the report here too")
    parser.add_argument("--card", action="store_true", help="store the report in the directory and renew its README")
    given = parser.parse_args(arguments)
    try:
        report = evaluate(
            given.directory,
            device=given.device,
            seed=given.seed,
            per_bucket=given.questions,
            num_samples=given.samples,
            temperature=given.temperature,
        )
    except AttendantError as error:
        parser.exit(2, f"{error}\n")
    report.print(Console())
    if given.json:
        report.save(given.json)
    if given.card:
        report.save(given.directory / SCORES)
        write_card(given.directory, report)


if __name__ == "__main__":
    main()
