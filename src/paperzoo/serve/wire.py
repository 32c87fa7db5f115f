"""Frames between the service and a model process, over a socket pair: a line of JSON and bytes, each with its length.

No pickles: what a decoder that was taken over could send back is data, never code.
"""

from __future__ import annotations

import json
import socket
import struct
from asyncio import IncompleteReadError, StreamReader
from typing import Any

SIZES = struct.Struct("!II")
LARGEST = 1024 * 1024 * 1024  # bytes; more than that is no frame of ours


def frame(head: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(head, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return SIZES.pack(len(text), len(body)) + text + body


async def read_frame(reader: StreamReader) -> tuple[dict[str, Any], bytes] | None:
    """The next frame; None once the other side is gone."""
    try:
        head, body = SIZES.unpack(await reader.readexactly(SIZES.size))
        if head + body > LARGEST:
            return None
        return json.loads(await reader.readexactly(head)), await reader.readexactly(body)
    except (IncompleteReadError, ConnectionError, ValueError):
        return None


def receive_frame(connection: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """`read_frame` for a process that waits."""
    sizes = receive(connection, SIZES.size)
    if sizes is None:
        return None
    head, body = (receive(connection, n) for n in SIZES.unpack(sizes))
    return None if head is None or body is None else (json.loads(head), bytes(body))


def receive(connection: socket.socket, count: int) -> bytearray | None:
    buffer, filled = bytearray(count), 0
    while filled < count:
        try:
            got = connection.recv_into(memoryview(buffer)[filled:])
        except OSError:
            return None
        if not got:
            return None
        filled += got
    return buffer
