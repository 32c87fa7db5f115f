"""Several machines, through Ray Serve (extra `scale`): every replica is this package's service, behind Ray's proxies.

    serve deploy deploy/ray_serve.yaml        # on a Ray cluster
    serve run deploy/ray_serve.yaml           # on this machine

Ray places, counts and replaces the replicas; what a request may ask, and how it is answered, is the same as with
`paperzoo serve`. On one machine that command is simpler and answers sooner: Ray's proxy is a process more on the way.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from paperzoo.errors import MissingExtra, PaperZooError
from paperzoo.serve.access import check_origins, read_tokens
from paperzoo.serve.limits import Limits
from paperzoo.serve.workers import Settings

LIMITS = ("body", "pixels", "text", "timeout")
SETTINGS = ("workers", "threads", "max_batch", "max_wait", "max_queue")


def application(arguments: dict[str, Any]) -> Any:
    """What a Ray Serve configuration names: `import_path: paperzoo.serve.scale:application`.

    Args:
        arguments: "models", a list of NAME, FOLDER or NAME=FOLDER as for the command, on every machine; any field of
            `Settings` and `Limits`; "token_file"; "cors", a list of origins.

    Raises:
        PaperZooError: for an argument that does not exist.
    """
    try:
        from ray import serve
    except ImportError:
        raise MissingExtra("ray", "scale", "serving on several machines") from None
    options = options_of(arguments)
    models = list(arguments["models"])

    def build() -> Any:
        from paperzoo.serve.fleet import named_sources
        from paperzoo.serve.lines import log_lines
        from paperzoo.serve.service import Service

        log_lines()
        return Service(named_sources(models), options).gate

    return serve.deployment(serve.ingress(build)(), name="PaperZoo").bind()


def options_of(arguments: dict[str, Any]) -> Any:
    from paperzoo.serve.service import Options

    unknown = set(arguments) - {"models", "token_file", "cors", *LIMITS, *SETTINGS}
    if unknown or not arguments.get("models"):
        raise PaperZooError(f"the arguments of the application: {min(unknown or {'models'})} is unknown or missing")
    limits = replace(Limits(), **{name: arguments[name] for name in LIMITS if name in arguments})
    settings = replace(Settings(), limits=limits, **{name: arguments[name] for name in SETTINGS if name in arguments})
    file = arguments.get("token_file")
    tokens = read_tokens(None if file is None else Path(file))
    return Options(settings=settings, tokens=tokens, origins=check_origins(arguments.get("cors", [])), wait=True)
