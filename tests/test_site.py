"""The site: every page of a build, and the live server."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urlsplit

import pytest
from starlette.testclient import TestClient

from paperzoo.catalog.cards import papers
from paperzoo.errors import PaperZooError
from paperzoo.serve import build, history, notes, pages, server, source, words
from paperzoo.serve.equations import mathml

if not all((build.STATIC / name).exists() for name in build.BUILT):
    pytest.skip("the scripts are not built: make web", allow_module_level=True)

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "source", "path", "rect"}
HEAVIEST = 300_000  # bytes of a page with what it loads at first view


class Page(HTMLParser):
    """What the tests ask of a page; an element that is not closed, or closed twice, is a fault."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.headings: list[int] = []
        self.tags: Counter[str] = Counter()
        self.title = ""
        self.attributes: dict[str, dict[str, str | None]] = {}
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] += 1
        self.attributes.setdefault(tag, found)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in found:
            self.ids[found["id"] or ""] += 1
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loads.append(found["src"] or "")
        if tag == "link" and found.get("href"):
            self.loads.append(found["href"] or "")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "style" in found or any(name.startswith("on") for name in found):
            self.faults.append(f"<{tag}> has a style or a script in an attribute")
        if tag == "th" and "scope" not in found:
            self.faults.append("a table's heading has no scope")
        if tag == "button" and found.get("type") != "button":
            self.faults.append("a button without type=button")

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.faults.append(f"</{tag}> closes nothing; open: {self.open[-3:]}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.title += data


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site") / "site"
    done = build.build(out, train=False)
    print(f"\n{done['pages']} pages in {done['seconds']:.1f} s, {done['megabytes']:.1f} MB")
    return out


@pytest.fixture(scope="session")
def read(site: Path) -> dict[str, Page]:
    """Every page, by its path."""
    return {str(f.relative_to(site)): Page(f.read_text(encoding="utf-8")) for f in site.rglob("*.html")}


# -- the build ---------------------------------------------------------------------------------------------------------


def test_every_page_is_written(site: Path, read: dict[str, Page]) -> None:
    assert set(read) == set(pages.paths())
    assert {f"papers/{slug}.html" for slug in papers()} <= set(read)
    assert (site / build.MARKER).exists()


def test_every_page_is_well_formed(read: dict[str, Page]) -> None:
    faults = []
    for path, page in read.items():
        faults += [f"{path}: {fault}" for fault in page.faults[:2]]
        faults += [f"{path}: the id '{name}' stands {n} times" for name, n in page.ids.items() if n > 1]
        if not page.title or page.headings.count(1) != 1 or page.attributes["html"].get("lang") != "en":
            faults.append(f"{path}: title, h1 or lang")
        if page.attributes["html"].get("data-root") != "../" * path.count("/"):
            faults.append(f"{path}: data-root")
        steps = zip(page.headings, page.headings[1:], strict=False)
        if page.headings[0] != 1 or any(b > a + 1 for a, b in steps):
            faults.append(f"{path}: headings {page.headings}")
    assert not faults, "\n".join(faults[:20])


def test_titles_tell_pages_apart(read: dict[str, Page]) -> None:
    titles = Counter(page.title for path, page in read.items() if not path.startswith(("papers/", "code/")))
    assert [t for t, n in titles.items() if n > 3] == []


def test_every_link_and_anchor_resolves(site: Path, read: dict[str, Page]) -> None:
    files = {str(f.relative_to(site)) for f in site.rglob("*") if f.is_file()}
    faults = []
    for path, page in read.items():
        for link in {*page.links, *page.loads}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads or parts.scheme not in ("http", "https"):
                    faults.append(f"{path}: {link} is elsewhere")
                continue
            target = normpath(join(dirname(path), unquote(parts.path))) if parts.path else path
            if target not in files:
                faults.append(f"{path}: {link} is no file")
            elif parts.fragment and target in read and unquote(parts.fragment) not in read[target].ids:
                faults.append(f"{path}: {link} has no such anchor")
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:20])


def test_pages_are_light(site: Path, read: dict[str, Page]) -> None:
    weights = {}
    for path, page in read.items():
        loads = {normpath(join(dirname(path), load)) for load in page.loads}
        weights[path] = sum((site / file).stat().st_size for file in {path, *loads})
    heavy = sorted(((n, path) for path, n in weights.items()), reverse=True)
    print(f"\nheaviest: {heavy[:3]}; home {weights['index.html']}")
    assert [(n, path) for n, path in heavy if n > HEAVIEST] == []


def test_equations_are_drawn(site: Path, read: dict[str, Page]) -> None:
    with_dollars = [p.slug for p in papers().values() if "$" in (p.path / "notes.md").read_text(encoding="utf-8")]
    assert len(with_dollars) > 300
    assert [slug for slug in with_dollars if not read[f"papers/{slug}.html"].tags["math"]] == []
    assert "<math" in (site / "papers/mae.html").read_text(encoding="utf-8")


def test_notes_link_to_lines_and_works(site: Path) -> None:
    text = (site / "papers/wide_resnet.html").read_text(encoding="utf-8")
    line = source.symbols(papers()["wide_resnet"].path / "model.py", 0)["PreActivationBlock.forward"]
    assert f'href="../code/wide_resnet/model.py.html#L{line}"' in text
    assert 'href="../papers/resnet.html"' in text


def test_both_languages_and_honest_words(site: Path) -> None:
    text = (site / "papers/mae.html").read_text(encoding="utf-8")
    card = papers()["mae"].card
    assert card["summary"] in text and card["summary_zh"] in text
    if not papers()["mae"].has_code:
        assert "Not yet: the card and the notes are here" in text
    reading = next(p for p in papers().values() if p.card["kind"] == "reading")
    assert "there is nothing to run" in (site / f"papers/{reading.slug}.html").read_text(encoding="utf-8")


def test_reasons_are_said_in_chinese() -> None:
    seen = {pages.level(slug)[1] for slug in papers()} | {"builds failed", "matches, learns not passed"}
    assert [why for why in seen if "lang" not in words.reason(why)] == []


def test_headline_results_stand_on_their_boards() -> None:
    """Every row of a board is the headline result of its work, and most headline results of quality stand on one."""
    found = Counter(
        bool(pages.standing(paper, row)) for paper in papers().values() for row in paper.card.get("headline", [])
    )
    rows = sum(map(len, pages.places().values()))
    assert found[True] >= 0.9 * rows - 50, (found, rows)


def test_an_old_site_is_replaced_and_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "paths", lambda: ["about.html"])
    out = tmp_path / "site"
    build.build(out, train=False)
    (out / "left over.html").write_text("old")
    build.build(out, train=False)
    assert not (out / "left over.html").exists() and (out / "about.html").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["site"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(PaperZooError, match="not a site"):
        build.build(other, train=False)
    assert (other / "thesis.tex").read_text() == "mine"


def test_a_build_that_fails_leaves_the_old_site_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "paths", lambda: ["about.html"])
    out = tmp_path / "site"
    build.build(out, train=False)
    monkeypatch.setattr(pages, "render", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build.build(out, train=False)
    assert (out / "about.html").exists() and [p.name for p in tmp_path.iterdir()] == ["site"]
    out.rename(build.aside(out))  # killed between the two renames
    build.restore(out)
    assert (out / "about.html").exists() and [p.name for p in tmp_path.iterdir()] == ["site"]


def test_missing_scripts_are_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "STATIC", tmp_path)
    with pytest.raises(PaperZooError, match="make web.*npm") as error:
        build.build(tmp_path / "site", train=False)
    assert "\n" not in str(error.value)


# -- text of cards and notes is text -----------------------------------------------------------------------------------

HOSTILE = """
name = "<script>alert(1)</script>"
title = "</title><script>alert(2)</script>"
authors = ["<img src=x onerror=alert(3)>"]
year = 2020
url = "javascript:alert(4)"
code = "JaVaScRiPt:alert(5)"
kind = "method"
task = "<b>task</b>"
tasks = ["image_classification"]
aliases = ['"><script>alert(6)</script>']
keywords = ["</script><script>alert(7)</script>"]
summary = "</span><script>alert(8)</script>"
summary_zh = "<script>alert(9)</script>"
mechanism = "<iframe src=javascript:alert(10)></iframe>"
lists = ["<script>alert(11)</script> > x"]

[[headline]]
dataset = "ImageNet-1k"
metric = "top-1 accuracy"
value = "12.5%"
setting = "</script><script>alert(12)</script>"
"""
HOSTILE_NOTES = """# x

<script>alert(13)</script> [go](javascript:alert(14)) ![p](http://example.org/p.png) `</code><script>` $x<y</math><script>alert(15)</script>$

| a |
|:--|
| <img src=x onerror=alert(16)> |
"""
CHECK = """
import re, sys
from paperzoo.serve import data, pages
from paperzoo.catalog.cards import papers
assert "hostile" in papers()
for path in pages.paths():
    if not path.startswith(("papers/", "code/")) or path == "papers/hostile.html":
        text = pages.render(path)
        for found in re.findall(r"<script>|<img[^>]*>|<iframe[^>]*>|href=.javascript:[^>]*|<[^>]* on[a-z]+=", text, re.IGNORECASE):
            sys.exit(f"{path}: {found}")
assert "&lt;script&gt;alert(1)" in pages.render("papers/hostile.html")
for name, text in data.scripts().items():
    assert "<" not in text.split("=", 2)[-1], name
"""


def test_text_of_cards_cannot_run(tmp_path: Path) -> None:
    folder = tmp_path / "papers" / "classification" / "hostile"
    folder.mkdir(parents=True)
    (folder / "card.toml").write_text(HOSTILE, encoding="utf-8")
    (folder / "notes.md").write_text(HOSTILE_NOTES, encoding="utf-8")
    environment = os.environ | {"PAPERZOO_PAPERS": str(tmp_path / "papers"), "PAPERZOO_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# -- parts -------------------------------------------------------------------------------------------------------------


def test_equations() -> None:
    assert "<mi>𝔼</mi>" in mathml(r"\mathbb{E}[x]")
    assert "<mi>softmax</mi>" in mathml(r"\mathrm{softmax}(x)")
    assert "‖" in mathml(r"\big\lVert x\big\rVert^2") and "\\" not in mathml(r"\arg\min_x \lVert x\rVert")
    assert "&lt;" in mathml("x<y") and mathml(r"a_b_c").startswith("<code>")
    text = notes.as_html("# t\n\nThe loss is $a\n+ b$ and costs `$5`.", lambda name: None)
    assert "<li>" not in text and "<math" in text and "<code>$5</code>" in text


def test_code_is_shown_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    text = '"""One\n\ntwo."""\n\n\nclass A:\n    x: int = 1\n\n    def forward(self):\n        self.y = "<b>"\n'
    file.write_text(text)
    lines = source.highlighted(file, 0)
    assert len(lines) == len(text.splitlines())
    assert "&lt;b&gt;" in lines[-1] and "<b>" not in "".join(lines)
    found = source.symbols(file, 0)
    assert (found["A"], found["A.forward"], found["self.y"], found["A.x"]) == (6, 9, 10, 7)


def test_history_is_read_once_and_only_in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    history.edits.cache_clear()
    monkeypatch.setattr(history, "ROOT", tmp_path)
    assert history.of("resnet") == []
    history.edits.cache_clear()


# -- the server --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(server.application())


def test_pages_are_served_live(client: TestClient) -> None:
    for path in ("/", "/index.html", "/papers/resnet.html", "/papers/resnet", "/tasks/", "/boards/coco.html"):
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html"), path
    assert client.get("/papers/resnet.html").text == pages.render("papers/resnet.html")
    assert client.get("/static/style.css").headers["content-type"].startswith("text/css")
    assert client.get("/data/search.js").headers["content-type"].startswith("text/javascript")
    assert client.post("/").status_code == 405


def test_headers_keep_everything_here(client: TestClient) -> None:
    for path in ("/", "/static/site.js", "/api/search?q=resnet", "/nothing"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "'wasm-unsafe-eval'" in policy and "unsafe-inline" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_an_unknown_page_suggests_works(client: TestClient) -> None:
    answer = client.get("/papers/resnett.html")
    assert answer.status_code == 404 and "../papers/resnet.html" in answer.text
    assert Page(answer.text).faults == []
    assert client.get("/<script>alert(1)</script>").status_code == 404
    assert "<script>alert" not in client.get("/<script>alert(1)</script>").text


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2Fserver.py",
        "/static/%2e%2e/%2e%2e/__init__.py",
        "/static/.built",
        "/papers/../../../../etc/passwd",
        "/..%2f..%2f..%2fetc%2fpasswd",
        "/data/..%2fstatic%2fsite.js",
        "/browser/..%2f..%2fx/model.js",
        "/browser/resnet/spec.json",
        "/static/%00",
    ],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404 and "from __future__" not in answer.text and "root:x" not in answer.text


def test_the_search_answers_in_json(client: TestClient) -> None:
    found = client.get("/api/search", params={"q": "real-time segmentation", "limit": 5}).json()
    assert found["count"] == 5 and all(row["slug"] in papers() for row in found["results"])
    assert client.get("/api/search", params={"q": "小样本"}).json()["count"] > 0
    for bad in (
        {},
        {"q": " "},
        {"q": "x" * 401},
        {"q": "x", "limit": "0"},
        {"q": "x", "limit": "²"},
        {"q": "x", "limit": "9" * 50},
    ):
        answer = client.get("/api/search", params=bad)
        assert answer.status_code == 400 and answer.json()["error"], bad
    assert client.get("/api/search", params={"q": "x" * 400}).status_code == 200


def test_a_work_in_json(client: TestClient) -> None:
    record = client.get("/api/papers/resnet").json()
    assert record["slug"] == "resnet" and record["bibtex"].startswith("@") and "used_by" in record
    answer = client.get("/api/papers/resnett")
    assert answer.status_code == 404 and "resnet" in answer.json()["error"]
    json.dumps(record)


def test_a_changed_card_shows(tmp_path: Path) -> None:
    """In a process of its own, with a folder of the user's own papers."""
    folder = tmp_path / "papers" / "classification" / "mine"
    folder.mkdir(parents=True)
    card = HOSTILE.split("[[headline]]")[0]
    (folder / "card.toml").write_text(card, encoding="utf-8")
    script = f"""
from pathlib import Path
from starlette.testclient import TestClient
from paperzoo.serve import pages, server
pages.refresh()
client = TestClient(server.application())
assert client.get("/papers/mine.html").status_code == 200
card = Path({str(folder / "card.toml")!r})
card.write_text(card.read_text().replace("<b>task</b>", "x").replace("alert(8)", "another summary"))
server.checked = 0.0
assert "another summary" in client.get("/papers/mine.html").text
card.unlink()
server.checked = 0.0
assert client.get("/papers/mine.html").status_code == 404
"""
    environment = os.environ | {"PAPERZOO_PAPERS": str(tmp_path / "papers"), "PAPERZOO_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PaperZooError, match=f"127.0.0.1:{port}.*--port"):
            server.bound("127.0.0.1", port)
    with pytest.raises(PaperZooError, match="cannot listen on no.such.host.invalid"):
        server.bound("no.such.host.invalid", 0)


def test_the_command_serves_and_ends_quietly() -> None:
    command = [sys.executable, "-m", "paperzoo", "serve", "--port", "0"]
    import signal
    from urllib.request import urlopen

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address, line + process.stderr.read()
        began = time.monotonic()
        with urlopen(address[0], timeout=20) as answer:
            assert b"Papers that run" in answer.read()
        print(f"\nfirst page after {time.monotonic() - began:.2f} s")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert "Traceback" not in errors and process.returncode in (0, 130), errors
