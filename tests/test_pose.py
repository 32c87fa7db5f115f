"""Human pose: readers of the field's formats, the drawn figures, heat maps, crops, metrics, predictions."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.blocks.heatmaps import flip_back, gaussian_heatmaps, maxima, peaks, quarter_offset, taylor_offset
from paperzoo.data.poses import open_poses, people
from paperzoo.data.skeletons import COCO, CROWDPOSE, MPII, OPENPOSE, Skeleton, skeleton_of, translate
from paperzoo.data.stick_figures import stick_figures
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.multi_pose import collate
from paperzoo.tasks.pose import image_and_boxes
from paperzoo.tasks.pose_boxes import Boxes
from paperzoo.tasks.pose_crops import apply, centre_and_scale, crop, crop_matrix, inverse, mirrored
from paperzoo.tasks.pose_metrics import oks, oks_ap, oks_nms, pckh

# -- COCO ------------------------------------------------------------------------------------------------------------------


def annotation(number: int, image: int, points: list, **changed) -> dict:
    full = points + [0] * (51 - len(points))
    row = {"id": number, "image_id": image, "category_id": 1, "bbox": [10, 20, 30, 40], "area": 600.0, "iscrowd": 0}
    return row | {"keypoints": full, "num_keypoints": sum(v > 0 for v in full[2::3])} | changed


def coco(folder, annotations: list, **changed):
    """A tiny data set in COCO's layout; returns its folder."""
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "images" / "train2017").mkdir(parents=True, exist_ok=True)
    for name in ("000000000007.jpg", "000000000009.jpg"):
        Image.new("RGB", (80, 64), "grey").save(folder / "images" / "train2017" / name)
    content = {
        "images": [
            {"id": 7, "file_name": "000000000007.jpg", "width": 80, "height": 64},
            {"id": 9, "file_name": "000000000009.jpg", "width": 80, "height": 64},
        ],
        "annotations": annotations,
        "categories": [
            {
                "id": 1,
                "name": "person",
                "keypoints": list(COCO.names),
                "skeleton": [[a + 1, b + 1] for a, b in COCO.limbs],
            }
        ],
    }
    (folder / "annotations" / "person_keypoints_train2017.json").write_text(json.dumps(content | changed))
    return folder


def test_coco_people_with_keypoints_crowds_and_missing_areas(tmp_path):
    crowd = annotation(4, 9, [], iscrowd=1, bbox=[40, 0, 40, 32], segmentation={"counts": [0, 5120], "size": [64, 80]})
    bare = annotation(3, 9, [], segmentation=[[0, 0, 20, 0, 20, 20, 0, 20]])
    first = annotation(1, 9, [15, 25, 2, 12, 22, 1])
    without_area = annotation(2, 7, [15, 25, 2])
    del without_area["area"]
    data = open_poses(coco(tmp_path, [first, without_area, bare, crowd]), "train")
    assert data.skeleton == COCO and len(data) == 2
    assert data.people.image.tolist() == [0, 1, 1, 1]
    assert float(data.people.area[0]) == pytest.approx(0.53 * 1200)
    item = data[1]
    assert item["visible"][0, :3].tolist() == [2, 1, 0] and item["keypoints"][0, 1].tolist() == [12, 22]
    assert item["boxes"][0].tolist() == [10, 20, 40, 60] and item["crowd"].tolist() == [False, False, True]
    assert data.people.learnable().tolist() == [0, 1]
    assert not item["mask"].any()  # the crowd's segment covers the whole picture
    assert bool(data[0]["mask"].all()) and data[0]["id"] == 7


def test_coco_polygon_of_a_person_without_keypoints_is_masked(tmp_path):
    data = open_poses(coco(tmp_path, [annotation(3, 9, [], segmentation=[[0, 0, 20, 0, 20, 10, 0, 10]])]), "train")
    mask = data[1]["mask"]
    assert not mask[:10, :20].any() and bool(mask[12:].all()) and bool(mask[:, 22:].all())


def test_an_image_without_people_is_legal(tmp_path):
    data = open_poses(coco(tmp_path, [annotation(1, 9, [15, 25, 2])]), "train")
    assert data[0]["keypoints"].shape == (0, 17, 2) and bool(data[0]["mask"].all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 8}, "annotation 5: image_id 8"),
        ({"keypoints": [1, 2, 2]}, "annotation 5: keypoints has 3 numbers, 51"),
        ({"keypoints": [1, 2, 3] * 17}, "annotation 5: a keypoint's visibility"),
        ({"bbox": [0, 0, 5]}, "annotation 5: needs image_id, bbox"),
        ({"bbox": [0, 0, -5, 5]}, "annotation 5: bbox or keypoints"),
    ],
)
def test_a_wrong_coco_annotation_is_named(tmp_path, change, words):
    with pytest.raises(DataError, match=words) as caught:
        open_poses(coco(tmp_path, [annotation(5, 9, [15, 25, 2]) | change]), "train")
    assert "person_keypoints_train2017.json" in str(caught.value)


def test_coco_without_keypoint_names_is_refused(tmp_path):
    folder = coco(tmp_path, [], categories=[{"id": 1, "name": "person"}])
    with pytest.raises(DataError, match="person_keypoints"):
        open_poses(folder, "train")


def test_a_picture_of_another_size_is_refused(tmp_path):
    data = open_poses(coco(tmp_path, [annotation(1, 7, [15, 25, 2])]), "train")
    Image.new("RGB", (40, 40)).save(data.path(0))
    with pytest.raises(DataError, match="80x64"):
        data[0]


def test_a_damaged_picture_is_named(tmp_path):
    data = open_poses(coco(tmp_path, [annotation(1, 7, [15, 25, 2])]), "train")
    with open(data.path(0), "wb") as file:
        file.write(b"\xff\xd8 cut short")
    with pytest.raises(DataError, match="000000000007"):
        data[0]


def test_own_keypoints_in_cocos_format(tmp_path):
    names = ["nose", "left_paw", "right_paw"]
    category = {"id": 1, "name": "dog", "keypoints": names, "skeleton": [[1, 2], [1, 3]]}
    row = annotation(1, 9, []) | {"keypoints": [1, 2, 2, 3, 4, 1, 0, 0, 0]}
    data = open_poses(coco(tmp_path, [row], categories=[category]), "train")
    assert data.skeleton.flip == [0, 2, 1] and data.skeleton.limbs == ((0, 1), (0, 2))
    assert data.skeleton.sigmas == (0.026, 0.05, 0.05)


def test_a_folder_of_no_known_layout_is_refused(tmp_path):
    with pytest.raises(DataError, match="person_keypoints_train"):
        open_poses(tmp_path, "train")
    with pytest.raises(DataError, match="stick_figures"):
        open_poses(tmp_path / "missing" / "folder", "train")
    with pytest.raises(PaperZooError, match="train or test"):
        open_poses("stick_figures", "val")


# -- MPII ------------------------------------------------------------------------------------------------------------------


def mpii_rows() -> list[dict]:
    joints = [[10.0 + k, 20.0 + 2 * k] for k in range(16)]
    row = {"image": "a.jpg", "center": [60.0, 50.0], "scale": 0.4, "joints": joints, "joints_vis": [1] * 15 + [0]}
    return [row, row | {"image": "b.jpg", "scale": 0.5}]


def mpii(folder, rows, heads=None):
    (folder / "annot").mkdir()
    (folder / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (120, 100)).save(folder / "images" / name)
    (folder / "annot" / "valid.json").write_text(json.dumps(rows))
    if heads is not None:
        from scipy.io import savemat

        savemat(folder / "annot" / "gt_valid.mat", {"headboxes_src": heads})
    return folder


def test_mpii_rows_count_from_zero_and_keep_the_official_crop(tmp_path):
    data = open_poses(mpii(tmp_path, mpii_rows()), "test")
    assert data.skeleton == MPII and data.people.keypoints[0, 0].tolist() == [9, 19]
    assert data.people.visible[0].tolist() == [2] * 15 + [0]
    centre, scale = centre_and_scale(data.people.boxes, (256, 256))
    # the released code: c[1] + 15 scale - 1, 1.25 scale
    assert torch.allclose(centre, torch.tensor([[59.0, 55.0], [59.0, 56.5]]))
    assert torch.allclose(scale, torch.tensor([[0.5, 0.5], [0.625, 0.625]]))
    assert float(data.people.head_size[0]) == pytest.approx(math.hypot(1, 2))  # from neck to top, without boxes


def test_mpii_head_boxes_give_the_head_size(tmp_path):
    heads = np.zeros((2, 2, 2))
    heads[1] = [[3, 6], [4, 8]]
    data = open_poses(mpii(tmp_path, mpii_rows(), heads), "test")
    assert data.people.head_size.tolist() == pytest.approx([3.0, 6.0])


def test_mpii_head_boxes_of_other_people_are_refused(tmp_path):
    with pytest.raises(DataError, match="headboxes_src"):
        open_poses(mpii(tmp_path, mpii_rows(), np.zeros((2, 2, 3))), "test")


def test_a_wrong_mpii_row_is_named(tmp_path):
    rows = mpii_rows()
    rows[1]["joints"] = rows[1]["joints"][:15]
    with pytest.raises(DataError, match=r"valid\.json: row 2"):
        open_poses(mpii(tmp_path, rows), "test")


def test_the_official_mpii_file(tmp_path):
    from scipy.io import savemat

    point = {"x": 31.0, "y": 41.0, "id": 9, "is_visible": 1.0}
    hidden = {"x": 30.0, "y": 60.0, "id": 8, "is_visible": 0.0}
    person = {
        "x1": 20.0,
        "y1": 30.0,
        "x2": 23.0,
        "y2": 34.0,
        "annopoints": {"point": np.array([point, hidden], dtype=object)},
        "scale": 0.3,
        "objpos": {"x": 40.0, "y": 50.0},
    }
    other = {"x1": 60.0, "y1": 10.0, "x2": 70.0, "y2": 20.0}
    entries = [{"image": {"name": f"{i}.jpg"}, "annorect": np.array([person, other], dtype=object)} for i in range(20)]
    release = {"annolist": np.array(entries, dtype=object), "img_train": np.array([1] * 19 + [0])}
    savemat(tmp_path / "mpii_human_pose_v1_u12_1.mat", {"RELEASE": release})
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.new("RGB", (90, 80)).save(tmp_path / "images" / f"{i}.jpg")
    train, test = (open_poses(tmp_path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (18, 1)
    row = test.people
    assert row.visible[0].nonzero().flatten().tolist() == [8, 9] and row.visible[0, 8:10].tolist() == [1, 2]
    assert row.keypoints[0, 9].tolist() == [30, 40] and float(row.head_size[0]) == pytest.approx(3.0)
    item = test[0]
    assert not item["mask"][9:19, 59:69].any()  # the person without joints, by the head box


def test_a_damaged_mpii_file_is_refused(tmp_path):
    (tmp_path / "mpii_human_pose_v1_u12_1.mat").write_bytes(b"nothing")
    with pytest.raises(DataError, match="MATLAB"):
        open_poses(tmp_path, "train")


# -- skeletons and figures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skeleton", [COCO, MPII, CROWDPOSE, OPENPOSE])
def test_mirroring_a_skeleton_twice_changes_nothing(skeleton):
    flip = skeleton.flip
    assert [flip[k] for k in flip] == list(range(len(skeleton)))
    assert all(skeleton.sigmas[k] == skeleton.sigmas[flip[k]] for k in range(len(skeleton)))
    assert Skeleton.read(json.loads(json.dumps(skeleton.facts()))) == skeleton
    assert skeleton_of(list(skeleton.names)) == skeleton


def test_the_sigmas_are_pycocotools():
    from pycocotools.cocoeval import Params

    assert np.allclose(Params("keypoints").kpt_oks_sigmas, COCO.sigmas)


def test_a_neck_lies_between_the_shoulders():
    points, visible = torch.rand(2, 17, 2), torch.full((2, 17), 2)
    visible[1, 5] = 0
    there, seen = translate(points, visible, COCO, OPENPOSE)
    assert torch.allclose(there[0, 1], (points[0, 5] + points[0, 6]) / 2) and seen[:, 1].tolist() == [2, 0]
    back, _ = translate(there, seen, OPENPOSE, COCO)
    assert torch.equal(back[0], points[0])


def test_figures_follow_from_the_seed_and_differ_between_splits():
    first, again = stick_figures(3, size=64), stick_figures(70, size=64)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again[:3], strict=True))
    train, test = (
        {tuple(s["keypoints"].flatten().tolist()) for s in stick_figures(64, 64, split=k)} for k in ("train", "test")
    )
    assert not train & test and len(train) == 64


def test_figures_lie_in_their_boxes():
    for scene in stick_figures(40, size=64, max_people=3):
        n = len(scene["area"])
        assert scene["keypoints"].shape == (n, 14, 2) and 1 <= n <= 3
        low, high = scene["boxes"][:, None, :2], scene["boxes"][:, None, 2:]
        seen = scene["visible"] > 0
        inside = ((scene["keypoints"] >= low - 1.5) & (scene["keypoints"] <= high + 0.5)).all(2)
        assert bool(inside[seen].all()) and bool((scene["boxes"] >= 0).all()) and bool((scene["boxes"] <= 64).all())
        assert bool((scene["area"] > 0).all()) and bool((scene["head_size"] > 1).all())


def test_crowds_hide_joints_and_leave_people_out():
    visible = torch.cat([s["visible"] for s in stick_figures(128, size=64, max_people=4)])
    shares = [float((visible == v).float().mean()) for v in (0, 1, 2)]
    assert 0.02 < shares[0] < 0.2 and 0.1 < shares[1] < 0.5
    assert bool((visible == 0).all(1).any())


def test_limbs_keep_their_length_in_space():
    from paperzoo.data.stick_figures import articulate

    points, _, _ = articulate(200, torch.Generator().manual_seed(0))
    for a, b in (("shoulder", "elbow"), ("elbow", "wrist"), ("hip", "knee"), ("knee", "ankle")):
        left, right = ((points[f"{s}_{a}"] - points[f"{s}_{b}"]).norm(dim=1) for s in ("left", "right"))
        assert torch.allclose(left, right, atol=1e-5)


@pytest.mark.parametrize("change", [{"size": 10}, {"max_people": 0}, {"split": "val"}, {"scale": (0.9, 0.5)}])
def test_wrong_arguments_of_figures_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change)).split("_")[0]):
        stick_figures(1, **change)


# -- heat maps and crops -----------------------------------------------------------------------------------------------------


def test_a_gaussian_is_one_in_the_middle_and_cut_off():
    maps, weight = gaussian_heatmaps(torch.tensor([[[5.4, 3.6]]]), torch.ones(1, 1), (12, 16), 1.0)
    assert float(maps[0, 0, 4, 5]) == 1.0 and float(maps[0, 0, 4, 6]) == pytest.approx(math.exp(-0.5))
    assert float(maps[0, 0, 4, 9]) == 0.0 and weight.tolist() == [[1.0]]


def test_a_joint_far_outside_does_not_count():
    points = torch.tensor([[[-3.0, 4.0], [-9.0, 4.0], [40.0, 4.0]]])
    maps, weight = gaussian_heatmaps(points, torch.ones(1, 3), (12, 16), 2.0)
    assert weight.tolist() == [[1.0, 0.0, 0.0]] and float(maps[0, 0].max()) < 1 and float(maps[0, 1:].max()) == 0


def test_maxima_of_maps_without_a_positive_value_are_zero():
    place, value = maxima(-torch.ones(1, 2, 4, 4))
    assert place.tolist() == [[[0, 0], [0, 0]]] and value.tolist() == [[-1, -1]]


def test_offsets_point_to_the_true_place():
    true = torch.tensor([[[10.3, 9.7]]])
    maps, _ = gaussian_heatmaps(true, torch.ones(1, 1), (24, 24), 2.0, rounded=False)
    place = maxima(maps)[0]
    assert quarter_offset(maps, place)[0, 0].tolist() == [10.25, 9.75]
    assert torch.allclose(taylor_offset(maps, place), true, atol=0.02)


def test_flipping_back_exchanges_sides():
    maps = torch.arange(12.0).reshape(1, 2, 1, 6)
    assert flip_back(maps, [1, 0], shift=False)[0, 0, 0].tolist() == [11, 10, 9, 8, 7, 6]
    assert flip_back(maps, [1, 0])[0, 0, 0].tolist() == [11, 11, 10, 9, 8, 7]


def test_peaks_are_higher_than_their_neighbours():
    maps = torch.zeros(1, 5, 5)
    maps[0, 1, 1], maps[0, 1, 2], maps[0, 4, 4], maps[0, 3, 0] = 0.9, 0.8, 0.5, 0.05
    assert peaks(maps, 0.1).nonzero().tolist() == [[0, 1, 1], [0, 4, 4]]


def test_a_crop_of_the_mirrored_image_is_the_mirrored_crop_of_its_mirrored_box():
    image = torch.rand(3, 40, 60)
    centre, scale, angle = torch.tensor([[25.0, 20.0]]), torch.tensor([[0.1, 0.1]]), torch.tensor([20.0])
    matrix = mirrored(centre, scale, angle, (16, 16), 60)
    other = crop_matrix(torch.tensor([[34.0, 20.0]]), scale, angle, (16, 16))
    assert torch.allclose(crop(image, matrix, (16, 16)), crop(image.flip(2), other, (16, 16)), atol=1e-4)
    point = torch.tensor([[[25.0, 20.0]]])
    assert torch.allclose(apply(inverse(matrix), point), torch.tensor([[[8.0, 8.0]]]), atol=1e-4)


def test_beyond_the_image_a_crop_is_filled():
    part = crop(
        torch.ones(1, 8, 8),
        crop_matrix(torch.tensor([[-20.0, 0.0]]), torch.full((1, 2), 0.02), torch.zeros(1), (4, 4)),
        (4, 4),
        7.0,
    )
    assert part.unique().tolist() == [7.0]


# -- metrics -----------------------------------------------------------------------------------------------------------------


def test_oks_by_hand():
    true = torch.zeros(1, 2, 2)
    found = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])
    value = oks(found, true, torch.tensor([100.0]), [0.1, 0.2], torch.tensor([[True, True]]))
    assert float(value) == pytest.approx((1 + math.exp(-25 / (2 * 100 * 0.16))) / 2)
    alone = oks(found, true, torch.tensor([100.0]), [0.1, 0.2], torch.tensor([[True, False]]))
    assert float(alone) == 1.0


def test_oks_nms_keeps_the_better_of_two_alike():
    poses = torch.rand(3, 17, 2) * 50
    poses[1] = poses[0] + 0.1
    assert oks_nms(poses, torch.tensor([0.5, 0.9, 0.7]), torch.full((3,), 2500.0), COCO.sigmas, 0.9) == [1, 2]


def scene(places: list, images: list, visible: int = 2) -> SimpleNamespace:
    """People with all 17 keypoints at random about given places, as data to measure against."""
    torch.manual_seed(0)
    rows = [
        {
            "image": i,
            "keypoints": torch.rand(17, 2).numpy() * 40 + place,
            "visible": [visible] * 17,
            "box": [place, place, place + 40, place + 40],
            "area": 1600.0,
        }
        for i, place in zip(images, places, strict=True)
    ]
    table = people(rows, 17)

    class Data(SimpleNamespace):
        def __len__(self) -> int:
            return max(images) + 1

    return Data(people=table, skeleton=COCO)


def test_ap_is_one_for_the_truth_and_falls_with_false_poses():
    data = scene([0, 100, 0], [0, 0, 1])
    found = [
        {"image": int(i), "keypoints": p, "score": 0.9}
        for i, p in zip(data.people.image, data.people.keypoints, strict=True)
    ]
    assert oks_ap(found, data)["AP"] == pytest.approx(1.0)
    wrong = {"image": 1, "keypoints": torch.rand(17, 2) * 40 + 300, "score": 0.95}
    # the false pose comes first: precision 1/2, 2/3, 3/4 at recall 1/3, 2/3, 1; from any recall on the best is 3/4
    assert oks_ap([*found, wrong], data)["AP"] == pytest.approx(0.75, abs=1e-6)
    assert oks_ap([], data)["AP"] == 0.0


def test_ap_counts_a_pose_at_the_thresholds_below_its_similarity():
    data = scene([0], [0])
    moved = data.people.keypoints[0] + torch.tensor([4.0, 0.0])
    similarity = float(oks(moved[None], data.people.keypoints, data.people.area, COCO.sigmas))
    expected = sum(t <= similarity for t in np.linspace(0.5, 0.95, 10)) / 10
    assert 0 < expected < 1
    assert oks_ap([{"image": 0, "keypoints": moved, "score": 1.0}], data)["AP"] == pytest.approx(expected)


def test_people_without_keypoints_do_not_count():
    data = scene([0, 100], [0, 0])
    data.people.visible[1] = 0
    found = [{"image": 0, "keypoints": data.people.keypoints[0], "score": 0.9}]
    assert oks_ap(found, data)["AR"] == pytest.approx(1.0)


def slow_pckh(found, true, counted, head, threshold, left_out):
    right = total = 0
    for n in range(len(found)):
        for k in range(found.shape[1]):
            if counted[n][k] and k not in left_out and head[n] > 0:
                total += 1
                right += math.dist(found[n, k].tolist(), true[n, k].tolist()) <= threshold * float(head[n])
    return right / total


@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_pckh_against_loops(threshold):
    torch.manual_seed(0)
    true = torch.rand(6, 16, 2) * 100
    found, counted = true + torch.randn(6, 16, 2) * 4, torch.rand(6, 16) < 0.8
    head = torch.tensor([10.0, 12, 20, float("nan"), 0, 15])
    value, each = pckh(found, true, counted, head, MPII, threshold)
    assert value == pytest.approx(slow_pckh(found, true, counted, head, threshold, (6, 7))) and 0 < value < 1
    assert set(each) == set(MPII.names)


def test_pckh_by_hand():
    true, found = torch.zeros(1, 16, 2), torch.zeros(1, 16, 2)
    found[0, 0, 0], found[0, 1, 0], found[0, 6, 0] = 5.0, 5.1, 100.0  # exactly half a head; a little more; the pelvis
    value, each = pckh(found, true, torch.ones(1, 16, dtype=torch.bool), torch.tensor([10.0]), MPII)
    assert value == pytest.approx(13 / 14) and each["right_ankle"] == 1.0 and each["right_knee"] == 0.0


# -- boxes, batches, predictions -----------------------------------------------------------------------------------------------


def test_detections_are_read_and_wrong_rows_named(tmp_path):
    data = open_poses(coco(tmp_path, [annotation(1, 7, [15, 25, 2])]), "train")
    rows = [
        {"image_id": 9, "category_id": 1, "bbox": [1, 2, 10, 20], "score": 0.5},
        {"image_id": 9, "category_id": 3, "bbox": [1, 2, 10, 20], "score": 0.5},
        {"image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 20], "score": 0.5},
    ]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(rows))
    boxes = Boxes.read(file, data)
    assert boxes.image.tolist() == [1] and boxes.boxes.tolist() == [[1, 2, 11, 22]]
    file.write_text(json.dumps([*rows, {"image_id": 9, "category_id": 1, "bbox": [1]}]))
    with pytest.raises(DataError, match="detection 4"):
        Boxes.read(file, data)
    file.write_text("[]")
    with pytest.raises(DataError, match="no person"):
        Boxes.read(file, data)


def test_boxes_beside_an_image():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    assert image_and_boxes(image)[1] is None
    assert image_and_boxes((image, [[0, 0, 4, 4]]))[1].tolist() == [[0, 0, 4, 4]]
    assert image_and_boxes((image, []))[1].shape == (0, 4)
    for wrong in ([[0, 0, 4]], [[4, 0, 0, 4]], "here"):
        with pytest.raises(PaperZooError, match="box"):
            image_and_boxes((image, wrong))


def test_images_with_different_numbers_of_people_make_a_batch():
    sample = lambda n: {  # noqa: E731
        "images": torch.zeros(3, 8, 8),
        "mask": torch.ones(8, 8, dtype=torch.bool),
        "keypoints": torch.ones(n, 14, 2),
        "weight": torch.ones(n, 14),
        "boxes": torch.ones(n, 4),
    }
    batch = collate([sample(0), sample(2), sample(1)])
    assert batch["keypoints"].shape == (3, 2, 14, 2) and batch["weight"].sum((1, 2)).tolist() == [0, 28, 14]


@pytest.fixture(scope="module")
def top_down():
    from paperzoo.catalog.cards import find
    from paperzoo.engine.configure import configure
    from paperzoo.engine.loop import Settings
    from paperzoo.engine.run import build

    paper = find("simple_baseline_pose")
    config = configure(
        paper.module("recipe").PRESETS["embedded"], {"figures": 8, "half_body": 0.5, "colour_jitter": 0.2}
    )
    return build(paper, config, Settings(device="cpu"))


def test_learning_crops_carry_their_keypoints(top_down):
    batch = top_down.batch()
    assert batch["images"].shape == (32, 3, 64, 64) and batch["keypoints"].shape == (32, 14, 2)
    inside = ((batch["keypoints"] > -8) & (batch["keypoints"] < 72)).all(2)
    assert float(inside.float().mean()) > 0.5 and set(batch["weight"].unique().tolist()) <= {0.0, 1.0}


def test_predictions_are_in_pixels_of_the_image(top_down):
    data = top_down.open("test")
    item = data[0]
    found, alone, nobody = top_down.predict(
        [(item["image"], item["boxes"].tolist()), item["image"], (item["image"], [])]
    )
    assert len(found.keypoints) == len(alone.keypoints) == 1 and nobody.keypoints == []
    assert np.shape(found.keypoints) == (1, 14, 2) and np.shape(found.keypoint_scores) == (1, 14)
    assert found.boxes[0] == tuple(item["boxes"][0].tolist())
    assert top_down.draw(item["image"], found).width >= 240
    assert top_down.draw(item["image"], nobody).width >= 240


def test_a_perfect_network_scores_one(top_down, monkeypatch):
    """The truth as heat maps, through decoding, crops and both metrics."""
    crops = top_down.test_data
    people_ = crops.data.people
    assert len(people_) == len(crops) <= 32

    def truth(images, centre, scale):
        """The test set is one batch, in order."""
        size, matrix = (
            top_down.config.image_size,
            crop_matrix(centre, scale, torch.zeros(len(centre)), top_down.config.image_size),
        )
        places = apply(inverse(matrix), people_.keypoints)
        maps, _ = gaussian_heatmaps(
            places / 4, (people_.visible > 0).float(), (size[0] // 4, size[1] // 4), 1.0, rounded=False
        )
        found, scores = top_down.decode(maps)
        return apply(matrix, found), scores

    monkeypatch.setattr(top_down, "poses", truth)
    metrics = top_down.evaluate("test")
    assert metrics["AP50"] > 0.99 and metrics["PCKh"] > 0.97


def test_a_detector_gives_the_boxes(top_down, monkeypatch):
    from paperzoo.tasks.detection import Detection
    from paperzoo.tasks.pose_boxes import PersonDetector

    boxes = [(10.0, 10.0, 50.0, 80.0), (5.0, 5.0, 20.0, 20.0), (30.0, 10.0, 60.0, 70.0)]
    found = Detection(boxes, ["person", "dog", "person"], [0.9, 0.8, 0.3], [0, 1, 0])
    detector = PersonDetector.__new__(PersonDetector)
    detector.above = 0.2
    detector.recipe = SimpleNamespace(facts={"labels": ["person", "dog"]}, predict=lambda images: [found])
    monkeypatch.setitem(top_down.__dict__, "person_detector", detector)
    image = top_down.open("test")[0]["image"]
    result = top_down.predict([image])[0]
    assert sorted(result.boxes) == [boxes[0], boxes[2]] and result.scores == sorted(result.scores, reverse=True)
    detector.recipe.facts = {"labels": ["someone", "dog"]}
    assert len(top_down.predict([image])[0].boxes) == 3


@pytest.mark.parametrize(("backbone", "deconvolutions"), [("convnext_tiny", 3), ("resnet18", 3), ("vgg11", 3)])
def test_the_simple_baseline_takes_any_classifier(backbone, deconvolutions):
    from paperzoo import create

    with torch.device("meta"):
        network = create("simple_baseline", backbone=backbone, num_keypoints=5)
        assert network(torch.empty(2, 3, 128, 96)).shape == (2, 5, 32, 24)
    assert len(network.deconv_layers) == 3 * deconvolutions


def test_mirrored_images_give_mirrored_people():
    """A flip test of OpenPose averages maps that agree: the answer for the mirrored image is the mirrored answer."""
    from paperzoo.catalog.cards import find
    from paperzoo.engine.configure import configure
    from paperzoo.engine.loop import Settings
    from paperzoo.engine.run import build

    paper = find("openpose_paf")
    config = configure(paper.module("recipe").PRESETS["embedded"], {"figures": 4, "test_scales": [1.0, 1.5]})
    recipe = build(paper, config, Settings(device="cpu"))
    image = stick_figures(1, size=64)[0]["image"][None]
    with torch.no_grad():
        fields, maps = recipe.averaged(image)
        other_fields, other_maps = recipe.averaged(image.flip(-1))
    assert fields.shape == (1, 26, 64, 64) and maps.shape == (1, 15, 64, 64)
    order = [*CROWDPOSE.flip, 14]
    assert torch.allclose(other_maps.flip(-1)[:, order], maps, atol=1e-5)
    back = other_fields.flip(-1)[:, recipe.mirrored_limbs()].clone()
    back[:, ::2] *= -1
    assert torch.allclose(back, fields, atol=1e-5)
    batch = recipe.batch()
    assert batch["keypoints"].shape[2:] == (14, 2) and batch["mask"].shape == (8, 64, 64)


def test_the_field_of_a_limb_points_along_it():
    from paperzoo.papers.pose.openpose_paf.technique import affinity_fields, confidence_maps

    points = torch.tensor([[[[4.0, 8.0], [28.0, 8.0]], [[16.0, 0.0], [16.0, 31.0]]]])
    field = affinity_fields(points, torch.ones(1, 2, 2), [(0, 1)], (8, 8), 4)
    assert field[0, :, 1, 2].tolist() == [1.0, 0.0] and field[0, :, 5, 3].tolist() == [0.0, 1.0]
    assert field[0, :, 1, 3].tolist() == [0.5, 0.5]  # two limbs cross: the average
    maps = confidence_maps(points, torch.ones(1, 2, 2), (8, 8), 4, 4.0)
    assert maps.shape == (1, 3, 8, 8) and torch.allclose(maps[:, 2], 1 - maps[:, :2].amax(1))


def test_people_are_put_together_from_true_fields():
    from paperzoo.papers.pose.openpose_paf.technique import affinity_fields, assemble, candidates, confidence_maps

    scenes = stick_figures(12, size=96, max_people=2, scale=(0.5, 0.7))
    right = total = 0
    for s in scenes:
        there = (s["visible"] > 0).any(1)
        points, weight = s["keypoints"][there][None], (s["visible"][there] > 0).float()[None]
        maps = confidence_maps(points, weight, (96, 96), 1, 2.0)
        field = affinity_fields(points, weight, CROWDPOSE.limbs, (96, 96), 1, 2.0)[0]
        found, _, _ = assemble(candidates(maps[:, :-1], 0.1, 0.0)[0], field, CROWDPOSE.limbs)
        for p, w in zip(points[0], weight[0], strict=True):
            distance = (found[:, :, :2] - p).norm(dim=2).masked_fill(found[:, :, 2] == 0, 99.0)
            best = ((distance < 2) & (w > 0)).sum(1).max() if len(found) else 0
            right, total = right + int(best), total + int(w.sum())
    assert right / total > 0.85
