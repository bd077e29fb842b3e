"""Holds the rows of a batch to their requests' grammars."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.errors import GrammarError
from model.sampling.grammar import Grammar
from model.sampling.masks import GrammarState, apply_masks, fill_masks, new_bitmask


class Constraints:
    """Where each constrained request stands, by its row in the sampler. The others cost nothing."""

    def __init__(self) -> None:
        self._states: dict[int, GrammarState] = {}

    def attach(self, row: int, grammar: Grammar, output_ids: Sequence[int]) -> None:
        """A request that has said `output_ids` so far. Raises `GrammarError` if its grammar does not allow them."""
        self._states[row] = grammar.start(output_ids)

    def detach(self, row: int) -> None:
        """The row's request is not running any more."""
        self._states.pop(row, None)

    def rows(self, index: Sequence[int]) -> list[int]:
        """Which of a step's samples are constrained."""
        return [i for i, row in enumerate(index) if row in self._states] if self._states else []

    def mask(
        self, logits: Tensor, samples: Sequence[int], index: Sequence[int], guesses: Sequence[int | None]
    ) -> Tensor:
        """Logits with -inf for whatever a grammar forbids, and for everything where a grammar has failed.

        logits: [n, vocab_size]; samples: those of `rows`; index: [n], the row of each sample's request; guesses: [n],
        the token that the request's next sample in this step takes this one to be, None for its last.
        """
        bitmask = new_bitmask(len(samples), logits.shape[1])
        for failed in fill_masks(self._states_of(samples, index, guesses), bitmask):
            bitmask[failed] = 0
        which = torch.tensor(samples, device=logits.device)
        masked = logits.clone()
        masked[which] = apply_masks(logits[which], bitmask.to(logits.device))
        return masked

    def accept(
        self,
        samples: Sequence[int],
        index: Sequence[int],
        guesses: Sequence[int | None],
        token_ids: Sequence[int | None],
    ) -> list[int]:
        """Go on by what was sampled, as far as guesses were right. Returns the samples that their grammar refused."""
        refused, astray = [], False
        for i in samples:
            follows = i > 0 and index[i - 1] == index[i]
            astray = follows and (astray or token_ids[i - 1] != guesses[i - 1])
            token_id = token_ids[i]
            if astray or token_id is None:
                continue
            try:
                self._states[index[i]].accept(token_id)
            except GrammarError:
                refused.append(i)
        return refused

    def _states_of(
        self, samples: Sequence[int], index: Sequence[int], guesses: Sequence[int | None]
    ) -> list[GrammarState | None]:
        """The state before each sample. Behind a guess that the grammar forbids there is none: nothing comes of it."""
        states: list[GrammarState | None] = []
        for i in samples:
            guess = guesses[i - 1] if i > 0 and index[i - 1] == index[i] else None
            state = self._states[index[i]] if guess is None else _after(states[-1], guess)
            states.append(state)
        return states


def _after(state: GrammarState | None, token_id: int) -> GrammarState | None:
    if state is None:
        return None
    state = state.clone()
    try:
        state.accept(token_id)
    except GrammarError:
        return None
    return state
