"""What the site's scripts are given: the columns of the search, the points of plots, the graph."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import pytest

from paperzoo.catalog import board, relations, vocabulary
from paperzoo.catalog.board import Row
from paperzoo.catalog.cards import papers
from paperzoo.serve import data

STATIC = Path(data.__file__).parent / "static"
LARGEST = {"site.js": 10_000, "search.js": 30_000, "plot.js": 60_000, "graph.js": 80_000}


def unpacked(script: str):
    """The content of one of the scripts below data/."""
    return json.loads(zlib.decompress(base64.b64decode(re.search(r'\]="([^"]+)"', script)[1])))


def test_columns_have_a_value_for_every_work():
    columns = unpacked(data.search_script())
    count = len(papers())
    assert columns["slugs"].split("\n") == list(papers())
    for key in ("names", "titles", "aliases", "keywords", "words", "data"):
        assert len(columns[key].split("\n")) == count, key
    for key in ("years", "venue", "area", "of_tasks", "of_methods", "kind", "ready", "code", "prior", "uses"):
        assert len(columns[key]) == count, key
    assert len(columns["badge"]) == 5 * count
    for key in ("summaries-en", "summaries-zh"):
        assert len(unpacked(data.scripts()[f"data/{key}.js"]).split("\n")) == count


def test_the_search_is_light_and_the_same_each_time():
    scripts = data.scripts()
    assert scripts == data.scripts()
    first = sum(len(scripts[f"data/{name}.js"].encode()) for name in ("search", "summaries-en"))
    print({name: len(text.encode()) for name, text in scripts.items()})
    assert first < 190_000


def test_plots_have_the_rows_of_their_boards():
    for found in board.everything()[:40]:
        drawn = data.board_plot(found)["boards"][0]
        assert [(p["slug"], p["y"], p["year"]) for p in drawn["points"]] == [
            (r.slug, r.value, r.year) for r in found.rows
        ]
        assert [drawn["points"][i]["slug"] for i in drawn["records"]] == [r.slug for r in found.records]
        for axis in drawn["axes"][1:]:
            assert sum(axis in p for p in drawn["points"]) >= 3
    plots = {task: data.plot(task) for task in vocabulary.table("tasks")}
    assert plots["object_detection"]["boards"][0]["label"].startswith("COCO")
    assert all(len(p["boards"]) <= data.BOARDS_A_TASK for p in plots.values() if p)
    json.dumps(plots)


def row(slug: str, setting: str) -> Row:
    return Row(slug, slug, 2020, 1.0, "1", setting, "", "as published")


@pytest.mark.parametrize(
    "slug, setting, expected",
    [
        ("resnet", "ResNet-110, best of five; mean 6.61% (table 6)", "resnet110_cifar"),
        ("resnet", "ResNet-152, one network", "resnet152"),
        ("resnet", "ResNet-1001", None),
        ("resnet", "ensemble of six networks", None),
        ("vgg", "VGG-16, one network", "vgg16"),
        ("retinanet", "ResNet-101-FPN, 800 pixels", "retinanet_resnet101_fpn"),
        ("wide_resnet", "WRN-28-10, no dropout", None),
        ("fcn", "FCN-8s, VGG-16, trained on VOC 2011", "fcn8s_vgg16"),
    ],
)
def test_settings_name_their_variant(slug, setting, expected):
    assert data.variant_of(papers()[slug], setting) == expected


def test_sizes_are_read_from_settings():
    some = board.everything()[0]
    assert data.sizes(row("yolov3", "4.2M parameters, 569M multiply-adds, 22 ms per image"), some) == {
        "parameters": 4_200_000,
        "flops": 569_000_000,
        "fps": 45.45,
    }
    assert data.sizes(row("yolov3", "under 1M parameters, about 3 FPS"), some) == {"fps": 3.0}
    assert data.sizes(row("yolov3", "3.5M parameters besides the embeddings"), some) == {}


def test_graph_has_every_relation_once():
    graph = data.graph()
    slugs = [node[0] for node in graph["nodes"]]
    assert slugs == list(papers())
    edges = {(slugs[a], slugs[b]) for a, b in graph["imports"] + graph["builds"]}
    assert edges == {(slug, other) for slug in papers() for other in relations.builds_on(slug)}
    assert len(edges) == len(graph["imports"]) + len(graph["builds"])
    assert {(slugs[a], slugs[b]) for a, b in graph["imports"]} == {
        (s, o) for s in papers() for o in relations.imports(s)
    }


@pytest.mark.skipif(not (STATIC / "search.js").exists(), reason="needs the bundles: make web")
def test_bundles_are_small():
    for name, most in LARGEST.items():
        assert (STATIC / name).stat().st_size < most, name
