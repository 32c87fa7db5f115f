"""The catalogue: every card, relations, search, boards, comparisons, citations, exports, the shelf."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from paperzoo.catalog import board, cards, shelf, vocabulary
from paperzoo.catalog.cards import ROOT, Paper, papers
from paperzoo.catalog.cite import bibliography, bibtex, csl, split_name
from paperzoo.catalog.compare import compare
from paperzoo.catalog.export import export_catalog
from paperzoo.catalog.measured import readiness
from paperzoo.catalog.relations import builds_on, compares_with, imports, same_task, unresolved, used_by
from paperzoo.catalog.schema import check
from paperzoo.catalog.search import distance, search, stem, tokens
from paperzoo.catalog.views import VIEWS, bounds, group, select
from paperzoo.errors import PaperZooError, UnknownName

QUERIES = tomllib.loads((Path(__file__).parent / "queries.toml").read_text(encoding="utf-8"))["queries"]
KINDS = {"model": 489, "method": 203, "reading": 111, "technique": 33}
AREAS = {
    "classification": 83, "vision_language": 72, "segmentation": 71, "video": 49, "essays": 38, "medical": 35, "restoration": 35,
    "language": 32, "tools": 32, "detection": 31, "recommendation": 26, "self_supervised": 25, "generation": 23, "optimization": 21,
    "architecture_search": 21, "interpretability": 21, "surveys": 21, "datasets": 20, "science": 18, "ocr": 17, "semi_supervised": 17,
    "compression": 17, "face": 14, "correspondence": 13, "few_shot": 12, "three_d": 10, "anomaly": 10, "augmentation": 8,
    "remote_sensing": 7, "depth": 6, "pose": 6, "domain_adaptation": 5, "multitask": 5, "retrieval": 4, "reinforcement": 4,
    "robustness": 3, "graph": 2, "tabular": 2,
}  # fmt: skip


def plain_title(paper: Paper) -> str:
    return "".join(c for c in paper.card["title"].casefold() if c.isalnum())


# -- the cards ---------------------------------------------------------------------------------------------------------


def test_every_work_is_here():
    assert len(papers()) == 836
    assert Counter(p.area for p in papers().values()) == AREAS
    assert Counter(p.card["kind"] for p in papers().values()) == KINDS


def test_no_work_stands_twice():
    for key in ("arxiv", "url"):
        links = Counter(p.card[key].rstrip("/").lower() for p in papers().values() if p.card.get(key))
        assert [link for link, n in links.items() if n > 1] == []
    assert [t for t, n in Counter(plain_title(p) for p in papers().values()).items() if n > 1] == []


def test_links_have_the_form_of_links():
    for paper in papers().values():
        assert paper.link.startswith(("https://", "http://")) and " " not in paper.link, paper.slug
        code = paper.card.get("code")
        assert code is None or code.startswith("https://"), paper.slug


def test_every_relation_leads_to_a_work():
    assert unresolved(papers().values()) == []


def test_every_area_is_described():
    assert {p.area for p in papers().values()} == set(vocabulary.table("areas"))


def test_names_and_aliases_lead_to_one_work():
    """A slug, and a name, find their own work; no two works claim one name."""
    claimed = Counter(cards.plain(p.card["name"]) for p in papers().values())
    assert [name for name, n in claimed.items() if n > 1 and name] == []


def test_summaries_are_in_both_languages_and_not_shared():
    for key in ("summary", "summary_zh"):
        counted = Counter(p.card[key] for p in papers().values())
        assert [text for text, n in counted.items() if n > 1] == []
    chinese = [p.slug for p in papers().values() if not any("\u4e00" <= c <= "\u9fff" for c in p.card["summary_zh"])]
    assert chinese == []


@pytest.mark.parametrize("kind", ["reading", "not yet"])
def test_notes_say_something(kind):
    """Three to eight sentences about a work to read; a short page about a work whose code is to come."""
    for paper in papers().values():
        if paper.has_code or (paper.card["kind"] == "reading") != (kind == "reading"):
            continue
        text = (paper.path / "notes.md").read_text(encoding="utf-8")
        assert text.startswith("# "), paper.slug
        assert 35 <= len(text.split()) <= 260, paper.slug
        named = {w.strip("`") for w in text.split() if w.startswith("`")}
        assert paper.slug not in named, paper.slug


def test_builds_on_follows_from_imports():
    assert imports("fcn") == ("resnet", "vgg")
    assert builds_on("retinanet")[:2] == ["resnet", "fpn"] or set(builds_on("retinanet")) >= {"resnet", "fpn"}
    assert {"fcn", "fpn", "senet"} <= set(used_by("resnet"))


def test_compares_with_holds_both_ways():
    for slug in papers():
        for other in compares_with(slug):
            assert slug in compares_with(other)


def test_same_task_shares_the_task():
    task = papers()["retinanet"].card["tasks"][0]
    assert same_task("retinanet")
    assert all(task in papers()[other].card["tasks"] for other in same_task("retinanet"))


@pytest.fixture
def a_card(tmp_path):
    """A valid card in a folder of its own, to be damaged."""
    folder = tmp_path / "classification" / "mine"
    folder.mkdir(parents=True)
    text = (ROOT / "segmentation" / "enet" / "card.toml").read_text(encoding="utf-8")
    (folder / "card.toml").write_text(text, encoding="utf-8")

    def damaged(old: str, new: str) -> str:
        assert old in text
        (folder / "card.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(PaperZooError) as error:
            check(Paper("mine", "classification", folder, {}))
        return str(error.value)

    return damaged


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("\nyear = 20", "\nyear = 30", 4, "less than or equal"),
        ('\nkind = "model"', '\nkind = "modle"', None, "'model'"),
        ("\nsummary = ", "\nsumary = ", None, "did you mean 'summary'"),
        ('"real_time_segmentation"', '"realtime_segmentation"', None, "did you mean 'real_time_segmentation'"),
        ("\ntitle = ", "\n# title = ", None, "missing; add: title"),
        ('arxiv = "', 'arxiv = "v', None, "match pattern"),
    ],
)
def test_a_wrong_card_names_file_line_and_fix(a_card, old, new, line, said):
    message = a_card(old, new)
    assert "card.toml:" in message and said in message
    number = int(message.split("card.toml:")[1].split(":")[0])
    assert number >= 1 and (line is None or number == line)


def test_a_wrong_card_is_left_out_and_named_when_asked_for(tmp_path):
    """One half-written card of one's own does not stop the rest."""
    folder = tmp_path / "classification" / "half_written"
    folder.mkdir(parents=True)
    (folder / "card.toml").write_text('name = "Half"\nyear = 2020\n', encoding="utf-8")
    own = os.environ | {"PAPERZOO_PAPERS": str(tmp_path), "PAPERZOO_CACHE": str(tmp_path / "cache")}

    def call(*words):
        return subprocess.run([sys.executable, "-m", "paperzoo", *words], env=own, capture_output=True, text=True)

    listed, shown = call("list", "--area", "depth"), call("show", "half_written")
    assert listed.returncode == 0 and "6 works" in listed.stdout
    assert listed.stderr.count("\n") == 1 and "card.toml:1: title: missing; add: title" in listed.stderr
    assert shown.returncode == 2 and "error: " in shown.stderr and "missing; add: title" in shown.stderr


# -- views and filters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_shows_every_work(view):
    groups = group(papers().values(), view)
    assert {p.slug for found in groups.values() for p in found} == set(papers())


def test_reading_statuses_are_kept():
    assert len(select(reading="checked")) == 25
    assert len(select(reading="to_check")) == 28
    assert len(select(reading="survey")) == 9


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [("2017", 2017, 2016), ("2015-2018", 2018, 2019), (">=2020", 2020, 2019), ("<2015", 2014, 2015)],
)
def test_year_bounds(text, inside, outside):
    assert bounds("year", text)(inside) and not bounds("year", text)(outside)


def test_sizes_are_filtered():
    small = select(parameters="<3M")
    assert small and all(any(v["parameters"] < 3e6 for v in p.variants) for p in small)


@pytest.mark.parametrize(
    "filters",
    [{"area": "detektion"}, {"task": "object detektion"}, {"venue": "CVPRR"}, {"status": "done"}, {"kind": "modle"}],
)
def test_an_unknown_filter_is_answered_with_the_known(filters):
    with pytest.raises(UnknownName, match="did you mean|known"):
        select(**filters)


def test_readiness_needs_verification_and_measurement():
    assert readiness(papers()["wide_resnet"])[0] == "ready"
    assert readiness(papers()["adam"])[0] == "buildable"
    waiting = next(p for p in papers().values() if p.card["kind"] != "reading" and not p.has_code)
    assert readiness(waiting) == ("to watch", "no code yet")


def test_a_failed_step_is_never_ready():
    failed = {"wide_resnet": {"builds": {"state": "passed"}, "matches": {"state": "failed"}}}
    assert readiness(papers()["wide_resnet"], failed) == ("to watch", "matches failed")


# -- search ------------------------------------------------------------------------------------------------------------


def test_judged_queries():
    """All expected works among the first five, for at least nine queries in ten."""
    missed = []
    for row in QUERIES:
        found = [p.slug for p in search(row["q"], 5)]
        if not set(row["want"]) <= set(found):
            missed.append((row["q"], row["want"], found))
    assert len(QUERIES) >= 60
    assert len(missed) <= 0.1 * len(QUERIES), missed


def test_every_name_finds_its_work_first():
    names = [(p.card["name"], p.slug) for p in papers().values()]
    missed = [name for name, slug in names if slug not in [p.slug for p in search(name, 2)]]
    assert missed == []


@pytest.mark.parametrize(
    ("typed", "slug"),
    [
        ("reznet", "resnet"),
        ("retinanett", "retinanet"),
        ("tranformer translation", "transformer"),
        ("detecton object", "retinanet"),
    ],
)
def test_typing_errors_are_forgiven(typed, slug):
    assert slug in [p.slug for p in search(typed, 5)]


def test_british_and_american_are_one():
    assert stem("optimization") == stem("optimisation")
    assert stem("colours") == stem("color")
    assert [p.slug for p in search("image colorization", 5)] == [p.slug for p in search("image colourisation", 5)]


def test_chinese_is_indexed_in_pairs():
    assert tokens("小样本 learning") == ["小样", "样本", "learning"]


@pytest.mark.parametrize(
    ("a", "b", "d"), [("net", "net", 0), ("detecton", "detection", 1), ("form", "from", 1), ("abc", "xyz", 3)]
)
def test_edit_distance(a, b, d):
    assert distance(a, b, 2) == min(d, 3)


def test_filters_narrow_a_search():
    found = search("segmentation", 50, select(area="medical"))
    assert found and {p.area for p in found} == {"medical"}


@pytest.mark.parametrize("query", ["", "   ", "???", "a" * 5000, "\x00", "的", "🦊"])
def test_odd_queries_do_no_harm(query):
    assert len(search(query, 5)) <= 5


def test_search_starts_without_heavy_imports(tmp_path):
    """From the second time on: the first checks the cards and writes the index."""
    code = (
        "import sys; sys.argv = ['paperzoo', 'search', 'CTR']; from paperzoo.__main__ import main; main();"
        "print([m for m in ('torch', 'numpy', 'typer', 'rich', 'pydantic') if m in sys.modules])"
    )
    own = os.environ | {"PAPERZOO_CACHE": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["CTR"],
        ["segmentation", "--area", "medical", "--year", ">=2018"],
        ["detection", "--status=code", "--parameters", "<50M"],
        ["attention", "--task", "图像分类", "--readiness", "ready"],
    ],
)
def test_the_quick_way_prints_what_the_full_one_does(words):
    def call(*more):
        done = subprocess.run(
            [sys.executable, "-m", "paperzoo", "search", *words, *more], capture_output=True, text=True
        )
        return json.loads(done.stdout)

    assert call("--json") == call("--json", "--limit", "20")


def test_the_quick_way_says_what_is_wrong():
    for words in (["x", "--area", "nowhere"], ["qqqqqqqqqqqq"], ["CTR", "--areas", "face"], ["CTR", "--area"]):
        done = subprocess.run([sys.executable, "-m", "paperzoo", "search", *words], capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr


# -- boards ------------------------------------------------------------------------------------------------------------


def test_every_metric_and_data_set_is_in_the_vocabulary():
    rows = [(p.slug, row) for p in papers().values() for row in p.card.get("headline", [])]
    assert [(s, r["metric"]) for s, r in rows if not vocabulary.resolve("metrics", r["metric"])] == []
    assert [(s, r["dataset"]) for s, r in rows if not vocabulary.resolve("datasets", r["dataset"])] == []


@pytest.mark.parametrize("table", ["metrics", "datasets", "venues"])
def test_no_spelling_means_two_things(table):
    owners: dict[str, set[str]] = {}
    for term in vocabulary.table(table).values():
        for word in term.spellings:
            owners.setdefault(vocabulary.spelled(word), set()).add(term.id)
    assert {w: o for w, o in owners.items() if len(o) > 1} == {}


def test_vocabulary_names_only_what_exists():
    metrics, tasks = vocabulary.table("metrics"), vocabulary.table("tasks")
    for term in metrics.values():
        assert term.better in ("higher", "lower", "none") and term.kind in ("quality", "difference", "cost"), term.id
        assert (term.complement or term.same_as or term.id) in metrics, term.id
    for term in vocabulary.table("datasets").values():
        assert set(term.tasks or []) <= set(tasks), term.id


def metric(**facts):
    return vocabulary.Term("m", "m", "", (), {"unit": "%", "better": "higher", "kind": "quality"} | facts)


@pytest.mark.parametrize(
    ("text", "facts", "value"),
    [
        ("96.55%", {}, 96.55),
        ("0.932", {}, 93.2),
        ("31.2 dB", {"unit": "dB"}, 31.2),
        ("3.57%", {"better": "lower", "complement": "top1_accuracy"}, 96.43),
        ("1,024 px", {"unit": "px", "better": "lower"}, 1024.0),
        ("2.7e-3", {"unit": "", "better": "lower"}, 0.0027),
        ("as good as before", {}, None),
    ],
)
def test_values_are_brought_to_one_unit(text, facts, value):
    assert board.normalised(text, metric(**facts)) == value


def test_a_board_is_sorted_the_right_way():
    for found in board.boards().values():
        values = [row.value for row in found.rows]
        assert values == sorted(values, reverse=found.better != "lower")


def test_records_only_get_better():
    for found in board.boards().values():
        held = [row.value for row in found.records]
        assert all(board.beats(b, a, found.better) for a, b in zip(held, held[1:], strict=False))
        assert found.records[-1].value == found.rows[0].value


def test_errors_stand_on_the_board_of_the_accuracy():
    found = board.find_boards("CIFAR-10")[0]
    assert found.metric.better == "higher"
    assert any("error" in row.shown for row in found.rows) and all(
        50 < row.value <= 100 for row in found.rows if "error" in row.shown
    )


def test_a_query_may_name_the_metric():
    assert board.find_boards("COCO box AP")[0].metric.id == board.find_boards("COCO", "box AP")[0].metric.id


def test_an_unknown_board_is_answered_with_the_known():
    with pytest.raises(UnknownName, match="did you mean"):
        board.find_boards("Cityscape")
    with pytest.raises(UnknownName, match="metric on COCO"):
        board.find_boards("COCO", "BLEU-9")


def test_the_record_is_drawn(tmp_path):
    from PIL import Image

    done = subprocess.run(
        [sys.executable, "-m", "paperzoo", "board", "Cityscapes", "--picture", str(tmp_path / "r.png")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "█" in done.stdout and Image.open(tmp_path / "r.png").size[0] > 500


# -- compare, cite, export ---------------------------------------------------------------------------------------------


def test_compare_shows_what_differs():
    data = compare([papers()[s] for s in ("resnet", "senet", "vgg")])
    assert (
        "residual connections" in data["methods"]["only"]["resnet"] + data["methods"]["shared"]
        or data["methods"]["only"]["senet"]
    )
    assert "senet builds on resnet" in data["relations"]
    first = data["papers"][0]["models"][0]
    assert first["parameters"] > 1e6 and first["flops"] > 1e9


def test_compare_wants_two():
    with pytest.raises(PaperZooError, match="two or more"):
        compare([papers()["resnet"]])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Kaiming He", ("Kaiming", "He")),
        ("Laurens van der Maaten", ("Laurens", "van der Maaten")),
        ("Max Jaderberg Jr.", ("Max", "Jaderberg Jr.")),
        ("OpenMMLab", ("", "OpenMMLab")),
    ],
)
def test_names_are_split(name, parts):
    assert split_name(name) == parts


def test_citation_keys_are_unique():
    keys = Counter(csl(p)["id"] for p in papers().values())
    assert [k for k, n in keys.items() if n > 1] == []


def test_every_work_has_a_balanced_bibtex_entry():
    for paper in papers().values():
        entry = bibtex(paper)
        assert entry.startswith("@") and entry.count("{") == entry.count("}"), paper.slug
        assert "title = {{" in entry and "year = {" in entry and "url = {" in entry, paper.slug


def test_a_journal_is_an_article():
    assert bibtex(papers()["swin_unet"]).startswith("@")
    journals = [p for p in papers().values() if p.card.get("venue") == "TPAMI"]
    assert all(bibtex(p).startswith("@article{") and "journal = {IEEE Transactions" in bibtex(p) for p in journals)


def test_csl_has_what_reference_managers_read():
    items = json.loads(bibliography(papers().values(), "csl"))
    assert len(items) == len(papers())
    allowed = {"paper-conference", "article-journal", "article", "webpage"}
    for item in items:
        assert item["type"] in allowed and item["title"] and item["issued"]["date-parts"][0][0] > 1900


def test_export_json(tmp_path):
    data = json.loads(export_catalog(papers().values(), tmp_path / "c.json").read_text(encoding="utf-8"))
    assert len(data["papers"]) == 836 and data["boards"]
    assert {"builds_on", "readiness", "notes", "bibtex"} <= data["papers"][0].keys()


def test_export_csv(tmp_path):
    with export_catalog(papers().values(), tmp_path / "c.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 836
    assert next(r for r in rows if r["slug"] == "resnet")["summary_zh"] == papers()["resnet"].card["summary_zh"]


def test_export_sqlite(tmp_path):
    base = sqlite3.connect(export_catalog(papers().values(), tmp_path / "c.sqlite"))
    assert base.execute("select count(*) from papers").fetchone() == (836,)
    found = base.execute("select other from relations where slug = 'fcn' and relation = 'builds_on'").fetchall()
    assert ("vgg",) in found
    base.close()


def test_export_refuses_an_unknown_ending(tmp_path):
    with pytest.raises(PaperZooError, match="say the format"):
        export_catalog(papers().values(), tmp_path / "c.xlsx")


# -- the shelf ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_shelf(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERZOO_SHELF", str(tmp_path / "shelf.sqlite"))
    return tmp_path / "shelf.sqlite"


def test_the_shelf_keeps_marks_tags_and_notes(own_shelf):
    shelf.mark(["ResNet", "fpn"], "to read")
    shelf.tag("resnet", ["thesis", "backbone"])
    shelf.tag("resnet", ["-backbone"])
    shelf.note("resnet", "shortcuts need no parameters")
    found = shelf.entries(slug="resnet")[0]
    assert (found["mark"], found["tags"]) == ("to read", ["thesis"])
    assert [n["text"] for n in found["notes"]] == ["shortcuts need no parameters"]
    assert [e["slug"] for e in shelf.entries(with_tag="thesis")] == ["resnet"]
    assert {e["slug"] for e in shelf.entries("to read")} == {"resnet", "fpn"}


def test_tagging_keeps_the_mark(own_shelf):
    shelf.mark(["resnet"], "reading")
    shelf.tag("resnet", ["x"])
    assert shelf.entries(slug="resnet")[0]["mark"] == "reading"


def test_an_unknown_mark_changes_nothing(own_shelf):
    with pytest.raises(PaperZooError, match="to read, reading, read, to try"):
        shelf.mark(["resnet"], "liked")
    assert shelf.entries() == []


def test_removing_what_is_not_there_removes_nothing(own_shelf):
    shelf.mark(["resnet"], "read")
    with pytest.raises(PaperZooError, match="not on the shelf"):
        shelf.remove(["resnet", "fpn"])
    assert [e["slug"] for e in shelf.entries()] == ["resnet"]


def test_a_shelf_goes_out_and_comes_back(own_shelf, tmp_path, monkeypatch):
    shelf.mark(["resnet"], "read")
    shelf.tag("resnet", ["a"])
    shelf.note("resnet", "one")
    assert shelf.export_shelf(tmp_path / "s.json") == 1
    before = shelf.entries()
    monkeypatch.setenv("PAPERZOO_SHELF", str(tmp_path / "other.sqlite"))
    assert shelf.import_shelf(tmp_path / "s.json") == 1
    assert shelf.import_shelf(tmp_path / "s.json") == 1  # twice does no harm
    after = shelf.entries()
    assert [(e["mark"], e["tags"], e["notes"], e["added"]) for e in after] == [
        (e["mark"], e["tags"], e["notes"], e["added"]) for e in before
    ]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"entries": [{"slug": "resnet"}]}',
        '{"entries": [{"slug": "nothing", "tags": [], "notes": [], "added": 0}]}',
    ],
)
def test_a_wrong_shelf_file_changes_nothing(own_shelf, tmp_path, content):
    shelf.mark(["fpn"], "read")
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(PaperZooError, match="bad.json"):
        shelf.import_shelf(tmp_path / "bad.json")
    assert [e["slug"] for e in shelf.entries()] == ["fpn"]


def test_a_damaged_shelf_is_named(own_shelf):
    own_shelf.write_text("this is no database, it is a text that somebody put here by mistake")
    with pytest.raises(PaperZooError, match="shelf.sqlite"):
        shelf.entries()


def test_a_newer_shelf_is_refused(own_shelf):
    shelf.mark(["fpn"], "read")
    base = sqlite3.connect(own_shelf)
    base.execute("pragma user_version = 99")
    base.close()
    with pytest.raises(PaperZooError, match="newer PaperZoo"):
        shelf.entries()


def write_many(number: int) -> None:
    for i in range(20):
        shelf.note("resnet", f"note {number}.{i}")


def test_several_processes_write_at_once(own_shelf):
    workers = [multiprocessing.get_context("spawn").Process(target=write_many, args=(n,)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert len(shelf.entries(slug="resnet")[0]["notes"]) == 60


def test_entries_of_works_that_are_gone_are_kept(own_shelf):
    shelf.mark(["fpn"], "read")
    with shelf.opened() as base:
        shelf.touch(base, "a_work_that_was_renamed", "read")
    assert {e["slug"] for e in shelf.entries()} == {"fpn", "a_work_that_was_renamed"}
    done = subprocess.run([sys.executable, "-m", "paperzoo", "shelf"], capture_output=True, text=True)
    assert done.returncode == 0 and "a_work_that_was_renamed" in done.stdout and "(no longer" in done.stdout


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_fingerprint_covers_what_a_paper_imports_and_the_models_it_names():
    from paperzoo.catalog.fingerprint import SOURCE, closure

    def parts(slug):
        files = [p for p in papers()[slug].path.iterdir() if p.suffix == ".py"]
        return {p.relative_to(SOURCE).as_posix() for p in closure(files)}

    assert {"tasks/detection.py", "blocks/boxes.py", "papers/detection/fpn/model.py"} <= parts("retinanet")
    assert "papers/classification/resnet/model.py" in parts("random_erasing")  # by its name in the recipe alone


def test_fingerprint_changes_with_the_code_but_not_with_the_notes(tmp_path):
    import dataclasses
    import shutil

    from paperzoo.catalog.fingerprint import fingerprint

    paper = papers()["random_erasing"]
    folder = tmp_path / "random_erasing"
    shutil.copytree(paper.path, folder, ignore=shutil.ignore_patterns("__pycache__"))
    copy = dataclasses.replace(paper, path=folder)
    before = fingerprint(copy)
    (folder / "notes.md").write_text("other words")
    assert fingerprint(copy) == before
    (folder / "technique.py").write_text((folder / "technique.py").read_text() + "\nlater = 1\n")
    assert fingerprint(copy) != before
