"""llama.cpp: a round is one run of its own `llama-batched-bench`, on a converted model.

The tool loads the model in each run, outside of what it times, and leaves nothing behind that could disturb the others.
It picks no tokens: the next ones are drawn at random, so sampling costs it nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

from model.bench.rounds import Answer, Ask
from model.bench.workers.protocol import NotInstalledError, Play, Setup, serve

TREE = Path(sys.prefix) / "llama.cpp"
OUTPUT_TYPES = {"int8": "q8_0", "bf16": "bf16"}

WARM_UP_TOKENS = 16  # the tool begins with so many, whatever it is asked for

# The converter refuses a tokenizer that it does not know. Here only ids go in, so any byte-level one will do.
CONVERT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def load(setup: Setup) -> tuple[str, Play]:
    """Convert the model; each round loads it."""
    bench = TREE / "build" / "bin" / "llama-batched-bench"
    if not bench.exists():
        raise NotInstalledError(str(bench))
    converted = setup.convert(lambda target: convert(setup, target))

    def play(ask: Ask) -> Answer:
        options: dict[str, object] = {
            "--model": converted,
            "--threads": setup.threads,
            "--ctx-size": ask.batch * max(ask.prompt_tokens + ask.output_tokens, WARM_UP_TOKENS),
            "-npp": ask.prompt_tokens,
            "-ntg": max(ask.output_tokens - 1, 1),  # prefill gives the first one
            "-npl": ask.batch,
            "--output-format": "jsonl",
        }
        words = [str(word) for option in options.items() for word in option]
        printed = subprocess.run([bench, *words], check=True, stdout=subprocess.PIPE, text=True).stdout
        return read_answer(printed)

    about = subprocess.run(
        [bench, "--version"], check=True, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )
    return about.stdout.partition("\n")[0].removeprefix("version: "), play


def read_answer(printed: str) -> Answer:
    """The one line of results among what the tool prints. Raises `ValueError` where there is none."""
    for line in printed.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            return Answer(row["t"], row["t_pp"], row["t_tg"], row["pl"] * row["tg"])
    raise ValueError(f"no result in {printed!r}")


def convert(setup: Setup, target: Path) -> None:
    """Convert by llama.cpp's own script. Q8_0 has one scale for 32 weights."""
    options = ["--outtype", OUTPUT_TYPES[setup.dtype], "--outfile", str(target), str(setup.model)]
    subprocess.run([sys.executable, "-c", CONVERT, str(TREE), *options], check=True)


if __name__ == "__main__":
    serve(load)
