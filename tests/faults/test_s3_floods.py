"""S3: more bytes than were announced, fewer, without end, or one at a time: each is refused, and the memory stays."""

import json
import socket
import threading
import time
from collections.abc import Callable

import pytest

from service.limits import Limits
from tests.faults.conftest import BODY_SECONDS, Guarded, scaled

pytestmark = [pytest.mark.slow, pytest.mark.faults]

ROOM_BYTES = 20 << 20
MAX_BODY = Limits().max_body_bytes


def head(guarded: Guarded, *lines: str) -> bytes:
    fixed = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json"]
    return "\r\n".join([*fixed, f"authorization: Bearer {guarded.keys[0]}", *lines, "", ""]).encode()


def connect(guarded: Guarded) -> socket.socket:
    return socket.create_connection(guarded.address, timeout=60)


def status_of(connection: socket.socket) -> int:
    """Of the answer's first line; 0 if the connection is closed without one."""
    line = b""
    while b"\r\n" not in line:
        try:
            got = connection.recv(4096)
        except ConnectionResetError:
            return 0
        if not got:
            return 0
        line += got
    return int(line.split()[1])


def send_all(connection: socket.socket, *pieces: bytes) -> None:
    """As far as the other side takes it: it may answer and close before the end."""
    try:
        for piece in pieces:
            connection.sendall(piece)
    except (BrokenPipeError, ConnectionResetError):
        pass


def test_a_body_of_a_byte_too_many_is_refused(guarded: Guarded) -> None:
    with connect(guarded) as connection:
        body = json.dumps({"prompt": ""}).encode().ljust(MAX_BODY + 1)
        send_all(connection, head(guarded, f"content-length: {len(body)}"), body)
        assert status_of(connection) == 413


def test_a_body_that_announces_too_much_is_refused_before_it_is_sent(guarded: Guarded) -> None:
    with connect(guarded) as connection:
        connection.sendall(head(guarded, f"content-length: {10**12}"))
        assert status_of(connection) == 413


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 40, "5, 6", ""])
def test_a_length_that_is_none_is_refused(guarded: Guarded, length: str) -> None:
    with connect(guarded) as connection:
        send_all(connection, head(guarded, f"content-length: {length}"), b'{"prompt": "x", "max_tokens": 1}')
        assert 400 <= status_of(connection) < 500


def test_a_body_shorter_than_announced_is_given_up(guarded: Guarded) -> None:
    """Without a limit of time, the request is kept for as long as the client likes."""
    with connect(guarded) as connection:
        connection.sendall(head(guarded, "content-length: 100") + b'{"prompt": "x"}')
        assert status_of(connection) == 408


def test_two_lengths_at_once_are_refused(guarded: Guarded) -> None:
    """Whoever believes the one, behind a proxy that believes the other, serves a request that nobody sent."""
    with connect(guarded) as connection:
        body = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
        send_all(connection, head(guarded, f"content-length: {len(body)}", "transfer-encoding: chunked"), body)
        assert 400 <= status_of(connection) < 500


def test_chunks_without_end_are_refused_and_not_kept(guarded: Guarded) -> None:
    before, chunk = guarded.memory(), b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with connect(guarded) as connection:
        send_all(connection, head(guarded, "transfer-encoding: chunked"), *[chunk] * scaled(200, 2000))
        assert status_of(connection) in (413, 0), "0: closed while we were still sending, and the answer with it"
    assert guarded.memory() - before < ROOM_BYTES


def test_a_header_of_a_megabyte_is_refused(guarded: Guarded) -> None:
    """HAProxy's own answer to what does not fit its buffer is a 400; what fits and is too large gets our 431."""
    for size, statuses in ((1 << 20, (400, 431, 0)), (10_000, (431,))):
        with connect(guarded) as connection:
            send_all(connection, head(guarded, "x-much: " + "x" * size))
            assert status_of(connection) in statuses


def at_once(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_slow_senders_are_given_up_while_others_are_served(guarded: Guarded) -> None:
    """Without limits of time, 200 connections that send a byte a second are held for ever, each with its buffers."""
    before, statuses, peak = guarded.memory(), [], [0]

    def slow(_: int) -> None:
        with connect(guarded) as connection:
            connection.sendall(head(guarded, "content-length: 1000"))
            stop = time.monotonic() + 10 * BODY_SECONDS
            connection.settimeout(0.5)
            while time.monotonic() < stop:
                try:
                    connection.sendall(b" ")
                    statuses.append(status_of(connection))
                    return
                except TimeoutError:
                    continue
                except OSError:
                    statuses.append(0)
                    return
            statuses.append(-1)

    def watch() -> None:
        while len(statuses) < count:
            peak[0] = max(peak[0], guarded.memory())
            time.sleep(0.2)

    count = scaled(40, 200)
    flood = threading.Thread(target=at_once, args=(count, slow))
    watcher = threading.Thread(target=watch)
    flood.start()
    watcher.start()
    with guarded.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4})
        assert answer.status_code == 200
    flood.join()
    watcher.join()
    assert set(statuses) <= {408, 0}, "0: closed between our bytes"
    assert 408 in statuses
    assert peak[0] - before < ROOM_BYTES
