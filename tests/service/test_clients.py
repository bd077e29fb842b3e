"""Clients that others wrote, over loopback, against the running service: what they send is understood, and what they
get they can read."""

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.service.conftest import Running

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FOREIGN = HERE.parent.parent / ".venv-clients" / "bin"
CHAT: list[Any] = [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]
PARAMETERS = {
    "type": "object",
    "properties": {"animal": {"enum": ["fox", "owl"]}},
    "required": ["animal"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "find", "parameters": PARAMETERS, "strict": True}}


class Pet(BaseModel):
    model_config = ConfigDict(extra="forbid")

    animal: Literal["fox", "owl"]
    age: Literal[1, 2, 3]


def foreign(program: str, *arguments: str) -> str:
    """What a program of the foreign clients' Python prints."""
    assert (FOREIGN / program).exists(), "`make .venv-clients/.clients` installs the clients of others"
    offline = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "TQDM_DISABLE": "1"}
    command = [str(FOREIGN / program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ | offline, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def script(name: str, *arguments: str) -> Any:
    """The JSON object at the end of what one of our scripts prints."""
    return json.loads(foreign("python", str(HERE / "clients" / name), *arguments).splitlines()[-1])


# The `openai` package.


def test_openai_calls_a_tool_and_gives_back_its_result(client: OpenAI, service: Running) -> None:
    fields: Any = {"model": service.model, "tools": [TOOL], "seed": 7, "max_tokens": 100}
    choice = client.chat.completions.create(
        messages=CHAT, tool_choice="required", parallel_tool_calls=False, **fields
    ).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["animal"] in ("fox", "owl")
    result = {"role": "tool", "tool_call_id": call.id, "content": "It is in the forest."}
    answer = client.chat.completions.create(messages=[*CHAT, choice.message, result], **{**fields, "max_tokens": 8})
    assert answer.usage.prompt_tokens > 30
    assert answer.choices[0].message.content


def test_openai_streams_a_call(client: OpenAI, service: Running) -> None:
    with client.chat.completions.stream(
        model=service.model, messages=CHAT, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, seed=7
    ) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert json.loads(call.function.arguments)["animal"] in ("fox", "owl")


def test_openai_parses_an_answer_into_a_pydantic_model(client: OpenAI, service: Running) -> None:
    answer = client.chat.completions.parse(model=service.model, messages=CHAT, response_format=Pet, seed=7)
    assert isinstance(answer.choices[0].message.parsed, Pet)
    response = client.responses.parse(model=service.model, input="Which pet?", text_format=Pet)
    assert isinstance(response.output_parsed, Pet)


def test_openai_reads_log_probabilities(client: OpenAI, service: Running) -> None:
    fields: Any = {"model": service.model, "max_tokens": 8, "seed": 7}
    chat = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **fields).choices[0]
    assert [len(entry.top_logprobs) for entry in chat.logprobs.content] == [2] * 8
    text = client.completions.create(prompt="Once upon a time", logprobs=2, echo=True, **fields).choices[0]
    assert "".join(text.logprobs.tokens).endswith(text.text[len("Once upon a time") :])


def test_openai_streams_a_response(client: OpenAI, service: Running) -> None:
    with client.responses.stream(model=service.model, input="Which pet?", text_format=Pet) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text
    assert isinstance(final.output_parsed, Pet)
    assert final.usage.output_tokens > 0


async def test_openai_async_streams_many_chats_at_once(service: Running) -> None:
    async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:

        async def tell(seed: int) -> str:
            stream = await client.chat.completions.create(
                model=service.model, messages=CHAT, max_tokens=12, seed=seed, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        alone = await tell(3)
        assert (await asyncio.gather(*map(tell, (1, 2, 3, 4))))[2] == alone


def test_openai_raises_its_own_error_that_names_the_field(client: OpenAI, service: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=service.model, input="x", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"


# Bare HTTP.


def test_httpx_reads_the_raw_events(service: Running) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 8, "seed": 7, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    *chunks, done = [line.removeprefix("data: ") for line in lines]
    assert done == "[DONE]"
    assert len([json.loads(chunk) for chunk in chunks]) >= 8, "one event a token, each of them JSON"


def test_curl_reads_a_stream(service: Running) -> None:
    curl = shutil.which("curl")
    assert curl, "curl is one of the clients that this is for"
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 4, "stream": True})
    command = [curl, "-sN", f"{service.url}/v1/completions", "-H", "content-type: application/json", "-d", body]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert output.startswith("data: {")
    assert output.endswith("data: [DONE]\n\n")


# Frameworks, an evaluation harness and a load generator.


def test_litellm_completes_streams_and_calls_tools(service: Running) -> None:
    said = script("with_litellm.py", service.url, service.model)
    assert said["streamed"] == said["whole"] != ""
    assert said["tokens"] == 16
    assert json.loads(said["call"])["animal"] in ("fox", "owl")
    assert said["finish_reason"] == "tool_calls"
    assert said["text"]


def test_langchain_completes_streams_calls_tools_and_parses(service: Running) -> None:
    said = script("with_langchain.py", service.url, service.model)
    assert said["streamed"] == said["whole"] != ""
    assert said["call"]["animal"] in ("fox", "owl")
    assert said["parsed"] in ("fox", "owl")


def test_lm_eval_scores_texts_as_transformers_does(service: Running, served_model: Path, tmp_path: Path) -> None:
    scores = script("with_lm_eval.py", service.url, service.model, str(served_model), str(tmp_path))
    assert len(scores) == 4
    tokenizer = AutoTokenizer.from_pretrained(served_model)
    reference = AutoModelForCausalLM.from_pretrained(served_model, dtype=torch.float32).eval()
    for score in scores:
        context = tokenizer.encode(score["context"], add_special_tokens=False)
        whole = tokenizer.encode(score["context"] + score["choice"], add_special_tokens=False)
        assert whole[: len(context)] == context
        with torch.inference_mode():
            logprobs = reference(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(context), len(whole))
        expected = sum(logprobs[place - 1, whole[place]].item() for place in places)
        assert score["logprob"] == pytest.approx(expected, rel=0.02, abs=0.1)  # the service computes in bf16


def test_guidellm_drives_load_and_finds_every_token(service: Running, served_model: Path, tmp_path: Path) -> None:
    before = service.metrics()["attendant_generation_tokens_total"]
    options = {
        "backend": f"kind=openai_http,target={service.url}",
        "profile": "kind=concurrent,streams=4",
        "constraint": "kind=max_requests,count=12",
        "data": "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
        "tokenizer": f"kind=huggingface_auto,model={served_model}",
        "output": f"kind=json,path={tmp_path}/report.json",
    }
    foreign("guidellm", "run", *(part for name, value in options.items() for part in (f"--{name}", value)))
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (12, 0)
    assert service.metrics()["attendant_generation_tokens_total"] - before >= 12 * 16
