"""The one mutable state of a request, and what the engine says about it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from model.attention.weights import AttentionRequest, TokenAttention
from model.cache.prefix import chain, root
from model.errors import InvalidRequest
from model.sampling.params import SamplingParams
from model.sampling.result import TokenLogprobs

if TYPE_CHECKING:
    from model.sampling.grammar import Grammar

FinishReason = Literal["stop", "length", "deadline", "error"]


class TokenOutput(NamedTuple):
    """What one step gave one request.

    finish_reason: None while more is to come; then `stop` (an end-of-sequence or stop token, the last of `token_ids`),
        `length` (max_tokens reached), `deadline` (it passed) or `error` (the step failed, or its logits were not
        numbers; the service's log says why).
    num_cached_tokens: prompt tokens that came from the prefix cache.
    logprobs: one for each of `token_ids`, for those who ask.
    prompt_logprobs: with the first output, one for each prompt token; the first token has none.
    attention: for those who ask, for each of `token_ids` where its logits came from: the weights of the row before it.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    num_cached_tokens: int
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    attention: list[TokenAttention] | None = None

    @classmethod
    def of(
        cls,
        request: "Request",
        token_ids: list[int],
        reason: FinishReason | None,
        logprobs: Sequence[TokenLogprobs | None] | None,
        attention: Sequence[TokenAttention | None] | None,
    ) -> "TokenOutput":
        """Of a request that `token_ids` have just been appended to. logprobs, attention: of its samples, where any
        request of the step asks for them.
        """
        first = request.num_output_tokens <= len(token_ids)
        if request.params.logprobs is None:
            logprobs = None
        return cls(
            request.request_id,
            token_ids,
            reason,
            request.num_cached_tokens,
            logprobs=None if logprobs is None else [item for item in logprobs[: len(token_ids)] if item],
            prompt_logprobs=request.prompt_logprobs if first and request.params.prompt_logprobs is not None else None,
            attention=None if attention is None else [item for item in attention[: len(token_ids)] if item] or None,
        )


class Request:
    """Token ids in, token ids out. A single cursor, `num_computed_tokens`, says how far the cache has come.

    While a step that it takes part in is on its way, `num_launched_tokens` more are being computed, and
    `num_unread_tokens` being sampled, whose ids are not known here yet. `epoch` changes when the request leaves the
    running ones: a step's results that were launched in another epoch are not taken in.

    output_ids: tokens that this request has already produced elsewhere; it goes on behind them as if it had never
        moved. They count towards `max_tokens`.
    priority: lower goes first, and is preempted last; among equals, who came first.
    deadline: on the clock of `time.monotonic`; the request ends then, wherever it is.
    cache_salt: prefixes are shared only between requests of one salt.
    grammar: what the output is held to. It decides when the completion may end, so `ignore_eos` and `min_tokens` are
        refused beside it (`InvalidRequest`), and so are `output_ids` that it does not allow (`GrammarError`).
    leader: a request with the same prompt, whose prompt this one waits for, to share it from the cache.
    attention: the heads whose weights are to be shown with each token.
    """

    __slots__ = (
        "arrival",
        "attention",
        "block_hashes",
        "block_table",
        "cache_salt",
        "deadline",
        "draft_credit",
        "draft_ids",
        "draft_index",
        "epoch",
        "grammar",
        "leader",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_launched_tokens",
        "num_prompt_tokens",
        "num_unread_tokens",
        "params",
        "prefix_root",
        "priority",
        "prompt_logprobs",
        "request_id",
        "row",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        output_ids: Sequence[int] = (),
        priority: int = 0,
        deadline: float | None = None,
        cache_salt: str = "",
        grammar: "Grammar | None" = None,
        leader: "Request | None" = None,
        attention: AttentionRequest | None = None,
    ) -> None:
        if grammar is not None and (params.ignore_eos or params.min_tokens):
            name = "ignore_eos" if params.ignore_eos else "min_tokens"
            raise InvalidRequest(f"{name} contradicts the grammar, which says where the output ends", param=name)
        if grammar is not None and output_ids:
            grammar.start(output_ids)  # raises here, in the caller's thread, if it could not have said that
        self.request_id = request_id
        self.params = params
        self.priority = priority
        self.deadline = deadline
        self.cache_salt = cache_salt
        self.grammar = grammar
        self.leader = leader
        self.attention = attention
        self.num_prompt_tokens = len(prompt_ids)
        self.token_ids = [*prompt_ids, *output_ids]
        # Kept by the scheduler:
        self.arrival = 0
        self.num_computed_tokens = 0
        self.num_launched_tokens = 0
        self.num_unread_tokens = 0
        self.epoch = 0
        self.num_cached_tokens = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.prefix_root = root(cache_salt)
        self.draft_ids: list[int] = []
        self.draft_credit = 0
        self.draft_index: dict[tuple[int, ...], int] = {}
        # Kept by the runner:
        self.row: int | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, here or elsewhere."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def has_prompt_computed(self) -> bool:
        """Whether the keys and values of the whole prompt lie in the cache."""
        return self.num_computed_tokens >= self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether there are prompt tokens left whose log-probability is asked for."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens

    @property
    def is_read_at_once(self) -> bool:
        """Whether the step after next cannot be launched before the host has seen what this request's step gave."""
        params = self.params
        asks = params.logprobs is not None or params.prompt_logprobs is not None
        return asks or self.grammar is not None or self.attention is not None

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: the smaller."""
        return self.priority, self.arrival

    def hash_blocks(self, count: int, block_size: int) -> list[bytes]:
        """The hashes of the first `count` blocks, all of them full. Each is computed once."""
        while len(self.block_hashes) < count:
            start = len(self.block_hashes) * block_size
            parent = self.block_hashes[-1] if self.block_hashes else self.prefix_root
            self.block_hashes.append(chain(parent, self.token_ids[start : start + block_size]))
        return self.block_hashes[:count]
