"""What each kind of model takes and refuses, how answers are written, how batches form: without processes."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("python_multipart")

from paperzoo.data.encoding import Encoding  # noqa: E402
from paperzoo.serve import answers, protocol  # noqa: E402
from paperzoo.serve.batching import Batcher, Work  # noqa: E402
from paperzoo.serve.endpoints import read_typed  # noqa: E402
from paperzoo.serve.kinds import KINDS, kind_for  # noqa: E402
from paperzoo.serve.limits import Limits, Refused  # noqa: E402
from paperzoo.serve.picture_inputs import AnyPair, Faces, People, Picture, PictureAndText, PicturePair  # noqa: E402
from paperzoo.serve.table_inputs import Numbers, Row  # noqa: E402
from paperzoo.serve.word_inputs import Asked, Named, Text, TextPair  # noqa: E402

ENCODING = Encoding(
    "label", ("age",), ("city",), "none", {"age": {"min": 0, "mean": 30.0, "deviation": 9}}, {"city": ["Ulm"]}
)


def recipe(**more: Any) -> Any:
    example = (torch.zeros(2, 3, 20, 10),)
    facts = {"labels": ["cat", "dog"]}
    config = SimpleNamespace(data="the picture")
    return SimpleNamespace(example=lambda: example, facts=facts, config=config, encoding=ENCODING, **more)


def ask(kind: type, body: Any, content_type: str = "application/json", **limits: Any) -> list[Any]:
    """The inputs that a request to a model of this kind has."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    made = kind(recipe(), Limits(**limits))
    return read_typed("m", made, {"query": {}, "type": content_type}, content).values


def refused(kind: type, body: Any, content_type: str = "application/json", **limits: Any) -> Refused:
    with pytest.raises(Refused) as error:
        ask(kind, body, content_type, **limits)
    return error.value


def png(width: int = 4, height: int = 3) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = {"base64": base64.b64encode(png()).decode()}


def form(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, str]:
    """Parts are (name, file name or None, content)."""
    body = b""
    for name, file, content in parts:
        more = f'; filename="{file}"' if file is not None else ""
        body += f'--bound\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
    return body + b"--bound--\r\n", 'multipart/form-data; boundary="bound"'


# -- kinds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [Picture, Faces, PicturePair, People, PictureAndText, Text, TextPair, Asked, Named, Row, Numbers]
)
def test_the_example_of_a_kind_is_taken(kind):
    made = kind(recipe(), Limits())
    assert len(ask(kind, {"inputs": [made.example()] * 2})) == 2
    assert made.warm_up() is not None and isinstance(made.schema, dict)
    known = {name for name, *_ in made.tensors}
    assert known >= set(made.may_lack)


def test_kinds_follow_the_task():
    import importlib

    for name in KINDS:
        importlib.import_module(name)  # a task that is renamed is noticed here
    from paperzoo.tasks.detection import DetectionRecipe
    from paperzoo.tasks.retrieval import RetrievalRecipe
    from paperzoo.tasks.text_classification import TextClassificationRecipe

    def of(recipe_class: type, **facts: Any) -> type:
        made = recipe_class.__new__(recipe_class)
        made.facts = facts
        return type(kind_for(made, Limits()))

    assert of(DetectionRecipe) is of(RetrievalRecipe) is Picture
    assert of(TextClassificationRecipe, pairs=False) is Text and of(TextClassificationRecipe, pairs=True) is TextPair


def test_pairs_of_pictures():
    assert isinstance(ask(Faces, {"input": PICTURE})[0], Image.Image)
    assert [p.size for p in ask(Faces, {"input": [PICTURE, PICTURE]})[0]] == [(4, 3)] * 2
    for pair in ([PICTURE], [PICTURE] * 3, [PICTURE, "a.png"]):
        assert refused(Faces, {"input": pair}).status == 422


def test_two_pictures_of_one_size():
    assert [p.size for p in ask(PicturePair, {"input": [PICTURE, PICTURE]})[0]] == [(4, 3)] * 2
    other = {"base64": base64.b64encode(png(5, 3)).decode()}
    for wrong in (PICTURE, [PICTURE], [PICTURE] * 3, [PICTURE, other], [PICTURE, "a.png"]):
        assert refused(PicturePair, {"input": wrong}).status == 422
    four = [("file", f"{i}.png", png()) for i in range(4)]
    assert len(ask(PicturePair, *form(*four))) == 2
    assert refused(PicturePair, *form(*four[:3])).status == 422
    assert refused(PicturePair, *form(*four[:2], ("more", None, b"x"))).status == 422


def test_boxes_come_with_a_picture():
    picture, boxes = ask(People, {"input": PICTURE | {"boxes": [[0, 0, 2, 2]]}})[0]
    assert picture.size == (4, 3) and boxes == [[0, 0, 2, 2]]
    assert isinstance(ask(People, {"input": PICTURE})[0], Image.Image)
    for boxes in ([], [[0, 0, 1]], [["a", 0, 1, 1]], [[0, 0, 1, 1e39]], {}, "x", [[0, 0, 1, 1]] * 65):
        assert refused(People, {"input": PICTURE | {"boxes": boxes}}).status == 422


def test_a_picture_and_a_text():
    assert ask(PictureAndText, {"input": PICTURE | {"text": "larger"}})[0][1] == "larger"
    values = ask(PictureAndText, *form(("file", "a.png", png()), ("text", None, "größer".encode())))
    assert values[0][1] == "größer" and values[0][0].size == (4, 3)
    refused(PictureAndText, *form(("file", "a.png", png())))
    refused(PictureAndText, {"input": PICTURE})
    assert refused(PictureAndText, png(), "image/png").status == 415


def test_texts_pairs_classes_and_names():
    assert ask(Text, {"inputs": ["a", "b"]}) == ask(Text, *form(("text", None, b"a"), ("text", None, b"b")))
    assert ask(Text, *form(("file", "a.txt", "\ufeffä".encode()))) == ["ä"]
    assert "UTF-8" in str(refused(Text, b"\xff", "text/plain"))
    assert refused(Text, {"input": "abcdef"}, text=5).status == 413
    assert ask(TextPair, {"input": ["a", "b"]}) == [("a", "b")]
    for bad in ("a", ["a"], ["a", 1], None):
        assert refused(TextPair, {"input": bad}).status == 422
    assert ask(Asked, {"inputs": ["cat@7", 1, "*"]}) == ["cat@7", 1, "*"]
    for bad in (2, -1, True, 1.5, "cat@x", "cat@²", "cat@" + "9" * 30, "c" * 201):
        assert refused(Asked, {"input": bad}).status == 422
    assert ask(Named, {"input": "the picture"}) == ["the picture"]
    assert "one restored picture" in str(refused(Named, {"input": "/etc/passwd"}))


def test_rows():
    assert ask(Row, {"input": {"age": 3, "city": "Ulm"}}) == [{"age": 3, "city": "Ulm"}]
    assert ask(Row, {"input": {"age": "4.5", "city": None}}) == [{"age": 4.5}]
    assert ask(Row, {"input": {"age": " NA "}}) == [{"age": ""}]
    for bad in ({"ages": 3}, {"age": "x"}, {"age": "nanx"}, {"age": True}, {"age": [1]}, {"age": "inf"}, [1], "a.csv"):
        assert refused(Row, {"input": bad}).status == 422
    assert ask(Row, b'age,city\r\n1,Ulm\r\n2,"a,b"\r\n', "text/csv") == [
        {"age": 1.0, "city": "Ulm"},
        {"age": 2.0, "city": "a,b"},
    ]
    for table in (b"age,city\n1\n", b"age\n1,2\n", b"x\n1\n", b"age\n\x00\n", b"\xff", b'age\n"1', b"age\n"):
        assert refused(Row, table, "text/csv").status == 422, table
    assert refused(Row, b"age\n" + b"1\n" * 65, "text/csv").status == 413
    kind = Row(recipe(), Limits())
    tensors = {"age": np.array([1.0, 2.0]), "city": np.array([b"Ulm", b"Bonn"], object)}
    assert kind.from_tensors(tensors, None) == [{"age": 1.0, "city": "Ulm"}, {"age": 2.0, "city": "Bonn"}]
    with pytest.raises(Refused, match="numbers of rows"):
        kind.from_tensors({"age": np.zeros(2), "city": np.array([b"x"], object)}, None)


def test_arrays():
    assert ask(Numbers, {"input": [[1, 2.5], [3, 4]]})[0].tolist() == [[1, 2.5], [3, 4]]
    assert ask(Numbers, {"input": 2})[0].shape == ()
    for bad in ([], [[1], [2, 3]], ["1"], [None], [True, "x"], {}, "a.npy", None, [1e39], [[]], [10**400]):
        assert refused(Numbers, {"input": bad}).status == 422, bad
    for extension in (b"NaN", b"-Infinity"):
        assert refused(Numbers, b'{"input": [' + extension + b"]}").status == 400


def test_forms():
    values = ask(Picture, *form(("file", "a.png", png()), ("file", "../../etc/passwd", png(2, 2))))
    assert [v.size for v in values] == [(4, 3), (2, 2)]
    assert refused(Picture, *form(("image", "a.png", png()))).status == 422
    assert refused(Picture, *form(("text", None, b"x"))).status == 422
    assert refused(Picture, *form()).status in (400, 422)
    assert refused(Picture, *form(*[("file", "a", png())] * 65)).status == 413
    assert refused(Picture, *form(*[("file", "a", png())] * 200)).status == 413
    cut, kind = form(("file", "a.png", png()))
    assert refused(Picture, cut[:-20], kind).status == 400
    long = b'--bound\r\nContent-Disposition: form-data; name="' + b"x" * 10_000 + b'"\r\n\r\n\r\n--bound--\r\n'
    assert refused(Picture, long, kind).status == 400


# -- answers -----------------------------------------------------------------------------------------------------------


@dataclass
class Everything:
    label: str
    index: int
    right: bool
    score: float
    probabilities: dict[str, float]
    areas: dict[str, float]
    mask: Tensor
    image: Image.Image
    boxes: list[list[float]]
    nobody: str | None


def everything(score: float = 0.5, size: int = 20) -> Everything:
    mask = torch.arange(size * size).reshape(size, size) % 200
    areas = {"cat": 1.0} if size == 20 else {}
    return Everything(
        "cät", 1, True, score, {"a": 0.25, "b": 0.75}, areas, mask, Image.new("L", (5, 4)), [[1.0, 2.0]], None
    )


def test_results_as_json():
    found = json.loads(answers.write_json(answers.to_json(everything(float("nan")))))
    assert found["label"] == "cät" and found["score"] is None and found["boxes"] == [[1.0, 2.0]]
    mask = np.frombuffer(base64.b64decode(found["mask"]["base64"]), found["mask"]["type"]).reshape(
        found["mask"]["shape"]
    )
    assert found["mask"]["type"] == "uint8" and np.array_equal(mask, everything().mask)
    assert Image.open(io.BytesIO(base64.b64decode(found["image"]["png"]))).size == (5, 4)
    brief = answers.to_json(everything(), brief=True)
    assert brief["mask"] == {"shape": [20, 20], "type": "torch.int64"} and brief["image"] == {"picture": [5, 4]}
    assert answers.to_json({"x": [np.float32(2), np.int64(3), torch.tensor([1.0, float("inf")])]}) == {
        "x": [2.0, 3, [1.0, None]]
    }
    for low, high, name in ((0, 300, "uint16"), (-1, 1, "int8"), (-40_000, 1, "int32")):
        assert answers.narrow(np.array([low, high])).dtype == name
    schema = answers.schema_of(brief)
    assert schema["properties"]["score"] == {"type": ["number", "null"]} and schema["properties"]["mask"] == {
        "type": "object"
    }


def test_results_as_tensors():
    found = answers.columns([everything(), everything(0.25)])
    assert {name: datatype for name, (datatype, _) in found.items()} == {
        "label": "BYTES",
        "index": "INT64",
        "right": "BOOL",
        "score": "FP32",
        "probabilities": "FP32",
        "areas": "BYTES",
        "mask": "INT64",
        "image": "BYTES",
        "boxes": "BYTES",
        "nobody": "BYTES",
    }
    assert found["mask"][1].shape == (2, 20, 20) and found["probabilities"][1].tolist() == [[0.25, 0.75]] * 2
    assert found["nobody"][1].tolist() == [b"null"] * 2 and found["label"][1][0] == "cät".encode()
    with pytest.raises(Refused, match="another shape"):
        answers.columns([everything(), everything(size=21)])
    described = protocol.metadata("m", Picture(recipe(), Limits()), everything())
    shapes = {o["name"]: (o["datatype"], o["shape"]) for o in described["outputs"]}
    assert shapes["mask"] == ("INT64", [-1, -1, -1]) and shapes["probabilities"] == ("FP32", [-1, 2])
    assert protocol.in_json(np.array([1.0, np.nan], np.float32)) == [1.0, None]


# -- batches -----------------------------------------------------------------------------------------------------------


def work(i: int, count: int = 1, more: bool = True, size: int = 0) -> Work:
    request = SimpleNamespace(values=[None] * count)
    return Work(i, request, time.monotonic(), time.monotonic() + 60, more, size)


class Arrivals:
    """Requests that come at their times."""

    def __init__(self, *rows: tuple[float, Work]) -> None:
        self.rows, self.began = deque(rows), time.monotonic()

    def receive(self, timeout: float | None) -> Work | None:
        if not self.rows:
            if timeout is None:
                raise EOFError
            time.sleep(timeout)
            return None
        left = self.began + self.rows[0][0] - time.monotonic()
        time.sleep(max(0.0, left if timeout is None else min(left, timeout)))
        return None if timeout is not None and left > timeout else self.rows.popleft()[1]


def batches(*rows: tuple[float, Work], max_batch: int = 4, max_wait: float = 0.0) -> list[list[int]]:
    batcher = Batcher(Arrivals(*rows).receive, max_batch, max_wait)
    return [[w.identity for w in batch] for batch in iter(batcher.take, None)]


def test_batches_wait_for_others_within_the_bound():
    began = time.monotonic()
    assert batches((0, work(0)), (0.02, work(1)), max_wait=0.2) == [[0, 1]]
    assert 0.15 < time.monotonic() - began < 1
    began = time.monotonic()
    assert batches((0, work(0)), (0.3, work(1)), max_wait=0.05) == [[0], [1]]
    assert batches((0, work(0, more=False)), (0.02, work(1)), max_wait=0.01) == [[0], [1]]  # nobody else is on the way
    late = work(0)
    late.arrived -= 1  # it has waited elsewhere
    assert batches((0, late), (0.05, work(1)), max_wait=0.5) == [[0], [1]]
    assert time.monotonic() - began < 2


def test_batches_are_full_and_in_order():
    rows = [(0.0, work(i, count, more=False)) for i, count in enumerate((1, 2, 2, 7, 1))]
    assert batches(*rows) == [[0, 1], [2], [3], [4]]  # a request is not divided
    assert batches(*rows, max_batch=1) == [[0], [1], [2], [3], [4]]


def test_no_more_is_taken_in_than_a_batch_needs():
    arrivals = Arrivals(*[(0.0, work(i)) for i in range(10)])
    batcher = Batcher(arrivals.receive, 4, 1.0)
    assert len(batcher.take()) == 4 and len(arrivals.rows) == 6


# -- the start ---------------------------------------------------------------------------------------------------------

QUICK = """
import sys
from paperzoo.serve.quick import without_compiler, without_metrics
without_metrics()
import torch
with without_compiler():
    from paperzoo.tasks import classification, detection, restoration, segmentation
    from torch.optim import SGD
    SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
assert not {"torch._dynamo", "torch._inductor", "matplotlib"} & set(sys.modules), "too much was loaded"
# what was put off is there when it is used
metric = classification.MulticlassAccuracy(3)
metric.update(torch.tensor([0, 1]), torch.tensor([0, 2]))
class Mine(classification.MulticlassConfusionMatrix):
    pass
assert isinstance(Mine(3), classification.MulticlassConfusionMatrix)
import torchmetrics
assert torchmetrics.__file__ and float(torchmetrics.MeanMetric()(torch.ones(2))) == 1
assert float(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))) == 2
assert "torch._dynamo" in sys.modules
"""


def test_a_start_puts_off_what_it_does_not_need():
    done = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]


# -- pairs to match ----------------------------------------------------------------------------------------------------


def test_two_pictures_to_match_may_differ_in_size():
    other = {"base64": base64.b64encode(png(5, 6)).decode()}
    assert [p.size for p in ask(AnyPair, {"input": [PICTURE, other]})[0]] == [(4, 3), (5, 6)]
    assert refused(AnyPair, {"input": [PICTURE]}).status == 422
    files = ("file", "a.png", png()), ("file", "b.png", png(5, 6))
    assert [p.size for p in ask(AnyPair, *form(*files))[0]] == [(4, 3), (5, 6)]
