"""The whole service, through HAProxy, Ray Serve and two engine replicas, driven by the real `openai` client."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI

from model.text.tokenizer import Tokenizer
from tests.service.conftest import Running

pytestmark = pytest.mark.slow

PROMPT = "Once upon a time"
EXACT = {"ignore_eos": True}  # a field of ours, beside OpenAI's


def complete(client: OpenAI, service: Running, **fields: object) -> openai.types.Completion:
    body = {"model": service.model, "prompt": PROMPT, "max_tokens": 24, "seed": 7, **fields}
    return client.completions.create(**body)  # type: ignore[call-overload]


def test_a_streamed_completion_is_the_whole_one(client: OpenAI, service: Running) -> None:
    whole = complete(client, service).choices[0]
    chunks = list(complete(client, service, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_chat_is_the_whole_one(client: OpenAI, service: Running) -> None:
    fields = {
        "model": service.model,
        "messages": [{"role": "user", "content": "Tell me a story about a fox and a lantern"}],
        "max_completion_tokens": 24,
        "seed": 3,
    }
    whole = client.chat.completions.create(**fields).choices[0]
    chunks = list(client.chat.completions.create(**fields, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


async def test_the_async_client_streams_too(service: Running) -> None:
    async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        fields = {"model": service.model, "prompt": PROMPT, "max_tokens": 8, "seed": 7}
        stream = await client.completions.create(**fields, stream=True)
        streamed = "".join([chunk.choices[0].text async for chunk in stream])
        assert streamed == (await client.completions.create(**fields)).choices[0].text


def test_usage_counts_the_tokens_streamed_or_not(client: OpenAI, service: Running) -> None:
    whole = complete(client, service, extra_body=EXACT).usage
    *_, last = complete(client, service, stream=True, stream_options={"include_usage": True}, extra_body=EXACT)
    assert whole.completion_tokens == last.usage.completion_tokens == 24
    assert whole.prompt_tokens == last.usage.prompt_tokens
    assert last.choices == []


def test_the_same_seed_gives_the_same_text_and_another_seed_another(client: OpenAI, service: Running) -> None:
    texts = [complete(client, service, seed=seed).choices[0].text for seed in (11, 11, 12)]
    assert texts[0] == texts[1] != texts[2]


def test_a_seed_gives_the_same_text_alone_and_among_others(client: OpenAI, service: Running) -> None:
    alone = complete(client, service, seed=5).choices[0].text
    with ThreadPoolExecutor(12) as pool:
        crowd = list(pool.map(lambda seed: complete(client, service, seed=seed).choices[0].text, [5, *range(20, 31)]))
    assert crowd[0] == alone


def test_greedy_choices_are_equal_and_sampled_ones_are_not(client: OpenAI, service: Running) -> None:
    greedy = complete(client, service, n=2, temperature=0).choices
    sampled = complete(client, service, n=2).choices
    assert [choice.index for choice in sampled] == [0, 1]
    assert greedy[0].text == greedy[1].text
    assert sampled[0].text != sampled[1].text


def test_streamed_choices_interleave_under_their_index(client: OpenAI, service: Running) -> None:
    texts = ["", ""]
    for chunk in complete(client, service, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in complete(client, service, n=2).choices]


def test_a_stop_string_is_found_and_never_shown(client: OpenAI, service: Running) -> None:
    text = complete(client, service).choices[0].text
    stop = text[5:9]
    choice = complete(client, service, stop=[stop]).choices[0]
    assert choice.text == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    assert "".join(c.choices[0].text for c in complete(client, service, stop=stop, stream=True)) == choice.text


def test_token_ids_are_as_good_as_their_text(client: OpenAI, service: Running, served_model) -> None:
    ids = Tokenizer.from_directory(served_model).encode(PROMPT)
    by_text = complete(client, service)
    assert complete(client, service, prompt=ids).choices[0].text == by_text.choices[0].text
    assert complete(client, service, prompt=ids).usage.prompt_tokens == by_text.usage.prompt_tokens


def test_each_of_several_prompts_gets_what_it_would_get_alone(client: OpenAI, service: Running) -> None:
    together = complete(client, service, prompt=[PROMPT, "The fox"]).choices
    assert [choice.text for choice in together] == [
        complete(client, service, prompt=prompt).choices[0].text for prompt in (PROMPT, "The fox")
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"prompt": [1 << 30]}, "prompt"),
        ({"prompt": "a " * 5_000}, "prompt"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_served_is_refused_by_name(
    client: OpenAI, service: Running, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, service, **fields)
    assert refused.value.param == param


def test_a_chat_that_is_too_long_blames_its_messages(client: OpenAI, service: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=service.model, messages=[{"role": "user", "content": "a " * 5_000}])
    assert refused.value.param == "messages"


def test_another_model_is_not_found(client: OpenAI, service: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        complete(client, service, model="gpt-4")
    assert missing.value.code == "model_not_found"


def test_the_model_is_listed(client: OpenAI, service: Running) -> None:
    assert [model.id for model in client.models.list()] == [service.model]
    assert client.models.retrieve(service.model).object == "model"


@pytest.mark.parametrize(
    ("content", "status"), [(b"{not json", 400), (b" " * (1 << 20) + b"{}", 413)], ids=["no JSON", "too large"]
)
def test_a_bad_body_is_refused_in_the_openai_shape(service: Running, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{service.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_clients_request_id_comes_back_once(service: Running) -> None:
    answer = httpx.get(f"{service.url}/health", headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]


def test_engines_have_as_much_of_the_machine_as_whoever_started_them(service: Running) -> None:
    engines = service.engine_processes()
    assert [engine.nice() for engine in engines] == [psutil.Process(service.process.pid).nice()] * len(engines)
    assert engines


def test_the_metrics_agree_with_what_was_sent(client: OpenAI, service: Running) -> None:
    before = service.metrics()
    usages = [complete(client, service, seed=seed, extra_body=EXACT).usage for seed in range(5)]
    after = service.metrics()

    def grown(name: str) -> float:
        return after[f"attendant_{name}"] - before[f"attendant_{name}"]

    assert grown("request_success_total") == 5
    assert grown("generation_tokens_total") == sum(usage.completion_tokens for usage in usages) == 120
    assert grown("prompt_tokens_total") == sum(usage.prompt_tokens for usage in usages)
    assert grown("prompt_tokens_cached_total") == sum(u.prompt_tokens_details.cached_tokens for u in usages)
    assert grown("time_to_first_token_seconds_count") == grown("e2e_request_latency_seconds_count") == 5
    assert grown("engine_step_seconds_count") > 0


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "waiting"])
async def test_a_client_that_leaves_frees_its_blocks(service: Running, stream: bool) -> None:
    before = service.metrics()["attendant_client_disconnects_total"]
    body = {"prompt": PROMPT, "max_tokens": 900, "seed": 1, "ignore_eos": True, "stream": stream}
    async with httpx.AsyncClient(timeout=60) as leaver:
        request = asyncio.create_task(leaver.post(f"{service.url}/v1/completions", json=body))
        await asyncio.to_thread(service.wait_for, "attendant_num_requests_running", 1)
        request.cancel()
        await asyncio.wait([request])
    await asyncio.to_thread(service.wait_for, "attendant_num_requests_running", 0)
    assert service.metrics()["attendant_kv_cache_usage_ratio"] == 0
    assert service.metrics()["attendant_client_disconnects_total"] == before + 1
