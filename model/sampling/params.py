"""What a request asks of the sampler, and when it is to stop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from model.errors import InvalidRequest

MAX_TOP_K = 1 << 31
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 128

GrammarKind = Literal["json_object", "json_schema", "regex", "lark", "choice"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling, validated when made. Raises `InvalidRequest` naming the field.

    usual_tokens: how many such requests generate in the mean, where `max_tokens` is no more than what the context has
        room for. Nothing ends there: it is for whoever has to know how much there is to do.
    temperature: 0 is greedy; top_k: 0 keeps all; top_p: 1 keeps all; min_p: 0 keeps all.
    seed: with the token's position it is the whole source of randomness, so a request gives the same tokens alone, in
        a batch, preempted, or resumed elsewhere.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output, once, and once for each
        time; repetition_penalty divides what speaks for a token of prompt or output (Keskar et al. 2019).
    logit_bias: token id -> what is added to its logit.
    min_tokens: until so many are generated, nothing that would end the completion is sampled.
    logprobs, prompt_logprobs: report each token's log-probability, and this many of the likeliest beside it. They are
        of the model's own distribution, before any of the above.
    """

    max_tokens: int
    usual_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_range("max_tokens", self.max_tokens, 1, None)
        self._check_range("temperature", self.temperature, 0.0, 2.0)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p must lie in (0, 1], not {self.top_p}", param="top_p")
        self._check_range("top_k", self.top_k, 0, MAX_TOP_K - 1)
        self._check_range("min_p", self.min_p, 0.0, 1.0)
        self._check_range("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        self._check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        # Not down to 0: logits over 5e-324 are no numbers.
        self._check_range("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        self._check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        self._check_range("logit_bias", len(self.logit_bias), 0, MAX_LOGIT_BIAS, what="number of entries")
        for bias in self.logit_bias.values():
            self._check_range("logit_bias", bias, -100.0, 100.0, what="value")
        self._check_range("stop_token_ids", len(self.stop_token_ids), 0, MAX_STOP_TOKEN_IDS, what="number of ids")
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                self._check_range(name, count, 0, MAX_LOGPROBS)

    def tokens_left(self, num_output_tokens: int) -> int:
        """How many are to come behind so many: all that it may have; where that says nothing, the usual number, however
        many there have been: that a text goes on is no sign that it will soon end.
        """
        left = max(0, self.max_tokens - num_output_tokens)
        return left if self.usual_tokens is None else min(left, self.usual_tokens)

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    def _check_range(self, name: str, value: float, low: float, high: float | None, *, what: str | None = None) -> None:
        top = math.inf if high is None else high
        if not low <= value <= top:
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise InvalidRequest(f"{f'{what} of ' if what else ''}{name} must be {bounds}, not {value}", param=name)


def sibling_seed(seed: int, index: int) -> int:
    """The seed of the `index`-th of several completions; the first keeps the request's own."""
    mixed = (seed + index * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    return mixed - (1 << 64) if mixed >= 1 << 63 else mixed


@dataclass(frozen=True)
class GrammarSpec:
    """What an output has to match. Hashable: equal specs share one compiled grammar.

    source: a JSON Schema, a regular expression that the whole output matches, a Lark grammar with the rule `start`, or
        a JSON list of the texts to choose from. Empty for `json_object`.
    """

    kind: GrammarKind
    source: str = ""

    @property
    def param(self) -> str:
        """The request's field at fault if this cannot be compiled."""
        return "response_format" if self.kind.startswith("json") else f"structured_outputs.{self.kind}"
