"""HTTP connections that do not wait for ever, and a server that ends well.

uvicorn bounds the time of idle connections alone. Here a connection is also closed whose headers do not arrive, or whose client
does not read its answer; what is no HTTP gets an error in JSON; and SIGTERM lets requests finish and ends with exit code 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import h11
from uvicorn import Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from paperzoo.serve.limits import CONNECTIONS, HEADER_SECONDS, WRITE_SECONDS, error_body

LINGER_SECONDS = 2.0  # that a client has to close its side, after the last answer of a connection

logger = logging.getLogger("paperzoo.serve")


class Gathered:
    """A transport that sends what was written in one step of the loop at once: an answer is one packet, not three."""

    def __init__(self, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.transport, self.loop = transport, loop
        self.parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if not self.parts:
            self.loop.call_soon(self.flush)
        self.parts.append(data)

    def flush(self) -> None:
        if self.parts:
            data, self.parts = b"".join(self.parts), []
            self.transport.write(data)

    def close(self) -> None:
        self.flush()
        self.transport.close()

    def get_write_buffer_size(self) -> int:
        return self.transport.get_write_buffer_size() + sum(map(len, self.parts))


class Connection(H11Protocol):
    """One client. `head_since`: when the wait for the headers of a request began; None between requests."""

    head_since: float | None = None
    quiet_since = 0.0  # when the last answer was written

    def connection_made(self, transport: Any) -> None:
        transport = Gathered(transport, self.loop)
        super().connection_made(transport)
        connected = transport.get_extra_info("socket")
        if (
            connected is not None and connected.family != socket.AF_UNIX
        ):  # else an answer's second part waits for an ACK
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.head_since = self.quiet_since = time.monotonic()
        if len(self.connections) > CONNECTIONS:
            body = error_body("the service has too many connections", "-")
            head = "HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-type: application/json\r\n"
            transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
            transport.close()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.head_since is None and not self.answering:
            self.head_since = time.monotonic()
        super().data_received(data)

    @property
    def answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        self.quiet_since, self.head_since = time.monotonic(), None
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(LINGER_SECONDS, self.end_if_read)

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self.end_if_read()

    def end_if_read(self) -> None:
        """Do not wait for the client to say goodbye, which TLS asks for, once all is sent."""
        if self.transport.get_write_buffer_size() == 0:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """For what h11 cannot read: no HTTP, or headers that are too large."""
        body = error_body("this is no valid HTTP request, or its headers are too large", "-")
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun already
            response = h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def overdue(self, now: float) -> bool:
        """Whether the client takes too long: to send its headers, or to read its answer."""
        if self.answering:
            return False
        if self.transport.is_closing() or self.transport.get_write_buffer_size() > 0:
            return now - self.quiet_since > WRITE_SECONDS
        return self.head_since is not None and now - self.head_since > HEADER_SECONDS


class PatientServer(Server):
    """`draining` becomes true when a signal asks it to end."""

    @property
    def draining(self) -> bool:
        return self.should_exit

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but a signal that was obeyed is not raised again at the end."""
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, self.handle_exit, sig, None)
        yield

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection) and connection.overdue(now):
                    connection.transport.abort()
        return await super().on_tick(counter)
