"""How much of a device the key/value cache may have: what is left once the worst step has taken what it needs.

The worst step is taken, once, over a cache just large enough for it: a full token budget, as many requests as may run,
each of them sampling with everything that needs room.
"""

from dataclasses import replace
from typing import Protocol

import torch

from model.config import EngineConfig, ModelConfig
from model.decoder import Decoder
from model.engine.forward import Forward, TritonForward
from model.engine.graphs import partial_bytes, reserved_bytes
from model.engine.memory import gib, gpu_share
from model.engine.request import Request
from model.engine.runner import Runner
from model.engine.scheduler import Scheduler
from model.engine.transfer import transfers_for
from model.errors import ConfigError
from model.sampling.params import SamplingParams


class DeviceMemory(Protocol):
    """A device's memory in bytes. total: all there is."""

    total: int

    def used(self) -> int:
        """Held by anybody, without what this process keeps only to use it again."""
        ...

    def measure_peak(self) -> "Peak":
        """Begin to watch the most that this process holds at a time."""
        ...


class Peak(Protocol):
    """Memory that is watched from a moment on."""

    def bytes(self) -> int:
        """The most that was held at a time, beyond what was held at first."""
        ...


class MakeForward(Protocol):
    """What makes a forward pass with its cache."""

    def __call__(self, decoder: Decoder, config: EngineConfig, num_blocks: int) -> Forward:
        """See `TritonForward`."""
        ...


class CudaMemory:
    """A CUDA device's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total = torch.cuda.mem_get_info(device)[1]

    def used(self) -> int:
        """See `DeviceMemory`."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return self.total - torch.cuda.mem_get_info(self._device)[0]

    def measure_peak(self) -> "CudaPeak":
        """See `DeviceMemory`."""
        return CudaPeak(self._device)


class CudaPeak:
    """What the allocator has handed out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)
        self._before = torch.cuda.memory_allocated(device)

    def bytes(self) -> int:
        """See `Peak`."""
        return torch.cuda.max_memory_allocated(self._device) - self._before


def spare_bytes(decoder: Decoder, config: EngineConfig, make: MakeForward, memory: DeviceMemory) -> int:
    """Bytes that the cache may take. The weights are loaded. Raises `ConfigError` where nothing is left for it."""
    model, dtype = decoder.config, decoder.embedding.dtype
    peak = step_peak(decoder, config, make, memory)
    graphs = 0
    if make is TritonForward:
        longest = config.max_model_len or model.max_position_embeddings
        peak += partial_bytes(model, config.max_num_seqs, longest)  # of decodes beside a prompt, which no graph holds
        if config.cuda_graphs is not False:
            graphs = reserved_bytes(model, config.max_num_seqs, longest, config.block_size, dtype.itemsize)
    used = memory.used()
    share = gpu_share(config)
    spare = int(share * memory.total) - used - peak - graphs
    if spare <= 0:
        raise ConfigError(
            f"nothing is left for the cache: of {gib(memory.total)} the engine may use "
            f"{share:.0%}; {gib(used)} are taken, and a step of "
            f"{config.max_num_batched_tokens} tokens takes {gib(peak + graphs)}. Lower max_num_batched_tokens "
            f"or max_num_seqs, raise gpu_memory_utilization, or load the weights in int8"
        )
    return spare


def step_peak(decoder: Decoder, config: EngineConfig, make: MakeForward, memory: DeviceMemory) -> int:
    """Bytes that the worst step takes beside weights and cache."""
    model = decoder.config
    prompts = worst_prompts(model, config)
    num_blocks = sum(-(-length // config.block_size) for length in prompts)
    probe = replace(config, cuda_graphs=False, prefix_cache=False, speculative_tokens=0)
    runner = Runner(make(decoder, probe, num_blocks), transfers_for(decoder.embedding.device))
    scheduler = Scheduler(probe, num_blocks, ())
    for index, length in enumerate(prompts):
        params = SamplingParams(max_tokens=1, top_k=50, top_p=0.9, min_p=0.01, frequency_penalty=1.0, logprobs=1)
        scheduler.add(Request(str(index), [index % model.vocab_size] * length, params))
    peak = memory.measure_peak()
    step = scheduler.schedule()
    batch = runner.stage(step, config.block_size, None)
    runner.read(runner.sample(batch, step, runner.forward(batch)))
    return peak.bytes()


def worst_prompts(model: ModelConfig, config: EngineConfig) -> list[int]:
    """Lengths of prompts that fill the token budget: as many as may run, as even as they can be."""
    longest = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings) - 1
    budget = min(config.max_num_batched_tokens, config.max_num_seqs * longest)
    each, more = divmod(budget, config.max_num_seqs)
    return [each + (index < more) for index in range(config.max_num_seqs)]
