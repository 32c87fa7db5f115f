"""Panoptic maps, COCO's panoptic layout, the embedded scenes, pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.blocks.panoptic import PanopticMap, Segment, ids_to_rgb, numbered, panoptic_map, rgb_to_ids
from paperzoo.data.panoptic import open_panoptic
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.panoptic_pictures import drawn_map

IDS = torch.tensor([[0, 7, 7], [300, 300, 7], [300, 70_000, 70_000]])


def test_a_map_counts_areas_and_knows_its_segments():
    found = panoptic_map(IDS, {7: 2, 300: 0, 70_000: 1, 5: 0}, things={0, 1}, crowds=[300], scores={7: 0.5})
    assert [(s.id, s.area, s.thing, s.crowd, s.score) for s in found.segments] == [
        (7, 3, False, False, 0.5),
        (300, 3, True, True, None),
        (70_000, 2, True, False, None),
    ]
    assert found.semantic.tolist() == [[-1, 2, 2], [0, 0, 2], [0, 1, 1]]


def test_ids_without_a_segment_are_named():
    with pytest.raises(ValueError, match="id 300, which has no category"):
        panoptic_map(IDS, {7: 2, 70_000: 1}, things=())
    with pytest.raises(ValueError, match="id 300, which no segment describes"):
        numbered(PanopticMap(IDS, (Segment(7, 2, False, 3), Segment(70_000, 1, True, 2))))


def test_ids_are_colours_and_back():
    assert ids_to_rgb(torch.tensor([[70_000]])).flatten().tolist() == [112, 17, 1]  # 112 + 17 * 256 + 65536
    assert torch.equal(rgb_to_ids(ids_to_rgb(IDS)), IDS)


def write(folder, **changes):
    """A set in COCO's panoptic layout with one picture."""
    for place in ("annotations/panoptic_val2017", "val2017"):
        (folder / place).mkdir(parents=True)
    Image.fromarray(np.zeros((3, 3, 3), dtype=np.uint8)).save(folder / "val2017" / "a.png")
    picture = ids_to_rgb(IDS).permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(folder / "annotations" / "panoptic_val2017" / "a.png")
    segments = [
        {"id": 7, "category_id": 90, "iscrowd": 0},
        {"id": 300, "category_id": 1, "iscrowd": 1},
        {"id": 70_000, "category_id": 3, "iscrowd": 0},
    ]
    content = {
        "categories": [
            {"id": 90, "name": "sky", "isthing": 0},
            {"id": 1, "name": "cat", "isthing": 1},
            {"id": 3, "name": "dog", "isthing": 1},
        ],
        "images": [{"id": 4, "file_name": "a.png"}],
        "annotations": [{"image_id": 4, "file_name": "a.png", "segments_info": segments}],
    }
    file = folder / "annotations" / "panoptic_val2017.json"
    file.write_text(json.dumps(content | changes))
    return file


def test_cocos_layout_is_read(tmp_path):
    write(tmp_path)
    data = open_panoptic(tmp_path, "test")
    item = data[0]
    assert data.labels == ["cat", "dog", "sky"] and data.things == {0, 1}
    assert torch.equal(item["map"].ids, IDS) and item["image"].shape == (3, 3, 3) and item["id"] == 4
    assert item["map"].semantic.tolist() == [[-1, 2, 2], [0, 0, 2], [0, 1, 1]]
    assert [s.crowd for s in item["map"].segments] == [False, True, False]


def test_what_does_not_fit_is_named(tmp_path):
    segments = [{"id": 7, "category_id": 90}, {"id": 300, "category_id": 1}]
    file = write(tmp_path, annotations=[{"image_id": 4, "file_name": "a.png", "segments_info": segments}])
    with pytest.raises(DataError, match="a.png.*id 70000, which has no category"):
        open_panoptic(tmp_path, "test")[0]
    unknown = [{"id": 7, "category_id": 55}]
    content = json.loads(file.read_text()) | {
        "annotations": [{"image_id": 4, "file_name": "a.png", "segments_info": unknown}]
    }
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="image 4: a segment needs id and a known category_id"):
        open_panoptic(tmp_path, "test")[0]
    file.write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(DataError, match="no panoptic file"):
        open_panoptic(tmp_path, "test")
    with pytest.raises(DataError, match="no panoptic annotations for the split 'train'"):
        open_panoptic(tmp_path, "train")
    with pytest.raises(DataError, match="no such folder"):
        open_panoptic(tmp_path / "nothing")
    with pytest.raises(PaperZooError, match="train or test"):
        open_panoptic("panoptic_scenes", "val")


def test_the_embedded_scenes_have_things_on_two_grounds():
    data = open_panoptic("panoptic_scenes", "train", count=16, size=48)
    stuff = set(range(len(data.labels))) - data.things
    for i in range(16):
        item = data[i]
        grounds = {s.category for s in item["map"].segments if not s.thing}
        assert 1 <= len(grounds) <= 2 and grounds <= stuff
        assert sum(s.area for s in item["map"].segments) == int((item["map"].ids > 0).sum())
    assert any(s.crowd for i in range(16) for s in data[i]["map"].segments)
    other = open_panoptic("panoptic_scenes", "test", count=16, size=48)
    assert not torch.equal(other[0]["image"], data[0]["image"])


def test_a_picture_of_a_map_has_a_legend():
    found = panoptic_map(IDS, {7: 2, 300: 0, 70_000: 1}, things={0, 1})
    image = torch.full((3, 3, 3), 128, dtype=torch.uint8)
    picture = drawn_map(image, found, ["cat", "dog", "sky"])
    assert picture.width == 240 and picture.height == 240 + 14
    assert np.asarray(picture)[20, 20].tolist() == [128, 128, 128]  # void stays as it is
