"""A chat as the text that the model was trained on: the checkpoint's own Jinja template, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.errors import CheckpointError, InvalidRequest
from model.text.render import MEMORY_BYTES, RENDER_SECONDS


class ChatTemplate:
    """The template of a checkpoint and the special tokens that it may name. Any thread may use it.

    source: as the checkpoint has it.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

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
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: the chat template cannot be used: {error}") from error
        if source is None:
            return None
        template = cls(source, _special_tokens(config))
        if reason := template.check():
            template.close()
            raise CheckpointError(f"{directory}: the chat template cannot be used: {reason}")
        return template

    def check(self) -> str:
        """Why the template does not compile; empty if it does."""
        with self._lock:
            return self._start()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt of a chat, with `tools` for the assistant to know of in OpenAI's form. It waits for the process.

        Raises `InvalidRequest` where the template refuses the messages, fails on them or takes too long over them.
        """
        chat = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        with self._lock:
            reason = self._start() if self._process is None else ""
            answer = {"failed": reason} if reason else self._ask(json.dumps(chat))
        if "refused" in answer:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {answer['refused']}", param="messages"
            )
        if "failed" in answer:
            raise InvalidRequest(
                f"the model's chat template cannot render these messages: {answer['failed']}", param="messages"
            )
        return answer["text"]

    def close(self) -> None:
        """End the process. The next chat starts another."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> str:
        # It sees what this process can import, and not the directory that happens to be the current one.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "model.text.render"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
        )
        reason = self._ask(json.dumps([self.source, self._special_tokens])).get("failed", "")
        if reason:
            self._end()
        return reason

    def _ask(self, line: str) -> dict[str, str]:
        """The process's answer. If it dies instead, the reason; the next one to ask starts another."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            if text := process.stdout.readline():
                answer: dict[str, str] = json.loads(text)
                return answer
        except BrokenPipeError:
            pass
        self._process = None
        process.stdout.close()
        if process.wait() == -signal.SIGPROF:
            return {"failed": f"it takes over {RENDER_SECONDS:g} s"}
        return {"failed": f"its process died; it may take {MEMORY_BYTES >> 20} MiB and {RENDER_SECONDS:g} s"}


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
