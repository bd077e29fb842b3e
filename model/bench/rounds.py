"""A round: a batch of requests from start to end, and when their tokens came. Every engine is timed by this one rule.

Nothing here but the standard library: it also runs inside the Python of each peer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """What to generate: `batch` random prompts of `prompt_tokens` each, `output_tokens` more for each, EOS ignored."""

    batch: int
    prompt_tokens: int
    output_tokens: int
    seed: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The prompts, the same for every engine. Another seed, batch or length gives others, of which none begins as
        one of these does: no prefix cache can know them.
        """
        rng = random.Random(f"{self.seed} {self.batch} {self.prompt_tokens}")
        return [[rng.randrange(vocab_size) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


@dataclass(frozen=True)
class Answer:
    """How long a round took.

    seconds: from the start to the last token of all.
    prefill_seconds: to the moment when every request has its first token.
    decode_seconds, decode_tokens: from that moment to the end of the first request that ends, so that the whole batch
        decodes all the while; 0 where none was generated after the first token.
    """

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    decode_tokens: int

    @classmethod
    def of(cls, started: float, arrivals: Sequence[Sequence[float]]) -> "Answer":
        """arrivals: for each request, when each of its tokens came, on the clock of `started`."""
        first = max(times[0] for times in arrivals)
        last = min(times[-1] for times in arrivals)
        return cls(
            seconds=max(times[-1] for times in arrivals) - started,
            prefill_seconds=first - started,
            decode_seconds=max(last - first, 0.0),
            decode_tokens=sum(first < time <= last for times in arrivals for time in times),
        )

    def prefill_rate(self, ask: Ask) -> float:
        """Prompt tokens a second."""
        return ask.batch * ask.prompt_tokens / self.prefill_seconds

    def decode_rate(self) -> float:
        """Tokens a second while the whole batch decodes; NaN where there was nothing to decode."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else float("nan")

    def rate(self, ask: Ask) -> float:
        """Generated tokens a second, prefill included."""
        return ask.batch * ask.output_tokens / self.seconds
