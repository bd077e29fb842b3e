"""Turns a batch of logits into token ids: every row by its own parameters, none of them by its neighbours.

What a request asks for is written into its row once, when it joins; a step picks rows by index. The order of the
stages: bias, bans and penalties, temperature, min-p, top-k, top-p, draw. A stage that no row asks for is not run.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

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
SPOILED = -1  # told by our kernel as well

# For each row where its largest logit stands, and what that is, NaN if one of the row is, where the forward pass has
# found it by the way. For 32 rows of a vocabulary of 49,152 it saves 1 ms.
Likeliest = tuple[Tensor, Tensor]


class Asked(NamedTuple):
    """What the requests of a step's samples ask for, on the device.

    temperature, top_p, min_p: [n] fp32; top_k, seed: [n] int64; position: [n] int32, where the token will stand.
    penalized: [m], which samples are; penalties: [m], their rows in `Penalties`.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor
    penalized: Tensor
    penalties: Tensor


class Adjustment(NamedTuple):
    """What one request's logits are changed by, on the device.

    biased, biases: [k], token ids and what is added to their logits; ends: ids that end the completion.
    """

    biased: Tensor
    biases: Tensor
    ends: Tensor

    @classmethod
    def of(cls, bias: Mapping[int, float], ends: Collection[int], device: torch.device) -> "Adjustment":
        """Of a request, once: copies to the device in every step would wait for all that was launched."""
        biases = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        biased, ending = (torch.tensor(list(ids), dtype=torch.int64, device=device) for ids in (bias, ends))
        return cls(biased, biases, ending)


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
        self._adjustments: dict[int, Adjustment] = {}  # by row
        self._free: list[int] = []
        self._penalties = Penalties(vocab_size, device)
        self._constraints = Constraints()

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
        if params.logit_bias or params.min_tokens:
            ends = {*self._eos_token_ids, *params.stop_token_ids}
            self._adjustments[row] = Adjustment.of(params.logit_bias, ends, self._device)
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
        if grammar is not None:
            self._constraints.attach(row, grammar, token_ids[num_prompt_tokens:])
        return row

    def detach(self, row: int) -> None:
        """The row's request is not running any more."""
        if (penalized := int(self._rows["penalties"][row])) != NO_ROW:
            self._penalties.detach(penalized)
        self._constraints.detach(row)
        self._adjustments.pop(row, None)
        self._free.append(row)

    def asked(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> list[NDArray[Any]]:
        """The fields of `Asked`, on the host. rows: whose sample each is."""
        wanted = self._rows[rows]
        penalized = (wanted["penalties"] != NO_ROW).nonzero()[0]
        parameters = [wanted[name].copy() for name in ("temperature", "top_k", "top_p", "min_p")]
        seed, position = wanted["seed"].astype(np.int64), positions.astype(np.int32)
        return [*parameters, seed, position, penalized, wanted["penalties"][penalized]]

    def expect(self, rows: NDArray[np.int64], logits: Tensor, token_ids: Tensor, told: Tensor) -> "Drawn | None":
        """What whoever has the logits draws of them as they are, for one sample of each of these rows; None where a row
        asks for another distribution than the model's: bias, bans, penalties, grammar.
        """
        wanted, where = self._rows[rows], rows.tolist()
        if wanted["adjusts"].any() or (wanted["penalties"] != NO_ROW).any() or self._constraints.rows(where):
            return None
        return Drawn(token_ids, told, logits, wanted, where, [None] * len(rows), ())

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        guesses: Sequence[int | None],
        likeliest: Likeliest | None = None,
    ) -> Sampled:
        """Draw, and tell at once what was drawn: see `draw`."""
        drawn = self.draw(logits, np.asarray(rows), np.asarray(positions), guesses, likeliest)
        return self.tell(drawn, drawn.told.tolist())

    def draw(
        self,
        logits: Tensor,
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        guesses: Sequence[int | None],
        likeliest: Likeliest | None = None,
        asked: Asked | None = None,
    ) -> Drawn:
        """logits: [n, vocab_size]; for each its request's row, the position of the token to be sampled, and the guess
        that the next of the request's samples stands behind (None for its last).

        likeliest: see `Likeliest`. asked: `asked` of them on the device, where our kernel is to sample there.
        A request that is penalized has one sample in a step; others may have several, at positions in a row. Where
        nobody asks for more than temperature, top-k, top-p, min-p and penalties, the host waits for nothing.
        """
        wanted = self._rows[rows]
        adjusted = self._adjust(logits, rows, positions, wanted, asked)
        constrained = self._constraints.rows(rows.tolist())
        if constrained:
            adjusted = self._constraints.mask(adjusted, constrained, rows.tolist(), guesses)
        if asked is not None:
            from model.kernels.sampling import sample  # there is no Triton where there is no GPU

            chosen, told = sample(adjusted, *asked[:6])
        else:
            known = likeliest if adjusted is logits else None
            chosen, usable = self._choose(adjusted, positions, wanted, known)
            told = torch.where(usable, chosen, SPOILED)
        self._observe(chosen, wanted, asked)
        return Drawn(chosen, told, logits, wanted, rows.tolist(), guesses, constrained)

    def tell(self, drawn: Drawn, token_ids: Sequence[int]) -> Sampled:
        """What was drawn, as the host sees it. token_ids: `drawn.told`, once it has come to the host."""
        told: list[int | None] = [None if token_id == SPOILED else token_id for token_id in token_ids]
        for i in self._constraints.accept(drawn.constrained, drawn.rows, drawn.guesses, told):
            told[i] = None
        return Sampled(told, self._logprobs(drawn.logits, drawn.token_ids, drawn.wanted))

    def _adjust(
        self,
        logits: Tensor,
        index: NDArray[np.int64],
        at: NDArray[np.int64],
        wanted: NDArray[np.void],
        asked: Asked | None,
    ) -> Tensor:
        """Bias, bans of `min_tokens`, penalties. The logits themselves are left as the model gave them."""
        adjusts, penalized = wanted["adjusts"].nonzero()[0], wanted["penalties"] != NO_ROW
        if len(adjusts) == 0 and not penalized.any():
            return logits
        logits = logits.float().clone()
        for i in adjusts:
            adjustment = self._adjustments[index[i]]
            logits[i].index_add_(0, adjustment.biased, adjustment.biases)
            if at[i] < wanted["min_position"][i]:
                logits[i].index_fill_(0, adjustment.ends, -torch.inf)
        if penalized.any():
            which, rows = self._penalized(wanted, asked)
            logits[which] = self._penalties.apply(logits[which], rows)
        return logits

    def _choose(
        self,
        logits: Tensor,
        at: NDArray[np.int64],
        wanted: NDArray[np.void],
        likeliest: Likeliest | None,
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

    def _draw(self, logits: Tensor, at: NDArray[np.int64], wanted: NDArray[np.void]) -> tuple[Tensor, Tensor]:
        scaled = logits.to(torch.float32, copy=True).div_(self._to_device(wanted["temperature"])[:, None])
        if wanted["min_p"].any():
            scaled = drop_unlikely(scaled, self._to_device(wanted["min_p"]))
        if wanted["top_k"].any() or (wanted["top_p"] < 1).any():
            scaled = truncate(scaled, self._to_device(wanted["top_k"]), self._to_device(wanted["top_p"]))
        return draw(scaled, self._to_device(keyed_uniforms(wanted["seed"], at.astype(np.uint64))))

    def _observe(self, token_ids: Tensor, wanted: NDArray[np.void], asked: Asked | None) -> None:
        if (wanted["penalties"] != NO_ROW).any():
            which, rows = self._penalized(wanted, asked)
            self._penalties.observe(rows, token_ids[which])

    def _penalized(self, wanted: NDArray[np.void], asked: Asked | None) -> tuple[Tensor, Tensor]:
        """Which samples are penalized, and their rows in `Penalties`, on the device."""
        if asked is not None:
            return asked.penalized, asked.penalties
        penalized = (wanted["penalties"] != NO_ROW).nonzero()[0]
        return self._to_device(penalized), self._to_device(wanted["penalties"][penalized])

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
        self._free += range(old + new - 1, old - 1, -1)


def _greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, and whether it is a number: `max` passes NaN on; all forbidden leaves -inf."""
    values, ids = logits.max(dim=-1)
    return ids, values.isfinite()
