"""The body of `POST /v1/completions`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from model.errors import InvalidRequest
from service.api.schemas.sampling import MAX_CHOICES, ChoiceFields, NumTop, TokenId
from service.api.schemas.strict import ListOf


class CompletionRequest(ChoiceFields):
    """Body of `POST /v1/completions`."""

    no_op: ClassVar[Mapping[str, tuple[Any, ...]]] = {"suffix": ("",)}

    prompt: (
        str
        | Annotated[ListOf[str], Field(max_length=MAX_CHOICES)]
        | ListOf[TokenId]
        | Annotated[ListOf[ListOf[TokenId]], Field(max_length=MAX_CHOICES)]
    )
    # 0 asks for the prompt alone, and is only for `echo`.
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: NumTop | None = None
    prompt_logprobs: NumTop | None = None

    @model_validator(mode="after")
    def _some_prompts(self) -> Self:
        if self.prompt == []:
            raise InvalidRequest("prompt must not be an empty list", param="prompt")
        return self

    @model_validator(mode="after")
    def _nothing_to_generate_only_with_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens is 0: that is only for echo, to score a prompt", param="max_tokens")
        return self

    @model_validator(mode="after")
    def _the_best_of_enough(self) -> Self:
        if self.best_of is not None and self.best_of < self.num_choices:
            raise InvalidRequest(f"best_of ({self.best_of}) must be at least n ({self.num_choices})", param="best_of")
        if self.num_candidates > self.num_choices and self.stream:
            raise InvalidRequest("best_of cannot be streamed: which is the best is known at the end", param="best_of")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs cannot be streamed; echo with logprobs can", param="prompt_logprobs")
        return self

    @property
    def texts(self) -> list[str]:
        """The prompts one by one, when they came as text."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [prompt for prompt in self.prompt if isinstance(prompt, str)]

    @property
    def token_prompts(self) -> list[list[int]]:
        """The prompts one by one, when they came as token ids."""
        if isinstance(self.prompt, str):
            return []
        lists = [prompt for prompt in self.prompt if isinstance(prompt, list)]
        ids = [token_id for token_id in self.prompt if isinstance(token_id, int)]
        return lists or ([ids] if ids else [])

    @property
    def num_candidates(self) -> int:
        """`best_of`, which includes those that come back."""
        return self.best_of or self.num_choices

    @property
    def num_logprobs(self) -> int | None:
        """`logprobs`: here a number."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """For those who ask for them, and for those to whom the prompt is told with the rest."""
        counts = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in counts if count is not None), default=None)
