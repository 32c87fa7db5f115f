"""What one request may ask for, and how a refusal is said. Shared by the service and its model processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from paperzoo.errors import PaperZooError

HEADER_BYTES = 16 * 1024  # of a request's line and headers
HEADER_SECONDS = 10.0  # until they are there
BODY_SECONDS = 10.0  # until a body is there, and a second more for each BODY_RATE of its bytes
BODY_RATE = 64 * 1024  # bytes a second
WRITE_SECONDS = 30.0  # that a client may leave an answer unread
IDLE_SECONDS = 30  # that a connection is kept between two requests
CONNECTIONS = 1000  # open at a time
HELD_BYTES = 256 * 1024 * 1024  # of all bodies that are in the service's hands
MOST_INPUTS = 64  # in one request
MOST_FIELDS = 2000  # columns of a row, parts of a form


@dataclass(frozen=True)
class Limits:
    """The bounds that the command line sets."""

    body: int = 16 * 1024 * 1024  # bytes
    pixels: int = 4096 * 4096  # of all pictures in a request together
    text: int = 20_000  # characters of one text
    timeout: float = 30.0  # seconds from a complete request to its answer

    def plain(self) -> dict[str, Any]:
        return asdict(self)


class Refused(PaperZooError):
    """A request that is not answered, with the HTTP status that says why."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


def error_body(message: str, request_id: str) -> bytes:
    """One line of JSON."""
    short = " ".join(message.split())
    short = short if len(short) <= 600 else short[:597] + "..."
    return json.dumps({"error": short, "request_id": request_id}, ensure_ascii=False).encode("utf-8", "replace")
