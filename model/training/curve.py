"""The loss curve of a run: every step as CSV, and a picture of it."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """What one step showed. seconds: of training, pauses between runs aside; recall: share of recalled words right."""

    step: int
    stage: int
    tokens: int
    seconds: float
    rate: float
    loss: float
    guidance: float
    recall: float


def write_curve(history: Sequence[Point], directory: Path) -> None:
    """Write loss.csv, one line for every step, and loss.png."""
    with (directory / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)], lineterminator="\n")
        writer.writeheader()
        for point in history:
            writer.writerow(
                {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in asdict(point).items()}
            )
    draw(history, directory / "loss.png")


def running_mean(values: Sequence[float], weight: float = 0.05) -> list[float]:
    """An exponential mean that starts at the first value."""
    means: list[float] = []
    for value in values:
        means.append(means[-1] + weight * (value - means[-1]) if means else value)
    return means


def draw(history: Sequence[Point], path: Path) -> None:
    """Loss and recall over the tokens read, with the borders of the curriculum's stages."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens = [point.tokens / 1e6 for point in history]
    axes.plot(tokens, running_mean([point.loss for point in history]), color="tab:blue", label="loss (nats a token)")
    axes.set_xlabel("tokens read, millions")
    axes.set_ylabel("loss")
    right = axes.twinx()
    right.plot(tokens, running_mean([point.recall for point in history]), color="tab:orange", label="recall")
    right.set_ylabel("share of recalled words right")
    right.set_ylim(0, 1.02)
    for before, after in pairwise(history):
        if after.stage != before.stage:
            axes.axvline(after.tokens / 1e6, color="lightgray", linewidth=1, zorder=0)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=100)
