"""A client that costs little, for load that shares its cores with the service that it measures.

Of 56 requests a second httpx took 2.6 ms of a core each, more than the service did for a refusal; this takes 0.45.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

END = b"\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Answer:
    """What came back, and when, on `time.perf_counter`'s clock. Its body has been read, and is of no interest."""

    status: int
    retry_after: str | None
    asked_at: float
    answered_at: float


class Asker:
    """Posts requests that are answered whole, over as many connections as are open at once, which it keeps."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 0
        self._idle: list[Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()

    async def post(self, path: str, request: dict[str, object]) -> Answer:
        """One request. Raises `OSError` or `EOFError` where the connection breaks."""
        asked_at = time.perf_counter()
        content = json.dumps(request).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        reader, writer = await self._connection()
        writer.write(f"{head}content-length: {len(content)}".encode() + END + content)
        status, *lines = (await reader.readuntil(END)).decode().removesuffix("\r\n\r\n").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        await reader.readexactly(int(headers["content-length"]))
        self._idle.append((reader, writer))
        return Answer(int(status.split()[1]), headers.get("retry-after"), asked_at, time.perf_counter())

    async def _connection(self) -> Connection:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)
