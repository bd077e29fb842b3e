"""Talks to the service through litellm. Run by the Python of the foreign clients; prints one JSON object."""

import json
import sys
from typing import Any

import litellm

url, model = sys.argv[1:]
common: dict[str, Any] = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "seed": 7}
messages = [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]
tool = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {
            "type": "object",
            "properties": {"animal": {"enum": ["fox", "owl"]}},
            "required": ["animal"],
            "additionalProperties": False,
        },
    },
}

whole = litellm.completion(messages=messages, max_tokens=16, **common)
stream = litellm.completion(messages=messages, max_tokens=16, stream=True, **common)
called = litellm.completion(messages=messages, max_tokens=200, tools=[tool], tool_choice="required", **common)
text = litellm.text_completion(prompt="Once upon a time", max_tokens=8, **common)
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
            "tokens": whole.usage.completion_tokens,
            "call": called.choices[0].message.tool_calls[0].function.arguments,
            "finish_reason": called.choices[0].finish_reason,
            "text": text.choices[0].text,
        }
    )
)
