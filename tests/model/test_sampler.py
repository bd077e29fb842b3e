"""Each row of a batch is sampled by its own parameters, from the right distribution."""

import math

import pytest
import torch

from model.errors import InvalidRequest
from model.sampling.params import SamplingParams
from model.sampling.sampler import SamplingRows, sample, truncate

pytestmark = pytest.mark.fast

CPU = torch.device("cpu")
VOCABULARY = 12


def params(**fields) -> SamplingParams:
    return SamplingParams(max_tokens=1, **fields)


def reference_distribution(logits: list[float], p: SamplingParams) -> list[float]:
    """The textbook: divide by the temperature, keep the top k, then the smallest set that holds top p."""
    scaled = [x / p.temperature for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -scaled[i])[: p.top_k or None]
    weights = {i: math.exp(scaled[i] - max(scaled)) for i in order}
    total, mass, kept = sum(weights.values()), 0.0, []
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if mass >= p.top_p:
            break
    return [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize(
    "p",
    [
        params(temperature=1.0),
        params(temperature=0.5, top_k=4),
        params(temperature=1.3, top_p=0.7),
        params(temperature=0.9, top_k=6, top_p=0.8),
        params(temperature=1.0, top_k=1),
    ],
    ids=["plain", "top-k", "top-p", "both", "top-1"],
)
def test_20000_draws_follow_the_textbook_distribution(p):
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)) * 1.5
    expected = reference_distribution(logits.tolist(), p)
    draws = 20_000
    rows = SamplingRows.stage([p] * draws, range(draws), CPU)
    counts = sample(logits.expand(draws, -1), rows).bincount(minlength=VOCABULARY).tolist()
    assert all(count == 0 for count, e in zip(counts, expected, strict=True) if e == 0.0)
    chi_square = sum((c - draws * e) ** 2 / (draws * e) for c, e in zip(counts, expected, strict=True) if e > 0)
    freedom = sum(e > 0 for e in expected) - 1
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations of the statistic


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, VOCABULARY, generator=generator)
    rows = [
        params(temperature=0.0), params(temperature=1.0, seed=1), params(temperature=0.7, top_k=3, seed=2),
        params(temperature=1.5, top_p=0.5, seed=3), params(temperature=1.0, seed=-1), params(temperature=0.0),
    ]  # fmt: skip
    positions = [3, 1, 4, 1, 5, 9]
    together = sample(logits, SamplingRows.stage(rows, positions, CPU)).tolist()
    alone = [sample(logits[i : i + 1], SamplingRows.stage([rows[i]], [positions[i]], CPU)).item() for i in range(6)]
    assert together == alone
    assert together[0] == logits[0].argmax()


@pytest.mark.parametrize("differs", ["seed", "position"])
def test_draws_are_keyed_by_seed_and_position(differs):
    logits = torch.zeros(64, VOCABULARY)
    seeds, positions = (range(64), [7] * 64) if differs == "seed" else ([7] * 64, range(64))
    rows = SamplingRows.stage([params(seed=s) for s in seeds], positions, CPU)
    first, second = sample(logits, rows), sample(logits, rows)
    assert torch.equal(first, second)
    assert len(first.unique()) > VOCABULARY // 2


def test_truncation_keeps_ties_and_always_one_token():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 9.0, 0.0]])
    kept = truncate(logits, torch.tensor([1, 0]), torch.tensor([1.0, 1e-6])).isfinite()
    assert kept.tolist() == [[False, True, True, False], [False, False, True, False]]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_p": math.nan}, {"top_k": -1}, {"top_k": 1 << 31}, {"seed": 1 << 63}, {"max_tokens": 0},
    ],
    ids=str,
)  # fmt: skip
def test_parameters_out_of_range_are_refused_by_name(fields):
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**({"max_tokens": 1} | fields))
    assert refusal.value.param == next(iter(fields))
