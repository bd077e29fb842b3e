"""`POST /tokenize` and `POST /detokenize`: what the model sees of a text or a chat, and back."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from model.errors import InvalidRequest
from service.api import body as request_body
from service.api.chat import render, template_of
from service.api.schemas.tokens import DetokenizeRequest, TokenizeRequest
from service.completion import Service, encode

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """The token ids of a text or a chat."""
    service: Service = request.app.state.service
    body = await request_body.read(request, TokenizeRequest, service.model_name)
    if body.messages is not None:
        add_generation_prompt = body.add_generation_prompt is not False
        ids = await render(service, template_of(service), body.messages, add_generation_prompt=add_generation_prompt)
    else:
        add_special_tokens = body.add_special_tokens is not False
        (ids,) = await encode(service, [body.prompt or ""], add_special_tokens=add_special_tokens)
    names = [service.tokenizer.token_name(token_id) for token_id in ids] if body.return_token_strs else None
    info = await service.dispatcher.describe()
    return JSONResponse({"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids, "token_strs": names})


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of token ids, special ones left out."""
    service: Service = request.app.state.service
    body = await request_body.read(request, DetokenizeRequest, service.model_name)
    beyond = next((token_id for token_id in body.tokens if token_id >= service.tokenizer.vocab_size), None)
    if beyond is not None:
        raise InvalidRequest(f"{beyond} is no token; ids end at {service.tokenizer.vocab_size - 1}", param="tokens")
    return JSONResponse({"prompt": service.tokenizer.decode(body.tokens)})
