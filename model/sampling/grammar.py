"""Structured output: from what a client asks for to a grammar that an output is held to. Not for the engine's thread.

The library is llguidance (docs/decisions/0003). It is imported only when a compiler is made: a machine without it runs
everything else. A client's grammar is hostile until it has been tried in another process (`model.sampling.trial`).
"""

import json
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import Busy, CheckpointError, ConfigError, InvalidRequest
from model.sampling import trial
from model.sampling.masks import GrammarState
from model.sampling.params import GrammarSpec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SOURCE_BYTES = 1 << 16
MAX_CACHED = 128  # compiled grammars
QUEUE_SECONDS = 1.0  # how long a grammar may wait for others to be tried

# Bounded, because nothing else makes a model end a run of spaces; 32 indents pretty-printed JSON eight levels deep.
WHITESPACE = r"[ \n\r\t]{1,32}"


class Grammar:
    """A compiled grammar. Immutable: any thread may start any number of outputs from it."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def start(self, token_ids: Sequence[int] = ()) -> GrammarState:
        """A new output, or one that has said `token_ids` elsewhere. Raises `GrammarError` if it could not have."""
        state = GrammarState(self._matcher.deep_copy())
        for token_id in token_ids:
            state.accept(token_id)
        return state


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and remembers the last of them.

    Thread-safe. It waits while it compiles, so the engine's thread is not the one to call it.
    """

    def __init__(self, tokenizer: "LLTokenizer", trials: "TrialProcess") -> None:
        self.vocab_size = tokenizer.vocab_size
        self._tokenizer = tokenizer
        self._trials = trials
        self._cached: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._lock = threading.Lock()  # of the cache

    @classmethod
    def from_directory(cls, directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> "GrammarCompiler":
        """Read `tokenizer.json`.

        vocab_size: the model's. Ids that only the model has are never allowed.
        eos_token_ids: allowed exactly where an output may end.
        Raises `CheckpointError` for the file, `ConfigError` without the library or where no output could ever end.
        """
        if not eos_token_ids:
            raise ConfigError("structured output needs an end-of-sequence token, and this model has none")
        file = directory / "tokenizer.json"
        try:
            tokenizer = trial.load_tokenizer(file, vocab_size, list(eos_token_ids))
        except ImportError as error:
            raise ConfigError("structured output needs the package llguidance, which is not installed") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: no grammar can be written over it: {error}") from error
        return cls(tokenizer, TrialProcess([str(file), str(vocab_size), *map(str, eos_token_ids)]))

    def compile(self, spec: GrammarSpec) -> Grammar:
        """The grammar of a spec, from the cache if it has been asked for lately.

        A trial takes `TRIAL_SECONDS` at most, and what passes is compiled again in about the same time. Raises
        `InvalidRequest` with the reason: malformed, too large, too costly, without any match, or a JSON Schema keyword
        that cannot be enforced. Keywords that JSON Schema does not know are annotations, as its specification has it.
        Raises `Busy` where others keep it waiting.
        """
        with self._lock:
            if spec in self._cached:
                self._cached.move_to_end(spec)
                return self._cached[spec]
        source = to_library(spec)
        if reason := self._trials.run(source):
            raise refusal(spec, reason)
        grammar = Grammar(trial.build_matcher(self._tokenizer, source))
        with self._lock:
            self._cached[spec] = grammar
            if len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)
        return grammar

    def close(self) -> None:
        """End the process that tries grammars. Nothing can be compiled any more."""
        self._trials.close()


class TrialProcess:
    """The process that tries grammars, one at a time. When one kills it, the next process is started."""

    def __init__(self, arguments: list[str]) -> None:
        # By its path, and that path not importable from: the process sees what this one has installed, and no more.
        self._command = [sys.executable, "-P", trial.__file__, *arguments]
        self._lock = threading.Lock()
        self._process = self._start()

    def run(self, grammar: str) -> str:
        """The reason against a grammar, empty if there is none. Raises `Busy` when the others do not come to an end."""
        if not self._lock.acquire(timeout=QUEUE_SECONDS):
            raise Busy("too many other grammars and schemas are being compiled; try again in a moment")
        try:
            answer = self._ask(json.dumps(grammar))
            if answer:
                verdict: str = json.loads(answer)
                return verdict
            status = self._process.wait()
            self._process = self._start()
            return f"it takes over {trial.TRIAL_SECONDS} s" if status == -signal.SIGALRM else "it is nested too deeply"
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._process.kill()
            self._process.communicate()

    def _start(self) -> "subprocess.Popen[str]":
        self._ready = False
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _ask(self, line: str) -> str:
        """The process's answer, empty if it dies instead."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            if not self._ready:
                self._ready = bool(stdout.readline())
            stdin.write(line + "\n")
            stdin.flush()
        except BrokenPipeError:
            return ""
        return stdout.readline()


def to_library(spec: GrammarSpec) -> str:
    """The spec as the library takes it. Raises `InvalidRequest` for what is too large or not the JSON it should be."""
    try:
        size = len(spec.source.encode())
    except UnicodeEncodeError as error:
        raise refusal(spec, "it holds half a surrogate pair, which is no character") from error
    if size > MAX_SOURCE_BYTES:
        raise refusal(spec, f"it has {size} bytes, and at most {MAX_SOURCE_BYTES} are allowed")
    try:
        match spec.kind:
            case "json_object":
                grammar = _json_schema({"type": "object"})
            case "json_schema":
                grammar = _json_schema(json.loads(spec.source))
            case "choice":
                grammar = {"lark_grammar": f"start: CHOICE\nCHOICE: {_alternatives(json.loads(spec.source))}"}
            case "regex":
                from llguidance import LLMatcher  # it escapes what would end a regular expression inside Lark

                return LLMatcher.grammar_from_regex(spec.source)
            case "lark":
                grammar = {"lark_grammar": spec.source}
        return json.dumps({"grammars": [grammar]})
    except RecursionError as error:
        raise refusal(spec, "it is nested too deeply") from error
    except ValueError as error:
        raise refusal(spec, str(error)) from error


def refusal(spec: GrammarSpec, why: str) -> InvalidRequest:
    """The error for a spec that cannot be compiled."""
    return InvalidRequest(f"this {spec.kind} cannot be compiled: {why}", param=spec.param)


def _json_schema(schema: object) -> dict[str, object]:
    if isinstance(schema, dict):
        # Under this key the library takes settings from the schema itself. They are ours to make, not the client's.
        schema = schema | {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    return {"json_schema": schema}


def _alternatives(choices: object) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("it must be a list of at least one text")
    return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
