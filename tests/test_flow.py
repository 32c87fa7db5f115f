"""Optical flow: moving layers, readers of the real layouts, warping, metrics, training pairs, prediction."""

from __future__ import annotations

import dataclasses
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.blocks.cost_volume import global_correlation, local_correlation
from paperzoo.blocks.warping import backward_warp, pixel_grid, read_maps
from paperzoo.data.flow import open_flow, read_flow, write_flo
from paperzoo.data.moving_layers import moving_layers
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError, UnknownName
from paperzoo.tasks import flow_augment, flow_pictures
from paperzoo.tasks.flow_metrics import FlowMetrics
from paperzoo.tasks.optical_flow import Config, FlowRecipe, TrainingPairs, mirrored, to_pair

SIZE = (16, 20)  # height, width
SMALL = Config(model="pwc_net_slim", augment="none", steps=2, batch_size=2, crop_size=(32, 48))


def picture(path, size=SIZE, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.asarray(values) * 255).astype(np.uint8)).save(path)


def flow_of(u=1.5, v=-2.0, size=SIZE):
    return torch.tensor([u, v])[:, None, None].expand(2, *size).contiguous()


def flo(path, *args, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_flo(path, flow_of(*args, **kwargs))
    return path


def kitti_png(path, u, v, valid):
    """Three channels of 16 bits, written by hand: Pillow has no such pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.stack([np.asarray(u) * 64 + 2**15, np.asarray(v) * 64 + 2**15, valid], -1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def pfm(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = values.shape[:2]
    path.write_bytes(f"PF\n{width} {height}\n-1.0\n".encode() + values[::-1].astype("<f4").tobytes())
    return path


# -- moving layers -------------------------------------------------------------------------------------------------------


def test_layers_follow_from_the_seed_and_a_longer_list_starts_alike():
    a, b = moving_layers(3, (32, 48)), moving_layers(5, (32, 48))
    assert torch.equal(a.first, b.first[:3]) and torch.equal(a.flow, b.flow[:3])
    assert a.first.shape == (3, 3, 32, 48) and a.first.dtype == torch.uint8
    assert not torch.equal(a.first, moving_layers(3, (32, 48), seed=1).first)
    assert not torch.equal(a.first, moving_layers(3, (32, 48), split="test").first)


def test_the_second_picture_read_along_the_flow_is_the_first_where_nothing_is_hidden():
    layers = moving_layers(16)
    first, second = layers.first.float(), layers.second.float()
    built, inside = backward_warp(second, layers.flow)
    error = (built - first).abs().mean(1, keepdim=True)
    seen = ~layers.occluded
    assert bool((inside | layers.occluded).all())  # what leaves the picture counts as hidden
    assert error[seen].mean() < 0.15 * (second - first).abs().mean()
    assert error[layers.occluded & inside].mean() > 5 * error[seen].mean()


def test_without_motion_and_objects_there_is_still_the_smooth_bend():
    layers = moving_layers(4, (32, 48), motion=0.0, objects=0)
    assert 0.1 < layers.flow.norm(dim=1).mean() < 4
    assert not layers.occluded[:, :, 8:-8, 8:-8].any()


@pytest.mark.parametrize("wrong", [{"split": "val"}, {"count": 0}, {"size": (8, 64)}, {"motion": 0.9}, {"objects": -1}])
def test_wrong_arguments_of_layers_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        moving_layers(**{"count": 1, **wrong})


# -- files ---------------------------------------------------------------------------------------------------------------


def test_flo_files_are_read_as_written_and_unknown_pixels_are_not_valid(tmp_path):
    flow = torch.randn(2, *SIZE)
    flow[:, 3, 4] = 1.7e9
    flow[0, 5, 6] = float("nan")
    write_flo(tmp_path / "a.flo", flow)
    found, valid = read_flow(tmp_path / "a.flo")
    assert torch.equal(torch.where(valid, flow, 0.0), found)
    assert (~valid).nonzero()[:, 1:].tolist() == [[3, 4], [5, 6]]


def test_kitti_files_have_sixteen_bits_and_a_mask(tmp_path):
    u, v = np.full(SIZE, -3.25), np.full(SIZE, 100.5)
    valid = np.ones(SIZE)
    valid[2, :5] = 0
    flow, known = read_flow(kitti_png(tmp_path / "a.png", u, v, valid))
    assert (~known).sum() == 5 and flow[:, 2, :5].abs().max() == 0
    assert flow[0, 0].unique().tolist() == [-3.25] and flow[1, 0].unique().tolist() == [100.5]


def test_pfm_files_run_from_the_bottom(tmp_path):
    values = np.random.default_rng(0).normal(size=(*SIZE, 3))
    flow, valid = read_flow(pfm(tmp_path / "a.pfm", values))
    assert np.allclose(flow, values[..., :2].transpose(2, 0, 1)) and bool(valid.all())


def test_arrays_of_both_orders(tmp_path):
    values = np.random.default_rng(0).normal(size=(2, *SIZE)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", values.transpose(1, 2, 0))
    assert torch.equal(read_flow(tmp_path / "a.npy")[0], read_flow(tmp_path / "b.npy")[0])


@pytest.mark.parametrize("name", ["x.flo", "x.png", "x.pfm", "x.npy", "x.txt"])
def test_broken_flow_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"PF broken")
    with pytest.raises(DataError, match=name):
        read_flow(tmp_path / name)


def test_a_flo_file_that_is_cut_short_says_so(tmp_path):
    path = flo(tmp_path / "a.flo")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="says 20 x 16 pixels"):
        read_flow(path)


def test_a_colour_picture_is_no_kitti_flow(tmp_path):
    with pytest.raises(DataError, match="3 channels of 8 bits"):
        read_flow(picture(tmp_path / "a.png"))


# -- layouts -------------------------------------------------------------------------------------------------------------


def chairs(root, count=4):
    for i in range(1, count + 1):
        for k in (1, 2):
            picture(root / "data" / f"{i:05d}_img{k}.ppm", seed=2 * i + k)
        flo(root / "data" / f"{i:05d}_flow.flo", u=i)
    (root / "FlyingChairs_train_val.txt").write_text("1\n1\n2\n1\n")
    return root


def test_flying_chairs_follow_their_split_file(tmp_path):
    root = chairs(tmp_path)
    train, test = open_flow(root, "train"), open_flow(root, "test")
    assert (len(train), len(test), len(open_flow(root, "all"))) == (3, 1, 4)
    item = test[0]
    assert item["flow"][0].unique().tolist() == [3.0] and item["first"].shape == (3, *SIZE)
    assert bool(item["valid"].all()) and not item["occluded"].any() and not test.has_occlusion


def test_a_wrong_line_of_the_split_file_is_named(tmp_path):
    root = chairs(tmp_path)
    (root / "FlyingChairs_train_val.txt").write_text("1\n1\n3\n1\n")
    with pytest.raises(DataError, match=r"train_val.txt:3: is '3'"):
        open_flow(root)
    (root / "FlyingChairs_train_val.txt").write_text("1\n")
    with pytest.raises(DataError, match="has 1 lines; there are 4 pairs"):
        open_flow(root)


def sintel(root):
    for film in ("alley_1", "bamboo_2", "cave_4", "market_2", "temple_3"):
        for i in (1, 2, 3):
            for name in ("clean", "final"):
                picture(root / "training" / name / film / f"frame_{i:04d}.png", seed=i)
            if i < 3:
                flo(root / "training" / "flow" / film / f"frame_{i:04d}.flo", u=i)
            for name, column in (("occlusions", 0), ("invalid", 1)):
                values = np.zeros(SIZE)
                values[:, column] = 1
                mask(root / "training" / name / film / f"frame_{i:04d}.png", values)
    return root


def test_sintel_holds_out_films_and_knows_what_is_hidden(tmp_path):
    root = sintel(tmp_path)
    train, test = open_flow(root, "train", "final"), open_flow(root, "test", "clean")
    assert (len(train), len(test), len(open_flow(root, "all", "both"))) == (8, 2, 20)
    assert "temple_3" in test.path(0) and "clean" in test.path(0)
    item = test[1]
    assert item["flow"][0].unique().tolist() == [2.0] and test.has_occlusion
    assert item["occluded"].sum() == SIZE[0] and bool(item["occluded"][0, :, 0].all())
    assert (
        bool(item["valid"].all()) and (~train[0]["valid"]).sum() == SIZE[0]
    )  # invalid pixels count where it is measured
    (root / "training" / "val_scenes.txt").write_text("alley_1\n")
    assert "alley_1" in open_flow(root, "test").path(0)
    (root / "training" / "val_scenes.txt").write_text("alley_1\nnowhere\n")
    with pytest.raises(DataError, match=r"val_scenes.txt:2: names 'nowhere'"):
        open_flow(root, "test")


def test_kitti_calls_hidden_what_only_flow_occ_has(tmp_path):
    for i in range(5):
        for frame in (10, 11):
            picture(tmp_path / "training" / "image_2" / f"{i:06d}_{frame}.png", seed=i)
        everywhere, seen = np.ones(SIZE), np.ones(SIZE)
        seen[:, :3] = 0
        everywhere[0] = 0
        for name, valid in (("flow_occ", everywhere), ("flow_noc", seen * everywhere)):
            kitti_png(tmp_path / "training" / name / f"{i:06d}_10.png", np.ones(SIZE), np.zeros(SIZE), valid)
    train, test = open_flow(tmp_path, "train"), open_flow(tmp_path, "test")
    assert (len(train), len(test)) == (4, 1) and "000004_10" in test.path(0)
    item = test[0]
    assert (~item["valid"]).sum() == SIZE[1] and item["occluded"].sum() == 3 * (SIZE[0] - 1)


def test_flying_things_run_both_ways(tmp_path):
    values = np.zeros((*SIZE, 3))
    for i in (6, 7):
        picture(tmp_path / "frames_finalpass" / "TRAIN" / "A" / "0000" / "left" / f"{i:04d}.png", seed=i)
        for way, word, u in (("into_future", "IntoFuture", 1), ("into_past", "IntoPast", -1)):
            values[..., 0] = u
            folder = tmp_path / "optical_flow" / "TRAIN" / "A" / "0000" / way / "left"
            pfm(folder / f"OpticalFlow{word}_{i:04d}_L.pfm", values)
    data = open_flow(tmp_path, "train")
    assert [data.path(i)[-8:] for i in range(2)] == ["0006.png", "0007.png"]
    assert [float(data[i]["flow"][0, 0, 0]) for i in range(2)] == [1.0, -1.0]
    with pytest.raises(DataError, match="frames_finalpass/TEST"):
        open_flow(tmp_path, "test")


def test_folders_with_and_without_flow(tmp_path):
    for i in range(5):
        for k, name in enumerate(("first", "second")):
            picture(tmp_path / name / f"{i}.png", seed=2 * i + k)
    assert not open_flow(tmp_path).has_flow and "flow" not in open_flow(tmp_path)[0]
    for i in range(5):
        flo(tmp_path / "flow" / f"{i}.flo", u=i)
    train, test = open_flow(tmp_path, "train"), open_flow(tmp_path, "test")
    assert (len(train), len(test)) == (4, 1) and test[0]["flow"][0, 0, 0] == 4
    (tmp_path / "second" / "2.png").unlink()
    with pytest.raises(DataError, match=r"first/2.png: has no partner"):
        open_flow(tmp_path)


def test_a_folder_of_pictures_is_a_film_without_flow(tmp_path):
    for i in range(10):
        picture(tmp_path / "film" / f"{i:03d}.png", seed=i)
    data = open_flow(tmp_path / "film", "all")
    assert not data.has_flow and set(data[0]) == {"first", "second"}
    assert torch.equal(data[0]["second"], data[1]["first"])


def test_pictures_and_flow_of_different_sizes_are_named(tmp_path):
    root = chairs(tmp_path)
    flo(root / "data" / "00001_flow.flo", size=(8, 8))
    with pytest.raises(DataError, match=r"00001_img1.ppm: is 20 x 16 pixels, its flow 8 x 8"):
        open_flow(root)[0]
    picture(root / "data" / "00002_img2.ppm", (10, 20))
    with pytest.raises(DataError, match="its second picture 20 x 10"):
        open_flow(root)[1]


def test_unknown_places_and_splits(tmp_path):
    with pytest.raises(UnknownName, match="moving_layers"):
        open_flow("moving_layer")
    with pytest.raises(DataError, match="no such file or folder"):
        open_flow(tmp_path / "nothing")
    with pytest.raises(PaperZooError, match="split 'val'"):
        open_flow("moving_layers", "val")
    with pytest.raises(PaperZooError, match="render_pass 'dirty'"):
        open_flow("moving_layers", render_pass="dirty")


# -- blocks --------------------------------------------------------------------------------------------------------------


def test_a_shift_is_found_in_the_cost_volume():
    a = torch.nn.functional.normalize(torch.randn(1, 16, 12, 18), dim=1)
    costs = local_correlation(a, a.roll((1, -2), (2, 3)), 3)  # the second map is one down, two to the left
    best = costs[:, :, 4:-4, 4:-4].argmax(1)
    assert best.unique().tolist() == [(1 + 3) * 7 + (-2 + 3)]


def test_costs_have_gradients_and_refuse_no_displacement():
    a, b = (torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, y: local_correlation(x, y, 2), (a, b))
    with pytest.raises(ValueError, match="displacement is 0"):
        local_correlation(a, b, 0)


def test_global_costs_are_scalar_products():
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 2)
    assert torch.allclose(global_correlation(a, b), torch.einsum("bchw,bcij->bhwij", a, b), atol=1e-6)


def test_reading_at_the_pixels_themselves_changes_nothing():
    x = torch.rand(2, 3, 5, 7)
    assert torch.allclose(read_maps(x, pixel_grid(5, 7, x).expand(2, 2, 5, 7)), x, atol=1e-5)
    built, inside = backward_warp(x, torch.zeros(2, 2, 5, 7))
    assert torch.allclose(built, x, atol=1e-5) and bool(inside.all())


def test_what_comes_from_outside_is_not_inside():
    x = torch.rand(1, 1, 4, 6)
    built, inside = backward_warp(x, flow_of(2.0, 0.0, (4, 6))[None])
    assert (
        torch.allclose(built[..., :4], x[..., 2:], atol=1e-5) and inside[0, 0, 0].tolist() == [True] * 4 + [False] * 2
    )


# -- metrics -------------------------------------------------------------------------------------------------------------


def test_means_are_over_pixels_not_over_pairs():
    metrics = FlowMetrics()
    zero, one = torch.zeros(2, 4, 4), flow_of(1.0, 0.0, (4, 4))
    some = torch.zeros(1, 4, 4, dtype=torch.bool)
    some[0, 0, 0] = True
    metrics.update(zero, one, torch.ones_like(some))
    metrics.update(zero, zero, some)
    found = metrics.compute()
    assert found["epe"] == pytest.approx(16 / 17) and set(found) == {"epe", "f1_all", "epe_slow"}


def test_kitti_counts_three_pixels_and_five_per_cent():
    metrics = FlowMetrics()
    truth = torch.tensor([[[0.0, 0.0, 100.0, 100.0]], [[0.0] * 4]])
    flow = truth + torch.tensor([[[2.9, 3.1, 4.9, 5.1]], [[0.0] * 4]])
    metrics.update(flow, truth, torch.ones(1, 1, 4, dtype=torch.bool))
    assert metrics.compute()["f1_all"] == 0.5


def test_no_valid_pixel_gives_no_metric():
    metrics = FlowMetrics()
    metrics.update(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.bool))
    assert metrics.compute() == {}


# -- training pairs ------------------------------------------------------------------------------------------------------


def as_item(i=0, size=(64, 96)):
    layers = moving_layers(2, size)
    valid = torch.ones(1, *size, dtype=torch.bool)
    return {
        "first": layers.first[i].float() / 255,
        "second": layers.second[i].float() / 255,
        "flow": layers.flow[i],
        "valid": valid,
        "occluded": layers.occluded[i],
    }


def misfit(item):
    """How far the second picture, read along the flow, is from the first one where both show the same."""
    built, inside = backward_warp(item["second"][None], item["flow"][None])
    seen = (inside & item["valid"] & ~item["occluded"])[0, 0]
    error = (built[0] - item["first"]).abs().mean(0)
    return float(error[seen].mean()), float((item["second"] - item["first"]).abs().mean(0)[seen].mean())


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_mirrored_pair_keeps_its_meaning(axis):
    built, still = misfit(mirrored(as_item(), axis))
    assert built < 0.3 * still


def test_a_pair_that_was_turned_and_enlarged_keeps_its_meaning():
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        item = flow_augment.moved(as_item(seed % 2), (48, 64))
        assert item["first"].shape == (3, 48, 64) and item["flow"].shape == (2, 48, 64)
        built, still = misfit(item)
        ratios.append(built / still)
    assert np.median(ratios) < 0.5


def test_colours_change_alike_and_stay_in_range():
    torch.manual_seed(0)
    picture = torch.rand(3, 8, 8)
    a, b = flow_augment.recoloured(picture, picture, 0.0)
    assert 0 <= float(a.min()) and float(a.max()) <= 1
    assert (a - b).abs().mean() < 0.1 and (a - picture).abs().mean() > (a - b).abs().mean()


def test_training_pairs_are_cropped_and_too_small_ones_named():
    recipe = FlowRecipe(SMALL, Runtime())
    item = recipe.train_set[0]
    pairs = TrainingPairs(recipe.train_set, SMALL)
    torch.manual_seed(0)
    part = pairs[0]
    assert part["first"].shape == (3, 32, 48) and part["flow"].shape == (2, 32, 48)
    assert any(torch.equal(part["flow"], item["flow"][:, y : y + 32, x : x + 48]) for y in range(33) for x in range(49))
    with pytest.raises(DataError, match="moving layers 0: is 96 x 64 pixels, smaller than crop_size, 128 x 128"):
        TrainingPairs(recipe.train_set, dataclasses.replace(SMALL, crop_size=(128, 128)))[0]


# -- recipe --------------------------------------------------------------------------------------------------------------


class Shift(torch.nn.Module):
    """Answers one flow everywhere, in pixels of what it sees."""

    divisor = 64

    def forward(self, first, second):
        self.seen = first.shape
        return torch.tensor([2.0, 4.0]).view(1, 2, 1, 1).expand(len(first), 2, *first.shape[2:])


def test_sizes_with_a_remainder_are_resized_and_the_flow_is_brought_back():
    recipe = FlowRecipe(SMALL, Runtime())
    recipe.model = Shift()
    flow = recipe.infer(torch.rand(1, 3, 32, 96), torch.rand(1, 3, 32, 96))
    assert recipe.model.seen[2:] == (64, 128) and flow.shape == (1, 2, 32, 96)
    assert flow[0, :, 0, 0].tolist() == pytest.approx([2 * 96 / 128, 4 * 32 / 64])


def test_prediction_of_paths_arrays_and_strings(tmp_path):
    recipe = FlowRecipe(SMALL, Runtime())
    a, b = picture(tmp_path / "a.png", (33, 47)), picture(tmp_path / "b.png", (33, 47), seed=1)
    array = np.asarray(Image.open(a))
    results = recipe.predict([(a, b), f"{a} :: {b}", (array, Image.open(b)), (array[:20], array[:20])])
    assert results[0].flow.shape == (2, 33, 47) and results[3].flow.shape == (2, 20, 47)
    assert torch.allclose(results[0].flow, results[1].flow) and torch.allclose(results[0].flow, results[2].flow)
    assert results[0].largest_speed >= results[0].mean_speed >= 0
    assert recipe.draw((a, b), results[0]).width > 3 * 47


@pytest.mark.parametrize("wrong", ["a.png", ("a.png",), 3])
def test_what_is_no_pair_is_refused(wrong):
    with pytest.raises(PaperZooError, match="a pair is"):
        to_pair(wrong)


def test_pictures_of_a_pair_must_have_one_size():
    with pytest.raises(PaperZooError, match="5 x 4 and 4 x 4"):
        to_pair((np.zeros((4, 5, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)))


def test_data_without_flow_cannot_teach(tmp_path):
    for i in range(10):
        picture(tmp_path / f"{i:03d}.png", seed=i)
    with pytest.raises(PaperZooError, match="has no flow, from which this recipe learns"):
        FlowRecipe(dataclasses.replace(SMALL, data=str(tmp_path)), Runtime())
    recipe = FlowRecipe(dataclasses.replace(SMALL, data=str(tmp_path), flow_labels=False, crop_size=None), Runtime())
    assert set(recipe.batch()) == {"first", "second"} and recipe.evaluate() == {}


def test_another_set_can_be_measured_whole(tmp_path):
    recipe = FlowRecipe(dataclasses.replace(SMALL, test_data=str(chairs(tmp_path))), Runtime())
    assert len(recipe.test_set) == 4 and recipe.evaluate()["epe"] > 0


def test_opposite_directions_have_other_colours_and_none_is_white():
    right, left, still = flow_of(5.0, 0.0), flow_of(-5.0, 0.0), flow_of(0.0, 0.0)
    a, b, c = (np.asarray(p)[0, 0].astype(int) for p in flow_pictures.colours([right, left, still]))
    assert abs(a - b).max() > 100 and c.min() > 250
    unknown = flow_pictures.colours([right], torch.zeros(1, *SIZE, dtype=torch.bool))[0]
    assert np.asarray(unknown)[0, 0].tolist() == [flow_pictures.UNKNOWN] * 3
