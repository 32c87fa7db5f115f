"""The site as a visitor uses it, in Chromium: search, plots, graph, languages, themes; over HTTP and from the disk."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import statistics
import threading
import time
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from paperzoo.catalog import board, relations, search
from paperzoo.catalog.cards import papers
from paperzoo.serve import data

STATIC = Path(data.__file__).parent / "static"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
QUERIES = [
    q["q"] for q in tomllib.loads((Path(__file__).parent / "queries.toml").read_text(encoding="utf-8"))["queries"]
]
MAIN_PAGES = ("index.html", "tasks/object_detection.html", "boards/coco.html", "graph.html", "papers/resnet.html")


# -- the browser -------------------------------------------------------------------------------------------------------


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The whole site without models, built once."""
    from paperzoo.serve.build import build

    if not (STATIC / "search.js").exists():
        pytest.skip("needs the bundles: make web")
    folder = tmp_path_factory.mktemp("sites") / "site"
    build(folder, train=False)
    return folder


@pytest.fixture(scope="session")
def addresses(site) -> dict[str, str]:
    """How the site is reached: "http" and "file"."""
    handler = functools.partial(QuietHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"http": f"http://127.0.0.1:{server.server_port}/", "file": site.as_uri() + "/"}
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """One browser profile; everything that a page complains of or asks the network for is noted."""

    def __init__(self, chromium, root: str, **options) -> None:
        self.root, self.faults, self.outside = root, [], []
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US"} | options)
        self.context.on("request", self.asked)
        self.context.on("weberror", lambda error: self.faults.append(str(error.error)))
        self.context.on("console", lambda message: self.heard(message))
        self.page = self.context.new_page()

    def asked(self, request) -> None:
        scheme = urlsplit(request.url).scheme
        if not request.url.startswith(self.root) and scheme not in ("data", "blob", "about"):
            self.outside.append(request.url)

    def heard(self, message) -> None:
        if message.type in ("error", "warning") and "favicon" not in message.text:
            self.faults.append(message.text)

    def open(self, path: str = "index.html"):
        self.page.goto(self.root + path)
        if path.startswith("index.html"):
            self.page.wait_for_selector("#search[data-ready]")
        return self.page


@pytest.fixture
def visit(chromium, addresses):
    """visit("http" | "file", options of the browser's profile) -> Visitor. At the end nothing may have gone wrong."""
    visitors = []

    def make(kind: str = "http", **options) -> Visitor:
        visitors.append(Visitor(chromium, addresses[kind], **options))
        return visitors[-1]

    yield make
    for visitor in visitors:
        visitor.context.close()
        assert visitor.faults == []
        assert visitor.outside == []


both_ways = pytest.mark.parametrize("kind", ["http", "file"])


def found(page) -> list[str]:
    """The slugs of the results shown."""
    return page.eval_on_selector_all("a.found-name", "all => all.map(a => a.href.split('/').pop().slice(0, -5))")


def count(page) -> int:
    return int(re.search(r"\d+", page.inner_text(".search-count"))[0])


def facet(page, key: str, value: str):
    return page.locator(f'[data-facet="{key}:{value}"]')


def facet_count(page, key: str, value: str) -> int:
    return int(facet(page, key, value).locator("xpath=../span[@class='facet-count']").inner_text())


# -- search ------------------------------------------------------------------------------------------------------------


@both_ways
def test_search_as_you_type(visit, kind):
    page = visit(kind).open()
    assert count(page) == len(papers())
    assert all(papers()[slug].has_code for slug in found(page)[:10])  # those with code come first
    page.keyboard.press("/")
    page.keyboard.type("wide resi")
    assert found(page)[0] == "wide_resnet"
    assert count(page) < len(papers())
    assert page.locator("li.found").first.locator("mark").count() >= 1
    page.wait_for_function("location.hash === '#q=wide+resi'")
    page.keyboard.press("Escape")
    assert page.input_value("#search-field") == "" and count(page) == len(papers())


@pytest.mark.parametrize(
    "query, expected", [("segmantic segmentaton", "fcn"), ("小样本", "prototypical_networks"), ("点击率", "dcn_v2")]
)
def test_typing_errors_and_chinese(visit, query, expected):
    page = visit().open()
    page.fill("#search-field", query)
    assert expected in found(page)[:8]
    page.fill("#search-field", "qwxzvqwxzv")
    assert count(page) == 0 and "Nothing matches" in page.inner_text(".search-results")


@both_ways
def test_facets_combine_and_stay_in_the_address(visit, kind):
    page = visit(kind).open()
    inside = [p for p in papers().values() if p.area == "segmentation"]
    facet(page, "area", "segmentation").check()
    assert count(page) == len(inside)
    assert facet_count(page, "kind", "model") == sum(p.card["kind"] == "model" for p in inside)
    assert facet_count(page, "status", "code") == sum(p.has_code for p in inside)
    facet(page, "kind", "model").check()
    both = [p for p in inside if p.card["kind"] == "model"]
    assert count(page) == len(both)
    assert facet_count(page, "kind", "method") == sum(p.card["kind"] == "method" for p in inside)  # instead of "model"
    assert page.evaluate("location.hash") == "#area=segmentation&kind=model"
    assert page.evaluate("document.activeElement.dataset.facet") == "kind:model"  # drawing anew keeps the focus
    page.go_back()
    assert count(page) == len(inside) and not facet(page, "kind", "model").is_checked()
    page.go_forward()
    page.reload()
    page.wait_for_selector(".search-chip")
    assert count(page) == len(both)
    page.get_by_role("button", name="Remove the filter segmentation").click()
    assert count(page) == sum(p.card["kind"] == "model" for p in papers().values())


def test_orders_and_more(visit):
    page = visit().open()
    page.select_option("#search-sort", "year")
    years = [papers()[slug].card["year"] for slug in found(page)]
    assert years == sorted(years, reverse=True)
    page.select_option("#search-sort", "used")
    uses = [len(relations.used_by(slug)) for slug in found(page)]
    assert uses == sorted(uses, reverse=True) and uses[0] == max(len(relations.used_by(s)) for s in papers())
    assert len(uses) == 20
    page.click(".search-more")
    assert len(found(page)) == 40
    assert page.evaluate("document.activeElement.closest('li') === document.querySelectorAll('li.found')[20]")


@both_ways
def test_open_a_paper_and_follow_a_relation(visit, kind):
    page = visit(kind).open()
    page.focus("#search-field")
    page.keyboard.type("squeeze excitation")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.className") == "found-name"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "search-field"
    assert found(page)[0] == "senet"
    page.keyboard.press("Enter")
    page.wait_for_url("**/papers/senet.html")
    page.locator('main a[href$="resnet.html"]').filter(has_text=re.compile("^ResNet$")).first.click()
    page.wait_for_url("**/papers/resnet.html")
    page.go_back()
    page.go_back()
    page.wait_for_selector("#search.is-live")
    assert page.input_value("#search-field") == "squeeze excitation" and found(page)[0] == "senet"


def test_the_slash_leads_to_the_search_from_every_page(visit):
    page = visit().open("papers/resnet.html")
    page.keyboard.press("/")
    page.wait_for_url("**/index.html*")
    page.wait_for_selector("#search-field:focus")


def test_the_page_ranks_as_python_does(visit):
    """On all judged queries the first five are the same; and how long a key takes."""
    page = visit().open()
    same = total = 0
    times = []
    for query in QUERIES:
        wanted = [p.slug for p in search.search(query, 5)]
        got, milliseconds = page.evaluate(
            """query => {
                const field = document.querySelector("#search-field");
                field.value = query;
                const start = performance.now();
                field.dispatchEvent(new Event("input"));
                const took = performance.now() - start;
                return [[...document.querySelectorAll("a.found-name")].slice(0, 5).map((a) => a.href), took];
            }""",
            query,
        )
        got = [Path(urlsplit(address).path).stem for address in got]
        same += sum(a == b for a, b in zip(got, wanted, strict=False))
        total += max(len(wanted), len(got))
        times.append(milliseconds)
    print(f"{same} of {total} places equal; a key takes {statistics.median(times):.1f} ms, at most {max(times):.1f}")
    assert same >= 0.95 * total


# -- plots -------------------------------------------------------------------------------------------------------------


@both_ways
def test_a_plot_shows_the_rows_of_its_table(visit, kind):
    page = visit(kind).open("boards/coco.html")
    page.wait_for_selector(".plot-point")
    plot = page.locator("figure.plot").first
    first = next(b for b in board.find_boards("COCO") if len(b.rows) > 2)
    drawn = plot.locator(".plot-point")
    assert drawn.count() == len(first.rows)
    rows = page.locator("section:has(figure.plot)").first.locator("table tbody tr")
    assert rows.count() == len(first.rows)
    assert plot.locator(".is-record").count() == len(first.records)
    linked = drawn.evaluate_all("all => all.map(a => a.dataset.slug)")
    assert sorted(linked) == sorted(r.slug for r in first.rows)

    best = first.rows[0]
    point = plot.locator(f'.plot-point[data-slug="{best.slug}"]').first
    point.locator(".plot-dot").hover(force=True)
    told = plot.locator(".plot-tip").inner_text()
    assert best.name in told and best.shown in told
    point.focus()
    assert plot.locator(".plot-tip").is_visible()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/papers/{best.slug}.html")


def test_axes_and_boards_can_be_chosen(visit):
    page = visit().open("tasks/image_classification.html")
    plot = page.locator("figure.plot").first
    plot.locator(".plot-point").first.wait_for()
    sizes = next(b for b in data.plot("image_classification")["boards"] if "parameters" in b["axes"])
    plot.get_by_role("combobox", name="Board").select_option(label=sizes["label"])
    plot.get_by_role("combobox", name="Against").select_option("parameters")
    assert plot.locator(".plot-point").count() == sum("parameters" in p for p in sizes["points"])
    assert plot.locator(".plot-record[d^='M']").count() == 0  # the record belongs to the years
    place = "a => a.map(p => Number(p.querySelector('.plot-dot').getAttribute('cx')))"
    assert plot.get_by_label("log x").is_checked()
    logarithmic = plot.locator(".plot-point").evaluate_all(place)
    plot.get_by_label("log x").uncheck()
    linear = plot.locator(".plot-point").evaluate_all(place)
    assert logarithmic == sorted(logarithmic) and linear == sorted(linear) and logarithmic != linear
    values = sorted(p["parameters"] for p in sizes["points"] if "parameters" in p)
    share = (values[1] - values[0]) / (values[-1] - values[0])
    assert (linear[1] - linear[0]) / (linear[-1] - linear[0]) == pytest.approx(share, abs=1e-6)
    plot.get_by_label("log y").check()
    assert plot.locator(".plot-point").count() == len(values)


# -- graph -------------------------------------------------------------------------------------------------------------


@both_ways
def test_the_graph_zooms_and_opens(visit, kind):
    page = visit(kind, reduced_motion="reduce").open("graph.html")
    scale = "() => Number((document.querySelector('#graph svg > g').getAttribute('transform') ?? 'scale(1)').match(/scale\\(([^)]+)/)[1])"
    coded = sum(p.has_code for p in papers().values())
    assert page.locator(".graph-node").count() == coded
    page.get_by_role("button", name="Zoom in").click()
    assert page.evaluate(scale) == pytest.approx(1.5)
    page.get_by_role("button", name="Show all").click()
    assert page.evaluate(scale) == 1
    page.locator("#graph svg").hover()
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"({scale})() > 1.1")
    page.focus("#graph svg")
    page.keyboard.press("0")
    assert page.evaluate(scale) == 1
    page.keyboard.press("ArrowRight")
    assert "translate(-60,0)" in page.locator("#graph svg > g").get_attribute("transform")
    page.keyboard.press("0")

    node = page.locator('.graph-node[data-slug="fcn"] circle')  # the middle of circle and name together may be neither
    node.hover()
    assert "VGG" in page.inner_text(".graph-told")
    lit = page.eval_on_selector_all(".graph-node.is-lit", "all => all.map(a => a.dataset.slug)")
    users = [s for s in relations.used_by("fcn") if "fcn" in relations.imports(s)]
    assert sorted(lit) == sorted({"fcn", *relations.imports("fcn"), *users})

    page.locator(".graph-list summary").click()
    page.wait_for_selector(".graph-list li")
    assert page.locator(".graph-list li").count() == sum(bool(relations.imports(s)) for s in papers())
    node.click()
    page.wait_for_url("**/papers/fcn.html")


def test_the_graph_of_all_works(visit):
    page = visit().open("graph.html")
    page.get_by_role("button", name="all works").click()
    assert page.locator(".graph-node").count() == len(papers())
    assert page.locator(".graph-node:not([tabindex='-1'])").count() == 0
    page.get_by_label("Find a work in the graph").fill("U-Net")
    page.wait_for_function("document.querySelector('.graph-node[data-slug=unet]').classList.contains('is-lit')")
    assert "U-Net" in page.inner_text(".graph-told")
    page.wait_for_timeout(500)
    box = page.locator('.graph-node[data-slug="unet"] circle').bounding_box()
    stage = page.locator(".graph-stage").bounding_box()
    assert stage["x"] < box["x"] < stage["x"] + stage["width"] and stage["y"] < box["y"] < stage["y"] + stage["height"]
    page.go_back()  # choosing made no entry in the history
    assert not page.url.endswith("graph.html#all")


# -- live --------------------------------------------------------------------------------------------------------------


def test_the_live_pages_work_under_their_security_policy(chromium, site):
    """What the server's headers forbid would be heard as an error."""
    import uvicorn

    from paperzoo.serve import server

    served = uvicorn.Server(uvicorn.Config(server.application(), port=0, log_level="error"))
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    while not served.started:
        assert thread.is_alive()
        time.sleep(0.02)
    port = served.servers[0].sockets[0].getsockname()[1]
    visitor = Visitor(chromium, f"http://127.0.0.1:{port}/")
    try:
        page = visitor.open()
        page.fill("#search-field", "resnet")
        assert found(page)[0] == "resnet"
        page = visitor.open("tasks/object_detection.html")
        page.wait_for_selector(".plot-point")
        page.locator(".plot-point").first.focus()
        assert page.locator(".plot-tip").is_visible()
        page = visitor.open("graph.html#all")
        page.wait_for_selector(".graph-node")
        page.get_by_role("button", name="Zoom in").click()
        page.wait_for_timeout(300)
        assert visitor.faults == [] and visitor.outside == []
    finally:
        visitor.context.close()
        served.should_exit = True
        thread.join(10)


# -- everywhere --------------------------------------------------------------------------------------------------------


@both_ways
def test_language_and_theme_are_remembered(visit, kind):
    page = visit(kind).open()
    html = page.locator("html")
    assert html.get_attribute("data-lang") == "en" and html.get_attribute("data-theme") == "light"
    line = page.locator(".found-line").first
    english = line.inner_text()
    page.click("#language-button")
    page.wait_for_function("document.querySelector('.found-line').innerText.match(/[\\u4e00-\\u9fff]/)")
    assert html.get_attribute("lang").startswith("zh") and english != line.inner_text()
    assert "篇" in page.inner_text(".search-count")
    page.click("#theme-button")
    assert html.get_attribute("data-theme") == "dark"
    page.goto(page.url.split("index.html")[0] + "tasks/object_detection.html")
    assert html.get_attribute("data-lang") == "zh" and html.get_attribute("data-theme") == "dark"
    page.wait_for_selector(".plot-title:has-text('年份')")
    page.reload()
    assert html.get_attribute("data-lang") == "zh" and html.get_attribute("data-theme") == "dark"


def test_the_browser_chooses_language_and_theme_at_first(visit):
    page = visit(locale="zh-CN", color_scheme="dark").open()
    assert page.locator("html").get_attribute("data-lang") == "zh"
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert "搜索" in page.get_by_role("search").locator("label").inner_text()


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_phone_shows_everything_without_scrolling_sideways(visit, locale):
    visitor = visit(locale=locale, viewport={"width": 375, "height": 700}, has_touch=True)
    for path in (*MAIN_PAGES, "index.html#q=segmentation&area=segmentation"):
        page = visitor.open(path)
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, path
    page = visitor.open()
    assert not page.locator("#menu a").first.is_visible()
    page.click("#menu-button")
    assert page.locator("#menu a").first.is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#menu a").first.is_visible()


NAMELESS = """
() => [...document.querySelectorAll("a[href], button, input, select, summary, [tabindex='0'], [role]")].filter((element) => {
  if (element.closest("[hidden], .skip") || !element.getClientRects().length) return false;
  const labels = [...(element.labels ?? [])].map((label) => label.textContent).join("");
  const by = (element.getAttribute("aria-labelledby") ?? "").split(" ").map((id) => document.getElementById(id)?.textContent ?? "");
  const text = element.matches("input, select") ? "" : element.textContent;
  const name = [element.getAttribute("aria-label"), element.title, labels, text, ...by].join("").trim();
  return !name && !["main", "status"].includes(element.getAttribute("role"));
}).map((element) => element.outerHTML.slice(0, 120))
"""


def test_everything_that_can_be_used_has_a_name(visit):
    for path in MAIN_PAGES:
        page = visit().open(path)
        page.wait_for_timeout(200)
        assert page.evaluate(NAMELESS) == [], path
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(ids) == len(set(ids)), path
        levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
        assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), path


def test_the_tab_key_goes_from_the_top_to_the_results(visit):
    page = visit().open()
    stops = []
    for _ in range(25):
        page.keyboard.press("Tab")
        stops.append(
            page.evaluate("(a => a.id || a.dataset.facet || a.className || a.tagName)(document.activeElement)")
        )
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", stops[-1]
    assert stops[0] == "skip"
    assert stops.index("language-button") < stops.index("theme-button") < stops.index("search-field")
    assert page.locator(".search-count[aria-live=polite]").count() == 1


def luminance(colour: list[int]) -> float:
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: list[int], b: list[int]) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLOUR = """
(selector) => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const element = document.querySelector(selector);
  const style = getComputedStyle(element);
  const ink = element instanceof SVGElement ? style.fill : style.color;
  let ground = element instanceof SVGElement ? element.closest("div") : element;
  while (ground && (numbers(getComputedStyle(ground).backgroundColor)[3] ?? 1) === 0) ground = ground.parentElement;
  return [numbers(ink).slice(0, 3), numbers(getComputedStyle(ground ?? document.body).backgroundColor).slice(0, 3)];
}
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_stand_out(visit, theme):
    visitor = visit(color_scheme=theme)
    seen = {
        "index.html#q=resnet": (
            ".found-name",
            ".found-where",
            ".found-title",
            ".found-badge",
            ".facet-count",
            ".facet-more",
            ".search-hint",
        ),
        "tasks/object_detection.html": (".plot-title", ".plot-grid text", ".plot-name", ".plot-controls label"),
        "graph.html": (".graph-node text", ".graph-told", ".graph-legend button", "#graph-code"),
    }
    for path, selectors in seen.items():
        page = visitor.open(path)
        page.wait_for_selector(selectors[0], state="attached")
        for selector in selectors:
            assert contrast(*page.evaluate(COLOUR, selector)) >= 4.5, (path, selector)
    for dot in page.eval_on_selector_all(".graph-node", "all => all.map(a => a.dataset.slug)"):
        assert contrast(*page.evaluate(COLOUR, f'.graph-node[data-slug="{dot}"] circle')) >= 3, dot


@both_ways
def test_copying(visit, kind):
    visitor = visit(kind)
    if kind == "http":
        visitor.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = visitor.open("papers/resnet.html")
    button = page.locator("button[data-copy]").first
    button.click()
    page.locator("button[data-copy]:has-text('Copied')").wait_for()
    if kind == "http":
        text = page.evaluate("navigator.clipboard.readText()")
        assert text == page.locator(f"#{button.get_attribute('data-copy')}").inner_text().strip()


def test_the_home_page_is_there_at_once(visit):
    """What is loaded before the first view, in bytes, and when it was painted: printed; the weight is limited."""
    visitor = visit()
    loaded: dict[str, int] = {}
    visitor.page.on("response", lambda r: loaded.setdefault(r.url, len(r.body())))
    visitor.page.goto(visitor.root + "index.html")
    visitor.page.wait_for_selector("#search[data-ready]")
    later = ("summaries-zh", "more.js")
    first = {u: size for u, size in loaded.items() if not any(name in u for name in later)}
    paint = visitor.page.evaluate("performance.getEntriesByType('paint').at(-1).startTime")
    print(f"home: {sum(first.values()) / 1000:.0f} kB in {len(first)} files, painted after {paint:.0f} ms")
    assert sum(first.values()) < 300_000
