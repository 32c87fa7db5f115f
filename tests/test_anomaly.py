"""The anomaly task: MVTec AD's layout, the embedded defects, metrics over the set, heat maps at the input's own size, the memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from paperzoo.blocks.region_overlap import RegionOverlap, overlap_curve
from paperzoo.catalog.cards import find
from paperzoo.data.anomaly import open_anomaly
from paperzoo.engine.checkpoint import restore, snapshot
from paperzoo.engine.loop import Settings, one_step
from paperzoo.engine.run import build
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.papers.anomaly.patchcore.recipe import PRESETS, PatchCoreRecipe
from paperzoo.tasks.anomaly import squash

SMALL = replace(
    PRESETS["embedded"], resize=48, crop_size=48, feature_dim=16, pretrain_steps=0, steps=None, batch_size=16
)


def picture(path, size=(30, 24), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def category(tmp_path):
    root = tmp_path / "mvtec" / "bottle"
    for i in range(3):
        picture(root / "train" / "good" / f"{i:03d}.png", seed=i)
    picture(root / "test" / "good" / "000.png", seed=9)
    picture(root / "test" / "crack" / "000.png", seed=10)
    mask = np.zeros((24, 30), np.uint8)
    mask[3:9, 4:8] = 255
    (root / "ground_truth" / "crack").mkdir(parents=True)
    Image.fromarray(mask).save(root / "ground_truth" / "crack" / "000_mask.png")
    return root


def trained(config=SMALL, seed=0):
    recipe = PatchCoreRecipe(config, Runtime(seed))
    for _ in range(recipe.config.steps):
        one_step(recipe, None)
    return recipe


def test_mvtec_layout(category):
    train, test = open_anomaly(str(category), "train"), open_anomaly(str(category), "test")
    assert (len(train), len(test)) == (3, 2) and test.defects == ["crack", "good"]
    image, label, mask = test[0]
    assert image.shape == (3, 24, 30) and label == 1 and mask.dtype == torch.bool and int(mask.sum()) == 24
    assert test[1][1] == 0 and not test[1][2].any()


def test_what_is_wrong_with_a_folder_is_said(category):
    with pytest.raises(DataError, match="choose one, for example .*bottle"):
        open_anomaly(str(category.parent), "train")
    with pytest.raises(PaperZooError, match="defects_brick"):
        open_anomaly("nothing", "train")
    (category / "ground_truth" / "crack" / "000_mask.png").unlink()
    with pytest.raises(DataError, match="000.png: has no mask; expected .*000_mask.png"):
        open_anomaly(str(category), "test")
    picture(category / "train" / "crack" / "1.png")
    with pytest.raises(DataError, match="only normal images"):
        open_anomaly(str(category), "train")


def test_a_mask_of_another_size_is_named(category):
    path = category / "ground_truth" / "crack" / "000_mask.png"
    Image.new("L", (10, 10)).save(path)
    with pytest.raises(DataError, match="000_mask.png"):
        open_anomaly(str(category), "test")[0]


def test_embedded_defects_lie_inside_their_masks():
    test = open_anomaly("defects_gravel", "test")
    assert {test.defects[i] for i in range(6)} == {"good", "scratch", "stain", "displaced", "smudge"}
    for i in range(12):
        image, label, mask = test[i]
        assert label == int(mask.any()) == int(test.defects[i] != "good")
        assert mask.float().mean() < 0.12 and image.dtype == torch.uint8
    assert all(label == 0 for _, label, _ in open_anomaly("defects_gravel", "train"))


def test_squash_keeps_the_order_of_large_scores():
    scores = torch.tensor([-5.0, 0.0, 1.0, 40.0, 41.0, 5000.0, 5001.0])
    assert (squash(scores).diff() > 0).all() and 0 < squash(scores).min() and squash(scores).max() < 1


def test_auroc_is_over_the_set():
    from sklearn.metrics import roc_auc_score

    recipe = trained()
    recipe.config = replace(recipe.config, batch_size=7)
    parts = list(recipe.outputs())
    scores, labels = (torch.cat(x).numpy() for x in ([o["score"] for o, _, _ in parts], [y for _, y, _ in parts]))
    maps, masks = (torch.cat(x).flatten().numpy() for x in ([o["map"] for o, _, _ in parts], [m for _, _, m in parts]))
    found = recipe.evaluate()
    assert found["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-5)
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks, maps), abs=1e-5)


def test_an_empty_memory_knows_nothing():
    recipe = PatchCoreRecipe(SMALL, Runtime())
    assert recipe.evaluate()["image_auroc"] == 0.5


class Brightness(nn.Module):
    """The map is the brightness; the score its maximum."""

    threshold = torch.tensor(0.5)

    def forward(self, x):
        heat = x.mean(1)
        return {"map": heat, "score": heat.amax((1, 2))}


def test_the_heat_map_lies_on_the_image(tmp_path):
    recipe = PatchCoreRecipe(replace(SMALL, resize=64, crop_size=48), Runtime())
    recipe.model = Brightness()
    recipe.facts |= {"mean": [0.0] * 3, "deviation": [1.0] * 3}
    pixels = np.zeros((100, 140, 3), np.uint8)
    pixels[40:60, 90:104] = 255
    result = recipe.predict([pixels])[0]
    assert result.heat_map.shape == (100, 140) and result.anomalous
    assert float(result.heat_map[50, 97]) > 0.9 and float(result.heat_map[50, 60]) < 0.1
    assert float(result.heat_map[2, 2]) == 0  # outside the crop
    assert recipe.draw(pixels, result).height > 100


def test_memory_is_a_tenth_and_normal_images_pass():
    recipe = trained(replace(SMALL, coreset=0.1))
    patches = 48 * (48 // 8) ** 2
    assert recipe.model.memory_bank.shape == (int(patches * 0.1), 16)
    assert len(recipe.collected.features) == 0
    train = [image for image, _, _ in recipe.train_set]
    assert not any(result.anomalous for result in recipe.predict(train[:8]))


def test_stopped_while_collecting_and_resumed_it_has_the_same_memory():
    config, settings = replace(SMALL, pretrain_steps=1), Settings(device="cpu")
    whole, first, second = (build(find("patchcore"), config, settings) for _ in range(3))
    while whole.runtime.step < whole.config.steps:
        one_step(whole, None)
    for _ in range(2):
        one_step(first, None)
    restore(second, snapshot(first))
    second.runtime.load_state_dict(first.runtime.state_dict())
    while second.runtime.step < second.config.steps:
        one_step(second, None)
    assert second.config.steps == 4 and len(whole.model.memory_bank)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_the_backbone_is_not_touched_while_collecting():
    recipe = PatchCoreRecipe(SMALL, Runtime())
    before = {k: v.clone() for k, v in recipe.model.backbone.state_dict().items()}
    one_step(recipe, None)
    assert all(torch.equal(v, before[k]) for k, v in recipe.model.backbone.state_dict().items())


def test_a_broken_image_is_skipped_and_reported(category):
    (category / "train" / "good" / "001.png").write_bytes(b"nonsense")
    recipe = trained(replace(SMALL, data=str(category), batch_size=2, coreset=1.0))
    assert [path for path in recipe.runtime.broken if path.endswith("001.png")]
    assert len(recipe.model.memory_bank) == 2 * 6 * 6


def test_a_wrong_backbone_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(PaperZooError, match="x.safetensors: does not fit the backbone of patchcore_resnet18"):
        PatchCoreRecipe(replace(SMALL, weights=str(tmp_path / "x.safetensors")), Runtime())


def test_a_saved_run_predicts_without_the_data():
    recipe = trained()
    again = PatchCoreRecipe(replace(SMALL, data="gone"), Runtime(), facts=recipe.facts)
    again.model.load_state_dict(recipe.model.state_dict())
    image = recipe.test_set[2][0]
    assert again.predict([image])[0].score == recipe.predict([image])[0].score


def test_a_folder_of_good_images_holds_some_out_and_draws_defects(tmp_path):
    for i in range(11):
        picture(tmp_path / "photos" / f"shelf_{i % 2}" / f"{i:02d}.png", size=(40, 30), seed=i)
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    train, test = (open_anomaly(str(tmp_path / "photos"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (9, 4) and not {*train.files} & {*test.files}
    assert test.defects[:2] == ["good", "good"] and test.defects[2:] == ["scratch", "stain"]
    assert all(label == 0 and not mask.any() for _, label, mask in train)
    for i in range(2):
        good, drawn = test[i], test[i + 2]
        assert (good[1], drawn[1]) == (0, 1) and drawn[2].any() and drawn[0].shape == (3, 30, 40)
        changed = (good[0] != drawn[0]).any(0)
        assert changed.any() and not (changed & ~drawn[2]).any()
        assert torch.equal(drawn[0], test[i + 2][0])


def test_a_folder_with_too_few_pictures_is_refused(tmp_path):
    picture(tmp_path / "one" / "1.png")
    with pytest.raises(DataError, match="has 1 pictures; it needs at least 2"):
        open_anomaly(str(tmp_path / "one"), "train")
    (tmp_path / "half" / "train" / "good").mkdir(parents=True)
    with pytest.raises(DataError, match="train/good and test/<defect>"):
        open_anomaly(str(tmp_path / "half"), "train")


def test_region_overlap_counts_regions_not_pixels():
    masks = torch.zeros(2, 6, 6, dtype=torch.bool)
    masks[0, :4, :4] = True  # sixteen pixels, found
    masks[1, 5, 5] = True  # one pixel, not found
    maps = torch.zeros(2, 6, 6)
    maps[0, :4, :4] = 1.0
    metric = RegionOverlap(0.3)
    metric.update(maps, masks)
    # from half of the regions without a false alarm on to all at a rate of one: 0.5 + 0.5 x; its mean over 0 … 0.3 is 0.575
    assert float(metric.compute()) == pytest.approx(0.575)


def test_region_overlap_joins_corners_within_an_image_only():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 1, 1] = masks[0, 2, 2] = masks[1, 2, 2] = True
    maps = torch.zeros(2, 4, 4)
    maps[0, 1, 1] = 1.0
    _, overlap = overlap_curve(maps, masks)
    assert overlap.tolist() == pytest.approx([0, 0.25, 1])  # half of one of two regions


def test_region_overlap_without_defects_is_zero():
    metric = RegionOverlap()
    metric.update(torch.rand(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool))
    assert float(metric.compute()) == 0
    with pytest.raises(ValueError, match="defective and one normal"):
        overlap_curve(torch.rand(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="one shape"):
        overlap_curve(torch.rand(1, 4, 4), torch.zeros(1, 4, 5, dtype=torch.bool))


def test_what_lies_outside_the_crop_is_as_cold_as_the_floor():
    recipe = PatchCoreRecipe(replace(SMALL, resize=64, crop_size=48), Runtime())
    recipe.floor = -1.0
    heat = recipe.to_own_size(torch.full((48, 48), -0.25), (64, 80))
    assert float(heat[2, 2]) == -1 and float(heat[32, 40]) == -0.25


def test_the_embedded_object_stays_in_its_place():
    train, test = open_anomaly("defects_flower", "train"), open_anomaly("defects_flower", "test")
    assert (len(train), len(test)) == (48, 60)
    images = torch.stack([image for image, _, _ in train]).float()
    assert images.shape == (48, 3, 96, 96) and float(images.std(0).mean()) < float(images.mean(0).std())
    assert not torch.equal(train[0][0], train[1][0])
    for i in range(12):
        _, label, mask = test[i]
        assert label == int(mask.any()) == int(test.defects[i] != "good")
