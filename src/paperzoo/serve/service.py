"""`paperzoo serve NAME`: predictions over HTTP, in front of model processes.

Starlette on uvicorn with a thin pool of processes of our own: measured against LitServe it costs less for a request, and it
reloads, drains and sheds as asked (`benchmarks/serve/README.md`). This process loads no torch and looks into no request:
it checks sizes, tokens and time, and passes bytes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

import paperzoo
from paperzoo.errors import PaperZooError
from paperzoo.serve import openapi, try_page
from paperzoo.serve.access import Tokens
from paperzoo.serve.connection import Connection, PatientServer
from paperzoo.serve.fleet import Fleet, named_sources
from paperzoo.serve.gate import Gate
from paperzoo.serve.limits import CONNECTIONS, HEADER_BYTES, IDLE_SECONDS, Refused
from paperzoo.serve.lines import log_lines
from paperzoo.serve.records import PLAIN_TEXT, Metrics
from paperzoo.serve.server import bound
from paperzoo.serve.workers import Lost, Settings

HEADER = "inference-header-content-length"
SWITCHES = {"draw", "brief"}

logger = logging.getLogger("paperzoo.serve")


@dataclass(frozen=True)
class Options:
    """What the command line says beside the models."""

    host: str = "127.0.0.1"
    port: int = 8000
    settings: Settings = field(default_factory=Settings)
    tokens: Tokens = field(default_factory=Tokens)
    origins: list[str] = field(default_factory=list)
    certificate: Path | None = None
    key: Path | None = None
    memory: int | None = None  # bytes
    watch: bool = False
    wait: bool = False  # whether the application starts only when every model is open


class Service:
    """The application: `gate` is what uvicorn calls."""

    def __init__(self, sources: dict[str, str], options: Options) -> None:
        self.options, self.metrics = options, Metrics()
        self.fleet = Fleet(sources, options.settings, self.metrics, options.memory)
        self.server: PatientServer | None = None
        self.failure: PaperZooError | None = None
        self.started = False
        self.address = ""
        app = Router(self.routes(), redirect_slashes=False, lifespan=self.lifespan)
        self.gate = Gate(app, options.settings.limits, options.tokens, options.origins, self.metrics)

    def routes(self) -> list[Route]:
        model, versioned = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        found = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/ready", self.show_ready),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", self.show_openapi),
            Route("/models", self.show_models),
            Route("/predict/{name}", self.predict, methods=["POST"]),
            Route("/admin/reload/{name}", self.reload, methods=["POST"]),
            Route("/v2", self.v2_server),
            Route("/v2/health/live", self.health),
            Route("/v2/health/ready", self.show_ready),
        ]
        for base in (model, versioned):
            found += [
                Route(base, self.v2_model),
                Route(f"{base}/ready", self.v2_model_ready),
                Route(f"{base}/infer", self.infer, methods=["POST"]),
            ]
        return found

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Router) -> AsyncIterator[None]:
        """Open the models in the background, so that /health answers from the first moment; close them at the end."""
        starting = asyncio.create_task(self.start())
        try:
            if self.options.wait:
                await starting
                if self.failure is not None:
                    raise self.failure
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await self.fleet.close()

    async def start(self) -> None:
        try:
            await self.fleet.start(self.options.watch)
        except PaperZooError as error:
            self.failure = error
            if self.server is not None:
                self.server.should_exit = True
            return
        self.started = True
        if self.address:
            print(f"PaperZoo serves {', '.join(self.fleet.pools)} at {self.address} (Ctrl-C ends it)", flush=True)

    # -- the service -------------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        return self.server is not None and self.server.draining

    async def page(self, request: Request) -> Response:
        seen(request, "page")
        return try_page.answer()

    async def health(self, request: Request) -> Response:
        seen(request, "health")
        return JSONResponse({"live": True})

    async def show_ready(self, request: Request) -> Response:
        seen(request, "ready")
        ready = self.started and not self.draining and self.fleet.ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def show_metrics(self, request: Request) -> Response:
        seen(request, "metrics")
        text = self.metrics.text(self.fleet.pools.values(), self.gate.held)
        return Response(text, headers={"content-type": PLAIN_TEXT})

    async def show_openapi(self, request: Request) -> Response:
        seen(request, "openapi")
        return JSONResponse(openapi.document(self.described(), bool(self.options.tokens)))

    async def show_models(self, request: Request) -> Response:
        seen(request, "models")
        keys = ("kind", "files", "input", "example", "recipe", "engine")
        rows = [{"name": name, **{k: model[k] for k in keys}} for name, model in self.described().items()]
        return JSONResponse({"models": rows})

    def described(self) -> dict[str, dict[str, Any]]:
        return {name: pool.description for name, pool in self.fleet.pools.items() if pool.description}

    async def reload(self, request: Request) -> Response:
        name = self.known(request, "reload")
        if not self.options.tokens:
            raise Refused("the service was started without tokens, so nobody may reload", 403)
        try:
            await self.fleet.reload(name)
        except PaperZooError as error:
            raise Refused(f"{name} stays as it is: {error}", 409) from None
        return JSONResponse({"model": name, "version": self.fleet.pools[name].version})

    # -- predictions -------------------------------------------------------------------------------------------------

    def known(self, request: Request, endpoint: str) -> str:
        """The model that a path names; the request is recorded under it."""
        name = request.path_params["name"]
        if name not in self.fleet.pools:
            seen(request, endpoint)
            shown = name if len(name) <= 60 else name[:60] + "..."
            raise Refused(f"no model named '{shown}'; there are {', '.join(self.fleet.pools)}", 404)
        seen(request, endpoint, name)
        if request.path_params.get("version", "1") != "1":
            raise Refused(f"{name} has the version 1 alone", 404)
        return name

    async def predict(self, request: Request) -> Response:
        name = self.known(request, "predict")
        query = dict(parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True))
        if query.keys() - SWITCHES:
            raise Refused(f"there is no ?{min(query.keys() - SWITCHES)[:40]}; there are ?draw and ?brief")
        head, body = await self.ask(request, name, {"as": "typed", "query": query})
        return Response(body, headers={"content-type": "application/json"})

    async def infer(self, request: Request) -> Response:
        name = self.known(request, "v2_infer")
        told = {"as": "v2", "header_length": request.headers.get(HEADER)}
        head, body = await self.ask(request, name, told)
        kind = "application/octet-stream" if head["headers"] else "application/json"
        return Response(body, headers={"content-type": kind, **head["headers"]})

    async def ask(self, request: Request, name: str, head: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """A process's answer to a request.

        Raises:
            Refused: whatever is wrong with the request, or the service.
        """
        if self.draining:
            raise Refused("the service is ending", 503)
        pool = self.fleet.pools[name]
        if not pool.version:
            raise Refused(f"{name} is being opened", 503)
        pool.arriving += 1
        try:
            body = await self.gate.read_body(request.scope, request.receive)
        finally:
            pool.arriving -= 1
        held = len(body)
        try:
            pool = await self.fleet.awake(name)
            head |= {"type": request.headers.get("content-type", ""), "request_id": request.scope["seen"].request_id}
            job = pool.submit(head, body)
            del body
            return await self.answer(request, pool, job)
        finally:
            self.gate.held -= held

    async def answer(self, request: Request, pool: Any, job: Any) -> tuple[dict[str, Any], bytes]:
        gone = asyncio.ensure_future(request.receive())  # the next event after the body: the client left
        timeout = self.options.settings.limits.timeout
        try:
            await asyncio.wait({job.answer, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not job.answer.done():
            job.answer.cancel()
            if gone.done() and not gone.cancelled():
                raise Refused("the client left", 400)
            self.metrics.shed.labels(pool.name, "time").inc()
            raise Refused(f"{pool.name} had no answer within {timeout:.0f} s", 504)
        try:
            head, body = job.answer.result()
        except Lost:
            raise Refused("the model's process died with this request; send it again", 503) from None
        if "error" in head:
            raise Refused(head["error"], head["status"])
        self.metrics.inputs.labels(pool.name).inc(head["count"])
        return head, body

    # -- the Open Inference Protocol ---------------------------------------------------------------------------------

    async def v2_server(self, request: Request) -> Response:
        seen(request, "v2_server")
        extensions = ["binary_tensor_data"]
        return JSONResponse({"name": "paperzoo", "version": paperzoo.__version__, "extensions": extensions})

    async def v2_model(self, request: Request) -> Response:
        name = self.known(request, "v2_model")
        description = self.fleet.pools[name].description
        if not description:
            raise Refused(f"{name} is being opened", 503)
        return JSONResponse(description["metadata"])

    async def v2_model_ready(self, request: Request) -> Response:
        pool = self.fleet.pools[self.known(request, "v2_ready")]
        ready = not self.draining and (pool.ready or (pool.version > 0 and not pool.awake))
        return JSONResponse({"name": pool.name, "ready": ready}, 200 if ready else 503)


def seen(request: Request, endpoint: str, model: str = "") -> None:
    request.scope["seen"].endpoint, request.scope["seen"].model = endpoint, model


# -- the process -------------------------------------------------------------------------------------------------------


def allow_files(count: int) -> None:
    """So many open files and connections, where the system lets a process have them."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (count if hard < 0 else min(count, hard), hard))


def serve(models: list[str], options: Options) -> None:
    """Answer until SIGINT or SIGTERM; then finish what is in hand.

    Raises:
        PaperZooError: if a model cannot be opened, the address cannot be used, or the certificate does not fit.
    """
    sources = named_sources(models)
    log_lines()
    allow_files(CONNECTIONS + 200)
    with bound(options.host, options.port) as listening:
        service = Service(sources, options)
        scheme = "https" if options.certificate else "http"
        shown = f"[{options.host}]" if ":" in options.host else options.host
        service.address = f"{scheme}://{shown}:{listening.getsockname()[1]}/"
        config = uvicorn.Config(
            service.gate,
            http=Connection,
            loop="asyncio",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=int(options.settings.limits.timeout) + 5,
            ssl_certfile=options.certificate,
            ssl_keyfile=options.key,
        )
        try:
            config.load()
        except (OSError, ValueError) as error:
            raise PaperZooError(f"{options.certificate}: the certificate cannot be used ({error})") from None
        service.server = PatientServer(config)
        service.server.run(sockets=[listening])
    if service.failure is not None:
        raise service.failure
