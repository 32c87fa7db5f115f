"""`paperzoo serve`: the site, live. Pages follow the cards, notes and code as they change; the search answers in JSON too."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from paperzoo.catalog import cards
from paperzoo.errors import PaperZooError, UnknownName
from paperzoo.serve import build, pages

LONGEST_QUERY = 400  # characters
MOST_RESULTS = 100
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HEADERS = {
    # 'wasm-unsafe-eval': the models in the pages are WebAssembly; blob: and data: are pictures that a visitor drops there
    "content-security-policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",
}
lock = threading.Lock()
checked = 0.0


def answer(content: str | bytes, type: str = "text/html", status: int = 200) -> Response:
    return Response(content, status, HEADERS, media_type=type)


def as_json(value: Any, status: int = 200) -> Response:
    return JSONResponse(value, status, HEADERS)


def follow_changes() -> None:
    """Look for changed cards, at most once a second."""
    global checked
    with lock:
        if time.monotonic() - checked > 1:
            pages.refresh()
            checked = time.monotonic()


# -- what is answered --------------------------------------------------------------------------------------------------


def show_page(request: Request) -> Response:
    """A page by its path; a folder is its index, and the ending may be left out."""
    follow_changes()
    wanted = request.path_params["path"]
    found = next((p for p in (wanted, f"{wanted}index.html", f"{wanted}.html") if p in pages.routes()), None)
    if found is None:
        return missing(wanted)
    with lock:  # one at a time: a page takes a millisecond, and what pages share is filled on the way
        return answer(pages.render(found))


def missing(wanted: str) -> Response:
    from paperzoo.catalog.search import search

    name = wanted.rsplit("/", 1)[-1].removesuffix(".html").removesuffix(".py").replace("_", " ").replace("-", " ")
    with lock:
        near = search(name[:LONGEST_QUERY], 6) if name.strip() else []
        return HTMLResponse(pages.not_found(wanted[:200], "../" * wanted.count("/"), near), 404, HEADERS)


def show_static(request: Request) -> Response:
    file = build.static_files().get(request.path_params["file"])
    if file is None:
        return missing(f"static/{request.path_params['file']}")
    return answer(file.read_bytes(), TYPES.get(file.suffix, "application/octet-stream"))


def show_data(request: Request) -> Response:
    follow_changes()
    with lock:
        scripts = pages.scripts()
    name = f"data/{request.path_params['file']}"
    return answer(scripts[name], TYPES[".js"]) if name in scripts else missing(name)


def show_model(request: Request) -> Response:
    """`model.js` or `spec.js` of a work that runs in the browser, from the cache."""
    from paperzoo.serve import browser

    slug, file = request.path_params["slug"], request.path_params["file"]
    prepared = models.get(slug)
    if prepared is None or file not in ("model.js", "spec.js"):
        return missing(f"browser/{slug}/{file}")
    folder = cards.cache_folder() / "browser-pages" / prepared.folder.name
    if not (folder / file).exists():
        with lock:
            browser.write(prepared, folder)
    return answer((folder / file).read_bytes(), TYPES[".js"])


def api_search(request: Request) -> Response:
    """/api/search?q=…&limit=…: works, best first."""
    from paperzoo.catalog.search import search

    follow_changes()
    query, limit = request.query_params.get("q", ""), request.query_params.get("limit", "20")
    if not query.strip():
        return as_json({"error": "give a query: /api/search?q=segmentation"}, 400)
    if len(query) > LONGEST_QUERY:
        return as_json({"error": f"the query has {len(query)} characters; at most {LONGEST_QUERY}"}, 400)
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MOST_RESULTS):
        return as_json({"error": f"limit is a number from 1 to {MOST_RESULTS}"}, 400)
    with lock:
        found = search(query, int(limit))
    return as_json({"query": query, "count": len(found), "results": [brief(p) for p in found]})


def brief(paper: cards.Paper) -> dict[str, Any]:
    card = paper.card
    keys = ("name", "title", "year", "venue", "kind", "tasks", "summary", "summary_zh")
    return {"slug": paper.slug, "area": paper.area, **{k: card.get(k) for k in keys}} | {
        "has_code": paper.has_code,
        "page": f"/papers/{quote(paper.slug)}.html",
    }


def api_paper(request: Request) -> Response:
    """/api/papers/<slug>: everything known and derived of one work."""
    from paperzoo.catalog.export import record

    follow_changes()
    slug = request.path_params["slug"]
    with lock:
        paper = cards.papers().get(slug)
        if paper is None:
            return as_json({"error": str(UnknownName("paper", slug[:200], cards.papers()))}, 404)
        return as_json(record(paper, pages.status()))


def not_served(request: Request, error: Exception) -> Response:
    """Anything but reading is refused."""
    return as_json({"error": "only GET and HEAD are answered here"}, 405)


def broken(request: Request, error: Exception) -> Response:
    """A card that cannot be read, while it is being written perhaps: one line says which, and the next request looks again."""
    return answer(str(error), "text/plain", 500)


def application() -> Starlette:
    return Starlette(
        routes=[
            Route("/api/search", api_search),
            Route("/api/papers/{slug}", api_paper),
            Route("/static/{file}", show_static),
            Route("/data/{file}", show_data),
            Route("/browser/{slug}/{file}", show_model),
            Route("/{path:path}", show_page),
        ],
        exception_handlers={405: not_served, PaperZooError: broken},
    )


# -- models that run in the browser ------------------------------------------------------------------------------------

models: dict[str, Any] = {}


def find_models() -> None:
    """Take the models of the cache; in the background, because it loads torch. Pages show the widget from then on."""
    from paperzoo.serve import browser

    with contextlib.suppress(PaperZooError):  # without models the site is whole
        for slug in browser.eligible():
            prepared = browser.prepare(slug, train=False)
            if prepared:
                models[slug] = prepared
    with lock:
        pages.use_models({slug: prepared.spec for slug, prepared in models.items()})


# -- the process -------------------------------------------------------------------------------------------------------


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        PaperZooError: if the port is in use, or the address is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, for TCP_NODELAY
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, UnicodeError) as error:
        listening.close()
        said = getattr(error, "strerror", None) or error
        raise PaperZooError(f"cannot listen on {host}:{port} ({said}); name another with --port, 0 for any") from None
    return listening


def serve(host: str = "127.0.0.1", port: int = 8000, open_browser: bool = False) -> None:
    """Show the site until Ctrl-C.

    Raises:
        PaperZooError: if the scripts are not built, or the address cannot be used.
    """
    build.static_files()
    pages.refresh()
    with bound(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}/"
        print(f"PaperZoo is at {address} (Ctrl-C ends it)", flush=True)
        threading.Thread(target=find_models, daemon=True).start()
        if open_browser:
            import webbrowser

            threading.Timer(0.5, webbrowser.open, [address]).start()
        config = uvicorn.Config(application(), log_level="warning", access_log=False, server_header=False)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
