"""Writes a trained model as a standard Hugging Face Llama directory."""

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer

from model.checkpoint import save_checkpoint
from model.decoder import Decoder
from model.training.vocabulary import save_tokenizer

RECIPE = "recipe.json"


def export(decoder: Decoder, tokenizer: Tokenizer, directory: Path, recipe: Mapping[str, object]) -> None:
    """Weights in bf16, tokenizer, chat template, generation defaults, and the recipe that they came from."""
    config = decoder.config
    save_tokenizer(tokenizer, directory, config.max_position_embeddings)
    save_checkpoint(decoder, directory)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "do_sample": True,
        "temperature": 0.8,
    }
    for name, content in (("generation_config.json", generation), (RECIPE, dict(recipe))):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
