"""`transformers` on the same weights and prompts: `generate`, and its continuous batching."""

import inspect
import time
from typing import Any

import torch
from torch import Tensor, nn

from model.bench.gpu.models import random_decoder, read_shape
from model.bench.gpu.results import Results
from model.bench.gpu.scale import Scale
from model.bench.gpu.timing import synchronize
from model.bench.rounds import Answer, Ask
from model.checkpoint import published_tensors


def run(results: Results, scale: Scale, which: str) -> None:
    """One row a way of running and a batch size. The largest batch is left to continuous batching."""
    shape = scale.small if which == "small" else scale.large
    asks = {f"generate, batch {batch}": Ask(batch, scale.context, scale.output, 1) for batch in scale.batches[:2]}
    asks |= {f"continuous, batch {batch}": Ask(batch, scale.context, scale.output, 1) for batch in scale.batches[1:]}
    missing = results.missing(list(asks))
    if not missing:
        return
    model = same_model(shape, scale)
    for name in missing:
        with results.row(name) as row:
            ask = asks[name]
            play = generate if name.startswith("generate") else continuous
            play(model, Ask(ask.batch, ask.prompt_tokens, ask.output_tokens, 0))  # captures what it wants at this size
            answer = play(model, ask)
            row |= {"end_to_end": answer.rate(ask), "decode": answer.decode_rate(), "seconds": answer.seconds}


def same_model(shape: Any, scale: Scale) -> Any:
    """Their model with our random weights."""
    import transformers

    family, _ = read_shape(shape)
    config = transformers.AutoConfig.for_model(**shape)
    decoder = random_decoder(shape, scale)
    weights = dict(published_tensors(decoder, family))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=scale.dtype)
    missing, strange = model.load_state_dict(weights, strict=False, assign=True)
    if set(missing) - {"lm_head.weight"} or strange:
        raise ValueError(f"their model of this shape lacks {strange} and wants {missing}")
    model.tie_weights()
    _renew_buffers(model, scale.device)
    model.generation_config.eos_token_id = None  # never ends by itself
    model.generation_config.pad_token_id = 0
    model.generation_config.do_sample = False
    return model.eval()


def _renew_buffers(model: Any, device: str) -> None:
    """What was made on `meta` beside the weights: rotary tables, which are computed anew."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            fresh: nn.Module = type(module)(module.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(device), persistent=False)
            module.original_inv_freq = module.inv_freq


def generate(model: Any, ask: Ask) -> Answer:
    """The whole batch at once."""
    device = model.get_input_embeddings().weight.device
    prompts = torch.tensor(ask.prompts(model.config.vocab_size), device=device)
    arrivals: list[float] = []

    def see(input_ids: Tensor, *_: object, **__: object) -> Tensor:
        """A stopping criterion is asked after every token of the batch. This one never stops."""
        synchronize(input_ids.device)
        arrivals.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    started = time.perf_counter()
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=ask.output_tokens,
        stopping_criteria=[see],
    )
    return Answer.of(started, [arrivals] * ask.batch)


def continuous(model: Any, ask: Ask) -> Answer:
    """Their continuous batching, set up as it likes for so many requests, and kept from one round to the next."""
    options: dict[str, Any] = {"max_new_tokens": ask.output_tokens, "record_timestamps": True}
    if "persistent_manager" in inspect.signature(model.generate_batch).parameters:
        # Without a GPU its warm-up has nothing to capture, and takes minutes.
        options |= {"persistent_manager": True, "warmup": torch.cuda.is_available()}
    started = time.perf_counter()
    outputs = model.generate_batch(ask.prompts(model.config.vocab_size), **options)
    ended = time.perf_counter()
    lengths = [len(output.generated_tokens) for output in outputs.values()]
    if len(lengths) != ask.batch or set(lengths) != {ask.output_tokens}:
        raise ValueError(f"asked for {ask.batch} x {ask.output_tokens} tokens, got {len(lengths)}: {lengths[:4]}...")
    stamps = [list(output.timestamps or [ended] * ask.output_tokens) for output in outputs.values()]
    return Answer.of(started, stamps)
