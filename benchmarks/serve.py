"""The service under load and faults, on loopback: start-up, capacity against the bare engine, tails, shedding, kills, memory.

    python benchmarks/serve.py FOLDER [--seconds 300] [--requests 100000] [--malformed 1000] [--machine NAME] [--only STEP …]

FOLDER is one that `paperzoo optimize` wrote, or a run's, of a model that takes pictures or texts. Writes
benchmarks/serve/<machine>.json after every step. Clients, service and engine share this machine's cores, so the network has one
thread: on two cores the rest of the service and the clients have the other. A quiet machine is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "serve"
STEPS = ("start", "capacity", "steady", "overload", "kill", "memory", "malformed")
BARE = """
import json, sys, time
from paperzoo.serve.limits import Limits
from paperzoo.serve.pictures import Pixels
from paperzoo.serve.worker import Model
from paperzoo.engine.memory import keep_memory
keep_memory()
folder, path, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
model, content = Model("bare", folder, Limits(), 1, 1), open(path, "rb").read()
once = lambda: model.recipe.predict(model.kind.from_file(content, Pixels(10**9)))
for _ in range(20):
    once()
count, began = 0, time.monotonic()
while time.monotonic() - began < seconds:
    once()
    count += 1
print(json.dumps(count / (time.monotonic() - began)))
"""
PACED = (
    BARE[: BARE.index("count, began")]
    + """
rate, seen, due = float(sys.argv[4]), [], time.monotonic()
until = due + seconds
while due < until:
    time.sleep(max(0.0, due - time.monotonic()))
    once()
    seen.append((time.monotonic() - due, 200))
    due += 1 / rate
print(json.dumps(seen))
"""
)


# -- a service ---------------------------------------------------------------------------------------------------------


class Service:
    """A process that serves one model, with one thread; `request` is what clients send it."""

    def __init__(self, folder: str, *words: str) -> None:
        command = [sys.executable, "-m", "paperzoo", "serve", f"m={folder}", "--port", "0", "--threads", "1", *words]
        began = time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self.process.stdout.readline()
        found = re.search(r":(\d+)/", line)
        if not found:
            sys.exit(f"the service did not start: {line}")
        self.start_seconds = time.monotonic() - began
        self.port = int(found[1])
        model = self.get("/models")["models"][0]
        if not {"image/*", "text/plain"} & set(model["files"]):
            sys.exit(
                f"a model that takes a {model['kind']} is not measured here; give one that takes pictures or texts"
            )
        self.engine, self.kind = model["engine"], model["kind"]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith("{") else text

    def worker(self) -> int:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def memory(self) -> dict[str, float]:
        """Megabytes of the service and of its model process."""
        return {"service": resident(self.process.pid), "worker": resident(self.worker())}

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def resident(pid: int) -> float:
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return round(int(re.search(r"Pss:\s+(\d+)", text)[1]) / 1024, 1)
    return 0.0


@contextlib.contextmanager
def serving(folder: str, *words: str):
    service = Service(folder, *words)
    try:
        yield service
    finally:
        code = service.stop()
        if code:
            print(f"the service ended with {code}", file=sys.stderr)


# -- clients -----------------------------------------------------------------------------------------------------------


def request(content: bytes, kind: str, path: str = "/predict/m", more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n{more}\r\n"
    return head.encode("latin-1") + content


class Client:
    """One connection, opened again when it ends."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: Any = None
        self.writer: Any = None

    async def ask(self, content: bytes) -> int:
        """The status of the answer; 0 if there was none. As clients do, once more where a kept connection had been closed."""
        fresh = self.writer is None
        try:
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.writer.write(content)
            head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
            await self.reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
            if b"connection: close" in head:
                self.close()
            return int(head[9:12])
        except (OSError, asyncio.IncompleteReadError, TypeError):
            self.close()
            return 0 if fresh else await self.ask(content)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer = None


async def closed_loop(port: int, content: bytes, connections: int, seconds: float) -> dict[str, Any]:
    """Each connection asks again as soon as it has its answer."""
    seen: list[tuple[float, int]] = []
    until = time.monotonic() + seconds

    async def one() -> None:
        client = Client(port)
        while time.monotonic() < until:
            began = time.monotonic()
            status = await client.ask(content)
            seen.append((time.monotonic() - began, status))
        client.close()

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(connections)))
    return summary(seen, time.monotonic() - began)


async def open_loop(port: int, content: bytes, rate: float, seconds: float, random_times: bool) -> dict[str, Any]:
    """Requests at a rate, whether or not answers come; latencies count from the moment a request was due."""
    seen: list[tuple[float, int]] = []
    idle: list[Client] = []
    tasks: set[asyncio.Task] = set()

    async def one(due: float) -> None:
        client = idle.pop() if idle else Client(port)
        status = await client.ask(content)
        seen.append((time.monotonic() - due, status))
        idle.append(client)

    draw, due = random.Random(0), time.monotonic()
    began, until = due, due + seconds
    while due < until:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += draw.expovariate(rate) if random_times else 1 / rate
    await asyncio.gather(*tasks)
    for client in idle:
        client.close()
    return summary(seen, time.monotonic() - began)


def summary(seen: list[tuple[float, int]], seconds: float) -> dict[str, Any]:
    times = sorted(t for t, status in seen if status == 200)
    codes = collections.Counter(str(status) for _, status in seen)
    found: dict[str, Any] = {"requests": len(seen), "statuses": dict(codes), "answered_per_s": len(times) / seconds}
    if times:
        p50, p99 = (times[min(len(times) - 1, int(len(times) * q))] for q in (0.5, 0.99))
        found |= {"p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99, "p99_to_p50": p99 / p50, "max_ms": 1e3 * times[-1]}
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}


# -- steps -------------------------------------------------------------------------------------------------------------


def sample(folder: str) -> tuple[bytes, str]:
    """What is sent: a JPEG of 224 x 224, or a text; and its content type."""
    with serving(folder) as service:
        if service.kind == "text":
            return service.get("/models")["models"][0]["example"].encode(), "text/plain"
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((224, 224), 60).convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), "image/jpeg"


def bare(folder: str, content: bytes, seconds: float) -> float:
    """Predictions a second of the engine without a service, one at a time, decoding included."""
    path = FOLDER / ".sample"
    path.write_bytes(content)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    words = [sys.executable, "-c", BARE, folder, str(path), str(seconds)]
    out = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    path.unlink()
    return json.loads(out)


def paced(folder: str, content: bytes, seconds: float, rate: float) -> dict[str, Any]:
    """The bare engine at a rate, latencies from the moment a prediction was due: what this machine itself does to the tail."""
    path = FOLDER / ".sample"
    path.write_bytes(content)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    words = [sys.executable, "-c", PACED, folder, str(path), str(seconds), str(rate)]
    out = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    path.unlink()
    return summary(json.loads(out), seconds)


def start(folder: str, rounds: int) -> dict[str, Any]:
    """From the command to the first moment at which every model answers."""
    seconds = []
    for _ in range(rounds):
        with serving(folder) as service:
            seconds.append(round(service.start_seconds, 2))
    return {"seconds": seconds, "median_s": statistics.median(seconds), "engine": service.engine}


def capacity(folder: str, content: bytes, kind: str, seconds: float, rounds: int) -> dict[str, Any]:
    """The service's throughput at batch 1 and with batches, and the bare engine's, in turn."""
    alone, single, batched = [], [], []
    asked = request(content, kind)
    for _ in range(rounds):
        alone.append(bare(folder, content, seconds))
        with serving(folder, "--max-batch", "1") as service:
            single.append(asyncio.run(closed_loop(service.port, asked, 8, seconds)))
        with serving(folder) as service:
            batched.append(asyncio.run(closed_loop(service.port, asked, 24, seconds)))
    middle = statistics.median(alone)
    found = {"bare_per_s": [round(x, 1) for x in alone], "batch_1": single, "batched": batched}
    for name, rows in (("batch_1", single), ("batched", batched)):
        rate = statistics.median(row["answered_per_s"] for row in rows)
        found |= {f"{name}_per_s": round(rate, 1), f"{name}_to_bare": round(rate / middle, 3)}
    return found


def steady(folder: str, content: bytes, kind: str, rate: float, seconds: float) -> dict[str, Any]:
    """At a part of capacity: evenly spaced, and a tenth of the time with random (Poisson) arrivals; and the bare engine, for a third of it."""
    asked = request(content, kind)
    alone = paced(folder, content, seconds / 3, rate)
    with serving(folder) as service:
        asyncio.run(open_loop(service.port, asked, rate, 3, False))
        even = asyncio.run(open_loop(service.port, asked, rate, seconds, False))
        loose = asyncio.run(open_loop(service.port, asked, rate, max(10.0, seconds / 10), True))
    return {"rate_per_s": round(rate, 1), "even": even, "poisson": loose, "bare_even": alone}


def overload(folder: str, content: bytes, kind: str, rate: float, seconds: float) -> dict[str, Any]:
    """More than it can: what is shed, and what is answered still."""
    with serving(folder) as service:
        found = asyncio.run(open_loop(service.port, request(content, kind), rate, seconds, False))
        after = asyncio.run(closed_loop(service.port, request(content, kind), 4, 3))
    return {"rate_per_s": round(rate, 1), **found, "after": after["statuses"]}


def kill(folder: str, content: bytes, kind: str, rate: float, times: int) -> dict[str, Any]:
    """`kill -9` of the model process under load: how many requests are lost, and when the next is answered."""
    asked, rows = request(content, kind), []

    async def one(service: Service) -> dict[str, Any]:
        load = asyncio.create_task(open_loop(service.port, asked, rate, 12, False))
        await asyncio.sleep(2)
        os.kill(service.worker(), signal.SIGKILL)
        killed, client = time.monotonic(), Client(service.port)
        await asyncio.sleep(0.05)
        while await client.ask(asked) != 200:
            await asyncio.sleep(0.02)
        back = time.monotonic() - killed
        client.close()
        return {"back_after_s": round(back, 2), **await load}

    with serving(folder) as service:
        for _ in range(times):
            rows.append(asyncio.run(one(service)))
            time.sleep(1)
    return {"rate_per_s": round(rate, 1), "kills": rows, "longest_s": max(r["back_after_s"] for r in rows)}


def memory(folder: str, content: bytes, kind: str, requests: int) -> dict[str, Any]:
    """Resident megabytes over many requests, a tenth of them malformed."""
    good, bad = request(content, kind), request(content[: len(content) // 2], "image/png")
    rows: list[dict[str, Any]] = []

    async def some(port: int, count: int) -> None:
        left = [good if i % 10 else bad for i in range(count)]

        async def one() -> None:
            client = Client(port)
            while left:
                await client.ask(left.pop())
            client.close()

        await asyncio.gather(*(one() for _ in range(16)))

    with serving(folder) as service:
        for i in range(11):
            asyncio.run(some(service.port, requests // 10 if i else 500))
            rows.append({"requests": i * (requests // 10), **service.memory()})
            print(f"  {rows[-1]}", flush=True)
    growth = {name: round(rows[-1][name] / rows[1][name] - 1, 4) for name in ("service", "worker")}
    return {"rows": rows, "growth_after_the_first_tenth": growth}


def malformed(folder: str, content: bytes, kind: str, count: int) -> dict[str, Any]:
    """Requests that are broken in many ways, and what schemathesis makes of the service's own document."""
    with serving(folder, "--max-body-mb", "4") as service:
        draw, codes = random.Random(0), collections.Counter()

        async def hand_made() -> None:
            for i in range(count):
                client = Client(service.port)
                codes[await asyncio.wait_for(client.ask(broken(i, content, kind, draw)), 60)] += 1
                client.close()

        asyncio.run(hand_made())
        made = tried(service, max(1, count // 100))
        alive = asyncio.run(closed_loop(service.port, request(content, kind), 1, 1))["statuses"]
    worst = max([*codes, *made])
    return {"hand_made": named(codes), "schemathesis": named(made), "worst": worst, "after": alive}


def named(codes: dict[int, int]) -> dict[str, int]:
    return {str(code): n for code, n in sorted(codes.items())}


def broken(i: int, content: bytes, kind: str, draw: random.Random) -> bytes:
    """The i-th request: each way in turn, at places that differ."""
    infer, octets = "/v2/models/m/infer", "application/octet-stream"
    damaged = bytearray(content)
    for _ in range(8):
        damaged[draw.randrange(min(200, len(damaged)))] = draw.randrange(256)
    ways = [
        lambda: request(content[: draw.randrange(len(content))], "image/jpeg"),
        lambda: request(bytes(damaged), "image/png"),
        lambda: request(draw.randbytes(draw.randrange(3000)), draw.choice([kind, "application/json", "text/csv", "x"])),
        lambda: request(json.dumps({"input": draw.choice([None, 1, [], {}, "/etc/passwd", {"base64": "!"}, 1e308])}).encode(), "application/json"),
        lambda: request(b'{"input": NaN}', "application/json"),
        lambda: request(b"[" * draw.randrange(1, 90_000), "application/json"),
        lambda: request(content, "multipart/form-data; boundary=x"),
        lambda: request(b"--x\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\n" + content[:99], "multipart/form-data; boundary=x"),
        lambda: request(content, kind, infer),
        lambda: request(json.dumps({"inputs": [{"name": "image", "datatype": "FP32", "shape": [draw.randrange(-1, 3)] * draw.randrange(5), "data": [draw.choice([0, 1e39, True, "x"])]}]}).encode(), "application/json", infer),
        lambda: request(b'{"inputs": []}' + draw.randbytes(20), octets, infer, f"Inference-Header-Content-Length: {draw.randrange(40)}\r\n"),
        lambda: request(content, kind, "/predict/" + "".join(draw.choices("abc./%20", k=20)).replace("%", "%25")),
        lambda: request(content, kind, more="X-Long: " + "x" * draw.randrange(20_000, 60_000) + "\r\n"),
        lambda: request(bytes(5_000_000), kind),
        lambda: request(content, kind, "/predict/m?" + draw.choice(["draw=2", "x=1", "draw=%ff", "&&&="])),
        lambda: request(content, kind, more="Content-Encoding: gzip\r\n"),
    ]  # fmt: skip
    return ways[i % len(ways)]()


def tried(service: Service, examples: int) -> collections.Counter:
    """The statuses of what schemathesis sends."""
    try:
        import schemathesis
        from hypothesis import HealthCheck, given, settings
    except ImportError:
        return collections.Counter()
    codes: collections.Counter = collections.Counter()
    schema = schemathesis.openapi.from_dict(service.get("/openapi.json"))
    quiet = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for found in schema.get_all_operations():

        @given(case=found.ok().as_strategy())
        @quiet
        def ask(case: Any) -> None:
            codes[case.call(base_url=f"http://127.0.0.1:{service.port}", timeout=60).status_code] += 1

        ask()
    return codes


# -- all ---------------------------------------------------------------------------------------------------------------


def described(folder: str) -> dict[str, Any]:
    from importlib.metadata import version

    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return {
        "processor": cpu or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "starlette", "uvicorn", "h11")},
        "command": " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]]).replace(folder, Path(folder).name),
        "folder": Path(folder).name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--seconds", type=float, default=300, help="of the steady load; other loads take a tenth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--machine", default="cpu")
    parser.add_argument("--only", nargs="*", choices=STEPS, default=list(STEPS))
    given = parser.parse_args()
    path = FOLDER / f"{given.machine}.json"
    path.parent.mkdir(exist_ok=True)
    result = json.loads(path.read_text()) if path.exists() and set(given.only) != set(STEPS) else {}
    result |= described(given.folder)
    content, kind = sample(given.folder)
    part = max(5.0, given.seconds / 30)
    rate = lambda: result["capacity"]["batched_per_s"]  # noqa: E731
    steps = {
        "start": lambda: start(given.folder, given.rounds),
        "capacity": lambda: capacity(given.folder, content, kind, part, given.rounds),
        "steady": lambda: steady(given.folder, content, kind, 0.8 * rate(), given.seconds),
        "overload": lambda: overload(given.folder, content, kind, 3 * rate(), max(5.0, given.seconds / 10)),
        "kill": lambda: kill(given.folder, content, kind, 0.5 * rate(), given.rounds),
        "memory": lambda: memory(given.folder, content, kind, given.requests),
        "malformed": lambda: malformed(given.folder, content, kind, given.malformed),
    }
    for name in given.only:
        print(f"{name} …", flush=True)
        result[name] = steps[name]()
        print(f"  {json.dumps(result[name])[:600]}", flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
