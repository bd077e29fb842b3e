"""Clients that ask for long streams, and read them or never do: `python -m tests.faults.readers URL MODEL COUNT KIND`.

In a process of their own, so that whoever measures others beside them does not share an interpreter with them. KIND is
`quick` or `slow`. Prints a line once all have asked; lives until it is killed.
"""

import json
import selectors
import signal
import socket
import sys
from urllib.parse import urlsplit

from tests.faults.streams import body

RECEIVE_BYTES = 4096
TOKENS = 900


def ask(url: str, request: dict[str, object]) -> socket.socket:
    """A client that has asked, and has not looked at what comes. The connection is for one answer."""
    address = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    connection.connect((address.hostname or "", address.port or 0))
    content = json.dumps(request).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}"
    )
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


def read_all(connections: list[socket.socket]) -> None:
    """Take what comes, at the least cost, until they are closed."""
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                assert isinstance(key.fileobj, socket.socket)
                if not key.fileobj.recv(1 << 16):
                    selector.unregister(key.fileobj)


def main() -> None:
    """Ask, tell, and read if that is their kind."""
    url, model, count, kind = sys.argv[1:]
    connections = [ask(url, body(model, number, TOKENS)) for number in range(int(count))]
    print("asked", flush=True)
    if kind == "quick":
        read_all(connections)
    signal.pause()


if __name__ == "__main__":
    main()
