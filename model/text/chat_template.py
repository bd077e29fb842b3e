"""A chat as the text that the model was trained on: the checkpoint's own Jinja template, in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import CheckpointError, InvalidRequest


class ChatTemplate:
    """The template of a checkpoint and the special tokens that it may name.

    source: as the checkpoint has it.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)
        self.source = source

    @classmethod
    def from_directory(cls, directory: Path) -> "ChatTemplate | None":
        """From `chat_template.jinja`, else from `tokenizer_config.json`; None where neither has one.

        Raises `CheckpointError` for a template that does not compile.
        """
        config: dict[str, Any] = {}
        config_file, template_file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        try:
            if config_file.exists():
                config = json.loads(config_file.read_text(encoding="utf-8"))
            source = template_file.read_text(encoding="utf-8") if template_file.exists() else _default_of(config)
            if source is None:
                return None
            return cls(source, _special_tokens(config))
        except (OSError, ValueError, TemplateError) as error:
            raise CheckpointError(f"{directory}: the chat template cannot be used: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt of a chat, with `tools` for the assistant to know of in OpenAI's form.

        Raises `InvalidRequest` where the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except InvalidRequest:
            raise
        except Exception as error:  # a template is a program of the checkpoint's: it may fail in any way
            raise InvalidRequest(
                f"the model's chat template cannot render these messages: {error}", param="messages"
            ) from error


def _refuse(message: str) -> NoReturn:
    raise InvalidRequest(f"the model's chat template refuses these messages: {message}", param="messages")


def _default_of(config: Mapping[str, Any]) -> str | None:
    """The template in a `tokenizer_config.json`: one string, or a list of named ones."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like: written as a string, or as an object with its `content`."""
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        if value is not None:
            tokens[name] = value["content"] if isinstance(value, dict) else value
    return tokens
