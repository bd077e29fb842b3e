"""int8 on the embedded model: what it costs in accuracy, and that a request's numbers are its own."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.sampling.params import SamplingParams
from model.training.documents import Author

GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)


def new_engine(storyteller: Path, dtype: str, kernels: str = "auto", **options: object) -> Engine:
    return Engine.from_checkpoint(storyteller, EngineConfig(dtype=dtype, kernels=kernels, **options))


def documents(storyteller: Path, count: int) -> list[list[int]]:
    """Held-out stories as token ids."""
    author, tokenizer = Author("int8", "held_out"), Tokenizer.from_file(str(storyteller / "tokenizer.json"))
    return [tokenizer.encode(author.write("plain").text, add_special_tokens=False).ids for _ in range(count)]


def perplexity(engine: Engine, stories: list[list[int]]) -> float:
    """By the log-probabilities that the engine itself gives for prompts."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    logprobs = []
    for i, story in enumerate(stories):
        for output in engine.generate(Request(str(i), story, params)):
            logprobs += [item.logprob for item in output.prompt_logprobs or () if item]
    return math.exp(-sum(logprobs) / len(logprobs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kernels", "cache"),
    [
        ("int8", "native", "auto"),
        ("int8", "torch", "auto"),
        ("bf16", "native", "auto"),
        ("int8", "native", "int8"),
        ("bf16", "native", "int8"),
    ],
)
def test_perplexity_on_held_out_stories_is_within_half_a_percent_of_fp32(storyteller, dtype, kernels, cache):
    stories = documents(storyteller, 24)
    exact = perplexity(new_engine(storyteller, "fp32"), stories)
    quantized = perplexity(new_engine(storyteller, dtype, kernels, kv_cache_dtype=cache), stories)
    change = f"{quantized / exact - 1:+.3%}"
    print(f"perplexity {exact:.4f} in fp32, {quantized:.4f} in {dtype} ({kernels}, cache {cache}): {change}")
    assert abs(quantized / exact - 1) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "cache"), [("int8", "auto"), ("int8", "int8"), ("bf16", "int8")])
def test_greedy_choices_mostly_agree_with_those_of_fp32(storyteller, dtype, cache):
    """Choice by choice on the text that fp32 writes, so that one difference does not count for all that follow."""
    exact, quantized = (
        new_engine(storyteller, "fp32"),
        new_engine(storyteller, dtype, "native", kv_cache_dtype=cache),
    )
    agreed = total = 0
    one = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    for i, story in enumerate(documents(storyteller, 8)):
        written = [t for output in exact.generate(Request(str(i), story[:60], GREEDY)) for t in output.token_ids]
        (output,) = quantized.generate(Request(str(i), story[:60] + written, one))
        for token_id, item in zip(written, output.prompt_logprobs[60:], strict=True):
            agreed += item.top[0][0] == token_id
            total += 1
    print(f"greedy agreement of {dtype}, cache {cache}: {agreed} of {total}")
    assert agreed / total > 0.9


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_a_requests_logits_do_not_change_with_its_neighbours(storyteller, cache):
    engine = new_engine(storyteller, "int8", "native", kv_cache_dtype=cache)
    prompts = [[0, *range(5 + i, 40 + 3 * i)] for i in range(6)]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=5)

    def logprobs(indices: list[int]) -> dict[str, list[object]]:
        found: dict[str, list[object]] = {str(i): [] for i in indices}
        for i in indices:
            engine.add(Request(str(i), prompts[i], params))
        while engine.has_work:
            for output in engine.step():
                found[output.request_id] += output.logprobs
        return found

    alone = [logprobs([i])[str(i)] for i in range(6)]
    together = logprobs(list(range(6)))
    assert [together[str(i)] for i in range(6)] == alone


def test_the_torch_twin_gives_a_row_the_same_bits_in_any_batch(storyteller):
    engine = new_engine(storyteller, "int8", "torch")
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    linear = engine.runner.compute.decoder.layers[0].qkv
    together = linear(x)
    assert all(torch.equal(together[i : i + 17], linear(x[i : i + 17])) for i in range(0, 23))


def test_native_and_torch_int8_agree_on_the_embedded_model(storyteller):
    prompt = documents(storyteller, 1)[0][:200]
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    found = []
    for kernels in ("native", "torch"):
        (output,) = new_engine(storyteller, "int8", kernels).generate(Request("a", prompt, params))
        found.append(dict(output.logprobs[0].top))
    shared = [token for token in found[0] if token in found[1]]
    ours, theirs = (torch.tensor([top[token] for token in shared]) for top in found)
    assert len(shared) >= 15
    assert F.l1_loss(ours.exp(), theirs.exp()) < 0.01
