"""The edge task: readers of BSDS500 and folders, the benchmark's matching and summaries, the balanced loss, prediction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torchvision import tv_tensors

from paperzoo.data.edge_maps import ShapeEdges, boundaries, open_edges, read_edges
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.edge_metrics import Counts, count_matches, match, rates, summary, suppress, thresholds, triangle
from paperzoo.tasks.edges import CAFFE_MEAN, Config, EdgeRecipe, Transformed, balanced_loss

SMALL = Config(
    model="hed_slim",
    crop_size=32,
    scale=(1.0, 1.0),
    steps=2,
    batch_size=2,
    optimizer="adamw",
    learning_rate=1e-3,
    thresholds=5,
)


def picture(path, size=(20, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def grey(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def mat(path, maps):
    """As the released files are: a cell for each annotator, with a structure of Segmentation and Boundaries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.empty((1, len(maps)), dtype=object)
    for i, m in enumerate(maps):
        cells[0, i] = {"Segmentation": np.ones(m.shape, np.uint16), "Boundaries": m.astype(np.uint8)}
    scipy.io.savemat(path, {"groundTruth": cells})


def bsds(root):
    rng = np.random.default_rng(0)
    for split, names in (("train", "ab"), ("val", "c"), ("test", "d")):
        for name in names:
            picture(root / "images" / split / f"{name}.jpg")
            mat(root / "groundTruth" / split / f"{name}.mat", rng.random((3, 16, 20)) < 0.2)
    return root


# -- readers -------------------------------------------------------------------------------------------------------------


def test_bsds_learns_from_train_and_val(tmp_path):
    bsds(tmp_path / "BSR" / "BSDS500" / "data")
    train, test = open_edges(str(tmp_path), "train"), open_edges(str(tmp_path), "test")
    assert [p.stem for p, _ in train.pairs] == ["a", "b", "c"] and [p.stem for p, _ in test.pairs] == ["d"]
    image, maps = test[0]
    assert image.shape == (3, 16, 20) and maps.shape == (3, 16, 20) and isinstance(maps, tv_tensors.Mask)
    assert maps.dtype == torch.uint8 and maps.unique().tolist() == [0, 1]


def test_folders_with_one_and_with_several_annotators(tmp_path):
    for i in range(5):
        picture(tmp_path / "images" / f"{i}.png")
        grey(tmp_path / "edges" / f"{i}.png", np.resize((0, 255), (16, 20)))
    (tmp_path / "edges" / "0.png").unlink()
    for name in ("x", "y"):
        grey(tmp_path / "edges" / "0" / f"{name}.png", np.resize((0, 1), (16, 20)))
    train, test = open_edges(str(tmp_path), "train"), open_edges(str(tmp_path), "test")
    assert len(train) == 4 and len(test) == 1
    assert train[0][1].shape == (2, 16, 20) and train[1][1].shape == (1, 16, 20) and int(train[1][1].sum()) == 160


def test_lists_of_pairs(tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    grey(tmp_path / "train_gt" / "a.png", np.zeros((16, 20)))
    (tmp_path / "train_pair.lst").write_text("train/a.jpg train_gt/a.png\n")
    assert len(open_edges(str(tmp_path), "train")) == 1
    (tmp_path / "train_pair.lst").write_text("train/a.jpg train_gt/a.png\ntrain/b.jpg train_gt/a.png\n")
    with pytest.raises(DataError, match=r"train_pair.lst:2.*b.jpg"):
        open_edges(str(tmp_path), "train")
    with pytest.raises(DataError, match="test_pair.lst"):
        open_edges(str(tmp_path), "test")


def test_what_is_missing_or_broken_is_named(tmp_path):
    root = bsds(tmp_path / "data")
    (root / "groundTruth" / "train" / "a.mat").write_bytes(b"no matlab")
    grey(tmp_path / "small.png", np.zeros((4, 4)))
    with pytest.raises(DataError, match="a.mat.*groundTruth"):
        open_edges(str(tmp_path), "train")[0]
    scipy.io.savemat(root / "groundTruth" / "train" / "a.mat", {"other": 1})
    with pytest.raises(DataError, match="a.mat.*groundTruth"):
        read_edges(root / "groundTruth" / "train" / "a.mat")
    (root / "groundTruth" / "val" / "c.mat").unlink()
    with pytest.raises(DataError, match="c.jpg: has no edges"):
        open_edges(str(tmp_path), "train")
    mat(root / "groundTruth" / "test" / "d.mat", np.zeros((1, 8, 8)))
    with pytest.raises(DataError, match="8 x 8 pixels, its image d.jpg is 20 x 16"):
        open_edges(str(tmp_path), "test")[0]
    with pytest.raises(DataError, match="images/ and edges/"):
        open_edges(str(tmp_path / "data" / "images"))
    with pytest.raises(PaperZooError, match="neither the embedded set"):
        open_edges("nothing")


def test_boundaries_lie_between_regions():
    ids = torch.zeros(4, 5, dtype=torch.int64)
    ids[2:, 3:] = 1
    assert boundaries(ids).tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]]


def test_the_embedded_set():
    data = ShapeEdges("test")
    image, maps = data[0]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8 and maps.shape == (1, 64, 64)
    share = float(torch.stack([data[i][1] for i in range(len(data))]).float().mean())
    assert 0.02 < share < 0.12 and all(bool(data[i][1].any()) for i in range(len(data)))


# -- matching ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [0.6, 1.0, 1.5, 4.3])
def test_pairs_are_as_many_as_the_minimum_cost_assignment_has(reach):
    """The released code's problem: distances, and a hundred times the largest for a pixel that stays alone."""
    rng = np.random.default_rng(int(10 * reach))
    found, drawn = rng.random((14, 17)) < 0.15, rng.random((14, 17)) < 0.12
    a, b = np.argwhere(found), np.argwhere(drawn)
    distance = np.linalg.norm(a[:, None] - b[None], axis=2)
    alone = 100 * reach
    cost = np.full((len(a) + len(b),) * 2, 0.0)
    cost[: len(a), : len(b)] = np.where(distance <= reach, distance, 1e6)
    cost[: len(a), len(b) :] = cost[len(a) :, : len(b)] = alone
    rows, columns = linear_sum_assignment(cost)
    best = sum(r < len(a) and c < len(b) and distance[r, c] <= reach for r, c in zip(rows, columns, strict=True))
    of_found, of_drawn = match(found, drawn, reach)
    assert of_found.sum() == of_drawn.sum() == best
    assert not (of_found & ~found).any() and not (of_drawn & ~drawn).any()


def test_each_pixel_is_used_once():
    found, drawn = np.zeros((5, 5), bool), np.zeros((5, 5), bool)
    found[2, 1:4], drawn[2, 2] = True, True
    of_found, of_drawn = match(found, drawn, 1.0)
    assert of_found.sum() == of_drawn.sum() == 1
    assert match(np.zeros_like(found), drawn, 1.0)[1].sum() == 0


def test_a_line_beside_the_drawn_one_counts_within_the_tolerance_alone():
    edges, drawn = np.zeros((30, 40)), np.zeros((1, 30, 40), bool)
    edges[10], drawn[0, 12] = 0.8, True  # the diagonal is 50
    near = count_matches(edges, drawn, np.array([0.5, 0.9]), 2.0 / 50)
    far = count_matches(edges, drawn, np.array([0.5]), 1.9 / 50)
    assert near.recalled.tolist() == near.right.tolist() == [40, 0] and near.found.tolist() == [40, 0]
    assert far.right.tolist() == [0] and far.drawn.tolist() == [40]


def test_any_annotator_makes_a_pixel_right_and_every_one_is_to_be_found():
    maps = np.zeros((2, 20, 20), bool)
    maps[0, 5], maps[1, 15] = True, True
    edges = np.zeros((20, 20))
    edges[5] = 1.0
    counts = count_matches(edges, maps, np.array([0.5]), 0.01)
    assert (counts.right[0], counts.found[0], counts.recalled[0], counts.drawn[0]) == (20, 20, 20, 40)


def test_pictures_without_edges():
    nothing = count_matches(np.zeros((8, 8)), np.zeros((1, 8, 8)), thresholds(3))
    assert nothing.found.tolist() == nothing.drawn.tolist() == [0, 0, 0]
    assert summary([nothing]) == {"ods_f": 0.0, "ois_f": 0.0, "edge_ap": 0.0}


# -- summaries -----------------------------------------------------------------------------------------------------------


def counts(recalled, drawn, right, found):
    return Counts(*(np.array(v) for v in (recalled, drawn, right, found)))


def test_summary_by_hand():
    """At two thresholds: the first picture is best at the first, the second one at the second."""
    one = counts([8, 2], [10, 10], [8, 2], [10, 2])
    two = counts([9, 8], [10, 10], [9, 8], [30, 10])
    result = summary([one, two])
    precision, recall = rates(np.array([[17, 10], [20, 20], [17, 10], [40, 12]]))
    assert precision.tolist() == [17 / 40, 10 / 12] and recall.tolist() == [17 / 20, 0.5]
    share = np.linspace(0, 1, 100)
    p, r = (share * v[1] + (1 - share) * v[0] for v in (precision, recall))
    assert result["ods_f"] == pytest.approx((2 * p * r / (p + r)).max())
    assert result["ois_f"] == pytest.approx(16 / 20)  # (8 + 8) of 20 drawn, of 20 found
    grid = np.arange(101) / 100
    inside = grid[(grid >= 0.5) & (grid <= 0.85)]
    area = np.interp(inside, [0.5, 0.85], [10 / 12, 17 / 40]).sum() / 100
    assert result["edge_ap"] == pytest.approx(area)


def test_perfect_edges_score_one():
    data = ShapeEdges("test")
    every = [
        count_matches(data[i][1][0].numpy().astype(float), data[i][1].numpy(), thresholds(3), 0.018) for i in range(3)
    ]
    result = summary(every)
    assert result["ods_f"] > 0.97 and result["ois_f"] > 0.97


# -- non-maximum suppression -----------------------------------------------------------------------------------------------


def test_triangles_are_mirrored_at_the_border():
    assert triangle(np.full((6, 7), 2.0), 4) == pytest.approx(np.full((6, 7), 2.0))
    spike = np.zeros((9, 9))
    spike[4, 4] = 1
    assert triangle(spike, 1)[4, 3:6] * 16 == pytest.approx([2, 4, 2])


@pytest.mark.parametrize("turned", [False, True])
def test_a_blurred_line_becomes_thin(turned):
    line = np.exp(-((np.arange(40) - 20.0) ** 2) / 8)[None].repeat(40, 0)
    edges = suppress(line.T if turned else line, border=0)
    edges = edges.T if turned else edges
    assert (edges[:, 20] > 0.5).all() and edges[:, :19].max() < 1e-3 and edges[:, 22:].max() < 1e-3


def test_a_diagonal_line_becomes_thin_and_borders_fade():
    rows, columns = np.indices((40, 40))
    line = np.exp(-((rows - columns) ** 2) / 16.0)
    thin = suppress(line, border=0)
    inner = np.zeros_like(thin, dtype=bool)
    inner[8:-8, 8:-8] = True
    assert (thin[(rows == columns) & inner] > 0.5).all() and thin[(abs(rows - columns) > 1) & inner].max() < 1e-3
    faded = suppress(line, border=5)
    assert faded[0].max() == 0 and faded[2].max() == pytest.approx(thin[2].max() * (2 / 5) ** 2, rel=1e-6)


# -- the recipe ----------------------------------------------------------------------------------------------------------


def recipe(**changes):
    return EdgeRecipe(replace(SMALL, **changes), Runtime())


def test_targets_are_shares_and_padding_does_not_count(tmp_path):
    bsds(tmp_path / "data")
    made = recipe(data=str(tmp_path), flip=0.0)
    _, targets = made.batch()
    assert targets.shape == (2, 32, 32) and int((targets >= 0).sum()) == 2 * 16 * 20
    assert set((targets[targets >= 0] * 3).round().int().unique().tolist()) <= {0, 1, 2, 3}


def test_annotators_are_averaged():
    maps = torch.tensor([[[1, 0]], [[1, 1]], [[0, 0]], [[1, 0]]], dtype=torch.uint8)
    data = Transformed([("image", tv_tensors.Mask(maps))], lambda *items: items)
    assert data[0][1].tolist() == [[0.75, 0.25]]


def test_what_few_drew_is_negative_or_left_out():
    targets = torch.tensor([[[0.0, 0.2, 0.6, -1.0]]])
    positive, counted = recipe().sides(targets)
    assert positive.tolist() == [[[False, False, True, False]]] and counted.tolist() == [[[True, True, True, False]]]
    assert recipe(disputed="ignored").sides(targets)[1].tolist() == [[[True, False, True, False]]]


def test_the_balanced_loss_by_hand():
    """One edge among four pixels, all at 1/2: (3/4 + 3 * 1/4) log 2; and nothing where nothing counts."""
    drawn = torch.tensor([[[True, False, False, False]], [[False] * 4]])
    counted = torch.tensor([[[True] * 4], [[False] * 4]])
    loss = balanced_loss(torch.zeros(2, 1, 4), drawn, counted)
    assert loss.tolist() == pytest.approx([1.5 * np.log(2), 0.0])


def test_a_side_output_adds_its_loss():
    made = recipe()
    logits, targets = torch.randn(2, 1, 8, 8), (torch.rand(2, 8, 8) < 0.2).float()
    plain = made.loss(logits, targets)
    assert float(made.training_loss({"out": logits, "aux": [logits, logits]}, targets)) == pytest.approx(
        3 * float(plain)
    )


def test_predicting_at_any_size_whole_and_by_windows():
    pixels = np.random.default_rng(0).integers(0, 255, (45, 70, 3), dtype=np.uint8)
    for changes in ({}, {"window": 32, "overlap": 0.25}):
        made = recipe(**changes)
        result = made.predict([pixels])[0]
        assert result.strength.shape == result.thin.shape == (45, 70)
        assert 0 <= float(result.strength.min()) and float(result.strength.max()) <= 1
    assert made.draw(pixels, result).width > 3 * 70


def test_caffe_pixels_reach_255():
    made = recipe(pixels="caffe")
    assert made.facts["mean"] == CAFFE_MEAN
    images, _ = made.batch()
    assert 60 < float(images.abs().max()) <= 155
