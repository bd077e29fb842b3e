"""`attendant generate`: one request, on an engine in this process without Ray, or on a running service."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.errors import CheckpointError
from model.sampling.params import SamplingParams
from model.text.detokenize import Detokenizer
from model.text.tokenizer import Tokenizer
from service.client import Client, Pace


class Job:
    """One engine, one request. `result` says what became of it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._finish_reason: str | None = None

    @classmethod
    def load(cls, directory: Path, config: EngineConfig, *, needs_text: bool) -> Self:
        """Load a model. With token ids in, a directory without a tokenizer will do: then there is no text.

        Raises `CheckpointError` and `ConfigError`.
        """
        try:
            tokenizer = Tokenizer.from_directory(directory)
        except CheckpointError:
            if needs_text or (directory / "tokenizer.json").exists():
                raise
            tokenizer = None
        return cls(Engine.from_checkpoint(directory, config), tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        assert self._tokenizer is not None, "loaded with needs_text"
        return self._tokenizer.encode(text)

    def run(
        self, prompt_ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int | None, ignore_eos: bool
    ) -> Iterator[str]:
        """Yield the text as it comes. A completion that would leave the context ends there, with `length`."""
        room = max(1, self._engine.max_model_len - len(prompt_ids))
        params = SamplingParams(
            max_tokens=min(max_tokens, room),
            temperature=temperature,
            seed=secrets.randbits(63) if seed is None else seed,
            ignore_eos=ignore_eos,
        )
        self._num_prompt_tokens = len(prompt_ids)
        detokenizer = Detokenizer(self._tokenizer) if self._tokenizer is not None else None
        for output in self._engine.generate(Request("generate", prompt_ids, params)):
            self._token_ids += output.token_ids
            self._num_cached_tokens = output.num_cached_tokens
            self._finish_reason = output.finish_reason
            if detokenizer is not None:
                yield self._keep(detokenizer.feed(output.token_ids))
        if detokenizer is not None:
            yield self._keep(detokenizer.flush())

    def result(self) -> dict[str, object]:
        """One object: `token_ids`, `text` (None without a tokenizer), `finish_reason`, `usage`."""
        return {
            "token_ids": self._token_ids,
            "text": "".join(self._texts) if self._tokenizer is not None else None,
            "finish_reason": self._finish_reason,
            "usage": {
                "prompt_tokens": self._num_prompt_tokens,
                "completion_tokens": len(self._token_ids),
                "total_tokens": self._num_prompt_tokens + len(self._token_ids),
                "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens},
            },
        }

    def _keep(self, text: str) -> str:
        self._texts.append(text)
        return text


class Remote:
    """One request to a running service. `result` says what became of it, `pace` how fast."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.pace = Pace()
        self._client = Client(url, api_key)
        self._texts: list[str] = []

    def run(self, prompt: str | Sequence[int] | None, fields: Mapping[str, object]) -> Iterator[str]:
        """Yield the text as it comes. Raises `RequestFailed`."""
        body = {"prompt": prompt} | {name: value for name, value in fields.items() if value is not None}
        with self._client:
            for text in self._client.complete(body, self.pace):
                self._texts.append(text)
                yield text

    def result(self) -> dict[str, object]:
        """One object: `text`, `finish_reason`, `usage`."""
        return {"text": "".join(self._texts), "finish_reason": self.pace.finish_reason, "usage": self.pace.usage}
