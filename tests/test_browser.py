"""Papers in a web page answer as they do in Python: the bundles of `make web`, in Chromium, over HTTP and from the disk."""

from __future__ import annotations

import functools
import http.server
import io
import math
import os
import random
import shutil
import threading
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2

from paperzoo.data.images import to_image
from paperzoo.serve import browser

STATIC = Path(browser.__file__).parent / "static"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
CHANGES = {  # the right answer does not matter for these: only that the page's is Python's
    "wide_resnet": {},
    "fcn": {"steps": 15},
    "retinanet": {"steps": 120, "scenes": 128},
    "fnet": {"steps": 60},
}
PAGE = """<!doctype html><html lang="{language}"><meta charset="utf-8"><title>A page</title>
<link rel="stylesheet" href="static/try.css"><script src="static/try.js" defer></script>
<section class="try" data-slug="{slug}" data-lang="{language}" data-model="models/{slug}"></section></html>"""
LISTEN = """
document.addEventListener("try:entered", (event) => { window.fed = event.detail.feed; });
document.addEventListener("try:result", (event) => {
  window.results = event.detail.results.map(({data, shape}) => ({data: Array.from(data), shape: Array.from(shape)}));
});
"""

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.skipif(not (STATIC / "ort.js").exists(), reason="needs the bundles: make web"),
]


@functools.cache
def made(slug: str):
    """The prepared network and the recipe that it was exported from; trained once in a session."""
    kept, train = [], browser.train_run

    def training(*arguments, **options):
        kept.append(train(*arguments, **options))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(browser, "train_run", training)
        prepared = browser.prepare(slug, changes=CHANGES[slug])
    return prepared, kept[0].recipe


class Site:
    """A folder of pages, its server, and a browser; notes what a page asked for and complained of."""

    def __init__(self, folder: Path, chromium) -> None:
        self.folder, self.chromium = folder, chromium
        handler = functools.partial(QuietHandler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def add(self, slug: str, language: str = "en") -> str:
        name = f"{slug}-{language}.html"
        (self.folder / name).write_text(PAGE.format(slug=slug, language=language), encoding="utf-8")
        browser.write(made(slug)[0], self.folder / "models" / slug)
        return name

    def open(self, slug: str, language: str = "en", from_disk: bool = False, script: str = "", width: int = 1000):
        self.requests.clear()
        self.complaints.clear()
        page = self.chromium.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.add_init_script(LISTEN + script)
        base = self.folder.as_uri() if from_disk else self.address
        page.goto(f"{base}/{self.add(slug, language)}")
        page.wait_for_selector(".try-about")
        return page

    def clean(self) -> bool:
        """Nothing was asked of another address, and nothing was complained of."""
        own = (self.address, self.folder.as_uri(), "data:", "blob:")
        assert [url for url in self.requests if not url.startswith(own) and "favicon" not in url] == []
        assert [text for text in self.complaints if "favicon" not in text] == []
        return True


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(STATIC, folder / "static")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        site = Site(folder, chromium)
        yield site
        chromium.close()
        site.server.shutdown()


def after(page, action) -> list[dict]:
    """What the network returned, once an action has made it run."""
    page.evaluate("window.results = null; document.querySelector('.try').dataset.state = ''")
    action()
    page.wait_for_function(
        "window.results || document.querySelector('.try').dataset.state === 'trouble'", timeout=60_000
    )
    assert not page.locator(".try-alert").is_visible(), page.locator(".try-alert").inner_text()
    page.wait_for_function("document.querySelector('.try').dataset.state === 'done'")
    return page.evaluate("window.results")


def click(page, i: int) -> list[dict]:
    return after(page, page.locator(".try-sample").nth(i).click)


def choose(page, image: Image.Image, format: str = "PNG") -> list[dict]:
    file = io.BytesIO()
    image.save(file, format)
    content = {"name": "picture", "mimeType": f"image/{format.lower()}", "buffer": file.getvalue()}
    return after(page, lambda: page.set_input_files(".try-file", content))


def picture(sample: dict) -> torch.Tensor:
    """A sample's picture, uint8 (3, H, W)."""
    import base64

    return to_image(Image.open(io.BytesIO(base64.b64decode(sample["image"].split(",")[1]))))


def photograph(width: int = 230, height: int = 170) -> Image.Image:
    """A photograph with a digit painted on it."""
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image("china.jpg")).resize((width, height))
    pen = ImageDraw.Draw(image)
    pen.line([(100, 40), (140, 40), (115, 130)], fill="yellow", width=14)
    return image


def middle(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


# -- Python's side -----------------------------------------------------------------------------------------------------


def test_eligible_papers_are_those_that_say_how():
    found = browser.eligible()
    assert {"wide_resnet", "fcn", "retinanet", "fnet"} <= set(found)
    assert not {"adam", "grad_cam", "transformer"} & set(found)


def test_a_prepared_network_is_kept(monkeypatch):
    prepared, _ = made("fcn")
    monkeypatch.setattr(browser, "train_run", None)
    assert browser.prepare("fcn", changes=CHANGES["fcn"]) == prepared
    assert browser.prepare("fcn", changes={"steps": 3}, train=False) is None
    assert browser.prepare("adam") is None


# -- digits ------------------------------------------------------------------------------------------------------------


def test_held_out_scans_get_python_s_probabilities(site):
    page = site.open("wide_resnet")
    prepared, recipe = made("wide_resnet")
    assert {Path(url).name for url in site.requests} & {
        "ort.js",
        "model.js",
    } == set()  # nothing large is loaded unasked
    samples = prepared.spec["samples"]
    assert [s["truth"] for s in samples] == [str(k) for k in range(10)]
    for i, (sample, expected) in enumerate(zip(samples, recipe.predict([picture(s) for s in samples]), strict=True)):
        shares = click(page, i)[0]["data"]
        assert numpy.allclose(shares, list(expected.probabilities.values()), atol=1e-3)
        assert page.locator(".try-sentence").inner_text().startswith(f"{sample['truth']}, with a probability of")
    assert site.clean()
    page.close()


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list[tuple[float, float]]:
    angles = [math.radians(start + (end - start) * i / 20) for i in range(21)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


DRAWN = {  # strokes in hundredths of the canvas
    "0": [arc(50, 50, 22, 35, -90, 270)],
    "1": [[(38, 30), (52, 14), (52, 86)]],
    "2": [[*arc(50, 30, 20, 18, -170, 30), (30, 85), (74, 85)]],
    "3": [[*arc(48, 32, 20, 17, -150, 90), *arc(48, 67, 22, 18, -90, 150)]],
    "5": [[(68, 14), (36, 14), (34, 44), *arc(48, 64, 22, 21, -120, 140)]],
    "9": [[*arc(50, 33, 19, 19, 0, -360), (66, 86)]],
}


def test_digits_drawn_with_the_mouse_are_recognised(site):
    page = site.open("wide_resnet", width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for digit, strokes in DRAWN.items():
        page.get_by_role("button", name="Clear").click()
        box = page.locator(".try-pad").bounding_box()

        def draw(strokes=strokes, box=box):
            for stroke in strokes:
                points = [(box["x"] + x * box["width"] / 100, box["y"] + y * box["height"] / 100) for x, y in stroke]
                page.mouse.move(*points[0])
                page.mouse.down()
                for point in points[1:]:
                    page.mouse.move(*point)
                page.mouse.up()
            page.wait_for_timeout(150)  # the runs of half a digit are over

        shares = after(page, draw)[0]["data"]
        assert str(int(numpy.argmax(shares))) == digit
        seen = page.evaluate(
            "Array.from(document.querySelector('.try-seen').getContext('2d').getImageData(0, 0, 32, 32).data)"
        )
        scan = torch.tensor(seen, dtype=torch.uint8).view(32, 32, 4)[..., :3].permute(2, 0, 1)
        expected = made("wide_resnet")[1].predict([scan])[0]
        assert numpy.allclose(shares, list(expected.probabilities.values()), atol=1e-3)
    assert site.clean()
    page.close()


def test_a_page_from_the_disk_in_chinese(site):
    page = site.open("wide_resnet", language="zh", from_disk=True)
    click(page, 7)
    assert page.locator(".try-sentence").inner_text().startswith("7，概率")
    assert site.clean()
    page.close()


# -- segmentation and detection ------------------------------------------------------------------------------------------


def test_masks_are_python_s(site):
    page = site.open("fcn")
    prepared, recipe = made("fcn")
    for i in (0, 4, 9):
        expected = recipe.predict([picture(prepared.spec["samples"][i])])[0].mask.flatten().numpy()
        assert (numpy.array(click(page, i)[0]["data"]) == expected).mean() >= 0.995
    assert page.locator(".try-picture").count() == 2  # the answer and the truth
    square = v2.functional.resize(to_image(middle(photograph())), [64, 64], antialias=True)
    expected = recipe.predict([square])[0].mask.flatten().numpy()
    assert (numpy.array(choose(page, photograph())[0]["data"]) == expected).mean() >= 0.995
    fed = 255 * numpy.array(page.evaluate("Array.from(window.fed[0].data)"))
    difference = numpy.abs(fed.round() - square.flatten().numpy().astype(float))
    assert difference.max() <= 1  # 0 where the processor has AVX2: elsewhere torch resizes in another arithmetic
    assert site.clean()
    page.close()


def assert_same_boxes(results: list[dict], expected, factor: float) -> None:
    boxes, scores, labels = (numpy.array(r["data"]) for r in results)
    assert len(scores) == len(expected.scores) > 0
    assert numpy.allclose(scores, expected.scores, atol=1e-3)
    assert labels.tolist() == expected.indices
    assert numpy.abs(boxes.reshape(-1, 4) * factor - numpy.array(expected.boxes)).max() < 1


def test_boxes_are_python_s(site):
    page = site.open("retinanet")
    prepared, recipe = made("retinanet")
    for i in (0, 3, 8):
        assert_same_boxes(click(page, i), recipe.predict([picture(prepared.spec["samples"][i])])[0], 1.0)
    square = middle(photograph())
    assert_same_boxes(choose(page, photograph()), recipe.predict([square])[0], square.width / 64)
    click(page, 0)
    page.locator(".try-slider input").fill("0.95")
    assert page.locator(".try-slider output").inner_text() == "0.95"
    plain = choose(page, Image.new("RGB", (64, 64), "black"))  # perhaps without a single box
    assert len(plain[1]["data"]) == len(recipe.predict([Image.new("RGB", (64, 64), "black")])[0].scores)
    assert site.clean()
    page.close()


# -- text ----------------------------------------------------------------------------------------------------------------

TEXTS = [
    "Return True if all the elements are zero.",
    "你好，世界！ 机器学习",
    "naïve café — “quoted” ½ ﬁne",
    "🙂🙃 emoji 👩‍👩‍👧‍👦 🇨🇳 ok",
    "ΟΔΟΣ Σίσυφος İstanbul ǅ ß ẞ",
    "[CLS] is a token, [MASK] too, [cls] is not",
    "tabs\tand\nlines\u3000wide\u00a0spaces\u200bnone\u0085end",
    "$5 + 3 < 9 ^ `x` | ~y = z_1",
    "x" * 120 + " " + "y" * 99,
    "全角ＡＢＣ１２３　ｶﾞ 한국어 العربية हिन्दी",
    "e\u0301 combining, \ufeffmark, \u2028line",
    "",
]


def texts() -> list[str]:
    """200 texts: those above, docstrings, and random mixtures of letters of many scripts."""
    from paperzoo.data.text import open_labelled_text

    rng = random.Random(0)
    letters = (
        "abcXYZ019 _-.,;!?()[]{}'\"#$%&*+/<=>@^`|~ 的一是不了人我在有他🙂🚀🏽éßΣσςİıДж\t\n\u3000…—“”‘’«»¿¡。，、！？"
    )
    mixed = ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(90)]
    return [t for t in TEXTS if t] + open_labelled_text("python_docs", "test").texts[: 201 - len(TEXTS) - 90] + mixed


def test_texts_get_python_s_ids_and_classes(site):
    page = site.open("fnet")
    prepared, recipe = made("fnet")
    samples = prepared.spec["samples"]
    assert 6 <= len(samples) <= 12
    for i, expected in enumerate(recipe.predict([s["text"] for s in samples])):
        shares = click(page, i)[0]["data"]
        assert numpy.allclose(shares, list(expected.probabilities.values()), atol=1e-3)
        assert int(numpy.argmax(shares)) == expected.index
    chosen = [t for t in texts() if t.strip()]
    assert len(chosen) >= 200 - 2
    ids = page.evaluate(
        """(texts) => texts.map((text) => {
          const area = document.querySelector("textarea");
          area.value = text;
          area.dispatchEvent(new Event("input"));
          return [area.value, Array.from(window.fed[0].data, Number)];
        })""",
        chosen,
    )
    for entered, found in ids:  # a text area keeps the text but for its line ends
        assert found == recipe.encode([entered], None)["input_ids"][0].tolist(), entered
    assert site.clean()
    page.close()


# -- what goes wrong -----------------------------------------------------------------------------------------------------


def told(page) -> str:
    page.wait_for_selector(".try-alert:visible")
    return page.locator(".try-alert").inner_text()


def test_unusable_files_are_refused_in_a_sentence(site):
    page = site.open("fcn")
    huge = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(huge, "PNG")
    cases = [
        ("notes.txt", "text/plain", b"hello", "not a picture"),
        ("broken.png", "image/png", b"\x89PNG\r\n\x1a\n" + bytes(100), "cannot be read"),
        ("huge.png", "image/png", huge.getvalue(), "too large"),
    ]
    for name, kind, content, words in cases:
        page.set_input_files(".try-file", {"name": name, "mimeType": kind, "buffer": content})
        assert words in told(page)
        click(page, 0)  # and it goes on
    assert site.clean()
    page.close()


def test_a_model_that_is_not_there_is_a_sentence_and_can_be_tried_again(site):
    page = site.open("fcn")
    model = site.folder / "models" / "fcn" / "model.js"
    kept = model.rename(model.with_suffix(".away"))
    page.get_by_role("button", name="Load the model").click()
    assert "could not be loaded" in told(page)
    kept.rename(model)
    click(page, 1)
    page.close()


def test_a_browser_without_webassembly_is_told(site):
    page = site.open("fcn", script="delete window.WebAssembly;")
    page.get_by_role("button", name="Load the model").click()
    assert "WebAssembly" in told(page)
    page.close()
