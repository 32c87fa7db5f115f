"""What every request passes: its name, its size, its token, the origin of its page; and what is said and counted of it.

An ASGI application around another. Whatever happens inside, a client gets one line of JSON and never a traceback.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from paperzoo.serve.access import Tokens, request_name
from paperzoo.serve.limits import BODY_RATE, BODY_SECONDS, HEADER_BYTES, HELD_BYTES, Limits, Refused, error_body
from paperzoo.serve.records import Metrics

OPEN = ("/", "/health", "/ready", "/v2/health/live", "/v2/health/ready")  # asked without a token
SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
STRICT = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")

NOT_HERE = {404: "there is nothing here; see /openapi.json", 405: "another method is needed here"}

logger = logging.getLogger("paperzoo.serve")


@dataclass
class Seen:
    """What is known of a request while it is answered; `endpoint` and `model` are names of ours, never the client's words."""

    request_id: str
    endpoint: str = "other"
    model: str = ""
    status: int = 0
    bytes: int = 0
    error: str | None = None


class Gate:
    """See above. `held` counts the bytes of all bodies that are in the service's hands."""

    def __init__(self, app: Any, limits: Limits, tokens: Tokens, origins: list[str], metrics: Metrics) -> None:
        self.app, self.limits, self.tokens, self.origins, self.metrics = app, limits, tokens, origins, metrics
        self.held = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.perf_counter(), Headers(scope=scope)
        seen = scope["seen"] = Seen(request_name(headers.get("x-request-id")))
        allowed = self.allowed_origin(headers)

        async def say(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                message["headers"] = self.completed(message.get("headers", []), seen, allowed)
            await send(message)

        try:
            if self.preflight(scope, headers):
                await self.answer_preflight(say, allowed)
            else:
                self.check(scope, headers, allowed)
                await self.app(scope | {"app": self}, receive, say)  # with "app" a router raises what it refuses
        except HTTPException as error:
            await refuse(say, seen, NOT_HERE.get(error.status_code, "this cannot be answered"), error.status_code)
        except Refused as error:
            await refuse(say, seen, str(error), error.status)
        except Exception:
            logger.exception("a request failed", extra={"request_id": seen.request_id})
            if not seen.status:
                await refuse(say, seen, "the service failed on this request", 500)
        finally:
            self.record(scope, seen, time.perf_counter() - began)

    # -- before ------------------------------------------------------------------------------------------------------

    def check(self, scope: dict[str, Any], headers: Headers, allowed: str | None) -> None:
        """Refuse what needs no look at the body."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            raise Refused(f"the headers are larger than {HEADER_BYTES:,} bytes", 431)
        if "origin" in headers and allowed is None and not same_origin(headers):
            raise Refused("pages of this origin may not ask; the service is started with --cors ORIGIN for that", 403)
        if self.tokens and scope["path"] not in OPEN and not self.tokens.accept(headers.get("authorization")):
            raise Refused("a token is needed: Authorization: Bearer …", 401)
        length = headers.get("content-length", "0")
        if len(length) > 12 or int(length) > self.limits.body:
            raise Refused(f"the body is larger than {self.limits.body:,} bytes", 413)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused("compressed bodies are not taken", 415)

    def allowed_origin(self, headers: Headers) -> str | None:
        origin = headers.get("origin", "").lower()
        return origin if origin in self.origins else None

    @staticmethod
    def preflight(scope: dict[str, Any], headers: Headers) -> bool:
        return scope["method"] == "OPTIONS" and "access-control-request-method" in headers

    @staticmethod
    async def answer_preflight(say: Any, allowed: str | None) -> None:
        if allowed is None:
            raise Refused("pages of this origin may not ask", 403)
        headers = [
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
            (b"access-control-max-age", b"600"),
        ]
        await say({"type": "http.response.start", "status": 204, "headers": headers})
        await say({"type": "http.response.body", "body": b""})

    async def read_body(self, scope: dict[str, Any], receive: Any) -> bytes:
        """The body, in a time that depends on its size. Whoever reads it gives `held` back.

        Raises:
            Refused: 408, 413, or 503 while other bodies fill the memory; or if the client left.
        """
        chunks: list[bytes] = []
        count, began = 0, time.monotonic()
        try:
            while True:
                left = began + BODY_SECONDS + count / BODY_RATE - time.monotonic()
                async with asyncio.timeout(max(left, 0.001)):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused("the client left", 400)
                chunk = message.get("body", b"")
                count += len(chunk)
                self.held += len(chunk)
                chunks.append(chunk)
                if count > self.limits.body:
                    raise Refused(f"the body is larger than {self.limits.body:,} bytes", 413)
                if self.held > HELD_BYTES:
                    raise Refused("the service holds too many requests", 503)
                if not message.get("more_body"):
                    break
        except TimeoutError:
            self.held -= count
            raise Refused("the body did not arrive in time", 408) from None
        except BaseException:
            self.held -= count
            raise
        scope["seen"].bytes = count
        return b"".join(chunks)

    # -- after -------------------------------------------------------------------------------------------------------

    @staticmethod
    def completed(headers: Any, seen: Seen, allowed: str | None) -> list[tuple[bytes, bytes]]:
        kept = [*headers, *SAFE, (b"x-request-id", seen.request_id.encode())]
        if not any(name == b"content-security-policy" for name, _ in kept):
            kept.append(STRICT)
        if allowed is not None:
            kept += [
                (b"access-control-allow-origin", allowed.encode()),
                (b"access-control-expose-headers", b"x-request-id, inference-header-content-length"),
                (b"vary", b"origin"),
            ]
        return kept

    def record(self, scope: dict[str, Any], seen: Seen, seconds: float) -> None:
        self.metrics.requests.labels(seen.endpoint, seen.model, str(seen.status)).inc()
        self.metrics.seconds.labels(seen.endpoint, seen.model).observe(seconds)
        level = logging.ERROR if seen.status == 500 else logging.INFO
        if logger.isEnabledFor(level):
            client = scope.get("client")
            extra = {
                "request_id": seen.request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "endpoint": seen.endpoint,
                "model": seen.model or None,
                "status": seen.status,
                "seconds": round(seconds, 5),
                "bytes": seen.bytes,
                "client": client[0] if client else None,
                "error": seen.error,
            }
            logger.log(level, "request", extra=extra)


def same_origin(headers: Headers) -> bool:
    """By host alone: before a proxy that ends TLS the scheme differs."""
    host = urlsplit(headers["origin"].lower()).netloc
    return bool(host) and host == headers.get("host", "").lower()


async def refuse(say: Any, seen: Seen, message: str, status: int) -> None:
    """The error as the answer. The connection ends where the request's body was not read."""
    seen.error = " ".join(message.split())[:300]
    body = error_body(message, seen.request_id)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (401, 403, 408, 413, 415) or seen.bytes == 0:
        headers.append((b"connection", b"close"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    await say({"type": "http.response.start", "status": status, "headers": headers})
    await say({"type": "http.response.body", "body": body})
