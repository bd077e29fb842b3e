"""Trains the embedded model from nothing: `python -m model.training.pretrain --out runs/storyteller`.

AdamW, warm-up, a constant stretch in which recall is drilled, then a cosine to the end, while the curriculum moves on
to stories as recall becomes good enough. A run can be stopped at any time and resumed: the state on disk holds
everything that the next step depends on, so the weights come out the same, bit for bit, on the same machine.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor

from model.config import ModelConfig
from model.decoder import Decoder
from model.errors import ConfigError
from model.training.batches import NO_OPTION, Batch, BatchStream
from model.training.curriculum import CURRICULUM, Stage, storyteller_config
from model.training.curve import Point, write_curve
from model.training.documents import BOS, EOS
from model.training.export import export
from model.training.guidance import GuidedAttention, Head, favour_matching
from model.training.vocabulary import train_tokenizer

STATE = "state.pt"
EVENNESS = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. `steps` fixes the learning rate's schedule, so it may not change when a run is resumed.

    hold: the first steps, warm-up included, before the rate falls, as a cosine, from its peak to 1 % of it.
    guidance: the weight of the attention loss beside the token loss; it falls with the rate.
    guided: where a smaller model has the heads that `guidance` names; those left out are not guided. None: all, there.
    start: gives a fresh decoder its weights.
    """

    out: Path
    steps: int = 3800
    tokens_per_batch: int = 4096
    peak_rate: float = 2e-3
    warm_up: int = 100
    hold: int = 600
    weight_decay: float = 0.01
    clip: float = 1.0
    guidance: float = 0.35
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    save_every: int = 200
    resume: bool = False
    model: ModelConfig | None = None  # the storyteller's own shape, unless a test wants a smaller one
    curriculum: tuple[Stage, ...] = CURRICULUM
    guided: Mapping[Head, Head] | None = None
    start: Callable[[Decoder, torch.Generator], None] = favour_matching

    def recipe(self) -> dict[str, object]:
        """What decides the weights: everything but where and how fast it runs."""
        place = {"out", "device", "threads", "save_every", "resume", "model", "curriculum", "guided", "start"}
        return {name: value for name, value in asdict(self).items() if name not in place}

    def move(self, targets: dict[Head, Tensor]) -> dict[Head, Tensor]:
        """The targets of the guided heads, where this model has them."""
        if self.guided is None:
            return targets
        return {self.guided[head]: rows for head, rows in targets.items() if head in self.guided}


@dataclass
class Progressed:
    """How far a run has come. recall: running mean of the recall accuracy, by which stages are left."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    recall: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    history: list[Point] = field(default_factory=list)


class Trainer:
    """Holds one run's model, optimizer and data, and takes its steps."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.device = pick_device(config.device)
        vocabulary = tokenizer.get_vocab()
        shape = config.model or storyteller_config(len(vocabulary), vocabulary[BOS], vocabulary[EOS])
        decoder = Decoder(shape)
        config.start(decoder, torch.Generator().manual_seed(config.seed))
        self.decoder = decoder.to(self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.decoder, config.weight_decay), betas=(0.9, 0.95))
        self.stream = BatchStream(tokenizer, config.seed, config.tokens_per_batch)
        self.progress = Progressed()

    def rate(self) -> float:
        """The learning rate of the next step, as a share of its peak."""
        step, config = self.progress.step, self.config
        if step < config.hold:
            return min(1.0, (step + 1) / config.warm_up)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - config.hold) / (config.steps - config.hold)))

    def step(self) -> Point:
        """One step of training, and what it showed."""
        began, config, progress = time.perf_counter(), self.config, self.progress
        share = self.rate()
        for group in self.optimizer.param_groups:
            group["lr"] = share * config.peak_rate
        batch = self.stream.batch(progress.step, config.curriculum[progress.stage].forms).to(self.device)
        guided, token_loss, right = self.losses(batch)
        # During warm-up the guidance is whole: it is what the first steps are for.
        faded = share if progress.step > config.warm_up else 1.0
        (token_loss + config.guidance * faded * guided).backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.tokens += batch.num_tokens
        progress.seconds += time.perf_counter() - began
        point = Point(
            step=progress.step + 1,
            stage=progress.stage,
            tokens=progress.tokens,
            seconds=round(progress.seconds, 1),
            rate=share * config.peak_rate,
            loss=token_loss.item(),
            guidance=guided.item(),
            recall=right,
        )
        self.advance(point)
        return point

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, float]:
        """The guidance loss, the weighted token loss, and the share of recalled words that were ranked first."""
        rows, length = batch.token_ids.shape
        attention = GuidedAttention(rows, length, self.config.move(batch.targets))
        positions = torch.arange(length, device=self.device).repeat(rows)
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = self.decoder(batch.token_ids.flatten(), positions, attention)
            logits = self.decoder.logits(hidden)
        logits = logits.float().unflatten(0, (rows, length))[:, :-1]
        targets, weights = batch.token_ids[:, 1:], batch.weights[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
        sequence, position = batch.choices.unbind(1)
        choices = choice_losses(logits[sequence, position - 1], batch.options)
        losses = losses.index_put((sequence, position - 1), choices)
        token_loss = (losses * weights).sum() / weights.sum()
        sequence, position = batch.recalls.unbind(1)
        guesses = logits[sequence, position - 1].argmax(-1)
        right = (guesses == batch.token_ids[sequence, position]).float().mean().item()
        return attention.loss(), token_loss, right

    def advance(self, point: Point) -> None:
        """Count the step, and leave the stage once recall has reached its gate."""
        progress = self.progress
        progress.step += 1
        progress.stage_step += 1
        weight = 1.0 if progress.stage_step == 1 else 0.05
        progress.recall += weight * (point.recall - progress.recall)
        progress.history.append(point)
        stage = self.config.curriculum[progress.stage]
        if progress.stage_step >= stage.min_steps and progress.recall >= stage.gate:
            progress.stage, progress.stage_step = progress.stage + 1, 0

    def save(self) -> None:
        """Write the whole state, so that a kill at any moment leaves either the old one or the new one."""
        path = self.config.out / STATE
        state = {
            "recipe": self.config.recipe(),
            "decoder": self.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self) -> None:
        """Go on from the state in `out`. Raises `ConfigError` when there is none, or it is of another recipe."""
        path = self.config.out / STATE
        if not path.exists():
            raise ConfigError(f"{path}: nothing to resume; start without --resume")
        # This run's own state, never a model's weights; `weights_only` makes tensors and plain values of it, no code.
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["recipe"] != self.config.recipe():
            raise ConfigError(f"{path}: was trained by another recipe: {state['recipe']}")
        self.decoder.load_state_dict(state["decoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        history = [Point(**point) for point in state["progress"].pop("history")]
        self.progress = Progressed(**state["progress"], history=history)


def choice_losses(logits: Tensor, options: Tensor) -> Tensor:
    """-log of the probability of any of the options, and a little of the cross-entropy with their even distribution.

    Which one the generator drew is chance, and learning it is noise; an even choice alone is too much to ask, because
    it keeps every logit low. What matters is that nothing else comes.

    logits: [rows, vocab_size]; options: [rows, most options], see `Batch`. Returns [rows].
    """
    real = options != NO_OPTION
    scores = logits.log_softmax(-1).gather(1, options.clamp(min=0))
    any_of_them = scores.masked_fill(~real, float("-inf")).logsumexp(1)
    even = (scores * real).sum(1) / real.sum(1)
    return -any_of_them - EVENNESS * even


def parameter_groups(decoder: Decoder, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for the matrices, none for the gains of the norms."""
    matrices = [parameter for parameter in decoder.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in decoder.parameters() if parameter.dim() == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises `ConfigError` when `cuda` is asked for and missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch sees no GPU here")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def train(config: TrainConfig, console: Console | None = None, tokenizer: Tokenizer | None = None) -> Path:
    """Run to the end (or from where it was stopped), and export the model. Returns the model's directory.

    tokenizer: one that was trained before; None: the run's own.

    Raises `ConfigError` without matplotlib, or for a device that is not there.
    """
    if find_spec("matplotlib") is None:  # now, and not after an hour's training
        raise ConfigError("training draws its loss curve with matplotlib: pip install -r deploy/lock/train.txt")
    console = console or Console()
    if config.threads:
        torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, tokenizer or tokenizer_of(config))
    if config.resume:
        trainer.load()
    size = sum(parameter.numel() for parameter in trainer.decoder.parameters())
    console.print(f"{size / 1e6:.2f}M parameters on {trainer.device}, {config.steps} steps, into {config.out}")
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=config.steps, completed=trainer.progress.step, note="")
        while trainer.progress.step < config.steps:
            point = trainer.step()
            note = f"stage {point.stage} loss {point.loss:.3f} recall {trainer.progress.recall:.3f}"
            bar.update(task, completed=point.step, note=note)
            if not console.is_terminal and point.step % 20 == 0:
                console.print(f"{point.step:5} {point.seconds:7.0f}s {point.tokens / 1e6:6.2f}M {note}")
            if point.step % config.save_every == 0 or point.step == config.steps:
                trainer.save()
                finish(trainer)
    return config.out / "model"


def tokenizer_of(config: TrainConfig) -> Tokenizer:
    """A fresh tokenizer; for a resumed run its own, since the weights know no other."""
    file = config.out / "model" / "tokenizer.json"
    return Tokenizer.from_file(str(file)) if config.resume and file.exists() else train_tokenizer(config.seed)


def finish(trainer: Trainer) -> None:
    """Write the model as it stands, with its curve."""
    directory = trainer.config.out / "model"
    export(trainer.decoder, trainer.tokenizer, directory, trainer.config.recipe())
    write_curve(trainer.progress.history, directory)


def progress_bar(console: Console) -> Progress:
    """A bar with the numbers that tell whether the run is healthy."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `python -m model.training.pretrain`."""
    parser = argparse.ArgumentParser(description="Train the embedded model from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="the run's directory; the model lands in OUT/model")
    parser.add_argument("--resume", action="store_true", help="go on from the state in OUT")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the choice to torch")
    parser.add_argument("--steps", type=int, help="length of the run and of its learning-rate schedule")
    parser.add_argument("--seed", type=int)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    try:
        train(replace(TrainConfig(out=given.pop("out")), **given))
    except ConfigError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
