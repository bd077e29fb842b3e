"""The trainer on a model of a few thousand weights: it learns, it resumes to the bit, and it only guides."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from model.attention.dense import DenseCausalAttention
from model.attention.scores import Scores
from model.config import ModelConfig
from model.decoder import Decoder
from model.errors import ConfigError
from model.training.batches import DRILL_WEIGHT, NO_OPTION, RECALL_WEIGHT, USER_WEIGHT, BatchStream, Collator
from model.training.curriculum import Stage
from model.training.documents import Author
from model.training.guidance import (
    BINDING,
    CHOICE,
    HOLDER_RECALL,
    LENGTH,
    NOWHERE,
    PLACE_RECALL,
    GuidedAttention,
    favour_matching,
)
from model.training.pretrain import EVENNESS, TrainConfig, Trainer, choice_losses, main

TINY = ModelConfig(
    vocab_size=2048,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
FIRST_LAYER = Scores(replace(TINY, num_heads=4, num_kv_heads=2, head_dim=8), 0)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    stages = (Stage({"brief": 1.0}, gate=0.0, min_steps=3), Stage({"drill": 1.0}, gate=2.0))
    return TrainConfig(
        out=tmp_path, steps=16, tokens_per_batch=512, warm_up=4, hold=8, device="cpu", model=TINY, curriculum=stages
    )


def run(config: TrainConfig, vocabulary: Tokenizer, steps: int) -> Trainer:
    trainer = Trainer(config, vocabulary)
    for _ in range(steps):
        trainer.step()
    return trainer


def test_a_few_steps_lower_the_loss(config: TrainConfig, vocabulary: Tokenizer) -> None:
    history = run(replace(config, steps=60, peak_rate=1e-2), vocabulary, 30).progress.history
    assert history[-1].loss < history[0].loss - 1.0


def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(config: TrainConfig, vocabulary: Tokenizer) -> None:
    whole = run(config, vocabulary, 10)
    run(config, vocabulary, 5).save()
    resumed = Trainer(config, vocabulary)
    resumed.load()
    for _ in range(5):
        resumed.step()
    assert resumed.progress.stage == whole.progress.stage == 1
    for (name, ours), theirs in zip(whole.decoder.named_parameters(), resumed.decoder.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_run_of_another_recipe_is_not_resumed(config: TrainConfig, vocabulary: Tokenizer) -> None:
    run(config, vocabulary, 1).save()
    with pytest.raises(ConfigError, match="another recipe"):
        Trainer(replace(config, steps=99), vocabulary).load()


def test_resuming_nothing_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--out", str(tmp_path), "--resume"])
    assert exit_.value.code == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_the_rate_rises_stays_and_falls_to_a_hundredth(config: TrainConfig, vocabulary: Tokenizer) -> None:
    trainer = Trainer(replace(config, steps=100, warm_up=10, hold=50), vocabulary)
    rates = []
    for trainer.progress.step in (0, 9, 50, 75, 99):
        rates.append(round(trainer.rate(), 3))
    assert rates == [0.1, 1.0, 1.0, 0.505, 0.011]


def test_guidance_measures_without_changing_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2 * 6, heads, 8, generator=generator) for heads in (4, 2, 2))
    guided = GuidedAttention(2, 6, {(0, 2): torch.tensor([[1, 4, 3], [0, 2, 0]])})
    assert torch.equal(guided(FIRST_LAYER, q, k, v), DenseCausalAttention(2, 6)(FIRST_LAYER, q, k, v))
    expected = []
    for sequence, source, target in ((1, 4, 3), (0, 2, 0)):
        query, keys = q[sequence * 6 + source, 2], k[sequence * 6 : sequence * 6 + source + 1, 1]
        expected.append(-((keys @ query) / 8**0.5).softmax(0)[target].log())
    torch.testing.assert_close(guided.loss(), torch.stack(expected).mean())  # one head, so the sum is its mean


def test_fresh_keys_match_the_queries_of_their_groups_first_head() -> None:
    decoder = Decoder(TINY)
    favour_matching(decoder, torch.Generator().manual_seed(0))
    q, k, v = decoder.layers[2].qkv.weight.split((64, 32, 32))  # type: ignore[union-attr]
    assert torch.equal(k[16:], q[32:48])
    assert torch.equal(v, decoder.layers[0].qkv.weight[96:])  # type: ignore[union-attr]


def test_targets_point_from_the_word_before_an_answer_to_its_evidence(vocabulary: Tokenizer) -> None:
    documents = [Author(seed).write(form) for seed in range(10) for form in ("drill", "plain")]
    batch = Collator(vocabulary).collate(documents)
    for row, source, target in batch.targets[HOLDER_RECALL].tolist():
        binder = [to for r, at, to in batch.targets[BINDING].tolist() if (r, at) == (row, target)]
        assert batch.token_ids[row, binder[0]] == batch.token_ids[row, source + 1]
    for row, source, target in batch.targets[PLACE_RECALL].tolist():
        assert batch.token_ids[row, target] == batch.token_ids[row, source + 1]


def test_a_choice_has_all_its_options_and_looks_where_the_text_has_them(vocabulary: Tokenizer) -> None:
    documents = [Author(seed).write("plain") for seed in range(8)]
    batch = Collator(vocabulary).collate(documents)
    looks = {(row, at): to for row, at, *to in batch.targets[CHOICE[0]].tolist()}
    assert len(batch.choices) > 100
    for (row, position), options in zip(batch.choices.tolist(), batch.options.tolist(), strict=True):
        real = {option for option in options if option != NO_OPTION}
        assert batch.token_ids[row, position].item() in real
        seen = {batch.token_ids[row, to].item() for to in looks.get((row, position - 1), ()) if to != NOWHERE}
        assert seen == real or not seen  # what comes from outside the text is nowhere to be looked up


def test_a_choice_costs_little_when_nothing_else_can_come() -> None:
    options = torch.tensor([[2, 3, NO_OPTION]])
    even, biased, stray = (
        choice_losses(torch.tensor([row]), options).item()
        for row in ([-30.0, -30.0, 5.0, 5.0], [-30.0, -30.0, 7.0, 5.0], [5.0, -30.0, 5.0, 5.0])
    )
    assert even == pytest.approx(EVENNESS * math.log(2))
    assert even < biased < 2 * even < stray


def test_guidance_counts_the_weight_on_any_of_several_targets() -> None:
    q, k, v = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8), torch.zeros(5, 2, 8)
    guided = GuidedAttention(1, 5, {(0, 0): torch.tensor([[0, 3, 0, 2], [0, 3, 1, NOWHERE]])})
    guided(FIRST_LAYER, q, k, v)  # all weights are even: 2 of 4 positions, then 1 of 4
    assert guided.loss().item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_the_end_of_a_sentence_looks_at_how_long_a_story_was_asked_for(vocabulary: Tokenizer) -> None:
    documents = [Author(5).chat("brief"), Author(5).chat("plain"), Author(5).plain("brief")]
    batch = Collator(vocabulary).collate(documents)
    looks = batch.targets[LENGTH].tolist()
    assert [
        {vocabulary.id_to_token(batch.token_ids[row, to]) for r, _, to in looks if r == row} for row in range(3)
    ] == [
        {"Ġshort"},
        {"Ġstory"},
        set(),
    ]
    assert {vocabulary.id_to_token(batch.token_ids[row, at]) for row, at, _ in looks} == {"."}


def test_weights_favour_recalls_and_spare_the_user(vocabulary: Tokenizer) -> None:
    author = Author(1)
    chat = next(d for d in map(author.write, ["brief"] * 50) if "<|user|>Who" in d.text)
    batch = Collator(vocabulary).collate([chat, author.drill()])
    tokens = [vocabulary.id_to_token(i) for i in batch.token_ids[0].tolist()]
    assert batch.weights[0, tokens.index("<|assistant|>") - 1].item() == pytest.approx(USER_WEIGHT)
    assert batch.weights[0, tokens.index("<|assistant|>") + 1] == 1.0
    assert all(batch.weights[row, position] == RECALL_WEIGHT for row, position in batch.recalls.tolist())
    assert batch.weights[1, 1].item() == pytest.approx(DRILL_WEIGHT)


def test_a_step_reads_the_same_batch_whatever_was_read_before(vocabulary: Tokenizer) -> None:
    forms = {"brief": 1.0, "drill": 1.0}
    straight, jumped = BatchStream(vocabulary, 0, 1024), BatchStream(vocabulary, 0, 1024)
    batches = [straight.batch(step, forms) for step in range(7)]  # type: ignore[arg-type]
    assert torch.equal(jumped.batch(6, forms).token_ids, batches[6].token_ids)  # type: ignore[arg-type]


def test_batches_come_near_their_size(vocabulary: Tokenizer) -> None:
    stream = BatchStream(vocabulary, 0, 4096)
    sizes = [stream.batch(step, {"plain": 1.0}).num_tokens for step in range(8)]
    assert 3000 < min(sizes) <= max(sizes) < 5200


def test_an_additive_head_is_guided_by_its_own_scores() -> None:
    scores = Scores(replace(TINY, num_heads=4, num_kv_heads=2, head_dim=8, attention="additive"), 0)
    scores.init_weights(torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2 * 6, heads, 8, generator=generator) for heads in (4, 2, 2))
    guided = GuidedAttention(2, 6, {(0, 2): torch.tensor([[1, 4, 3]])})
    assert torch.equal(guided(scores, q, k, v), DenseCausalAttention(2, 6)(scores, q, k, v))
    assert scores.energy is not None
    energies = torch.tanh(q[6 + 4, 2] + k[6 : 6 + 5, 1]) @ scores.energy[2]
    torch.testing.assert_close(guided.loss(), -energies.softmax(0)[3].log())


def test_a_smaller_model_has_its_guided_heads_elsewhere(config: TrainConfig) -> None:
    rows = torch.tensor([[0, 1, 0]])
    smaller = replace(config, guided={BINDING: (0, 1)})
    assert config.move({BINDING: rows, LENGTH: rows}) == {BINDING: rows, LENGTH: rows}
    assert smaller.move({BINDING: rows, LENGTH: rows}) == {(0, 1): rows}
