"""Who may ask: bearer tokens, origins of web pages, names of requests."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from paperzoo.errors import PaperZooError

SHORTEST_TOKEN = 16  # characters
HARMLESS = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class Tokens:
    """The tokens that are accepted; none: nothing is asked. Only their digests are kept."""

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        self.digests = [digest(token) for token in tokens]

    def __bool__(self) -> bool:
        return bool(self.digests)

    def accept(self, header: str | None) -> bool:
        """Whether an Authorization header brings one of them, in a time that does not tell how nearly it does."""
        scheme, _, token = (header or "").partition(" ")
        given, found = digest(token.strip()), False
        for known in self.digests:
            found |= hmac.compare_digest(known, given)
        return found and scheme.lower() == "bearer"


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def read_tokens(path: Path | None) -> Tokens:
    """From a file, a line each, "#" begins a comment; and from $PAPERZOO_TOKENS, with commas between them.

    Raises:
        PaperZooError: for a file that cannot be read or has none, and for a token that is easily guessed.
    """
    found = [("$PAPERZOO_TOKENS", t.strip()) for t in os.environ.get("PAPERZOO_TOKENS", "").split(",") if t.strip()]
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PaperZooError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        mine = [(str(path), line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not mine:
            raise PaperZooError(f"{path}: has no token; write one a line, for example: openssl rand -hex 32")
        found += mine
    for where, token in found:
        if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            raise PaperZooError(
                f"{where}: a token has at least {SHORTEST_TOKEN} letters, digits or signs, and no blank"
            )
    return Tokens(token for _, token in found)


def check_origins(origins: list[str]) -> list[str]:
    """The origins of --cors as browsers write them.

    Raises:
        PaperZooError: for one that is none, and for "*".
    """
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query:
            raise PaperZooError(f"--cors {origin}: an origin is a scheme and a host, such as https://example.org")
    return [origin.lower() for origin in origins]


def request_name(given: str | None) -> str:
    """The client's name for the request where it is harmless, else a new one."""
    return given if given and HARMLESS.fullmatch(given) else secrets.token_hex(8)
