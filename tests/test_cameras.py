"""Scenes with known cameras: rendered ones, readers of the real layouts, rays."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.blocks import rays as ray_block
from paperzoo.data.cameras import open_views, over
from paperzoo.data.rendered_scenes import rendered_objects, rendered_room
from paperzoo.errors import DataError, PaperZooError, UnknownName


def picture(path, size=(8, 6), seed=0, opacity=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 4 if opacity else 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def ring(count, radius=3.0, height=1.0, centre=(0.0, 0.0, 0.0)):
    """Poses (count, 3, 4) on a circle, looking at its middle."""
    middle = torch.tensor(centre, dtype=torch.float64)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    poses = []
    for k in range(count):
        angle = 2 * math.pi * k / count
        away = torch.tensor([radius * math.cos(angle), radius * math.sin(angle), height], dtype=torch.float64)
        poses.append(ray_block.looking(away, up, middle + away))
    return torch.stack(poses)


def whole(pose):
    return [*pose.tolist(), [0.0, 0.0, 0.0, 1.0]]


def blender(root, count=3, size=(8, 8), **meta):
    for split in ("train", "test"):
        frames = []
        for i, pose in enumerate(ring(count)):
            picture(root / split / f"r_{i}.png", size, i, opacity=True)
            frames.append({"file_path": f"./{split}/r_{i}", "transform_matrix": whole(pose)})
        text = json.dumps({"camera_angle_x": 0.8, "frames": frames, **meta})
        (root / f"transforms_{split}.json").write_text(text)
    return root


def transforms(root, count=9, size=(8, 6), **meta):
    frames = []
    for i, pose in enumerate(ring(count, centre=(5.0, -2.0, 1.0))):
        picture(root / "images" / f"{i:02d}.png", size, i)
        frames.append({"file_path": f"images/{i:02d}.png", "transform_matrix": whole(pose)})
    values = {"fl_x": 10.0, "fl_y": 9.0, "cx": 4.2, "cy": 2.9, "w": size[0], "h": size[1], "frames": frames, **meta}
    (root / "transforms.json").write_text(json.dumps(values))
    return root


def llff(root, count=9, size=(8, 6), folder="images", full=(6.0, 8.0, 7.0)):
    rows = []
    for i in range(count):
        picture(root / folder / f"{i:02d}.png", size, i)
        right, up, back = np.eye(3)
        place = np.array([0.1 * (i % 3), 0.1 * (i // 3), 0.02 * i])
        pose = np.stack([-up, right, back, place, np.array(full)], 1)  # down, right, backward
        rows.append([*pose.flatten(), 2.0 + 0.1 * i, 20.0])
    np.save(root / "poses_bounds.npy", np.array(rows))
    return root


# -- rendered scenes -----------------------------------------------------------------------------------------------------


def test_rendered_objects_are_the_same_each_time_and_have_opacity():
    a = rendered_objects("train", 16, 4)
    rendered_objects.cache_clear()
    b = rendered_objects("train", 16, 4)
    assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    assert a.images[0].shape == (4, 16, 16) and a.images[0].dtype == torch.uint8
    opacity = torch.stack(a.images)[:, 3]
    assert bool((opacity[:, 0] == 0).all()) and bool((opacity.flatten(1).amax(1) == 255).all())


def test_test_views_are_other_places_than_training_views():
    train, test = rendered_objects("train").cameras.poses[:, :, 3], rendered_objects("test").cameras.poses[:, :, 3]
    assert torch.cdist(train, test).min() > 0.1
    assert torch.allclose(train.norm(dim=1), torch.tensor(4.0))
    room, held_out = rendered_room("train"), rendered_room("test")
    assert (len(room), len(held_out)) == (20, 5)
    assert torch.cdist(room.cameras.poses[:, :, 3], held_out.cameras.poses[:, :, 3]).min() > 0.01


def test_gloss_moves_with_the_viewer():
    """The same point of the red ball, from two sides."""
    from paperzoo.data.rendered_scenes import look

    point = torch.tensor([[-0.65, -0.28, 0.45]])
    first, second = torch.tensor([[-3.0, 0.0, 4.0]]), torch.tensor([[3.0, 1.0, 4.0]])
    seen = [look(o, point - o) for o in (first, second)]
    assert all(torch.allclose(depth, torch.ones(1), atol=1e-4) for *_, depth in seen)
    assert (seen[0][0] - seen[1][0]).abs().max() > 0.05


def test_a_larger_picture_of_the_same_camera_shows_the_same():
    small, large = rendered_objects("test", 12, 2), rendered_objects("test", 36, 2)
    shrunk = [torch.nn.functional.avg_pool2d(large.picture(i, True)[None], 3)[0] for i in (0, 1)]
    apart = [(small.picture(1, True) - picture).abs().mean() for picture in shrunk]
    assert apart[1] < 0.04 and apart[0] > 2 * apart[1]


def test_room_in_device_coordinates_lies_between_0_and_1():
    views = rendered_room("train", (18, 24))
    rays = views.cameras.all_rays(0, views.near, views.far, views.ndc)
    assert bool((views.cameras.directions(torch.zeros(1).long(), torch.ones(1), torch.ones(1))[:, 2] == -1).all())
    assert torch.allclose(rays[:, 2], torch.tensor(-1.0), atol=1e-5)  # all begin on the near plane
    assert torch.allclose(rays[:, 2] + rays[:, 5], torch.tensor(1.0), atol=1e-5)  # and end at infinity
    assert rays[:, :2].abs().max() < 2


# -- layouts -------------------------------------------------------------------------------------------------------------


def test_blender_layout(tmp_path):
    views = open_views(blender(tmp_path), "train")
    assert len(views) == 3 and (views.near, views.far) == (2.0, 6.0)
    fx, _, cx, cy = views.cameras.intrinsics[0].tolist()
    assert fx == pytest.approx(4 / math.tan(0.4)) and (cx, cy) == (4, 4)  # the released convention
    assert torch.allclose(views.cameras.poses, ring(3).float())
    pixels = torch.from_numpy(picture(tmp_path / "again.png", (8, 8), 1, opacity=True)).permute(2, 0, 1).float() / 255
    expected = pixels[:3] * pixels[3:] + 1 - pixels[3:]
    assert torch.allclose(views.picture(1, True), expected) and views.picture(1, False).max() <= 1


def test_blender_at_half_resolution_and_every_second_test_view(tmp_path):
    views = open_views(blender(tmp_path), "test", downscale=2, test_skip=2)
    assert len(views) == 2 and views.cameras.sizes.tolist() == [[4, 4]] * 2
    assert views.cameras.intrinsics[0].tolist() == pytest.approx([2 / math.tan(0.4)] * 2 + [2, 2])
    full = open_views(tmp_path, "test").images[2].float()
    assert (views.images[1].float() - torch.nn.functional.avg_pool2d(full, 2)).abs().max() <= 0.5


def test_llff_is_scaled_recentred_and_every_eighth_is_held_out(tmp_path):
    train, test = (open_views(llff(tmp_path), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7, 2) and train.ndc and train.forward
    assert train.bounds == pytest.approx((4 / 3, 20 / 1.5)) and (train.near, train.far) == (0, 1)
    poses = torch.cat([train.cameras.poses, test.cameras.poses])
    assert torch.allclose(poses[:, :, 3].mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(poses[:, :, :3], torch.eye(3).expand(9, 3, 3), atol=1e-6)
    step = (train.cameras.poses[1, :, 3] - train.cameras.poses[0, :, 3]) * 1.5  # pictures 1 and 2
    assert torch.allclose(step, torch.tensor([0.1, 0.0, 0.02]), atol=1e-6)
    assert train.cameras.intrinsics[0].tolist() == [7, 7, 4, 3]


def test_llff_takes_the_smaller_pictures_and_their_focal_length(tmp_path):
    llff(tmp_path, folder="images_4", full=(24.0, 32.0, 28.0))
    views = open_views(tmp_path, "train", downscale=4, ndc=False)
    assert views.cameras.sizes[0].tolist() == [6, 8] and views.cameras.intrinsics[0].tolist() == [7, 7, 4, 3]
    assert not views.ndc and views.near == pytest.approx(0.9 * 4 / 3)


def test_llff_round_about(tmp_path):
    rows = []
    for i, pose in enumerate(ring(12, 3.0, 1.0, (1.0, 2.0, 3.0))[:8]):
        picture(tmp_path / "images" / f"{i}.png", (8, 6), i)
        x, y, z, place = pose.numpy().T
        rows.append([*np.stack([-y, x, z, place, [6, 8, 7]], 1).flatten(), 2.0, 4.0])
    np.save(tmp_path / "poses_bounds.npy", np.array(rows))
    views = open_views(tmp_path, "train", spherify=True)
    places = views.cameras.poses[:, :, 3]
    assert not views.ndc and not views.forward
    assert torch.allclose(places.norm(dim=1), torch.ones(7), atol=1e-5)
    assert torch.allclose(views.cameras.poses[:, :, 2], places, atol=1e-5)  # they look at the origin
    assert views.bounds == pytest.approx((2 / 10**0.5, 4 / 10**0.5))


def test_one_transforms_file(tmp_path):
    train, test = (open_views(transforms(tmp_path), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7, 2) and test.names[1].endswith("08.png")
    assert train.cameras.intrinsics[0].tolist() == pytest.approx([10, 9, 3.7, 2.4])  # through the pixels' middles
    assert train.cameras.distortion is None
    places = train.cameras.poses[:, :, 3]
    assert torch.allclose(places.norm(dim=1), torch.full((7,), 4.0), atol=1e-5)
    assert torch.allclose(train.cameras.poses[:, :, 2], places / 4, atol=1e-5)
    back = ray_block.moved(train.cameras.poses.double(), train.similarity.inverse())
    assert torch.allclose(back, ring(9, centre=(5.0, -2.0, 1.0))[1:8], atol=1e-5)
    assert 0 < train.near < 1 and train.far == pytest.approx(7.0)


def test_transforms_smaller_with_lists_of_names(tmp_path):
    names = ["images/03.png", "images/01.png"]
    transforms(tmp_path, train_filenames=names, val_filenames=["images/05.png"])
    train, test = (open_views(tmp_path / "transforms.json", split, downscale=2) for split in ("train", "test"))
    assert [n[-6:] for n in train.names] == ["03.png", "01.png"] and len(test) == 1
    assert train.cameras.sizes[0].tolist() == [3, 4]
    assert train.cameras.intrinsics[0].tolist() == pytest.approx([5, 4.5, 1.6, 0.95])


def test_lens_distortion_is_undone():
    distortion = torch.tensor([[0.12, -0.03, 0.004, -0.006]])
    u, v = torch.tensor([0.0, 0.3, -0.4, 0.5]), torch.tensor([0.1, -0.2, 0.35, 0.4])
    k1, k2, p1, p2 = distortion[0].tolist()
    square = u * u + v * v
    radial = 1 + k1 * square + k2 * square**2
    x = u * radial + 2 * p1 * u * v + p2 * (square + 2 * u * u)  # OpenCV's model, forwards
    y = v * radial + p1 * (square + 2 * v * v) + 2 * p2 * u * v
    found = ray_block.undistorted(x, y, distortion.expand(4, 4))
    assert torch.allclose(found[0], u, atol=1e-5) and torch.allclose(found[1], v, atol=1e-5)


def test_a_distorted_set_has_bent_rays(tmp_path):
    views = open_views(transforms(tmp_path, k1=0.1), "train")
    plain = open_views(transforms(tmp_path), "train")
    bent, straight = (v.cameras.all_rays(0, 1, 2)[:, 3:6] for v in (views, plain))
    assert not torch.allclose(bent, straight, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"frames": []}, "has no 'frames'"),
        ({"fl_x": None}, "neither fl_x"),
        ({"fl_x": "long"}, "fl_x is 'long'"),
        ({"fl_x": -3.0}, "must be above 0"),
        ({"camera_model": "OPENCV_FISHEYE"}, "OPENCV_FISHEYE"),
        ({"train_filenames": ["images/99.png"]}, "names 'images/99.png'"),
    ],
)
def test_wrong_transforms_are_named(tmp_path, change, problem):
    transforms(tmp_path, **change)
    with pytest.raises(DataError, match=problem) as caught:
        open_views(tmp_path, "train")
    assert "transforms.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("matrix", "problem"),
    [
        ([[1, 0], [0, 1]], "3 x 4 or 4 x 4"),
        ("none", "transform_matrix"),
        (np.diag([1.0, 1.0, -1.0, 1.0]).tolist(), "mirrors"),
        ([[1, 0.9, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], "no rotation"),
        ([[float("nan")] * 4] * 4, "finite"),
    ],
)
def test_wrong_poses_are_named_with_their_frame(tmp_path, matrix, problem):
    transforms(tmp_path)
    values = json.loads((tmp_path / "transforms.json").read_text())
    values["frames"][4]["transform_matrix"] = matrix
    (tmp_path / "transforms.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=f"frame 4.*{problem}"):
        open_views(tmp_path, "train")


def test_missing_and_broken_files_are_named(tmp_path):
    blender(tmp_path)
    (tmp_path / "train" / "r_1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"r_1\.png: not a readable image"):
        open_views(tmp_path, "train")
    (tmp_path / "train" / "r_1.png").unlink()
    with pytest.raises(DataError, match=r"r_1\.png: no such file"):
        open_views(tmp_path, "train")
    (tmp_path / "transforms_train.json").write_text('{"frames": [\n  {"a": }]}')
    with pytest.raises(DataError, match=r"transforms_train\.json:2: not JSON"):
        open_views(tmp_path, "train")
    with pytest.raises(DataError, match="transforms_train.json, poses_bounds.npy or transforms.json"):
        open_views(tmp_path / "train", "train")
    with pytest.raises(DataError, match="no such folder"):
        open_views(tmp_path / "other", "train")
    with pytest.raises(UnknownName, match="rendered_objects"):
        open_views("rendered_object", "train")
    with pytest.raises(PaperZooError, match="train and test"):
        open_views("rendered_objects", "val")


def test_wrong_llff_tables_are_named(tmp_path):
    llff(tmp_path)
    (tmp_path / "images" / "00.png").unlink()
    with pytest.raises(DataError, match="8 pictures, poses_bounds.npy 9 rows"):
        open_views(tmp_path, "train")
    table = np.load(tmp_path / "poses_bounds.npy")
    table[3, 15] = -1
    np.save(tmp_path / "poses_bounds.npy", table)
    with pytest.raises(DataError, match="row 3"):
        open_views(tmp_path, "train")
    np.save(tmp_path / "poses_bounds.npy", table[:, :15])
    with pytest.raises(DataError, match=r"\(pictures, 17\)"):
        open_views(tmp_path, "train")
    (tmp_path / "poses_bounds.npy").write_bytes(pickle.dumps("code"))
    with pytest.raises(DataError, match="not a readable .npy"):
        open_views(tmp_path, "train")


# -- rays --------------------------------------------------------------------------------------------------------------


def test_a_pixels_ray_meets_the_point_it_shows():
    """A point is projected by hand; the ray of its pixel passes through it at its depth."""
    views = rendered_objects("train", 16, 3)
    camera = views.cameras[1:2]
    point = torch.tensor([0.2, -0.1, 0.3])
    own = camera.poses[0, :, :3].T @ (point - camera.poses[0, :, 3])
    fx, fy, cx, cy = camera.intrinsics[0]
    column, line = fx * own[0] / -own[2] + cx, -fy * own[1] / -own[2] + cy
    way = camera.directions(torch.zeros(1, dtype=torch.int64), column[None], line[None])
    assert torch.allclose(camera.poses[0, :, 3] - own[2] * way[0], point, atol=1e-5)


def test_the_film_goes_around_what_the_cameras_look_at():
    poses = ring(7, 3.0, 1.0, (1.0, 2.0, 3.0))
    film = ray_block.along(ray_block.path_of(poses, (2, 6), forward=False), 7)
    assert torch.allclose(film, poses.float(), atol=1e-5)
    room = rendered_room("train", (18, 24))
    path = ray_block.along(ray_block.path_of(room.cameras.poses, room.bounds, forward=True), 12)
    assert path.shape == (12, 3, 4) and bool((path[:, 2, 2] > 0.9).all()) and bool((path[:, 1, 1] > 0.9).all())
    assert path[:, 0, 3].abs().max() <= room.cameras.poses[:, 0, 3].abs().max() + 1e-6


def test_opacity_over_white_and_black():
    half = torch.tensor([[[255]], [[0]], [[0]], [[51]]], dtype=torch.uint8)
    assert torch.allclose(over(half, True).flatten(), torch.tensor([1.0, 0.8, 0.8]))
    assert torch.allclose(over(half, False).flatten(), torch.tensor([0.2, 0.0, 0.0]))
