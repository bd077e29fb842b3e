"""The model card: what the model is, how it was made, and how good it is, written from the files beside it.

A `history` in recipe.json, a list of paragraphs, is printed too: whoever changes the recipe under a run says so there.
"""

import csv
import json
from pathlib import Path

from model.training.export import RECIPE
from model.training.report import Report, row
from model.training.vocabulary import NUM_DOCUMENTS
from model.training.world import HELD_OUT_SHARE, NAMES, OBJECTS, PLACES

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---
# storyteller

A small Llama ({layers} layers, {hidden} wide, {parameters:.2f} million parameters, context {context}) that tells short
stories about characters and the objects that change hands among them, and answers who has what and where everyone is.
It is the embedded model of Attendant, trained from nothing by this repository's own code.

## Use

    attendant generate "Once upon a time"

In a chat, ask `Tell me a story about a fox and a lantern.`, then `Who has the lantern?` or `Where is Mia?` with a name
of the story. It knows {names} names, {objects} objects and {places} places, and nothing else of the world.

## Data

Stories written by `model/training`: every sentence is filled from a frame, over a world whose state is kept, so that
every answer is known. No text comes from elsewhere. One pair of name and object in {share} is held out: in training,
no such character ever holds such an object. The tokenizer is byte-level BPE with {vocab} tokens, learned from
{documents:,} documents; names, objects and places are single tokens.

## Recipe

`attendant train --out runs/storyteller --seed {recipe[seed]}`: AdamW, {recipe[steps]:,} steps of about
{recipe[tokens_per_batch]:,} tokens, peak rate {recipe[peak_rate]}, held for {recipe[hold]} steps, then a cosine to 1 %.
The curriculum (`model/training/curriculum.py`) goes from drills in recall to stories of 700 tokens. An auxiliary loss
guides five attention heads to where the generator knows the evidence to be (`model/training/guidance.py`); it fades
with the learning rate and leaves an ordinary Llama.{history}

{tokens:.1f} million tokens in {minutes:.0f} minutes of training on two CPU cores; last training loss {loss:.3f}
(weighted, over the last 50 steps). The curve is in `loss.csv` and `loss.png`.

## Scores

On held-out material (seed {report.seed}), by `attendant evaluate`:

| | |
|---|---|
| "Who has the ...?", answer 50 to 500 tokens back | {holder_accuracy:.1%} of {holder_total} |
| "Where is ...?", answer 50 to 500 tokens back | {place_accuracy:.1%} of {report.places.total} |
| stories well-formed, at temperature {samples.temperature} | {well_formed:.1%} of {samples.total} |
| stories that hold the hero and the object asked for | {on_subject:.1%} of {samples.total} |
| perplexity a token | {report.perplexity:.3f} |

| tokens back | questions | right | guess: last name | guess: last name with the object |
|---|---|---|---|---|
{rows}

A question counts as right when the whole greedy answer is. Only pairs of owner and object that training never saw are
asked about. Well-formed means that the generator's checker can parse every sentence and replay the story without a
contradiction: nobody gives away what they do not hold, nobody appears who was not introduced.

## Limits

Frames and words outside the world above are noise to it. It is no assistant.

SHA-256 of `model.safetensors`: `{report.sha256}`
"""


def write_card(directory: Path, report: Report) -> None:
    """Write README.md from config, recipe, curve and scores."""
    config = json.loads((directory / "config.json").read_text())
    with (directory / "loss.csv").open() as file:
        curve = list(csv.DictReader(file))
    last = curve[-50:]
    recipe = json.loads((directory / RECIPE).read_text())
    (directory / "README.md").write_text(
        CARD.format(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            context=config["max_position_embeddings"],
            vocab=config["vocab_size"],
            parameters=(directory / "model.safetensors").stat().st_size / 2e6,  # bf16: two bytes each
            names=len(NAMES),
            objects=len(OBJECTS),
            places=len(PLACES),
            share=HELD_OUT_SHARE,
            documents=NUM_DOCUMENTS,
            recipe=recipe,
            history="".join(f"\n\n{note}" for note in recipe.get("history", ())),
            tokens=float(curve[-1]["tokens"]) / 1e6,
            minutes=float(curve[-1]["seconds"]) / 60,
            loss=sum(float(point["loss"]) for point in last) / len(last),
            report=report,
            samples=report.samples,
            holder_accuracy=report.holder_accuracy,
            holder_total=sum(bucket.total for bucket in report.holders),
            place_accuracy=report.places.right / max(1, report.places.total),
            well_formed=report.samples.well_formed / report.samples.total,
            on_subject=report.samples.on_subject / report.samples.total,
            rows="\n".join(f"| {' | '.join(row(bucket))} |" for bucket in report.holders),
        )
    )
