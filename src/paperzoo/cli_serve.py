"""`paperzoo serve`: the site, or, with names of papers or folders, the service that predicts with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from paperzoo.cli_options import example
from paperzoo.errors import PaperZooError

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
MEGABYTE = 1024 * 1024


@app.command(
    epilog=example(
        "paperzoo serve",
        "paperzoo serve wide_resnet",
        "paperzoo serve runs/resnet/…/deploy detector=runs/retinanet/… --workers 2",
        "paperzoo serve resnet --host 0.0.0.0 --token-file tokens.txt --tls-cert cert.pem --tls-key key.pem",
    )
)
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Papers (their newest runs), or folders of runs or of paperzoo optimize; NAME=FOLDER names one. None: the site."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any that is free.")] = 8000,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the site in the browser.")] = False,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes for each model.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each process; default: the cores, shared by the processes.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=64, help="Inputs that are computed together at most.")] = 8,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, max=1000, help="Milliseconds that a request waits for others at most.")
    ] = 5.0,
    max_queue: Annotated[
        int, typer.Option(min=1, max=100_000, help="Requests that may wait for a model; others get 429.")
    ] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds that an answer may take.")] = 30.0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, max=512, help="Megabytes of a request's body.")] = 16.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of all pictures in a request.")] = 4096 * 4096,
    max_text: Annotated[int, typer.Option(min=1, help="Characters of a text.")] = 20_000,
    memory_mb: Annotated[
        int | None, typer.Option(min=1, help="Megabytes for all models together; idle ones make room for others.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Bearer tokens, one a line; $PAPERZOO_TOKENS adds others, with commas.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The certificate, with its chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask, such as https://example.org.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Load a model anew when its files change.")] = False,
) -> None:
    """Show the catalogue's site; or, with models, answer predictions over HTTP, with a page to try them."""
    from paperzoo import terminal

    if not models:
        from paperzoo.serve.server import serve as show_site

        terminal.prepare_process()
        return show_site(host, port, open_browser)
    if (tls_cert is None) != (tls_key is None):
        raise PaperZooError("--tls-cert and --tls-key belong together")
    from paperzoo.serve.access import check_origins, read_tokens
    from paperzoo.serve.limits import Limits

    try:
        from paperzoo.serve.service import Options, Settings
        from paperzoo.serve.service import serve as answer
    except ImportError as error:
        from paperzoo.errors import MissingExtra

        raise MissingExtra(str(error.name), "serve", "serving models") from None
    limits = Limits(int(max_body_mb * MEGABYTE), max_pixels, max_text, timeout)
    own = threads or max(1, cores() // workers)
    settings = Settings(workers, max_batch, max_wait_ms / 1000, max_queue, own, limits)
    memory = None if memory_mb is None else memory_mb * MEGABYTE
    tokens, origins = read_tokens(token_file), check_origins(cors or [])
    answer(models, Options(host, port, settings, tokens, origins, tls_cert, tls_key, memory, watch))


def cores() -> int:
    """The cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
