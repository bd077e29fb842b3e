"""The routes beside generation: which model, is it well, how is it doing."""

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from service import __version__
from service.api.body import unknown_model
from service.completion import Service
from service.errors import NotFound
from service.exposition import CONTENT_TYPE, Exposition, targets

READY_TIMEOUT_S = 2.0
METRICS_TIMEOUT_S = 2.0  # and half as much again where a replica hangs: within a scrape's 5 s

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The one model of this service."""
    return JSONResponse({"object": "list", "data": [_card(request.app.state.service)]})


@router.get("/v1/models/{model:path}")
async def retrieve_model(request: Request, model: str) -> Response:
    """The model of that name, if it is the one of this service."""
    service: Service = request.app.state.service
    if model != service.model_name:
        raise unknown_model(model, service.model_name)
    return JSONResponse(_card(service))


@router.get("/health")
async def health() -> Response:
    """This process answers. It says nothing about the engines."""
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """An engine answers and the doors are open, so a request would be served."""
    service: Service = request.app.state.service
    service.drain.check()
    await service.dispatcher.probe(READY_TIMEOUT_S)
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """What every ingress and every engine replica counts, in Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.view.page(await _expositions(service)), headers={"content-type": CONTENT_TYPE})


@router.get("/metrics/targets")
async def metrics_targets(request: Request) -> Response:
    """Where each of them exposes the same by itself, for Prometheus' `http_sd`."""
    found = targets(await _expositions(request.app.state.service))
    if not found:
        raise NotFound("no process exposes metrics of its own here; start the service with --metrics-host")
    return JSONResponse(found)


@router.get("/version")
async def version() -> Response:
    """Which release of Attendant this is."""
    return JSONResponse({"version": __version__})


async def _expositions(service: Service) -> list[Exposition]:
    engines, others = await asyncio.gather(
        service.dispatcher.expositions(METRICS_TIMEOUT_S), service.view.others(METRICS_TIMEOUT_S)
    )
    return [service.view.own(service.metrics.expose()), *others, *engines]


def _card(service: Service) -> dict[str, object]:
    return {"id": service.model_name, "object": "model", "created": service.created, "owned_by": "attendant"}
