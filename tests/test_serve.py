"""The prediction service, as a process of its own on a loopback port: what it answers, refuses, survives and counts."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paperzoo.catalog.cards import find
from paperzoo.data.images import open_images
from paperzoo.engine.configure import configure
from paperzoo.engine.loop import Settings
from paperzoo.engine.run import build, load, save_results, write_config
from paperzoo.errors import PaperZooError
from paperzoo.serve import access

httpx = pytest.importorskip("httpx")
pytest.importorskip("python_multipart")
pytest.importorskip("prometheus_client")
fleet = pytest.importorskip("paperzoo.serve.fleet")
to_json = pytest.importorskip("paperzoo.serve.answers").to_json

COMMAND = [sys.executable, "-m", "paperzoo", "serve"]
TOKEN = "a-token-that-only-the-tests-know"
SLOW = '''
"""Does what the numbers say: sleeps so many seconds; -1 fails, -2 breaks for ever, -3 ends the process."""
import os, time
from dataclasses import dataclass
import torch
from torch import nn
from paperzoo.engine.recipe import Recipe
from paperzoo.errors import PaperZooError

@dataclass(frozen=True)
class Config:
    steps: int = 1

PRESETS = {"embedded": Config()}

@dataclass(frozen=True)
class Slept:
    seconds: float
    together: int

class RECIPE(Recipe):
    broken = False

    def __init__(self, config, runtime, facts=None):
        super().__init__(config, runtime, facts)
        self.model = nn.Linear(1, 1)

    def example(self):
        return (torch.zeros(2, 1),)

    def predict(self, inputs):
        for value in inputs:
            seconds = float(value.reshape(-1)[0])
            if seconds == -1:
                raise IndexError("this input is odd")
            if seconds == -2:
                self.broken = True
            if seconds == -3:
                os._exit(3)
            if seconds == -4:
                raise PaperZooError("this input is refused by the recipe")
            if self.broken:
                raise RuntimeError("broken")
        time.sleep(max(float(v.reshape(-1)[0]) for v in inputs))
        return [Slept(float(v.reshape(-1)[0]), len(inputs)) for v in inputs]
'''
CARD = """
name = "Slow"
title = "Slow"
authors = ["Nobody"]
year = 2020
url = "https://example.org"
kind = "model"
task = "x"
tasks = ["image_classification"]
summary = "Sleeps."
summary_zh = "睡。"
mechanism = "Sleeps."
"""


@pytest.fixture(scope="module")
def own_papers(tmp_path_factory):
    """A paper of the user's own, whose recipe sleeps and fails as it is told; and the folder of a run of it."""
    root = tmp_path_factory.mktemp("slow")
    folder = root / "papers" / "classification" / "slow"
    folder.mkdir(parents=True)
    (folder / "recipe.py").write_text(SLOW, encoding="utf-8")
    (folder / "card.toml").write_text(CARD, encoding="utf-8")
    (folder / "notes.md").write_text("# Slow\n", encoding="utf-8")
    run = root / "run"
    run.mkdir()
    write = f"""
import torch
from paperzoo.engine.loop import Settings
from paperzoo.engine.run import build, save_results, write_config
from paperzoo.catalog.cards import find
from pathlib import Path
paper, settings = find("slow"), Settings(device="cpu")
config = paper.module("recipe").PRESETS["embedded"]
recipe = build(paper, config, settings)
write_config(Path({str(run)!r}), paper, "embedded", config, settings, recipe.runtime)
save_results(recipe, Path({str(run)!r}), {{}})
"""
    environment = os.environ | {"PAPERZOO_PAPERS": str(root / "papers")}
    subprocess.run([sys.executable, "-c", write], env=environment, check=True)
    return root


def untrained(name: str, folder: Path, **changes) -> None:
    """The folder of a run that never learned: its answers are poor, and exact."""
    folder.mkdir()
    paper, settings = find(name), Settings(device="cpu")
    config = configure(paper.module("recipe").PRESETS["embedded"], changes)
    recipe = build(paper, config, settings)
    write_config(folder, paper, "embedded", config, settings, recipe.runtime)
    save_results(recipe, folder, {})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A classifier, a text classifier and a detector."""
    root = tmp_path_factory.mktemp("runs")
    untrained("wide_resnet", root / "digits", model="wide_resnet10_2")
    rows = [f"{'take' if i % 2 else 'give'} {i} of the {w},{i % 2}" for i in range(40) for w in ("list", "set")]
    (root / "texts.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    small = {"data": str(root / "texts.csv"), "vocab_size": 200, "embed_dim": 32, "hidden_dim": 32, "depth": 1}
    untrained("fnet", root / "texts", **small)
    untrained("yolox", root / "objects", scenes=4, show_above=0.0)
    return root


class Service:
    """A process, what it printed, and a client."""

    def __init__(self, folder: Path, *words: str, papers: Path | None = None, **environment: str) -> None:
        self.log = (folder / f"log{len(list(folder.iterdir()))}").open("w+", encoding="utf-8")
        environment |= {"PAPERZOO_PAPERS": str(papers)} if papers else {}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        command = [*COMMAND, *words, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        self.line = self.process.stdout.readline()
        found = re.search(r"https?://[^ ]+/", self.line)
        assert found, f"{self.line} {self.errors()}"
        self.address = found[0]
        self.port = int(self.address.rsplit(":", 1)[1].strip("/"))
        self.client = httpx.Client(base_url=self.address, timeout=30, verify=False, trust_env=False)

    def errors(self) -> str:
        return Path(self.log.name).read_text(encoding="utf-8")

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.errors().splitlines() if line.startswith("{")]

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def metric(self, name: str) -> float:
        rows = [line for line in self.client.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows)

    def wait_until_up(self) -> None:
        until = time.monotonic() + 60
        while self.client.get("/ready").status_code != 200:
            assert time.monotonic() < until, self.errors()
            time.sleep(0.05)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=30)
        self.client.close()
        self.process.stdout.close()
        self.log.close()
        return code


@pytest.fixture
def start(tmp_path):
    """Services that are stopped at the end of the test."""
    started: list[Service] = []

    def make(*words: str, **environment) -> Service:
        started.append(Service(tmp_path, *words, **environment))
        return started[-1]

    yield make
    for service in started:
        service.stop()


LIMITS = ["--max-body-mb", "1", "--max-pixels", "1000000", "--max-text", "500"]


@pytest.fixture(scope="module")
def service(runs, tmp_path_factory):
    found = Service(
        tmp_path_factory.mktemp("logs"),
        *(f"digits={runs / 'digits'}", f"texts={runs / 'texts'}", f"objects={runs / 'objects'}", *LIMITS),
    )
    yield found
    assert found.stop() == 0


@pytest.fixture(scope="module")
def slow(own_papers, tmp_path_factory):
    """The sleeping model with the shortest queue there is."""
    words = [f"slow={own_papers / 'run'}", "--max-batch", "1", "--max-queue", "1", "--timeout", "2"]
    found = Service(tmp_path_factory.mktemp("logs"), *words, papers=own_papers / "papers")
    yield found
    assert found.stop() == 0


@pytest.fixture(scope="module")
def wide(own_papers, tmp_path_factory):
    """The sleeping model in batches; its last test ends it."""
    words = [f"slow={own_papers / 'run'}", "--max-batch", "4", "--max-wait-ms", "20"]
    found = Service(tmp_path_factory.mktemp("logs"), *words, papers=own_papers / "papers")
    yield found
    assert found.stop() == 0


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def digit(i: int) -> Image.Image:
    return Image.fromarray(open_images("digits", "test")[i][0].permute(1, 2, 0).numpy())


def in_json(content: bytes) -> dict:
    return {"base64": base64.b64encode(content).decode()}


def close_to(found, wanted) -> None:
    """Equal, but for the last bits of numbers: networks round differently in batches of other sizes."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            close_to(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            close_to(a, b)
    else:
        assert found == (pytest.approx(wanted, rel=1e-3, abs=1e-4) if isinstance(wanted, float) else wanted)


def predict(service: Service, name: str, **arguments) -> httpx.Response:
    return service.client.post(f"/predict/{name}", **arguments)


# -- answers -----------------------------------------------------------------------------------------------------------


def test_it_answers_as_the_recipe_does(service, runs):
    pictures, recipe = [digit(i) for i in range(3)], load(runs / "digits", device="cpu")
    wanted = to_json(recipe.predict(pictures))
    one = predict(service, "digits", json={"input": in_json(encoded(pictures[0]))})
    assert one.status_code == 200 and one.json()["model"] == "digits"
    close_to(one.json()["result"], wanted[0])
    several = predict(service, "digits", json={"inputs": [in_json(encoded(p)) for p in pictures]})
    close_to(several.json()["results"], wanted)
    files = [("file", ("a.png", encoded(p), "image/png")) for p in pictures]
    close_to(predict(service, "digits", files=files).json()["results"], wanted)
    close_to(predict(service, "digits", files=files[:1]).json()["result"], wanted[0])
    raw = predict(service, "digits", content=encoded(pictures[0]), headers={"content-type": "image/png"})
    close_to(raw.json()["result"], wanted[0])


def test_texts_and_objects(service, runs):
    texts = ["Return the number of items.", "Öffnet die Datei."]
    wanted = to_json(load(runs / "texts", device="cpu").predict(texts))
    close_to(predict(service, "texts", json={"inputs": texts}).json()["results"], wanted)
    plain = predict(service, "texts", content=texts[1].encode(), headers={"content-type": "text/plain; charset=utf-8"})
    close_to(plain.json()["result"], wanted[1])
    close_to(predict(service, "texts", data={"text": texts[0]}, files={}).status_code, 415)  # not multipart
    form = predict(service, "texts", files={"text": (None, texts[0])})
    close_to(form.json()["result"], wanted[0])
    scene = Image.effect_noise((64, 48), 80).convert("RGB")
    wanted = to_json(load(runs / "objects", device="cpu").predict([scene])[0])
    close_to(predict(service, "objects", json={"input": in_json(encoded(scene))}).json()["result"], wanted)


def test_the_result_is_drawn_on_the_input(service):
    found = predict(service, "digits", json={"input": in_json(encoded(digit(0)))}, params={"draw": "true"}).json()
    picture = Image.open(io.BytesIO(base64.b64decode(found["picture"].removeprefix("data:image/png;base64,"))))
    assert picture.format == "PNG" and min(picture.size) >= 32


def test_requests_share_batches(slow):
    """The sleeping model has batches of one; the one below has batches of four."""
    assert predict(slow, "slow", json={"inputs": [[0], [0], [0]]}).json()["results"][0]["together"] == 1


def test_batches_form_and_keep_their_answers_apart(wide):
    with ThreadPoolExecutor(12) as pool:
        seconds = [round(0.01 + 0.001 * i, 3) for i in range(24)]
        found = list(pool.map(lambda s: predict(wide, "slow", json={"input": [s]}).json()["result"], seconds))
    assert [round(f["seconds"], 3) for f in found] == seconds
    assert 2 <= max(f["together"] for f in found) <= 4
    assert wide.metric('paperzoo_batch_inputs_sum{model="slow"}') == 24
    assert wide.metric('paperzoo_batch_inputs_count{model="slow"}') < 24
    odd = predict(wide, "slow", json={"inputs": [[0], [-4]]})
    assert odd.status_code == 422 and odd.json()["error"] == "this input is refused by the recipe"
    with ThreadPoolExecutor(5) as pool:  # a bad request does not spoil those that share its batch
        codes = list(pool.map(lambda s: predict(wide, "slow", json={"input": [s]}).status_code, [0.2, 0, -1, 0, -4]))
    assert codes == [200, 200, 422, 200, 422]


def test_models_page_and_document(service):
    models = {m["name"]: m for m in service.client.get("/models").json()["models"]}
    assert [models[n]["kind"] for n in ("digits", "texts", "objects")] == ["picture", "text", "picture"]
    for name, model in models.items():
        assert predict(service, name, json={"input": model["example"]}).status_code == 200
    page = service.client.get("/")
    policy = page.headers["content-security-policy"]
    assert "Try a model" in page.text and "unsafe-inline" not in policy and "default-src 'none'" in policy
    document = service.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1") and "/predict/objects" in document["paths"]
    example = document["paths"]["/predict/texts"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    assert predict(service, "texts", json=example["several"]["value"]).status_code == 200
    assert service.client.get("/health").status_code == service.client.get("/ready").status_code == 200


def test_requests_have_names_and_are_recorded(service):
    given = service.client.get("/models", headers={"x-request-id": "my-request.1"})
    assert given.headers["x-request-id"] == "my-request.1"
    made = service.client.get("/models", headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", made)
    record = next(r for r in service.records() if r.get("request_id") == "my-request.1")
    assert record["path"] == "/models" and record["status"] == 200 and record["seconds"] >= 0
    bad = predict(service, "digits", content=b"{", headers={"x-request-id": "bad-1"})
    assert bad.status_code == 400 and bad.json()["request_id"] == "bad-1"
    assert next(r for r in service.records() if r.get("request_id") == "bad-1")["error"] == bad.json()["error"]


def test_counts(service):
    before = service.metric('paperzoo_requests_total{endpoint="predict",model="texts",status="200"}')
    inputs = service.metric('paperzoo_inputs_total{model="texts"}')
    for _ in range(3):
        predict(service, "texts", json={"inputs": ["a", "b"]})
    assert service.metric('paperzoo_requests_total{endpoint="predict",model="texts",status="200"}') == before + 3
    assert service.metric('paperzoo_inputs_total{model="texts"}') == inputs + 6
    assert service.metric('paperzoo_workers{model="texts"}') == 1
    assert service.metric('paperzoo_memory_bytes{model="texts"}') > 50e6
    assert service.metric("paperzoo_held_bytes") == 0


# -- the Open Inference Protocol ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triton(service):
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(f"127.0.0.1:{service.port}")
    yield http, client
    client.close()


def test_v2_metadata(triton):
    http, client = triton
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("digits")
    assert client.get_server_metadata()["name"] == "paperzoo"
    metadata = client.get_model_metadata("digits")
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    assert {o["name"]: o["datatype"] for o in metadata["outputs"]}["probabilities"] == "FP32"
    with pytest.raises(http.InferenceServerException, match="no model named"):
        client.get_model_metadata("digitz")


@pytest.mark.parametrize("binary", [True, False])
def test_v2_inference(triton, runs, binary):
    http, client = triton
    images = np.stack([np.asarray(digit(i)) for i in range(3)])
    wanted = load(runs / "digits", device="cpu").predict(list(images))
    tensor = http.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    asked = [http.InferRequestedOutput(name, binary_data=binary) for name in ("probabilities", "label", "index")]
    found = client.infer("digits", [tensor], outputs=asked, request_id="mine")
    assert found.get_response()["id"] == "mine"
    rows = found.as_numpy("probabilities")
    np.testing.assert_allclose(rows, [list(w.probabilities.values()) for w in wanted], rtol=1e-3, atol=1e-4)
    assert found.as_numpy("index").tolist() == [w.index for w in wanted]
    assert [v if isinstance(v, str) else v.decode() for v in found.as_numpy("label")] == [w.label for w in wanted]


def test_v2_bytes_and_all_outputs(triton, runs):
    http, client = triton
    tensor = http.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([encoded(digit(0))], dtype=object))
    found = client.infer("digits", [tensor])
    assert {o["name"] for o in found.get_response()["outputs"]} == {"label", "index", "probability", "probabilities"}
    text = http.InferInput("text", [2], "BYTES")
    text.set_data_from_numpy(np.array([b"one", "zwölf".encode()], dtype=object))
    wanted = load(runs / "texts", device="cpu").predict(["one", "zwölf"])
    found = client.infer("texts", [text])
    np.testing.assert_allclose(found.as_numpy("probability"), [w.probability for w in wanted], rtol=1e-3)
    scene = np.asarray(Image.effect_noise((64, 48), 80).convert("RGB"))[None]
    tensor = http.InferInput("image", list(scene.shape), "UINT8")
    tensor.set_data_from_numpy(scene)
    boxes = json.loads(client.infer("objects", [tensor]).as_numpy("boxes")[0])
    close_to(boxes, to_json(load(runs / "objects", device="cpu").predict([scene[0]])[0].boxes))


def v2(service: Service, body: bytes | dict, name: str = "digits", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return service.client.post(f"/v2/models/{name}/infer", content=content, headers=headers)


PIXEL = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, 0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datatype": "FLOAT"}, "datatype is one of"),
        ({"datatype": "INT128"}, "datatype is one of"),
        ({"datatype": "FP32", "shape": [1, 1, 1, 3], "data": [0.5, 2.5, 0.5]}, "values in [0, 1]"),
        ({"datatype": "FP32", "data": [1e39, 0, 0]}, "not finite"),
        ({"datatype": "BOOL", "data": [True, False, True]}, ""),
        ({"data": [0, 0, 256]}, "out of the range"),
        ({"data": [0, 0, 0.5]}, "no UINT8"),
        ({"data": [0, 0, True]}, "no UINT8"),
        ({"data": [0, 0]}, "the shape has 3 values"),
        ({"data": [[0], 0, 0]}, "nested"),
        ({"data": "000"}, "data is a list"),
        ({"shape": [1, 1, 3]}, ""),
        ({"shape": [-1, 1, 1, 3]}, "whole number"),
        ({"shape": [1, 1, 1, 10**9]}, "whole number"),
        ({"shape": [65, 1, 1, 3], "data": [0] * 195}, "at most 64"),
        ({"shape": []}, "shape is a list"),
        ({"name": "picture"}, "no input 'picture'"),
        ({"parameters": {"binary_data_size": 3}}, "give its data, or"),
        ({"parameters": {"shared_memory_region": "x"}}, "not served here"),
        ({"parameters": 3}, "parameters is an object"),
    ],
)
def test_v2_refusals(service, change, message):
    found = v2(service, {"inputs": [PIXEL | change]})
    assert (400 <= found.status_code < 500) or (not message and found.status_code == 200), found.text
    assert message in found.text


def test_v2_binary_refusals(service):
    head = {"name": "image", "datatype": "FP32", "shape": [1, 1, 1, 3], "parameters": {"binary_data_size": 12}}
    text = json.dumps({"inputs": [head]}).encode()

    def send(values: bytes, length: str | None = None) -> httpx.Response:
        return v2(service, text + values, **{"Inference-Header-Content-Length": length or str(len(text))})

    assert send(struct.pack("<3f", 0, 0.5, 1)).status_code == 200
    assert "not finite" in send(struct.pack("<3f", 0, 0, float("nan"))).text
    assert "binary_data_size" in send(b"1234").text
    assert "bytes follow" in send(bytes(16)).text
    for length in ("-1", "x", str(10**9), b"\xb2"):
        assert send(bytes(12), length).status_code == 400
    head = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 8}}
    text = json.dumps({"inputs": [head]}).encode()
    assert "ends" in send(struct.pack("<I", 10**9) + b"abcd").text or "end within" in send(b"\xff" * 8).text
    assert v2(service, {"inputs": [PIXEL, PIXEL]}).status_code == 400
    assert v2(service, {"inputs": [PIXEL], "outputs": [{"name": "x"}]}).status_code == 400
    assert v2(service, {"inputs": []}).status_code == 400
    versioned = service.client.post("/v2/models/digits/versions/1/infer", json={"inputs": [PIXEL]})
    assert versioned.status_code == 200 and versioned.json()["outputs"][0]["name"] == "label"
    assert service.client.get("/v2/models/digits/versions/2").status_code == 404


# -- refusals ----------------------------------------------------------------------------------------------------------


def huge_png(width: int, height: int) -> bytes:
    """A valid header that promises many pixels, and next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


JPEG = encoded(Image.effect_noise((300, 200), 50).convert("RGB"), "JPEG")
PICTURES = {
    "empty": (b"", 422, "empty"),
    "text": (b"GIF89 no", 422, "none of"),
    "cut JPEG": (JPEG[: len(JPEG) // 2], 422, "not a readable picture"),
    "cut PNG": (encoded(Image.effect_noise((99, 99), 50))[:200], 422, "not a readable picture"),
    "bomb": (huge_png(60_000, 60_000), 413, "too large"),
    "negative size": (huge_png(2**31 - 1, 2**31 - 1), 413, "too large"),
    "no data": (huge_png(900, 900), 422, "not a readable picture"),
    "no pixels": (huge_png(0, 0), 422, ""),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', 422, "none of"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422, "none of"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_none(service, name):
    content, status, message = PICTURES[name]
    found = predict(service, "digits", json={"input": in_json(content)})
    assert found.status_code == status and message in found.json()["error"], found.text
    assert "\n" not in found.json()["error"]


def test_all_pixels_of_a_request_count(service):
    part = in_json(encoded(Image.new("RGB", (700, 700))))
    assert predict(service, "digits", json={"inputs": [part] * 2}).status_code == 200
    assert predict(service, "digits", json={"inputs": [part] * 3}).status_code == 413


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("digits", {"input": "/etc/passwd"}, 422),  # a string is never a path
        ("digits", {"input": {"base64": "/etc/passwd"}}, 422),
        ("digits", {"input": {"base64": "http://127.0.0.1/x.png"}}, 422),
        ("digits", {"input": {"path": "/etc/passwd"}}, 422),
        ("digits", {"input": {"base64": "", "url": "file:///etc/passwd"}}, 422),
        ("digits", {"input": None}, 422),
        ("digits", {"input": [1, 2]}, 422),
        ("digits", {"inputs": []}, 422),
        ("digits", {"inputs": {}}, 422),
        ("digits", {"inputs": [in_json(JPEG)] * 65}, 413),
        ("digits", {"input": in_json(JPEG), "inputs": []}, 422),
        ("digits", {}, 422),
        ("digits", [], 422),
        ("digits", "x", 422),
        ("texts", {"input": 3}, 422),
        ("texts", {"input": ["a", "b"]}, 422),
        ("texts", {"input": "x" * 501}, 413),
        ("texts", {"input": "\ud800"}, 422),
        ("texts", {"input": "a\x00b"}, 422),
    ],
)
def test_inputs_of_the_wrong_kind(service, name, body, status):
    found = predict(service, name, content=json.dumps(body).encode())
    assert found.status_code == status, found.text
    assert found.json()["error"] and found.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"input": NaN}', "application/json", 400),
        (b'{"input": Infinity}', "application/json", 400),
        (b'{"input": 1e999}', "application/json", 422),
        (b"[" * 100_000, "application/json", 400),
        (b'{"input": ' + b"9" * 6000 + b"}", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"", "application/json", 400),
        (b"{}", "application/xml", 415),
        (b"{}", "image", 415),
        (b"input=1", "application/x-www-form-urlencoded", 415),
        (b"--x\r\n\r\n", "multipart/form-data", 400),
        (b"--x\r\n\r\n", "multipart/form-data; boundary=x", 400),
        (b"no form", "multipart/form-data; boundary=x", 400),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n", "multipart/form-data; boundary=x", 400),
        (b'--x\r\nContent-Disposition: form-data; name="file"', "multipart/form-data; boundary=x", 400),
    ],
)
def test_bodies_that_cannot_be_read(service, content, kind, status):
    found = predict(service, "digits", content=content, headers={"content-type": kind})
    assert found.status_code == status, found.text


def test_sizes_paths_and_methods(service):
    client = service.client
    assert predict(service, "digits", content=bytes(2_000_000)).status_code == 413
    assert predict(service, "digits", content=iter([bytes(600_000)] * 3)).status_code == 413  # its length is not told
    assert predict(service, "digits", content=b"{}", headers={"content-encoding": "gzip"}).status_code == 415
    assert client.get("/models", headers={"x-large": "x" * 100_000}).status_code == 431
    for path in ("/predict/nothing", "/predict/..%2f..%2fetc", "/x", "/%00", "/predict/", "/static/../x", "/v3"):
        assert client.post(path).status_code == 404, path
    assert client.get("/predict/digits").status_code == client.post("/models").status_code == 405
    assert predict(service, "digits", params={"drow": "1"}).status_code == 422
    assert predict(service, "digits", params={"draw": "perhaps"}, json={"input": in_json(JPEG)}).status_code == 422
    assert client.post("/admin/reload/digits").status_code == 403  # no tokens, no administration
    for request in (b"\x16\x03\x01 no http\r\n\r\n", b"GET / HTTP/1.1\r\nA B: c\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", service.port), timeout=5) as connection:
            connection.sendall(request)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert client.get("/ready").status_code == 200


def test_pages_of_other_origins_may_not_ask(service):
    own = {"origin": service.address.rstrip("/")}
    other = {"origin": "https://evil.example"}
    assert service.client.get("/models", headers=own).status_code == 200
    for headers in (other, {"origin": "null"}):
        found = predict(service, "texts", json={"input": "a"}, headers=headers)
        assert found.status_code == 403 and "access-control-allow-origin" not in found.headers
    asked = {"access-control-request-method": "POST", **other}
    found = service.client.options("/predict/texts", headers=asked)
    assert found.status_code == 403 and "access-control-allow-origin" not in found.headers


def test_a_machine_tries_the_document(service):
    """Schemathesis writes requests from the service's own document, good and bad: none may make it fail."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error

    schema = schemathesis.openapi.from_dict(service.client.get("/openapi.json").json())
    seen: list[int] = []
    for result in schema.get_all_operations():
        operation = result.ok()
        strategy = operation.as_strategy()

        @given(case=strategy)
        @settings(
            max_examples=6,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case):
            response = case.call(base_url=service.address.rstrip("/"), timeout=30)
            case.validate_response(response, checks=[not_a_server_error])
            seen.append(response.status_code)

        ask()
    assert len(seen) > 40 and max(seen) < 500
    assert service.client.get("/ready").status_code == 200


# -- tokens, TLS, origins ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost".split()
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    if subprocess.run(["openssl", *words, *files], capture_output=True).returncode:
        pytest.skip("openssl is not there")
    return folder


def test_tokens_tls_cors_and_reload(start, own_papers, certificate, tmp_path):
    (tmp_path / "tokens").write_text(f"# ours\n{TOKEN}\n")
    words = [f"slow={own_papers / 'run'}", "--token-file", str(tmp_path / "tokens"), "--cors", "https://app.example"]
    words += ["--tls-cert", str(certificate / "cert.pem"), "--tls-key", str(certificate / "key.pem")]
    second = "another-token-from-the-environment"
    service = start(*words, papers=own_papers / "papers", PAPERZOO_TOKENS=second)
    assert service.address.startswith("https://")
    client, body = service.client, {"input": [0.0]}
    for path in ("/", "/health", "/ready", "/v2/health/live", "/v2/health/ready"):
        assert client.get(path).status_code == 200, path
    for path in ("/models", "/metrics", "/openapi.json", "/v2", "/v2/models/slow", "/nothing"):
        assert client.get(path).status_code == 401, path
    for given in (None, "Bearer", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Bearer \xff"):
        headers = {} if given is None else {"authorization": given.encode("latin-1")}
        found = client.post("/predict/slow", json=body, headers=headers)
        assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer", given
    mine = {"authorization": f"Bearer {TOKEN}"}
    assert client.post("/predict/slow", json=body, headers=mine).status_code == 200
    assert client.post("/predict/slow", json=body, headers={"authorization": f"Bearer {second}"}).status_code == 200
    origin = {"origin": "https://app.example"}
    asked = client.options("/predict/slow", headers=origin | {"access-control-request-method": "POST"})
    assert asked.status_code == 204 and "authorization" in asked.headers["access-control-allow-headers"]
    found = client.post("/predict/slow", json=body, headers=mine | origin)
    assert found.status_code == 200 and found.headers["access-control-allow-origin"] == "https://app.example"
    assert client.post("/predict/slow", json=body, headers=mine | {"origin": "https://x.example"}).status_code == 403
    assert client.post("/admin/reload/slow").status_code == 401
    assert client.post("/admin/reload/nothing", headers=mine).status_code == 404
    assert client.post("/admin/reload/slow", headers=mine).json() == {"model": "slow", "version": 2}
    assert TOKEN not in service.errors()


def test_tokens_are_read_and_weak_ones_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("PAPERZOO_TOKENS", raising=False)
    assert not access.read_tokens(None)
    file = tmp_path / "tokens"
    for text, message in (("", "no token"), ("# x\n", "no token"), ("short\n", "at least 16"), ("a b" * 9, "no blank")):
        file.write_text(text)
        with pytest.raises(PaperZooError, match=message):
            access.read_tokens(file)
    with pytest.raises(PaperZooError, match="cannot be read"):
        access.read_tokens(tmp_path / "nothing")
    for origin in ("*", "example.org", "https://a.example/path"):
        with pytest.raises(PaperZooError, match="--cors"):
            access.check_origins([origin])


# -- load and faults ---------------------------------------------------------------------------------------------------


def test_a_full_queue_sheds_and_goes_on(slow):
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: predict(slow, "slow", json={"input": [0.3]}), range(12)))
    codes = [r.status_code for r in found]
    assert set(codes) == {200, 429} and codes.count(200) >= 3
    shed = next(r for r in found if r.status_code == 429)
    assert shed.headers["retry-after"] == "1" and "waiting" in shed.json()["error"]
    assert slow.metric("paperzoo_shed_total") >= codes.count(429)
    assert predict(slow, "slow", json={"input": [0]}).status_code == 200


def test_an_answer_that_takes_too_long(slow):
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(predict, slow, "slow", json={"input": [3.0]})
        time.sleep(0.2)
        behind = pool.submit(predict, slow, "slow", json={"input": [0]})
        assert late.result().status_code == behind.result().status_code == 504
    assert time.monotonic() - began < 3
    time.sleep(max(0.0, began + 3.2 - time.monotonic()))
    assert predict(slow, "slow", json={"input": [0]}).status_code == 200


def test_a_network_that_fails(slow):
    """On one input it is the input's fault; if it fails on what it answered before, the process is replaced."""
    found = predict(slow, "slow", json={"input": [-1]})
    assert found.status_code == 422 and "IndexError: this input is odd" in found.json()["error"]
    restarts = slow.metric("paperzoo_worker_restarts_total")
    assert predict(slow, "slow", json={"input": [-2]}).status_code == 500
    slow.wait_until_up()
    assert predict(slow, "slow", json={"input": [0]}).status_code == 200
    assert slow.metric("paperzoo_worker_restarts_total") == restarts + 1


def test_kill_9_loses_what_was_in_hand_alone(slow):
    with ThreadPoolExecutor(2) as pool:
        lost = pool.submit(predict, slow, "slow", json={"input": [1.5]})
        time.sleep(0.3)
        os.kill(slow.workers()[0], signal.SIGKILL)
        killed = time.monotonic()
        assert lost.result().status_code == 503
    assert slow.client.get("/health").status_code == 200
    assert slow.client.get("/ready").status_code == slow.client.get("/v2/models/slow/ready").status_code == 503
    slow.wait_until_up()
    print(f"\nback after {time.monotonic() - killed:.1f} s")
    assert predict(slow, "slow", json={"input": [0]}).status_code == 200
    assert predict(slow, "slow", json={"input": [-3]}).status_code == 503  # it ends the process itself
    slow.wait_until_up()
    assert predict(slow, "slow", json={"input": [0]}).status_code == 200


def test_slow_clients_are_cut_off_and_stop_nobody(slow):
    """While that takes its time, a process that answers nothing any more is replaced."""
    head = b"POST /predict/slow HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    stuck = [socket.create_connection(("127.0.0.1", slow.port), timeout=20) for _ in range(40)]
    try:
        for i, connection in enumerate(stuck):
            connection.sendall(head if i % 2 else head[:40])
        began = time.monotonic()
        assert predict(slow, "slow", json={"input": [0]}).status_code == 200
        assert time.monotonic() - began < 2
        restarts = slow.metric("paperzoo_worker_restarts_total")
        assert predict(slow, "slow", json={"input": [60]}).status_code == 504
        ends = [connection.recv(4096) for connection in stuck]
        assert 8 < time.monotonic() - began < 15
        assert all(end.startswith(b"HTTP/1.1 408") for end in ends[1::2]) and not any(ends[::2])
    finally:
        for connection in stuck:
            connection.close()
    assert slow.metric("paperzoo_held_bytes") == 0
    slow.wait_until_up()
    assert slow.metric("paperzoo_worker_restarts_total") == restarts + 1


def ask_until(service: Service, stop: threading.Event, codes: list[int]) -> None:
    with httpx.Client(base_url=service.address, timeout=30, verify=False, trust_env=False) as client:
        while not stop.is_set():
            headers = {"authorization": f"Bearer {TOKEN}"}
            codes.append(client.post("/predict/slow", json={"input": [0.01]}, headers=headers).status_code)


def test_reloads_drop_no_request(start, own_papers, tmp_path):
    """By the administrator, and because a file changed; a folder that cannot be opened changes nothing."""
    import shutil

    folder = tmp_path / "served"
    shutil.copytree(own_papers / "run", folder)
    service = start(f"slow={folder}", "--watch", papers=own_papers / "papers", PAPERZOO_TOKENS=TOKEN)
    mine, codes, stop = {"authorization": f"Bearer {TOKEN}"}, [], threading.Event()
    service.client.headers.update(mine)
    threads = [threading.Thread(target=ask_until, args=(service, stop, codes)) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        before = service.workers()
        assert service.client.post("/admin/reload/slow").status_code == 200
        (folder / "config.json").rename(folder / "away.json")
        refused = service.client.post("/admin/reload/slow")
        assert refused.status_code == 409 and "stays as it is" in refused.json()["error"]
        (folder / "away.json").rename(folder / "config.json")
        (folder / "config.json").touch()
        until = time.monotonic() + 20
        while service.metric('paperzoo_reloads_total{model="slow",result="done"}') < 2 and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(codes) == {200} and len(codes) > 20
    assert service.metric('paperzoo_reloads_total{model="slow",result="done"}') == 2
    assert len(service.workers()) == 1 and service.workers() != before


def test_sigterm_finishes_what_is_in_hand(wide):
    workers = wide.workers()
    with ThreadPoolExecutor(9) as pool:
        inside = [pool.submit(predict, wide, "slow", json={"input": [0.4]}) for _ in range(9)]
        time.sleep(0.3)
        wide.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.TransportError):  # it accepts no more
            httpx.get(f"{wide.address}health", timeout=5, trust_env=False)
        assert [r.result().status_code for r in inside] == [200] * 9
    assert wide.process.wait(timeout=10) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_models_share_a_budget_of_memory(slow, start, own_papers):
    folder, size = own_papers / "run", slow.metric("paperzoo_memory_bytes") / 2**20
    names = [f"{name}={folder}" for name in ("a", "b")]
    service = start(*names, "--memory-mb", str(int(1.5 * size)), papers=own_papers / "papers")
    assert len(service.workers()) == 1 and service.client.get("/ready").status_code == 200
    for name in ("b", "a"):
        assert predict(service, name, json={"input": [0]}).status_code == 200
        assert service.metric(f'paperzoo_workers{{model="{name}"}}') == service.metric("paperzoo_workers{") == 1


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["wide_resnet"], {}, "no finished run of wide_resnet under ./runs; make one with: paperzoo run wide_resnet"),
        (["wide_resnt"], {}, "did you mean wide_resnet"),
        (["{tmp}"], {}, "not the folder of a finished run"),
        (["{run}", "{run}"], {}, "two models are named wide_resnet"),
        (["a/b={run}"], {}, "cannot be the name of a model"),
        (["{run}"], {"tls_cert": Path("x")}, "belong together"),
        (["{run}"], {"tls_cert": Path("x"), "tls_key": Path("y")}, "certificate cannot be used"),
        (["{run}"], {"cors": ["*"]}, "an origin is"),
        (["{run}"], {"token_file": Path("nothing")}, "cannot be read"),
        (["{run}"], {"host": "no.such.host.invalid"}, "cannot listen on"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, monkeypatch, models, options, message):
    from paperzoo.cli_serve import serve

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("paperzoo.serve.service.log_lines", lambda: None)
    places = {"tmp": str(tmp_path), "run": str(runs / "digits")}
    with pytest.raises(PaperZooError) as error:
        serve([model.format(**places) for model in models], port=0, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("memory", "message"), [(None, "model.safetensors"), ("20", "more than --memory-mb 20")])
def test_a_model_that_cannot_be_opened_ends_the_service(runs, tmp_path, memory, message):
    import shutil

    folder = tmp_path / "digits"
    shutil.copytree(runs / "digits", folder)
    if memory is None:
        (folder / "model.safetensors").write_bytes(b"no weights")
    words = [] if memory is None else ["--memory-mb", memory]
    done = subprocess.run([*COMMAND, str(folder), *words, "--port", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: ")


def test_the_newest_run_is_found_and_its_deployed_folder_preferred(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stamp in ("2026-01-01_00-00-00", "2026-01-02_00-00-00", "2026-01-03_00-00-00"):
        (tmp_path / "runs" / "wide_resnet" / stamp).mkdir(parents=True)
    older, newer = (tmp_path / "runs" / "wide_resnet" / f"2026-01-0{i}_00-00-00" for i in (1, 2))
    for folder in (older, newer):
        (folder / "config.json").write_text("{}")
    assert fleet.locate("wide_resnet") == str(newer.relative_to(tmp_path))  # the third is not finished
    (newer / "deploy").mkdir()
    (newer / "deploy" / "deploy.json").write_text("{}")
    (newer / "deploy" / "config.json").write_text("{}")
    assert fleet.locate("WRN") == str((newer / "deploy").relative_to(tmp_path))
    assert fleet.locate(str(newer)) == str(newer)


def test_nothing_heavy_is_loaded_by_the_service_itself(service):
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, paperzoo.serve.service; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {"torch", "numpy", "PIL", "torchvision"} & set(loaded) == set()


def test_frames_survive_any_split():
    from paperzoo.serve.wire import frame, read_frame

    async def read() -> list:
        reader, found = asyncio.StreamReader(), []
        content = frame({"id": 1, "text": "ü"}, b"abc") + frame({"id": 2})
        task = asyncio.ensure_future(read_frame(reader))
        for byte in content:
            reader.feed_data(bytes([byte]))
            await asyncio.sleep(0)
        found.append(await task)
        found.append(await read_frame(reader))
        reader.feed_eof()
        return [*found, await read_frame(reader)]

    assert asyncio.run(read()) == [({"id": 1, "text": "ü"}, b"abc"), ({"id": 2}, b""), None]
