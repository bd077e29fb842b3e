"""Tries a client's grammar in a process that may die of it. Run as a script it is that process. It needs no torch.

The library's fuel bounds most of what a grammar can cost, but not all: 400 `patternProperties`, 16 KiB of schema, keep
it busy for 16 seconds, and a chain of 3,000 references overflows the stack, which ends the process. So each grammar is
compiled here first, under an alarm clock and on a small stack. What survives is compiled again where it is used.

A line on stdin is one grammar, as a JSON string; the line that answers it is the reason against it, "" for none. An
empty line comes before all answers: the sign of readiness.
"""

import json
import re
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

TRIAL_SECONDS = 0.5  # of wall time
STACK_BYTES = 2 << 20  # a quarter of what the threads that compile in earnest have

# The library's fuel, a quarter of its defaults. With those, a mask of `a{1000000}` took 350 ms (vocabulary of 50,000),
# and no request of the engine gets a token meanwhile; now it takes 20 ms.
INITIAL_LEXER_FUEL = 250_000
STEP_LEXER_FUEL = 50_000
STEP_MAX_ITEMS = 12_500
MAX_LEXER_STATES = 20_000  # 1 to 2 KiB each, for as long as a request lives
MAX_REASON = 400  # characters
SOURCE_QUOTED = re.compile(r"\n +\d+ \| ")


def load_tokenizer(file: Path, vocab_size: int, eos_token_ids: list[int]) -> "LLTokenizer":
    """The vocabulary as the library wants it. Raises `ImportError`, `OSError` and `ValueError`."""
    from llguidance import LLTokenizer

    return LLTokenizer(file.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=eos_token_ids)


def build_matcher(tokenizer: "LLTokenizer", grammar: str) -> "LLMatcher":
    """Compile, and compute the first mask, often the dearest. Never raises: the matcher knows what is wrong with it."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=INITIAL_LEXER_FUEL,
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_MAX_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        verbose_errors=False,  # or they would carry what clients send into our logs
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


def reason(matcher: "LLMatcher") -> str:
    """What the library says is wrong, on one line of bounded length. Empty where nothing is."""
    # Behind the message the library quotes the source, which the client has.
    message = SOURCE_QUOTED.split(matcher.get_error().partition("<non-verbose/>")[0])[0]
    text = " ".join(message.split())
    if text.startswith("NoExtension"):
        return "no text matches it"
    # Both ends: what kind of error it is comes first or last, the client's own words between.
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON // 2]} ... {text[-MAX_REASON // 2 :]}"


def serve(file: str, vocab_size: str, *eos_token_ids: str) -> None:
    """Answer until stdin ends. The alarm's default action ends the process, wherever in the library it is."""
    tokenizer = load_tokenizer(Path(file), int(vocab_size), [int(token_id) for token_id in eos_token_ids])
    print(flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, TRIAL_SECONDS)
        verdict = reason(build_matcher(tokenizer, json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; the end of stdin is for us
    threading.stack_size(STACK_BYTES)
    threading.Thread(target=serve, args=sys.argv[1:]).start()
