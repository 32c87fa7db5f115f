"""Interest points: HPatches' layout, embedded pairs, synthetic shapes, homographies, suppression, descriptors, metrics, prediction."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from paperzoo.blocks import homography as planes
from paperzoo.blocks.interest_points import describe, mutual_nearest, strongest, suppress, suppress_boxes
from paperzoo.data.homographies import open_pairs, open_pictures, read_homography, warped_photographs
from paperzoo.data.synthetic_shapes import KINDS, point_map, synthetic_shapes
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError, UnknownName
from paperzoo.papers.correspondence.superpoint.recipe import Config as SuperPointConfig
from paperzoo.papers.correspondence.superpoint.recipe import SuperPointRecipe, mirrored
from paperzoo.tasks.interest_points import Config, InterestPointRecipe, Matches, Points, grey, resized
from paperzoo.tasks.point_matching_metrics import DescriptorMetrics, DetectorMetrics, average_precision, visible

SMALL = Config(
    model="superpoint_slim",
    detector_size=None,
    descriptor_size=None,
    detector_points=30,
    descriptor_points=30,
    threshold=0.0,
    points=30,
)
SHIFT = torch.tensor([[1.0, 0, 5], [0, 1, 3], [0, 0, 1]], dtype=torch.float64)  # five to the right, three down


def picture(path, size=(40, 56), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# -- data ----------------------------------------------------------------------------------------------------------------


def hpatches(root):
    for scene in ("i_bridge", "v_wall"):
        for k in range(1, 7):
            picture(root / scene / f"{k}.ppm", seed=k)
            if k > 1:
                matrix = np.eye(3)
                matrix[0, 2] = k
                np.savetxt(root / scene / f"H_1_{k}", matrix)
    (root / "readme").write_text("not a scene")
    return root


def test_hpatches_pairs_the_first_picture_with_each_other(tmp_path):
    data = open_pairs(hpatches(tmp_path))
    assert len(data) == 10 and [data.kind(0), data.kind(9)] == ["i", "v"]
    item = data[3]
    assert item["homography"][0, 2] == 5 and item["homography"].dtype == torch.float64
    assert item["first"].shape == item["second"].shape == (3, 40, 56)


def test_what_is_wrong_with_hpatches_is_named(tmp_path):
    root = hpatches(tmp_path)
    (root / "v_wall" / "H_1_3").write_text("1 0 0 0 1 0 0 0\n")
    with pytest.raises(DataError, match="v_wall/H_1_3: holds 8 numbers"):
        open_pairs(root)[6]
    (root / "v_wall" / "H_1_3").write_text("1 0 0 0 1 0 zero 0 1\n")
    with pytest.raises(DataError, match="H_1_3: not readable numbers"):
        open_pairs(root)[6]
    (root / "i_bridge" / "4.ppm").unlink()
    with pytest.raises(DataError, match="i_bridge: has no picture 4.ppm"):
        open_pairs(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no scenes"):
        open_pairs(tmp_path / "empty")
    with pytest.raises(DataError, match="no such file"):
        read_homography(tmp_path / "H")
    with pytest.raises(UnknownName, match="warped_photographs"):
        open_pairs("hpatches")


def test_folders_of_pictures(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / split / "a.png")
    assert len(open_pictures(tmp_path, "train")) == 1 and open_pictures(tmp_path)[0].shape == (3, 40, 56)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        open_pictures(tmp_path / "empty")
    with pytest.raises(PaperZooError, match="split 'all'"):
        open_pictures(tmp_path, "all")


def test_embedded_pairs_are_what_their_homographies_say():
    first, second, matrices = warped_photographs(6, (64, 80))
    assert torch.equal(first, warped_photographs(6, (64, 80))[0])
    assert not torch.equal(first, warped_photographs(6, (64, 80), split="test")[0])
    back, inside = planes.warp(second.float(), torch.linalg.inv(matrices).float(), (64, 80))
    for a, b, seen in zip(first.float(), back, inside, strict=True):
        a, b = (x.mean(0)[seen[0]] for x in (a, b))
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.9


# -- synthetic shapes ----------------------------------------------------------------------------------------------------


def test_shapes_follow_from_the_seed():
    a, b = (synthetic_shapes(8, (48, 64), torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1].nan_to_num(-1), b[1].nan_to_num(-1))
    assert a[0].shape == (8, 1, 48, 64) and 0 <= float(a[0].min()) and float(a[0].max()) <= 1
    known = a[1][~a[1][..., 0].isnan()]
    assert bool(((known >= 0) & (known <= torch.tensor([63.0, 47.0]))).all())


@pytest.mark.parametrize("kind", ["ellipses", "noise"])
def test_these_have_no_points(kind):
    assert bool(synthetic_shapes(4, (48, 64), torch.Generator().manual_seed(0), (kind,))[1].isnan().all())


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("ellipses", "noise")])
def test_pictures_change_most_at_their_points(kind):
    """The structure tensor's smaller eigenvalue (a corner's strength) is larger at true points than elsewhere."""
    pictures, points = synthetic_shapes(24, (72, 96), torch.Generator().manual_seed(1), (kind,))
    dx = F.pad(pictures[..., 2:] - pictures[..., :-2], (1, 1))
    dy = F.pad(pictures[..., 2:, :] - pictures[..., :-2, :], (0, 0, 1, 1))
    xx, xy, yy = (F.avg_pool2d(v, 7, 1, 3)[:, 0] for v in (dx * dx, dx * dy, dy * dy))
    least = (xx + yy) / 2 - (((xx - yy) / 2).square() + xy.square()).sqrt()
    inner = torch.zeros(72, 96, dtype=torch.bool)
    inner[6:-6, 6:-6] = True
    at = point_map(points, (72, 96)) & inner
    assert at.sum() > 30
    assert least[at].mean() > 3 * least[~at & inner].mean()


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match="'circle'"):
        synthetic_shapes(1, (48, 64), torch.Generator(), ("circle",))


def test_points_fall_on_their_nearest_pixels():
    nan = float("nan")
    points = torch.tensor([[[0.4, 1.6], [nan, nan], [3.0, 0.0], [9.0, 0.0], [-0.6, 0.0]]])
    assert point_map(points, (3, 4)).nonzero().tolist() == [[0, 0, 3], [0, 2, 0]]


# -- homographies --------------------------------------------------------------------------------------------------------


def test_random_homographies_show_a_part_of_the_picture():
    size = (60, 80)
    ranges = planes.HomographyRange()
    matrices = planes.random_homographies(50, size, ranges, torch.Generator().manual_seed(0))
    corners = planes.transform(torch.linalg.inv(matrices), planes.corners(size).expand(50, 4, 2))
    assert bool((corners > -0.01).all()) and bool((corners < torch.tensor([79.01, 59.01])).all())
    assert corners.std(0).min() > 2
    free = planes.random_homographies(
        50, size, dataclasses.replace(ranges, outside=True, patch=1.0), torch.Generator().manual_seed(0)
    )
    corners = planes.transform(torch.linalg.inv(free), planes.corners(size).expand(50, 4, 2))
    assert not bool((corners > -0.01).all())


def test_without_ranges_a_part_is_enlarged_and_the_whole_stays():
    ranges = planes.HomographyRange(patch=0.5, perspective=0.0, zoom=0.0, angle=0.0)
    matrix = planes.random_homographies(1, (61, 81), ranges)[0]
    a, b = planes.transform(torch.linalg.inv(matrix), torch.tensor([[0.0, 0.0], [80.0, 60.0]]))
    assert torch.allclose(b - a, torch.tensor([40.0, 30.0]), atol=1e-3)
    whole = planes.random_homographies(1, (61, 81), dataclasses.replace(ranges, patch=1.0))[0]
    assert torch.allclose(whole, torch.eye(3), atol=1e-4)


def test_a_shifted_picture():
    x = torch.rand(1, 1, 12, 16)
    moved, inside = planes.warp(x, SHIFT.float()[None], (12, 16))
    assert torch.allclose(moved[0, 0, 3:, 5:], x[0, 0, :-3, :-5], atol=1e-5)
    assert bool(inside[0, 0, 3:, 5:].all()) and inside.sum() == 9 * 11


def test_too_few_or_scattered_matches_give_no_homography():
    points = torch.rand(3, 2)
    assert planes.estimate(points, points)[0] is None
    line = torch.stack([torch.arange(6.0), torch.zeros(6)], 1)
    found, agree = planes.estimate(torch.rand(6, 2) * 100, line * 1e4, threshold=0.1)
    assert found is None or int(agree.sum()) >= 4


def test_corner_error_of_a_shift():
    assert planes.corner_error(SHIFT, torch.eye(3), (48, 64)) == pytest.approx(math.hypot(5, 3))


# -- points --------------------------------------------------------------------------------------------------------------


def test_suppression_keeps_the_highest_and_what_is_far_enough():
    heat = torch.zeros(1, 9, 20)
    heat[0, 4, [2, 4, 6, 12]] = torch.tensor([0.9, 0.8, 0.7, 0.1])
    # 4 is silenced by 2, and so does not silence 6
    assert suppress(heat, 3)[0, 4].nonzero()[:, 0].tolist() == [2, 6, 12]
    assert suppress(heat, 3, rounds=1)[0, 4].nonzero()[:, 0].tolist() == [2, 12]
    assert suppress(torch.zeros(1, 4, 4), 2).sum() == 0
    assert suppress_boxes(heat[0], 7)[4].nonzero()[:, 0].tolist() == [2, 12]


def test_the_strongest_points_away_from_the_border():
    heat = torch.zeros(10, 12)
    heat[0, 0], heat[4, 5], heat[6, 7], heat[5, 9] = 0.9, 0.5, 0.6, 0.01
    places, scores = strongest(heat, 5, least=0.1, border=2)
    assert places.tolist() == [[7, 6], [5, 4]] and scores.tolist() == pytest.approx([0.6, 0.5])
    assert len(strongest(heat, 1)[0]) == 1 and strongest(torch.zeros(10, 12), 5)[0].shape == (0, 2)


def test_descriptors_in_the_middle_of_cells_are_the_cells():
    maps = F.normalize(torch.randn(5, 3, 4), dim=0)
    places = torch.tensor([[3.5, 3.5], [27.5, 19.5], [11.5, 3.5]])
    found = describe(maps, places, 8)
    assert torch.allclose(found, torch.stack([maps[:, 0, 0], maps[:, 2, 3], maps[:, 0, 1]]), atol=1e-5)
    between = describe(maps, torch.tensor([[7.5, 3.5]]), 8)
    assert torch.allclose(between[0], F.normalize(maps[:, 0, 0] + maps[:, 0, 1], dim=0), atol=1e-5)


def test_mutual_neighbours():
    a = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1)
    b = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    pairs, distances = mutual_nearest(a, b)
    assert pairs.tolist() == [[0, 1], [2, 0]] and distances.tolist() == pytest.approx([0.0, 0.0], abs=1e-3)
    assert len(mutual_nearest(a, b[:0])[0]) == 0


# -- metrics -------------------------------------------------------------------------------------------------------------


def test_repeatability_by_hand():
    metrics = DetectorMetrics()
    first = torch.tensor([[10.0, 10.0], [20.0, 20.0], [62.0, 5.0]])  # the last one leaves the second picture
    # the first is 1 pixel off; the last shows nothing of the first picture
    second = torch.tensor([[16.0, 13.0], [40.0, 40.0], [2.0, 2.0]])
    metrics.update(first, second, SHIFT, ((48, 64), (48, 64)), "v")
    found = metrics.compute()
    assert found["repeatability"] == found["repeatability_view"] == pytest.approx(2 / 4)
    assert found["localisation_error"] == pytest.approx(1.0)


def test_no_points_give_no_repeatability():
    metrics = DetectorMetrics()
    metrics.update(torch.zeros(0, 2), torch.zeros(0, 2), SHIFT, ((48, 64), (48, 64)))
    assert metrics.compute() == {}
    metrics.update(torch.full((2, 2), 9.0), torch.zeros(0, 2), SHIFT, ((48, 64), (48, 64)))
    assert metrics.compute() == {"repeatability": 0.0}


def test_perfect_descriptors_have_perfect_scores_and_none_have_none():
    rng = torch.Generator().manual_seed(0)
    first = torch.rand(40, 2, generator=rng) * torch.tensor([50.0, 40.0]) + 2
    moved, seen = visible(first, SHIFT, (48, 64))
    descriptors = torch.eye(40)
    metrics = DescriptorMetrics()
    metrics.update((first, descriptors), (moved[seen], descriptors[seen]), SHIFT, ((48, 64), (48, 64)))
    assert all(value == pytest.approx(1.0) for value in metrics.compute().values())
    metrics = DescriptorMetrics()
    metrics.update((first[:0], descriptors[:0]), (moved, descriptors), SHIFT, ((48, 64), (48, 64)))
    assert set(metrics.compute().values()) == {0.0}


def test_average_precision_counts_what_was_missed():
    distance, right = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([True, False, True])
    assert average_precision(distance, right, 4) == pytest.approx((1 + 2 / 3) / 4)
    assert average_precision(distance, right, 0) == 0.0


# -- use -----------------------------------------------------------------------------------------------------------------


def test_a_resized_picture_and_its_pixels_move_alike():
    x = torch.zeros(1, 40, 60)
    x[0, 20:22, 30:32] = 1
    small, matrix = resized(x, (20, 30))
    assert small[0, 10, 15] > 0.5
    moved = planes.transform(matrix, torch.tensor([[30.5, 20.5]], dtype=torch.float64))
    assert moved.tolist() == [[15.0, 10.0]]


def test_grey_has_the_usual_weights():
    assert grey(torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)).item() == pytest.approx(0.299)


def test_prediction_of_pictures_and_pairs(tmp_path):
    recipe = InterestPointRecipe(SMALL, Runtime())
    a, b = picture(tmp_path / "a.png", (45, 61)), picture(tmp_path / "b.png", (64, 50), seed=1)
    one, two, three = recipe.predict([str(a), f"{a} :: {b}", (Image.open(a), np.asarray(Image.open(b)))])
    assert isinstance(one, Points) and 0 < one.count <= 30
    assert one.descriptors.shape == (one.count, recipe.model.convDb.out_channels)
    assert torch.allclose(one.descriptors.norm(dim=1), torch.ones(one.count), atol=1e-5)
    assert bool((one.places >= 4).all()) and bool((one.places < torch.tensor([57.0, 41.0])).all())
    assert isinstance(two, Matches) and torch.equal(two.pairs, three.pairs)
    assert torch.allclose(two.first.places, one.places)
    assert recipe.draw(str(a), one).width >= 61 and recipe.draw(f"{a} :: {b}", two).width > 111
    with pytest.raises(PaperZooError, match="a pair is"):
        recipe.predict([(a, b, a)])


def test_a_picture_matches_itself():
    recipe = InterestPointRecipe(SMALL, Runtime())
    image = open_pairs("warped_photographs")[0]["first"]
    found = recipe.predict([(image, image)])[0]
    # in places an untrained network's descriptors differ by rounding alone
    assert found.count > 5 and bool(found.agree.all())
    assert torch.allclose(found.homography, torch.eye(3, dtype=torch.float64), atol=1e-4)


def test_both_kinds_of_suppression_keep_points_apart():
    for nms in ("greedy", "boxes"):
        recipe = InterestPointRecipe(dataclasses.replace(SMALL, nms=nms), Runtime())
        points = recipe.predict([open_pairs("warped_photographs")[0]["first"]])[0].places
        apart = torch.cdist(points, points, p=float("inf")) + 99 * torch.eye(len(points))
        assert apart.min() > 4


# -- SuperPoint ----------------------------------------------------------------------------------------------------------


def test_shapes_come_first_and_each_round_labels_anew():
    config = SuperPointConfig(
        model="superpoint_slim", image_size=(72, 96), shapes=4, steps=6, batch_size=2, homographies=2, label_points=9
    )
    recipe = SuperPointRecipe(config, Runtime())
    rounds, taught = [], []
    for _ in range(config.steps):
        rounds.append(recipe.round())
        recipe.runtime.begin()
        recipe.runtime.update(recipe.optimizer, recipe.step(recipe.batch())["loss"])
        recipe.runtime.finish()
        taught.append(recipe.teacher.conv1a.weight.clone())
    assert rounds == [0, 0, 1, 1, 2, 2]
    assert torch.equal(taught[0], taught[1]) and torch.equal(taught[2], taught[3]) and torch.equal(taught[4], taught[5])
    assert not torch.equal(taught[1], taught[2]) and not torch.equal(taught[3], taught[4])
    assert {number for number, _ in recipe.labels} == {2} and all(len(p) <= 9 for p in recipe.labels.values())


def test_mirrored_shapes_keep_their_points():
    pictures, points = synthetic_shapes(3, (48, 64), torch.Generator().manual_seed(2), ("star",))
    plain = point_map(points, (48, 64))
    seen = set()
    for seed in range(12):
        turned, moved = mirrored(pictures, points, torch.Generator().manual_seed(seed))
        axes = next(a for a in ((), (2,), (3,), (2, 3)) if torch.equal(turned, pictures.flip(a)))
        seen.add(axes)
        assert int((point_map(moved, (48, 64)) & plain.flip([a - 1 for a in axes])).sum()) >= 0.9 * int(plain.sum())
    assert len(seen) == 4


def test_sides_must_fit_the_cells():
    with pytest.raises(PaperZooError, match="multiples of 4"):
        SuperPointRecipe(SuperPointConfig(model="superpoint_slim", image_size=(70, 96)), Runtime())
