"""Decode steps as CUDA graphs: captured at the start, one for each bucket of batch sizes, and replayed by one call.

A decode step of a small model launches hundreds of kernels, each done before the next could be launched. A graph
launches them all at once, but reads and writes where it did when it was captured: a step's inputs are copied to where
the graphs read (`model.engine.decodes`), and rows between its size and the bucket's are padding, which stores nothing
and attends to nothing.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch

from model.config import ModelConfig

logger = logging.getLogger(__name__)

SPLIT = 256  # of a sequence, for the partial results of its attention (`model.attention.triton_decode`)
WORKSPACE_BYTES = 64 << 20  # cuBLAS' own, of the stream that graphs are captured on


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
    return WORKSPACE_BYTES + partial + rows * (kept * itemsize + 4 * -(-longest // block_size) + 112)


def partial_bytes(model: ModelConfig, rows: int, longest: int) -> int:
    """The partial results of attention over `rows` decoding sequences, the longest of so many tokens, in fp32."""
    return rows * model.num_heads * -(-longest // SPLIT) * (model.head_dim + 1) * 4


class DecodeGraphs:
    """One graph for each bucket, up to the one of `largest` rows. run: what is captured, computing so many rows."""

    def __init__(self, largest: int, run: Callable[[int], None], capture: Capture) -> None:
        self.largest = largest
        self.buckets = buckets(largest)
        self._replays: dict[int, Callable[[], None]] = {}
        started = time.perf_counter()
        # The largest first: the memory that it takes then holds every smaller one.
        for count, bucket in enumerate(reversed(self.buckets), 1):
            self._replays[bucket] = capture(lambda bucket=bucket: run(bucket))  # type: ignore[misc]
            if count % 8 == 0 or count == len(self.buckets):
                seconds = time.perf_counter() - started
                logger.info("captured %d of %d decode graphs, %.1f s", count, len(self.buckets), seconds)

    def of(self, size: int) -> Callable[[], None]:
        """What computes at least `size` rows, at most `largest`, and as few as any graph does."""
        return self._replays[self.buckets[bisect_left(self.buckets, size)]]
