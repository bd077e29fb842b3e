"""Decode steps as CUDA graphs: captured at the start, one for each bucket of batch sizes, and replayed by one call.

A decode step of a small model launches hundreds of kernels, each done before the next could be launched. A graph
launches them all at once, but reads and writes where it did when it was captured: a step's inputs are copied to where
the graphs read, and rows between its size and the bucket's are padding, which stores nothing and attends to nothing.
"""

import logging
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.engine.batch import Batch

logger = logging.getLogger(__name__)

SPLIT = 256  # of a sequence, for the partial results of its attention (`model.attention.triton_decode`)
WORKSPACE_BYTES = 64 << 20  # cuBLAS' own, of the stream that graphs are captured on
NO_SLOT = -1  # the key and value of a padding row are stored nowhere


class Inputs:
    """Where the graphs read. All of the largest bucket's size; a graph reads the first rows.

    token_ids, positions, slots: [rows]; lens: [rows] int32, 0 for padding; tables: [rows, max_blocks] int32; sampling:
    [rows] each, what the sampling kernel takes beside the logits.
    """

    def __init__(self, rows: int, max_blocks: int, device: torch.device) -> None:
        self.token_ids, self.positions = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.slots = torch.full((rows,), NO_SLOT, dtype=torch.int64, device=device)
        self.lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.tables = torch.zeros(rows, max_blocks, dtype=torch.int32, device=device)
        dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64)
        self.sampling = [torch.zeros(rows, dtype=dtype, device=device) for dtype in dtypes]

    def fill(self, rows: int, batch: Batch, slots: Tensor, lens: Tensor, tables: Tensor) -> None:
        """A step's inputs into the first rows; the rest, up to `rows`, is padding."""
        size = len(slots)
        self.token_ids[:size].copy_(batch.token_ids)
        self.positions[:size].copy_(batch.positions)
        self.slots[:size].copy_(slots)
        self.lens[:size].copy_(lens)
        self.tables[:size, : tables.shape[1]].copy_(tables)  # what lies beyond a sequence's length is never read
        # A padding row's token and position are those of some earlier step: any will do.
        self.slots[size:rows].fill_(NO_SLOT)
        self.lens[size:rows].zero_()
        if batch.is_plain and batch.asked is not None:
            for parameter, asked in zip(self.sampling, batch.asked, strict=False):
                parameter[:size].copy_(asked)
        # Padding, and steps that are sampled later from other logits, are drawn from the cheapest way: greedily.
        self.sampling[0][size if batch.is_plain else 0 : rows].zero_()


class Outputs(NamedTuple):
    """Where the graphs write: hidden: [rows, hidden_size]; logits: [rows, vocab_size]; token_ids, usable: [rows], what
    was drawn from these, and where they were numbers. One for all: the next step overwrites them.
    """

    hidden: Tensor
    logits: Tensor
    token_ids: Tensor
    usable: Tensor

    @classmethod
    def of(cls, rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> "Outputs":
        """For up to `rows` sequences."""
        return cls(
            torch.empty(rows, hidden_size, dtype=dtype, device=device),
            torch.empty(rows, vocab_size, dtype=dtype, device=device),
            torch.empty(rows, dtype=torch.int64, device=device),
            torch.empty(rows, dtype=torch.bool, device=device),
        )


class Capture(Protocol):
    """Makes a function that can be called again without Python."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run what is to be captured, and return what does the same again on what lies in the same memory."""
        ...


class CudaCapture:
    """Captures CUDA graphs that share one memory pool: they never run at the same time.

    All of them on one stream: the pool's memory is reused on the stream that has used it, and cuBLAS keeps 32 MiB of
    workspace for each stream that it has seen, for ever (pytorch issue 99196).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `Capture`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):  # once outside of the graph: kernels are compiled, libraries set up here
            run()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # What other threads of the process do meanwhile, an exporter or a watchdog, does not spoil the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


def capture_for(device: torch.device) -> Capture | None:
    """What captures on this device; None where there is nothing to gain."""
    return CudaCapture(device) if device.type == "cuda" else None


def buckets(largest: int) -> list[int]:
    """Batch sizes that have a graph of their own, ascending: close together where a row of padding costs most."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest, 64)]
    return [*(size for size in sizes if size < largest), largest]


def reserved_bytes(model: ModelConfig, rows: int, longest: int, block_size: int, itemsize: int) -> int:
    """At most what the graphs of up to `rows` sequences of up to `longest` tokens keep for themselves."""
    partial = partial_bytes(model, rows, longest)
    wide = 3 * model.intermediate_size + 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    kept = 8 * model.hidden_size + wide + 2 * model.vocab_size  # a layer's activations; logits, computed and kept
    return WORKSPACE_BYTES + partial + rows * (kept * itemsize + 4 * -(-longest // block_size) + 80)


def partial_bytes(model: ModelConfig, rows: int, longest: int) -> int:
    """The partial results of attention over `rows` decoding sequences, the longest of so many tokens, in fp32."""
    return rows * model.num_heads * -(-longest // SPLIT) * (model.head_dim + 1) * 4


class DecodeGraphs:
    """One graph for each bucket.

    run: computes the first so many rows of `inputs` into `outputs`.
    """

    def __init__(
        self, inputs: Inputs, outputs: Outputs, largest: int, run: Callable[[int], None], capture: Capture
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.buckets = buckets(largest)
        self._replays: dict[int, Callable[[], None]] = {}
        started = time.perf_counter()
        # The largest first: the memory that it takes then holds every smaller one.
        for count, bucket in enumerate(reversed(self.buckets), 1):
            self._replays[bucket] = capture(lambda bucket=bucket: run(bucket))  # type: ignore[misc]
            if count % 8 == 0 or count == len(self.buckets):
                seconds = time.perf_counter() - started
                logger.info("captured %d of %d decode graphs, %.1f s", count, len(self.buckets), seconds)

    def fits(self, batch: Batch) -> bool:
        """Whether a step is all decodes, each of which samples, and none of which is looked into."""
        size = batch.plan.num_seqs
        decodes = batch.plan.num_decodes == size == len(batch.sample_rows)
        return decodes and batch.inspection is None and size <= self.buckets[-1]

    def replay(self, batch: Batch, slots: Tensor, lens: Tensor, tables: Tensor) -> Outputs:
        """Compute a step that fits: what `Outputs` holds, [num_seqs, ...] each. Where the step is plain, its tokens are
        those that were asked for.
        """
        size = batch.plan.num_seqs
        bucket = next(bucket for bucket in self.buckets if bucket >= size)
        self.inputs.fill(bucket, batch, slots, lens, tables)
        self._replays[bucket]()
        return Outputs(*(kept[:size] for kept in self.outputs))
