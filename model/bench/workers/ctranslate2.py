"""CTranslate2: `Generator.generate_batch`, greedy, on the whole batch at once."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from model.bench.rounds import Answer, Ask
from model.bench.workers.protocol import Play, Setup, serve


def load(setup: Setup) -> tuple[str, Play]:
    """The generator on a converted model."""
    import ctranslate2
    from tokenizers import Tokenizer

    converted = setup.convert(lambda target: convert(setup, target))
    generator = ctranslate2.Generator(
        str(converted), device="cpu", compute_type=setup.dtype, intra_threads=setup.threads, inter_threads=1
    )
    tokenizer = Tokenizer.from_file(str(setup.model / "tokenizer.json"))

    def play(ask: Ask) -> Answer:
        prompts = [[tokenizer.id_to_token(token) for token in prompt] for prompt in ask.prompts(setup.vocab_size)]
        steps: dict[int, float] = {}

        def see(result: Any) -> bool:
            steps[result.step] = time.perf_counter()  # once a request: the last one's call is when the step has ended
            return False  # go on

        started = time.perf_counter()
        generator.generate_batch(
            prompts,
            max_length=ask.output_tokens,
            min_length=ask.output_tokens,
            include_prompt_in_result=False,
            callback=see,
        )
        return Answer.of(started, [list(steps.values())] * ask.batch)

    return ctranslate2.__version__, play


def convert(setup: Setup, target: Path) -> None:
    """Convert by CTranslate2's own command."""
    command = str(Path(sys.executable).with_name("ct2-transformers-converter"))
    options = ["--model", str(setup.model), "--output_dir", str(target), "--quantization", setup.dtype, "--force"]
    subprocess.run([command, *options], check=True)


if __name__ == "__main__":
    serve(load)
