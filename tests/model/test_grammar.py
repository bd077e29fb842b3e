"""An output under a grammar matches it, whatever the model wants; a grammar that cannot be kept is refused by name."""

import json
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import jsonschema
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from model.errors import Busy, CheckpointError, ConfigError, GrammarError, InvalidRequest
from model.sampling import grammar as grammar_module
from model.sampling.grammar import GrammarCompiler
from model.sampling.masks import GrammarState, apply_masks, fill_masks, new_bitmask
from model.sampling.params import GrammarSpec
from model.text.tokenizer import Tokenizer

BOS, EOS, TURN = 0, 1, 2
PADDING = 45  # ids that only the model has
MAX_TOKENS = 400

ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string", "minLength": 1, "maxLength": 12}, "zip": {"pattern": "^[0-9]{5}$"}},
    "required": ["street", "zip"],
    "additionalProperties": False,
}
SCHEMAS = {
    "nested objects": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "home": ADDRESS, "work": ADDRESS},
        "required": ["name", "home"],
        "additionalProperties": False,
    },
    "arrays with bounds": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "array of arrays": {
        "type": "array", "minItems": 1, "maxItems": 3,
        "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "enum of all types": {"enum": ["red", "green", 3, None, False, {"a": [1]}, "\u00e9t\u00e9 \U0001f40d"]},
    "integer range": {"type": "integer", "minimum": -17, "maximum": 1234},
    "open number range": {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
    "multiples": {"type": "integer", "multipleOf": 3, "minimum": 0},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}(-[0-9]+)?$"},
    "format": {"type": "object", "properties": {"ip": {"type": "string", "format": "ipv4"}}, "required": ["ip"]},
    "anyOf": {"anyOf": [ADDRESS, {"type": "null"}, {"type": "array", "items": ADDRESS, "maxItems": 1}]},
    "$ref and $defs": {
        "$defs": {"tree": {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "left": {"$ref": "#/$defs/tree"}},
            "required": ["value"], "additionalProperties": False,
        }},
        "$ref": "#/$defs/tree",
    },
    "tuple": {"type": "array", "prefixItems": [{"const": "v1"}, {"type": "number"}], "items": False, "minItems": 2},
    "open object": {"type": "object", "required": ["id"], "properties": {"id": {"type": ["string", "integer"]}}},
}  # fmt: skip
LARK = """
start: sum
sum: product ("+" product)*
product: atom ("*" atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of about 700 tokens, trained on JSON and on this file, so that tokens run across punctuation."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in ("<|bos|>", "<|eos|>", "<|turn|>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [json.dumps({"name": f"n{i}", "id": i, "list": [{"a": None}, True]}) for i in range(300)]
    tokenizer.train_from_iterator([*texts, *Path(__file__).read_text().splitlines()], trainer=trainer)
    path = tmp_path_factory.mktemp("bpe")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def compiler(directory: Path, tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler.from_directory(directory, tokenizer.vocab_size + PADDING, (EOS,))
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def closing(tokenizer: Tokenizer) -> torch.Tensor:
    """What to add to noise so that outputs end: a push for tokens that close something, a stronger one for EOS."""
    bias = torch.zeros(tokenizer.vocab_size + PADDING)
    bias[[i for i in range(tokenizer.vocab_size) if re.fullmatch(rb'[\]})"]+', tokenizer.token_bytes(i))]] = 6.0
    bias[EOS] = 9.0
    return bias


def noise(seed: int, bias: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits of a model without any sense: Gumbel noise, whose argmax is a draw from the softmax of `bias`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield bias - torch.rand(bias.shape, generator=generator).log().neg().log()


def allowed(state: GrammarState, vocab_size: int) -> torch.Tensor:
    bitmask = new_bitmask(1, vocab_size)
    assert fill_masks([state], bitmask) == {}
    return apply_masks(torch.zeros(1, vocab_size), bitmask)[0].isfinite()


def speak(state: GrammarState, logits: Iterator[torch.Tensor], said: Sequence[int] = ()) -> list[int]:
    """Sample under the grammar up to EOS, which is not part of the answer; without one in time, the test fails."""
    token_ids = list(said)
    while len(token_ids) < MAX_TOKENS:
        row = next(logits)
        token_id = int(row.masked_fill(~allowed(state, len(row)), -torch.inf).argmax())
        if token_id == EOS:
            return token_ids
        state.accept(token_id)
        token_ids.append(token_id)
    raise AssertionError("no end")


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_40_outputs_of_noise_are_all_valid_against_their_schema(name, compiler, tokenizer, closing):
    grammar = compiler.compile(GrammarSpec("json_schema", json.dumps(SCHEMAS[name])))
    validator = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    outputs = [tokenizer.decode(speak(grammar.start(), noise(seed, closing))) for seed in range(40)]
    assert [output for output in outputs if not validator.is_valid(json.loads(output))] == []
    assert len(set(outputs)) > 1


def test_json_objects_of_noise_all_parse(compiler, tokenizer, closing):
    grammar = compiler.compile(GrammarSpec("json_object"))
    outputs = [tokenizer.decode(speak(grammar.start(), noise(seed, closing))) for seed in range(20)]
    assert all(isinstance(json.loads(output), dict) for output in outputs)


@pytest.mark.parametrize("pattern", [r"[a-c]{2,5}\d+(x|yy)?", r"(/[^/\n]{1,3}){2}", r"\p{Lu}[^\x00-\x7f]{3}", "a|b"])
def test_outputs_match_the_whole_of_a_regex(pattern, compiler, tokenizer, closing):
    grammar = compiler.compile(GrammarSpec("regex", pattern))
    ours = re.compile(pattern.replace(r"\p{Lu}", r"[^\W\d_]"))
    outputs = [tokenizer.decode(speak(grammar.start(), noise(seed, closing))) for seed in range(20)]
    assert [output for output in outputs if not ours.fullmatch(output)] == []


def test_each_choice_can_be_made_and_nothing_else(compiler, tokenizer, closing):
    choices = ["yes", "yes and no", "no", 'a "quote" \\ /*', "line\nbreak", "caf\u00e9 \U0001f40d"]
    grammar = compiler.compile(GrammarSpec("choice", json.dumps(choices)))
    outputs = {tokenizer.decode(speak(grammar.start(), noise(seed, closing * 0.2))) for seed in range(200)}
    assert outputs == set(choices)


def test_outputs_of_a_lark_grammar_are_sums(compiler, tokenizer, closing):
    grammar = compiler.compile(GrammarSpec("lark", LARK))
    outputs = [tokenizer.decode(speak(grammar.start(), noise(seed, closing * 0.3))) for seed in range(60)]
    assert all(re.fullmatch(r"[0-9+*()]+", output) for output in outputs)
    assert all(eval(re.sub(r"\b0+(?=\d)", "", output)) >= 0 for output in outputs)
    assert any("(" in output and "+" in output for output in outputs)


def test_the_end_is_allowed_exactly_where_the_grammar_may_end(compiler, tokenizer):
    state = compiler.compile(GrammarSpec("regex", "(ab){1,2}")).start()
    ends = []
    for token_id in (
        *ids_of(tokenizer, "a"),
        *ids_of(tokenizer, "b"),
        *ids_of(tokenizer, "a"),
        *ids_of(tokenizer, "b"),
    ):
        ends.append((bool(allowed(state, compiler.vocab_size)[EOS]), state.finished))
        state.accept(token_id)
    assert ends == [(False, False), (False, False), (True, False), (False, False)]
    assert allowed(state, compiler.vocab_size).nonzero().flatten().tolist() == [EOS]
    assert state.finished


def test_every_end_of_sequence_token_of_the_model_may_end_an_output(directory, tokenizer):
    compiler = GrammarCompiler.from_directory(directory, tokenizer.vocab_size, (EOS, TURN))
    state = compiler.compile(GrammarSpec("regex", "a")).start(ids_of(tokenizer, "a"))
    compiler.close()
    assert allowed(state, compiler.vocab_size).nonzero().flatten().tolist() == [EOS, TURN]


def test_special_tokens_and_ids_beyond_the_tokenizer_are_never_allowed(compiler, tokenizer):
    state = compiler.compile(GrammarSpec("regex", r"(.|\n)*")).start()
    mask = allowed(state, compiler.vocab_size)
    assert mask[EOS]
    assert not mask[[BOS, TURN]].any()
    assert not mask[tokenizer.vocab_size :].any()
    assert mask[: tokenizer.vocab_size].sum() > 400


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_an_output_resumed_elsewhere_goes_on_as_if_uninterrupted(cut, compiler, closing):
    grammar = compiler.compile(GrammarSpec("json_schema", json.dumps(SCHEMAS["nested objects"])))
    whole = speak(grammar.start(), noise(7, closing))
    logits = noise(7, closing)
    for _ in range(cut):
        next(logits)
    assert len(whole) > cut
    assert speak(grammar.start(whole[:cut]), logits, whole[:cut]) == whole


def test_a_clone_goes_its_own_way(compiler, tokenizer):
    state = compiler.compile(GrammarSpec("regex", "ab|cd")).start()
    clone = state.clone()
    clone.accept(ids_of(tokenizer, "c")[0])
    state.accept(ids_of(tokenizer, "a")[0])
    assert allowed(clone, compiler.vocab_size).nonzero().flatten().tolist() == ids_of(tokenizer, "d")
    assert allowed(state, compiler.vocab_size).nonzero().flatten().tolist() == ids_of(tokenizer, "b")


def batch(compiler: GrammarCompiler) -> list[GrammarState | None]:
    schemas = [compiler.compile(GrammarSpec("json_schema", json.dumps(schema))).start() for schema in SCHEMAS.values()]
    return [None, *schemas, None, compiler.compile(GrammarSpec("lark", LARK)).start()]


def test_a_batch_is_filled_as_its_rows_are_alone(compiler):
    states = batch(compiler)
    together = new_bitmask(len(states), compiler.vocab_size)
    assert fill_masks(states, together) == {}
    for row, state in enumerate(states):
        alone = new_bitmask(1, compiler.vocab_size)
        fill_masks([state], alone)
        assert torch.equal(together[row], alone[0])
    assert (together[0] == -1).all()


def test_a_mask_left_from_the_last_step_is_overwritten(compiler):
    states = batch(compiler)
    fresh = new_bitmask(len(states), compiler.vocab_size)
    used = torch.full_like(fresh, 0x5A5A5A5A)
    fill_masks(states, fresh)
    fill_masks(states, used)
    assert torch.equal(used, fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_applied_bit_by_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    bitmask = torch.randint(-(1 << 31), 1 << 31, (3, 3), generator=generator).to(torch.int32)
    logits = torch.randn(3, 77, generator=generator).to(dtype)
    expected = logits.clone()
    for row in range(3):
        for token_id in range(77):
            if not bitmask[row, token_id // 32].item() >> (token_id % 32) & 1:
                expected[row, token_id] = -torch.inf
    assert torch.equal(apply_masks(logits, bitmask), expected)


@pytest.mark.parametrize("token_id", [TURN, -1, 1 << 40, 10_000])
def test_a_token_against_the_grammar_is_an_error_of_that_request(token_id, compiler):
    state = compiler.compile(GrammarSpec("regex", "ab")).start()
    with pytest.raises(GrammarError, match="cannot go on"):
        state.accept(token_id)


def test_a_row_whose_grammar_fails_is_named_and_spares_the_others(compiler, tokenizer):
    states = batch(compiler)
    expected = new_bitmask(len(states), compiler.vocab_size)
    fill_masks(states, expected)
    with pytest.raises(GrammarError):
        states[2].accept(TURN)
    bitmask = torch.empty_like(expected)
    errors = fill_masks(states, bitmask)
    assert list(errors) == [2]
    assert [row for row in range(len(states)) if not torch.equal(bitmask[row], expected[row])] == [2]


def test_a_crash_inside_the_library_is_one_request_s_and_no_other_s(compiler):
    states = batch(compiler)
    expected = new_bitmask(len(states), compiler.vocab_size)
    fill_masks(states, expected)
    states[2] = GrammarState(object())  # which the library's batch call refuses as a whole
    bitmask = torch.empty_like(expected)
    assert list(fill_masks(states, bitmask)) == [2]
    assert [row for row in range(len(states)) if not torch.equal(bitmask[row], expected[row])] == [2]


def deep(levels: int) -> str:
    return '{"items":' * levels + "{}" + "}" * levels


REFUSED = {
    "not JSON": ("json_schema", "{", "Expecting property name"),
    "not a schema": ("json_schema", "[1]", "must be an object or boolean"),
    "unknown type": ("json_schema", '{"type": "strng"}', "Invalid type: strng"),
    "broken pattern": ("json_schema", '{"pattern": "(("}', "unclosed group"),
    "unsupported keyword": ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    "unsupported keyword inside": ("json_schema", '{"properties": {"a": {"not": {}}}}', "not"),
    "unknown format": ("json_schema", '{"format": "bogus"}', "Unknown format: bogus"),
    "remote reference": ("json_schema", '{"$ref": "http://example.com/x.json"}', "does not fetch"),
    "empty range": ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "greater than maximum"),
    "endless recursion": ("json_schema", '{"$ref": "#"}', "no text matches it"),
    "settings of the library": ("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', "not"),
    "nested 5,000 deep": ("json_schema", deep(5_000), "nested too deeply"),
    "nested 200 deep": ("json_schema", deep(200), "recursion limit"),
    "nested 10,000 deep": ("json_schema", deep(10_000), "at most 65536"),
    "enum of 100,000": ("json_schema", json.dumps({"enum": list(range(100_000))}), "at most 65536"),
    "half a surrogate pair": ("regex", "\ud800", "surrogate"),
    "broken regex": ("regex", "a(", "unclosed group"),
    "look-ahead": ("regex", "(?=a)b", "look-around"),
    "regex without a match": ("regex", r"[^\s\S]", "no text matches it"),
    "nested groups": ("regex", "(" * 10_000 + "a" + ")" * 10_000, "nest"),
    "undefined rule": ("lark", "start: foo", "unknown name"),
    "no start": ("lark", 'a: "x"', "no start rule"),
    "doubling terminals": (
        "lark", "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(40)) + '\nR40: "x"', "too big"
    ),
    "no choices": ("choice", "[]", "at least one"),
    "choices that are no texts": ("choice", "[1]", "at least one"),
    "choice of half a character": ("choice", '["\\ud800"]', "hex escape"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_to_is_refused_with_its_reason(name, compiler):
    kind, source, why = REFUSED[name]
    spec = GrammarSpec(kind, source)
    with pytest.raises(InvalidRequest, match=re.escape(why)) as refusal:
        compiler.compile(spec)
    assert refusal.value.param == spec.param
    assert len(str(refusal.value)) < 600


def test_a_grammar_that_takes_too_long_is_given_up_and_the_next_one_compiles(compiler):
    patterns = {f"^a{i}.*b{i}[a-z]+$": {"type": "string"} for i in range(900)}
    with pytest.raises(InvalidRequest, match=r"over 0\.5 s"):
        compiler.compile(GrammarSpec("json_schema", json.dumps({"patternProperties": patterns})))
    compiler.compile(GrammarSpec("regex", "after a slow one"))


def test_a_grammar_that_others_keep_waiting_is_refused_for_now_and_not_for_what_it_is(compiler, monkeypatch):
    monkeypatch.setattr(grammar_module, "QUEUE_SECONDS", 0.01)
    with compiler._trials._lock, pytest.raises(Busy, match="too many other grammars"):
        compiler.compile(GrammarSpec("regex", "late"))
    compiler.compile(GrammarSpec("regex", "late"))


def test_a_grammar_that_overflows_the_stack_is_refused_and_the_next_one_compiles(compiler):
    chain = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(4_500)) + '\nr4500: "x"'
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        compiler.compile(GrammarSpec("lark", chain))
    compiler.compile(GrammarSpec("regex", "after a deep one"))


def test_keywords_unknown_to_json_schema_are_annotations(compiler, tokenizer):
    schema = json.dumps({"const": 7, "description": "seven", "x-order": 3})
    state = compiler.compile(GrammarSpec("json_schema", schema)).start(ids_of(tokenizer, "7"))
    assert allowed(state, compiler.vocab_size)[EOS]


def test_catastrophic_backtracking_costs_nothing_here(compiler, tokenizer):
    state = compiler.compile(GrammarSpec("regex", "(a+)+b")).start(ids_of(tokenizer, "a") * 500)
    state.accept(ids_of(tokenizer, "b")[0])
    assert state.finished


def test_white_space_between_json_tokens_is_bounded(compiler, tokenizer):
    state = compiler.compile(GrammarSpec("json_object")).start(ids_of(tokenizer, "{"))
    space = ids_of(tokenizer, "\n")[0]
    for _ in range(32):
        state.accept(space)
    assert not allowed(state, compiler.vocab_size)[space]


def test_a_grammar_is_compiled_once_for_equal_specs(compiler):
    spec = GrammarSpec("regex", "once")
    assert compiler.compile(spec) is compiler.compile(GrammarSpec("regex", "once"))
    assert compiler.compile(spec) is not compiler.compile(GrammarSpec("choice", '["once"]'))


def test_the_cache_forgets_what_was_not_asked_for_lately(compiler, monkeypatch):
    monkeypatch.setattr(grammar_module, "MAX_CACHED", 2)
    monkeypatch.setattr(compiler, "_cached", OrderedDict())
    x, y, again, z = (compiler.compile(GrammarSpec("regex", text)) for text in "xyxz")
    assert again is x
    assert compiler.compile(GrammarSpec("regex", "x")) is x
    assert compiler.compile(GrammarSpec("regex", "z")) is z
    assert compiler.compile(GrammarSpec("regex", "y")) is not y


def test_without_an_end_of_sequence_token_there_is_no_structured_output(directory):
    with pytest.raises(ConfigError, match="end-of-sequence"):
        GrammarCompiler.from_directory(directory, 1_000, ())


@pytest.mark.parametrize(("vocab_size", "content"), [(100, None), (1_000, "{}")], ids=["vocabulary", "file"])
def test_an_unusable_tokenizer_is_named(vocab_size, content, directory, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content or (directory / "tokenizer.json").read_text())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        GrammarCompiler.from_directory(tmp_path, vocab_size, (EOS,))


@pytest.mark.slow
def test_the_model_imports_without_the_library(directory):
    code = (
        "import sys, pathlib; sys.modules['llguidance'] = None\n"
        "from model.errors import ConfigError; from model.sampling.grammar import GrammarCompiler\n"
        "try: GrammarCompiler.from_directory(pathlib.Path(sys.argv[1]), 1000, (1,))\n"
        "except ConfigError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True)
    assert "llguidance, which is not installed" in result.stdout
