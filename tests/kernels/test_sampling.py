"""Sampling on the device against the sampler's definition: the same tokens, whatever is asked for."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from model.kernels.sampling import sample
from model.sampling.draw import draw, drop_unlikely, keyed_uniforms, truncate
from model.sampling.sampler import SPOILED

pytestmark = pytest.mark.fast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 4500  # more than is loaded at a time, and no whole number of blocks
ASKS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "top k": {"top_k": 20},
    "top k of one": {"top_k": 1},
    "more than there are": {"top_k": VOCAB + 5},
    "top p": {"top_p": 0.8},
    "a nucleus of one": {"top_p": 1e-6},
    "min p": {"min_p": 0.2},
    "all of them": {"temperature": 1.3, "top_k": 300, "top_p": 0.9, "min_p": 0.01},
}


class Table(NamedTuple):
    """What is asked for, a row each, as `sample` takes it before the positions."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


def table(count: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, first_seed=-3) -> Table:
    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=DEVICE)

    seeds = torch.arange(first_seed, first_seed + count, device=DEVICE) * 0x5DEECE66D1234567 // 7
    return Table(
        column(temperature, torch.float32), column(top_k, torch.int64), column(top_p, torch.float32),
        column(min_p, torch.float32), seeds,
    )  # fmt: skip


def places(count: int) -> Tensor:
    """Where tokens will stand."""
    return torch.arange(count, dtype=torch.int32, device=DEVICE)


def expected(logits: Tensor, asked: Table, positions: Tensor) -> Tensor:
    """What the sampler on the CPU does with one row after another."""
    scaled = logits.float() / asked.temperature[:, None]
    scaled = truncate(drop_unlikely(scaled, asked.min_p), asked.top_k, asked.top_p)
    uniforms = keyed_uniforms(asked.seed.cpu().numpy().astype(np.uint64), positions.cpu().numpy().astype(np.uint64))
    return draw(scaled, torch.from_numpy(uniforms).to(DEVICE))[0]


def random_logits(count: int, dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return (3 * torch.randn(count, vocab, generator=generator)).to(DEVICE, dtype)


@pytest.mark.parametrize("asked", ASKS.values(), ids=ASKS.keys())
def test_a_draw_is_that_of_the_definition(asked):
    logits, rows = random_logits(3), table(3, **asked)
    positions = 100 + places(3)
    ids, told = sample(logits, *rows, positions)
    assert torch.equal(told, ids)
    assert torch.equal(ids, expected(logits, rows, positions))


def test_half_precision_logits_are_drawn_from_in_fp32():
    logits, rows, positions = random_logits(3, torch.float16), table(3, top_p=0.7), places(3)
    ids, _ = sample(logits, *rows, positions)
    assert torch.equal(ids, expected(logits, rows, positions))


def test_no_more_are_kept_than_top_k_allows_however_alike_they_are():
    logits = torch.linspace(0.0, 0.01, 600, device=DEVICE).repeat(16, 1)
    ids, _ = sample(logits, *table(16, top_k=3), places(16))
    assert ids.unique().tolist() == [597, 598, 599]


def test_tokens_that_tie_with_the_last_one_kept_are_kept():
    logits = torch.zeros(12, 600, device=DEVICE)
    logits[:, 300:] = -1.0
    rows, positions = table(12, top_k=7), places(12)
    ids, _ = sample(logits, *rows, positions)
    assert torch.equal(ids, expected(logits, rows, positions))
    assert ids.max() < 300
    assert len(ids.unique()) > 8


def test_a_row_is_drawn_by_its_own_request_wherever_it_stands():
    logits, rows = random_logits(3), table(3, top_k=50)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    positions = places(3) * 9
    straight, _ = sample(logits, *rows, positions)
    shuffled, _ = sample(logits[order], *(column[order] for column in rows), positions[order])
    assert torch.equal(shuffled, straight[order])


def test_without_a_temperature_the_first_of_the_largest_is_taken():
    logits = random_logits(3)
    logits[1, [4100, 17, 300]] = 50.0
    ids, told = sample(logits, *table(3, temperature=0.0, top_k=5), places(3))
    assert torch.equal(told, ids)
    assert torch.equal(ids, logits.argmax(dim=-1))
    assert ids[1] == 17


def test_what_is_forbidden_is_never_drawn():
    logits = torch.full((12, VOCAB), -torch.inf, device=DEVICE)
    logits[:, [3, 4400]] = torch.tensor([0.5, 0.4], device=DEVICE)
    ids, told = sample(logits, *table(12), places(12))
    assert torch.equal(told, ids)
    assert ids.unique().tolist() == [3, 4400]


def test_a_stretch_in_which_everything_is_forbidden_weighs_nothing():
    logits = torch.full((6, VOCAB), -torch.inf, device=DEVICE)
    logits[:, 4300:] = random_logits(6)[:, 4300:]
    rows, positions = table(6), places(6)
    ids, told = sample(logits, *rows, positions)
    assert torch.equal(told, ids)
    assert torch.equal(ids, expected(logits, rows, positions))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_numbers_are_told(temperature):
    logits = random_logits(4)
    logits[1, 4321] = torch.nan
    logits[2] = -torch.inf
    logits[3, 8] = torch.inf
    ids, told = sample(logits, *table(4, temperature=temperature), places(4))
    assert told.tolist() == [ids[0], SPOILED, SPOILED, SPOILED]
    assert ((ids >= 0) & (ids < VOCAB)).all()


def test_draws_follow_the_distribution():
    count, shares = 200, (0.5, 0.0, 0.25, 0.125, 0.125)
    logits = torch.log(torch.tensor(shares, device=DEVICE)).repeat(count, 1)
    one, positions = table(1, first_seed=11), places(count)
    ids, _ = sample(logits, *(column.repeat(count) for column in one), positions)
    counts = torch.bincount(ids, minlength=5).tolist()
    assert counts[1] == 0
    for found, share in zip(counts, shares, strict=True):
        assert abs(found - count * share) < 28  # four standard deviations of the widest
