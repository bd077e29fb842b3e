"""One model over several processes: each computes its part of every layer (tensor parallelism).

On one machine, `python -m model.parallel --model DIRECTORY --world-size 2 --prompt-ids 5 6 7` starts the processes and
prints what the model says. Whoever places the processes elsewhere (`service.ranks`) starts one for each rank, all with
one `init_method`: rank 0 is `leading` and has an engine, the others are `following`. NCCL carries the sums on GPUs, one
to a process, and gloo on the CPU; what the leader sends goes over gloo.

init_method: where they meet, as torch.distributed has it: `file:///path` on one machine, or `tcp://host:port`, which
listens on every interface of that host and lets anybody write.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from model.checkpoint import load_checkpoint
from model.config import EngineConfig, ModelConfig
from model.decoder import Decoder
from model.engine.engine import Engine
from model.engine.lockstep import REFUSED, LeadingForward, follow
from model.engine.memory import resolve_device, resolve_dtype
from model.engine.request import Request
from model.errors import AttendantError, ConfigError, GroupLost
from model.machine import cores
from model.sampling.params import SamplingParams
from model.split import own_config, split_decoder

MAX_ARRAYS = 12  # of one message
SUM_SECONDS = 120  # that a sum may wait for another process: it may be compiling the kernels of its first step


class ProcessGroup:
    """`model.split.Together` and `model.engine.lockstep.Group` over torch.distributed.

    Each word over gloo raises `GroupLost` when another process is gone. One over NCCL may not: it returns before it is
    done, and whoever waits for the device then waits for `SUM_SECONDS`, when NCCL ends the process.
    """

    def __init__(self, rank: int, world_size: int, init_method: str, device: torch.device) -> None:
        self.rank, self.world_size = rank, world_size
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size)
        # Not the first group: in that one they wait until all have loaded their weights.
        self._sums = dist.new_group(backend=backend, timeout=timedelta(seconds=SUM_SECONDS))
        # Followers wait for a word for as long as nobody asks the leader for anything.
        self._words = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def add_up(self, x: Tensor) -> Tensor:
        """See `Together`."""
        with _answered():
            dist.all_reduce(x, group=self._sums)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """See `Together`."""
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        with _answered():
            dist.all_gather(parts, x.contiguous(), group=self._sums)
        return parts

    def tell(self, arrays: Sequence[NDArray[np.int64]]) -> None:
        """See `Group`. Two broadcasts: how large each array is, then all of them in one."""
        sizes = torch.zeros(MAX_ARRAYS, 2, dtype=torch.int64)
        for size, array in zip(sizes, arrays, strict=False):
            size.copy_(torch.tensor([len(array), array.shape[1] if array.ndim == 2 else 0]))
        packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        with _answered():
            dist.broadcast(sizes, 0, group=self._words)
            dist.broadcast(packed, 0, group=self._words)

    def hear(self) -> Sequence[NDArray[np.int64]]:
        """See `Group`. No message is empty, so the sizes say how many arrays there are."""
        sizes = torch.zeros(MAX_ARRAYS, 2, dtype=torch.int64)
        with _answered():
            dist.broadcast(sizes, 0, group=self._words)
        shapes = [(rows, columns) if columns else (rows,) for rows, columns in sizes.tolist()]
        counts = [int(np.prod(shape)) for shape in shapes]
        packed = torch.empty(sum(counts), dtype=torch.int64)
        with _answered():
            dist.broadcast(packed, 0, group=self._words)
        pieces = packed.split(counts)
        last = max(index for index, count in enumerate(counts) if count)
        return [piece.view(shape).numpy() for piece, shape in zip(pieces, shapes, strict=True)][: last + 1]

    def share(self, x: Tensor) -> None:
        """See `Group`."""
        with _answered():
            dist.broadcast(x, 0, group=self._sums)

    def leave(self) -> None:
        """The end, for all of them."""
        dist.destroy_process_group()


@contextmanager
def _answered() -> Iterator[None]:
    """Around a word to the others: torch.distributed tells in many ways that there was no answer."""
    try:
        yield
    except RuntimeError as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise GroupLost(f"another process of the model is gone: {first}") from error


def run_rank(
    rank: int,
    world_size: int,
    init_method: str,
    directory: Path,
    config: EngineConfig,
    work: Callable[[Engine], None],
) -> None:
    """Be one of the processes that hold a model together. Rank 0 gets an engine to `work` with; the others return when
    it is done. Raises `CheckpointError` and `ConfigError`: rank 0 always, the others where they can tell.
    """
    if rank:
        following(rank, world_size, init_method, directory, config)
        return
    with leading(world_size, init_method, directory, config) as engine:
        work(engine)


@contextmanager
def leading(world_size: int, init_method: str, directory: Path, config: EngineConfig) -> Iterator[Engine]:
    """Be rank 0: an engine, and at the end of the block the others' dismissal. Raises as `run_rank` does."""
    with _joined(0, world_size, init_method, directory, config) as (decoder, group):
        try:
            engine = Engine(decoder, config, group)
        except AttendantError:
            group.tell([np.array([REFUSED])])
            raise
        try:
            yield engine
        finally:
            assert isinstance(engine.runner.compute, LeadingForward)
            with suppress(GroupLost):
                engine.runner.compute.dismiss()


def following(rank: int, world_size: int, init_method: str, directory: Path, config: EngineConfig) -> None:
    """Be another rank, until the leader is done. Raises `GroupLost` when it is gone, and as `run_rank` does."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    with _joined(rank, world_size, init_method, directory, config) as (decoder, group):
        follow(decoder, config, group)


@contextmanager
def _joined(
    rank: int, world_size: int, init_method: str, directory: Path, config: EngineConfig
) -> Iterator[tuple[Decoder, ProcessGroup]]:
    """This process's part of the decoder, and the others."""
    device = _own_device(rank, config)
    whole = load_checkpoint(directory, dtype=resolve_dtype(config.dtype, device))
    check_split(whole.config, config, world_size)  # before anybody waits for the others
    group = ProcessGroup(rank, world_size, init_method, device)
    try:
        decoder = split_decoder(whole, group, device)
        decoder.fold_scores()
        del whole
        yield decoder, group
    finally:
        group.leave()


def check_split(model: ModelConfig, config: EngineConfig, world_size: int) -> ModelConfig:
    """One process's part of the model. Raises `ConfigError` for what cannot be computed in so many parts."""
    if config.dtype == "int8" or config.deterministic:
        raise ConfigError("int8 weights and deterministic sums are not split over processes: use bf16 or fp32")
    if config.kernels == "native":
        raise ConfigError("the native step is not split over processes: use kernels 'auto' or 'torch'")
    if resolve_device(config).type == "cuda" and config.kv_cache_tokens is None:
        raise ConfigError("a split model's cache is not measured: say its size in kv_cache_tokens")
    return own_config(model, world_size)


def check_devices(config: EngineConfig, world_size: int) -> None:
    """Raise `ConfigError` where this machine has fewer GPUs than there are processes: NCCL refuses two on one."""
    if resolve_device(config).type == "cuda" and (count := torch.cuda.device_count()) < world_size:
        raise ConfigError(
            f"{world_size} processes need a GPU each, and torch sees {count} here; lower --world-size, or use "
            f"--device cpu"
        )


def _own_device(rank: int, config: EngineConfig) -> torch.device:
    """Each rank's own GPU, or the CPU for all. One that is placed by Ray sees but one GPU."""
    device = resolve_device(config)
    if device.type == "cpu":
        return device
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        dtype=args.dtype, device=args.device, kernels=args.kernels, kv_cache_tokens=args.kv_cache_tokens, max_num_seqs=8
    )


def _start(rank: int, world_size: int, init_method: str, args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, cores() // world_size))
    config = _config(args)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed)

    def say(engine: Engine) -> None:
        for output in engine.generate(Request("0", args.prompt_ids, params)):
            print(*output.token_ids, flush=True)

    try:
        run_rank(rank, world_size, init_method, args.model, config, say)
    except AttendantError as error:
        if rank == 0:
            print(f"model.parallel: {error}", file=sys.stderr)
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Start every process of a model on this machine, and print the ids that it generates."""
    parser = argparse.ArgumentParser(prog="python -m model.parallel", description="Generate with a split model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--prompt-ids", type=int, nargs="+", required=True)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--kv-cache-tokens", type=int, default=8192)
    parser.add_argument("--kernels", choices=["auto", "torch", "triton"], default="auto")
    args = parser.parse_args(argv)
    try:
        check_devices(_config(args), args.world_size)
    except ConfigError as error:
        sys.exit(f"model.parallel: {error}")
    # Whoever is refused says why in one line; that the others are ended with it is no news.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the others: it warns of hosts without a name
    with tempfile.TemporaryDirectory() as directory:
        try:
            spawn(_start, (args.world_size, f"file://{directory}/store", args), nprocs=args.world_size)
        except ProcessExitedException as error:
            sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
