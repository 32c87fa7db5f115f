"""Faces: readers of identities and pairs, alignment, the protocols of verification, the task's recipe."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from paperzoo.blocks import verification as measure
from paperzoo.blocks.face_alignment import align_face, face_template, similarity_transform
from paperzoo.data.face_identities import make_pairs, open_faces, open_gallery, read_lfw_pairs
from paperzoo.engine.configure import configure
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError, UnknownName
from paperzoo.papers.face.arcface.recipe import PRESETS, ArcFace
from paperzoo.tasks.face_verification import FaceEmbedding, Verification, parts_of

# -- pictures on disk ------------------------------------------------------------------------------------------------


def picture(path: Path, value: int = 120, side: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((side, side, 3), value, np.uint8)
    pixels[: side // 2] = value // 2
    Image.fromarray(pixels).save(path)


@pytest.fixture
def people(tmp_path):
    """Twenty people with three pictures each, one folder a person."""
    for k in range(20):
        for i in range(3):
            picture(tmp_path / f"person_{k:02d}" / f"{i}.png", 10 + 12 * k + i)
    return tmp_path


@pytest.fixture
def lfw(tmp_path):
    """LFW's layout: two folds of two pairs of each kind, and people beside them."""
    for name, count in (("Ann_Lee", 3), ("Bo_Diaz", 2), ("Cy_Young", 2), ("Di_Ng", 2), ("Ed_Poe", 1), ("Flo_Ray", 2)):
        for i in range(1, count + 1):
            picture(tmp_path / "lfw" / name / f"{name}_{i:04d}.jpg")
    (tmp_path / "pairs.txt").write_text(
        "2\t2\nAnn_Lee\t1\t3\nBo_Diaz\t1\t2\nAnn_Lee\t2\tBo_Diaz\t1\nBo_Diaz\t2\tAnn_Lee\t1\n"
        "Cy_Young\t1\t2\nDi_Ng\t1\t2\nCy_Young\t2\tDi_Ng\t1\nDi_Ng\t2\tCy_Young\t1\n"
    )
    return tmp_path


def test_one_identity_in_five_is_held_out(people):
    train, test = open_faces(people, "train"), open_faces(people, "test")
    assert len(train.images.labels) == 16 and len(test.images.labels) == 4
    assert not set(train.images.labels) & set(test.images.labels)
    assert train.pairs is None and len(test.pairs) == 24  # of each kind 2 x 6
    image, target = test.images[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 24, 24) and target == 0


def test_train_and_test_folders_and_distractors(tmp_path):
    for part, first in (("train", 0), ("test", 10)):
        for k in range(4):
            for i in range(2):
                picture(tmp_path / part / f"{first + k}" / f"{i}.png")
    picture(tmp_path / "distractors" / "deep" / "x.png")
    data = open_faces(tmp_path, "test")
    assert data.images.labels == ["10", "11", "12", "13"] and len(data.distractors) == 1
    assert len(open_faces(tmp_path, "train").images) == 8


def test_lfw_is_read_as_published(lfw):
    data = open_faces(lfw, "test")
    pairs = data.pairs
    assert pairs.same == [True, True, False, False] * 2 and pairs.folds == [0] * 4 + [1] * 4
    names = [Path(data.images.path(row)).name for row in (pairs.first[0], pairs.second[0], pairs.second[2])]
    assert names == ["Ann_Lee_0001.jpg", "Ann_Lee_0003.jpg", "Bo_Diaz_0001.jpg"]
    train = open_faces(lfw, "train")
    assert train.images.labels == ["Ed_Poe", "Flo_Ray"] and train.images.targets == [0, 1, 1]
    (lfw / "peopleDevTrain.txt").write_text("1\nFlo_Ray\t2\n")
    assert open_faces(lfw, "train").images.labels == ["Flo_Ray"]


def test_lfw_development_pairs_are_dealt_into_folds(lfw):
    (lfw / "pairsDevTrain.txt").write_text(
        "2\nAnn_Lee\t1\t2\nBo_Diaz\t1\t2\nAnn_Lee\t1\tEd_Poe\t1\nDi_Ng\t1\tEd_Poe\t1\n"
    )
    pairs = open_faces(lfw, "dev").pairs
    assert pairs.same == [True, True, False, False] and len(set(pairs.folds)) > 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("ten\n", "line 1"),
        ("1 1\nAnn_Lee 1\nAnn_Lee 1 Bo_Diaz 1\n", "line 2 must be 'name n1 n2'"),
        ("1 1\nAnn_Lee 1 x\nAnn_Lee 1 Bo_Diaz 1\n", "line 2"),
        ("1 1\nAnn_Lee 1 2\nAnn_Lee 1 2\n", "line 3 must be 'name1 n1 name2 n2'"),
        ("1 1\nAnn_Lee 1 2\n", "promises 2 pairs; there are 1"),
        ("1 1\nAnn_Lee 1 9\nAnn_Lee 1 Bo_Diaz 1\n", "line 2: there is no picture Ann_Lee/Ann_Lee_0009"),
    ],
)
def test_wrong_lines_of_pairs_are_named(lfw, content, said):
    (lfw / "pairs.txt").write_text(content)
    with pytest.raises(DataError, match=said):
        open_faces(lfw, "test")


def test_pairs_txt_with_ten_folds_of_300(tmp_path):
    body = "".join("A 1 2\n" * 300 + "A 1 B 1\n" * 300 for _ in range(10))
    (tmp_path / "pairs.txt").write_text("10\t300\n" + body)
    found = read_lfw_pairs(tmp_path / "pairs.txt")
    assert len(found) == 6000 and [found[i][5] for i in (0, 599, 600, 5999)] == [0, 0, 1, 9]


def test_list_with_landmarks_is_aligned(tmp_path):
    points = face_template(112) * 2 + 10
    pixels = np.zeros((260, 260, 3), np.uint8)
    for x, y in points.round().long().tolist():
        pixels[y - 3 : y + 4, x - 3 : x + 4] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    header = ",".join(["path", "identity", "split", *(f"{a}{i}" for i in range(1, 6) for a in "xy")])
    row = ",".join(["a.png", "x", "train", *(f"{v:.3f}" for v in points.flatten().tolist())])
    (tmp_path / "list.csv").write_text(f"{header}\n{row}\n")
    image, _ = open_faces(tmp_path / "list.csv", "train").images[0]
    assert image.shape == (3, 112, 112)
    x, y = face_template(112).round().long().unbind(1)
    assert int(image[0, y, x].min()) > 150 and float(image.float().mean()) < 30


def test_list_without_a_split_holds_identities_out(people, tmp_path):
    rows = [f"{p.relative_to(tmp_path)},{p.parent.name}" for p in sorted(tmp_path.rglob("*.png"))]
    (tmp_path / "list.csv").write_text("\n".join(["path,identity", *rows]) + "\n")
    train, test = (open_faces(tmp_path / "list.csv", split).images.labels for split in ("train", "test"))
    assert len(train) == 16 and len(test) == 4 and not set(train) & set(test)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("file_name,who\na.png,1\n", "columns path and identity"),
        ("path,identity\n", "no rows"),
        ("path,identity\na.png,\n", "line 2 has no path or no identity"),
        ("path,identity,x1,y1\na.png,1,2,3\n", "landmarks need all of the columns"),
        ("path,identity,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\na.png,1,1,2,3,4,5,6,7,8,9,z\n", "line 2: x1"),
        ("path,identity,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\na.png,1,1,1,1,1,1,1,1,1,1,1\n", "line 2: five landmarks"),
        ("path,identity,split\na.png,1,test\n", "no rows for the split 'train'"),
    ],
)
def test_wrong_rows_of_a_list_are_named(tmp_path, content, said):
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(DataError, match=said):
        open_faces(tmp_path / "list.csv", "train")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n", "columns first, second and same"),
        ("first,second,same\nperson_00/0.png,nobody/0.png,0\n", "line 2: 'nobody/0.png' is not among"),
        ("first,second,same\nperson_00/0.png,person_01/0.png,maybe\n", "line 2: same is 'maybe'"),
        ("first,second,same,fold\nperson_00/0.png,person_01/0.png,0,-1\n", "line 2: fold is '-1'"),
        ("first,second,same\nperson_00/0.png,person_01/0.png,0\n", "both kinds"),
    ],
)
def test_wrong_rows_of_a_pair_table_are_named(people, content, said):
    (people / "pairs.csv").write_text(content)
    with pytest.raises(DataError, match=said):
        open_faces(people, "test")


def test_people_in_a_pair_table_are_not_learned(people):
    (people / "pairs.csv").write_text(
        "first,second,same\nperson_00/0.png,person_00/1.png,1\nperson_00/0.png,person_07/0.png,0\n"
    )
    assert len(set(open_faces(people, "test").pairs.folds)) == 2
    labels = open_faces(people, "train").images.labels
    assert len(labels) == 18 and not {"person_00", "person_07"} & set(labels)


def test_landmarks_file_aligns_and_names_its_line(lfw):
    points = " ".join(f"{v:.2f}" for v in (face_template(112) / 5).flatten().tolist())
    (lfw / "lfw_landmark.txt").write_text(f"Ann_Lee/Ann_Lee_0001.jpg {points}\nGone/Gone_0001.jpg {points}\n")
    images = open_faces(lfw, "test").images
    assert images[0][0].shape == (3, 112, 112) and images[1][0].shape == (3, 24, 24)
    (lfw / "lfw_landmark.txt").write_text(f"Ann_Lee/Ann_Lee_0001.jpg {points}\nBo_Diaz/Bo_Diaz_0001.jpg 1 2 3\n")
    with pytest.raises(DataError, match="line 2 must be a path and ten numbers"):
        open_faces(lfw, "test")


def test_pickles_and_records_are_refused_unread(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "ran", "x"))

    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="refused: a verification pack is a Python pickle.*pairs.csv"):
        open_faces(tmp_path / "lfw.bin", "test")
    (tmp_path / "train.rec").write_bytes(b"0")
    with pytest.raises(DataError, match="unpack them into one folder an identity"):
        open_faces(tmp_path / "train.rec", "train")
    with pytest.raises(DataError, match="lfw.bin is a pickle"):
        open_faces(tmp_path, "test")
    assert not (tmp_path / "ran").exists()


def test_missing_places_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_faces(tmp_path / "nothing", "train")
    with pytest.raises(UnknownName, match="drawn_identities"):
        open_faces("drawn_identity", "train")
    with pytest.raises(DataError, match="no folders of identities"):
        open_faces(tmp_path, "train")
    with pytest.raises(DataError, match="no pictures"):
        open_gallery(tmp_path)


def test_a_set_of_three_people_says_what_pairs_need(tmp_path):
    for part in ("train", "test"):
        for k in range(3):
            for i in range(2):
                picture(tmp_path / part / f"{k}" / f"{i}.png")
    with pytest.raises(DataError, match="four identities with two pictures each at least; there are 3"):
        open_faces(tmp_path, "test")


def test_galleries_are_read_whole(people):
    assert len(open_gallery(people)) == 60
    picture(people / "Zoe.png")
    images = open_gallery(people)
    assert len(images.labels) == 21 and images.labels[-1] == "Zoe" or "Zoe" in images.labels


def test_drawn_pairs_keep_people_in_one_fold():
    targets = [k for k in range(40) for _ in range(4)]
    pairs = make_pairs(targets)
    owner: dict[int, int] = {}
    for a, b, same, fold in zip(pairs.first, pairs.second, pairs.same, pairs.folds, strict=True):
        assert a != b and (targets[a] == targets[b]) == same
        assert all(owner.setdefault(targets[row], fold) == fold for row in (a, b))
    assert sum(pairs.same) * 2 == len(pairs) and len(set(pairs.folds)) == 10
    assert len({frozenset(p) for p in zip(pairs.first, pairs.second, strict=True)}) == len(pairs)
    assert make_pairs(targets) == pairs


# -- alignment -------------------------------------------------------------------------------------------------------


def test_similarity_undoes_a_known_movement():
    template = face_template(112)
    turn = 1.4 * torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    matrix = similarity_transform(template @ turn.T + torch.tensor([5.0, -3.0]), template)
    assert torch.allclose(matrix[:, :2] @ turn, torch.eye(2), atol=1e-5)


def test_similarity_never_mirrors():
    mirrored = face_template(112) * torch.tensor([-1.0, 1.0])
    matrix = similarity_transform(mirrored, face_template(112))
    assert float(torch.linalg.det(matrix[:, :2])) > 0


def test_alignment_of_an_aligned_face_changes_nothing():
    image = (torch.rand(3, 112, 112) * 255).byte()
    assert torch.equal(align_face(image, face_template(112)), image)


def test_alignment_is_the_same_one_by_one():
    images, points = torch.rand(3, 3, 60, 80), face_template(56) + torch.randn(3, 5, 2)
    whole = align_face(images, points, 32)
    for image, p, crop in zip(images, points, whole, strict=True):
        torch.testing.assert_close(align_face(image, p, 32), crop)


def test_landmarks_on_one_point_are_refused():
    with pytest.raises(ValueError, match="one place"):
        align_face(torch.zeros(3, 8, 8), torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"\(1, 5, 2\)"):
        align_face(torch.zeros(3, 8, 8), torch.ones(4, 2))


# -- protocols -------------------------------------------------------------------------------------------------------


def ten_folds_by_loops(scores, same, folds):
    """For every fold, every threshold between two scores of the others is tried."""
    accuracies = []
    for fold in sorted(set(folds)):
        others = [(s, t) for s, t, f in zip(scores, same, folds, strict=True) if f != fold]
        values = sorted({s for s, _ in others}, reverse=True)
        tried = [values[0] + 1e-6, *((a + b) / 2 for a, b in zip(values, values[1:], strict=False)), values[-1] - 1e-6]
        best, threshold = -1, None
        for t in tried:
            right = sum((s >= t) == truth for s, truth in others)
            if right > best:
                best, threshold = right, t
        mine = [(s >= threshold) == t for s, t, f in zip(scores, same, folds, strict=True) if f == fold]
        accuracies.append(sum(mine) / len(mine))
    return accuracies


@pytest.mark.parametrize("rounded", [False, True])
def test_ten_folds_against_a_loop_over_thresholds(rounded):
    same = torch.rand(200) < 0.4
    scores = (0.6 * same + 0.5 * torch.randn(200)).double()
    if rounded:
        scores = (4 * scores).round() / 4  # many ties
    folds = torch.arange(200) % 10
    found, _ = measure.ten_folds(scores, same, folds)
    assert found.tolist() == pytest.approx(ten_folds_by_loops(scores.tolist(), same.tolist(), folds.tolist()))


def test_one_fold_is_refused():
    with pytest.raises(ValueError, match="one fold"):
        measure.ten_folds(torch.rand(4), torch.tensor([True, False, True, False]), torch.zeros(4).long())


def test_threshold_beyond_all_scores_where_all_pairs_are_of_one_kind():
    scores = torch.tensor([0.1, 0.5, 0.9])
    assert measure.best_threshold(scores, torch.zeros(3).bool()) > 0.9
    assert measure.best_threshold(scores, torch.ones(3).bool()) < 0.1


def test_true_accepts_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4] + [0.75, 0.55] + [0.1] * 8)
    same = torch.tensor([True] * 6 + [False] * 10)
    found = measure.true_accepts(scores, same, (0.2, 0.1, 0.01))
    assert found[0.1][0] == pytest.approx(4 / 6) and found[0.2][0] == pytest.approx(1.0)
    assert 0.01 not in found  # ten different pairs cannot resolve it
    far = (scores[~same] >= found[0.1][1]).float().mean()
    assert float(far) <= 0.1 + 1e-6


def test_equal_error_rate_by_hand():
    scores, same = torch.tensor([4.0, 3, 2, 1]), torch.tensor([True, False, True, False])
    assert measure.equal_error_rate(scores, same) == pytest.approx(0.5)
    assert measure.equal_error_rate(scores, torch.tensor([True, True, False, False])) == 0.0
    scores, same = torch.tensor([5.0, 4, 3, 2, 1]), torch.tensor([True, True, False, True, False])
    assert measure.equal_error_rate(scores, same) == pytest.approx(1 / 3)


def test_rank1_by_hand():
    axes = torch.eye(3)
    probes, owners = torch.stack([axes[0] + 0.1, axes[1] * 5, axes[2]]), torch.tensor([0, 1, 2])
    gallery = torch.stack([axes[0], axes[1], axes[0] + axes[2], axes[2] * 9])
    assert measure.rank1_in_gallery(probes, owners, gallery, torch.tensor([0, 1, 2, -1])) == pytest.approx(2 / 3)


def test_rank1_among_distractors_against_a_loop():
    x, labels, others = torch.randn(12, 4), torch.arange(12) // 3, torch.randn(7, 4)
    hits = pairs = 0
    for i in range(12):
        for j in range(12):
            if i != j and labels[i] == labels[j]:
                mate = F.cosine_similarity(x[i], x[j], dim=0)
                hits += int(all(mate > F.cosine_similarity(x[i], d, dim=0) for d in others))
                pairs += 1
    assert measure.rank1_among_distractors(x, labels, others) == pytest.approx(hits / pairs)


# -- the recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    for k in range(20):
        for i in range(3):
            picture(folder / f"person_{k:02d}" / f"{i}.png", 10 + 12 * k + i)
    changes = {"data": str(folder), "image_size": 16, "batch_size": 4, "flip_test": True}
    torch.manual_seed(0)
    return ArcFace(configure(PRESETS["embedded"], changes), Runtime())


def test_inputs_lie_between_minus_one_and_one(recipe):
    images, labels = recipe.batch()
    assert images.shape == (4, 3, 16, 16) and labels.dtype == torch.int64
    assert -1 <= float(images.min()) and float(images.max()) <= 1
    transform = torch.nn.Sequential(*recipe.to_input())
    assert float(transform(torch.full((3, 16, 16), 255, dtype=torch.uint8)).max()) == pytest.approx(1.0)
    assert float(transform(torch.zeros(3, 16, 16, dtype=torch.uint8)).min()) == pytest.approx(-1.0)


def test_evaluation_has_the_metrics_and_a_threshold(recipe):
    metrics = recipe.evaluate("test")
    assert {"accuracy", "accuracy_deviation", "auc", "equal_error_rate", "tar_at_far_1e-1", "rank1"} <= metrics.keys()
    assert "tar_at_far_1e-3" not in metrics and -1 <= recipe.facts["threshold"] <= 1.001


def test_pictures_and_pairs_are_predicted(recipe, tmp_path):
    inputs = recipe.samples(tmp_path)
    results = recipe.predict(inputs)
    assert [isinstance(r, Verification) for r in results] == [False] * 6 + [True] * 2
    single = results[0]
    assert isinstance(single, FaceEmbedding) and len(single.embedding) == 64 and 0 < len(single.nearest) <= 5
    assert sum(v * v for v in single.embedding) == pytest.approx(1.0, abs=1e-5)
    assert [n.similarity for n in single.nearest] == sorted((n.similarity for n in single.nearest), reverse=True)
    first, second = (recipe.predict([path])[0].embedding for path in inputs[6].split("|"))
    similarity = float(torch.tensor(first) @ torch.tensor(second))
    assert results[6].similarity == pytest.approx(similarity, abs=1e-5)
    assert results[6].same == (results[6].similarity >= results[6].threshold)
    assert recipe.draw(inputs[0], single).size[0] > recipe.draw(inputs[6], results[6]).size[0] > 100


def test_a_gallery_of_ones_own_is_searched(recipe, people):
    own = configure(recipe.config, {"gallery": str(people)})
    other = ArcFace(own, Runtime(), dict(recipe.facts) | {"threshold": 0.5})
    path = str(people / "person_03" / "1.png")
    result = other.predict([path])[0]
    assert result.nearest[0].similarity == pytest.approx(1.0, abs=1e-4)


def test_inputs_with_landmarks_are_aligned_first(recipe):
    image = torch.rand(3, 112, 112)
    crop, face = recipe.predict([image, {"image": image, "landmarks": face_template(112)}])
    assert crop.embedding == pytest.approx(face.embedding, abs=1e-4)
    with pytest.raises(PaperZooError, match="landmarks"):
        recipe.predict([{"image": image, "landmarks": [[1, 2]]}])


def test_wrong_pairs_are_refused():
    with pytest.raises(PaperZooError, match="two paths"):
        parts_of("a.png|b.png|c.png")
    with pytest.raises(PaperZooError, match="has two, not 3"):
        parts_of(("a", "b", "c"))


def test_a_broken_picture_is_left_out(people):
    data = open_faces(people, "test")
    Path(data.images.path(0)).write_bytes(b"not a picture")
    config = configure(PRESETS["embedded"], {"data": str(people), "image_size": 16})
    runtime = Runtime()
    broken = ArcFace(config, runtime)
    scores, same, folds, _ = broken.similarities("test")
    assert len(scores) < len(data.pairs) and len(scores) == len(same) == len(folds)
    assert list(runtime.broken) == [data.images.path(0)]


def test_any_classifier_can_be_the_backbone(tmp_path):
    changes = {"model": "face_backbone", "model_arguments": {"backbone": "resnet18"}, "image_size": 32}
    config = configure(PRESETS["embedded"], changes)
    network = ArcFace(config, Runtime(), {"identities": 5, "threshold": 0.5}).model
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    with pytest.raises(UnknownName):
        ArcFace(configure(config, {"model_arguments": {"backbone": "resnet19"}}), Runtime(), {"identities": 5})


def test_a_spread_head_on_one_process_learns_as_a_whole_one(people):
    from paperzoo.engine.loop import one_step

    changes = {"data": str(people), "image_size": 16, "batch_size": 8}
    losses = {}
    for head in ("whole", "spread"):
        torch.manual_seed(0)
        recipe = ArcFace(configure(PRESETS["embedded"], changes | {"head": head}), Runtime())
        recipe.head.weight.data.copy_(torch.randn(16, 64, generator=torch.Generator().manual_seed(1)))
        losses[head] = [float(one_step(recipe, people)["loss"]) for _ in range(4)]
    assert losses["spread"] == pytest.approx(losses["whole"], rel=1e-3)
    assert losses["whole"][0] != losses["whole"][3]


def test_a_sampled_head_learns(people):
    from paperzoo.engine.loop import one_step

    changes = {"data": str(people), "image_size": 16, "batch_size": 4, "head": "spread", "sample_rate": 0.5}
    recipe = ArcFace(configure(PRESETS["embedded"], changes), Runtime())
    before = recipe.head.weight.detach().clone()
    one_step(recipe, people)
    changed = (recipe.head.weight.detach() != before).any(1)
    assert 4 <= int(changed.sum()) <= 8 and recipe.runtime.step == 1


def test_settings_that_contradict_each_other_are_refused():
    config = PRESETS["embedded"]
    for changes, said in (
        ({"sample_rate": 0.5}, "--head spread"),
        ({"head": "spread", "optimizer": "adam"}, "sgd alone"),
    ):
        with pytest.raises(PaperZooError, match=said):
            ArcFace(configure(config, changes), Runtime(), {"identities": 5})
