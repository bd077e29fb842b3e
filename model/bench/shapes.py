"""Shapes to measure on: published `config.json`s, with random weights written as a standard Hugging Face directory.

Speed does not depend on what the weights say, and every engine reads such a directory or converts it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}

SHAPES: dict[str, dict[str, Any]] = {
    "storyteller": LLAMA | {
        "vocab_size": 2034, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "tie_word_embeddings": True,
    },
    "smollm2-135m": LLAMA | {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": QWEN3 | {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "tie_word_embeddings": True,
    },
    "llama-8b": LLAMA | {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": False,
    },
}  # fmt: skip

BOS, EOS = "<|bos|>", "<|eos|>"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model is measured."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m", help="default: %(default)s")
    which.add_argument("--model", type=Path, help="a model directory instead of a shape")
    parser.add_argument("--random-weights", action="store_true", help="said for the reader: a shape has no others")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/bench"), help="where a shape's weights are kept (default: %(default)s)"
    )


def directory_of(args: argparse.Namespace) -> Path:
    """The model directory that the options name. A shape's is written when it is first asked for."""
    model: Path | None = args.model
    if model is not None:
        if args.random_weights:
            raise SystemExit("--model has weights of its own: leave --random-weights out, or name a --shape")
        return model
    directory: Path = args.work / args.shape
    if not (directory / "model.safetensors").exists():
        write_random(SHAPES[args.shape], directory)
    return directory


def write_random(shape: dict[str, Any], directory: Path) -> None:
    """Write a model directory of this shape: bf16 weights, normal with a deviation of 0.02, and a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(shape["vocab_size"], directory)
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    config = shape | ids | {"hidden_act": "silu", "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(ids) + "\n")
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, sizes in tensors(shape):
        weight = torch.ones(sizes, dtype=torch.bfloat16)
        if len(sizes) == 2:
            weight.normal_(0.0, 0.02, generator=generator)
        weights[name] = weight
    partial = directory / "partial.safetensors"  # renamed when it is whole, so a run that was cut off starts again
    save_file(weights, partial, metadata={"format": "pt"})
    partial.rename(directory / "model.safetensors")


def tensors(shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and sizes of every tensor that a published checkpoint of this shape holds."""
    hidden, wide, head_dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * head_dim, shape["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for index in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (q, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q)
        if shape["model_type"] == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", (head_dim,)
            yield f"{layer}.self_attn.k_norm.weight", (head_dim,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (wide, hidden)
        yield f"{layer}.mlp.up_proj.weight", (wide, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, wide)
    yield "model.norm.weight", (hidden,)
    if not shape["tie_word_embeddings"]:
        yield "lm_head.weight", (shape["vocab_size"], hidden)


def write_tokenizer(vocab_size: int, directory: Path) -> None:
    """A byte-level BPE of exactly this size: two special tokens, the bytes, then words of letters, the shortest first.

    The words are plain ASCII, so a server that streams text has something to send for almost every token.
    """
    words = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    stems = list(LETTERS)
    for stem in stems:  # grows as it is read: every word is a stem of longer ones
        for letter in LETTERS[: vocab_size - len(words)]:
            words.append(stem + letter)
            merges.append((stem, letter))
            stems.append(stem + letter)
        if len(words) == vocab_size:
            break
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.save(str(directory / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
