"""Attention weights over HTTP: those of `transformers`, streamed or whole, and refused where there are none."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

from model.attention.weights import HeadWeights
from model.text.tokenizer import Tokenizer
from service.api.routes import create_api
from service.balance import RouteHint
from service.channel import Details, Submission
from service.completion import Service
from service.dispatch import Dispatcher
from service.door import Door
from service.limits import Limits
from service.metrics import IngressMetrics
from tests.service.fakes import FakeFleet
from tests.service.live import PROMPT, events, post, refusal

ASKED = {"layers": [2, 0], "heads": [1, 3], "top_k": 5}


def heaviest(weights: torch.Tensor, heads: list[dict[str, Any]]) -> None:
    """weights: [num_layers, num_heads, length], of one row."""
    assert [(head["layer"], head["head"]) for head in heads] == [(2, 1), (2, 3), (0, 1), (0, 3)]
    for head in heads:
        own = weights[head["layer"], head["head"]]
        expected = own.topk(5)
        assert len(set(head["positions"])) == 5
        torch.testing.assert_close(torch.tensor(head["weights"]), expected.values, atol=1e-4, rtol=0)
        torch.testing.assert_close(own[head["positions"]], expected.values, atol=1e-4, rtol=0)


@pytest.mark.honours("completions.attention", "chat.attention")
async def test_weights_are_those_of_transformers(
    live: httpx.AsyncClient, tiny_model: Path, tokenizer: Tokenizer, endpoint: str
) -> None:
    body = await post(live, endpoint, attention=ASKED, temperature=0)
    (choice,), num_prompt = body["choices"], body["usage"]["prompt_tokens"]
    written = [token["token_id"] for token in choice["attention"]]
    assert len(written) == 12
    ids = tokenizer.encode(PROMPT)
    if endpoint == "chat":
        ids = tokenizer.encode(f"<|user|>{PROMPT}</s><|assistant|>", add_special_tokens=False)
    assert len(ids) == num_prompt
    theirs = LlamaForCausalLM.from_pretrained(tiny_model, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        attentions = torch.cat(theirs(torch.tensor([[*ids, *written]]), output_attentions=True).attentions)
    for row, token in enumerate(choice["attention"], num_prompt - 1):
        heaviest(attentions[:, :, row, : row + 1], token["heads"])


async def test_streamed_weights_are_those_of_the_whole(live: httpx.AsyncClient, endpoint: str) -> None:
    whole = (await post(live, endpoint, attention=ASKED))["choices"][0]["attention"]
    chunks = [chunk["choices"][0] for chunk in await events(live, endpoint, attention=ASKED)]
    assert [token for chunk in chunks for token in chunk.get("attention", ())] == whole
    assert len(whole) == 12


async def test_weights_come_beside_log_probabilities(live: httpx.AsyncClient) -> None:
    for endpoint, logprobs in (("completions", 1), ("chat", True)):
        plain = [chunk["choices"][0]["logprobs"] for chunk in await events(live, endpoint, logprobs=logprobs)]
        chunks = [chunk["choices"][0] for chunk in await events(live, endpoint, logprobs=logprobs, attention=ASKED)]
        assert [chunk["logprobs"] for chunk in chunks] == plain
        assert sum(len(chunk.get("attention", ())) for chunk in chunks) == 12


async def test_a_stream_with_weights_writes_what_it_writes_without(live: httpx.AsyncClient) -> None:
    fields = {"prompt": ["one", "two"], "echo": True, "stream_options": {"include_usage": True}}

    async def texts(**asked: object) -> tuple[dict[int, str], object]:
        *chunks, last = await events(live, "completions", **fields, **asked)
        found: dict[int, str] = {}
        for chunk in chunks:
            (choice,) = chunk["choices"]
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
        return found, last["usage"]["completion_tokens"]

    assert await texts(attention=ASKED) == await texts()


async def test_nobody_who_did_not_ask_is_told(live: httpx.AsyncClient, endpoint: str) -> None:
    assert "attention" not in (await post(live, endpoint))["choices"][0]
    assert not any("attention" in chunk["choices"][0] for chunk in await events(live, endpoint))


async def test_tokens_behind_a_stop_string_have_no_weights(live: httpx.AsyncClient) -> None:
    whole = (await post(live, "completions", temperature=0))["choices"][0]["text"]
    body = await post(live, "completions", temperature=0, stop=whole[3:6], attention=ASKED)
    assert len(body["choices"][0]["attention"]) == body["usage"]["completion_tokens"] < 12


class Guesser(FakeFleet):
    """Answers with five tokens in one step, as an engine that guesses ahead may."""

    async def _submit(self, channel_id: str, submissions: list[Submission], hint: RouteHint) -> Any:
        answer = await super()._submit(channel_id, submissions, hint)
        looks = [[HeadWeights(0, 0, [i], [1.0])] for i in range(5)]
        for submission in submissions:
            output = (submission.request_id, list(b"abcde"), "length", 0, Details(None, None, looks))
            self.replicas["a"].outbox.put([output])
        return answer


async def test_of_a_step_that_goes_on_behind_a_stop_string_only_what_stands_is_told(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "token_bytes", lambda token_id: bytes([token_id]))
    metrics = IngressMetrics("tiny")
    service = Service("tiny", 0, tokenizer, None, Dispatcher(Guesser("a"), metrics), metrics, Limits())
    transport = httpx.ASGITransport(create_api(service, Door()))
    async with httpx.AsyncClient(transport=transport, base_url="http://attendant") as api:
        (choice,) = (await post(api, "completions", stop="c", attention={"layers": [0], "heads": [0]}))["choices"]
    assert choice["text"] == "ab"
    assert [token["heads"][0]["positions"] for token in choice["attention"]] == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"layers": [3]}, "attention.layers"),
        ({"heads": [0, 4]}, "attention.heads"),
        ({"layers": [0, 0]}, "attention.layers"),
        ({"heads": [1, 1]}, "attention.heads"),
        ({"layers": []}, "attention.layers"),
        ({"layers": [-1]}, "attention.layers[0]"),
        ({"heads": [True]}, "attention.heads[0]"),
        ({"top_k": 0}, "attention.top_k"),
        ({"top_k": 65}, "attention"),  # times two layers and two heads: 260 weights, of which 256 are served
        ({"rows": [1]}, "attention.rows"),
        ({"heads": ...}, "attention.heads"),
    ],
)
async def test_what_cannot_be_shown_is_refused(
    live: httpx.AsyncClient, endpoint: str, changes: dict[str, Any], param: str
) -> None:
    asked = {name: value for name, value in {**ASKED, **changes}.items() if value is not ...}
    assert Limits().max_attention_weights == 256
    assert await refusal(live, endpoint, attention=asked) == param
