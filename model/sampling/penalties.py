"""Which tokens a request has seen, kept on the device for those requests that are penalized for repeating them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.sampling.params import SamplingParams


class Penalties:
    """One row a penalized request; the others have none and cost nothing.

    counts: [rows, vocab_size] int32: how often each token stands in the output.
    seen: [rows, vocab_size] bool: whether it stands in the prompt or the output.
    strengths: [rows, 3] fp32: presence, frequency, repetition.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self.seen = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self.strengths = torch.zeros(0, 3, device=device)
        self._free: list[int] = []

    def attach(self, params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int) -> int:
        """A row for a request with these tokens, of which the first `num_prompt_tokens` are its prompt."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        tokens = torch.tensor(token_ids, device=self.counts.device)
        output = tokens[num_prompt_tokens:]
        self.counts[row].zero_().index_put_((output,), torch.ones_like(output, dtype=torch.int32), accumulate=True)
        self.seen[row].zero_()[tokens] = True
        self.strengths[row] = torch.tensor(
            [params.presence_penalty, params.frequency_penalty, params.repetition_penalty]
        )
        return row

    def detach(self, row: int) -> None:
        """The row's request is gone."""
        self._free.append(row)

    def observe(self, rows: Tensor, token_ids: Tensor) -> None:
        """One new output token for each of these rows. Both [n]; no row twice."""
        self.counts[rows, token_ids] += 1
        self.seen[rows, token_ids] = True

    def apply(self, logits: Tensor, rows: Tensor) -> Tensor:
        """logits: [n, vocab_size] of the requests that hold these rows, [n]; same shape out."""
        presence, frequency, repetition = self.strengths[rows].unsqueeze(-1).unbind(1)  # each [n, 1]
        counts = self.counts[rows]
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(self.seen[rows], repeated, logits)
        return logits - frequency * counts - presence * (counts > 0)

    def _grow(self) -> None:
        old = len(self.counts)
        new = max(4, old)
        self.counts, self.seen, self.strengths = (
            torch.cat([x, x.new_zeros(new, x.shape[1])]) for x in (self.counts, self.seen, self.strengths)
        )
        self._free += range(old + new - 1, old - 1, -1)
