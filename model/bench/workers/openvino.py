"""OpenVINO GenAI: its continuous batching, on a model that Optimum has exported.

`int8` are int8 weights. `bf16` are weights in 16 bits. Either is computed in bf16 where the processor can.
"""

import subprocess
import sys
import time
from pathlib import Path

from model.bench.rounds import Answer, Ask
from model.bench.workers.protocol import Play, Setup, serve

WEIGHT_FORMATS = {"int8": "int8", "bf16": "fp16"}  # bf16 weights are kept as fp16: the exporter has no other 16 bits
STEP_TOKENS = 2048  # whole batches of prompts in few steps: in three pairs of runs never slower than the default of 256


def load(setup: Setup) -> tuple[str, Play]:
    """The pipeline on a converted model."""
    import numpy
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = STEP_TOKENS
    converted = setup.convert(lambda target: export(setup, target))
    properties = {"INFERENCE_NUM_THREADS": setup.threads}
    pipeline = genai.ContinuousBatchingPipeline(converted, scheduler, "CPU", properties)

    def play(ask: Ask) -> Answer:
        config = genai.GenerationConfig(max_new_tokens=ask.output_tokens, ignore_eos=True, do_sample=False)
        prompts = [openvino.Tensor(numpy.array([prompt])) for prompt in ask.prompts(setup.vocab_size)]
        arrivals: list[list[float]] = [[] for _ in prompts]
        started = time.perf_counter()
        handles = [pipeline.add_request(index, prompt, config) for index, prompt in enumerate(prompts)]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter()
            for handle, times in zip(handles, arrivals, strict=True):
                if handle.can_read():
                    times += [now] * sum(len(output.generated_ids) for output in handle.read().values())
        return Answer.of(started, arrivals)

    return genai.__version__, play


def export(setup: Setup, target: Path) -> None:
    """Convert by Optimum's own command, tokenizer included: the pipeline does not start without one."""
    command = str(Path(sys.executable).with_name("optimum-cli"))
    options = ["--task", "text-generation-with-past", "--weight-format", WEIGHT_FORMATS[setup.dtype]]
    subprocess.run([command, "export", "openvino", "--model", str(setup.model), *options, str(target)], check=True)


if __name__ == "__main__":
    serve(load)
