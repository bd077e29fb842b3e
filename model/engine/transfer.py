"""Copies between host and device that nobody waits for until what they bring is wanted.

What a step needs on the device goes there packed, in one copy, out of pinned buffers that take turns. A buffer is not
written again before its copy has completed: that copy waits behind the step that is on its way.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Wait = Callable[[], None]
BUFFERS = 4  # a step sends once or twice, a company's first one thrice, and two steps may be on their way
ALIGNMENT = 16  # bytes: of each array in its buffer
FIRST_BYTES = 1 << 16


class Transfers(Protocol):
    """The two ways between a step's host arrays and its device."""

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """The arrays on the device. They stay valid until `BUFFERS` - 1 more calls of `send` or `fill`."""
        ...

    def fill(self, target: Tensor, arrays: Sequence[NDArray[Any]]) -> None:
        """The arrays to the first bytes of `target` on the device, packed as `unpacked` reads them."""
        ...

    def fetch(self, ids: Tensor) -> Callable[[], NDArray[np.int64]]:
        """Begin to copy ids, [n] int64, to the host. The call of what is returned waits for them, and gives them."""
        ...


class DirectTransfers:
    """Where host and device are one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """See `Transfers`."""
        return [torch.from_numpy(array).to(self._device) for array in arrays]

    def fill(self, target: Tensor, arrays: Sequence[NDArray[Any]]) -> None:
        """See `Transfers`."""
        for there, array in zip(unpacked(target, arrays), arrays, strict=True):
            there.copy_(torch.from_numpy(array))

    def fetch(self, ids: Tensor) -> Callable[[], NDArray[np.int64]]:
        """See `Transfers`."""
        found = ids.numpy(force=True).copy()  # the next step may be computed to the same place
        return lambda: found


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
        self.ids, self.ids_there = self.packed.view(np.int64), self.host.view(torch.int64)
        self.wait: Wait = _nothing
        # The whole buffer in each dtype, so that an array is one slice: some 50 us less of a step with 17 of them.
        self.typed: dict[np.dtype[Any], Tensor] = {}

    def pack(self, arrays: Sequence[NDArray[Any]], starts: Sequence[int]) -> None:
        """Write each array to the host's buffer, from its byte on."""
        for array, start in zip(arrays, starts, strict=True):
            self.packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class PinnedTransfers:
    """`Transfers` through pinned memory."""

    def __init__(self, copies: CopyEngine) -> None:
        self._copies = copies
        self._out = [_Lane(copies, FIRST_BYTES) for _ in range(BUFFERS)]
        self._back = [_Lane(copies, FIRST_BYTES) for _ in range(BUFFERS)]
        self._sent = self._fetched = 0

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """See `Transfers`."""
        lane, starts, num_bytes = self._packed(arrays)
        lane.wait = self._copies.copy(lane.device[:num_bytes], lane.host[:num_bytes])
        return [_view(lane.device, array, start, lane.typed) for array, start in zip(arrays, starts, strict=True)]

    def fill(self, target: Tensor, arrays: Sequence[NDArray[Any]]) -> None:
        """See `Transfers`."""
        lane, _, num_bytes = self._packed(arrays)
        lane.wait = self._copies.copy(target[:num_bytes], lane.host[:num_bytes])

    def fetch(self, ids: Tensor) -> Callable[[], NDArray[np.int64]]:
        """See `Transfers`."""
        count = len(ids)
        lane = self._lane(self._back, self._fetched, ids.nbytes)
        self._fetched += 1
        wait = lane.wait = self._copies.copy(lane.ids_there[:count], ids)

        def arrived() -> NDArray[np.int64]:
            wait()
            return lane.ids[:count].copy()

        return arrived

    def _packed(self, arrays: Sequence[NDArray[Any]]) -> tuple[_Lane, list[int], int]:
        """The arrays in a buffer of the host's; the first byte of each, and the number of all."""
        *starts, num_bytes = _places(arrays)
        lane = self._lane(self._out, self._sent, num_bytes)
        self._sent += 1
        lane.pack(arrays, starts)
        return lane, starts, num_bytes

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


def packed_bytes(arrays: Sequence[NDArray[Any]]) -> int:
    """Bytes of a buffer that takes these arrays."""
    return _places(arrays)[-1]


def unpacked(packed: Tensor, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
    """Where each array of such a shape and dtype stands in bytes that it is packed to with the others."""
    typed: dict[np.dtype[Any], Tensor] = {}
    return [_view(packed, array, start, typed) for array, start in zip(arrays, _places(arrays), strict=False)]


def _places(arrays: Sequence[NDArray[Any]]) -> list[int]:
    """The first byte of each, and behind them the end of the last."""
    return list(accumulate((_aligned(array.nbytes) for array in arrays), initial=0))


def _view(packed: Tensor, array: NDArray[Any], start: int, typed: dict[np.dtype[Any], Tensor]) -> Tensor:
    """The same bytes as such an array, from byte `start` on. typed: all of them, in each dtype that was asked for."""
    if (whole := typed.get(array.dtype)) is None:
        whole = typed[array.dtype] = packed.view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
    first = start // array.itemsize
    flat = whole[first : first + array.size]
    return flat if array.ndim == 1 else flat.view(array.shape)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _nothing() -> None:
    """There was no copy yet."""
