"""Our engine, as it is shipped: its own defaults, prefix cache on."""

from typing import cast

from model.bench.engine import measure_round
from model.bench.workers.protocol import Play, Setup, serve
from model.config import Dtype, EngineConfig
from model.engine.engine import Engine


def load(setup: Setup) -> tuple[str, Play]:
    """The engine on this directory."""
    config = EngineConfig(dtype=cast(Dtype, setup.dtype), num_threads=setup.threads)
    engine = Engine.from_checkpoint(setup.model, config)
    return "this tree", lambda ask: measure_round(engine, ask)


if __name__ == "__main__":
    serve(load)
