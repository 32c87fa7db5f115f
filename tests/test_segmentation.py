"""The segmentation task: readers of masks, metrics, training pairs, prediction at the input's own size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from paperzoo.data.masks import CITYSCAPES_IDS, open_masks, read_ids
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks import segmentation
from paperzoo.tasks.segmentation import Config, SegmentationRecipe

SMALL = Config(model="fcn8s_slim", crop_size=32, steps=2, batch_size=2, optimizer="adamw", learning_rate=1e-3)


def picture(path, size=(20, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path, ids, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(ids, dtype=np.uint8))
    if palette:
        image.putpalette(segmentation.palette().flatten().tolist())
    image.save(path)
    return path


def folder(root, ids=(0, 1, 2), count=5, size=(20, 16)):
    for i in range(count):
        picture(root / "images" / f"{i}.png", size, i)
        mask(root / "masks" / f"{i}.png", np.resize(ids, (size[1], size[0])))
    return root


# -- readers -----------------------------------------------------------------------------------------------------------


def test_folder_without_splits_holds_out_every_fifth(tmp_path):
    root = folder(tmp_path, count=10)
    train, test = open_masks(str(root), "train"), open_masks(str(root), "test")
    assert len(train) == 8 and [p.name for p, _ in test.pairs] == ["4.png", "9.png"]
    image, ids = train[0]
    assert image.shape == (3, 16, 20) and image.dtype == torch.uint8
    assert ids.shape == (16, 20) and ids.dtype == torch.int64 and isinstance(ids, tv_tensors.Mask)
    assert train.labels == ["class 0", "class 1", "class 2"]


def test_folder_with_splits_and_label_names(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / "images" / split / "a.jpg")
        mask(tmp_path / "masks" / split / "a.png", np.full((16, 20), 3))
    (tmp_path / "labels.txt").write_text("road\nsky\ntree\nhouse\n")
    data = open_masks(str(tmp_path), "test")
    assert data.labels == ["road", "sky", "tree", "house"] and int(data[0][1].max()) == 3


def test_palette_masks_give_indices_not_colours(tmp_path):
    path = mask(tmp_path / "m.png", [[0, 1], [15, 255]], palette=True)
    assert Image.open(path).mode == "P"
    assert read_ids(path).tolist() == [[0, 1], [15, 255]]


def test_black_and_white_masks_are_background_and_object(tmp_path):
    data = open_masks(str(folder(tmp_path, ids=(0, 255))), "train")
    assert data.labels == ["background", "object"] and set(data[0][1].unique().tolist()) == {0, 1}


def test_ade_layout_ignores_zero(tmp_path):
    for split in ("training", "validation"):
        picture(tmp_path / "images" / split / "a.jpg")
        mask(tmp_path / "annotations" / split / "a.png", np.resize([0, 1, 150], (16, 20)))
    data = open_masks(str(tmp_path), "train")
    assert len(data.labels) == 150 and set(data[0][1].unique().tolist()) == {0, 149, 255}


def test_cityscapes_label_ids_become_the_19_classes(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_0_leftImg8bit.png")
        for ending, ids in (("labelIds", [0, *CITYSCAPES_IDS]), ("color", [9]), ("instanceIds", [9])):
            mask(tmp_path / "gtFine" / split / "ulm" / f"ulm_0_gtFine_{ending}.png", np.resize(ids, (16, 20)))
    data = open_masks(str(tmp_path), "train")
    assert data.labels[:2] == ["road", "sidewalk"] and set(data[0][1].unique().tolist()) == {*range(19), 255}


def test_camvid_has_eleven_classes_and_one_id_that_does_not_count(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}annot").mkdir()
        Image.new("RGB", (3, 2)).save(tmp_path / name / "0001TP.png")
        Image.fromarray(np.array([[0, 10, 11], [3, 8, 11]], np.uint8)).save(tmp_path / f"{name}annot" / "0001TP.png")
    for split in ("train", "test"):
        data = open_masks(str(tmp_path), split)
        assert data.labels[0] == "sky" and data.labels[8] == "car" and len(data.labels) == 11
        assert data[0][1].tolist() == [[0, 10, 255], [3, 8, 255]]
    (tmp_path / "testannot" / "0001TP.png").unlink()
    with pytest.raises(DataError, match="has no mask"):
        open_masks(str(tmp_path), "test")


def test_voc_layout(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("a", "b"):
        picture(root / "JPEGImages" / f"{name}.jpg")
        mask(root / "SegmentationClass" / f"{name}.png", np.resize([0, 20, 255], (16, 20)), palette=True)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\n")
    train, test = open_masks(str(tmp_path), "train"), open_masks(str(root), "test")
    assert (len(train), train.path(0).stem, test.path(0).stem) == (1, "a", "b")
    assert train.labels[20] == "tvmonitor" and set(train[0][1].unique().tolist()) == {0, 20, 255}


@pytest.mark.parametrize("ids, said", [(np.zeros((16, 19)), "20 x 16"), (np.full((16, 20), 7), "class id 7")])
def test_a_mask_that_does_not_fit_is_named(tmp_path, ids, said):
    root = folder(tmp_path)
    (root / "labels.txt").write_text("a\nb\nc\n")
    bad = mask(root / "masks" / "1.png", ids)
    with pytest.raises(DataError, match=said) as caught:
        open_masks(str(root), "train")[1]
    assert caught.value.path == str(bad)


def test_a_missing_mask_is_named(tmp_path):
    root = folder(tmp_path)
    (root / "masks" / "2.png").unlink()
    with pytest.raises(DataError, match="2.png: has no mask"):
        open_masks(str(root), "train")


def test_colour_masks_and_broken_masks_are_refused(tmp_path):
    with pytest.raises(DataError, match="colour picture"):
        read_ids(picture(tmp_path / "rgb.png"))
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    with pytest.raises(DataError, match="cut.png: not a readable mask"):
        read_ids(tmp_path / "cut.png")


def test_unknown_sets_are_refused(tmp_path):
    with pytest.raises(PaperZooError, match="digit_scenes"):
        open_masks("nothing", "train")
    with pytest.raises(DataError, match="images/ and masks/"):
        open_masks(str(tmp_path), "train")


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    # class 0: 6 of 8 found, 1 false; class 1: 2 of 3 found, 2 false; class 2 never appears
    found = segmentation.metrics(torch.tensor([[6, 2, 0], [1, 2, 0], [0, 0, 0]]))
    assert found["miou"] == pytest.approx((6 / 9 + 2 / 5) / 2)
    assert found["pixel_accuracy"] == pytest.approx(8 / 11)
    assert found["mean_accuracy"] == pytest.approx((6 / 8 + 2 / 3) / 2)
    assert found["frequency_weighted_iou"] == pytest.approx((8 * 6 / 9 + 3 * 2 / 5) / 11)


class Fixed(torch.nn.Module):
    """Says class 1 where the first channel is positive."""

    def forward(self, x):
        return torch.stack([-x[:, 0], x[:, 0]], 1)


def test_evaluation_is_over_the_set_and_ignores_255(tmp_path):
    # two test images of different sizes; averaging over images would give another number
    for i in range(10):
        size = (24, 24) if i == 4 else (8, 8)
        pixels = np.zeros((*size, 3), np.uint8)
        pixels[:, : size[1] // 2] = 255
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        truth = np.zeros(size)
        truth[:, : size[1] // 4] = 1
        truth[0] = 255
        mask(tmp_path / "masks" / f"{i}.png", truth)
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    recipe = SegmentationRecipe(Config(**{**vars(SMALL), "data": str(tmp_path)}), Runtime())
    recipe.model = Fixed()
    right = {0: 23 * 12 + 7 * 4, 1: 23 * 6 + 7 * 2}
    false = 23 * 6 + 7 * 2
    expected = (right[0] / (right[0] + false) + right[1] / (right[1] + false)) / 2
    assert recipe.evaluate()["miou"] == pytest.approx(expected)


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_padding_is_ignored_and_masks_stay_whole_numbers():
    recipe = SegmentationRecipe(Config(**{**vars(SMALL), "crop_size": 40, "scale": (0.5, 2.0)}), Runtime())
    pair = (
        tv_tensors.Image(torch.full((3, 24, 24), 255, dtype=torch.uint8)),
        tv_tensors.Mask(torch.ones(24, 24, dtype=torch.int64)),
    )
    transform = v2.Compose(recipe.augmentation() + recipe.to_input)
    for _ in range(8):
        image, ids = transform(*pair)
        assert image.shape == (3, 40, 40) and ids.shape == (40, 40) and ids.dtype == torch.int64
        assert set(ids.unique().tolist()) <= {1, 255}
        assert torch.equal(image[0] > 1, ids == 1)  # the mask went where the image went; padding is the mean


def test_loss_counts_only_known_pixels():
    recipe = SegmentationRecipe(SMALL, Runtime())
    logits, ids = torch.randn(2, 2, 4, 4), torch.randint(0, 2, (2, 4, 4))
    ids[0] = 255
    expected = torch.nn.functional.cross_entropy(logits[1:], ids[1:])
    torch.testing.assert_close(recipe.loss(logits, ids), expected)
    assert float(recipe.loss(logits, torch.full_like(ids, 255))) == 0


def hard(**changes):
    return SegmentationRecipe(Config(**{**vars(SMALL), **changes}), Runtime())


def test_hard_pixels_by_hand():
    probability = torch.tensor([0.9, 0.2, 0.6, 0.8, 0.95, 0.1, 0.99, 0.7]).view(1, 2, 4)  # of class 1, the truth
    logits = torch.stack([torch.zeros(1, 2, 4), torch.logit(probability)], 1)
    truth = torch.ones(1, 2, 4, dtype=torch.int64)
    truth[0, 1, 1] = 255  # the hardest does not count
    for below, least, kept in (
        (0.75, 0.0, (0.2, 0.6, 0.7)),
        (0.75, 0.5, (0.2, 0.6, 0.7, 0.8)),
        (0.0, 0.25, (0.2, 0.6)),
        (1.0, 0.0, (0.9, 0.2, 0.6, 0.8, 0.95, 0.99, 0.7)),
        (0.3, 1.0, (0.9, 0.2, 0.6, 0.8, 0.95, 0.99, 0.7)),
    ):
        found = hard(hard_pixels=below, min_kept=least).loss(logits, truth)
        assert float(found) == pytest.approx(-np.log(kept).mean(), rel=1e-5)


@pytest.mark.parametrize("below", [None, 0.7])
def test_batches_where_nothing_counts_have_no_loss_and_no_nan(below):
    recipe = hard(hard_pixels=below)
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    loss = recipe.training_loss({"out": logits, "aux": [logits, logits]}, torch.full((2, 4, 4), 255))
    loss.backward()
    assert float(loss) == 0 and float(logits.grad.abs().sum()) == 0
    background = recipe.loss(logits, torch.zeros(2, 4, 4, dtype=torch.int64))  # an empty mask is all background
    assert 0 < float(background) < 10
    found = recipe.step((torch.zeros(2, 3, 32, 32), torch.full((2, 32, 32), 255)))
    assert float(found["loss"]) == 0 and float(found["train_pixel_accuracy"]) == 0


def test_auxiliary_heads_are_weighed():
    recipe = hard(aux_weight=0.4)
    out, one, two = torch.randn(3, 2, 2, 4, 4)
    truth = torch.randint(0, 2, (2, 4, 4))
    expected = recipe.loss(out, truth) + 0.4 * recipe.loss(one, truth) + 0.4 * recipe.loss(two, truth)
    torch.testing.assert_close(recipe.training_loss({"out": out, "aux": [one, two]}, truth), expected)


def test_poly_schedule():
    recipe = SegmentationRecipe(Config(**{**vars(SMALL), "steps": 100, "warmup_steps": 10}), Runtime())
    assert recipe.rate(0) == pytest.approx(0.1) and recipe.rate(10) == 1
    assert recipe.rate(55) == pytest.approx(0.5**0.9) and recipe.rate(100) == 0


def test_prediction_has_the_inputs_own_size(tmp_path):
    recipe = SegmentationRecipe(SMALL, Runtime())
    path = picture(tmp_path / "a.png", size=(50, 33))
    for value, size in (
        (str(path), (33, 50)),
        (np.zeros((17, 40, 3), np.uint8), (17, 40)),
        (Image.new("L", (64, 64)), (64, 64)),
    ):
        result = recipe.predict([value])[0]
        assert result.mask.shape == size and result.confidence.shape == size
        assert sum(result.areas.values()) == pytest.approx(1)
        assert recipe.draw(value, result).width >= size[1]


class Local(torch.nn.Module):
    """Logits from a pixel's own colour, so windows change nothing; remembers what sizes it was given."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def forward(self, x):
        self.sizes.add(tuple(x.shape[2:]))
        return torch.stack([x[:, 0], x[:, 1]], 1)


def test_windows_give_what_the_whole_image_gives(tmp_path):
    root = str(folder(tmp_path, ids=(0, 1), count=10, size=(50, 33)))
    whole, windows = hard(data=root), hard(data=root, window=16, overlap=0.25)
    whole.model, windows.model = Local(), Local()
    assert whole.evaluate() == windows.evaluate() and whole.model.sizes == {(33, 50)}
    image = np.random.default_rng(0).integers(0, 255, (70, 9, 3), dtype=np.uint8)
    a, b = whole.predict([image])[0], windows.predict([image])[0]
    assert torch.equal(a.mask, b.mask) and a.mask.shape == (70, 9) and windows.model.sizes == {(16, 16)}
    torch.testing.assert_close(a.confidence, b.confidence)


def test_a_window_that_the_network_cannot_take_is_refused():
    recipe = hard(window=16)
    recipe.model = torch.nn.AvgPool2d(3, 3)
    with pytest.raises(PaperZooError, match="window 16.*5 x 5"):
        recipe.predict([np.zeros((32, 32, 3), np.uint8)])


def test_arguments_of_the_model():
    assert hard(model_arguments={"drop_rate": 0.25}).model.dropout.p == 0.25
    with pytest.raises(PaperZooError, match="num_classes is not chosen"):
        hard(model_arguments={"num_classes": 3})
    with pytest.raises(PaperZooError, match="backbon"):
        hard(model_arguments={"backbon": "resnet50"})


def test_a_backbone_file_is_taken_over_and_a_wrong_one_refused(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(1)
    donor = {k: (v + 1).contiguous() for k, v in SegmentationRecipe(SMALL, Runtime()).model.state_dict().items()}
    save_file(donor, str(tmp_path / "b.safetensors"))
    recipe = SegmentationRecipe(
        Config(**{**vars(SMALL), "backbone_weights": str(tmp_path / "b.safetensors")}), Runtime()
    )
    assert torch.equal(recipe.model.features[0].weight, donor["features.0.weight"])
    save_file({"x": torch.zeros(1)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(PaperZooError, match="x.safetensors"):
        SegmentationRecipe(Config(**{**vars(SMALL), "backbone_weights": str(tmp_path / "x.safetensors")}), Runtime())


def test_palette_is_vocs():
    assert segmentation.palette()[[0, 1, 2, 15, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [224, 224, 192],
    ]


def test_embedded_sets_agree_and_share_nothing():
    by_class, ink = open_masks("digit_scenes", "test"), open_masks("digit_ink", "test")
    assert len(by_class.labels) == 11 and ink.labels == ["background", "digit"]
    assert torch.equal((by_class[3][1] > 0).long(), ink[3][1].as_subclass(torch.Tensor))
    assert not torch.equal(ink[0][0], open_masks("digit_ink", "train")[0][0])


def test_shape_masks():
    data, train = open_masks("shape_masks", "test"), open_masks("shape_masks", "train")
    assert data.labels == ["background", "circle", "triangle", "square", "star", "cross", "ring", "digit"]
    image, ids = data[1]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8 and isinstance(ids, tv_tensors.Mask)
    every = torch.stack([data[i][1].as_subclass(torch.Tensor) for i in range(len(data))])
    assert set(every.unique().tolist()) == {*range(8), 255}  # every class, and crowds that do not count
    assert 0 < int((every == 0).flatten(1).all(1).sum()) < 40  # some scenes are empty
    assert not any(torch.equal(data[i][0], train[i][0]) for i in range(20))
    assert torch.equal(data[5][0], open_masks("shape_masks", "test")[5][0])
