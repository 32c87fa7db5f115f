"""A model process: `python -m paperzoo.serve.worker FD`, started by the service with a socket that both share.

It opens one deployed folder, tries it, describes itself, and answers requests until the socket is closed: it reads what is
there, a batch at most, decodes it, computes it, answers. A request that cannot be read, or that the network cannot take, is
refused alone; the others of its batch are answered.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from paperzoo.errors import PaperZooError
from paperzoo.serve.batching import Batcher, Work
from paperzoo.serve.limits import Limits, Refused
from paperzoo.serve.lines import log_lines
from paperzoo.serve.wire import frame, receive_frame

QUIET = 0.5  # seconds without a request, after which a size of batch may be tried: trying takes as long as answering
LARGE = 16 * 1024 * 1024  # bytes of a batch's decoded inputs; what the network needed for them is given back

logger = logging.getLogger("paperzoo.serve")


class Replies:
    """The way back."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def send(self, head: dict[str, Any], body: bytes = b"") -> None:
        self.connection.sendall(frame(head, body))

    def refuse(self, identity: int, message: str, status: int, ending: bool = False) -> None:
        self.send({"id": identity, "status": status, "error": message, "ending": ending})


class Model:
    """A recipe, what it takes, and an input that it is known to answer."""

    def __init__(self, name: str, folder: str, limits: Limits, max_batch: int, threads: int) -> None:
        import torch

        from paperzoo.engine.deploy import Installed, open_recipe
        from paperzoo.serve.kinds import kind_for

        torch.set_num_threads(threads)
        self.name, self.max_batch = name, max_batch
        self.recipe = open_recipe(folder, threads)
        self.kind = kind_for(self.recipe, limits)
        network = getattr(self.recipe, "model", None) and self.recipe.deployed
        self.engine = type(network.forward.runner).__name__ if is_installed(network, Installed) else "torch"
        self.known = self.kind.warm_up()
        self.result = self.recipe.predict([self.known])[0]
        self.untried = [n for n in (2, 4, 8, 16, 32, 64) if n <= max_batch] if self.engine != "torch" else []

    def description(self) -> dict[str, Any]:
        """What the service tells about it."""
        from paperzoo.serve.answers import schema_of, to_json
        from paperzoo.serve.protocol import metadata

        example = to_json(self.result, brief=True)
        return {
            "kind": self.kind.name,
            "files": list(self.kind.files),
            "input": self.kind.schema,
            "example": self.kind.example(),
            "answer": schema_of(example),
            "example_answer": example,
            "metadata": metadata(self.name, self.kind, self.result),
            "recipe": type(self.recipe).__name__,
            "engine": self.engine,
        }

    def try_a_size(self) -> None:
        """Let the engine prepare for another size of batch, while nobody waits."""
        self.recipe.predict([self.known] * self.untried.pop(0))

    def predict(self, values: list[Any]) -> list[Any]:
        """In parts of a power of two, for engines that prepare a program for each size; else of `max_batch`."""
        results: list[Any] = []
        while len(results) < len(values):
            left = min(len(values) - len(results), self.max_batch)
            size = left if self.engine == "torch" else 1 << (left.bit_length() - 1)
            results += self.recipe.predict(values[len(results) : len(results) + size])
        return results

    def healthy(self) -> bool:
        """Whether the input that it answered at the start still gets an answer."""
        try:
            return bool(self.recipe.predict([self.known]))
        except Exception:
            return False


def is_installed(network: Any, installed: type) -> bool:
    return network is not None and isinstance(network.forward, installed)


# -- requests ----------------------------------------------------------------------------------------------------------


class Intake:
    """Requests as they come: read, and their inputs decoded; or refused."""

    def __init__(self, connection: socket.socket, model: Model, replies: Replies) -> None:
        from paperzoo.serve.endpoints import read_typed
        from paperzoo.serve.protocol import read_inference

        self.connection, self.model, self.replies = connection, model, replies
        self.readers = {"typed": read_typed, "v2": read_inference}
        self.poll = select.poll()
        self.poll.register(connection, select.POLLIN)

    def there(self, timeout: float | None) -> bool:
        """Whether something comes within so many seconds."""
        return bool(self.poll.poll(None if timeout is None else math.ceil(1000 * timeout)))

    def receive(self, timeout: float | None) -> Work | None:
        """See `Batcher`."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.there(None if until is None else max(0.0, until - time.monotonic())):
            received = receive_frame(self.connection)
            if received is None:
                raise EOFError
            work = self.read(*received)
            if work is not None:
                return work
        return None

    def read(self, head: dict[str, Any], body: bytes) -> Work | None:
        try:
            request = self.readers[head["as"]](self.model.name, self.model.kind, head, body)
        except Refused as error:
            self.replies.refuse(head["id"], str(error), error.status)
            return None
        except Exception as error:  # reading depends on the request alone, so the fault is the request's
            told = {"request_id": head.get("request_id"), "model": self.model.name}
            logger.exception("a request cannot be read", extra=told)
            self.replies.refuse(head["id"], f"the request cannot be read ({type(error).__name__})", 400)
            return None
        size = len(body) + sum(weight(value) for value in request.values)
        return Work(head["id"], request, head["arrived"], head["deadline"], head["more"], size)


def weight(value: Any) -> int:
    """About how many bytes of decoded pixels an input holds."""
    if isinstance(value, tuple):
        return sum(map(weight, value))
    size = getattr(value, "size", 0)
    return 3 * size[0] * size[1] if isinstance(size, tuple) else 0


def answer(model: Model, batch: list[Any], replies: Replies) -> bool:
    """Answer the requests of a batch; False if the network is not well and the process should end."""
    now = time.monotonic()
    for work in [w for w in batch if w.deadline <= now]:
        replies.refuse(work.identity, "the time for an answer was over before it was computed", 504)
    batch = [w for w in batch if w.deadline > now]
    if not batch:
        return True
    try:
        results = model.predict([v for work in batch for v in work.request.values])
    except Exception as error:
        if len(batch) > 1:  # one of them is at fault: each on its own
            return all([answer(model, [work], replies) for work in batch])
        return refuse(model, batch[0], replies, error)
    told: dict[str, Any] = {"batch": len(results), "seconds": time.monotonic() - now}  # with one answer of the batch
    at, well = 0, True
    for work in batch:
        mine, at = results[at : at + work.count], at + work.count
        try:
            body, headers = work.request.answer(model.recipe, mine)
        except Exception as error:
            well &= refuse(model, work, replies, error)
            continue
        replies.send({"id": work.identity, "count": work.count, "headers": headers, **told}, body)
        told = {}
    return well


def refuse(model: Model, work: Any, replies: Replies, error: Exception) -> bool:
    """Tell a request why it has no answer; False if that is not its own fault."""
    if isinstance(error, PaperZooError):
        replies.refuse(work.identity, str(error), getattr(error, "status", 422))
        return True
    logger.error("the network failed on a request", exc_info=error, extra={"model": model.name})
    if model.healthy():
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        replies.refuse(work.identity, f"the network cannot take this input ({reason})", 422)
        return True
    replies.refuse(work.identity, "the network failed; it is started anew", 500, ending=True)
    return False


# -- the process -------------------------------------------------------------------------------------------------------


def bound_memory() -> None:
    """Let an input that needs more memory than there is fail by itself, before the kernel ends the process for it."""
    import resource

    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.8 * min(sizes)), resource.RLIM_INFINITY))


def give_back_memory() -> None:
    """What large inputs needed, and `keep_memory` would keep."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def run(connection: socket.socket) -> int:
    received = receive_frame(connection)
    if received is None:
        return 0
    settings, replies = received[0], Replies(connection)
    log_lines(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every broken form
    from paperzoo.engine.memory import keep_memory

    keep_memory()
    bound_memory()
    try:
        model = open_model(settings)
        description = model.description()
    except PaperZooError as error:
        replies.send({"failed": str(error)})
        return 1
    except Exception as error:
        logger.exception("%s cannot be opened", settings["folder"])
        replies.send({"failed": f"{settings['folder']}: cannot be opened ({type(error).__name__}: {error})"})
        return 1
    replies.send({"ready": description, "pid": os.getpid()})
    intake = Intake(connection, model, replies)
    batcher = Batcher(intake.receive, settings["max_batch"], settings["max_wait"])
    while True:
        if model.untried and not batcher.waiting and not intake.there(QUIET):
            model.try_a_size()
            continue
        batch = batcher.take()
        if batch is None:
            return 0
        if not answer(model, batch, replies):
            return 1
        if sum(work.size for work in batch) > LARGE:
            give_back_memory()


def open_model(settings: dict[str, Any]) -> Model:
    """Quickly; and once more with all that torch has, where that does not work."""
    from paperzoo.serve.quick import without_compiler, without_metrics

    arguments = settings["name"], settings["folder"], Limits(**settings["limits"])
    arguments += settings["max_batch"], settings["threads"]
    without_metrics()
    try:
        with without_compiler():
            return Model(*arguments)
    except (ImportError, AttributeError):
        logger.warning("opening %s again with the whole of torch", settings["folder"])
        return Model(*arguments)


def main() -> None:
    # Ctrl-C and a stop of the whole group are the service's business: it closes the socket when the last answer is out
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        code = run(connection)
    except (BrokenPipeError, ConnectionError):
        code = 0  # the service is gone
    sys.stderr.flush()
    os._exit(code)  # engines may take seconds to be taken down, and have nothing to save


if __name__ == "__main__":
    main()
