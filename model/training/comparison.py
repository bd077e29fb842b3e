"""What a comparison of the score functions found: stored as JSON, written as a table, drawn as pictures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import ScoreFunction
from model.errors import ConfigError

if TYPE_CHECKING:  # at run time only the functions that draw need them
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

RESULTS = "comparison.json"
COLORS: dict[ScoreFunction, str] = {
    "scaled_dot_product": "tab:blue",
    "multiplicative": "tab:orange",
    "additive": "tab:green",
}


@dataclass
class Distance:
    """Questions whose answer stands `low` to `high` tokens behind its evidence (`high` itself excluded).

    right: the answer is ranked first; guessed: how many a guess among the characters would get right, on average.
    """

    low: int
    high: int
    total: int = 0
    right: int = 0
    guessed: float = 0.0


@dataclass
class Speed:
    """Tokens a second: in training, and in decoding through the engine, by dtype and batch size."""

    training: float
    decode: dict[str, float]


@dataclass
class Kind:
    """One score function, trained and examined.

    held_out_loss: nats a token on documents that training did not see. curve: (tokens read, training loss, share of
    recalled words right), running means. speed: None until measured.
    """

    attention: ScoreFunction
    parameters: int
    kv_bytes_per_token: int
    held_out_loss: float
    distances: list[Distance]
    curve: list[tuple[int, float, float]]
    speed: Speed | None = None

    @property
    def recall(self) -> float:
        """Share of questions answered right, over all distances."""
        return sum(d.right for d in self.distances) / max(1, sum(d.total for d in self.distances))


@dataclass
class Comparison:
    """All kinds, what they have in common (`setup`), and where and when the speeds were measured."""

    setup: dict[str, Any]
    kinds: list[Kind]
    measured: dict[str, Any] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write comparison.json and comparison.md."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RESULTS).write_text(json.dumps(asdict(self), indent=1) + "\n")
        (directory / "comparison.md").write_text(self.markdown())

    @classmethod
    def load(cls, directory: Path) -> "Comparison":
        """Read what `save` wrote. Raises `ConfigError` where there is nothing."""
        path = directory / RESULTS
        if not path.exists():
            raise ConfigError(f"{path}: missing; run the comparison without --speeds-only first")
        raw = json.loads(path.read_text())
        for kind in raw["kinds"]:
            kind["distances"] = [Distance(**distance) for distance in kind["distances"]]
            kind["curve"] = [tuple(point) for point in kind["curve"]]
            if kind["speed"] is not None:
                kind["speed"] = Speed(**kind["speed"])
        return cls(raw["setup"], [Kind(**kind) for kind in raw["kinds"]], raw["measured"])

    def markdown(self) -> str:
        """Two tables: each kind in numbers, and its recall by distance."""
        lines = [
            "| | " + " | ".join(f"`{kind.attention}`" for kind in self.kinds) + " |",
            "|---|" + "---|" * len(self.kinds),
            self._row("parameters", lambda kind: f"{kind.parameters:,}"),
            self._row("KV bytes a token (fp32)", lambda kind: f"{kind.kv_bytes_per_token:,}"),
            self._row("held-out loss, nats a token", lambda kind: f"{kind.held_out_loss:.3f}"),
            self._row("questions answered right", lambda kind: f"{kind.recall:.1%}"),
        ]
        if all(kind.speed is not None for kind in self.kinds):
            lines.append(self._row("training, tokens/s", lambda kind: f"{kind.speed.training:,.0f}"))
            lines += [
                self._row(f"decode, {name}, tokens/s", lambda kind, name=name: f"{kind.speed.decode[name]:,.0f}")
                for name in self.kinds[0].speed.decode  # type: ignore[union-attr]
            ]
        lines += [
            "",
            "| tokens back | questions | a guess among the cast | "
            + " | ".join(f"`{kind.attention}`" for kind in self.kinds)
            + " |",
            "|---|---|---|" + "---|" * len(self.kinds),
        ]
        for asked in zip(*(kind.distances for kind in self.kinds), strict=True):
            first = asked[0]
            if first.total:
                shares = " | ".join(f"{distance.right / distance.total:.1%}" for distance in asked)
                guess = f"{first.guessed / first.total:.1%}"
                lines.append(f"| {first.low} to {first.high - 1} | {first.total} | {guess} | {shares} |")
        common = ", ".join(f"{name} {value}" for name, value in self.setup.items())
        lines += ["", f"The same for all: {common}."]
        if self.measured:
            where = ", ".join(f"{name} {value}" for name, value in self.measured.items())
            lines += ["", f"Speeds measured on: {where}."]
        return "\n".join(lines) + "\n"

    def _row(self, name: str, cell: Any) -> str:
        return f"| {name} | " + " | ".join(cell(kind) for kind in self.kinds) + " |"


def draw_curves(comparison: Comparison, directory: Path) -> None:
    """comparison.png: loss over tokens read, share of recalled words right, and recall by distance."""
    figure = _figure(11, 3.6)
    loss, learning, recall = figure.subplots(1, 3)
    for kind in comparison.kinds:
        tokens = [point[0] / 1e6 for point in kind.curve]
        style = {"color": COLORS[kind.attention], "label": kind.attention}
        loss.plot(tokens, [point[1] for point in kind.curve], **style)
        learning.plot(tokens, [point[2] for point in kind.curve], **style)
        _by_distance(recall, kind.distances, [d.right for d in kind.distances], marker="o", **style)
    guess = comparison.kinds[0].distances
    _by_distance(recall, guess, [d.guessed for d in guess], color="gray", linestyle=":", label="a guess among the cast")
    loss.set_xlabel("tokens read, millions")
    loss.set_title("training loss (weighted)")
    learning.set_xlabel("tokens read, millions")
    learning.set_title("recalled words right, training")
    recall.set_xlabel("tokens between evidence and answer")
    recall.set_title("questions right, held out")
    for axes in (learning, recall):
        axes.set_ylim(0, 1.02)
    handles, labels = recall.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / "comparison.png", dpi=100)


def _by_distance(axes: "Axes", distances: Sequence[Distance], hits: Sequence[float], **style: Any) -> None:
    """A line through the middle of each bucket that has questions."""
    points = [((d.low + d.high) / 2, hit / d.total) for d, hit in zip(distances, hits, strict=True) if d.total]
    axes.plot([x for x, _ in points], [y for _, y in points], **style)


def draw_weights(weights: "NDArray[Any]", tokens: Sequence[str], attention: ScoreFunction, directory: Path) -> None:
    """weights-KIND.png: each row is a token that looks, each column a token that is looked at.

    weights: [len(tokens), len(tokens)], the softmax weights of one head.
    """
    figure = _figure(7, 6.4)
    axes = figure.subplots()
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    labels = [token.strip() for token in tokens]
    axes.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(tokens)), labels, fontsize=7)
    axes.set_xlabel("looked at")
    axes.set_ylabel("looking")
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / f"weights-{attention}.png", dpi=90)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
