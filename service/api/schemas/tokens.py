"""The bodies of `POST /tokenize` and `POST /detokenize`."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from model.errors import InvalidRequest
from service.api.schemas.chat import MAX_MESSAGES, Message
from service.api.schemas.sampling import TokenId
from service.api.schemas.strict import Body, ListOf


class TokenizeRequest(Body):
    """Body of `POST /tokenize`: a text, or a chat as its template writes it. Exactly one of them.

    add_special_tokens: those that the tokenizer puts around a text; true by default. A chat's template writes its own.
    add_generation_prompt: what a chat's template writes for the assistant to go on from; true by default.
    """

    prompt: str | None = None
    messages: Annotated[ListOf[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _a_text_or_a_chat(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("send either prompt or messages", param="prompt")
        if self.prompt is None and self.add_special_tokens is not None:
            raise InvalidRequest("add_special_tokens is only for a prompt", param="add_special_tokens")
        if self.messages is None and self.add_generation_prompt is not None:
            raise InvalidRequest("add_generation_prompt is only for messages", param="add_generation_prompt")
        return self


class DetokenizeRequest(Body):
    """Body of `POST /detokenize`."""

    tokens: ListOf[TokenId]
