"""The engine: requests are added, steps are taken, tokens come out. Open this file first.

One step is schedule -> stage -> forward -> sample -> commit. Nothing else changes a request or touches the cache. On a
GPU steps overlap: the next one is launched, its tokens still unread, before what the last one gave is taken in. An
engine belongs to one thread; `model.engine.loop` gives it one of its own.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from model.attention.weights import AttentionRequest
from model.checkpoint import inspect_checkpoint, load_checkpoint
from model.config import EngineConfig
from model.decoder import Decoder
from model.engine.batch import decodes_first
from model.engine.forward import choose_kernels
from model.engine.lockstep import Group, lead
from model.engine.memory import (
    check_weights_fit,
    resolve_device,
    resolve_dtype,
    returning_freed_memory,
    size_cache,
)
from model.engine.request import Request, TokenOutput
from model.engine.runner import Flight, Runner
from model.engine.scheduled import ScheduledStep
from model.engine.scheduler import Scheduler
from model.engine.stats import StepPhases, StepStats, Stopwatch
from model.engine.transfer import transfers_for
from model.engine.worst_case import CudaMemory, spare_bytes
from model.errors import InvalidRequest
from model.sampling.params import SamplingParams


class Engine:
    """Continuous batching over one decoder: requests join and leave between steps.

    stats: of the last step; scheduled: what it launched.
    """

    def __init__(self, decoder: Decoder, config: EngineConfig, group: Group | None = None) -> None:
        """Takes the decoder over. Raises `ConfigError` where the machine cannot do what `config` asks for.

        group: of processes that hold the decoder together, of which this one leads; the others `follow`.
        """
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        weight = decoder.embedding
        self.config = config
        self.model_config = decoder.config
        self.device = weight.device
        model, kernels = decoder.config, choose_kernels(decoder, config)
        block_bytes, device = kernels.block_bytes(decoder, config), weight.device
        # Also where the cache's size is given: the step that is measured compiles what a first request would wait for.
        measured = device.type == "cuda" and group is None
        spare = spare_bytes(decoder, config, kernels, CudaMemory(device)) if measured else None
        self.max_model_len, num_blocks = size_cache(model, config, block_bytes, device, spare)
        self.scheduler = Scheduler(config, num_blocks, model.eos_token_ids, model.longest_sharing_prompt)
        compute = lead(kernels, decoder, config, num_blocks, group)
        self.runner = Runner(compute, transfers_for(weight.device))
        # Guesses need to know the tokens that they follow; the followers of a group are sent them from the host.
        self.overlaps = config.overlaps(device.type) and not config.speculative_tokens and group is None
        self.scheduled = ScheduledStep(())
        self._flight: Flight | None = None
        self._outputs: list[TokenOutput] = []
        self.num_failed_steps = 0
        if device.type == "cuda" and compute.decodes is None:  # graphs have compiled what they replay
            self.warm_up()
        self._measure_idle()

    @classmethod
    def from_checkpoint(cls, directory: Path, config: EngineConfig) -> "Engine":
        """Load a model directory. Raises `CheckpointError` and `ConfigError`."""
        device = resolve_device(config)
        dtype = resolve_dtype(config.dtype, device)
        if device.type == "cuda":
            num_weights = inspect_checkpoint(directory).num_weights
            check_weights_fit(num_weights, config.dtype, device, torch.cuda.mem_get_info(device)[0])
        with returning_freed_memory():
            decoder = load_checkpoint(directory, dtype=dtype, device=device, int8=config.dtype == "int8")
            decoder.fold_scores()
            if config.deterministic:
                decoder.fix_row_tiles()
            return cls(decoder, config)

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute anything."""
        return self.scheduler.has_work

    def validate(
        self, prompt_ids: Sequence[int], params: SamplingParams, attention: AttentionRequest | None = None
    ) -> None:
        """Raise `InvalidRequest`, with the numbers, for what could never be served. Safe from any thread."""
        if attention is not None:
            attention.check(self.model_config.num_layers, self.model_config.num_heads)
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
        self._check_ids("the prompt", prompt_ids, "prompt")
        self._check_ids("logit_bias", list(params.logit_bias), "logit_bias")
        self._check_ids("stop_token_ids", params.stop_token_ids, "stop_token_ids")
        if len(prompt_ids) >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(prompt_ids)} tokens; with room for one more, "
                f"the context of {self.max_model_len} allows {self.max_model_len - 1}",
                param="prompt",
            )
        if len(prompt_ids) + params.max_tokens > self.max_model_len:
            raise InvalidRequest(
                f"{len(prompt_ids)} prompt tokens and max_tokens {params.max_tokens} exceed the context of "
                f"{self.max_model_len}; at most {self.max_model_len - len(prompt_ids)} can be generated",
                param="max_tokens",
            )

    def add(self, request: Request) -> None:
        """Queue a request. Raises `InvalidRequest`."""
        self.validate(request.token_ids[: request.num_prompt_tokens], request.params, request.attention)
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request at once and free its blocks. False if it is not here any more."""
        found = self.scheduler.abort(request_id)
        self._measure_idle()  # no step may follow to tell that its blocks are free
        return found

    def step(self) -> list[TokenOutput]:
        """Launch one step for all requests that fit, and take in one: the same, or, where steps overlap, the one that
        was launched before. After an exception, `fail_step` ends those whom it hit.
        """
        clock = Stopwatch()
        self._outputs += self.scheduler.expire(time.monotonic())
        if self.scheduler.is_short:
            self._finish()
        step = self.scheduled = decodes_first(self.scheduler.schedule())
        self.runner.forget(self.scheduler.take_departed())
        schedule = clock.lap()
        flight, phases = self._launch(step, clock) if step.requests else (None, StepPhases())
        self._finish()
        self._flight = flight
        if not self.overlaps or step.is_read_at_once:
            self._finish()
        outputs = self._hand_out()
        phases = phases._replace(schedule=schedule, commit=clock.lap())
        self.stats = self._measure(clock, phases, step.num_tokens, sum(len(output.token_ids) for output in outputs))
        return outputs

    def fail_step(self) -> list[TokenOutput]:
        """After `step` raised: end the requests of the steps on their way, spare the others."""
        self.num_failed_steps += 1
        self._flight = None
        self._outputs += self.scheduler.fail()
        self._measure_idle()
        return self._hand_out()

    def generate(self, request: Request) -> Iterator[TokenOutput]:
        """Run one request to its end, step by step. For scripts and tests: it drives the engine itself."""
        self.add(request)
        while True:
            for output in self.step():
                if output.request_id == request.request_id:
                    yield output
                    if output.finish_reason:
                        return

    def warm_up(self) -> None:
        """Take the steps that a first request would take, and wait for compilers in: who watches would think it stuck.

        One request draws from the logits as they are, one from logits in fp32, which a penalty has changed.
        """
        if self.max_model_len < 4:
            return
        for penalty in (0.0, 1.0):
            params = SamplingParams(max_tokens=2, frequency_penalty=penalty, ignore_eos=True)
            self.scheduler.add(Request("warm-up", [0, 0], params))
            while self.has_work:
                self.step()
        self.scheduler.prefix.queried_tokens = 0  # nobody has asked for anything yet
        self._outputs.clear()

    def check_integrity(self) -> None:
        """Assert the invariants of the cache. For tests, and for an idle service."""
        self.scheduler.check_integrity()

    def _launch(self, step: ScheduledStep, clock: Stopwatch) -> tuple[Flight, StepPhases]:
        batch = self.runner.stage(step, self.config.block_size, self._flight)
        staged = clock.lap()
        forwarded = self.runner.forward(batch)
        forward = clock.lap()
        flight = self.runner.sample(batch, step, forwarded)
        return flight, StepPhases(stage=staged, forward=forward, sample=clock.lap())

    def _finish(self) -> None:
        """Take in what the step on its way has computed, if there is one."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._outputs += self.scheduler.commit(flight.step, self.runner.read(flight))

    def _hand_out(self) -> list[TokenOutput]:
        """What has come in since the last time: what was taken in before a step failed is not lost."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def _check_ids(self, what: str, token_ids: Sequence[int], param: str) -> None:
        vocab_size = self.model_config.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            raise InvalidRequest(f"{what} holds token ids outside [0, {vocab_size})", param=param)

    def _measure_idle(self) -> None:
        """Numbers for when something has changed without a step: nothing computed, the gauges as they are now."""
        self.stats = self._measure(Stopwatch(), StepPhases(), 0, 0)

    def _measure(self, clock: Stopwatch, phases: StepPhases, num_tokens: int, num_generated: int) -> StepStats:
        scheduler = self.scheduler
        return StepStats(
            seconds=clock.total,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_tokens=num_tokens,
            num_generated=num_generated,
            kv_cache_usage=1.0 - scheduler.blocks.num_free / scheduler.blocks.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_failed_steps=self.num_failed_steps,
            prefix_queries=scheduler.prefix.queried_tokens,
            prefix_hits=scheduler.prefix.hit_tokens,
            num_drafted=scheduler.num_drafted,
            num_accepted=scheduler.num_accepted,
            phases=phases,
        )
