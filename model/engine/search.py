"""Several completions of one prompt, and the best of them: built on the engine's requests, unknown to its steps.

For who calls the engine from Python, as scoring scripts do. The service ranks candidates by itself (`best_of`), and
offers no beams: OpenAI's API has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.engine.engine import Engine
from model.engine.request import FinishReason, Request, TokenOutput
from model.sampling.params import SamplingParams, sibling_seed
from model.sampling.result import TokenLogprobs


@dataclass(frozen=True)
class Found:
    """token_ids: what was generated; cumulative_logprob: the sum of their log-probabilities."""

    token_ids: list[int]
    cumulative_logprob: float
    finish_reason: FinishReason | None

    @property
    def mean_logprob(self) -> float:
        """By which completions of different lengths are compared."""
        return self.cumulative_logprob / max(len(self.token_ids), 1)


def best_of(engine: Engine, prompt_ids: Sequence[int], params: SamplingParams, n: int, count: int) -> list[Found]:
    """Sample `count` completions that share the prompt's blocks, and return the `n` likeliest a token, best first."""
    params = replace(params, logprobs=params.logprobs or 0)
    leader: Request | None = None
    outputs: dict[str, list[TokenOutput]] = {}
    for index in range(count):
        own = replace(params, seed=sibling_seed(params.seed, index))
        request = Request(f"best-of-{index}", prompt_ids, own, leader=leader)
        leader = leader or request
        outputs[request.request_id] = []
        engine.add(request)
    while any(not seen or seen[-1].finish_reason is None for seen in outputs.values()):
        for output in engine.step():
            outputs[output.request_id].append(output)
    completions = [_join(seen) for seen in outputs.values()]
    return sorted(completions, key=lambda completion: -completion.mean_logprob)[:n]


def beam_search(
    engine: Engine, prompt_ids: Sequence[int], *, width: int, max_tokens: int, length_penalty: float = 1.0
) -> list[Found]:
    """The `width` best completions that a beam of `width` finds, best first (Sutskever et al. 2014).

    Each beam is a request for one token and the likeliest 2 * width at its place; the prefix cache makes its prompt
    free. A finished beam counts by its log-probability over its length to the power of `length_penalty`; the search
    ends when no live beam could still enter the best.
    """
    eos = set(engine.model_config.eos_token_ids)
    live = [Found([], 0.0, None)]
    finished: list[Found] = []

    def score(completion: Found) -> float:
        length: float = len(completion.token_ids) ** length_penalty
        return completion.cumulative_logprob / length

    for _ in range(max_tokens):
        candidates = []
        for beam, logprobs in zip(live, _next_tokens(engine, prompt_ids, live, 2 * width), strict=True):
            for token_id, logprob in logprobs.top:
                reason: FinishReason | None = "stop" if token_id in eos else None
                candidates.append(Found([*beam.token_ids, token_id], beam.cumulative_logprob + logprob, reason))
        candidates.sort(key=lambda candidate: -candidate.cumulative_logprob)
        # As many candidates as could all end here and still leave `width` to go on with.
        best = candidates[: 2 * width]
        finished += [candidate for index, candidate in enumerate(best) if candidate.finish_reason and index < width]
        finished = sorted(finished, key=lambda done: -score(done))[:width]
        live = [candidate for candidate in best if not candidate.finish_reason][:width]
        if not live or (len(finished) == width and score(finished[-1]) >= score(live[0])):
            return finished
    ended = [replace(beam, finish_reason="length") for beam in live]
    return sorted([*finished, *ended], key=lambda done: -score(done))[:width]


def _next_tokens(engine: Engine, prompt_ids: Sequence[int], beams: Sequence[Found], count: int) -> list[TokenLogprobs]:
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=count)
    for index, beam in enumerate(beams):
        engine.add(Request(f"beam-{index}", [*prompt_ids, *beam.token_ids], params))
    found: dict[str, TokenLogprobs] = {}
    while len(found) < len(beams):
        found |= {output.request_id: output.logprobs[0] for output in engine.step() if output.logprobs}
    return [found[f"beam-{index}"] for index in range(len(beams))]


def _join(outputs: Sequence[TokenOutput]) -> Found:
    logprobs = [item.logprob for output in outputs for item in output.logprobs or ()]
    token_ids = [token_id for output in outputs for token_id in output.token_ids]
    return Found(token_ids, sum(logprobs), outputs[-1].finish_reason)
