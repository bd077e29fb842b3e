"""Structured output through the engine: valid every time, and untouched by batching, guessing and preemption."""

import json

import jsonschema
import pytest

from model.config import EngineConfig
from model.engine.engine import Engine
from model.engine.request import Request
from model.errors import GrammarError, InvalidRequest
from model.sampling.grammar import Grammar, GrammarCompiler
from model.sampling.params import GrammarSpec, SamplingParams
from model.text.tokenizer import Tokenizer
from tests.model.test_engine import run

SCHEMAS = [
    {
        "type": "object",
        "properties": {
            "hero": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "friends": {"type": "array", "items": {"enum": ["fox", "bear", "owl"]}, "maxItems": 3},
        },
        "required": ["hero", "age", "friends"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 5},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-z]{2,6}$"}]},
    {
        "type": "object",
        "properties": {"place": {"const": "the old mill"}, "far": {"type": "boolean"}},
        "required": ["place"],
        "additionalProperties": False,
    },
]


@pytest.fixture(scope="module")
def tokenizer(storyteller) -> Tokenizer:
    return Tokenizer.from_directory(storyteller)


@pytest.fixture(scope="module")
def grammars(storyteller) -> list[Grammar]:
    config = Engine.from_checkpoint(storyteller, EngineConfig(kv_cache_tokens=1024)).model_config
    compiler = GrammarCompiler.from_directory(storyteller, config.vocab_size, config.eos_token_ids)
    yield [compiler.compile(GrammarSpec("json_schema", json.dumps(schema))) for schema in SCHEMAS]
    compiler.close()


def requests(tokenizer: Tokenizer, grammars: list[Grammar], count: int, max_tokens: int = 300) -> list[Request]:
    prompt = tokenizer.encode("Once upon a time there was")
    return [
        Request(
            str(i),
            prompt,
            SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=i),
            grammar=grammars[i % len(grammars)],
        )
        for i in range(count)
    ]


@pytest.mark.slow
def test_500_outputs_at_temperature_1_are_all_valid(storyteller, tokenizer, grammars):
    engine = Engine.from_checkpoint(storyteller, EngineConfig(max_num_seqs=64))
    said = run(engine, requests(tokenizer, grammars, 500))
    seen = set()
    for name, token_ids in said.items():
        text = tokenizer.decode(token_ids)
        seen.add(text)
        jsonschema.validate(json.loads(text), SCHEMAS[int(name) % len(SCHEMAS)])
    assert len(said) == 500
    assert len(seen) > 200  # a sampler that always says the same would be valid too


def test_guesses_and_preemption_change_nothing(storyteller, tokenizer, grammars):
    def said(**config) -> tuple[dict[str, list[int]], Engine]:
        engine = Engine.from_checkpoint(storyteller, EngineConfig(deterministic=True, **config))
        return run(engine, requests(tokenizer, grammars, 6, max_tokens=60)), engine

    plain, _ = said(max_num_seqs=1)
    guessed, guessing = said(max_num_seqs=4, speculative_tokens=3)
    tight, preempting = said(max_num_seqs=6, kv_cache_tokens=96, max_model_len=96, block_size=8)
    assert guessed == tight == plain
    assert guessing.stats.num_drafted > 0
    assert preempting.stats.num_preemptions > 0


def test_an_output_resumes_elsewhere_under_its_grammar(storyteller, tokenizer, grammars):
    (request,) = requests(tokenizer, grammars, 1)
    prompt = list(request.token_ids)
    (whole,) = run(Engine.from_checkpoint(storyteller, EngineConfig()), [request]).values()
    resumed = Request("0", prompt, request.params, output_ids=whole[:5], grammar=grammars[0])
    assert run(Engine.from_checkpoint(storyteller, EngineConfig()), [resumed])["0"] == whole[5:]


def test_neighbours_without_a_grammar_say_what_they_say_alone(storyteller, tokenizer, grammars):
    def free() -> Request:
        return Request("free", tokenizer.encode("Once"), SamplingParams(max_tokens=30, seed=5, ignore_eos=True))

    alone = run(Engine.from_checkpoint(storyteller, EngineConfig(deterministic=True)), [free()])["free"]
    engine = Engine.from_checkpoint(storyteller, EngineConfig(deterministic=True))
    assert run(engine, [*requests(tokenizer, grammars, 3), free()])["free"] == alone


def test_what_contradicts_a_grammar_is_refused_at_the_door(grammars, tokenizer):
    for fields in ({"ignore_eos": True}, {"min_tokens": 2}):
        with pytest.raises(InvalidRequest, match="contradicts the grammar"):
            Request("a", [5], SamplingParams(max_tokens=9, **fields), grammar=grammars[0])
    with pytest.raises(GrammarError):
        Request("a", [5], SamplingParams(max_tokens=9), grammar=grammars[1], output_ids=tokenizer.encode("fox"))
