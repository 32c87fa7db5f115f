"""The pages of the site. `paths()` names them all, `render(path)` gives one as HTML: the build writes them, the server shows them live."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from paperzoo.catalog import board as boards
from paperzoo.catalog import cards, relations, vocabulary
from paperzoo.catalog.board import Board, Row
from paperzoo.catalog.cards import Paper, papers
from paperzoo.catalog.cite import bibtex, csl
from paperzoo.catalog.measured import READINESS, measured, readiness
from paperzoo.catalog.status import LETTERS, badge, read_status
from paperzoo.catalog.vocabulary import Term
from paperzoo.errors import UnknownName
from paperzoo.serve import data, history, notes, source, words
from paperzoo.serve.values import UNPUBLISHED, area, capital, count, embed, safe_url, size, sizes, venue_id
from paperzoo.serve.words import both

OPTIONAL = (
    "arxiv",
    "url",
    "venue",
    "code",
    "license",
    "mechanism",
    "methods",
    "aliases",
    "keywords",
    "reading",
)  # of a card
BOARDS_SHOWN, ROWS_SHOWN = 8, 10  # on a task's page; the boards' own pages have all


# -- the templates' means ----------------------------------------------------------------------------------------------


@functools.cache
def templates() -> Environment:
    folder = Path(__file__).parent / "templates"
    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.globals |= {
        "t": both,
        "term": lambda term: both(term.name, term.zh),
        "navigation": words.NAVIGATION,
        "words": words,
        "readiness_names": READINESS,
        "tasks": vocabulary.table("tasks"),
        "methods": vocabulary.table("methods"),
        "capital": capital,
        "count": count,
        "size": size,
        "sizes": sizes,
        "safe_url": safe_url,
        "area": area,
        "venue_id": venue_id,
        "marks": marks,
        "embed": embed,
        "shown": boards.shown,
        "papers": papers,
    }
    return made


def page(path: str, template: str, title: str, description: str = "", section: str = "", **content: Any) -> str:
    """One page: the template with its content, and the way from the page to the root."""
    return templates().get_template(template).render(
        root="../" * path.count("/"),
        path=path,
        kind=template.removesuffix(".html"),
        title=title if title == "PaperZoo" else f"{title} · PaperZoo",
        description=description or title,
        section=section,
        **content,
    )  # fmt: skip


def marks(paper: Paper) -> Markup:
    """The ladder in five letters, in words for those who do not see it; plain words for works without code."""
    if not paper.has_code:
        return both("read", "阅读") if paper.card["kind"] == "reading" else both("not yet", "尚未")
    steps = status().get(paper.slug, {})
    passed = [name for name in LETTERS if steps.get(name, {}).get("state") == "passed"]
    said = ", ".join(passed) or "nothing passed yet"
    return Markup('<span class="marks" role="img" aria-label="{}" title="{}">{}</span>').format(
        said, said, badge(steps)
    )


# -- what the pages are made of; forgotten when the cards change -------------------------------------------------------


@functools.cache
def status() -> dict[str, Any]:
    return read_status()


@functools.cache
def level(slug: str) -> tuple[str, str]:
    return readiness(papers()[slug], status())


@functools.cache
def places() -> dict[str, list[tuple[Board, int, Row]]]:
    """slug -> every result of it on a board, with its rank (1 is the record)."""
    found: dict[str, list[tuple[Board, int, Row]]] = {}
    for board in boards.boards().values():
        for rank, row in enumerate(board.rows, 1):
            found.setdefault(row.slug, []).append((board, rank, row))
    return found


@functools.cache
def by(kind: str) -> dict[str, list[Paper]]:
    """id -> works: kind is "area", "task", "method", "venue" or "year"."""
    ids: dict[str, Callable[[Paper], Iterable[str]]] = {
        "area": lambda p: [p.area],
        "task": lambda p: p.card["tasks"],
        "method": lambda p: p.card.get("methods", []),
        "venue": lambda p: [venue_id(p)],
        "year": lambda p: [str(p.card["year"])],
    }
    found: dict[str, list[Paper]] = {}
    for paper in papers().values():
        for name in dict.fromkeys(ids[kind](paper)):
            found.setdefault(name, []).append(paper)
    return found


@functools.cache
def by_dataset() -> dict[str, list[Board]]:
    """A data set's id -> its boards, the fullest first."""
    found: dict[str, list[Board]] = {}
    for board in boards.everything():
        found.setdefault(board.dataset.id, []).append(board)
    return found


@functools.cache
def list_ids() -> dict[str, str]:
    """A heading of the reading lists -> its anchor on their page."""
    headings = sorted({heading for p in papers().values() for heading in p.card.get("lists") or []})
    return {heading: f"list-{number}" for number, heading in enumerate(headings, 1)}


@functools.cache
def scripts() -> dict[str, str]:
    """File below the root -> its contents: what the search is given."""
    return data.scripts()


_models: dict[str, dict[str, Any]] = {}
_seen: list[Any] = []


def use_models(specs: dict[str, dict[str, Any]]) -> None:
    """Say which works run in the browser: slug -> what their model's spec says. Their pages get the widget."""
    _models.clear()
    _models.update(specs)


def refresh() -> bool:
    """Forget everything when a card, code file, vocabulary or measurement changed; whether anything did."""
    from paperzoo.catalog import measured as measurements
    from paperzoo.catalog import search
    from paperzoo.catalog import status as ladder

    others = [ladder.PATH, measurements.PATH, *vocabulary.FOLDER.glob("*.toml")]
    others += [f for p in papers().values() if p.has_code for f in p.path.glob("*.py")]
    now = [cards.fingerprint(), [[str(f), f.stat().st_mtime_ns] for f in others if f.exists()]]
    if not _seen or _seen[0] == now:
        _seen[:] = [now]
        return False
    import sys

    for module in (boards, cards, relations, vocabulary, measurements, search, data, history, sys.modules[__name__]):
        for value in list(vars(module).values()):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
    _seen[:] = [now]
    return True


# -- paths -------------------------------------------------------------------------------------------------------------


@functools.cache
def routes() -> dict[str, Callable[[str], str]]:
    """path -> the function that renders it."""
    found: dict[str, Callable[[str], str]] = {
        "index.html": home,
        "tasks/index.html": tasks,
        "methods/index.html": methods,
        "venues/index.html": venues,
        "boards/index.html": all_boards,
        "reading.html": reading,
        "readiness.html": readiness_page,
        "lists.html": lists,
        "graph.html": graph,
        "status.html": status_page,
        "about.html": about,
    }
    for paper in papers().values():
        found[f"papers/{paper.slug}.html"] = functools.partial(paper_page, paper)
        for file in source.files(paper):
            found[source.page(paper.slug, file.name)] = functools.partial(code_page, paper, file)
    for name in vocabulary.table("tasks"):
        found[f"tasks/{name}.html"] = functools.partial(task_page, name)
    for name in vocabulary.table("methods"):
        found[f"methods/{name}.html"] = functools.partial(method_page, name)
    for name in by("area"):
        found[f"areas/{name}.html"] = functools.partial(area_page, name)
    for name in by("venue"):
        found[f"venues/{name}.html"] = functools.partial(venue_page, name)
    for name in by("year"):
        found[f"years/{name}.html"] = functools.partial(year_page, name)
    for name in by_dataset():
        found[f"boards/{name}.html"] = functools.partial(board_page, name)
    return found


def paths() -> list[str]:
    """Every page, from the site's root."""
    return list(routes())


def render(path: str) -> str:
    """One page as HTML.

    Raises:
        UnknownName: for a path that `paths` does not name.
    """
    if path not in routes():
        raise UnknownName("page", path, paths())
    return routes()[path](path)


# -- the pages ---------------------------------------------------------------------------------------------------------


def home(path: str) -> str:
    found = papers().values()
    return page(
        path,
        "home.html",
        "PaperZoo",
        "Papers that run: deep-learning papers, searchable and comparable, with code that is verified.",
        areas=[(area(name), works) for name, works in by("area").items()],
        figures={
            "works": len(found),
            "code": sum(p.has_code for p in found),
            "boards": len(boards.boards()),
            "datasets": len(by_dataset()),
            "tasks": len(by("task")),
        },
        running=[papers()[slug] for slug in _models if slug in papers()],
    )


def paper_page(paper: Paper, path: str) -> str:
    card, steps = dict.fromkeys(OPTIONAL) | paper.card, status().get(paper.slug, {})
    text = paper.path / "notes.md"
    root = "../" * path.count("/")
    flops = steps.get("builds", {}).get("figures", {}).get("flops", {})
    return page(
        path,
        "paper.html",
        card["name"],
        card["summary"],
        paper=paper,
        card=card,
        steps=[(name, steps.get(name, {"state": "not yet", "text": ""})) for name in LETTERS] if paper.has_code else [],
        level=level(paper.slug),
        notes=Markup(notes.as_html(text.read_text(encoding="utf-8"), linker(paper, root))) if text.exists() else "",
        variants=[{"input": None} | v | {"flops": flops.get(v["name"])} for v in paper.variants],
        headline=[
            ({"setting": "", "unconfirmed": False} | row, standing(paper, row)) for row in card.get("headline", [])
        ],
        measured=measured(paper),
        model=_models.get(paper.slug),
        files=[(f, f.stat().st_size, f.read_text(encoding="utf-8").count("\n")) for f in source.files(paper)],
        venue=vocabulary.table("venues").get(venue_id(paper)),
        bibtex=bibtex(paper),
        csl=json.dumps([csl(paper)], indent=2, ensure_ascii=False),
        related=related(paper),
        lists=[(heading, list_ids()[heading]) for heading in card.get("lists") or []],
        edits=history.of(paper.slug),
        in_package=cards.ROOT in paper.path.parents,
    )


def linker(paper: Paper, root: str) -> notes.Link:
    """What a piece of code in a paper's notes points to: a line of its code, else another work."""

    def link(text: str) -> str | None:
        if found := source.place(paper, text):
            return f"{root}{source.page(paper.slug, found[0])}" + (f"#L{found[1]}" if found[1] else "")
        slug = text.rsplit("/", 1)[-1] if re.fullmatch(r"[a-z_]+/[a-z0-9_]+", text) else text
        if slug in papers() and slug != paper.slug:
            return f"{root}papers/{slug}.html"
        other = cards.variants().get(text)
        return f"{root}papers/{other.slug}.html" if other and other.slug != paper.slug else None

    return link


def standing(paper: Paper, result: dict[str, Any]) -> tuple[Board, int, Row] | None:
    """Where a headline result stands: its board, rank and row; None when it is on none."""
    term = vocabulary.resolve("datasets", result["dataset"])
    for board, rank, row in places().get(paper.slug, []) if term else ():
        same = row.setting == result.get("setting", "") and row.shown.startswith(result["value"])
        if board.dataset.id == term.id and same and metric_fits(board, result["metric"]):
            return board, rank, row
    return None


def metric_fits(board: Board, metric: str) -> bool:
    """Whether a result in this metric may stand on the board: under its own name, as a complement, or as a part."""
    term = vocabulary.resolve("metrics", metric)
    if term is None:
        return False
    kin = {term.id, term.complement, term.same_as, *(term.parts or ())}
    kin |= {vocabulary.table("metrics")[k].same_as for k in kin if k in vocabulary.table("metrics")}
    joined = {join["metric"] for join in term.joins or () if isinstance(join, dict)}
    return board.metric.id in kin | joined or board.metric.of in kin


def related(paper: Paper) -> list[tuple[Markup, list[Paper]]]:
    groups = (
        (both("Builds on", "基于"), relations.builds_on(paper.slug)),
        (both("Used by", "被用于"), relations.used_by(paper.slug)),
        (both("Compares with", "可比较"), relations.compares_with(paper.slug)),
        (both("Same task", "同类任务"), relations.same_task(paper.slug, 12)),
    )
    return [(title, [papers()[s] for s in slugs if s in papers()]) for title, slugs in groups if slugs]


def code_page(paper: Paper, file: Path, path: str) -> str:
    root = "../" * path.count("/")
    lines = [source.with_links(line, root) for line in source.highlighted(file, source.stamp(file))]
    code = "\n".join(f'<a id="L{n}" href="#L{n}"></a>{line}' for n, line in enumerate(lines, 1))
    return page(
        path,
        "code.html",
        f"{file.name} of {paper.card['name']}",
        paper=paper,
        file=file,
        code=Markup(code),
        lines=len(lines),
        files=source.files(paper),
        code_path=source.page,
    )


# -- tasks, methods, areas, venues, years ------------------------------------------------------------------------------


def newest(works: Iterable[Paper]) -> list[Paper]:
    return sorted(works, key=lambda p: (-p.card["year"], p.card["name"].lower()))


def tasks(path: str) -> str:
    """All tasks, under the area that most of their works lie in."""
    groups: dict[str, list[tuple[Term, list[Paper]]]] = {}
    for name, term in vocabulary.table("tasks").items():
        works = by("task").get(name, [])
        first = [p for p in works if p.card["tasks"][0] == name] or works
        home_area = Counter(p.area for p in first).most_common(1)
        groups.setdefault(home_area[0][0] if home_area else "", []).append((term, works))
    ordered = [(area(name), sorted(rows, key=lambda r: r[0].name)) for name, rows in sorted(groups.items())]
    return page(path, "index_of.html", "Tasks", section=path, groups=ordered, folder="tasks", heading=both("Tasks", "任务"))  # fmt: skip


def methods(path: str) -> str:
    rows = [(term, by("method").get(name, [])) for name, term in vocabulary.table("methods").items()]
    rows.sort(key=lambda row: row[0].name.lower())
    heading = both("Methods", "方法")
    return page(path, "index_of.html", "Methods", section=path, groups=[(None, rows)], folder="methods", heading=heading)  # fmt: skip


def task_page(name: str, path: str) -> str:
    term = vocabulary.table("tasks")[name]
    works = newest(by("task").get(name, []))
    found = boards.of_task(name)
    slugs = {p.slug for p in works}
    best = {slug: min(rows, key=lambda r: (r[1], -len(r[0].rows))) for slug in slugs if (rows := on(found, slug))}
    return page(
        path,
        "task.html",
        term.name,
        section="tasks/index.html",
        term_=term,
        works=works,
        boards=found[:BOARDS_SHOWN],
        others=found[BOARDS_SHOWN:],
        rows_shown=ROWS_SHOWN,
        slugs=slugs,
        best=best,
        plot=data.plot(name),
    )


def on(chosen: list[Board], slug: str) -> list[tuple[Board, int, Row]]:
    ids = {(b.dataset.id, b.metric.id) for b in chosen if len({row.slug for row in b.rows}) > 1}
    return [place for place in places().get(slug, []) if (place[0].dataset.id, place[0].metric.id) in ids]


def method_page(name: str, path: str) -> str:
    term = vocabulary.table("methods")[name]
    groups: dict[str, list[Paper]] = {}
    for paper in newest(by("method").get(name, [])):
        groups.setdefault(paper.area, []).append(paper)
    parts = [(both(area(a).name, area(a).zh), a, rows) for a, rows in sorted(groups.items())]
    return works_page(path, term, parts, section="methods/index.html", words_=term.words)


def area_page(name: str, path: str) -> str:
    works = by("area")[name]
    kinds = [(both(k, zh), k, newest(p for p in works if p.card["kind"] == k)) for k, zh in words.KINDS.items()]
    filed = Counter(t for p in works for t in p.card["tasks"][:1])
    return works_page(
        path, area(name), [k for k in kinds if k[2]], about=area(name).about or "", filed=filed.most_common()
    )


def venue_page(name: str, path: str) -> str:
    term = vocabulary.table("venues").get(name, UNPUBLISHED)
    years: dict[int, list[Paper]] = {}
    for paper in newest(by("venue")[name]):
        years.setdefault(paper.card["year"], []).append(paper)
    parts = [(str(year), str(year), rows) for year, rows in years.items()]
    about = term.full if term.full != term.name else ""
    return works_page(path, term, parts, section="venues/index.html", about=about or "")


def year_page(name: str, path: str) -> str:
    groups: dict[str, list[Paper]] = {}
    for paper in sorted(by("year")[name], key=lambda p: p.card["name"].lower()):
        groups.setdefault(paper.area, []).append(paper)
    parts = [(both(area(a).name, area(a).zh), a, rows) for a, rows in sorted(groups.items())]
    years = sorted(by("year"))
    at = years.index(name)
    around = (years[at - 1] if at else "", years[at + 1] if at + 1 < len(years) else "")
    return works_page(path, Term(name, name, "", (), {}), parts, section="venues/index.html", around=around)


def works_page(path: str, term: Term, parts: list, section: str = "", about: str = "", **content: Any) -> str:
    """A heading and works in groups: (title, anchor, works)."""
    content = {"words_": (), "filed": [], "around": ("", "")} | content
    total = len({p.slug for _, _, rows in parts for p in rows})
    return page(path, "works.html", term.name, about, section, term_=term, parts=parts, about=about, total=total, **content)  # fmt: skip


def venues(path: str) -> str:
    rows = [(vocabulary.table("venues").get(name, UNPUBLISHED), works) for name, works in by("venue").items()]
    rows.sort(key=lambda row: (-len(row[1]), row[0].name.lower()))
    years = [(year, len(works)) for year, works in sorted(by("year").items(), reverse=True)]
    return page(path, "venues.html", "Venues and years", section=path, venues=rows, years=years)


# -- leaderboards ------------------------------------------------------------------------------------------------------


def all_boards(path: str) -> str:
    groups: dict[str, list[list[Board]]] = {}
    table = vocabulary.table("tasks")
    for found in by_dataset().values():
        first = next((t for t in found[0].dataset.tasks or () if t in table), "")
        groups.setdefault(first, []).append(found)
    ordered = sorted(groups.items(), key=lambda item: (not item[0], table[item[0]].name if item[0] else ""))
    titled = [(table.get(task), rows) for task, rows in ordered]
    return page(path, "boards.html", "Leaderboards", section=path, groups=titled, total=len(boards.boards()))


def board_page(name: str, path: str) -> str:
    found = by_dataset()[name]
    return page(
        path,
        "board.html",
        f"{found[0].dataset.name} leaderboards",
        section="boards/index.html",
        dataset=found[0].dataset,
        boards=[(b, data.board_plot(b) if len({row.slug for row in b.rows}) > 2 else None) for b in found],
        table=vocabulary.table("tasks"),
    )


# -- readiness, reading, lists, graph, status, about -------------------------------------------------------------------


def readiness_page(path: str) -> str:
    groups: dict[str, list[Paper]] = {name: [] for name in READINESS}
    for paper in papers().values():
        groups[level(paper.slug)[0]].append(paper)
    watched: dict[str, list[Paper]] = {}
    failed = [p for p in groups["to watch"] if p.has_code]
    for paper in groups["to watch"]:
        if not paper.has_code:
            watched.setdefault(paper.area, []).append(paper)
    return page(path, "readiness.html", "Readiness", section=path, groups=groups, failed=failed, watched=watched, level=level)  # fmt: skip


def reading(path: str) -> str:
    groups: dict[str, dict[str, list[Paper]]] = {name: {} for name in words.READING}
    for paper in papers().values():
        groups[paper.card.get("reading") or "none"].setdefault(paper.area, []).append(paper)
    totals = {name: sum(map(len, areas.values())) for name, areas in groups.items()}
    return page(path, "reading.html", "Reading", section=path, groups=groups, totals=totals)


def lists(path: str) -> str:
    """Every heading of the lists with its works, under the list's own name."""
    groups: dict[str, list[tuple[str, str, list[Paper]]]] = {}
    filed: dict[str, list[Paper]] = {}
    for paper in papers().values():
        for heading in paper.card.get("lists") or []:
            filed.setdefault(heading, []).append(paper)
    for heading, anchor in list_ids().items():
        name, _, rest = heading.partition(" > ")
        groups.setdefault(name, []).append((rest or name, anchor, filed[heading]))
    return page(path, "lists.html", "Reading lists", section=path, groups=groups)


def graph(path: str) -> str:
    edges = [(p, [papers()[s] for s in relations.imports(p.slug)]) for p in papers().values() if p.has_code]
    return page(path, "graph.html", "Graph", section=path, graph=data.graph(), edges=[e for e in edges if e[1]])


def status_page(path: str) -> str:
    coded = [p for p in papers().values() if p.has_code]
    rows = [(p, status().get(p.slug, {})) for p in coded]
    states = {name: Counter(steps.get(name, {}).get("state", "not yet") for _, steps in rows) for name in LETTERS}
    without = Counter(p.area for p in papers().values() if not p.has_code and p.card["kind"] != "reading")
    to_read = sum(p.card["kind"] == "reading" for p in papers().values())
    return page(path, "status.html", "Status", section=path, rows=rows, states=states, without=without, to_read=to_read)


def about(path: str) -> str:
    marked = Counter(row.state for rows in places().values() for _, _, row in rows)
    return page(path, "about.html", "About", section=path, results=marked, works=len(papers()))


def not_found(wanted: str, root: str, near: list[Paper]) -> str:
    """What the server says of an address that is no page, with works of a similar name."""
    return templates().get_template("not_found.html").render(
        root=root,
        path="",
        kind="not_found",
        title="Not found · PaperZoo",
        description="Not found",
        section="",
        wanted=wanted,
        near=near,
    )  # fmt: skip
