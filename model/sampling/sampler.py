"""Turns a batch of logits into token ids: every row by its own parameters, none of them by its neighbours.

What a request asks for is written into its row once, when it joins; a step picks rows by index. The order of the
stages: bias, bans and penalties, temperature, min-p, top-k, top-p, draw. A stage that no row asks for is not run.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.sampling.constraints import Constraints
from model.sampling.draw import draw, drop_unlikely, keyed_uniforms, truncate
from model.sampling.grammar import Grammar
from model.sampling.logprobs import token_logprobs
from model.sampling.params import SamplingParams
from model.sampling.penalties import Penalties
from model.sampling.result import Sampled, TokenLogprobs

if TYPE_CHECKING:
    from model.kernels.sampling import SamplingRows

_MASK_64 = (1 << 64) - 1

_ROW = np.dtype(
    [
        ("temperature", "f4"),
        ("top_k", "i8"),
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("seed", "u8"),
        ("min_position", "i8"),  # nothing that ends the completion is sampled before this position
        ("penalties", "i8"),  # row in `Penalties`, or NO_ROW
        ("adjusts", "?"),  # has a logit bias or a min_tokens: rare, so looked at row by row
        ("logprobs", "i8"),  # how many to list, or NO_ROW for none at all
    ]
)
NO_ROW = -1
SPOILED = -1


class Drawn(NamedTuple):
    """A token for each row of logits, on the device; what else is needed to tell the host.

    token_ids: [n], each one of the vocabulary; told: [n], the same, or SPOILED where the logits were not numbers or
    forbade every token.
    """

    token_ids: Tensor
    told: Tensor
    logits: Tensor
    wanted: NDArray[np.void]
    rows: Sequence[int]
    guesses: Sequence[int | None]
    constrained: Sequence[int]


class Sampler:
    """Parameters and token counts of the requests that are running, one row each."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._eos_token_ids = tuple(eos_token_ids)
        self._rows = np.zeros(0, dtype=_ROW)
        self._params: list[SamplingParams] = []
        self._free: list[int] = []
        self._penalties = Penalties(vocab_size, device)
        self._constraints = Constraints()
        self._table: SamplingRows | None = None  # of `_rows`, on the device; None where they have changed since

    def attach(
        self,
        params: SamplingParams,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        grammar: Grammar | None = None,
    ) -> int:
        """Write a request's parameters into a row; its tokens so far matter for penalties and grammar alone."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._params[row] = params
        self._rows[row] = (
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seed & _MASK_64,
            num_prompt_tokens + params.min_tokens,
            self._penalties.attach(params, token_ids, num_prompt_tokens) if params.penalizes else NO_ROW,
            bool(params.logit_bias or params.min_tokens),
            NO_ROW if params.logprobs is None else params.logprobs,
        )
        self._table = None
        if grammar is not None:
            self._constraints.attach(row, grammar, token_ids[num_prompt_tokens:])
        return row

    def detach(self, row: int) -> None:
        """The row's request is not running any more."""
        if (penalized := int(self._rows["penalties"][row])) != NO_ROW:
            self._penalties.detach(penalized)
        self._constraints.detach(row)
        self._free.append(row)

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        guesses: Sequence[int | None],
        likeliest: tuple[Tensor, Tensor] | None = None,
    ) -> Sampled:
        """Draw, and tell at once what was drawn: see `draw`."""
        drawn = self.draw(logits, rows, positions, guesses, likeliest)
        return self.tell(drawn, drawn.told.tolist())

    def draw(
        self,
        logits: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        guesses: Sequence[int | None],
        likeliest: tuple[Tensor, Tensor] | None = None,
        keys: tuple[Tensor, Tensor] | None = None,
    ) -> Drawn:
        """logits: [n, vocab_size]; for each its request's row, the position of the token to be sampled, and the guess
        that the next of the request's samples stands behind (None for its last).

        likeliest: the ids and values of the largest logits, [n] each, where they are known already: for 32 rows of a
            vocabulary of 49,152 it saves 1 ms.
        keys: rows and positions on the device, where our kernel is to sample there.
        A request that is penalized has one sample in a step; others may have several, at positions in a row. Where
        nobody asks for more than temperature, top-k, top-p and min-p, the host waits for nothing.
        """
        index = np.asarray(rows)
        at = np.asarray(positions)
        wanted = self._rows[index]
        adjusted = self._adjust(logits, index, at, wanted)
        constrained = self._constraints.rows(rows)
        if constrained:
            adjusted = self._constraints.mask(adjusted, constrained, rows, guesses)
        if keys is None:
            chosen, usable = self._choose(adjusted, at, wanted, likeliest if adjusted is logits else None)
        else:
            chosen, usable = self._choose_on_device(adjusted, *keys)
        self._observe(chosen, wanted)
        return Drawn(chosen, torch.where(usable, chosen, SPOILED), logits, wanted, rows, guesses, constrained)

    def tell(self, drawn: Drawn, token_ids: Sequence[int]) -> Sampled:
        """What was drawn, as the host sees it. token_ids: `drawn.told`, once it has come to the host."""
        told: list[int | None] = [None if token_id == SPOILED else token_id for token_id in token_ids]
        for i in self._constraints.accept(drawn.constrained, drawn.rows, drawn.guesses, told):
            told[i] = None
        return Sampled(told, self._logprobs(drawn.logits, drawn.token_ids, drawn.wanted))

    def _adjust(
        self, logits: Tensor, index: NDArray[np.int64], at: NDArray[np.int64], wanted: NDArray[np.void]
    ) -> Tensor:
        """Bias, bans of `min_tokens`, penalties. The logits themselves are left as the model gave them."""
        adjusts, penalized = wanted["adjusts"].nonzero()[0], wanted["penalties"] != NO_ROW
        if len(adjusts) == 0 and not penalized.any():
            return logits
        logits = logits.float().clone()
        for i in adjusts:
            params = self._params[index[i]]
            if params.logit_bias:
                ids = torch.tensor(list(params.logit_bias), device=self._device)
                logits[i, ids] += torch.tensor(list(params.logit_bias.values()), device=self._device)
            if at[i] < wanted["min_position"][i]:
                logits[i, list({*self._eos_token_ids, *params.stop_token_ids})] = -torch.inf
        if penalized.any():
            which = torch.from_numpy(penalized.nonzero()[0]).to(self._device)
            rows = torch.from_numpy(wanted["penalties"][penalized]).to(self._device)
            logits[which] = self._penalties.apply(logits[which], rows)
        return logits

    def _choose(
        self,
        logits: Tensor,
        at: NDArray[np.int64],
        wanted: NDArray[np.void],
        likeliest: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Token ids, and which rows were of numbers; each row by its own temperature, 0 meaning greedy. Both [n]."""
        drawing = wanted["temperature"] > 0
        if not drawing.any():
            return _greedy(logits) if likeliest is None else (likeliest[0], likeliest[1].isfinite())
        if drawing.all():
            return self._draw(logits, at, wanted)
        ids, usable = _greedy(logits)
        which = self._to_device(drawing.nonzero()[0])
        ids[which], usable[which] = self._draw(logits[which], at[drawing], wanted[drawing])
        return ids, usable

    def _choose_on_device(self, logits: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same by our kernel."""
        from model.kernels.sampling import SamplingRows, sample  # there is no Triton where there is no GPU

        if self._table is None:
            seeds = self._rows["seed"].view(np.int64)
            columns = (*(self._rows[name] for name in ("temperature", "top_k", "top_p", "min_p")), seeds)
            self._table = SamplingRows(*map(self._to_device, columns))
        return sample(logits, self._table, rows, positions)

    def _draw(self, logits: Tensor, at: NDArray[np.int64], wanted: NDArray[np.void]) -> tuple[Tensor, Tensor]:
        scaled = logits.to(torch.float32, copy=True).div_(self._to_device(wanted["temperature"])[:, None])
        if wanted["min_p"].any():
            scaled = drop_unlikely(scaled, self._to_device(wanted["min_p"]))
        if wanted["top_k"].any() or (wanted["top_p"] < 1).any():
            scaled = truncate(scaled, self._to_device(wanted["top_k"]), self._to_device(wanted["top_p"]))
        return draw(scaled, self._to_device(keyed_uniforms(wanted["seed"], at.astype(np.uint64))))

    def _observe(self, token_ids: Tensor, wanted: NDArray[np.void]) -> None:
        penalized = wanted["penalties"] != NO_ROW
        if penalized.any():
            rows = self._to_device(wanted["penalties"][penalized])
            self._penalties.observe(rows, token_ids[self._to_device(penalized.nonzero()[0])])

    def _logprobs(
        self, logits: Tensor, token_ids: Tensor, wanted: NDArray[np.void]
    ) -> list[TokenLogprobs | None] | None:
        asked = (wanted["logprobs"] != NO_ROW).nonzero()[0]
        if len(asked) == 0:
            return None
        which = self._to_device(asked)
        found = token_logprobs(logits[which], token_ids[which], wanted["logprobs"][asked].tolist())
        logprobs: list[TokenLogprobs | None] = [None] * len(wanted)
        for i, item in zip(asked, found, strict=True):
            logprobs[i] = item
        return logprobs

    def _to_device(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values.copy()).to(self._device)

    def _grow(self) -> None:
        old = len(self._rows)
        new = max(8, old)
        self._rows = np.concatenate([self._rows, np.zeros(new, dtype=_ROW)])
        self._params += [SamplingParams(max_tokens=1)] * new
        self._free += range(old + new - 1, old - 1, -1)


def _greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, and whether it is a number: `max` passes NaN on; all forbidden leaves -inf."""
    values, ids = logits.max(dim=-1)
    return ids, values.isfinite()
