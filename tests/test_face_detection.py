"""Face detection: the readers of the field's layouts, WIDER FACE's evaluation, landmarks, the task's recipe."""

import json

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch import nn

from paperzoo.data.faces import open_face_detection
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.face_detection import (
    Config,
    FaceCollate,
    FaceDetectionRecipe,
    Faces,
    Prepared,
    face_metrics,
    flip,
    inclusive_iou,
    judge,
    landmark_errors,
    square_crop,
    wider_ap,
)

# -- WIDER FACE ------------------------------------------------------------------------------------------------------


def picture(path, width=40, height=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 120, np.uint8)).save(path)


WIDER = """0--Parade/a.jpg
4
2 3 10 12 0 0 0 0 0 0
30 20 20 20 2 0 0 1 0 0
5 5 0 7 0 0 0 0 0 0
7 8 1 1 2 0 0 0 0 0
0--Parade/empty.jpg
0
0 0 0 0 0 0 0 0 0 0
1--Riot/b.jpg
1
50 50 9 9 0 0 0 0 0 0
"""
MARKED = """# 0--Parade/a.jpg
2 3 10 12 4.0 5.0 0.0 8.0 5.0 0.0 6.0 8.0 1.0 4.0 11.0 0.0 8.0 11.0 0.0 0.9
20 3 6 6 -1.0 -1.0 -1.0 -1.0 -1.0 -1.0 -1.0 -1.0 -1.0 -1.0 -1.0 -1.0 -1.0 -1.0 -1.0 0.1
# 1--Riot/b.jpg
1 2 3 4
"""


@pytest.fixture
def wider(tmp_path):
    for part in ("train", "val"):
        for name in ("0--Parade/a", "0--Parade/empty", "1--Riot/b"):
            picture(tmp_path / f"WIDER_{part}" / "images" / f"{name}.jpg")
    (tmp_path / "wider_face_split").mkdir()
    for part in ("train", "val"):
        (tmp_path / "wider_face_split" / f"wider_face_{part}_bbx_gt.txt").write_text(WIDER)
    return tmp_path


def cells(values):
    """A MATLAB cell column."""
    out = np.empty((len(values), 1), dtype=object)
    for i, value in enumerate(values):
        out[i, 0] = value
    return out


def write_subsets(root, easy=((1,), (), ()), medium=((1,), (), ()), hard=((1, 4), (), (1,))):
    (root / "ground_truth").mkdir(exist_ok=True)
    for name, (a, empty, b) in {"easy": easy, "medium": medium, "hard": hard}.items():
        column = lambda rows: np.array(rows, dtype=np.uint8).reshape(-1, 1)  # noqa: E731
        content = {
            "event_list": cells(["0--Parade", "1--Riot"]),
            "file_list": cells([cells(["a", "empty"]), cells(["b"])]),
            "gt_list": cells([cells([column(a), column(empty)]), cells([column(b)])]),
        }
        scipy.io.savemat(root / "ground_truth" / f"wider_{name}_val.mat", content)


def test_wider_boxes_are_cut_and_invalid_ones_ignored(wider):
    data = open_face_detection(wider, "train")
    item = data[0]
    assert item["boxes"].tolist() == [[2, 3, 12, 15], [30, 20, 40, 30], [7, 8, 8, 9]]  # without the one of no width
    assert item["ignored"].tolist() == [False, True, False]
    assert not item["has_landmarks"].any() and item["landmarks"].shape == (3, 5, 2)
    assert "subsets" not in item and data.path(0).endswith("WIDER_train/images/0--Parade/a.jpg")


def test_wider_images_without_faces_and_with_none_inside(wider):
    data = open_face_detection(wider, "test")
    assert len(data) == 3
    for i in (1, 2):
        assert data[i]["boxes"].shape == (0, 4) and data[i]["landmarks"].shape == (0, 5, 2)


def test_wider_subsets_of_the_official_lists(wider):
    write_subsets(wider)
    item = open_face_detection(wider, "test")[0]
    assert item["subsets"].tolist() == [[True, True, True], [False, False, False], [False, False, True]]


def test_wider_subset_that_names_a_face_that_is_not_there(wider):
    write_subsets(wider, hard=((9,), (), ()))
    with pytest.raises(DataError, match=r"wider_hard_val.mat: 0--Parade/a.jpg: names face 9"):
        open_face_detection(wider, "test")


def test_wider_subset_of_another_form(wider):
    write_subsets(wider)
    content = {"event_list": cells(["0--Parade"]), "file_list": np.zeros((1, 1)), "gt_list": np.zeros((2, 1))}
    scipy.io.savemat(wider / "ground_truth" / "wider_easy_val.mat", content)
    with pytest.raises(DataError, match=r"wider_easy_val.mat: is no list"):
        open_face_detection(wider, "test")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.replace("2 3 10 12 0 0 0 0 0 0", "2 3 10 12"), "line 3: a face"),
        (lambda s: s.replace("30 20 20 20", "30 x 20 20"), "line 4: a face"),
        (lambda s: s.replace("30 20 20 20", "30 nan 20 20"), "line 4: a face"),
        (lambda s: s.replace("4\n2 3", "four\n2 3"), "line 2: the number of faces in 0--Parade/a.jpg"),
        (lambda s: s.replace("4\n2 3", "3\n2 3"), "line 6: an image's name should stand here"),
        (lambda s: s.replace("1\n50", "5\n50"), "5 faces are announced for 1--Riot/b.jpg, and 1 lines follow"),
        (lambda s: "", "lists no images"),
    ],
)
def test_wider_mistake_is_named_with_its_line(wider, change, words):
    file = wider / "wider_face_split" / "wider_face_train_bbx_gt.txt"
    file.write_text(change(WIDER))
    with pytest.raises(DataError) as caught:
        open_face_detection(wider, "train")
    assert words in str(caught.value) and str(file) in str(caught.value)


def test_landmark_file_is_preferred_to_learn_from(wider):
    (wider / "train").mkdir()
    (wider / "train" / "label.txt").write_text(MARKED)
    data = open_face_detection(wider, "train")
    item = data[0]
    assert item["has_landmarks"].tolist() == [True, False]
    assert item["landmarks"][0].tolist() == [[4, 5], [8, 5], [6, 8], [4, 11], [8, 11]]
    assert not item["landmarks"][1].any()
    assert data[1]["boxes"].tolist() == [[1, 2, 4, 6]] and not data[1]["has_landmarks"].any()
    assert len(open_face_detection(wider, "test")) == 3  # the original annotations


def test_landmark_file_with_its_own_images(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "label.txt").write_text(MARKED)
    with pytest.raises(DataError, match="no folder with the images of 'train'"):
        open_face_detection(tmp_path, "train")
    picture(tmp_path / "train" / "images" / "0--Parade" / "a.jpg")
    assert len(open_face_detection(tmp_path, "train")[0]["boxes"]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 2 3 4\n", "line 1: the first line of an image"),
        ("# a.jpg\n1 2 3\n", "line 2: a face"),
        ("# a.jpg\n1 2 3 4\n1 2 3 b\n", "line 3: a face"),
        ("\n", "lists no images"),
    ],
)
def test_landmark_file_mistake_is_named_with_its_line(tmp_path, text, words):
    picture(tmp_path / "train" / "images" / "a.jpg")
    (tmp_path / "train" / "label.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        open_face_detection(tmp_path, "train")


def test_broken_and_missing_pictures_raise_when_asked_for(wider):
    data = open_face_detection(wider, "train")
    (wider / "WIDER_train" / "images" / "0--Parade" / "a.jpg").write_bytes(b"no picture")
    (wider / "WIDER_train" / "images" / "1--Riot" / "b.jpg").unlink()
    for row, name in ((0, "a.jpg"), (2, "b.jpg")):
        with pytest.raises(DataError, match=name):
            data[row]


# -- CelebA and COCO -------------------------------------------------------------------------------------------------


@pytest.fixture
def celeba(tmp_path):
    for name in ("000001", "000002"):
        picture(tmp_path / "img_celeba" / f"{name}.jpg")
    (tmp_path / "Anno").mkdir()
    (tmp_path / "Anno" / "list_bbox_celeba.txt").write_text(
        "2\nimage_id x_1 y_1 width height\n000001.jpg    2  3  10  12\n000002.jpg    1  1  20  20\n"
    )
    (tmp_path / "Anno" / "list_landmarks_celeba.txt").write_text(
        "2\nlefteye_x …\n000001.jpg  4 5 8 5 6 8 4 11 8 11\n000002.jpg  5 5 15 5 10 10 6 16 14 16\n"
    )
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 2\n")
    return tmp_path


def test_celeba_has_one_marked_face_an_image(celeba):
    train, test = (open_face_detection(celeba, split) for split in ("train", "test"))
    assert len(train) == len(test) == 1
    assert train[0]["boxes"].tolist() == [[2, 3, 12, 15]] and train[0]["has_landmarks"].all()
    assert test[0]["landmarks"][0, 1].tolist() == [15, 5]


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("Anno/list_bbox_celeba.txt", "2  3  10  12", "2  3  10", "line 3"),
        ("Anno/list_landmarks_celeba.txt", "16 14 16", "16 14", "line 4"),
        ("list_eval_partition.txt", "000002.jpg 2", "000002.jpg 7", "line 2"),
    ],
)
def test_celeba_mistake_is_named_with_its_line(celeba, file, old, new, words):
    text = (celeba / file).read_text()
    (celeba / file).write_text(text.replace(old, new))
    with pytest.raises(DataError, match=words):
        open_face_detection(celeba, "train")


def coco_content():
    marks = [4, 5, 2, 8, 5, 2, 6, 8, 1, 4, 11, 2, 8, 11, 2]
    return {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 1, "bbox": [2, 3, 10, 12], "keypoints": marks},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "keypoints": [*marks[:14], 0]},
            {"id": 3, "image_id": 3, "category_id": 1, "bbox": [5, 5, 8, 8], "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "face"}],
    }


def write_coco(root, content):
    for name in ("a", "b"):
        picture(root / "train" / f"{name}.png")
    (root / "train" / "_annotations.coco.json").write_text(json.dumps(content))


def test_coco_keypoints_are_landmarks(tmp_path):
    write_coco(tmp_path, coco_content())
    data = open_face_detection(tmp_path, "train")
    b, a = data[0], data[1]
    assert b["has_landmarks"].tolist() == [False]  # one of the five is not marked
    assert a["has_landmarks"].tolist() == [True, False] and a["ignored"].tolist() == [False, True]
    assert a["landmarks"][0, 2].tolist() == [6, 8] and a["boxes"][0].tolist() == [2, 3, 12, 15]


def test_coco_keypoints_of_another_number_are_refused(tmp_path):
    content = coco_content()
    content["annotations"][1]["keypoints"] = [1, 2, 2]
    write_coco(tmp_path, content)
    with pytest.raises(DataError, match="annotation 2: keypoints are 5 times"):
        open_face_detection(tmp_path, "train")


def test_places_that_are_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_face_detection(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="has no wider_face_split"):
        open_face_detection(tmp_path, "train")
    with pytest.raises(PaperZooError, match="split 'val' is not known"):
        open_face_detection(tmp_path, "val")


# -- WIDER FACE's evaluation -----------------------------------------------------------------------------------------


def literal_ap(found, faces, counted, threshold=0.5, thresholds=1000):
    """The evaluation step by step: each image, each detection, each threshold."""
    every = [float(s) for f in found for s in f["scores"]]
    low, high = min(every), max(every)
    total, proposals, hits = 0, np.zeros(thresholds), np.zeros(thresholds)
    for f, boxes, keep in zip(found, faces, counted, strict=True):
        total += int(keep.sum())
        if not len(boxes) or not len(f["boxes"]):
            continue
        state, proposal, recalled = [0] * len(boxes), [1] * len(f["boxes"]), []
        for h, box in enumerate(f["boxes"].tolist()):
            overlaps = []
            for face in boxes.tolist():
                width = min(box[2], face[2]) - max(box[0], face[0]) + 1
                height = min(box[3], face[3]) - max(box[1], face[1]) + 1
                common = max(0.0, width) * max(0.0, height)
                areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, face)]
                overlaps.append(common / (sum(areas) - common))
            best = int(np.argmax(overlaps))
            if overlaps[best] >= threshold:
                if not keep[best]:
                    state[best], proposal[h] = -1, -1
                elif state[best] == 0:
                    state[best] = 1
            recalled.append(state.count(1))
        scores = [(float(s) - low) / (high - low) for s in f["scores"]]
        for t in range(thresholds):
            least = 1 - (t + 1) / thresholds
            rows = [i for i, s in enumerate(scores) if s >= least]
            if rows:
                proposals[t] += proposal[: rows[-1] + 1].count(1)
                hits[t] += recalled[rows[-1]]
    precision = [h / p if p else 0.0 for h, p in zip(hits, proposals, strict=True)]
    recall = [0.0, *(h / total for h in hits), 1.0]
    precision = [0.0, *precision, 0.0]
    for i in range(len(precision) - 1, 0, -1):
        precision[i - 1] = max(precision[i - 1], precision[i])
    return sum(
        (recall[i + 1] - recall[i]) * precision[i + 1] for i in range(len(recall) - 1) if recall[i + 1] != recall[i]
    )


def some_results(seed, images=12):
    rng = torch.Generator().manual_seed(seed)
    found, faces, counted = [], [], []
    for i in range(images):
        count = 0 if i == 3 else int(torch.randint(1, 6, (), generator=rng))
        corner = torch.rand(count, 2, generator=rng) * 60
        boxes = torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=rng) * 20], dim=1)
        near = boxes.repeat(2, 1) + torch.randn(2 * count, 4, generator=rng) * 2
        far = torch.rand(3, 2, generator=rng) * 60
        wrong = torch.cat([far, far + 15], dim=1)
        every = torch.cat([near, wrong]) if i != 5 else torch.zeros(0, 4)
        scores = torch.rand(len(every), generator=rng).sort(descending=True).values
        found.append({"boxes": every[torch.randperm(len(every), generator=rng)], "scores": scores})
        faces.append(boxes)
        counted.append(torch.rand(count, generator=rng) < 0.6)
    return found, faces, counted


@pytest.mark.parametrize("seed", range(4))
def test_ap_equals_a_literal_evaluation(seed):
    results = some_results(seed)
    assert wider_ap(*results) == pytest.approx(literal_ap(*results), abs=1e-9)


def test_ap_by_hand():
    """Two faces count, one is ignored. Right at 0.9, wrong at 0.8, on the ignored one at 0.7, right at 0.6, wrong at 0.1."""
    faces = torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]])
    counted = torch.tensor([True, True, False])
    boxes = torch.stack([faces[0], faces[0] + 50, faces[2], faces[1], faces[0] + 80])
    found = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1])}]
    # recall 1/2 at precision 1, recall 1 at precision 2/3
    assert wider_ap(found, [faces], [counted]) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_the_second_detection_of_a_face_is_wrong():
    face = torch.tensor([[0.0, 0, 10, 10]])
    held, right = judge(face.repeat(2, 1), face, torch.tensor([True]))
    assert held.tolist() == [True, True] and right.tolist() == [True, False]
    held, right = judge(face.repeat(2, 1), face, torch.tensor([False]))
    assert held.tolist() == [False, False] and right.tolist() == [False, False]


def test_iou_counts_the_last_pixel():
    a, b = torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[5.0, 0, 14, 9]])
    assert float(inclusive_iou(a, b)) == pytest.approx(50 / 150)


def test_perfect_detection_is_one_and_none_is_zero():
    faces = [torch.tensor([[1.0, 2, 30, 40]]), torch.zeros(0, 4)]
    counted = [torch.tensor([True]), torch.zeros(0, dtype=torch.bool)]
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
    good = {"boxes": faces[0], "scores": torch.tensor([0.3])}
    assert wider_ap([good, empty], faces, counted) == 1.0
    assert wider_ap([empty, empty], faces, counted) == 0.0
    assert wider_ap([good, empty], faces, [~counted[0], counted[1]]) == 0.0  # nothing counts
    assert wider_ap([], [], []) == 0.0


def test_what_is_found_in_images_without_faces_is_wrong_only_outside_of_the_official_protocol():
    faces = [torch.tensor([[1.0, 2, 30, 40]]), torch.zeros(0, 4)]
    counted = [torch.tensor([True]), torch.zeros(0, dtype=torch.bool)]
    found = [{"boxes": faces[0], "scores": torch.tensor([0.5])}]
    found += [{"boxes": faces[0], "scores": torch.tensor([0.9])}]
    assert wider_ap(found, faces, counted) == 1.0
    assert wider_ap(found, faces, counted, official=False) == pytest.approx(0.5)


def truth(boxes, landmarks=None, marked=True, ignored=False):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    points = torch.zeros(len(boxes), 5, 2) if landmarks is None else torch.tensor(landmarks, dtype=torch.float32)
    flags = [torch.full((len(boxes),), value) for value in (marked, ignored)]
    return {"boxes": boxes, "landmarks": points, "has_landmarks": flags[0], "ignored": flags[1]}


POINTS = [[[10.0, 10], [20, 10], [15, 15], [11, 20], [19, 20]]]


def test_landmark_errors_by_hand():
    """All points 3 pixels off, of a face of 16 by 25 pixels whose eyes are 10 apart."""
    there = truth([[5, 5, 21, 30]], POINTS)
    found = {"boxes": there["boxes"], "landmarks": torch.tensor(POINTS) + torch.tensor([0.0, 3.0])}
    assert landmark_errors(found, there).tolist() == [[pytest.approx(3 / 20), pytest.approx(3 / 10)]]


def test_landmarks_of_the_best_scored_detection_are_taken():
    there = truth([[5, 5, 21, 30]], POINTS)
    points = torch.cat([torch.tensor(POINTS) + 30, torch.tensor(POINTS), torch.tensor(POINTS) + 2])
    found = {"boxes": torch.tensor([[90.0, 90, 99, 99], [5, 5, 20, 30], [5, 5, 21, 30]]), "landmarks": points}
    assert float(landmark_errors(found, there)[0, 0]) == 0.0


def test_landmark_errors_leave_out_what_has_none():
    boxes = [[5, 5, 21, 30]]
    found = {"boxes": torch.tensor(boxes).float(), "landmarks": torch.tensor(POINTS)}
    assert landmark_errors(found, truth(boxes, POINTS, marked=False)).shape == (0, 2)
    assert landmark_errors(found, truth(boxes, POINTS, ignored=True)).shape == (0, 2)
    assert landmark_errors({"boxes": found["boxes"]}, truth(boxes, POINTS)).shape == (0, 2)
    assert landmark_errors(found, truth([])).shape == (0, 2)


def test_metrics_of_a_set():
    there = [
        truth([[5, 5, 21, 30], [50, 50, 60, 60]], POINTS * 2) | {"subsets": torch.tensor([[True] * 3, [False] * 3])}
    ]
    found = [{"boxes": there[0]["boxes"][:1], "scores": torch.ones(1), "landmarks": torch.tensor(POINTS)}]
    metrics = face_metrics(found, there)
    assert metrics["AP"] == pytest.approx(0.5) and metrics["AP_easy"] == 1.0
    assert metrics["found"] == 0.5 and metrics["NME"] == 0.0
    assert "NME" not in face_metrics([{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}], there)


# -- samples ---------------------------------------------------------------------------------------------------------


def sample(width=40, height=30):
    rng = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=rng),
        "boxes": torch.tensor([[5.0, 5, 21, 30], [30, 2, 36, 8]]),
        "landmarks": torch.tensor(POINTS * 2),
        "has_landmarks": torch.tensor([True, False]),
    }


def test_flip_swaps_left_and_right():
    before = sample()
    after = flip(before)
    assert torch.equal(after["image"], before["image"].flip(2))
    assert after["boxes"][0].tolist() == [19, 5, 35, 30]
    assert after["landmarks"][0].tolist() == [[20, 10], [30, 10], [25, 15], [21, 20], [29, 20]]
    twice = flip(after)
    assert all(torch.equal(twice[key], before[key]) for key in before)


def test_square_crop_holds_a_whole_face_and_moves_its_points():
    torch.manual_seed(0)
    for _ in range(30):
        before = sample()
        after = square_crop(before)
        assert after["image"].shape[1] == after["image"].shape[2] <= 30
        side, boxes = after["image"].shape[1], after["boxes"]
        assert len(boxes) >= 1 and boxes.min() >= 0 and boxes.max() <= side
        assert len(after["landmarks"]) == len(after["has_landmarks"]) == len(boxes)
        small = next((i for i, b in enumerate(boxes) if (b[2:] - b[:2]).tolist() == [6, 6]), None)
        if small is not None:
            shift = torch.tensor([30.0, 2]) - boxes[small, :2]
            x, y = int(shift[0]), int(shift[1])
            assert torch.equal(after["image"], before["image"][:, y : y + side, x : x + side])
            assert torch.equal(after["landmarks"][small], before["landmarks"][1] - shift)


def test_square_crop_pads_where_no_square_holds_a_face():
    before = sample() | {"boxes": torch.tensor([[0.0, 0, 40, 30]] * 2)}
    after = square_crop(before)
    assert after["image"].shape == (3, 40, 40) and torch.equal(after["image"][:, :30], before["image"])
    assert torch.equal(after["boxes"], before["boxes"])
    empty = {key: value if key == "image" else value[:0] for key, value in sample().items()}
    assert len(square_crop(empty)["boxes"]) == 0


class Fixed(nn.Module):
    """A detector that always finds the same face, at (8, 16) to (40, 48) of its canvas."""

    num_classes = 1

    def __init__(self, points=True):
        super().__init__()
        self.weight, self.points = nn.Parameter(torch.zeros(1)), points

    def forward(self, images, targets=None):
        return {"loss": self.weight.sum()} if targets is not None else (images.mean((1, 2, 3)),)

    def postprocess(self, outputs, sizes, canvas):
        face = {"boxes": torch.tensor([[8.0, 16, 40, 48]]), "scores": torch.tensor([0.75])}
        marks = {"landmarks": torch.tensor([[[16.0, 24], [32, 24], [24, 32], [18, 40], [30, 40]]])}
        return [face | (marks if self.points else {}) for _ in sizes]


class FixedRecipe(FaceDetectionRecipe):
    def build(self):
        return Fixed()


def recipe(**changes):
    return FixedRecipe(
        Config(**({"scenes": 6, "scene_size": 64, "image_sizes": (64,), "steps": 1} | changes)), Runtime()
    )


def test_batches_have_the_promised_form():
    r = recipe(augment="square_crop", batch_size=4)
    batch = r.batch()
    assert batch["images"].shape == (4, 3, 64, 64) and batch["sizes"].tolist() == [[64, 64]] * 4
    for target in batch["targets"]:
        n = len(target["boxes"])
        assert target["landmarks"].shape == (n, 5, 2) and target["has_landmarks"].shape == (n,)
        assert target["labels"].tolist() == [0] * n


def test_ignored_faces_and_those_below_a_pixel_are_not_learned_from(wider):
    data = open_face_detection(wider, "train")
    r = recipe(augment="none", image_sizes=(20,), train_square=False, longest_side=999)
    learned = Prepared(data, r, train=True)[0]  # 40 x 30 pixels become 26 x 20; the face of one pixel less than one
    assert torch.allclose(learned["boxes"], torch.tensor([[2 * 0.65, 2, 12 * 0.65, 10]]))
    tested = FaceCollate(32)([Prepared(data, r, train=False)[0]])
    assert len(tested["truth"][0]["boxes"]) == 3 and tested["truth"][0]["size"].tolist() == [30, 40]


def test_predictions_are_in_pixels_of_the_given_picture():
    large = np.zeros((128, 192, 3), np.uint8)  # twice the network's size
    r = recipe()
    found, again = r.predict([large, np.zeros((64, 64, 3), np.uint8)])
    assert found == Faces(
        [(16.0, 32.0, 80.0, 96.0)],
        [0.75],
        [[(32.0, 48.0), (64.0, 48.0), (48.0, 64.0), (36.0, 80.0), (60.0, 80.0)]],
    )
    assert again.boxes == [(8.0, 16.0, 40.0, 48.0)]
    assert found.above(0.8) == Faces([], [], [])
    assert r.draw(large, found).size == (384, 256)


def test_a_detector_without_landmarks_has_boxes_alone():
    r = recipe()
    r.model.points = False
    found = r.predict([np.zeros((64, 64, 3), np.uint8)])[0]
    assert found.landmarks == [] and len(found.boxes) == 1
    assert "NME" not in r.evaluate("test") and r.draw(np.zeros((64, 64, 3), np.uint8), found)


def test_images_of_their_own_sizes_are_not_resized():
    r = recipe(resize="none", multiple=32)
    assert r.predict([np.zeros((50, 70, 3), np.uint8)])[0].boxes == [(8.0, 16.0, 40.0, 48.0)]
    assert set(r.evaluate("test")) >= {"AP", "AP_easy", "AP_medium", "AP_hard"}


def test_figures_show_what_is_found_and_what_is_there():
    figures = recipe().figures()
    assert set(figures) == {"Found", "There"} and all(min(f.size) > 200 for f in figures.values())
