"""What is asked: conversations made from a seed and an index, so that any worker makes the same one.

A workload is a few lines of data in `workloads.toml`. The load test knows no tokenizer: it writes common words and lets
the server say how many tokens they are, once, before the test. The lengths reported are always the server's own.
"""

import dataclasses
import math
import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SHIPPED = Path(__file__).parent / "workloads.toml"

HEROES = tuple("fox bear rabbit girl boy king farmer sailor".split())
THINGS = tuple("lantern key map ring book drum kite bell".split())
# Short common words: about a token each for most tokenizers.
WORDS = tuple(
    """the a and of to in was he she it had his her with for on that they said then one little big old red blue happy
    sad found took gave went came saw liked wanted day house tree garden river friend mother father""".split()
)

SAMPLING = {"temperature": 0.8}


class WorkloadError(ValueError):
    """A workload that cannot be. Its text says where and why."""


@dataclass(frozen=True)
class Length:
    """A number of tokens, or seconds: fixed where sigma is 0, else log-normal."""

    median: float
    sigma: float = 0.0
    longest: float = math.inf

    def draw(self, generator: random.Random) -> float:
        """One value, never above the longest."""
        return min(self.median * math.exp(self.sigma * generator.gauss(0, 1)), self.longest)


@dataclass(frozen=True)
class Prefix:
    """Beginnings that conversations share: `count` different ones of `tokens` tokens."""

    count: int
    tokens: int


@dataclass(frozen=True)
class Workload:
    """One kind of conversation; the fields are those of `workloads.toml`."""

    name: str
    output: Length
    input: Length = Length(0)
    prompt: str = ""
    prefix: Prefix | None = None
    turns: int = 1
    think: Length = Length(0)
    endpoint: Literal["completions", "chat"] = "completions"
    body: Mapping[str, Any] = field(default_factory=dict)
    cancel_after: int | None = None
    read_seconds: float = 0.0
    json: bool = False


@dataclass(frozen=True)
class Turn:
    """What a user says, how many tokens the answer may have, and how long the user thinks before saying it."""

    text: str
    max_tokens: int
    think_seconds: float


@dataclass(frozen=True)
class Conversation:
    """A workload with its words drawn. index: of its arrival."""

    index: int
    workload: Workload
    turns: tuple[Turn, ...]

    @property
    def path(self) -> str:
        """Where it is sent."""
        return "/v1/chat/completions" if self.workload.endpoint == "chat" else "/v1/completions"

    def request(self, turn: int, answers: list[str]) -> dict[str, Any]:
        """The body of a turn, after the server's answers to the turns before; without the model's name."""
        words = [each.text for each in self.turns[: turn + 1]]
        body = {
            **SAMPLING,
            **self.workload.body,
            "max_tokens": self.turns[turn].max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.workload.endpoint == "completions":
            said = [text for pair in zip(words, answers, strict=False) for text in pair]
            return {"prompt": " ".join([*said, words[-1]]), **body}
        messages = [{"role": "user", "content": words[0]}]
        for answer, text in zip(answers, words[1:], strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
        return {"messages": messages, **body}


class Workloads:
    """Makes the conversations of a test.

    tokens_per_word: what the server counts for one of our words. max_tokens: instead of every workload's own lengths.
    """

    def __init__(self, name: str, *, seed: int, tokens_per_word: float = 1.0, max_tokens: int | None = None) -> None:
        file, _, entry = name.rpartition(":")
        self._choices = load(Path(file) if file else SHIPPED, entry)
        self._seed = seed
        self._tokens_per_word = tokens_per_word
        self._max_tokens = max_tokens

    def conversation(
        self, index: int, *, input_tokens: int | None = None, output_tokens: int | None = None
    ) -> Conversation:
        """The conversation of arrival number `index`; the lengths of a trace stand before those of the workload."""
        generator = random.Random(f"{self._seed}/{index}")
        workloads, weights = zip(*self._choices, strict=True)
        workload: Workload = generator.choices(workloads, weights)[0]
        if input_tokens is not None:
            workload = dataclasses.replace(workload, prompt="", input=Length(input_tokens))
        if output_tokens is not None:
            workload = dataclasses.replace(workload, output=Length(output_tokens))
        turns = tuple(self._turn(workload, number, generator) for number in range(workload.turns))
        return Conversation(index, workload, turns)

    def _turn(self, workload: Workload, number: int, generator: random.Random) -> Turn:
        first = number == 0
        text = workload.prompt.format(hero=generator.choice(HEROES), thing=generator.choice(THINGS))
        if not text:
            text = self._words(workload.input.draw(generator), generator)
        if first and workload.prefix is not None:
            which = generator.randrange(workload.prefix.count)
            shared = random.Random(f"{self._seed}/prefix/{workload.name}/{which}")
            text = f"{self._words(workload.prefix.tokens, shared)} {text}"
        return Turn(
            text=text,
            max_tokens=self._max_tokens or max(round(workload.output.draw(generator)), 1),
            think_seconds=0.0 if first else workload.think.draw(generator),
        )

    def _words(self, tokens: float, generator: random.Random) -> str:
        return " ".join(generator.choices(WORDS, k=max(round(tokens / self._tokens_per_word), 1)))


def load(file: Path, name: str) -> list[tuple[Workload, float]]:
    """A workload of a file as its kinds, each with its weight. Raises `WorkloadError`."""
    tables = tomllib.loads(file.read_text())
    if name not in tables:
        raise WorkloadError(f"{file.name} has no workload {name!r}: {', '.join(tables)}")
    if "mix" not in tables[name]:
        return [(_workload(name, tables[name]), 1.0)]
    mix = tables[name]["mix"]
    if unknown := mix.keys() - tables.keys():
        raise WorkloadError(f"{name} mixes {', '.join(sorted(unknown))}, of which {file.name} says nothing")
    return [(_workload(kind, tables[kind]), float(weight)) for kind, weight in mix.items()]


def _workload(name: str, table: Mapping[str, Any]) -> Workload:
    known = {known.name for known in dataclasses.fields(Workload)} - {"name"}
    if unknown := table.keys() - known:
        raise WorkloadError(f"{name} has {', '.join(sorted(unknown))}: a workload takes {', '.join(sorted(known))}")
    if "output" not in table or ("input" in table) == ("prompt" in table):
        raise WorkloadError(f"{name} needs output, and either input or prompt")
    values = dict(table)
    try:
        for key in ("input", "output", "think"):
            if key in values:
                values[key] = Length(**values[key]) if isinstance(values[key], dict) else Length(values[key])
        if "prefix" in values:
            values["prefix"] = Prefix(**values["prefix"])
    except TypeError as error:
        raise WorkloadError(f"{name}: {error}") from None
    return Workload(name=name, **values)
