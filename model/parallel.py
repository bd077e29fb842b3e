"""One model over several processes: each computes its part of every layer (tensor parallelism).

On one machine, `python -m model.parallel --model DIRECTORY --world-size 2 --prompt-ids 5 6 7` starts the processes and
prints what the model says. Whoever places the processes elsewhere starts one for each rank and calls `run_rank` there,
all with one `init_method`, and the leading one, rank 0, is given an engine. NCCL carries the sums on GPUs, one to a
process, and gloo on the CPU; what the leader sends goes over gloo.
"""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from model.checkpoint import load_checkpoint
from model.config import EngineConfig
from model.decoder import Decoder
from model.engine.engine import Engine
from model.engine.lockstep import REFUSED, LeadingForward, follow
from model.engine.memory import resolve_device, resolve_dtype
from model.engine.request import Request
from model.errors import AttendantError, ConfigError
from model.sampling.params import SamplingParams
from model.split import own_config, split_decoder

MAX_ARRAYS = 12  # of one message


class ProcessGroup:
    """`model.split.Together` and `model.engine.lockstep.Group` over torch.distributed."""

    def __init__(self, rank: int, world_size: int, init_method: str, device: torch.device) -> None:
        self.rank, self.world_size = rank, world_size
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size)
        # Followers wait for a word for as long as nobody asks the leader for anything.
        self._words = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def add_up(self, x: Tensor) -> Tensor:
        """See `Together`."""
        dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """See `Together`."""
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous())
        return parts

    def tell(self, arrays: Sequence[NDArray[np.int64]]) -> None:
        """See `Group`. Two broadcasts: how large each array is, then all of them in one."""
        sizes = torch.zeros(MAX_ARRAYS, 2, dtype=torch.int64)
        for size, array in zip(sizes, arrays, strict=False):
            size.copy_(torch.tensor([len(array), array.shape[1] if array.ndim == 2 else 0]))
        dist.broadcast(sizes, 0, group=self._words)
        dist.broadcast(torch.from_numpy(np.concatenate([array.ravel() for array in arrays])), 0, group=self._words)

    def hear(self) -> Sequence[NDArray[np.int64]]:
        """See `Group`. No message is empty, so the sizes say how many arrays there are."""
        sizes = torch.zeros(MAX_ARRAYS, 2, dtype=torch.int64)
        dist.broadcast(sizes, 0, group=self._words)
        shapes = [(rows, columns) if columns else (rows,) for rows, columns in sizes.tolist()]
        counts = [int(np.prod(shape)) for shape in shapes]
        packed = torch.empty(sum(counts), dtype=torch.int64)
        dist.broadcast(packed, 0, group=self._words)
        pieces = packed.split(counts)
        last = max(index for index, count in enumerate(counts) if count)
        return [piece.view(shape).numpy() for piece, shape in zip(pieces, shapes, strict=True)][: last + 1]

    def share(self, x: Tensor) -> None:
        """See `Group`."""
        dist.broadcast(x, 0)

    def leave(self) -> None:
        """The end, for all of them."""
        dist.destroy_process_group()


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

    init_method: where they meet, as torch.distributed has it, `tcp://host:port` or `file:///path`.
    """
    device = _own_device(rank, config)
    whole = load_checkpoint(directory, dtype=resolve_dtype(config.dtype, device))
    own_config(whole.config, world_size)  # refused here, before anybody waits for the others
    group = ProcessGroup(rank, world_size, init_method, device)
    try:
        decoder = split_decoder(whole, group, device)
        decoder.fold_scores()
        del whole
        if rank:
            follow(decoder, config, group)
        else:
            _lead(decoder, config, group, work)
    finally:
        group.leave()


def _own_device(rank: int, config: EngineConfig) -> torch.device:
    """Each rank's own GPU, or the CPU for all."""
    if config.dtype == "int8" or config.deterministic:
        raise ConfigError("int8 weights and deterministic sums are not split over processes: use bf16 or fp32")
    device = resolve_device(config)
    if device.type == "cpu":
        return device
    if config.kv_cache_tokens is None:
        raise ConfigError("a split model's cache is not measured: say its size in kv_cache_tokens")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _lead(decoder: Decoder, config: EngineConfig, group: ProcessGroup, work: Callable[[Engine], None]) -> None:
    try:
        engine = Engine(decoder, config, group)
    except AttendantError:
        group.tell([np.array([REFUSED])])
        raise
    try:
        work(engine)
    finally:
        assert isinstance(engine.runner.compute, LeadingForward)
        engine.runner.compute.dismiss()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(rank: int, world_size: int, init_method: str, args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    config = EngineConfig(
        dtype=args.dtype, device=args.device, kernels=args.kernels, kv_cache_tokens=args.kv_cache_tokens, max_num_seqs=8
    )
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
    init_method = f"tcp://127.0.0.1:{free_port()}"
    # Whoever is refused says why in one line; that the others are ended with it is no news.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the others: it warns of hosts without a name
    try:
        spawn(_start, (args.world_size, init_method, args), nprocs=args.world_size)
    except ProcessExitedException as error:
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
