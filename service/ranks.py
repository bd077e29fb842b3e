"""An engine whose model several processes hold together (`model.parallel`): this replica's and others that Ray places.

All are in the replica's placement group, on one node, each with a GPU of its own where there are GPUs; they meet at a
file, and talk over loopback alone. They live and die together. A replica whose rank is gone ends itself, so that its
streams move and Serve starts another; a rank whose replica is gone is ended by Ray, which ends an actor with its owner,
and whatever is in a placement group that is removed.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from model.config import EngineConfig

if TYPE_CHECKING:
    from model.engine.engine import Engine

logger = logging.getLogger(__name__)

# Which interface gloo, and NCCL where processes meet, listen on. Both would take one that other machines reach.
INTERFACES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
RANK_IS_GONE = 1


def load(model: Path, config: EngineConfig, cores: int, num_ranks: int) -> "tuple[Engine, Callable[[], None]]":
    """An engine, and how to let its other processes go once it has taken its last step.

    cores: for each process, beside what HTTP and Ray need of them. Raises `CheckpointError` and `ConfigError`.
    """
    from model.checkpoint import inspect_checkpoint
    from model.engine.engine import Engine
    from model.engine.memory import for_serving

    if num_ranks == 1:
        config, _ = for_serving(inspect_checkpoint(model).config, config, cores)
        return Engine.from_checkpoint(model, config), lambda: None
    return _lead(model, replace(config, num_threads=config.num_threads or max(1, cores // 2)), num_ranks)


def _lead(model: Path, config: EngineConfig, num_ranks: int) -> "tuple[Engine, Callable[[], None]]":
    from model.checkpoint import inspect_checkpoint
    from model.parallel import check_split, leading

    check_split(inspect_checkpoint(model).config, config, num_ranks)  # before anybody is started
    os.environ.update(INTERFACES)
    group = ray.util.get_current_placement_group()
    assert group is not None, "build gives every engine of several processes one"
    make: Any = ray.remote(Rank).options  # Ray's annotations do not follow what comes of it
    with ExitStack() as stack:
        init_method = f"file://{stack.enter_context(tempfile.TemporaryDirectory(prefix='attendant-'))}/store"
        ranks = [make(**options_of(rank, group)).remote() for rank in range(1, num_ranks)]
        ends = [actor.follow.remote(rank, num_ranks, init_method, model, config) for rank, actor in enumerate(ranks, 1)]
        threading.Thread(target=_watch, args=(ends, ranks), name="ranks", daemon=True).start()
        engine = stack.enter_context(leading(num_ranks, init_method, model, config))
        return engine, stack.pop_all().close


def options_of(rank: int, group: PlacementGroup) -> dict[str, Any]:
    """What Ray sets aside for a rank: what stands in its bundle of the group."""
    bundle = group.bundle_specs[rank]
    return {
        "num_cpus": bundle.get("CPU", 0),
        "num_gpus": bundle.get("GPU", 0),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=rank, placement_group_capture_child_tasks=True
        ),
    }


class Rank:
    """A process that follows the replica which started it."""

    def follow(self, rank: int, num_ranks: int, init_method: str, model: Path, config: EngineConfig) -> None:
        """Until the leader is done. Raises whatever ends it before."""
        from model.parallel import following

        os.environ.update(INTERFACES)
        following(rank, num_ranks, init_method, model, config)


def _watch(ends: Sequence[Any], ranks: Sequence[Any]) -> None:
    """End this process when a rank fails. The engine may hang in a step that the rank will never join, so it is not
    asked; and a replica that is dead is what everybody knows how to go on without.

    ranks: held here, since Ray ends an actor that nobody holds.
    """
    pending = list(ends)
    while pending:
        (ended, *_), pending = ray.wait(pending, num_returns=1)
        try:
            ray.get(ended)
        except Exception as error:
            logger.critical("a rank of this engine is gone, and the engine with it: %s", error)
            os._exit(RANK_IS_GONE)
