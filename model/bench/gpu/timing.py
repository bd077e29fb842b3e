"""How long a function takes on a device, and what the device could do at best."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from triton.testing import do_bench

from model.engine.graphs import Capture, CudaCapture


class Card(NamedTuple):
    """bandwidth: bytes a second of a copy, read and written both counted. products: operations a second."""

    bandwidth: float
    products: float


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median of some 40 ms of runs, each with a cold cache; in a rehearsal one run."""
    if device.type == "cuda":
        replay = replayed(function, CudaCapture(device))
        return float(do_bench(replay, warmup=10, rep=40, return_mode="median")) / 1e3
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def replayed(function: Callable[[], object], capture: Capture) -> Callable[[], object]:
    """The same as one graph: a kernel shorter than the host's time to launch it would be timed as that (110 us once).

    What cannot be captured is called as it is, and that is said.
    """

    def run() -> None:
        function()

    try:
        return capture(run)
    except RuntimeError as error:
        print(f"  (not captured, so short times are the host's: {error})", flush=True)
        return function


def measure_card(device: torch.device, dtype: torch.dtype, copy_bytes: int, size: int) -> Card:
    """A copy of `copy_bytes`, and a square product of `size`."""
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copy_bytes / seconds(lambda: target.copy_(source), device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Card(bandwidth, 2 * size**3 / seconds(lambda: a @ b.t(), device))


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
