"""The scores of a model: what they are, how they print, how they are stored."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

SCORES = "scores.json"


@dataclass
class Bucket:
    """Questions whose answer stands `low` to `high` tokens behind its evidence.

    right: the whole answer, decoded greedily, is right. The rest counts two guesses that need no lookup: the last name
    of the story, and the last name of the last sentence with the object and a name in it.
    """

    low: int
    high: int
    total: int = 0
    right: int = 0
    last_name: int = 0
    last_sentence: int = 0


@dataclass
class Samples:
    """Stories drawn at `temperature`, judged by the checker. on_subject: of what they were asked for.

    flaws: what was wrong with the others, most frequent first.
    """

    temperature: float
    total: int
    well_formed: int
    on_subject: int
    mean_tokens: float
    flaws: dict[str, int]


@dataclass
class Report:
    """Every score of one model. sha256: of its weights file; seed: of the held-out material."""

    sha256: str
    seed: int
    perplexity: float
    holders: list[Bucket]
    places: Bucket
    samples: Samples
    seconds: float

    @property
    def holder_accuracy(self) -> float:
        """Share of "who has the ..." questions answered right, over all distances."""
        return sum(bucket.right for bucket in self.holders) / max(1, sum(bucket.total for bucket in self.holders))

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read what `save` wrote."""
        raw = json.loads(path.read_text())
        raw["holders"] = [Bucket(**bucket) for bucket in raw["holders"]]
        raw["places"] = Bucket(**raw["places"])
        raw["samples"] = Samples(**raw["samples"])
        return cls(**raw)

    def print(self, console: Console) -> None:
        """Show the report as tables."""
        table = Table(title="Who has it? Held-out pairs of owner and object", title_justify="left")
        for heading in ("tokens back", "questions", "right", "last name", "last name with object"):
            table.add_column(heading, justify="right")
        for bucket in self.holders:
            table.add_row(*row(bucket))
        console.print(table)
        samples = self.samples
        console.print(f"who has it, all distances   {self.holder_accuracy:.1%}   (target 90 %)")
        console.print(f"where is she                {self.places.right / max(1, self.places.total):.1%}", end="   ")
        console.print(f"({self.places.total} questions, {self.places.low} to {self.places.high} tokens back)")
        console.print(f"well-formed stories         {samples.well_formed / samples.total:.1%}   (target 95 %)", end=" ")
        console.print(f"of {samples.total} at temperature {samples.temperature}, {samples.mean_tokens:.0f} tokens each")
        console.print(f"about what was asked        {samples.on_subject / samples.total:.1%}")
        for flaw, times in list(samples.flaws.items())[:5]:
            console.print(f"    {times} x {flaw}", style="dim", markup=False)
        console.print(f"perplexity a token          {self.perplexity:.3f}")
        console.print(f"weights sha256 {self.sha256}, measured in {self.seconds:.0f} s", style="dim")


def row(bucket: Bucket) -> tuple[str, ...]:
    """The cells of a bucket's line."""
    shares = (f"{hits / max(1, bucket.total):.1%}" for hits in (bucket.right, bucket.last_name, bucket.last_sentence))
    return f"{bucket.low} to {bucket.high}", str(bucket.total), *shares
