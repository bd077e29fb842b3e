"""Steps of decodes alone, staged where the graphs read: three numbers a sequence, and the rest only when others decode.

What the graphs read lies in one buffer on the device, in the order in which it changes: a step's own numbers first,
then what each sequence asks of sampling, which stays as long as the same ones decode. A step copies the first part, or
all of it, in one go; what follows from the numbers is made on the device, by the graph itself. It also keeps the block
tables, which lie apart and come once for a company: it writes the block that a token goes to.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.engine.batch import KeptRows, Samples, Unread
from model.engine.graphs import DecodeGraphs
from model.engine.request import Request
from model.engine.scheduled import ScheduledStep
from model.engine.transfer import Transfers, packed_bytes, unpacked
from model.sampling.sampler import Asked, Drawn, Sampler

PADDING = -1  # in the place of a position


class Inputs:
    """Where the graphs read. All of the largest bucket's size; a graph reads the first rows, those that pad it too.

    host: what `packed` gets, laid out on the host. There it is numbers: [3, rows] int32, see `place_decodes`; sampling:
    [rows] each, what the sampling kernel takes between logits and positions. tables: [rows, max_blocks] int32.
    placed: what the graph makes of the numbers: token ids, positions, slots: [rows]; lengths: [rows] int32.
    """

    def __init__(self, rows: int, max_blocks: int, device: torch.device) -> None:
        numbers = np.zeros((3, rows), dtype=np.int32)
        numbers[1] = PADDING
        dtypes = (np.float32, np.int64, np.float32, np.float32, np.int64)
        self.host = [numbers, *(np.zeros(rows, dtype) for dtype in dtypes)]
        self.packed = torch.zeros(packed_bytes(self.host), dtype=torch.uint8, device=device)
        self.numbers, *self.sampling = unpacked(self.packed, self.host)
        self.tables = torch.zeros(rows, max_blocks, dtype=torch.int32, device=device)
        self.numbers[1].fill_(PADDING)
        placed = (torch.int64, torch.int64, torch.int64, torch.int32)
        self.placed = [torch.zeros(rows, dtype=dtype, device=device) for dtype in placed]


class Outputs(NamedTuple):
    """Where the graphs write: hidden: [rows, hidden_size]; logits: [rows, vocab_size]; token_ids, told: [rows], what
    was drawn from these, and what of it to tell the host (`Drawn`). One for all: the next step overwrites them.
    """

    hidden: Tensor
    logits: Tensor
    token_ids: Tensor
    told: Tensor

    @classmethod
    def of(cls, rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> "Outputs":
        """For up to `rows` sequences."""
        return cls(
            torch.empty(rows, hidden_size, dtype=dtype, device=device),
            torch.empty(rows, vocab_size, dtype=dtype, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )


class Company(NamedTuple):
    """Who decodes, and what is the same in every step of theirs.

    rows: [n], theirs in the sampler; replay: computes a step; outputs: [n, ...] each; drawn: what the graph draws for
    them, None where that is not what they ask for.
    """

    requests: tuple[Request, ...]
    epochs: tuple[int, ...]
    rows: NDArray[np.int64]
    replay: Callable[[], None]
    outputs: Outputs
    drawn: Drawn | None


class Decodes(NamedTuple):
    """A step that lies where its graph reads."""

    company: Company
    samples: Samples


class DecodeSteps:
    """Stages the steps that `graphs` compute, from `inputs` to `outputs`."""

    def __init__(self, inputs: Inputs, outputs: Outputs, graphs: DecodeGraphs, block_size: int) -> None:
        self.inputs, self.outputs, self.graphs = inputs, outputs, graphs
        self._block_size = block_size
        self._company: Company | None = None

    def stage(
        self,
        step: ScheduledStep,
        kept: KeptRows,
        sampler: Sampler,
        transfers: Transfers,
        unread: Unread | None,
    ) -> Decodes | None:
        """Lay out a step of decodes, each of which samples, and none of which is looked into; None if it is not one.

        unread: of the step before, if it is still on its way.
        """
        requests, starts, counts, _, samples, epochs = zip(*step.requests, strict=True)
        company, self._company = self._company, None  # what others compute in between is not on the tables here
        if counts.count(1) < len(requests) or samples.count(1) < len(requests) or len(requests) > self.graphs.largest:
            return None
        arrays = self.inputs.host[:1]
        if company is None or company.requests != requests or company.epochs != epochs:
            if any(request.attention is not None for request in requests):
                return None
            company = self._seat(requests, epochs, kept, sampler, transfers)
            arrays = self.inputs.host
        self._write_numbers(requests, starts, unread)
        transfers.fill(self.inputs.packed, arrays)
        self._company = company
        positions = np.array(starts) + 1
        asked = None if company.drawn is not None else Asked(*transfers.send(sampler.asked(company.rows, positions)))
        return Decodes(company, Samples(requests, company.rows, positions, [None] * len(requests), asked))

    def _write_numbers(self, requests: Sequence[Request], starts: Sequence[int], unread: Unread | None) -> None:
        places = {} if unread is None else unread.places
        numbers, size = self.inputs.host[0], len(requests)
        decoding = list(zip(requests, starts, strict=True))
        numbers[0, :size] = [
            request.token_ids[start] if start < len(request.token_ids) else -1 - places[request]
            for request, start in decoding
        ]
        numbers[1, :size] = starts
        numbers[1, size:] = PADDING
        numbers[2, :size] = [request.block_table[start // self._block_size] for request, start in decoding]
        drawn = self.outputs.token_ids
        if unread is not None and unread.token_ids.data_ptr() != drawn.data_ptr():
            drawn[: len(unread.token_ids)].copy_(unread.token_ids)  # of a step that no graph has computed

    def _seat(
        self,
        requests: tuple[Request, ...],
        epochs: tuple[int, ...],
        kept: KeptRows,
        sampler: Sampler,
        transfers: Transfers,
    ) -> Company:
        """Write what stays as long as these decode; their tables at once, as wide as they are by now."""
        size, rows = len(requests), np.array(kept.rows)
        outputs = Outputs(*(output[:size] for output in self.outputs))
        drawn = sampler.expect(rows, outputs.logits, outputs.token_ids, outputs.told)
        _, *sampling = self.inputs.host
        for parameter, asked in zip(sampling, sampler.asked(rows, rows), strict=False):
            parameter[:size] = asked
        # Padding, and steps that are sampled later from other logits, are drawn from the cheapest way: greedily.
        sampling[0][0 if drawn is None else size :] = 0
        known = kept.tables.of(kept.rows, [request.block_table for request in requests]).astype(np.int32)
        (sent,) = transfers.send([known])
        self.inputs.tables[:size, : known.shape[1]].copy_(sent)  # what lies beyond a sequence's length is never read
        return Company(requests, epochs, rows, self.graphs.of(size), outputs, drawn)
