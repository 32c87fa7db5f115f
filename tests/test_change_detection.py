"""The change-detection task: readers of pairs and rasters, the generated terrain, metrics, prediction by windows, maps on the map."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from sklearn.metrics import cohen_kappa_score, f1_score, jaccard_score
from torchvision import tv_tensors

from paperzoo.data import rasters
from paperzoo.data.aerial import ISAID, open_aerial
from paperzoo.data.change_pairs import open_changes
from paperzoo.data.terrain import LABELS, TerrainMasks, terrain
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, MissingExtra, PaperZooError
from paperzoo.tasks import change_detection, change_pictures
from paperzoo.tasks.change_detection import ChangeDetectionRecipe, Config

SMALL = Config(model="bit_base_slim", crop_size=32, steps=2, batch_size=2, optimizer="adamw", blur=0.5, turn=True)


def picture(path, size=(20, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def grey(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def pairs(root, names=("a", "b"), folders=("A", "B", "label"), size=(20, 16), values=(0, 255), ending=".png"):
    for i, name in enumerate(names):
        picture(root / folders[0] / f"{name}{ending}", size, i)
        picture(root / folders[1] / f"{name}{ending}", size, 50 + i)
        grey(root / folders[2] / f"{name}.png", np.resize(values, (size[1], size[0])))
    return root


def geotiff(path, array, compression=None):
    """A GeoTIFF in UTM zone 50N with pixels of half a metre."""
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32650)
    tags = [
        (33550, "d", 3, (0.5, 0.5, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, 440720.0, 3751320.0, 0.0), True),
        (34735, "H", len(keys), keys, True),
        (34737, "s", 0, "WGS 84 / UTM zone 50N|", True),
    ]
    kind = "rgb" if array.shape[-1] == 3 else "minisblack"
    options = {"metadata": None, "compression": compression, "photometric": kind, "planarconfig": "contig"}
    tifffile.imwrite(path, array, extratags=tags, **options)


# -- layouts -------------------------------------------------------------------------------------------------------------


def test_levir_layout_with_a_folder_for_each_split(tmp_path):
    for split, names in (("train", "ab"), ("val", "c"), ("test", "de")):
        pairs(tmp_path / split, names)
    train, test = open_changes(str(tmp_path), "train"), open_changes(str(tmp_path), "test")
    assert len(train) == 2 and [t[0].stem for t in test.triples] == ["d", "e"]
    before, after, mask = train[0]
    assert before.shape == after.shape == (3, 16, 20) and before.dtype == torch.uint8
    assert isinstance(mask, tv_tensors.Mask) and mask.dtype == torch.int64 and mask.unique().tolist() == [0, 1]
    assert train.labels == ["unchanged", "changed"] and train.bands == 3


def test_lists_name_the_pictures_of_a_split(tmp_path):
    pairs(tmp_path, "abcd")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "train.txt").write_text("a.png\nc.png\n\n")
    (tmp_path / "list" / "val.txt").write_text("b.png b.png b.png\n")
    assert [t[0].stem for t in open_changes(str(tmp_path), "train").triples] == ["a", "c"]
    assert [t[0].stem for t in open_changes(str(tmp_path), "test").triples] == ["b"]
    (tmp_path / "list" / "train.txt").write_text("a.png\nnone.png\n")
    with pytest.raises(DataError, match=r"train.txt:2.*'none.png'"):
        open_changes(str(tmp_path), "train")


def test_other_folder_names_and_endings(tmp_path):
    pairs(tmp_path / "train", "ab", ("t1", "t2", "mask"), ending=".jpg")
    assert len(open_changes(str(tmp_path), "train")) == 2
    with pytest.raises(DataError, match="A, B and label"):
        open_changes(str(tmp_path), "test")


def test_every_fifth_pair_is_held_out_without_splits(tmp_path):
    pairs(tmp_path, "abcdefghij", ("before", "after", "change"))
    assert len(open_changes(str(tmp_path), "train")) == 8
    assert [t[0].stem for t in open_changes(str(tmp_path), "test").triples] == ["e", "j"]


def test_ids_of_several_kinds_of_change_and_ignored_pixels(tmp_path):
    pairs(tmp_path / "train", "a", values=(0, 1, 2, 255))
    data = open_changes(str(tmp_path), "train")
    assert data.labels == ["unchanged", "change 1", "change 2"] and data[0][2].unique().tolist() == [0, 1, 2, 255]
    (tmp_path / "labels.txt").write_text("same\nbuilt\n")
    with pytest.raises(DataError, match="holds the id 2"):
        open_changes(str(tmp_path), "train")[0]


def test_masks_of_zeros_and_ones(tmp_path):
    pairs(tmp_path / "train", "a", values=(0, 1))
    data = open_changes(str(tmp_path), "train")
    assert data.labels == ["unchanged", "changed"] and data[0][2].unique().tolist() == [0, 1]


def test_a_table_of_pairs(tmp_path):
    pairs(tmp_path, "ab")
    rows = ["before,after,label,split", "A/a.png,B/a.png,label/a.png,train", "A/b.png,B/b.png,label/b.png,val"]
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(rows))
    assert open_changes(str(table), "test").triples[0][0].stem == "b"
    table.write_text("\n".join([*rows, "A/x.png,B/b.png,label/b.png,val"]))
    with pytest.raises(DataError, match=r"pairs.csv:4.*x.png"):
        open_changes(str(table), "test")
    table.write_text("before,after\n")
    with pytest.raises(DataError, match="column label"):
        open_changes(str(table), "test")


@pytest.mark.parametrize("folder", ["B", "label"])
def test_a_missing_partner_is_named(tmp_path, folder):
    pairs(tmp_path / "train", "ab")
    (tmp_path / "train" / folder / "b.png").unlink()
    with pytest.raises(DataError, match=rf"b.png: has no partner.*{folder}"):
        open_changes(str(tmp_path), "train")


def test_dates_and_masks_of_other_sizes_are_refused(tmp_path):
    pairs(tmp_path / "train", "abc")
    picture(tmp_path / "train" / "B" / "a.png", (10, 16))
    grey(tmp_path / "train" / "label" / "b.png", np.zeros((8, 8)))
    (tmp_path / "train" / "A" / "c.png").write_bytes(b"\x89PNG broken")
    data = open_changes(str(tmp_path), "train")
    with pytest.raises(DataError, match="10 x 16 pixels.*same grid"):
        data[0]
    with pytest.raises(DataError, match="8 x 8 pixels, b.png is 20 x 16"):
        data[1]
    with pytest.raises(DataError, match="c.png.*not a readable image"):
        data[2]


def test_names_that_are_no_set():
    with pytest.raises(PaperZooError, match="neither the embedded set terrain_changes"):
        open_changes("nothing_here")
    with pytest.raises(PaperZooError, match="split 'dev'"):
        open_changes("terrain_changes", "dev")


# -- rasters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planes_first", [False, True])
def test_sixteen_bits_and_six_bands(tmp_path, planes_first):
    values = np.random.default_rng(0).integers(0, 4096, (9, 11, 6), dtype=np.uint16)
    array = values.transpose(2, 0, 1) if planes_first else values
    layout = "separate" if planes_first else "contig"
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", planarconfig=layout, metadata=None)
    found = rasters.read_bands(tmp_path / "a.tif")
    assert found.shape == (6, 9, 11) and found.dtype == torch.float32
    assert torch.equal(found, torch.from_numpy(values.transpose(2, 0, 1).astype(np.float32) / 65535))


def test_bands_are_kept_and_transparency_is_dropped(tmp_path):
    four = np.random.default_rng(0).integers(0, 255, (8, 8, 4), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", four, photometric="rgb", metadata=None)
    Image.fromarray(four).save(tmp_path / "a.png")
    Image.fromarray(four[..., 0].astype(np.uint16) * 256).save(tmp_path / "deep.png")
    assert torch.equal(rasters.read_bands(tmp_path / "a.tif"), torch.from_numpy(four).permute(2, 0, 1))
    assert rasters.read_bands(tmp_path / "a.png").shape == (3, 8, 8)
    deep = rasters.read_bands(tmp_path / "deep.png")
    assert deep.dtype == torch.float32 and deep.max() <= 1 and deep.shape == (1, 8, 8)


def test_pixels_without_a_finite_value_are_zero(tmp_path):
    values = np.full((4, 4), 0.5, dtype=np.float32)
    values[0, 0], values[1, 1] = np.nan, np.inf
    tifffile.imwrite(tmp_path / "a.tif", values)
    found = rasters.read_bands(tmp_path / "a.tif")
    assert found[0, 0, 0] == 0 and found[0, 1, 1] == 0 and found[0, 2, 2] == 0.5


def test_broken_rasters_and_formats_of_the_extra(tmp_path):
    picture(tmp_path / "a.tif", (64, 64))
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="a.tif"):
        rasters.read_bands(tmp_path / "a.tif")
    with pytest.raises(DataError, match="no such file"):
        rasters.read_bands(tmp_path / "b.tif")
    (tmp_path / "a.img").write_bytes(b"EHFA_HEADER_TAG")
    with pytest.raises((MissingExtra, DataError), match=r"paperzoo\[geo\]|a.img"):
        rasters.read_bands(tmp_path / "a.img")


def test_a_written_map_lies_where_its_picture_lies(tmp_path):
    geotiff(tmp_path / "a.tif", np.zeros((8, 12, 4), dtype=np.uint16))
    mask = torch.zeros(8, 12, dtype=torch.int64)
    mask[2:4, 3:7] = 1
    rasters.write_mask(tmp_path / "out" / "map.tif", mask, like=tmp_path / "a.tif", scale=255)
    assert rasters.georeference(tmp_path / "out" / "map.tif") == rasters.georeference(tmp_path / "a.tif")
    assert rasters.georeference(tmp_path / "a.tif")[33550] == (0.5, 0.5, 0.0)
    assert torch.equal(rasters.read_bands(tmp_path / "out" / "map.tif")[0].long(), mask * 255)
    rasters.write_mask(tmp_path / "map.png", mask, like=tmp_path / "a.tif")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "map.png")), mask.numpy())


# -- the generated terrain ----------------------------------------------------------------------------------------------


def test_terrain_is_deterministic_and_longer_lists_start_alike():
    few, many = terrain(3, 32), terrain(70, 32)
    assert torch.equal(few.before, many.before[:3]) and torch.equal(few.change, many.change[:3])
    assert not torch.equal(terrain(3, 32, split="test").before, few.before)
    assert few.before.dtype == torch.uint8 and few.before.shape == (3, 3, 32, 32)


def test_change_is_where_a_building_is_on_one_date_alone():
    tiles = terrain(64, 64)
    built = {LABELS.index("building"), LABELS.index("tank")}
    before, after = (sum((m == k).long() for k in built) for m in (tiles.before_mask, tiles.after_mask))
    assert torch.equal(tiles.change.long(), (before != after).long())
    share = float(tiles.change.float().mean())
    assert 0.01 < share < 0.1 and 0.1 < float((tiles.change.flatten(1).sum(1) == 0).float().mean()) < 0.6


def test_terrain_refuses_what_it_cannot_draw():
    for arguments in ({"count": 0}, {"count": 1, "size": 16}, {"count": 1, "split": "dev"}, {"count": 1, "zoom": 0}):
        with pytest.raises(ValueError):
            terrain(**arguments)


def test_single_dates_have_small_foreground():
    data = TerrainMasks("test")
    image, mask = data[0]
    assert image.shape == (3, 96, 96) and mask.shape == (96, 96) and mask.dtype == torch.int64
    shares = torch.bincount(torch.stack([data[i][1] for i in range(len(data))]).flatten(), minlength=4) / (96 * 96 * 96)
    assert 0.85 < shares[0] < 0.96 and (shares[1:] > 0.002).all()


def test_isaid_masks_are_colours(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / split / "images" / "P0001.png", (6, 4))
        colours = np.zeros((4, 6, 3), dtype=np.uint8)
        colours[1], colours[2] = ISAID["storage tank"], ISAID["harbor"]
        (tmp_path / split / "masks").mkdir()
        Image.fromarray(colours).save(tmp_path / split / "masks" / "P0001_instance_color_RGB.png")
    data = open_aerial(str(tmp_path), "test")
    image, mask = data[0]
    assert image.shape == (3, 4, 6) and mask[:, 0].tolist() == [0, 2, 15, 0] and len(data.labels) == 16
    colours[3, 3] = (1, 2, 3)
    Image.fromarray(colours).save(tmp_path / "val" / "masks" / "P0001_instance_color_RGB.png")
    with pytest.raises(DataError, match=r"P0001_instance.*\(1, 2, 3\)"):
        data[0]
    picture(tmp_path / "train" / "images" / "P0002.png")
    with pytest.raises(DataError, match="P0002.png: has no mask"):
        open_aerial(str(tmp_path), "train")


def test_other_aerial_names_are_a_segmentation_set():
    every, built = open_aerial("terrain", "test"), open_aerial("terrain_buildings", "test")
    assert every.labels == LABELS and built.labels == ["background", "building"]
    assert torch.equal(built[0][1] == 1, (every[0][1] == 1) | (every[0][1] == 2))
    with pytest.raises(PaperZooError, match="neither an embedded segmentation set"):
        open_aerial("nothing_here")


# -- metrics -------------------------------------------------------------------------------------------------------------


def test_metrics_equal_sklearns():
    rng = np.random.default_rng(0)
    truth, found = rng.random(500) < 0.2, rng.random(500) < 0.3
    counts = torch.tensor([[((truth == i) & (found == j)).sum() for j in (0, 1)] for i in (0, 1)])
    result = change_detection.metrics(counts)
    assert result["f1"] == pytest.approx(f1_score(truth, found))
    assert result["change_iou"] == pytest.approx(jaccard_score(truth, found))
    assert result["kappa"] == pytest.approx(cohen_kappa_score(truth, found))
    assert result["overall_accuracy"] == pytest.approx((truth == found).mean())
    assert "miou" not in result


def test_metrics_by_hand():
    """Two of three changed pixels found, one false alarm, of ten."""
    result = change_detection.metrics(torch.tensor([[6, 1], [1, 2]]))
    assert result["precision"] == result["recall"] == result["f1"] == pytest.approx(2 / 3)
    assert result["change_iou"] == pytest.approx(2 / 4) and result["overall_accuracy"] == pytest.approx(0.8)
    assert result["kappa"] == pytest.approx((0.8 - 0.58) / 0.42)


def test_metrics_without_any_change():
    result = change_detection.metrics(torch.tensor([[10, 0], [0, 0]]))
    assert result["f1"] == result["recall"] == result["kappa"] == 0 and result["overall_accuracy"] == 1


def test_several_kinds_of_change_count_as_one_for_f1():
    result = change_detection.metrics(torch.tensor([[5, 0, 0], [0, 1, 2], [1, 0, 1]]))
    assert result["recall"] == pytest.approx(4 / 5) and result["overall_accuracy"] == pytest.approx(7 / 10)
    assert result["miou"] == pytest.approx(np.mean([5 / 6, 1 / 3, 1 / 4]))


# -- the recipe ----------------------------------------------------------------------------------------------------------


def recipe(config=SMALL, **changes):
    from dataclasses import replace

    return ChangeDetectionRecipe(replace(config, **changes), Runtime())


def test_both_dates_and_the_mask_are_cropped_alike(tmp_path):
    """Pictures that hold their mask's values stay on top of it, whatever the crop and mirror."""
    rng = np.random.default_rng(0)
    for name in "abc":
        values = (rng.random((40, 40)) < 0.5).astype(np.uint8) * 255
        for folder in ("A", "B"):
            (tmp_path / "train" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.stack([values] * 3, 2)).save(tmp_path / "train" / folder / f"{name}.png")
        grey(tmp_path / "train" / "label" / f"{name}.png", values)
    made = recipe(data=str(tmp_path), blur=0.0, scale=(1.0, 1.0))
    for _ in range(3):
        before, after, masks = made.batch()
        made.runtime.finish()
        assert torch.equal((before[:, 0] > 0).long(), masks) and torch.equal(before, after)


def test_small_pictures_are_padded_with_what_does_not_count(tmp_path):
    pairs(tmp_path / "train", "ab", size=(20, 16))
    before, _, masks = recipe(data=str(tmp_path), scale=(1.0, 1.0), turn=False).batch()
    assert before.shape == (2, 3, 32, 32) and int((masks != 255).sum()) == 2 * 20 * 16


def test_loss_is_the_mean_over_counted_pixels_and_heads_are_resized():
    made = recipe()
    logits, masks = torch.randn(2, 2, 8, 8), torch.randint(0, 2, (2, 8, 8))
    masks[0] = 255
    assert float(made.loss(logits, masks)) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits[1:], masks[1:]))
    )
    both = made.training_loss({"out": logits, "aux": [torch.randn(2, 2, 4, 4)]}, masks)
    assert both > made.loss(logits, masks)
    assert float(made.loss(logits, torch.full_like(masks, 255))) == 0


def test_windows_give_the_size_of_the_pictures():
    made = recipe(window=32, overlap=0.25)
    pair = [np.random.default_rng(i).integers(0, 255, (50, 70, 3), dtype=np.uint8) for i in (0, 1)]
    result = made.predict([pair])[0]
    assert result.mask.shape == result.probability.shape == (50, 70)
    assert 0 <= float(result.probability.min()) and float(result.probability.max()) <= 1


def test_predicting_on_files_and_saving_on_the_map(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (2, 24, 32, 3), dtype=np.uint8)
    geotiff(tmp_path / "a.tif", values[0])
    geotiff(tmp_path / "b.tif", values[1], compression="zlib")
    made = recipe()
    asked = f"{tmp_path / 'a.tif'} :: {tmp_path / 'b.tif'}"
    result = made.predict([asked])[0]
    same = made.predict([{"before": values[0], "after": values[1]}])[0]
    assert torch.equal(result.mask, same.mask) and same.source is None
    assert result.changed == pytest.approx(float((result.mask > 0).float().mean()))
    saved = result.save(tmp_path / "map.tif")
    assert rasters.georeference(saved) == rasters.georeference(tmp_path / "a.tif")
    assert made.draw(asked, result).width > 3 * 32


def test_bad_pairs_are_told_in_one_line(tmp_path):
    picture(tmp_path / "a.png")
    made = recipe()
    with pytest.raises(PaperZooError, match="an input is a pair"):
        made.predict([str(tmp_path / "a.png")])
    with pytest.raises(DataError, match="b.png: no such file"):
        made.predict([f"{tmp_path / 'a.png'} :: {tmp_path / 'b.png'}"])
    with pytest.raises(PaperZooError, match="same grid"):
        made.predict([(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8))])
    with pytest.raises(PaperZooError, match="has 5 bands; this network takes 3"):
        made.predict([(np.zeros((5, 8, 8), np.uint8), np.zeros((5, 8, 8), np.uint8))])
    with pytest.raises(PaperZooError, match="uint8, uint16"):
        made.predict([(np.full((8, 8), 7.0), np.zeros((8, 8)))])


def test_four_bands_with_measured_mean(tmp_path):
    rng, total = np.random.default_rng(0), []
    for folder in ("A", "B"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        for name in "ab":
            values = rng.integers(1000, 3000, (40, 40, 4), dtype=np.uint16)
            total.append(values[..., 0] / 65535)
            path = tmp_path / "train" / folder / f"{name}.tif"
            tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
    for name in "ab":
        grey(tmp_path / "train" / "label" / f"{name}.png", np.resize((0, 255), (40, 40)))
    made = recipe(data=str(tmp_path), normalise="data")
    assert len(made.facts["mean"]) == 4 and made.facts["mean"][0] == pytest.approx(np.mean(total), abs=1e-6)
    before, _, _ = made.batch()
    assert before.shape == (2, 4, 32, 32) and float(before.abs().max()) < 5
    assert torch.isfinite(made.step(made.batch())["loss"]) and made.example()[0].shape[1] == 4
    with pytest.raises(PaperZooError, match="three bands"):
        recipe(data=str(tmp_path), normalise="imagenet")


def test_compared_colours():
    truth, found = torch.tensor([[0, 1, 1, 0, 255]]), torch.tensor([[0, 1, 0, 1, 1]])
    shown = change_pictures.compared(found, truth)[:, 0].T.tolist()
    wanted = [[0, 0, 0], list(change_pictures.HIT), list(change_pictures.MISS), list(change_pictures.FALSE_ALARM)]
    assert shown == [*wanted, [90, 90, 90]]


def test_dates_change_places():
    data = change_detection.Transformed([("a", "b", "m")], lambda *items: items, swap=1.0)
    assert data[0] == ("b", "a", "m")
    assert change_detection.Transformed([("a", "b", "m")], lambda *items: items)[0] == ("a", "b", "m")
