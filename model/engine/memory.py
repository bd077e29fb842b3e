"""What the machine can hold: the device, the dtype, and how many blocks the cache gets."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from model.cache.packed import packed_block_bytes
from model.cache.pool import FP8, bytes_per_token
from model.config import Dtype, EngineConfig, ModelConfig
from model.errors import ConfigError
from model.kernels.cpu.step import native_cache_dtype, why_never
from model.machine import free_memory, total_memory

# Of the memory that a process may have, for keys and values. The CPU's is shared with everything else there.
CPU_SHARE = 0.1
# Of a GPU's, for all that the engine holds there, where nothing else is asked for.
GPU_SHARE = 0.9
# Parameters of glibc's `mallopt`.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def resolve_device(config: EngineConfig) -> torch.device:
    """The device that a configuration stands for. Raises `ConfigError` for `cuda` where there is none, and for what
    only a GPU has where the engine will run on the CPU.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device 'cuda' was asked for, but torch sees no CUDA device here; use 'cpu' or 'auto'")
    if available and config.device != "cpu":
        if config.kv_cache_dtype == "int8":
            raise ConfigError("kv_cache_dtype 'int8' is for the CPU, and the engine runs on a GPU; use 'fp8' or 'auto'")
        return torch.device("cuda")
    of_gpus_alone = {
        "gpu_memory_utilization": config.gpu_memory_utilization is not None,
        "cuda_graphs": bool(config.cuda_graphs),
        "kv_cache_dtype 'fp8'": config.kv_cache_dtype == "fp8" and config.kernels == "auto",
    }
    for name, is_asked in of_gpus_alone.items():
        if is_asked:
            reason = "device 'cpu' was asked for" if available else "torch sees no CUDA device here"
            raise ConfigError(f"{name} is for a GPU, and the engine runs on the CPU: {reason}; leave it out")
    return torch.device("cpu")


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The dtype of weights and cache. int8 is of the weights alone: on the CPU it is quantized from fp32, and the cache
    stays in fp32.
    """
    if dtype in ("auto", "int8"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def for_serving(model: ModelConfig, config: EngineConfig, cores: int | None = None) -> tuple[EngineConfig, str | None]:
    """The same with bf16 for `auto` on a CPU whose native step can run this model; otherwise the reason against it.

    It is several times as fast as fp32, and a request's tokens do not depend on its batch, so that failover is exact.

    cores: that it shares with nobody but the HTTP before it. Where `config` leaves the threads open, the native step
    has one on each: who has lost its core there holds up little. Torch's threads wait for one another, and get half of
    the cores. Measured on two: docs/benchmarks.md.

    Raises `ConfigError` for a cache that only the native step has, where it cannot run.
    """
    may_be_native = config.dtype != "fp32" and resolve_device(config).type == "cpu"
    reason = _why_torch(model, config) if may_be_native else None
    if reason is not None and config.kv_cache_dtype == "int8":
        raise no_int8_cache(reason)
    is_native = may_be_native and reason is None
    was_open = config.dtype == "auto"
    if is_native and was_open:
        config = replace(config, dtype="bf16")
    if cores is not None and config.num_threads is None:
        config = replace(config, num_threads=cores if is_native else max(1, cores // 2))
    return config, reason if was_open else None


def _why_torch(model: ModelConfig, config: EngineConfig) -> str | None:
    """Why the native step cannot compute this model on a CPU; None if it can."""
    return "kernels of torch were asked for" if config.kernels == "torch" else why_never(model, config)


def no_int8_cache(reason: str) -> ConfigError:
    """What to say where the native step cannot run, and why."""
    return ConfigError(f"kv_cache_dtype 'int8' is for native kernels, which cannot run here: {reason}; use 'auto'")


def expected_block_bytes(model: ModelConfig, config: EngineConfig, device: torch.device) -> int:
    """Bytes of a block of the cache over all layers, if the kernels for these settings can run this model: nothing is
    loaded or built to find out.
    """
    if device.type == "cpu" and config.dtype in ("bf16", "int8") and config.kernels != "torch":
        return packed_block_bytes(model, config.block_size, native_cache_dtype(config))
    dtype = FP8 if config.kv_cache_dtype == "fp8" else resolve_dtype(config.dtype, device)
    return config.block_size * bytes_per_token(model, dtype)


def size_cache(
    model: ModelConfig, config: EngineConfig, block_bytes: int, device: torch.device, spare: int | None = None
) -> tuple[int, int]:
    """(max_model_len, num_blocks): every admitted request fits the cache alone, so the oldest one can always finish.

    block_bytes: what a block takes over all layers. spare: bytes that the cache may take, where that was measured.
    Raises `ConfigError` where what was asked for cannot be so.
    """
    tokens = config.kv_cache_tokens
    if tokens is None:
        num_bytes = _memory_for_cache(config, device) if spare is None else spare
        affordable = num_bytes // block_bytes * config.block_size
        tokens = min(affordable, config.max_num_seqs * (config.max_model_len or model.max_position_embeddings))
    elif spare is not None and (taken := tokens * block_bytes // config.block_size) > spare:
        raise ConfigError(
            f"a cache of {tokens} tokens takes {gib(taken)}, and {gib(spare)} are left for it: "
            f"lower kv_cache_tokens to at most {spare * config.block_size // block_bytes}"
        )
    num_blocks = tokens // config.block_size
    capacity = num_blocks * config.block_size
    if capacity == 0:
        raise ConfigError(f"a cache of {tokens} tokens is smaller than one block of {config.block_size}")
    if config.max_model_len is None:
        return min(model.max_position_embeddings, capacity), num_blocks
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {config.max_model_len} exceeds the {model.max_position_embeddings} positions of the model"
        )
    if config.max_model_len > capacity:
        raise ConfigError(
            f"max_model_len {config.max_model_len} does not fit a cache of {capacity} tokens; "
            f"lower max_model_len to at most {capacity}, or raise kv_cache_tokens"
        )
    return config.max_model_len, num_blocks


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """While a model is read, quantized and packed: what is freed goes back to the system at once.

    Left alone, glibc learns from the first large block that is freed to keep such blocks for later, and a model of
    138 million weights took up to 1,032 MB on its way to int8, of which it needed 502. Afterwards it is as if it had
    learned all it can.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


def check_weights_fit(num_weights: int, dtype: Dtype, device: torch.device, free: int) -> None:
    """Raise `ConfigError`, with what would fit, for weights that are larger than the device's free memory.

    dtype: as it was asked for; free: bytes.
    """
    sizes = {name: num_weights * size for name, size in (("fp32", 4), ("bf16", 2), ("int8", 1))}
    wanted = "int8" if dtype == "int8" else "bf16" if resolve_dtype(dtype, device) == torch.bfloat16 else "fp32"
    if sizes[wanted] <= free:
        return
    fitting = [f"{name} ({gib(size)})" for name, size in sizes.items() if size <= free]
    instead = f"they would fit in {' or '.join(fitting)}" if fitting else "no dtype is small enough"
    raise ConfigError(
        f"the weights take {gib(sizes[wanted])} in {wanted}, and {device} has {gib(free)} of memory free; {instead}"
    )


def gpu_share(config: EngineConfig) -> float:
    """The part of a GPU's memory that the engine may hold."""
    return GPU_SHARE if config.gpu_memory_utilization is None else config.gpu_memory_utilization


def gib(num_bytes: int) -> str:
    """Bytes as people read them."""
    return f"{num_bytes / 2**30:.1f} GiB"


def _memory_for_cache(config: EngineConfig, device: torch.device) -> int:
    """Bytes that the cache may take, before anything was measured."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(gpu_share(config) * free)
    share = int(CPU_SHARE * total_memory()) // config.processes_per_machine
    spare = free_memory()
    return share if spare is None else min(share, spare)
