"""Attention weights that a request asks to see: those of `transformers`, and of the equations, in any company."""

import pytest
import torch

from model.attention.inspect import Inspection
from model.attention.weights import AttentionRequest, TokenAttention
from model.checkpoint import save_checkpoint
from model.config import EngineConfig
from model.decoder import Decoder
from model.engine.engine import Engine
from model.engine.request import Request
from model.errors import InvalidRequest
from model.sampling.params import SamplingParams
from tests.attention.oracle import config, naive_decoder, randomize
from tests.attention.test_served import GREEDY, KINDS, prompt
from tests.model.test_engine import run
from tests.parity.models import write

KINDS_OF_ALL = "multiplicative, biases, window, sink tokens, learned sinks"
EVERYWHERE = AttentionRequest(layers=(0, 1, 2), heads=(0, 1, 2, 3))
# Blocks of 4 tokens, chunks of 16: every prompt is divided over both.
SMALL = {"block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 8}

Shown = list[tuple[int, TokenAttention]]


def look(engine: Engine, requests: list[Request]) -> dict[str, Shown]:
    """Run requests together; for each its tokens, each with the weights it came with."""
    found: dict[str, Shown] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += zip(output.token_ids, output.attention or [[]], strict=True)
    return found


def assert_rows(shown: Shown, start: int, expected: list[torch.Tensor], atol: float = 1e-4) -> None:
    """expected: of each layer [num_heads, num_tokens, num_tokens]; the first token shown was chosen by row `start`."""
    for row, (_, token) in enumerate(shown, start):
        assert token, "nothing was shown"
        for layer, head, positions, weights in token:
            assert positions == list(range(row + 1))
            torch.testing.assert_close(
                torch.tensor(weights, dtype=torch.float64),
                expected[layer][head, row, : row + 1].double(),
                atol=atol,
                rtol=0,
            )


@pytest.fixture(scope="module")
def additive(tmp_path_factory):
    """A random decoder with additive scores, a window and sinks; and its directory."""
    directory = tmp_path_factory.mktemp("additive")
    decoder = Decoder(config(**KINDS["additive, biases, soft cap, window, sink tokens, learned sinks"]))
    randomize(decoder, torch.Generator().manual_seed(0), std=0.2)
    save_checkpoint(decoder, directory, torch.float32)
    return decoder, directory


@pytest.mark.parametrize(
    "case", ["llama", "mistral, window", "gemma2", "gemma3", "qwen3", "phi3", "gpt2", "smollm3", "olmo2"]
)
def test_weights_are_those_of_transformers_for_every_token_in_a_mixed_batch(tmp_path, case):
    theirs = write(case, tmp_path)
    engine = Engine.from_checkpoint(tmp_path, EngineConfig(**SMALL))
    ids, neighbour = prompt(37), prompt(21, seed=1)
    asked = AttentionRequest(layers=(3, 0, 1, 2), heads=(2, 0, 3, 1))
    found = look(
        engine,
        [
            Request("asks", ids, GREEDY, attention=asked),
            Request("does not", neighbour, GREEDY),
            Request("asks too", [*ids[:20], *neighbour], GREEDY, attention=AttentionRequest((1,), (3,))),
        ],
    )
    assert all(token == [] for _, token in found["does not"])
    for name, start in (("asks", ids), ("asks too", [*ids[:20], *neighbour])):
        written = [token_id for token_id, _ in found[name]]
        assert len(written) == GREEDY.max_tokens
        with torch.no_grad():
            attentions = theirs(torch.tensor([[*start, *written]]), output_attentions=True).attentions
        assert_rows(found[name], len(start) - 1, [layer[0] for layer in attentions])
    assert [(layer, head) for layer, head, *_ in found["asks"][0][1]] == [
        (layer, head) for layer in asked.layers for head in asked.heads
    ]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_weights_of_every_kind_are_those_of_the_equations(tmp_path, kind):
    decoder = Decoder(config(**kind)).requires_grad_(False)
    randomize(decoder, torch.Generator().manual_seed(0), std=0.2)
    save_checkpoint(decoder, tmp_path, torch.float32)
    ids = prompt(26)
    engine = Engine.from_checkpoint(tmp_path, EngineConfig(**SMALL))
    some = AttentionRequest(layers=(2, 0, 1), heads=(3, 1, 2))
    shown = look(engine, [Request("a", ids, GREEDY, attention=some)])["a"]
    _, expected = naive_decoder(decoder, [*ids, *(token_id for token_id, _ in shown)])
    assert_rows(shown, 25, expected)


def test_a_prefix_hit_shows_what_a_cold_cache_shows(additive):
    decoder, directory = additive
    engine = Engine.from_checkpoint(directory, EngineConfig(**SMALL))
    ids = prompt(30)
    run(engine, [Request("first", ids, GREEDY)])
    shown = look(engine, [Request("again", ids, GREEDY, attention=EVERYWHERE)])["again"]
    assert engine.stats.prefix_hits == 28
    _, expected = naive_decoder(decoder, [*ids, *(token_id for token_id, _ in shown)])
    assert_rows(shown, 29, expected)


def asking(count: int) -> list[Request]:
    return [
        Request(
            str(i), prompt(9 + 7 * i, seed=i), SamplingParams(max_tokens=14, seed=i, ignore_eos=True),
            attention=EVERYWHERE,
        )
        for i in range(count)
    ]  # fmt: skip


def test_in_deterministic_mode_weights_have_the_same_bits_alone_batched_and_preempted(additive):
    _, directory = additive
    alone = {}
    for request in asking(5):
        engine = Engine.from_checkpoint(directory, EngineConfig(**SMALL, deterministic=True, prefix_cache=False))
        alone |= look(engine, [request])
    tight = Engine.from_checkpoint(directory, EngineConfig(**SMALL, deterministic=True, kv_cache_tokens=64))
    assert look(tight, asking(5)) == alone
    assert tight.stats.num_preemptions > 0


@pytest.fixture(scope="module", params=["learned sinks, soft cap", KINDS_OF_ALL])
def folded(request, tmp_path_factory):
    """A random decoder that the native step can compute, and its directory."""
    directory = tmp_path_factory.mktemp("folded")
    decoder = Decoder(config(**KINDS[request.param])).requires_grad_(False)
    randomize(decoder, torch.Generator().manual_seed(0), std=0.2)
    save_checkpoint(decoder, directory, torch.float32)
    return decoder, directory


@pytest.mark.parametrize(("dtype", "cache"), [("bf16", "auto"), ("int8", "auto"), ("bf16", "int8")])
def test_native_kernels_show_the_same_as_the_equations_as_far_as_they_round(folded, dtype, cache):
    decoder, directory = folded
    options = EngineConfig(**SMALL, dtype=dtype, kernels="native", kv_cache_dtype=cache)
    engine = Engine.from_checkpoint(directory, options)
    found = look(engine, asking(4))
    for request in asking(4):
        shown = found[request.request_id]
        _, expected = naive_decoder(decoder, [*request.token_ids, *(token_id for token_id, _ in shown)])
        assert_rows(shown, request.num_tokens - 1, expected, atol=0.12 if dtype == "int8" else 0.06)


def test_native_kernels_show_the_same_bits_alone_batched_preempted_and_guessed_ahead(folded):
    _, directory = folded
    alone = {}
    for request in asking(5):
        engine = Engine.from_checkpoint(directory, EngineConfig(**SMALL, dtype="bf16", kernels="native"))
        alone |= look(engine, [request])
    tight = EngineConfig(**SMALL, dtype="bf16", kernels="native", kv_cache_tokens=64, speculative_tokens=2)
    engine = Engine.from_checkpoint(directory, tight)
    assert look(engine, asking(5)) == alone
    assert engine.stats.num_preemptions > 0


def test_guessing_ahead_shows_the_weights_of_the_tokens_that_stand(additive):
    decoder, directory = additive
    # Of three words only, so that there is something to guess from, and drawn, so that some guesses are wrong.
    words = dict.fromkeys((5, 6, 7), 100.0)
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True, logit_bias=words)
    engine = Engine.from_checkpoint(directory, EngineConfig(**SMALL, speculative_tokens=3))
    shown = look(engine, [Request("a", prompt(9), params, attention=EVERYWHERE)])["a"]
    assert engine.stats.num_drafted > engine.stats.num_accepted > 0
    assert len(shown) == 40
    _, expected = naive_decoder(decoder, [*prompt(9), *(token_id for token_id, _ in shown)])
    assert_rows(shown, 8, expected)


def test_a_request_that_moved_shows_what_it_would_have_shown(additive):
    _, directory = additive
    (request,) = asking(1)
    ids = list(request.token_ids)
    whole = look(Engine.from_checkpoint(directory, EngineConfig(**SMALL, deterministic=True)), [request])["0"]
    said = [token_id for token_id, _ in whole[:6]]
    moved = Request("0", ids, request.params, output_ids=said, attention=EVERYWHERE)
    other = Engine.from_checkpoint(directory, EngineConfig(**SMALL, deterministic=True))
    assert look(other, [moved])["0"] == whole[6:]


def test_top_k_shows_the_heaviest_first_and_nothing_beyond_a_window(additive):
    decoder, directory = additive
    ids = prompt(30)
    whole, top = (
        look(
            Engine.from_checkpoint(directory, EngineConfig(**SMALL)),
            [Request("a", ids, GREEDY, attention=AttentionRequest((0, 2), (1, 3), top_k))],
        )["a"]
        for top_k in (None, 20)
    )
    window, sinks = decoder.config.sliding_window, decoder.config.num_sink_tokens
    for row, ((_, everything), (_, heaviest)) in enumerate(zip(whole, top, strict=True), 29):
        for every, heavy in zip(everything, heaviest, strict=True):
            assert (every.layer, every.head) == (heavy.layer, heavy.head)
            assert heavy.weights == sorted(heavy.weights, reverse=True)
            assert heavy.weights == [every.weights[position] for position in heavy.positions]
            assert sorted(heavy.positions) == [t for t in every.positions if t < sinks or row - t < window]


def test_top_k_leaves_out_the_lighter_positions(additive):
    _, directory = additive
    engine = Engine.from_checkpoint(directory, EngineConfig(**SMALL))
    shown = look(engine, [Request("a", prompt(30), GREEDY, attention=AttentionRequest((1,), (0,), 2))])["a"]
    assert {len(head.positions) for _, token in shown for head in token} == {2}


def test_nothing_is_recorded_in_steps_in_which_nobody_asks(additive, monkeypatch):
    _, directory = additive
    engine = Engine.from_checkpoint(directory, EngineConfig(**SMALL))
    made = []
    init = Inspection.__init__
    monkeypatch.setattr(Inspection, "__init__", lambda self, *args: made.append(args) or init(self, *args))
    run(engine, [Request("a", prompt(9), GREEDY)])
    assert made == []
    run(engine, [Request("b", prompt(40), GREEDY, attention=EVERYWHERE)])
    assert len(made) == GREEDY.max_tokens  # not in the steps of a prompt's first chunks, which give no token


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        (AttentionRequest((), (0,)), "attention.layers", "names none"),
        (AttentionRequest((0,), ()), "attention.heads", "names none"),
        (AttentionRequest((0, 3), (0,)), "attention.layers", r"\[0, 3\): this model has 3 layers"),
        (AttentionRequest((0,), (-1,)), "attention.heads", r"\[0, 4\): this model has 4 heads"),
        (AttentionRequest((1, 1), (0,)), "attention.layers", "twice"),
        (AttentionRequest((0,), (2, 0, 2)), "attention.heads", "twice"),
        (AttentionRequest((0,), (0,), 0), "attention.top_k", "at least 1"),
    ],
)
def test_what_cannot_be_shown_is_refused(additive, asked, param, words):
    engine = Engine.from_checkpoint(additive[1], EngineConfig(**SMALL))
    with pytest.raises(InvalidRequest, match=words) as refusal:
        engine.add(Request("a", prompt(5), GREEDY, attention=asked))
    assert refusal.value.param == param
    assert not engine.has_work
