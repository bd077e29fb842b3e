"""The comparison of the score functions, on decoders of a few thousand weights: what is counted is counted right."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from model.cache.pool import KVPool
from model.decoder import Decoder
from model.training import compare
from model.training.compare import (
    BUCKETS,
    KINDS,
    LOOKUP,
    CompareConfig,
    engine_of,
    held_out_loss,
    main,
    recall_by_distance,
    sheet_of,
    shown_ids,
    start_alike,
    time_all,
    watch,
)
from model.training.comparison import Comparison, Distance
from model.training.documents import Author, Document, Question
from model.training.pretrain import STATE
from model.training.stories import Recall, Story
from model.training.world import NAMES, held_out

QUIET = Console(quiet=True)
OWNER = next(name for name in NAMES if held_out(name, "lantern"))
KNOWN = next(name for name in NAMES if not held_out(name, "lantern"))


@pytest.fixture
def config(tmp_path: Path) -> CompareConfig:
    return CompareConfig(
        out=tmp_path,
        steps=2,
        tokens_per_batch=256,
        documents=4,
        rounds=1,
        steps_per_round=1,
        hidden_size=16,
        head_dim=8,
        threads=1,
    )


def asked(name: str, between: str = "") -> Document:
    """A story in which `name` finds a lantern; then it is asked who has it."""
    text = f"<|bos|>Listen. {name} found a lantern.{between} Question: Who has the lantern? Answer: Now {name} has it."
    recall = Recall("holder", text.index("Now ") + 4, text.index("lantern"))
    return Document(Story(text, cast=[name, "Mia"]), questions=[Question("lantern", name, recall)])


def totals(document: Document, vocabulary: Tokenizer) -> list[int]:
    distances = [Distance(low, high) for low, high in BUCKETS]
    sheet_of(document, vocabulary, distances)
    return [distance.total for distance in distances]


def test_a_run_writes_tables_and_pictures_with_numbers_of_every_kind(
    config: CompareConfig, vocabulary: Tokenizer
) -> None:
    comparison = compare.compare(config, vocabulary, QUIET)
    raw = json.loads((config.out / "comparison.json").read_text())
    assert [kind["attention"] for kind in raw["kinds"]] == ["scaled_dot_product", "multiplicative", "additive"]
    for kind in raw["kinds"]:
        assert 6 < kind["held_out_loss"] < 12  # untrained: near the logarithm of the vocabulary
        assert len(kind["curve"]) == config.steps
        assert sum(distance["total"] for distance in kind["distances"]) > 0
        assert min(kind["speed"]["training"], *kind["speed"]["decode"].values()) > 0
    sizes = [kind["parameters"] for kind in raw["kinds"]]
    square = 2 * 2 * 8 * 8  # a matrix for each head of each layer
    assert [size - sizes[0] for size in sizes] == [0, square, 2 * square + 2 * 2 * 8]
    table = (config.out / "comparison.md").read_text()
    assert "| KV bytes a token (fp32) | 256 | 256 | 256 |" in table
    for speed in ("training", *(f"decode, {dtype}, batch {batch}" for dtype in ("fp32", "bf16") for batch in (1, 16))):
        assert f"| {speed}, tokens/s |" in table
    for picture in ("comparison", *(f"weights-{kind}" for kind in KINDS)):
        assert 5_000 < (config.out / f"{picture}.png").stat().st_size < 200_000
    assert Comparison.load(config.out) == comparison


def test_the_same_seed_gives_the_same_numbers(config: CompareConfig, vocabulary: Tokenizer) -> None:
    runs = [
        compare.compare(replace(config, out=config.out / name, seed=seed), vocabulary, QUIET)
        for name, seed in (("one", 0), ("two", 0), ("three", 1))
    ]
    one, two, three = ([replace(kind, speed=None) for kind in run.kinds] for run in runs)
    assert one == two
    assert all(kind.curve != other.curve for kind, other in zip(one, three, strict=True))


def test_a_run_goes_on_where_it_was_stopped(config: CompareConfig, vocabulary: Tokenizer) -> None:
    first = compare.compare(config, vocabulary, QUIET)
    written = [(config.out / kind / STATE).stat().st_mtime_ns for kind in KINDS]
    again = compare.compare(replace(config, resume=True), vocabulary, QUIET)
    assert [(config.out / kind / STATE).stat().st_mtime_ns for kind in KINDS] == written  # no step was left to take
    assert [kind.held_out_loss for kind in again.kinds] == [kind.held_out_loss for kind in first.kinds]


def test_speeds_can_be_measured_again_alone(config: CompareConfig, vocabulary: Tokenizer) -> None:
    compare.compare(config, vocabulary, QUIET)
    comparison = Comparison.load(config.out)
    before = [replace(kind, speed=None) for kind in comparison.kinds]
    for kind in comparison.kinds:
        kind.speed = None
    time_all(comparison, config, vocabulary)
    assert all(kind.speed is not None for kind in comparison.kinds)
    assert [replace(kind, speed=None) for kind in comparison.kinds] == before


def test_measuring_again_without_results_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--speeds-only", "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert "comparison.json: missing" in capsys.readouterr().err


def test_kv_bytes_are_what_the_engines_cache_takes_for_a_token(config: CompareConfig, vocabulary: Tokenizer) -> None:
    for kind in KINDS:
        pool = engine_of(config.shape(kind, vocabulary), config, "fp32").runner.compute.pool
        assert isinstance(pool, KVPool)
        slots = pool.keys.shape[1]
        assert (pool.keys.nbytes + pool.values.nbytes) // slots == 256
    assert 2 * 2 * 2 * 8 * 4 == 256  # keys and values, layers, heads, head_dim, bytes of a float


def test_a_question_is_counted_at_the_distance_of_its_evidence(vocabulary: Tokenizer) -> None:
    tokens = vocabulary.encode(asked(OWNER).text, add_special_tokens=False).tokens
    told, answered = tokens.index("Ġlantern"), len(tokens) - 1 - tokens[::-1].index(f"Ġ{OWNER}")
    assert answered - told == 12  # . Question : Who has the lantern ? Answer : Now OWNER
    assert totals(asked(OWNER), vocabulary) == [1, 0, 0, 0, 0, 0]
    smiles = " Mia smiled."  # three tokens each
    assert totals(asked(OWNER, 6 * smiles), vocabulary) == [1, 0, 0, 0, 0, 0]  # 12 + 18
    assert totals(asked(OWNER, 6 * smiles + " Mia smiled"), vocabulary) == [0, 1, 0, 0, 0, 0]  # 32: the first beyond
    assert totals(asked(OWNER, 18 * smiles), vocabulary) == [0, 0, 1, 0, 0, 0]  # 66
    assert totals(asked(OWNER, 90 * smiles), vocabulary) == [0, 0, 0, 0, 0, 0]  # 282: no bucket is so far


def test_only_owners_that_no_training_document_has_are_asked_about(vocabulary: Tokenizer) -> None:
    assert totals(asked(KNOWN), vocabulary) == [0, 0, 0, 0, 0, 0]


def test_an_answer_is_right_where_it_is_ranked_first(
    config: CompareConfig, vocabulary: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [asked(OWNER), asked(OWNER, 18 * " Mia smiled.")]
    mia = vocabulary.token_to_id("ĠMia")

    def knows_the_near_one(_: Decoder, token_ids: Tensor) -> Tensor:
        following = torch.cat([token_ids[:, 1:], token_ids[:, :1]], dim=1)
        following[1] = mia  # the longer document's row: sheets are sorted by length
        return torch.nn.functional.one_hot(following, vocabulary.get_vocab_size()).float()

    monkeypatch.setattr(compare, "logits_of", knows_the_near_one)
    decoder = Decoder(config.shape("additive", vocabulary))
    near, _, far, *_ = recall_by_distance(decoder, vocabulary, documents)
    assert (near.total, near.right, near.guessed) == (1, 1, 0.5)
    assert (far.total, far.right, far.guessed) == (1, 0, 0.5)


def test_the_held_out_loss_is_the_mean_over_all_tokens(
    config: CompareConfig, vocabulary: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    even = torch.zeros(1, 1, vocabulary.get_vocab_size())
    monkeypatch.setattr(compare, "logits_of", lambda _, token_ids: even.expand(*token_ids.shape, -1))
    documents = [Author(seed).write("brief") for seed in range(3)]
    loss = held_out_loss(Decoder(config.shape("additive", vocabulary)), vocabulary, documents)
    assert loss == pytest.approx(torch.tensor(float(vocabulary.get_vocab_size())).log().item(), abs=1e-4)


def test_every_weight_that_the_kinds_share_starts_alike(config: CompareConfig, vocabulary: Tokenizer) -> None:
    states = []
    for kind in KINDS:
        decoder = Decoder(config.shape(kind, vocabulary))
        start_alike(decoder, torch.Generator().manual_seed(3))
        states.append(decoder.state_dict())
        assert not any(weight.isnan().any() for weight in decoder.parameters())
    plain, *others = states
    assert all(torch.equal(other[name], weight) for other in others for name, weight in plain.items())
    assert len(others[1]) > len(others[0]) > len(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_shows_causal_weights_that_sum_to_one(
    kind: str, config: CompareConfig, vocabulary: Tokenizer
) -> None:
    decoder = Decoder(config.shape(kind, vocabulary))  # type: ignore[arg-type]
    start_alike(decoder, torch.Generator().manual_seed(0))
    weights = watch(decoder, vocabulary).weights
    length = len(shown_ids(vocabulary))
    assert weights.shape == (length, length)
    torch.testing.assert_close(weights.sum(-1), torch.ones(length))
    assert torch.equal(weights, weights.tril())
    assert LOOKUP[0] < decoder.config.num_layers
