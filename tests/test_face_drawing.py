"""Drawn faces: people, their pictures, and the scenes that they are pasted into."""

import numpy as np
import pytest
import torch

from paperzoo.data.face_drawing import draw, draw_face, identity_of
from paperzoo.data.face_scenes import PEOPLE, WITH_PERSON, drawn_faces
from paperzoo.data.faces import open_face_detection
from paperzoo.data.scenes import photographs


def test_an_identity_is_a_pure_function_of_its_number():
    identity_of.cache_clear()
    first = identity_of(7)
    identity_of.cache_clear()
    again = identity_of(7)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert identity_of(8).width != first.width


def test_a_drawn_face_follows_from_the_generator():
    pictures = [draw_face(3, torch.Generator().manual_seed(seed), 40) for seed in (5, 5, 6)]
    assert all(torch.equal(a, b) for a, b in zip(pictures[0], pictures[1], strict=True))
    assert not torch.equal(pictures[0][0], pictures[2][0])
    assert draw_face(3, np.random.default_rng(0), 40)[0].shape == (3, 40, 40)


@pytest.mark.parametrize("size", [8, 33, 120])
def test_a_drawn_face_has_its_landmarks_on_it(size):
    for identity in range(8):
        face = draw(identity, np.random.default_rng(identity), size)
        image, alpha, points, (x1, y1, x2, y2) = face.image, face.alpha, face.landmarks, face.box.tolist()
        assert image.dtype == torch.uint8 and image.shape == (3, size, size) and alpha.shape == (size, size)
        assert 0 <= alpha.min() and alpha.max() <= 1 and alpha.mean() > 0.2
        column, row = points.long().clamp(0, size - 1).unbind(1)
        assert alpha[row, column].min() > 0.5
        assert points[0, 0] < points[1, 0] and points[3, 0] < points[4, 0]  # left ones on the left
        assert points[:2, 1].mean() < points[2, 1] < points[3:, 1].mean()
        assert x1 <= points[:, 0].min() and points[:, 0].max() <= x2 and y1 < points[:, 1].min() < y2


def test_a_picture_of_a_face_is_too_small_to_draw():
    with pytest.raises(ValueError, match="8 or more"):
        draw_face(0, np.random.default_rng(0), 4)
    with pytest.raises(ValueError, match="0 or more"):
        identity_of(-1)


def test_scenes_of_two_splits_share_no_person():
    seen = {split: torch.cat([s["identities"] for s in drawn_faces(20, 64, split)]) for split in ("train", "test")}
    for split, (first, count) in PEOPLE.items():
        assert first <= seen[split].min() and seen[split].max() < first + count
    assert not set(seen["train"].tolist()) & set(seen["test"].tolist())


def test_scenes_are_the_same_each_time_and_do_not_depend_on_their_number():
    drawn_faces.cache_clear()
    first, again = drawn_faces(12, 64, "test"), drawn_faces(6, 64, "test")
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=False) for key in a)


def test_scenes_have_faces_inside_of_them_and_some_have_none():
    scenes = drawn_faces(48, 64, "train", max_faces=1)
    assert {len(s["boxes"]) for s in scenes} == {0, 1}
    boxes = torch.cat([s["boxes"] for s in scenes])
    assert boxes.min() >= 0 and boxes.max() <= 64 and (boxes[:, 2:] > boxes[:, :2]).all()
    assert 0 < torch.cat([s["hidden"] for s in scenes]).float().mean() < 0.5


def test_the_photograph_with_a_real_face_is_no_background():
    import skimage.data

    assert np.array_equal(photographs()[WITH_PERSON].permute(1, 2, 0).numpy(), skimage.data.astronaut())


@pytest.mark.parametrize(
    "options", [{"split": "val"}, {"count": 0}, {"size": 20}, {"scale": (0.5, 0.1)}, {"max_faces": 0}]
)
def test_scenes_refuse_what_they_cannot_draw(options):
    with pytest.raises(ValueError, match=r"must be"):
        drawn_faces(**({"count": 2, "size": 64} | options))


def test_subsets_of_the_drawn_faces_are_nested():
    data = open_face_detection("drawn_faces", "test", count=30, size=96)
    subsets = torch.cat([data[i]["subsets"] for i in range(30)])
    assert subsets[:, 2].all() and (subsets[:, 0] <= subsets[:, 1]).all()
    assert 0 < subsets[:, 0].sum() < subsets[:, 1].sum() < len(subsets)
