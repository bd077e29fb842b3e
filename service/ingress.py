"""The ingress: HTTP and text on one side, the engines on the other. It holds no weights and imports no torch."""

import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from service.api.routes import create_api
from service.completion import Service
from service.dispatch import Dispatcher
from service.door import Door
from service.exposition import Exposition, Replicas, View, Watching, export
from service.garbage import set_aside
from service.logs import install
from service.metrics import IngressMetrics


class Ingress:
    """Raises `CheckpointError` when the directory's tokenizer or chat template cannot be read."""

    def __init__(
        self,
        engines: DeploymentHandle[Any],
        model: str,
        model_name: str,
        door: Door,
        engines_sleep: bool,
        watching: Watching,
    ) -> None:
        self._door = door
        instance = serve.get_replica_context().replica_id.unique_id
        install(door.telemetry, f"ingress/{instance}", quotes_errors=door.log_prompts)
        self._tracer = door.telemetry.tracer(instance)
        context = serve.get_replica_context()
        metrics = IngressMetrics(model_name, instance, watching.num_engines)
        self._view = View(
            peers=Replicas(serve.get_deployment_handle(context.deployment, context.app_name), pins=False),
            replica=instance,
            target=None if watching.exporter_host is None else export(metrics.registry, watching.exporter_host),
            speaks_vllm=watching.vllm_metrics,
        )
        self._service = Service(
            model_name=model_name,
            created=int(time.time()),
            tokenizer=Tokenizer.from_directory(Path(model)),
            chat_template=ChatTemplate.from_directory(Path(model)),
            dispatcher=Dispatcher(engines, metrics, engines_sleep=engines_sleep),
            metrics=metrics,
            limits=door.limits,
            view=self._view,
        )

    async def drain(self) -> None:
        """Take no more requests; return when those that are open have been answered."""
        await self._service.drain.close()

    async def metrics(self) -> Exposition:
        """What this ingress counts, for another one that is being scraped."""
        return self._view.own(self._service.metrics.expose())

    def __del__(self) -> None:
        """Serve calls this when every request has been answered, before it stops the process."""
        self._service.dispatcher.close()
        if self._service.chat_template is not None:
            self._service.chat_template.close()
        if self._tracer is not None:
            self._tracer.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once the constructor is through."""
        api = create_api(self._service, self._door, self._tracer)
        set_aside()
        return api
