"""Copies between host and device that nobody waits for until what they bring is wanted.

What a step needs on the device goes there packed, in one copy, out of pinned buffers that take turns. A buffer is not
written again before its copy has completed: that copy waits behind the step that is on its way.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Wait = Callable[[], None]
BUFFERS = 4  # a step sends once or twice, and two steps may be on their way
ALIGNMENT = 16  # bytes: of each array in its buffer
FIRST_BYTES = 1 << 16


class Transfers(Protocol):
    """The two ways between a step's host arrays and its device."""

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """The arrays on the device. They stay valid until `BUFFERS` - 1 more calls."""
        ...

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a tensor to the host. The call of what is returned waits for it, and gives it."""
        ...


class DirectTransfers:
    """Where host and device are one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """See `Transfers`."""
        return [torch.from_numpy(array).to(self._device) for array in arrays]

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See `Transfers`."""
        return lambda: tensor.cpu()


class CopyEngine(Protocol):
    """Memory that it can copy to and from, and copies that are only begun."""

    def host(self, num_bytes: int) -> Tensor:
        """Bytes on the host, pinned."""
        ...

    def device(self, num_bytes: int) -> Tensor:
        """Bytes on the device."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> Wait:
        """Begin to copy, behind whatever was launched before. The call of what is returned waits for the end."""
        ...


class CudaCopies:
    """Copies on the current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def host(self, num_bytes: int) -> Tensor:
        """See `CopyEngine`."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def device(self, num_bytes: int) -> Tensor:
        """See `CopyEngine`."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def copy(self, target: Tensor, source: Tensor) -> Wait:
        """See `CopyEngine`."""
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return event.synchronize


class _Lane:
    """One pinned buffer with its twin on the device, and the end of their last copy."""

    def __init__(self, copies: CopyEngine, num_bytes: int) -> None:
        self.host, self.device = copies.host(num_bytes), copies.device(num_bytes)
        self.packed = self.host.numpy()
        self.wait: Wait = _nothing
        # The whole buffer in each dtype, so that an array is one slice: some 50 us less of a step with 17 of them.
        self._typed: dict[np.dtype[Any], Tensor] = {}

    def view(self, array: NDArray[Any], start: int) -> Tensor:
        """What came from `array`, packed from byte `start` on, on the device."""
        if (typed := self._typed.get(array.dtype)) is None:
            typed = self._typed[array.dtype] = self.device.view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        first = start // array.itemsize
        flat = typed[first : first + array.size]
        return flat if array.ndim == 1 else flat.view(array.shape)


class PinnedTransfers:
    """`Transfers` through pinned memory."""

    def __init__(self, copies: CopyEngine) -> None:
        self._copies = copies
        self._out = [_Lane(copies, FIRST_BYTES) for _ in range(BUFFERS)]
        self._back = [_Lane(copies, FIRST_BYTES) for _ in range(BUFFERS)]
        self._sent = self._fetched = 0

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """See `Transfers`."""
        ends = np.cumsum([_aligned(array.nbytes) for array in arrays]).tolist()
        starts = [0, *ends[:-1]]
        lane = self._lane(self._out, self._sent, ends[-1])
        self._sent += 1
        for array, start in zip(arrays, starts, strict=True):
            lane.packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        lane.wait = self._copies.copy(lane.device[: ends[-1]], lane.host[: ends[-1]])
        return [lane.view(array, start) for array, start in zip(arrays, starts, strict=True)]

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See `Transfers`."""
        lane = self._lane(self._back, self._fetched, tensor.nbytes)
        self._fetched += 1
        there = lane.host[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        wait = lane.wait = self._copies.copy(there, tensor)

        def arrived() -> Tensor:
            wait()
            return there.clone()

        return arrived

    def _lane(self, lanes: list[_Lane], turn: int, num_bytes: int) -> _Lane:
        """The lane whose turn it is, free to be written and large enough."""
        index = turn % BUFFERS
        lanes[index].wait()
        if lanes[index].host.nbytes < num_bytes:
            lanes[index] = _Lane(self._copies, 2 * _aligned(num_bytes))
        return lanes[index]


def transfers_for(device: torch.device) -> Transfers:
    """What copies to and from this device."""
    return PinnedTransfers(CudaCopies(device)) if device.type == "cuda" else DirectTransfers(device)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _nothing() -> None:
    """There was no copy yet."""
