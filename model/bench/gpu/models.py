"""Whole models with random weights: tokens a second of decode and prefill, by batch, and the part of the roofline."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model.bench.engine import measure_round, summarize
from model.bench.gpu.results import Results
from model.bench.gpu.scale import Scale
from model.bench.gpu.timing import measure_card
from model.bench.roofline import Machine
from model.bench.rounds import Ask
from model.config import EngineConfig, ModelConfig
from model.decoder import Decoder
from model.directory import read_config
from model.engine.engine import Engine
from model.families import Family

SEED = 0  # of weights: the parts of one run build the same model
WARM_UP_TOKENS = 3  # that each request generates before anything counts


def run(results: Results, scale: Scale, which: str, weights: str = "") -> None:
    """Decode at each batch size, with the prefill before it; then one long prompt. weights: `int8`, or the scale's."""
    shape = scale.small if which == "small" else scale.large
    asks = {f"batch {batch}": Ask(batch, scale.context, scale.output, 1) for batch in scale.batches}
    asks[f"one prompt of {scale.long_context}"] = Ask(scale.batches[0], scale.long_context, 2, 1)
    missing = results.missing(list(asks))
    if not missing:
        return
    device = torch.device(scale.device)
    copy, products = measure_card(device, scale.dtype, scale.copy_bytes, scale.product_size)
    dtype = "bf16" if scale.dtype == torch.bfloat16 else "fp32"
    machine = Machine(copy, dict.fromkeys(("fp32", "bf16", "int8"), products))
    decoder = random_decoder(shape, scale)
    if weights == "int8":
        dtype = weights
        decoder.quantize()
    engine = build_engine(decoder, scale, list(asks.values()))
    for ask in asks.values():  # compiles what it needs
        measure_round(engine, Ask(ask.batch, min(ask.prompt_tokens, 64), WARM_UP_TOKENS, 0))
    for name in missing:
        with results.row(name) as row:
            ask = asks[name]
            answer = measure_round(engine, ask)
            row |= summarize(engine.model_config, machine, dtype, ask, [answer])
            if ask.output_tokens > 2:
                row["ms_a_step"] = 1e3 * ask.batch / answer.decode_rate()


def read_shape(shape: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """What a published config.json of this shape comes to."""
    with tempfile.TemporaryDirectory() as folder:
        config = {**shape, "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return read_config(Path(folder))


def random_decoder(shape: Mapping[str, Any], scale: Scale) -> Decoder:
    """A decoder of this shape, made where it will run: 8 billion weights on disk would take minutes."""
    _, config = read_shape(shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(scale.dtype)
    try:
        with torch.device(scale.device):
            decoder = Decoder(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    decoder.rotaries.to(scale.device)
    decoder.init_weights(torch.Generator(scale.device).manual_seed(SEED))
    return decoder


def build_engine(decoder: Decoder, scale: Scale, asks: list[Ask]) -> Engine:
    """An engine whose cache holds the largest of these rounds."""
    tokens = max(ask.batch * (ask.prompt_tokens + ask.output_tokens + 16) for ask in asks)
    longest = max(ask.prompt_tokens + ask.output_tokens for ask in asks)
    return engine_of(decoder, scale, tokens, longest + WARM_UP_TOKENS)


def engine_of(decoder: Decoder, scale: Scale, cache_tokens: int, longest: int) -> Engine:
    """As it is shipped for a card, but for the size of its cache and the lengths it serves."""
    config = EngineConfig(
        dtype="bf16" if scale.dtype == torch.bfloat16 else "fp32",
        device="cuda" if scale.device == "cuda" else "cpu",
        kernels="triton",
        kv_cache_tokens=cache_tokens,
        max_model_len=longest,
        max_num_seqs=max(scale.batches),
        max_num_batched_tokens=scale.token_budget,
    )
    return Engine(decoder, config)
