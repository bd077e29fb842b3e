"""S6: hostile schemas and regular expressions, among valid ones: each is refused or compiled, none kills the engine."""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.errors import InvalidRequest
from model.sampling.grammar import GrammarCompiler
from model.sampling.params import GrammarSpec
from tests.conftest import STORYTELLER
from tests.faults.conftest import scaled

pytestmark = pytest.mark.faults

STALL_LIMIT_S = 0.050
COMPILE_LIMIT_S = 1.0  # of the process that has the engine


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def chain_of_references(length: int) -> dict[str, Any]:
    definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {"type": "string"}}}


def schema(value: object) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(value))


HOSTILE = [
    schema({"type": "object", "patternProperties": {f"^(a|b|c){{{i}}}x*$": {"type": "string"} for i in range(400)}}),
    schema(chain_of_references(2000)),
    schema(nested(400)),
    schema({"$ref": "#"}),
    schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    schema({"allOf": [{"anyOf": [{"const": f"{i}-{j}"} for j in range(40)]} for i in range(40)]}),
    schema({"enum": [str(i) * 50 for i in range(1000)]}),
    schema({"type": "string", "minLength": 10**9}),
    schema({"type": "array", "minItems": 10**6, "items": nested(5)}),
    schema({"type": "number", "minimum": 1e308, "multipleOf": 1e-300}),
    schema({"type": 3}),
    schema([1, 2]),
    GrammarSpec("json_schema", "{"),
    GrammarSpec("json_schema", "[" * 60_000),
    GrammarSpec("regex", "(a{1,30000}){1,30000}"),
    GrammarSpec("regex", "(" * 5_000 + ")" * 5_000),
    GrammarSpec("regex", "(x+x+)+y" * 500),
    GrammarSpec("regex", "[" + "\\u{10000}-\\u{10ffff}" * 1000 + "]"),
    GrammarSpec("regex", "(?=a)b"),
    GrammarSpec("regex", "(unbalanced"),
    GrammarSpec("regex", "\ud800"),
    GrammarSpec("lark", "start: start start | start"),
    GrammarSpec("lark", "start: " + "(" * 3_000 + '"a"' + ")" * 3_000),
    GrammarSpec("lark", "start: nothing"),
    GrammarSpec("lark", '%import common.ESCAPED_STRING\nstart: ESCAPED_STRING{"a"}'),
    GrammarSpec("choice", "[]"),
    GrammarSpec("choice", '["a", 1]'),
    GrammarSpec("choice", json.dumps(["\x00" * 100] * 100)),
]
VALID = schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})


@pytest.fixture
def compiler() -> Iterator[GrammarCompiler]:
    config = json.loads((STORYTELLER / "config.json").read_text())
    made = GrammarCompiler.from_directory(Path(STORYTELLER), config["vocab_size"], [config["eos_token_id"]])
    yield made
    made.close()


async def test_hostile_grammars_are_refused_or_compiled_while_the_loop_goes_on(compiler: GrammarCompiler) -> None:
    """Compiled where they are used, without a trial elsewhere, the first takes 16 s."""
    rng = random.Random(6)
    for spec in (HOSTILE * scaled(1, 20))[: scaled(28, 500)]:
        stall, work, outcome = await compile_beside_the_loop(
            compiler, mutated(spec, rng) if rng.random() < 0.3 else spec
        )
        assert stall < STALL_LIMIT_S, f"{spec.kind} {spec.source[:60]}: the loop stood still for {stall:.3f} s"
        assert work < COMPILE_LIMIT_S, f"{spec.kind} {spec.source[:60]}: {work:.3f} s to compile"
        assert outcome is None or isinstance(outcome, InvalidRequest), repr(outcome)
        compiler.compile(VALID).start()


def mutated(spec: GrammarSpec, rng: random.Random) -> GrammarSpec:
    at = rng.randrange(len(spec.source) + 1)
    return GrammarSpec(
        spec.kind, spec.source[:at] + rng.choice(["", "{", '"', "\\", "(", "\n"]) + spec.source[at + 1 :]
    )


async def compile_beside_the_loop(
    compiler: GrammarCompiler, spec: GrammarSpec
) -> tuple[float, float, Exception | None]:
    """Processor time of the loop's own thread between two turns at most, that of the process, and what was refused."""
    started = time.process_time()
    compiling, stall = asyncio.create_task(asyncio.to_thread(compiler.compile, spec)), 0.0
    while not compiling.done():
        before = time.thread_time()
        await asyncio.sleep(0.001)
        stall = max(stall, time.thread_time() - before)
    return stall, time.process_time() - started, compiling.exception()  # type: ignore[return-value]
