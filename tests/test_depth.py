"""The depth task: traced scenes, readers of the real layouts, metrics by the field's protocol, training samples, prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from paperzoo.data.depth import TRACED, open_depth, read_depth
from paperzoo.data.kitti_depth import scan_depth
from paperzoo.data.traced_scenes import STEREO, traced_scenes
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError, UnknownName
from paperzoo.tasks.depth import Config, DepthRecipe, TrainingSamples, depth_loss, resized_camera
from paperzoo.tasks.depth_metrics import DepthMetrics, align, counted, median
from paperzoo.tasks.depth_pictures import colours, side_by_side

SMALL = Config(model="densedepth_slim", image_size=(32, 48), steps=2, batch_size=2, max_depth=15.0)


def picture(path, size=(20, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def depth_file(path, values=1500, size=(20, 16), dtype=np.uint16):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.broadcast_to(np.asarray(values, dtype), (size[1], size[0]))
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(np.ascontiguousarray(values)).save(path)
    return path


def folder(root, count=5, size=(20, 16)):
    for i in range(count):
        picture(root / "images" / f"{i}.png", size, i)
        depth_file(root / "depth" / f"{i}.png", 1000 * (i + 1), size)
    return root


# -- traced scenes -------------------------------------------------------------------------------------------------------


def test_scenes_follow_from_the_seed_and_a_longer_list_starts_alike():
    a, b = traced_scenes(3, (32, 48)), traced_scenes(5, (32, 48))
    assert torch.equal(a.images, b.images[:3]) and torch.equal(a.depth, b.depth[:3])
    assert a.images.shape == (3, 3, 3, 32, 48) and a.images.dtype == torch.uint8
    assert not torch.equal(a.images, traced_scenes(3, (32, 48), seed=1).images)
    assert not torch.equal(a.images, traced_scenes(3, (32, 48), split="test").images)


def test_the_same_scene_at_another_size_has_the_same_depth():
    small, large = traced_scenes(4, (32, 48), frames=()), traced_scenes(4, (96, 144), frames=())
    middle = large.depth[..., 1::3, 1::3]  # the middle of three pixels is the middle of the one they make
    apart = (middle - small.depth).abs()
    assert float(apart.median()) < 1e-5 and float((apart > 1e-3).float().mean()) < 0.01


@pytest.mark.parametrize("frame", [-1, 1, "s"])
def test_a_frame_read_where_depth_and_motion_say_is_the_target(frame):
    """An independent projection in numpy: lifted, moved, projected and read at the nearest pixel, the colours agree."""
    scenes = traced_scenes(12, (64, 96), frames=(frame,))
    camera = scenes.intrinsics.numpy().astype(float)
    v, u = np.mgrid[:64, :96]
    better = []
    for i in np.flatnonzero(~scenes.moving.numpy()):
        z = scenes.depth[i, 0].numpy().astype(float)
        points = np.stack(
            [(u - camera[0, 2]) / camera[0, 0] * z, (v - camera[1, 2]) / camera[1, 1] * z, z, np.ones_like(z)]
        )
        moved = np.tensordot(scenes.motions[i, 0].numpy().astype(float), points, 1)
        x = np.rint(camera[0, 0] * moved[0] / moved[2] + camera[0, 2]).astype(int)
        y = np.rint(camera[1, 1] * moved[1] / moved[2] + camera[1, 2]).astype(int)
        inside = (x >= 0) & (x < 96) & (y >= 0) & (y < 64)
        target, source = (scenes.images[i, k].numpy().astype(float) for k in (0, 1))
        there = np.abs(source[:, y[inside], x[inside]] - target[:, inside]).mean()
        still = np.abs(source - target).mean()
        if still > 1:  # the camera moved
            better.append(there / still)
    assert len(better) >= 6 and np.median(better) < 0.6 and max(better) < 0.95


def test_the_second_camera_is_to_the_right():
    scenes = traced_scenes(2, (32, 48), frames=("s",))
    expected = torch.eye(4)
    expected[0, 3] = -STEREO
    assert torch.allclose(scenes.motions[0, 0], expected, atol=1e-6)
    item = open_depth("traced_scenes", "test", frames=("s",))[0]
    assert torch.allclose(item["stereo"], expected, atol=1e-6)


def test_depth_of_a_scene_is_the_distance_to_the_nearest_surface():
    from paperzoo.data import traced_scenes as module

    one = torch.ones(1, 1)
    centre = torch.tensor([[0.0, 0.0, 5.0]])
    ray = torch.tensor([[[0.0, 0.0, 1.0]]])
    depth, normal, _ = module._ball(centre, torch.tensor([1.5]), torch.zeros(1, 1, 3), ray)
    assert depth.item() == pytest.approx(3.5) and normal[0, 0].tolist() == pytest.approx([0, 0, -1])
    depth, normal, _ = module._box(centre, torch.tensor([[1.0, 1.0, 2.0]]), one[0] * 0, torch.zeros(1, 1, 3), ray)
    assert depth.item() == pytest.approx(3.0) and normal[0, 0].tolist() == pytest.approx([0, 0, -1])
    turned, _, _ = module._box(centre, torch.ones(1, 3), one[0] * np.pi / 4, torch.zeros(1, 1, 3), ray)
    assert turned.item() == pytest.approx(5 - 2**0.5, abs=1e-4)
    missed, _, _ = module._ball(centre, torch.tensor([1.5]), torch.tensor([[[2.0, 0.0, 0.0]]]), ray)
    assert missed.item() == float("inf")


@pytest.mark.parametrize("wrong", [{"split": "val"}, {"count": 0}, {"size": (8, 8)}, {"frames": (0,)}])
def test_wrong_arguments_of_scenes_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        traced_scenes(**{"count": 1, **wrong})


# -- readers -------------------------------------------------------------------------------------------------------------


def test_folders_of_images_and_millimetres(tmp_path):
    root = folder(tmp_path, 10)
    train, test = open_depth(root, "train"), open_depth(root, "test")
    assert (len(train), len(test)) == (8, 2)
    item = test[1]
    assert item["image"].shape == (3, 16, 20) and item["depth"].shape == (1, 16, 20)
    assert item["depth"].unique().tolist() == [10.0]


def test_folders_with_splits_and_other_names(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / "rgb" / split / "kitchen" / "rgb_7.jpg")
        depth_file(tmp_path / "depth" / split / "kitchen" / "sync_depth_7.png", 2560)
    assert open_depth(tmp_path, "test", depth_scale=256)[0]["depth"].max() == 10.0


def test_depth_files_of_every_kind(tmp_path):
    assert read_depth(depth_file(tmp_path / "a.png", 500)).max() == 0.5
    metres = np.full((16, 20), 2.5, np.float32)
    metres[0, :4] = [np.nan, np.inf, -1, 0]
    for name in ("b.npy", "c.tiff"):
        found = read_depth(depth_file(tmp_path / name, metres, dtype=np.float32))
        assert found.dtype == torch.float32 and found[0, :4].tolist() == [0, 0, 0, 0] and found.max() == 2.5


@pytest.mark.parametrize("name", ["x.png", "x.npy", "x.tiff"])
def test_broken_depth_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89PNG broken")
    with pytest.raises(DataError, match="not a readable depth file"):
        read_depth(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_depth(tmp_path / f"missing_{name}")


def test_a_colour_picture_is_no_depth(tmp_path):
    with pytest.raises(DataError, match="RGB"):
        read_depth(picture(tmp_path / "a.png"))


def test_depth_of_another_size_or_missing_is_named(tmp_path):
    root = folder(tmp_path)
    bad = depth_file(root / "depth" / "1.png", size=(8, 6))
    with pytest.raises(DataError, match="8 x 6 pixels, the image 20 x 16"):
        open_depth(root)[1]
    bad.unlink()
    with pytest.raises(DataError, match="1.png: has no depth"):
        open_depth(root)


def test_frames_before_and_after_come_from_the_folder(tmp_path):
    for film, count in (("a", 6), ("b", 5)):
        for i in range(count):
            picture(tmp_path / film / f"{i:03d}.png", seed=i)
    data = open_depth(tmp_path, "train", frames=(-1, 1))
    assert (
        not data.has_depth and len(data) == 4 + 3
    )  # 5 of the 6 and 4 of the 5 are for training; the first ones have no frame before
    item = data[0]
    assert item["frames"].shape == (2, 3, 16, 20) and "depth" not in item
    assert torch.equal(item["frames"][0], open_depth(tmp_path, "train")[0]["image"])
    assert item["intrinsics"][0].tolist() == pytest.approx([16.0, 0.0, 9.5])
    (tmp_path / "intrinsics.txt").write_text("30 0 10\n0 31 8\n0 0 1\n")
    assert open_depth(tmp_path, "train", frames=(-1, 1))[0]["intrinsics"][1].tolist() == [0, 31, 8]
    (tmp_path / "intrinsics.txt").write_text("30 0 10")
    with pytest.raises(DataError, match="nine"):
        open_depth(tmp_path, "train", frames=(1,))


def test_a_single_picture_has_no_neighbours(tmp_path):
    picture(tmp_path / "train" / "a.png")
    with pytest.raises(DataError, match="frames -1, 1"):
        open_depth(tmp_path, "train", frames=(-1, 1))


def test_videos(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 24))
    for i in range(10):
        writer.write(np.full((24, 32, 3), 20 * i, np.uint8))
    writer.release()
    train, test = open_depth(path, "train", frames=(-1, 1)), open_depth(path, "test", frames=(1,))
    assert len(train) == 6 and len(test) == 1
    for i in (4, 0, 5):
        item = train[i]
        levels = [float(item["image"].float().mean()), *item["frames"].float().mean((1, 2, 3)).tolist()]
        assert levels == pytest.approx([20 * (i + 1), 20 * i, 20 * (i + 2)], abs=4)
    path.write_bytes(b"no video")
    with pytest.raises(DataError, match="not a video"):
        open_depth(path, "train")


def test_nyu_labelled_frames(tmp_path):
    h5py = pytest.importorskip("h5py")
    from scipy.io import savemat

    images = np.random.default_rng(0).integers(
        0, 255, (4, 3, 12, 8), dtype=np.uint8
    )  # MATLAB's order: frame, channel, column, row
    depths = np.arange(4 * 12 * 8, dtype=np.float32).reshape(4, 12, 8) / 10
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"] = images, depths
    with pytest.raises(DataError, match=r"splits\.mat: is needed"):
        open_depth(tmp_path)
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1], [3], [4]]), "testNdxs": np.array([[2]])})
    data = open_depth(tmp_path, "test")
    item = data[0]
    assert len(open_depth(tmp_path, "train")) == 3 and item["image"].shape == (3, 8, 12)
    assert int(item["image"][2, 5, 7]) == images[1, 2, 7, 5] and float(item["depth"][0, 5, 7]) == pytest.approx(
        float(depths[1, 7, 5])
    )
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[9]]), "testNdxs": np.array([[2]])})
    with pytest.raises(DataError, match="up to 9"):
        open_depth(tmp_path, "train")


def test_nyu_tables_have_eight_bits_for_training_and_sixteen_for_testing(tmp_path):
    root = tmp_path / "data"
    picture(root / "nyu2_train" / "1.jpg")
    depth_file(root / "nyu2_train" / "1.png", 51, dtype=np.uint8)
    picture(root / "nyu2_test" / "1.png")
    depth_file(root / "nyu2_test" / "1_depth.png", 3000)
    (root / "nyu2_train.csv").write_text("data/nyu2_train/1.jpg,data/nyu2_train/1.png\n")
    (root / "nyu2_test.csv").write_text("data/nyu2_test/1.png,data/nyu2_test/1_depth.png\n")
    assert float(open_depth(root, "train")[0]["depth"].max()) == pytest.approx(2.0)
    assert float(open_depth(root, "test")[0]["depth"].max()) == pytest.approx(3.0)
    (root / "nyu2_test.csv").write_text("data/nyu2_test/1.png,data/gone.png\n")
    with pytest.raises(DataError, match=r"nyu2_test.csv:1: names 'data/gone.png'"):
        open_depth(root, "test")


# -- KITTI -----------------------------------------------------------------------------------------------------------------

DRIVE = "2011_09_26/2011_09_26_drive_0001_sync"


def kitti(root, size=(40, 20)):
    """A camera with f = 20 and its centre at (20, 10); the laser looks forward where the camera does, half a metre behind it."""
    for camera in (2, 3):
        for i in range(3):
            picture(root / DRIVE / f"image_0{camera}" / "data" / f"{i:010d}.jpg", size, 10 * camera + i)
    day = root / "2011_09_26"
    (day / "calib_cam_to_cam.txt").write_text(
        "calib_time: 09-Jan-2012 13:57:47\nR_rect_00: 1 0 0 0 1 0 0 0 1\n"
        "P_rect_02: 20 0 20 1 0 20 10 0 0 0 1 0\nP_rect_03: 20 0 20 -9 0 20 10 0 0 0 1 0\n"
    )
    (day / "calib_velo_to_cam.txt").write_text("calib_time: x\nR: 0 -1 0 0 0 -1 1 0 0\nT: 0 0 -0.5\n")
    scan = np.array([[4.5, 0, 0, 0], [8.5, 0, 0, 0], [2.5, -1, 0, 0], [-3, 0, 0, 0], [1, 50, 0, 0]], np.float32)
    place = root / DRIVE / "velodyne_points" / "data" / "0000000001.bin"
    place.parent.mkdir(parents=True)
    scan.tofile(place)
    (root / "train_files.txt").write_text(f"{DRIVE} 1 l\n{DRIVE} 1 r\n")
    (root / "splits").mkdir()
    (root / "splits" / "test_files.txt").write_text(f"{DRIVE}/image_02/data/0000000001.png some/depth.png 721.5\n")
    return root


def test_kitti_frames_cameras_and_calibration(tmp_path):
    root = kitti(tmp_path)
    data = open_depth(root, "train", frames=(-1, 1, "s"), depth=False)
    left, right = data[0], data[1]
    assert left["frames"].shape == (3, 3, 20, 40) and "depth" not in left
    assert torch.equal(left["frames"][2], right["image"]) and torch.equal(right["frames"][2], left["image"])
    assert left["intrinsics"].tolist() == [[20, 0, 20], [0, 20, 10], [0, 0, 1]]
    assert float(left["stereo"][0, 3]) == pytest.approx(-0.5) and float(right["stereo"][0, 3]) == pytest.approx(0.5)


def test_kitti_laser_scans_become_depth(tmp_path):
    """The nearer of two points in a pixel counts; what lies behind or outside does not; pixels are counted from 1 before rounding."""
    depth = open_depth(kitti(tmp_path), "test")[0]["depth"][0]
    # (4.5 and 8.5 forward) lie at z = 4 and 8, x = 20 + (1 / z): pixel 20 - 1; (2.5, right 1) at z = 2, x = 20 + 20 / 2 + 1 / 2
    assert {tuple(p): float(depth[tuple(p)]) for p in depth.nonzero().tolist()} == {(9, 19): 4.5, (9, 29): 2.5}


def test_kitti_annotated_depth_is_taken_where_all_have_it(tmp_path):
    root = kitti(tmp_path)
    inside = "proj_depth/groundtruth/image_02/0000000001.png"
    depth_file(root / "data_depth_annotated" / "val" / DRIVE.split("/")[1] / inside, 512, (40, 20))
    assert open_depth(root, "test")[0]["depth"].unique().tolist() == [2.0]


@pytest.mark.parametrize(
    "broken, said",
    [
        ("train_files.txt", r"train_files.txt:2: 'what is this'"),
        ("scan", "four for each point"),
        ("calib", "no entry P_rect_02"),
    ],
)
def test_broken_kitti_files_are_named(tmp_path, broken, said):
    root = kitti(tmp_path)
    if broken == "scan":
        (root / DRIVE / "velodyne_points" / "data" / "0000000001.bin").write_bytes(b"\0" * 20)
    elif broken == "calib":
        (root / "2011_09_26" / "calib_cam_to_cam.txt").write_text("R_rect_00: 1 0 0 0 1 0 0 0 1\n")
    else:
        (root / broken).write_text(f"{DRIVE} 1 l\nwhat is this\n")
    with pytest.raises(DataError, match=said):
        open_depth(root, "train")[0]


def test_points_at_the_same_pixel_do_not_depend_on_their_order(tmp_path):
    root = kitti(tmp_path)
    scan = np.array([[8.5, 0, 0, 0], [4.5, 0, 0, 0]], np.float32)
    for rows in (scan, scan[::-1]):
        assert scan_depth(rows, root / "2011_09_26", 2, (20, 40)).max() == 4.5


@pytest.mark.parametrize(
    "data, error, said",
    [
        ("traced_scene", UnknownName, "traced_scenes"),
        ("no/such/place", DataError, "no such file"),
        ("gone.mp4", DataError, "no such file"),
    ],
)
def test_unknown_places_are_named(data, error, said):
    with pytest.raises(error, match=said):
        open_depth(data)


def test_wrong_splits_and_frames_are_named(tmp_path):
    with pytest.raises(PaperZooError, match="split 'val'"):
        open_depth("traced_scenes", "val")
    with pytest.raises(PaperZooError, match="frames holds 0"):
        open_depth("traced_scenes", frames=(0,))
    with pytest.raises(DataError, match="no second camera"):
        open_depth(folder(tmp_path), frames=("s",))


# -- metrics -------------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    """Truth 1, 2, 4 and one unknown; predictions 1, 3, 4."""
    metrics = DepthMetrics(max_depth=80.0)
    metrics.update(torch.tensor([[1.0, 3.0], [4.0, 9.0]]), torch.tensor([[1.0, 2.0], [4.0, 0.0]]))
    found = metrics.compute()
    log = np.log(1.5)
    assert found["abs_rel"] == pytest.approx(0.5 / 3) and found["sq_rel"] == pytest.approx(0.5 / 3)
    assert found["rmse"] == pytest.approx((1 / 3) ** 0.5) and found["rmse_log"] == pytest.approx(log / 3**0.5)
    assert found["log10"] == pytest.approx(np.log10(1.5) / 3)
    assert found["silog"] == pytest.approx(100 * (log**2 / 3 - (log / 3) ** 2) ** 0.5)
    assert (found["delta1"], found["delta2"], found["delta3"]) == pytest.approx((2 / 3, 1.0, 1.0))
    assert found["ordinal_error"] == 0.0


def test_metrics_agree_with_torchmetrics_and_scikit_learn():
    from sklearn.metrics import mean_absolute_percentage_error, root_mean_squared_error

    truth, guess = 1 + 9 * torch.rand(12, 17), 1 + 9 * torch.rand(12, 17)
    metrics = DepthMetrics()
    metrics.update(guess, truth)
    found = metrics.compute()
    a, b = truth.flatten().numpy(), guess.flatten().numpy()
    assert found["abs_rel"] == pytest.approx(mean_absolute_percentage_error(a, b), rel=1e-5)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(a, b), rel=1e-5)


def test_images_count_alike_or_pixels_do():
    one, other = torch.full((2, 2), 2.0), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    for average, expected in (("images", (0.5 + 1.0) / 2), ("pixels", (4 * 0.5 + 1.0) / 5)):
        metrics = DepthMetrics(average=average)
        metrics.update(torch.full((2, 2), 3.0), one)
        metrics.update(torch.full((2, 2), 4.0), other)
        assert metrics.compute()["abs_rel"] == pytest.approx(expected)


def test_an_image_without_depth_counts_for_nothing():
    metrics = DepthMetrics()
    metrics.update(torch.ones(3, 3), torch.zeros(3, 3))
    assert metrics.compute() == {}
    metrics.update(torch.ones(3, 3), torch.ones(3, 3))
    assert metrics.compute()["abs_rel"] == 0.0


def test_median_of_an_even_number_is_the_middle_of_two():
    values = torch.rand(10)
    assert float(median(values)) == pytest.approx(float(np.median(values.numpy())))
    assert float(median(values[:9])) == pytest.approx(float(np.median(values[:9].numpy())))


@pytest.mark.parametrize(
    "how, wrong",
    [
        ("median", lambda d: 0.03 * d),
        ("scale", lambda d: 7 * d),
        ("affine", lambda d: 0.2 * d + 3),
        ("affine_inverse", lambda d: 1 / (5 / d + 0.7)),
    ],
)
def test_alignment_undoes_what_it_is_for(how, wrong):
    truth = 1 + 9 * torch.rand(500, dtype=torch.float64)
    assert torch.allclose(align(wrong(truth), truth, how), truth, rtol=1e-6)
    assert not torch.allclose(wrong(truth), truth, rtol=0.1)


def test_metrics_without_scale_do_not_depend_on_it():
    truth, guess = 1 + 9 * torch.rand(9, 9), 1 + 9 * torch.rand(9, 9)
    values = []
    for factor in (1.0, 0.5):
        metrics = DepthMetrics(min_depth=1e-6, max_depth=1e6)
        metrics.update(factor * guess, truth)
        values.append(metrics.compute())
    assert values[0]["silog"] == pytest.approx(values[1]["silog"], rel=1e-4)
    assert values[0]["ordinal_error"] == values[1]["ordinal_error"]
    assert values[0]["abs_rel"] != pytest.approx(values[1]["abs_rel"], rel=0.05)


def test_order_of_a_constant_is_always_wrong_and_of_noise_half():
    truth = 1 + 9 * torch.rand(40, 40)
    for guess, expected, slack in ((truth, 0.0, 0), (torch.ones(40, 40), 1.0, 0), (torch.rand(40, 40) + 1, 0.5, 0.1)):
        metrics = DepthMetrics()
        metrics.update(guess, truth)
        assert metrics.compute()["ordinal_error"] == pytest.approx(expected, abs=slack)


def test_crops_have_the_published_pixels():
    """KITTI at 375 x 1242: Garg's rows 153 to 371 and columns 44 to 1197; NYU at 480 x 640: rows 45 to 471 and columns 41 to 601."""
    garg = counted(torch.ones(375, 1242), "garg", 0.1, 80).nonzero()
    assert garg.min(0).values.tolist() == [153, 44] and garg.max(0).values.tolist() == [370, 1196]
    nyu = counted(torch.ones(480, 640), "nyu", 0.1, 80).nonzero()
    assert nyu.min(0).values.tolist() == [45, 41] and nyu.max(0).values.tolist() == [470, 600]
    eigen = counted(torch.ones(375, 1242), "eigen", 0.1, 80).nonzero()
    assert eigen.min(0).values.tolist() == [int(0.3324324 * 375), int(0.0359477 * 1242)]


def test_too_near_and_too_far_truth_does_not_count():
    assert counted(torch.tensor([[0.0, 0.5, 5.0, 80.0, 90.0]]), "none", 0.5, 80.0).tolist() == [
        [False, False, True, False, False]
    ]


# -- the recipe ------------------------------------------------------------------------------------------------------------


def test_losses_by_hand_and_unknown_depth_teaches_nothing():
    depth = torch.tensor([[[[2.0, 4.0, 6.0]]]], requires_grad=True)
    truth = torch.tensor([[[[1.0, 4.5, 0.0]]]])
    assert float(depth_loss(depth, truth, "l1")) == pytest.approx(0.75)
    # the border is 0.2: (1 + 0.04) / 0.4 and (0.25 + 0.04) / 0.4
    assert float(depth_loss(depth, truth, "berhu")) == pytest.approx((1.04 + 0.29) / 0.4 / 2)
    a, b = np.log(2), np.log(4 / 4.5)
    assert float(depth_loss(depth, truth, "silog")) == pytest.approx(
        ((a * a + b * b) / 2 - 0.5 * ((a + b) / 2) ** 2) ** 0.5
    )
    for kind in ("l1", "berhu", "silog"):
        (gradient,) = torch.autograd.grad(depth_loss(depth, truth, kind), depth)
        assert gradient[..., 2].item() == 0 and bool((gradient[..., :2] != 0).all())
    assert float(depth_loss(depth, torch.zeros(1, 1, 1, 3), "l1")) == 0.0


def test_a_resized_camera_sees_the_same_directions():
    camera = torch.tensor([[30.0, 0, 14.5], [0, 30, 9.5], [0, 0, 1]])
    small = resized_camera(camera, (20, 30), (10, 15))
    # the border between two pixels of the middle stays the middle
    assert small.tolist() == [[15.0, 0.0, 7.0], [0.0, 15.0, 4.5], [0, 0, 1]]


def test_mirrored_samples_mirror_depth_camera_and_second_camera():
    data = open_depth("traced_scenes", "test", frames=(1, "s"))
    plain = TrainingSamples(data, Config(image_size=(64, 96), flip=0.0, frames=(1, "s")))[0]
    mirror = TrainingSamples(data, Config(image_size=(64, 96), flip=1.0, frames=(1, "s")))[0]
    for name in ("image", "target", "frames", "sources", "depth"):
        assert torch.equal(mirror[name], plain[name].flip(-1)), name
    assert mirror["intrinsics"][0, 2] == 95 - plain["intrinsics"][0, 2]
    assert mirror["stereo"][0, 3] == -plain["stereo"][0, 3] != 0


def test_colours_change_alike_in_all_frames_and_the_target_keeps_its_own():
    data = open_depth("traced_scenes", "test", frames=(-1, 1))
    torch.manual_seed(1)
    item = TrainingSamples(
        data, Config(image_size=(64, 96), flip=0.0, frames=(-1, 1), channel_swap=1.0, colour_jitter=1.0)
    )[3]
    assert torch.equal(item["target"], data[3]["image"].float() / 255)
    assert not torch.allclose(item["image"], item["target"])
    same = data[3]["image"].expand(3, -1, -1, -1)

    class Still:
        def __len__(self):
            return 1

        def __getitem__(self, i):
            return {"image": same[0], "frames": same[1:], "intrinsics": torch.eye(3)}

    still = TrainingSamples(Still(), Config(image_size=(64, 96), flip=0.5, frames=(-1, 1), colour_jitter=1.0))[0]
    assert torch.equal(still["frames"][0], still["image"]) and torch.equal(still["frames"][1], still["image"])


def test_the_default_recipe_learns_a_step_and_measures():
    recipe = DepthRecipe(SMALL, Runtime())
    batch = recipe.batch()
    assert batch["image"].shape == (2, 3, 32, 48) and batch["depth"].shape == (2, 1, 32, 48) and "frames" not in batch
    assert torch.isfinite(recipe.step(batch)["loss"])
    found = recipe.evaluate()
    assert {"abs_rel", "rmse", "delta1", "silog", "ordinal_error"} <= found.keys() and len(recipe.test_set) == TRACED[
        "test"
    ]


def test_predictions_have_each_images_own_size(tmp_path):
    recipe = DepthRecipe(SMALL, Runtime())
    results = recipe.predict(
        [picture(tmp_path / "a.png", (37, 23)), np.zeros((50, 31, 3), np.uint8), picture(tmp_path / "b.png", (1, 1))]
    )
    assert [tuple(r.depth.shape) for r in results] == [(23, 37), (50, 31), (1, 1)]
    assert all(r.metric and 0 < r.nearest <= r.median <= r.farthest <= 15 for r in results)
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="not a readable image"):
        recipe.predict([tmp_path / "c.png"])


def test_the_mirror_image_joins_in_when_testing():
    recipe = DepthRecipe(Config(**{**SMALL.__dict__, "mirror_test": True}), Runtime())
    images = torch.rand(2, 3, 32, 48)
    with torch.inference_mode():
        found = recipe.infer(images, (32, 48))
        assert torch.allclose(found, recipe.infer(images.flip(-1), (32, 48)).flip(-1), atol=1e-5)


def test_data_without_depth_cannot_teach_the_default_recipe(tmp_path):
    for i in range(6):
        picture(tmp_path / f"{i}.png", seed=i)
    with pytest.raises(PaperZooError, match="has no depth"):
        DepthRecipe(Config(**{**SMALL.__dict__, "data": str(tmp_path)}), Runtime())


def test_wrong_ranges_are_named():
    with pytest.raises(PaperZooError, match="min_depth is 20"):
        DepthRecipe(Config(**{**SMALL.__dict__, "min_depth": 20.0}), Runtime())


def test_near_is_bright_and_unknown_is_grey():
    depth = torch.tensor([[1.0, 2.0, 8.0, 0.0]])
    pixels = np.asarray(colours(depth)).astype(int)[0]
    assert pixels[0].sum() > pixels[1].sum() > pixels[2].sum() and pixels[3].tolist() == [120, 120, 120]
    assert side_by_side(torch.zeros(3, 1, 4, dtype=torch.uint8), depth.clamp(min=1), True).size[1] == 160


# -- learning from video -----------------------------------------------------------------------------------------------------


def monodepth2(**changes):
    from paperzoo.papers.depth.monodepth2.recipe import PRESETS, Monodepth2

    config = PRESETS["embedded"]
    values = {**config.__dict__, "batch_size": 2, "image_size": (64, 64), **changes}
    return Monodepth2(type(config)(**values), Runtime())


def test_frames_of_a_film_teach_without_depth(tmp_path):
    scenes = traced_scenes(1, (64, 64), frames=(1, 2, 3, 4, 5))
    for moment, image in enumerate(scenes.images[0]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{moment}.png")
    recipe = monodepth2(data=str(tmp_path), frames=(-1, 1))
    assert torch.isfinite(recipe.step(recipe.batch())["loss"])


def test_films_are_measured_by_the_views_that_are_built(tmp_path):
    for i in range(15):
        picture(tmp_path / f"{i:02d}.png", (64, 32), i)
    found = monodepth2(data=str(tmp_path)).evaluate()
    assert found.keys() == {"reprojection_error", "still_error"} and 0 < found["still_error"] < 1


def test_stereo_pairs_need_no_motion_network_and_give_metres():
    recipe = monodepth2(frames=("s",), alignment="none", near=0.5, far=30.0)
    assert recipe.pose is None and recipe.facts["metric"]
    assert torch.isfinite(recipe.step(recipe.batch())["loss"])
    assert recipe.predict([torch.zeros(3, 20, 30)])[0].metric


def test_the_auto_mask_drops_what_stands_still():
    from paperzoo.papers.depth.monodepth2.technique import motion_matrix, view_synthesis_loss

    torch.manual_seed(0)
    target = F.interpolate(torch.rand(1, 3, 8, 16), (32, 64), mode="bicubic").clamp(0, 1)
    moved = motion_matrix(torch.zeros(1, 3), torch.tensor([[0.05, 0.0, 0.0]]))
    camera = torch.tensor([[[50.0, 0, 31.5], [0, 50, 15.5], [0, 0, 1]]])
    sigmoid = [torch.full((1, 1, 32, 64), 0.05)]
    still = view_synthesis_loss(sigmoid, target, target[:, None], camera, [moved])
    assert float(still.kept) < 0.02
    shifted = view_synthesis_loss(
        sigmoid, target, still.views, camera, [motion_matrix(torch.zeros(1, 3), torch.tensor([[-0.05, 0.0, 0.0]]))]
    )
    assert float(shifted.kept) > 0.8


@pytest.mark.parametrize(
    "changes, said", [({"image_size": (30, 64)}, "multiples of 32"), ({"frames": ()}, "frames is empty")]
)
def test_what_cannot_be_learned_from_is_named(changes, said):
    with pytest.raises(PaperZooError, match=said):
        monodepth2(**changes)


def test_the_released_folder_is_read(tmp_path):
    """`encoder.pth` with its classifier and sizes, `depth.pth`; the folder, or either file."""
    import paperzoo
    from paperzoo.papers.depth.monodepth2.model import monodepth2_slim

    source = monodepth2_slim()
    parts = {"encoder": {}, "depth": {}}
    for name, tensor in source.state_dict().items():
        place, _, rest = name.partition(".")
        parts[place][rest] = tensor
    parts["encoder"] |= {"encoder.fc.weight": torch.zeros(5, 64), "height": 192, "width": 640, "use_stereo": False}
    for name, state in parts.items():
        torch.save(state, tmp_path / f"{name}.pth")
    for place in (tmp_path, tmp_path / "encoder.pth", tmp_path / "depth.pth"):
        model = paperzoo.create("monodepth2_slim", weights=str(place))
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
        )
    (tmp_path / "depth.pth").unlink()
    with pytest.raises(PaperZooError, match="do not fit"):
        paperzoo.create("monodepth2_slim", weights=str(tmp_path / "encoder.pth"))


def test_densedepth_learns_nothing_where_depth_is_unknown():
    from paperzoo.papers.depth.densedepth.technique import densedepth_loss

    torch.manual_seed(0)
    y, truth = (1 + 5 * torch.rand(1, 1, 16, 16)).requires_grad_(), 1 + 5 * torch.rand(1, 1, 16, 16)
    known = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    known[..., :8] = False
    changed = torch.where(known, truth, 77.0)
    one, other = (torch.autograd.grad(densedepth_loss(y, t, known).total, y)[0] for t in (truth, changed))
    assert torch.equal(one, other)
    distance, edges = (
        torch.autograd.grad(getattr(densedepth_loss(y, truth, known), p), y)[0] for p in ("distance", "edges")
    )
    assert float(distance[..., :8].abs().max()) == 0 and float(edges[..., :8].abs().max()) == 0
