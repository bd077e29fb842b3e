"""Steps of decodes, staged where graphs read: what is sent, what is made of it on the device, and what it costs."""

import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention.weights import AttentionRequest
from model.config import EngineConfig
from model.engine import forward
from model.engine.batch import KeptRows, Unread
from model.engine.decodes import PADDING, DecodeSteps, Inputs, Outputs
from model.engine.engine import Engine
from model.engine.graphs import DecodeGraphs
from model.engine.request import Request
from model.engine.scheduled import ScheduledRequest, ScheduledStep
from model.engine.tables import BlockTables
from model.engine.transfer import DirectTransfers, PinnedTransfers
from model.kernels.decodes import NO_SLOT, place_decodes, place_decodes_torch
from model.sampling.params import SamplingParams
from model.sampling.sampler import Sampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE = 4
PLAIN = SamplingParams(max_tokens=20, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=-5)
GREEDY = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
# Beside a card nothing interprets the one kernel that draws a first token on the host.
on_the_host = pytest.mark.skipif(DEVICE.type == "cuda", reason="counts calls of an engine on the CPU")


class Sent(DirectTransfers):
    """Copies that are written down: how many arrays each filled a buffer with, and the shapes of what else was sent."""

    def __init__(self) -> None:
        super().__init__(DEVICE)
        self.fills: list[int] = []
        self.sends: list[list[tuple[int, ...]]] = []

    def send(self, arrays):
        self.sends.append([array.shape for array in arrays])
        return super().send(arrays)

    def fill(self, target, arrays):
        self.fills.append(len(arrays))
        super().fill(target, arrays)


class Scene:
    """A stage for up to 8 sequences, with requests that need no scheduler."""

    def __init__(self) -> None:
        self.inputs, self.outputs = Inputs(8, 5, DEVICE), Outputs.of(8, 2, 50, torch.float32, DEVICE)
        self.sampler, self.tables, self.transfers = Sampler(50, [2], DEVICE), BlockTables(), Sent()
        graphs = DecodeGraphs(8, lambda size: None, lambda run: run)
        self.steps = DecodeSteps(self.inputs, self.outputs, graphs, BLOCK_SIZE)

    def request(self, name: str, length: int, params: SamplingParams = PLAIN, **options) -> Request:
        request = Request(name, range(10, 10 + length), params, **options)
        request.row = self.sampler.attach(params, request.token_ids, length)
        self.give_blocks(request)
        return request

    def give_blocks(self, request: Request) -> None:
        for _ in range(request.num_tokens // BLOCK_SIZE + 1 - len(request.block_table)):
            request.block_table.append(10 * (request.row + 1) + len(request.block_table))

    def stage(self, *requests: Request, unread: Unread | None = None, step: ScheduledStep | None = None):
        scheduled = [(r, r.num_tokens - (unread is None), 1, (), 1, r.epoch) for r in requests]
        step = step or ScheduledStep(tuple(ScheduledRequest(*item) for item in scheduled))
        kept = KeptRows([item.request.row for item in step.requests], self.tables)
        return self.steps.stage(step, kept, self.sampler, self.transfers, unread)

    def extend(self, *requests: Request) -> None:
        for request in requests:
            request.token_ids.append(7)
            self.give_blocks(request)


@pytest.mark.fast
def test_all_that_the_kernels_read_is_made_of_three_numbers_a_sequence():
    rows, width = 300, 6  # more than one program takes, and no whole number of them
    generator = np.random.default_rng(4)
    numbers = torch.from_numpy(generator.integers(-300, 900, (3, 320)).astype(np.int32))
    numbers[1] = torch.from_numpy(generator.integers(-1, BLOCK_SIZE * width, 320))
    numbers[2].abs_()
    drawn = torch.arange(1000, 1300)
    found, expected = (
        [
            torch.full((rows, width), 9, dtype=torch.int32, device=device),
            *torch.full((3, rows), 77, device=device),
            torch.full((rows,), 77, dtype=torch.int32, device=device),
        ]
        for device in (DEVICE, "cpu")
    )
    place_decodes(numbers.to(DEVICE), drawn.to(DEVICE), *found, block_size=BLOCK_SIZE)
    place_decodes_torch(numbers, drawn, *expected, block_size=BLOCK_SIZE)
    for ours, twin in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), twin)
    _, token_ids, positions, slots, lens = expected
    assert (token_ids >= 1000).any()  # drawn by the step before
    assert (lens == 0).tolist() == (slots == NO_SLOT).tolist() == (numbers[1, :rows] < 0).tolist()
    assert torch.equal(slots[lens > 0] % BLOCK_SIZE, positions[lens > 0] % BLOCK_SIZE)


@pytest.mark.fast
def test_a_step_is_where_the_graphs_read_with_what_is_asked_and_the_rest_is_padding():
    scene = Scene()
    a, b = scene.request("a", 6), scene.request("b", 9, SamplingParams(max_tokens=9, temperature=0.25, seed=3))
    staged = scene.stage(a, b)
    inputs = scene.inputs
    assert inputs.numbers[:, :2].tolist() == [[15, 18], [5, 8], [a.block_table[1], b.block_table[2]]]
    assert inputs.numbers[1, 2:].tolist() == [PADDING] * 6
    assert [column[:3].tolist() for column in inputs.sampling] == [
        [0.5, 0.25, 0], [7, 0, 0], pytest.approx([0.9, 1, 0]), pytest.approx([0.1, 0, 0]), [-5, 3, 0],
    ]  # fmt: skip
    assert inputs.tables[:2, :3].tolist() == [[*a.block_table, 0], b.block_table]
    assert staged.samples.positions.tolist() == [6, 9]
    assert staged.company.drawn.told.data_ptr() == scene.outputs.told.data_ptr()
    assert len(staged.company.outputs.logits) == len(staged.company.drawn.token_ids) == 2


@pytest.mark.fast
def test_only_numbers_are_sent_for_as_long_as_the_same_sequences_decode():
    scene = Scene()
    a, b, c = (scene.request(name, 6) for name in "abc")
    for requests, arrays in (
        ((a, b), 6),
        ((a, b), 1),
        ((a, b), 1),
        ((a, b, c), 6),
        ((a, b), 6),
        ((b, a), 6),
        ((b, a), 1),
    ):
        scene.stage(*requests)
        scene.extend(*requests)
        assert scene.transfers.fills[-1] == arrays
        assert scene.inputs.numbers[1, : len(requests) + 1].tolist()[-1] == PADDING


@pytest.mark.fast
def test_a_company_sends_its_tables_once_and_no_wider_than_they_are():
    scene = Scene()
    a, b = scene.request("a", 6), scene.request("b", 9)  # on 2 and 3 of 5 blocks
    scene.stage(a, b)
    scene.extend(a, b)
    scene.stage(a, b)
    assert scene.transfers.sends == [[(2, 3)]]


@pytest.mark.fast
def test_a_request_that_ran_before_and_comes_again_is_another():
    scene = Scene()
    a = scene.request("a", 6)
    scene.stage(a)
    a.epoch, a.block_table = 1, [91, 92]  # preempted, and at once back on blocks that others had filled
    scene.tables.clear(a.row)
    scene.stage(a)
    assert scene.transfers.fills == [6, 6]
    assert scene.inputs.tables[0, 1] == 92


@pytest.mark.fast
def test_tables_are_sent_again_behind_a_step_that_no_graph_has_computed():
    scene = Scene()
    a, other = scene.request("a", 6), scene.request("b", 9)
    scene.stage(a)
    prefill = ScheduledStep((ScheduledRequest(a, 6, 1, (), 1, 0), ScheduledRequest(other, 0, 9, (), 1, 0)))
    assert scene.stage(step=prefill) is None
    scene.stage(a)
    assert scene.transfers.fills == [6, 6]


@pytest.mark.fast
def test_only_steps_of_decodes_that_all_sample_and_that_nobody_looks_into_are_staged():
    scene = Scene()
    a = scene.request("a", 6)
    assert scene.stage(a) is not None
    assert scene.stage(step=ScheduledStep((ScheduledRequest(a, 5, 1, (), 0, 0),))) is None  # a chunk of one token
    assert scene.stage(step=ScheduledStep((ScheduledRequest(a, 5, 2, (7,), 2, 0),))) is None
    assert scene.stage(scene.request("b", 6, attention=AttentionRequest((0,), (0,)))) is None
    assert scene.stage(*(scene.request(str(i), 5) for i in range(9))) is None  # more than the largest graph takes


@pytest.mark.fast
@pytest.mark.parametrize("asked", [{"presence_penalty": 1.0}, {"logit_bias": {7: 1.0}}, {"min_tokens": 2}], ids=str)
def test_a_step_whose_logits_change_is_drawn_by_the_sampler_and_by_the_graph_greedily_for_nothing(asked):
    scene = Scene()
    a = scene.request("a", 6, SamplingParams(max_tokens=9, temperature=0.5, **asked))
    b = scene.request("b", 6)
    scene.stage(b)
    staged = scene.stage(a, b)
    assert staged.company.drawn is None
    assert not scene.inputs.sampling[0].any()
    assert staged.samples.asked.temperature.tolist() == [0.5, 0.5]
    assert staged.samples.asked.position.tolist() == [6, 6]


@pytest.mark.fast
def test_an_unread_token_is_named_by_its_place_among_what_was_drawn():
    scene = Scene()
    a, b = scene.request("a", 5), scene.request("b", 7)
    drawn = torch.tensor([31, 32, 33], device=DEVICE)
    scene.stage(a, b, unread=Unread({b: 0, a: 2}, drawn))
    assert scene.inputs.numbers[0, :2].tolist() == [-1 - 2, -1 - 0]
    assert scene.outputs.token_ids[:3].tolist() == [31, 32, 33]  # where the graphs look


class Copies:
    """A copy engine that is done at once."""

    def host(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    device = host

    def copy(self, target, source):
        target.copy_(source)
        return lambda: None


class Calls(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def steady(directory, count: int, monkeypatch) -> Engine:
    """An engine that decodes so many sequences, on and on, by graphs that compute nothing."""
    monkeypatch.setattr(forward, "capture_for", lambda device: lambda run: lambda: None)
    config = EngineConfig(
        dtype="fp32",
        device="cpu",
        kernels="triton",
        overlap=True,
        block_size=8,
        kv_cache_tokens=8 * 256,
        max_num_seqs=8,
    )
    engine = Engine.from_checkpoint(directory, config)
    compute = engine.runner.compute
    compute.forward = lambda batch: forward.Forwarded(
        torch.zeros(len(batch.token_ids), 64), torch.zeros(len(batch.sample_rows), 320)
    )
    engine.runner.transfers = PinnedTransfers(Copies())
    for i in range(count):
        engine.add(Request(str(i), [5, 6 + i, 7], GREEDY))
    for _ in range(6):
        engine.step()
    return engine


@pytest.mark.slow
@on_the_host
@pytest.mark.parametrize("count", [1, 8])
def test_a_steady_step_asks_torch_for_two_copies_and_their_slices_however_many_decode(tiny_llama, count, monkeypatch):
    engine = steady(tiny_llama[0], count, monkeypatch)
    with Calls() as calls:
        for _ in range(16):  # two blocks' worth
            engine.step()
    assert calls.counts == {"aten.copy_.default": 2 * 16, "aten.slice.Tensor": 3 * 16}


@pytest.mark.slow
@on_the_host
def test_a_steady_step_makes_few_calls_and_few_more_for_each_sequence(tiny_llama, monkeypatch):
    made = {}
    for count in (1, 8):
        engine = steady(tiny_llama[0], count, monkeypatch)
        calls = SimpleNamespace(count=0)

        def called(frame, event, argument, calls=calls):
            calls.count += event in ("call", "c_call")

        sys.setprofile(called)
        try:
            for _ in range(16):
                engine.step()
        finally:
            sys.setprofile(None)
        made[count] = calls.count / 16
    each = (made[8] - made[1]) / 7
    # Some room is for other versions of Python, none for another few calls a sequence.
    assert made[1] - each < 215
    assert each < 60
