"""`transformers`: `generate`, greedy, on the whole batch at once."""

import time

from model.bench.rounds import Answer, Ask
from model.bench.workers.protocol import Play, Setup, serve


def load(setup: Setup) -> tuple[str, Play]:
    """The model in fp32 or bf16, with the attention and the cache that `transformers` chooses."""
    import torch
    import transformers

    torch.set_num_threads(setup.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setup.dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # never ends by itself
    model.generation_config.pad_token_id = 0

    def play(ask: Ask) -> Answer:
        prompts = torch.tensor(ask.prompts(setup.vocab_size))
        arrivals: list[float] = []

        def see(input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            """A stopping criterion is asked after every token of the batch. This one never stops."""
            arrivals.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

        started = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=ask.output_tokens,
            do_sample=False,
            stopping_criteria=[see],
        )
        return Answer.of(started, [arrivals] * ask.batch)

    return transformers.__version__, play


if __name__ == "__main__":
    serve(load)
