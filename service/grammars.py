"""Compiles the grammars that requests bring, off the event loop, before the requests reach the engine."""

import asyncio
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import CheckpointError, ConfigError, InvalidRequest
from model.sampling.params import GrammarSpec
from service.channel import Submission

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.sampling.grammar import Grammar, GrammarCompiler


class Grammars:
    """Of one model. The compiler is made for the first who needs it: it brings a process of its own.

    waiting: the requests whose grammars are being compiled; the engine does not know them yet.
    """

    def __init__(self, directory: Path, config: "ModelConfig") -> None:
        self.waiting: set[str] = set()
        self._directory = directory
        self._config = config
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()

    async def compile(self, submissions: list[Submission]) -> "tuple[list[Submission], dict[GrammarSpec, Grammar]]":
        """The grammars that `submissions` need, and those submissions that were not withdrawn meanwhile.

        Raises `InvalidRequest` for a grammar that cannot be compiled, and `Busy` where too many are being compiled.
        """
        specs = {submission.work.grammar for submission in submissions if submission.work.grammar is not None}
        if not specs:
            return submissions, {}
        request_ids = {submission.request_id for submission in submissions}
        self.waiting |= request_ids
        try:
            grammars = {spec: await asyncio.to_thread(self._compile_one, spec) for spec in specs}
            return [submission for submission in submissions if submission.request_id in self.waiting], grammars
        finally:
            self.waiting -= request_ids

    def withdraw(self, request_ids: Iterable[str]) -> None:
        """Nobody wants these any more."""
        self.waiting.difference_update(request_ids)

    def close(self) -> None:
        """End the compiler's process."""
        if self._compiler is not None:
            self._compiler.close()

    def _compile_one(self, spec: GrammarSpec) -> "Grammar":
        from model.sampling.grammar import GrammarCompiler

        with self._lock:
            if self._compiler is None:
                try:
                    self._compiler = GrammarCompiler.from_directory(
                        self._directory, self._config.vocab_size, self._config.eos_token_ids
                    )
                except (CheckpointError, ConfigError) as error:
                    raise InvalidRequest(f"not with this model: {error}", param=spec.param) from error
        return self._compiler.compile(spec)
