"""Receipts: where a request's time went, and which weights answered it. They cost only those who ask."""

import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from service.call import Call

CHUNK_BYTES = 1 << 20


class EngineReceipt(NamedTuple):
    """An engine's part of a receipt. Times in seconds, None for what was not reached.

    queue: until the first of the request's choices was computed on; prefill: from there to the first token; decode:
    from there to the last token of all.
    """

    queue: float | None
    prefill: float | None
    decode: float | None
    weights_sha256: str


class Timing:
    """When an engine came to the choices of one request, on `time.perf_counter`'s clock.

    num_open: of its choices, those that are not over; num_tokens: of all of them.
    """

    def __init__(self) -> None:
        self.num_open = 0
        self.num_tokens = 0
        self.accepted_at = time.perf_counter()
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None

    def token(self, count: int, now: float) -> None:
        """So many tokens have come."""
        self.num_tokens += count
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now

    @property
    def queue(self) -> float | None:
        """Seconds until it was first computed on."""
        return _between(self.accepted_at, self.started_at)

    @property
    def prefill(self) -> float | None:
        """Seconds from there to its first token."""
        return _between(self.started_at, self.first_token_at)

    @property
    def decode(self) -> float | None:
        """Seconds from there to its last token so far."""
        return _between(self.first_token_at, self.last_token_at)

    def receipt(self, weights_sha256: str) -> EngineReceipt:
        """What became of it so far."""
        return EngineReceipt(self.queue, self.prefill, self.decode, weights_sha256)


class WeightsDigest:
    """The SHA-256 of a model's weights, computed in a thread of its own while the service starts.

    One file: what `sha256sum model.safetensors` says. Several: `sha256sum *.safetensors | sha256sum`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._digest = ""
        self._thread = threading.Thread(target=self._compute, name="weights-digest", daemon=True)
        self._thread.start()

    def wait(self) -> str:
        """The digest, in hexadecimal digits."""
        self._thread.join()
        return self._digest

    def _compute(self) -> None:
        files = sorted(self._directory.glob("*.safetensors"))
        digests = [_digest_of(file) for file in files]
        if len(files) == 1:
            self._digest = digests[0]
        else:
            listing = "".join(f"{digest}  {file.name}\n" for file, digest in zip(files, digests, strict=True))
            self._digest = sha256(listing.encode()).hexdigest()


def write_receipt(call: Call, noted: EngineReceipt | None, num_cached_tokens: int, num_resumes: int) -> dict[str, Any]:
    """The receipt as clients read it, at the end of an answer. Times in seconds; None where the engine's part is lost.

    admission: from the request's arrival until the engines were asked; transport: all that no other part accounts for,
    the hops between the processes and the waiting for the client to read.
    """
    total = time.perf_counter() - call.arrived
    seconds: dict[str, float | None] = {
        "admission": call.admitted_at - call.arrived,
        "queue": noted and noted.queue,
        "prefill": noted and noted.prefill,
        "decode": noted and noted.decode,
        "detokenize": call.detokenize_seconds,
    }
    seconds["transport"] = max(0.0, total - sum(part or 0.0 for part in seconds.values()))
    return {
        "request_id": call.request_id,
        "weights_sha256": noted and noted.weights_sha256,
        "cached_prompt_tokens": num_cached_tokens,
        "resumes": num_resumes,
        "seconds": {**{name: part and round(part, 6) for name, part in seconds.items()}, "total": round(total, 6)},
    }


def _digest_of(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as reader:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)  # lets go of the interpreter meanwhile
    return digest.hexdigest()


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)
