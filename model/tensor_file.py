"""Reads safetensors files: a header that is checked before it is believed, and tensors by memory map, piece by piece.

A file is 8 bytes with the length of its header, the header, a JSON object that says of each tensor its dtype, its shape
and where its bytes stand, and then those bytes without a gap (github.com/huggingface/safetensors). The library's own
reader says that a file is bad, but not which tensor, and what it has mapped stays in memory until all is read.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.errors import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Other dtypes of the format and their bytes per element. Old exporters left masks of these in their files.
OTHER_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "F64": 8,
    "I64": 8, "U64": 8,
}  # fmt: skip
SIZES = {**{name: dtype.itemsize for name, dtype in DTYPES.items()}, **OTHER_SIZES}
MAX_HEADER_BYTES = 100_000_000  # as the format's own reader has it
PIECE_BYTES = 16 * 2**20


class Entry(NamedTuple):
    """A tensor's line in the header. start, stop: where its bytes stand in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """One safetensors file. entries: its tensors by name. Raises `CheckpointError` for whatever is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.entries = _read_header(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: missing") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a valid safetensors file: {error}") from error
        self._map: mmap.mmap | None = None

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor in pieces along its first dimension, in order. Each is gone when the next one is asked for: what has
        been read is given back to the system, so that a checkpoint is never in memory twice.
        """
        dtype, shape, start, stop = self.entries[name]
        mapped = self._mapped()
        if stop > len(mapped):
            raise CheckpointError(f"{self.path}: has become shorter since its header was read")
        row_bytes = (stop - start) // shape[0]
        step = max(1, PIECE_BYTES // row_bytes) * row_bytes
        for first in range(start, stop, step):
            last = min(first + step, stop)
            count = (last - first) // DTYPES[dtype].itemsize
            yield torch.frombuffer(mapped, dtype=DTYPES[dtype], count=count, offset=first).view(-1, *shape[1:])
            page = first - first % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, page, last - page)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with self.path.open("rb") as file:
                # A private mapping: torch wants memory that could be written, and the file never is.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._map


def _read_header(path: Path) -> dict[str, Entry]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"its header would be {length} bytes long, in a file of {size}")
        raw = json.loads(file.read(length).decode(), object_pairs_hook=_without_repetition)
    if not isinstance(raw, dict):
        raise ValueError("its header holds no JSON object")
    raw.pop("__metadata__", None)
    entries = {name: _entry(name, value, 8 + length) for name, value in raw.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise ValueError(f"tensor {name!r} {what}: it begins at byte {entry.start}, not {position}")
        position = entry.stop
        if position > size:
            raise ValueError(f"tensor {name!r} ends at byte {position} of a file of {size}")
    if position != size:
        raise ValueError(f"{size - position} bytes follow its last tensor")
    return entries


def _entry(name: str, value: Any, data_start: int) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)], **rest} if not rest:
            pass
        case _:
            raise ValueError(f"tensor {name!r} is not described by dtype, shape and two data_offsets")
    if dtype not in SIZES:
        raise ValueError(f"tensor {name!r} has dtype {dtype}, which is not known")
    if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
        raise ValueError(f"tensor {name!r} has a shape or data_offsets that are not whole numbers of at least 0")
    if stop - start != math.prod(shape) * SIZES[dtype]:
        raise ValueError(f"tensor {name!r} of shape {shape} in {dtype} does not take the {stop - start} bytes it has")
    return Entry(dtype, tuple(shape), data_start + start, data_start + stop)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"its header names {name!r} twice")
        found[name] = value
    return found
