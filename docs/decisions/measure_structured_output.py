"""Measures llguidance and xgrammar side by side: the table of decision 0003. Neither is favoured: one noise, one walk.

python docs/decisions/measure_structured_output.py llguidance|xgrammar DIRECTORY...

DIRECTORY holds a tokenizer.json of byte-level BPE. The walk samples from uniform noise under the mask: the strongest
adversary, which leaves every shortcut for likely tokens behind. Times are of one thread, except in the last column.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

EOS = 1
TOKENS = 200
BATCH = 32
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}}}
GRAMMARS: dict[str, tuple[str, str]] = {
    "person": ("schema", json.dumps(PERSON | {"required": ["name", "age"], "additionalProperties": False})),
    "nested": ("schema", json.dumps({"type": "array", "items": PERSON | {"required": ["name"]}, "minItems": 3})),
    "any object": ("schema", json.dumps({"type": "object"})),
    "enum of 1000": ("schema", json.dumps({"enum": [f"value-{i:04d}" for i in range(1000)]})),
    "pattern": ("schema", json.dumps({"type": "string", "pattern": r"^[A-Z][a-z]{2,40}( [a-z]+)*$"})),
    "regex .*a.{200}": ("regex", ".*a.{200}"),
}


def llguidance(text: str) -> tuple[Callable[..., Any], Callable[..., None]]:
    """How to compile, and how to fill the masks of several matchers."""
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

    tokenizer, executor = LLTokenizer(text, eos_token=[EOS]), LLExecutor(2)

    def start(kind: str, source: str) -> Any:
        make = LLMatcher.grammar_from_json_schema if kind == "schema" else LLMatcher.grammar_from_regex
        return LLMatcher(tokenizer, make(source))

    def fill(matchers: list[Any], mask: np.ndarray) -> None:
        if len(matchers) == 1:
            matchers[0].unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        else:
            rows = list(zip(matchers, range(len(matchers)), strict=True))
            executor.unsafe_compute_mask_ptr(rows, mask.ctypes.data, mask.shape[1] * 4, len(mask))

    return start, fill


def xgrammar(text: str) -> tuple[Callable[..., Any], Callable[..., None]]:
    """The same of the other library, its cache of compiled grammars switched off."""
    import torch
    from xgrammar import BatchGrammarMatcher, GrammarCompiler, GrammarMatcher, TokenizerInfo, VocabType

    vocabulary = json.loads(text)["model"]["vocab"]
    info = TokenizerInfo(sorted(vocabulary, key=vocabulary.get), VocabType.BYTE_LEVEL, stop_token_ids=[EOS])
    compiler, batch = GrammarCompiler(info, max_threads=1, cache_enabled=False), BatchGrammarMatcher(2)

    def start(kind: str, source: str) -> Any:
        schema = kind == "schema"
        return GrammarMatcher(
            compiler.compile_json_schema(source, strict_mode=False) if schema else compiler.compile_regex(source)
        )

    def fill(matchers: list[Any], mask: np.ndarray) -> None:
        tensor = torch.from_numpy(mask)
        if len(matchers) == 1:
            matchers[0].fill_next_token_bitmask(tensor, 0)
        else:
            batch.batch_fill_next_token_bitmask(matchers, tensor)

    return start, fill


def walk(matcher: Any, fill: Callable[..., None], size: int, seed: int) -> Iterator[tuple[float, float]]:
    """Seconds per mask and per accepted token, up to EOS or `TOKENS` tokens."""
    noise, mask = np.random.default_rng(seed), np.empty((1, (size + 31) // 32), dtype=np.int32)
    accept = matcher.consume_token if hasattr(matcher, "consume_token") else matcher.accept_token
    for _ in range(TOKENS):
        mask.fill(-1)
        began = time.perf_counter()
        fill([matcher], mask)
        filled = time.perf_counter()
        token_id = int(noise.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8)[0], bitorder="little")[:size])))
        if token_id == EOS:
            return
        chosen = time.perf_counter()
        accept(token_id)
        yield filled - began, time.perf_counter() - chosen


def main(library: str, *directories: str) -> None:
    """One table row for each vocabulary and grammar, times in microseconds unless told otherwise."""
    print(f"{library}: vocabulary | grammar | compile ms | mask mean | p99 | accept mean | {BATCH} masks, 2 threads")
    for directory in directories:
        text = (Path(directory) / "tokenizer.json").read_text()
        began = time.perf_counter()
        start, fill = {"llguidance": llguidance, "xgrammar": xgrammar}[library](text)
        size = len(json.loads(text)["model"]["vocab"])
        words = (size + 31) // 32
        print(f"vocabulary of {size}: {(time.perf_counter() - began) * 1e3:.0f} ms to load")
        for name, grammar in GRAMMARS.items():
            compiles = []
            for _ in range(5):
                began = time.perf_counter()
                start(*grammar)
                compiles.append(time.perf_counter() - began)
            pairs = [pair for seed in range(10) for pair in walk(start(*grammar), fill, size, seed)]
            masks, accepts = (np.array(column) * 1e6 for column in zip(*pairs, strict=True))
            compiled, mean, late = np.median(compiles) * 1e3, masks.mean(), np.percentile(masks, 99)
            matchers, mask = [start(*grammar) for _ in range(BATCH)], np.full((BATCH, words), -1, dtype=np.int32)
            fills = []
            for _ in range(9):
                began = time.perf_counter()
                fill(matchers, mask)
                fills.append(time.perf_counter() - began)
            batched = np.median(fills) * 1e6
            row = f"{compiled:.1f} | {mean:.0f} | {late:.0f} | {accepts.mean():.1f} | {batched:.0f}"
            print(f"{size} | {name} | {row}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
