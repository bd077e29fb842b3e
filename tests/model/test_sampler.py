"""Each row of a batch is sampled by its own parameters, from the right distribution."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.errors import InvalidRequest
from model.sampling.draw import draw, truncate
from model.sampling.params import SamplingParams
from model.sampling.result import Sampled
from model.sampling.sampler import SPOILED, Sampler

pytestmark = pytest.mark.fast

VOCABULARY = 12
EOS = 3
PROMPT = [1, 4, 4]


def params(**fields) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 100} | fields))


def new_sampler(vocabulary: int = VOCABULARY) -> Sampler:
    return Sampler(vocabulary, [EOS], torch.device("cpu"))


def sample(logits: torch.Tensor, rows: list[SamplingParams], positions: list[int]) -> Sampled:
    """Each row a request with the same prompt."""
    sampler = new_sampler(logits.shape[-1])
    attached = [sampler.attach(p, PROMPT, len(PROMPT)) for p in rows]
    return sampler.sample(logits, attached, positions, [None] * len(rows))


def reference_distribution(
    logits: list[float], p: SamplingParams, prompt: list[int] = (), output: list[int] = ()
) -> list[float]:
    """The textbook, one number at a time: bias, penalties, temperature, min-p, top-k, then the nucleus."""
    scores = [score + p.logit_bias.get(i, 0.0) for i, score in enumerate(logits)]
    if len(output) < p.min_tokens:
        for i in {EOS, *p.stop_token_ids}:
            scores[i] = -math.inf
    counts = Counter(output)
    for i in {*prompt, *output}:
        scores[i] = scores[i] / p.repetition_penalty if scores[i] > 0 else scores[i] * p.repetition_penalty
    for i, count in counts.items():
        scores[i] -= p.frequency_penalty * count + p.presence_penalty
    scaled = [score / p.temperature for score in scores]
    likely = [i for i in range(len(scaled)) if math.exp(scaled[i] - max(scaled)) >= p.min_p]
    order = sorted(likely, key=lambda i: -scaled[i])[: p.top_k or None]
    weights = {i: math.exp(scaled[i] - max(scaled)) for i in order}
    total, mass, kept = sum(weights.values()), 0.0, []
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if mass >= p.top_p:
            break
    return [weights[i] / sum(weights[j] for j in kept) if i in kept else 0.0 for i in range(len(logits))]


def assert_follows(counts: list[int], expected: list[float]) -> None:
    draws = sum(counts)
    assert all(count == 0 for count, e in zip(counts, expected, strict=True) if e == 0.0)
    chi_square = sum((c - draws * e) ** 2 / (draws * e) for c, e in zip(counts, expected, strict=True) if e > 0)
    freedom = sum(e > 0 for e in expected) - 1
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations of the statistic


CASES = {
    "plain": params(),
    "top-k": params(temperature=0.5, top_k=4),
    "top-p": params(temperature=1.3, top_p=0.7),
    "min-p": params(temperature=1.2, min_p=0.15),
    "all three": params(temperature=0.9, top_k=6, top_p=0.8, min_p=0.02),
    "top-1": params(top_k=1),
    "presence": params(presence_penalty=1.5),
    "frequency": params(frequency_penalty=-0.8),
    "repetition": params(repetition_penalty=1.7),
    "bias": params(logit_bias={2: 2.0, 5: -100.0}, presence_penalty=0.5),
    "min tokens": params(min_tokens=3, stop_token_ids=(6,)),
}


@pytest.mark.parametrize("p", CASES.values(), ids=CASES.keys())
def test_20000_draws_follow_the_textbook_distribution(p):
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)) * 1.5
    output = [7, 7, 9] if p.penalizes else []
    expected = reference_distribution(logits.tolist(), p, PROMPT, output)
    sampler, draws, batch = new_sampler(), 20_000, 500
    counts = torch.zeros(VOCABULARY, dtype=torch.long)
    seeded = [SamplingParams(**{**p.__dict__, "seed": seed}) for seed in range(draws)]
    position = len(PROMPT) + len(output)
    for first in range(0, draws, batch):
        rows = [sampler.attach(q, [*PROMPT, *output], len(PROMPT)) for q in seeded[first : first + batch]]
        ids = sampler.sample(logits.expand(batch, -1), rows, [position] * batch, [None] * batch).token_ids
        counts += torch.tensor(ids).bincount(minlength=VOCABULARY)
        for row in rows:
            sampler.detach(row)
    assert_follows(counts.tolist(), expected)


def test_a_row_does_not_depend_on_its_neighbours():
    logits = torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(1))
    rows = [
        params(temperature=0.0), params(seed=1), params(temperature=0.7, top_k=3, seed=2), params(min_p=0.3, seed=9),
        params(temperature=1.5, top_p=0.5, seed=3), params(seed=-1, logprobs=2), params(temperature=0.0),
        params(repetition_penalty=1.3, logit_bias={4: 1.0}, seed=5),
    ]  # fmt: skip
    positions = [3, 3, 4, 3, 5, 9, 3, 3]
    together = sample(logits, rows, positions).token_ids
    alone = [sample(logits[i : i + 1], [rows[i]], [positions[i]]).token_ids[0] for i in range(8)]
    assert together == alone
    assert together[0] == logits[0].argmax()


def test_penalties_see_every_token_as_it_comes():
    p = params(temperature=0.0, frequency_penalty=1.0, presence_penalty=0.25, repetition_penalty=1.2)
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2
    sampler = new_sampler()
    row, output = sampler.attach(p, PROMPT, len(PROMPT)), []
    for _ in range(40):
        scores = [math.log(x) if x else -math.inf for x in reference_distribution(
            logits.tolist(), SamplingParams(**{**p.__dict__, "temperature": 1.0}), PROMPT, output)]  # fmt: skip
        (token_id,) = sampler.sample(logits[None], [row], [len(PROMPT) + len(output)], [None]).token_ids
        assert token_id == max(range(VOCABULARY), key=scores.__getitem__)
        output.append(token_id)
    assert len(set(output)) > 4
    resumed = sampler.attach(p, [*PROMPT, *output], len(PROMPT))
    again, other = sampler.sample(logits.expand(2, -1), [row, resumed], [50, 50], [None, None]).token_ids
    assert again == other


def test_a_freed_row_keeps_nothing_of_the_request_before():
    logits = torch.randn(1, VOCABULARY)
    sampler = new_sampler()
    old = sampler.attach(params(temperature=0.0, frequency_penalty=2.0, logit_bias={5: 100.0}), PROMPT, 3)
    sampler.sample(logits, [old], [3], [None])
    sampler.detach(old)
    fresh = sampler.attach(params(temperature=0.0, frequency_penalty=2.0), PROMPT, 3)
    assert fresh == old
    assert sampler.sample(logits, [fresh], [3], [None]).token_ids == [logits.argmax().item()]


def test_nothing_that_ends_the_completion_is_sampled_before_min_tokens():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, EOS], logits[0, 6] = 9.0, 8.0
    p = params(temperature=0.0, min_tokens=2, stop_token_ids=(6,))
    ids = [sample(logits, [p], [len(PROMPT) + n]).token_ids[0] for n in range(3)]
    assert ids[0] not in (EOS, 6)
    assert ids[1] not in (EOS, 6)
    assert ids[2] == EOS


@pytest.mark.parametrize("differs", ["seed", "position"])
def test_draws_are_keyed_by_seed_and_position(differs):
    logits = torch.zeros(64, VOCABULARY)
    seeds, positions = (range(64), [7] * 64) if differs == "seed" else ([7] * 64, list(range(64)))
    rows = [params(seed=s) for s in seeds]
    first, second = sample(logits, rows, positions).token_ids, sample(logits, rows, positions).token_ids
    assert first == second
    assert len(set(first)) > VOCABULARY // 2


def test_logprobs_are_of_the_model_before_any_parameter():
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(2))
    rows = [params(temperature=0.3, top_k=1, logit_bias={0: 50.0}, logprobs=3), params(), params(logprobs=0)]
    sampled = sample(logits, rows, [3, 3, 3])
    expected = logits.log_softmax(-1)
    assert sampled.token_ids[0] == 0
    assert sampled.logprobs[0].logprob == pytest.approx(expected[0, 0].item())
    best = expected[0].topk(3)
    assert [i for i, _ in sampled.logprobs[0].top] == best.indices.tolist()
    assert [value for _, value in sampled.logprobs[0].top] == pytest.approx(best.values.tolist())
    assert sampled.logprobs[1] is None
    assert sampled.logprobs[2].top == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_spoil_their_own_row_alone(bad):
    logits = torch.randn(3, VOCABULARY)
    rows = [params(seed=1, logprobs=1, top_k=4, top_p=0.9, min_p=0.01)] * 3
    expected = sample(logits, rows, [3, 3, 3]).token_ids
    logits[1, 4] = bad
    sampled = sample(logits, rows, [3, 3, 3]).token_ids
    assert sampled == [expected[0], None, expected[2]]


def test_a_token_that_is_out_is_not_drawn_even_at_the_very_ends():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).expand(2, -1)
    ids, usable = draw(logits, torch.tensor([0.0, 1.0 - 2.0**-48], dtype=torch.float64))
    assert ids.tolist() == [1, 2]
    assert usable.all()


def test_truncation_keeps_ties_and_always_one_token():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 9.0, 0.0]])
    kept = truncate(logits, torch.tensor([1, 0]), torch.tensor([1.0, 1e-6])).isfinite()
    assert kept.tolist() == [[False, True, True, False], [False, False, True, False]]


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0], ids=["flat", "usual", "peaked"])
def test_truncation_of_a_large_vocabulary_keeps_what_sorting_all_of_it_keeps(spread):
    rows = [(0, 0.9), (5, 1.0), (600, 1.0), (600, 0.5), (40, 0.95), (0, 1.0), (0, 0.1), (1999, 0.999), (1, 0.2)]
    logits = torch.randn(len(rows), 2000, generator=torch.Generator().manual_seed(4)) * spread
    kept = truncate(logits, torch.tensor([k for k, _ in rows]), torch.tensor([p for _, p in rows])).isfinite()
    for row, (top_k, top_p) in enumerate(rows):
        num_kept = int(kept[row].sum())
        if top_p == 1.0:
            assert num_kept == (top_k or 2000)
        else:
            distribution = reference_distribution(logits[row].tolist(), params(top_k=top_k, top_p=top_p))
            expected = sum(probability > 0 for probability in distribution)
            assert abs(num_kept - expected) <= 1, (top_k, top_p)  # rounding may move the bar by one token


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_p": math.nan}, {"top_k": -1}, {"top_k": 1 << 31}, {"seed": 1 << 63}, {"max_tokens": 0},
        {"min_p": 1.5}, {"presence_penalty": 2.5}, {"frequency_penalty": -3.0}, {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan}, {"min_tokens": 101}, {"logit_bias": {1: 101.0}},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)}, {"stop_token_ids": tuple(range(129))}, {"logprobs": 21},
        {"prompt_logprobs": -1},
    ],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_parameters_out_of_range_are_refused_by_name(fields):
    with pytest.raises(InvalidRequest) as refusal:
        params(**fields)
    assert refusal.value.param == next(iter(fields))


def test_likeliest_tokens_that_are_known_are_taken_for_greedy_rows_that_nothing_adjusts():
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 5] = 3.0
    known = torch.tensor([5, 5]), torch.tensor([3.0, math.nan])
    greedy = params(temperature=0.0)

    def chosen(*rows: SamplingParams) -> list[int | None]:
        sampler = new_sampler()
        attached = [sampler.attach(p, PROMPT, len(PROMPT)) for p in rows]
        return sampler.sample(logits, attached, [3, 3], [None, None], known).token_ids

    assert chosen(greedy, greedy) == [5, None]
    assert chosen(params(temperature=0.0, logit_bias={7: 9.0}), greedy) == [7, 5]
    assert chosen(greedy, params(temperature=1.0, top_k=1)) == [5, 5]


@pytest.mark.parametrize(
    ("asked", "is_expected"),
    [({"temperature": 0.3, "top_k": 3}, True), ({"presence_penalty": 0.1}, False), ({"logit_bias": {7: 1.0}}, False),
     ({"min_tokens": 1}, False), ("a grammar", False), ({}, True)],
)  # fmt: skip
def test_who_has_the_logits_can_draw_where_nothing_changes_them(asked, is_expected):
    sampler = new_sampler()
    grammar = SimpleNamespace(start=lambda output_ids: None) if asked == "a grammar" else None
    fields = {} if grammar else asked
    rows = np.array(
        [sampler.attach(params(**fields), PROMPT, len(PROMPT), grammar), sampler.attach(params(), PROMPT, 1)]
    )
    logits, ids = torch.zeros(2, VOCABULARY), torch.tensor([8, 9])
    drawn = sampler.expect(rows, logits, ids, ids)
    assert (drawn is not None) == is_expected
    if drawn is not None:
        assert sampler.tell(drawn, [8, SPOILED]).token_ids == [8, None]
