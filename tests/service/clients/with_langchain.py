"""Talks to the service through langchain-openai. Run by the Python of the foreign clients; prints one JSON object."""

import json
import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

url, model = sys.argv[1:]
chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="none", seed=7, max_completion_tokens=200, max_retries=0)


class Pet(BaseModel):
    """A pet."""

    model_config = ConfigDict(extra="forbid")

    animal: Literal["fox", "owl"]


prompt = "Tell me a story about a fox and a lantern."
short = chat.model_copy(update={"max_tokens": 16})
bound = chat.bind_tools([Pet], tool_choice="any", strict=True)
print(
    json.dumps(
        {
            "whole": short.invoke(prompt).content,
            "streamed": "".join(chunk.content for chunk in short.stream(prompt)),
            "call": bound.invoke(prompt).tool_calls[0]["args"],
            "parsed": chat.with_structured_output(Pet, method="json_schema").invoke(prompt).animal,
        }
    )
)
