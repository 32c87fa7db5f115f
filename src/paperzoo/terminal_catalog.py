"""What the catalogue's commands print: plain text, quickly, or JSON where a script asks."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperzoo.catalog.cards import Paper, papers
from paperzoo.catalog.status import LETTERS, badge, read_status
from paperzoo.terminal import emit

if TYPE_CHECKING:
    from paperzoo.catalog.board import Board

LEGEND = "B builds, M matches, L learns, D deploys, R reproduces, · does not apply; paperzoo show NAME"


def columns() -> int:
    return shutil.get_terminal_size((120, 24)).columns


def cut(text: str, width: int) -> str:
    """The text in at most so many columns; Chinese characters take two."""
    used, out = 0, []
    for c in text:
        used += 2 if unicodedata.east_asian_width(c) in "WF" else 1
        if used > width:
            return "".join(out[:-1]) + "…"
        out.append(c)
    return "".join(out)


def names(found: list[str], json: bool) -> None:
    emit(found) if json else print("\n".join(found))


def describe(paper: Paper, status: dict[str, Any]) -> dict[str, Any]:
    return {
        "slug": paper.slug,
        "area": paper.area,
        "path": str(paper.path),
        "link": paper.link,
        "has_code": paper.has_code,
        "status": {name: step["state"] for name, step in status.get(paper.slug, {}).items()},
        **paper.card,
    }


def marks(paper: Paper, status: dict[str, Any]) -> str:
    """Five columns: the letters of the steps that were passed; "code" is not there yet, or the work is one to read."""
    if paper.has_code:
        return badge(status.get(paper.slug, {}))
    return "read " if paper.card["kind"] == "reading" else "  -  "


def paper_list(found: list[Paper], json: bool, by: str = "area") -> None:
    from paperzoo.catalog.views import group

    status = read_status()
    groups = group(found, by)
    if json:
        return emit([describe(paper, status) for paper in found])
    width = columns()
    slug_width = min(30, max((len(p.slug) for p in found), default=4)) + 2
    lines = []
    for heading, works in groups.items():
        lines.append(f"{heading} ({len(works)})")
        for paper in works:
            head = f"  {paper.slug:<{slug_width}}{paper.card['year']}  {marks(paper, status)}  "
            lines.append(cut(head + paper.card["summary"], width - 1))
    coded = sum(p.has_code for p in found)
    print("\n".join([*lines, "", f"{len(found)} works, {coded} with code · {LEGEND}"]))


def found_list(found: list[Paper], json: bool) -> None:
    """Search results, best first."""
    status = read_status()
    if json:
        return emit([describe(paper, status) for paper in found])
    width = columns()
    slug_width = max(len(p.slug) for p in found) + 2
    lines = []
    for paper in found:
        head = f"{paper.slug:<{slug_width}}{paper.card['year']}  {marks(paper, status)}  "
        lines.append(cut(head + paper.card["summary"], width - 1))
    print("\n".join([*lines, "", f"{len(found)} found · {LEGEND}"]))


def show(paper: Paper, json: bool) -> None:
    from paperzoo.catalog import vocabulary
    from paperzoo.catalog.measured import READINESS, readiness
    from paperzoo.catalog.relations import builds_on, compares_with, same_task, used_by
    from paperzoo.catalog.shelf import entries, shelf_file

    status = read_status()
    relations = {
        "builds_on": builds_on(paper.slug),
        "used_by": used_by(paper.slug),
        "compares_with": compares_with(paper.slug),
        "same_task": same_task(paper.slug, 12),
    }
    level, why = readiness(paper, status)
    if json:
        return emit(describe(paper, status) | relations | {"readiness": level, "readiness_because": why})
    card, width = paper.card, min(columns(), 120)
    print(f"{card['name']} · {card['title']}")
    authors = [a for a in card.get("authors", []) if a != "others"]
    print(textwrap.shorten(", ".join(authors), width) + (" and others" if "others" in card.get("authors", []) else ""))
    print(f"{card.get('venue') or 'preprint or web'} {card['year']} · {paper.link}")
    print(f"\n{card['summary']}\n{card['summary_zh']}")
    if card.get("mechanism"):
        print("\n" + textwrap.fill(f"How: {card['mechanism']}", width))
    for row in card.get("headline", []):
        mark = "  (unconfirmed)" if row.get("unconfirmed") else ""
        print(f"  {row['dataset']}: {row['metric']} {row['value']}  {row.get('setting', '')}{mark}")
    tasks = [vocabulary.table("tasks")[t] for t in card["tasks"]]
    print("\nTasks     " + ", ".join(f"{t.name} {t.zh}" for t in tasks))
    if card.get("methods"):
        print("Methods   " + ", ".join(vocabulary.table("methods")[m].name for m in card["methods"]))
    if paper.variants:
        print("\nModels")
        longest = max(len(v["name"]) for v in paper.variants) + 2
        for v in paper.variants:
            size = "x".join(map(str, v.get("input") or []))
            print(f"  {v['name']:<{longest}}{v['parameters'] / 1e6:8.2f}M parameters  {size}")
    print(f"\nStatus: {READINESS[level][0]} ({why})")
    if paper.has_code:
        for name in LETTERS:
            step = status.get(paper.slug, {}).get(name, {"state": "not yet", "text": ""})
            print(f"  {name:<12}{step['state']:<9} {step['text']}")
    print("\nRead")
    for name in ("notes.md", "model.py", "technique.py", "recipe.py", "parity.py"):
        if (paper.path / name).exists():
            print(f"  {paper.path / name}")
    if card.get("code"):
        print(f"  the authors' code: {card['code']}")
    print()
    for title, others in relations.items():
        if others:
            print(
                textwrap.fill(
                    f"{title.replace('_', ' ').capitalize():<15}{', '.join(others)}", width, subsequent_indent=" " * 15
                )
            )
    for entry in entries(slug=paper.slug) if shelf_file().exists() else []:
        print("\n" + "\n".join(shelf_lines(entry)))
    run = f"Run it: paperzoo run {paper.slug}   " if paper.has_code else ""
    print(f"\n{run}Cite it: paperzoo cite {paper.slug}")


# -- boards and comparisons --------------------------------------------------------------------------------------------


def all_boards(found: list[Board], json: bool) -> None:
    if json:
        return emit([b.as_data() for b in found])
    for board in found:
        works = len({row.slug for row in board.rows})
        if works > 1:
            holder = board.records[-1]
            print(
                f"{works:>4} works  {board.dataset.name} · {board.metric.name}   record {holder.shown} {holder.name} {holder.year}"
            )
    single = sum(len({row.slug for row in b.rows}) == 1 for b in found)
    print(f"\n{len(found)} boards, {single} of them with one work · paperzoo board DATASET [METRIC]")


def board(found: list[Board], limit: int, picture: Path | None, json: bool) -> None:
    from paperzoo.catalog.board import chart, shown

    first = found[0]
    if picture is not None:
        from paperzoo.engine.pictures import record

        write_picture(record(first), picture)
    if json:
        return emit([b.as_data() for b in found])
    direction = "lower" if first.better == "lower" else "higher"
    print(f"{first.dataset.name} · {first.metric.name} ({direction} is better)")
    about = " · ".join(str(x) for x in (first.dataset.about, first.dataset.url, first.dataset.access) if x)
    if about:
        print(about)
    print()
    name_width = max(len(r.name) for r in first.rows[:limit]) + 2
    for place, row in enumerate(first.rows[:limit], 1):
        value = shown(row.value, first.unit)
        note = " · ".join(x for x in (row.split, row.setting, row.state if row.state != "as published" else "") if x)
        print(cut(f"{place:>3}  {value:>9}  {row.year}  {row.name:<{name_width}}{row.slug:<24}{note}", columns() - 1))
    if len(first.rows) > limit:
        print(f"     … {len(first.rows) - limit} more (--limit {len(first.rows)})")
    print("\nThe record over time")
    print("\n".join("  " + line for line in chart(first, max(10, min(50, columns() - 60)))))
    print("\nValues are as published, by each work's own protocol: read the settings before you compare.")
    if len(found) > 1:
        print("Other metrics: " + ", ".join(f"{b.metric.name} ({len(b.rows)})" for b in found[1:]))
    if picture is not None:
        print(f"wrote {picture}")


def write_picture(image: Any, path: Path) -> None:
    from paperzoo.engine.files import write_atomically
    from paperzoo.errors import PaperZooError

    if path.suffix.lower() != ".png":
        raise PaperZooError(f"{path}: pictures are written as .png")
    write_atomically(path, lambda part: image.save(part, format="PNG"))


def comparison(data: dict[str, Any], json: bool) -> None:
    if json:
        return emit(data)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(columns(), 60 if sys.stdout.isatty() else 120))
    table = Table(box=box.SIMPLE, show_lines=True, pad_edge=False)
    table.add_column("")
    for work in data["papers"]:
        table.add_column(f"[bold]{work['slug']}", overflow="fold", ratio=1)
    for title, cells in comparison_rows(data):
        if any(cells):
            table.add_row(title, *(cell.replace("[", r"\[") for cell in cells))
    console.print(table)
    shared = data["methods"]["shared"]
    print(f"shared methods: {', '.join(shared) or 'none'}")
    for sentence in data["relations"]:
        print(sentence)


def comparison_rows(data: dict[str, Any]) -> list[tuple[str, list[str]]]:
    from paperzoo.catalog.board import shown

    works = data["papers"]
    rows = [
        ("work", [f"{w['name']}, {w['venue'] or 'preprint'} {w['year']}" for w in works]),
        ("in one line", [w["summary"] for w in works]),
        ("mechanism", [w["mechanism"] or "" for w in works]),
        ("only here", [", ".join(data["methods"]["only"][w["slug"]]) for w in works]),
    ]
    for board in data["boards"]:
        cells = []
        for w in works:
            value = board["values"].get(w["slug"])
            star = " (best)" if board["best"] == w["slug"] else ""
            cells.append("" if value is None else shown(value, board["unit"]) + star)
        rows.append((f"{board['dataset']}\n{board['metric']}", cells))
    alone = ["\n".join(f"{h['dataset']}: {h['metric']} {h['value']}" for h in w["headline"][:4]) for w in works]
    rows += [
        ("headline", alone),
        ("models", ["\n".join(model_line(m) for m in w["models"][:6]) for w in works]),
        ("measured", ["\n".join(measured_lines(w["measured"])) for w in works]),
        ("learns", [w["learns"] or "" for w in works]),
        ("status", [", ".join(f"{k} {v}" for k, v in w["status"].items()) for w in works]),
        ("readiness", [f"{w['readiness']} ({w['because']})" for w in works]),
    ]
    return rows


def model_line(model: dict[str, Any]) -> str:
    flops = f", {model['flops'] / 1e9:.3g} GFLOPs" if model.get("flops") else ""
    return f"{model['name']}: {model['parameters'] / 1e6:.3g}M{flops}"


def measured_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, row in rows.items():
        for measure, m in row["measures"].items():
            memory = f", {m['peak_mb']:.0f} MB" if m.get("peak_mb") else ""
            lines.append(
                f"{name}, {measure}: {m['ms']:.3g} ms{memory}, {m['ratio']:.2f} x {row['against'].split(':')[0]}"
            )
    return lines


# -- the shelf ---------------------------------------------------------------------------------------------------------


def shelf(found: list[dict[str, Any]], json: bool) -> None:
    from paperzoo.catalog.shelf import shelf_file

    if json:
        return emit(found)
    for entry in found:
        print("\n".join(shelf_lines(entry)))
    print(
        f"\n{len(found)} on the shelf · {shelf_file()}"
        if found
        else "nothing here yet; paperzoo shelf mark 'to read' NAME"
    )


def shelf_lines(entry: dict[str, Any]) -> list[str]:
    title = papers()[entry["slug"]].card["title"] if entry["slug"] in papers() else "(no longer in the catalogue)"
    tags = " ".join(f"#{t}" for t in entry["tags"])
    lines = [cut(f"{entry['slug']:<26}{entry['mark'] or '':<9}{tags:<20} {title}", columns() - 1)]
    for note in entry["notes"]:
        day = time.strftime("%Y-%m-%d", time.localtime(note["written"]))
        lines += textwrap.wrap(
            f"{day}  {note['text']}", min(columns(), 110), initial_indent="    ", subsequent_indent=" " * 16
        )
    return lines
