"""Point clouds: files and sets as they lie on disk, sampling and grouping against plain versions, metrics, every task end to end."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paperzoo.blocks.point_sampling import (
    ball_query,
    farthest_point_sampling,
    gather_points,
    interpolate,
    k_nearest,
    largest,
)
from paperzoo.data import point_files, solids
from paperzoo.data.point_files import Cloud, Mesh, read_cloud, sample_surface, write_ply
from paperzoo.data.points import SHAPENET_PARTS, open_clouds
from paperzoo.engine.loop import one_step
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks import point_batches
from paperzoo.tasks.point_clouds import Config, PointCloudRecipe, to_cloud
from paperzoo.tasks.point_metrics import PartIoU, restricted, shape_iou
from paperzoo.tasks.point_pictures import cloud_picture

CUBE = """8 6 0
0 0 0
1 0 0
1 1 0
0 1 0
0 0 1
1 0 1
1 1 1
0 1 1
4 0 1 2 3
4 4 5 6 7
4 0 1 5 4
4 1 2 6 5
4 2 3 7 6
4 3 0 4 7
"""
SMALL = Config(
    model="pointnet_cls_small",
    num_points=48,
    steps=3,
    batch_size=8,
    learning_rate=0.002,
    jitter=0.01,
    schedule="constant",
)


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return path


# -- sampling and grouping ---------------------------------------------------------------------------------------------


def plain_sampling(points: Tensor, count: int, allowed: list[int]) -> list[int]:
    chosen = [allowed[0]]
    while len(chosen) < count:
        distance = {i: min(float((points[i] - points[j]).square().sum()) for j in chosen) for i in allowed}
        chosen.append(max(allowed, key=lambda i: distance[i]))
    return chosen


def plain_ball(points: Tensor, centre: Tensor, radius: float, count: int) -> list[int]:
    distance = [float((p - centre).square().sum()) for p in points]
    inside = [i for i, d in enumerate(distance) if d <= radius**2][:count]
    inside = inside or [min(range(len(points)), key=lambda i: distance[i])]
    return inside + [inside[0]] * (count - len(inside))


def test_farthest_points_are_those_of_the_plain_rule():
    points = torch.randn(3, 40, 3, dtype=torch.float64)
    found = farthest_point_sampling(points, 12)
    assert found.tolist() == [plain_sampling(p, 12, list(range(40))) for p in points]


def test_masked_points_are_never_chosen_and_small_sets_repeat():
    points = torch.randn(2, 30, 3, dtype=torch.float64)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 5:25], mask[1, [3, 7, 8]] = True, True
    found = farthest_point_sampling(points, 6, mask)
    assert found[0].tolist() == plain_sampling(points[0], 6, list(range(5, 25)))
    assert set(found[1].tolist()) == {3, 7, 8}


@pytest.mark.parametrize(("radius", "count"), [(0.3, 4), (1.0, 8), (5.0, 50), (0.01, 3)])
def test_balls_are_those_of_the_plain_rule(radius, count):
    points, centres = torch.randn(2, 30, 3, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    wanted = [[plain_ball(p, c, radius, count) for c in row] for p, row in zip(points, centres, strict=True)]
    assert ball_query(points, centres, radius, count).tolist() == wanted


def test_balls_leave_out_masked_points():
    points = torch.randn(1, 30, 3)
    mask = torch.arange(30)[None] >= 10
    assert int(ball_query(points, points, 0.8, 6, mask).min()) >= 10


def test_neighbours_are_sorted_and_their_distances_exact():
    points, queries = 100 + torch.randn(2, 25, 3), 100 + torch.randn(2, 6, 3)
    distances, index = k_nearest(points, queries, 4)
    exact = (queries[:, :, None].double() - points[:, None].double()).square().sum(3)
    assert torch.equal(index, exact.topk(4, largest=False)[1])
    assert torch.allclose(distances.double(), exact.gather(2, index), rtol=1e-4)
    with pytest.raises(ValueError, match="26 nearest points"):
        k_nearest(points, queries, 26)


def test_interpolation_weights_by_inverse_squares():
    points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [9, 9, 9]]])
    features = torch.tensor([[[1.0], [2.0], [5.0], [100.0]]])
    query = torch.tensor([[[0.5, 0.0, 0.0]]])
    weights = [1 / 0.25, 1 / 0.25, 1 / 4.25]
    wanted = (weights[0] * 1 + weights[1] * 2 + weights[2] * 5) / sum(weights)
    assert interpolate(points, features, query).item() == pytest.approx(wanted, rel=1e-5)
    assert interpolate(points, features, points).flatten().tolist() == pytest.approx([1, 2, 5, 100], rel=1e-4)
    assert interpolate(points[:, :1], features[:, :1], query).item() == 1.0


def test_the_largest_of_a_group_and_its_gradient():
    x = torch.randn(4, 9, 5, requires_grad=True)
    assert torch.equal(largest(x), x.amax(1))
    (ours,) = torch.autograd.grad(largest(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(x.max(1)[0].square().sum(), x)
    assert torch.equal(ours, theirs)


class Grouping(nn.Module):
    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        centres = gather_points(points, farthest_point_sampling(points, 6))
        return centres, ball_query(points, centres, 0.9, 40)


def test_the_exported_program_chooses_the_same_points():
    points = torch.randn(3, 32, 3)
    program = torch.export.export(Grouping(), (points[:2],), dynamic_shapes=({0: torch.export.Dim("b", min=1)},))
    for a, b in zip(program.module()(points), Grouping()(points), strict=True):
        assert torch.equal(a, b)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["OFF\n", "OFF", "# made by hand\nOFF # a comment\n", "OFF "])
def test_off_with_its_counts_in_the_first_line_too(tmp_path, header):
    mesh = point_files.read_off(written(tmp_path / "a.off", header + CUBE))
    assert mesh.vertices.shape == (8, 3) and mesh.triangles.shape == (12, 3)


def test_off_with_colours_mixed_faces_and_edges(tmp_path):
    text = (
        "COFF\n4 3 0\n0 0 0 9 9 9 1\n1 0 0 9 9 9 1\n1 1 0 9 9 9 1\n0 1 0 9 9 9 1\n3 0 1 2 255 0 0\n4 0 1 2 3\n2 0 1\n"
    )
    mesh = point_files.read_off(written(tmp_path / "a.off", text))
    assert mesh.triangles.tolist() == [[0, 1, 2], [0, 1, 2], [0, 2, 3]] and mesh.vertices[2].tolist() == [1, 1, 0]


def test_off_without_faces_is_a_cloud(tmp_path):
    cloud = read_cloud(written(tmp_path / "a.off", "OFF\n2 0 0\n0 1 2\n3 4 5\n"))
    assert cloud.points.tolist() == [[0, 1, 2], [3, 4, 5]] and cloud.normals is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("OBJ\n1 2 3\n", "does not begin with OFF"),
        ("", "does not begin with OFF"),
        ("OFF\n", "no line with the numbers"),
        ("OFF\n0 0 0\n", "0 vertices"),
        ("OFF\n" + CUBE[:60], "cut short"),
        ("OFF\n" + CUBE.replace("4 0 1 2 3", "4 0 1 2 8"), "names vertex 8; there are 8"),
        ("OFF\n" + CUBE.replace("1 1 0", "1 x 0"), "not a number"),
        ("OFF\n" + CUBE.replace("4 0 1 2 3", "5 0 1 2 3"), "face 1 has fewer corners"),
        ("OFF\n3 1 0\n0 0 0\n1 1 1\n2 2 2\n3 0 1 2\n", "no area"),
        ("OFF\n3 1 0\n0 0 0\n1 1 nan\n2 2 2\n3 0 1 2\n", "not finite"),
    ],
)
def test_what_is_wrong_with_an_off_file_is_said_in_one_line(tmp_path, text, problem):
    with pytest.raises(DataError, match=problem) as error:
        read_cloud(written(tmp_path / "a.off", text))
    assert str(tmp_path / "a.off") in str(error.value) and "\n" not in str(error.value)


def test_a_surface_is_sampled_by_area():
    big = np.array([[0, 0, 0], [3, 0, 0], [0, 2, 0], [0, 0, 5], [1, 0, 5], [0, 1, 5]], float)  # areas 3 and 1/2
    points, normals = sample_surface(Mesh(big, np.array([[0, 1, 2], [3, 4, 5]])), 20_000, 0)
    low = points[:, 2] < 1
    assert abs(low.mean() - 6 / 7) < 0.01 and np.allclose(normals, [0, 0, 1])
    assert np.allclose(points[low].mean(0), [1, 2 / 3, 0], atol=0.02)  # the centroid
    assert (points[low][:, 0] / 3 + points[low][:, 1] / 2 <= 1 + 1e-6).all()


def test_a_mesh_gives_the_same_points_each_time(tmp_path):
    path = written(tmp_path / "cube.off", "OFF" + CUBE)
    first, again = read_cloud(path, 50), read_cloud(path, 50)
    assert len(first) == 50 and torch.equal(first.points, again.points)
    assert torch.allclose(first.normals.norm(dim=1), torch.ones(50))
    written(path, "OFF" + CUBE.replace("1 1 1", "1 1 3"))
    assert not torch.equal(read_cloud(path, 50).points, first.points)


def ply(form: str, order: str = "<") -> bytes:
    """Three coloured vertices with a property nobody asked for, before and after an element with lists."""
    head = f"ply\nformat {form} 1.0\ncomment made by hand\nelement strip 2\nproperty list uchar short of\n"
    head += "element vertex 3\nproperty float x\nproperty float y\nproperty float z\nproperty uchar red\nproperty uchar green\n"
    head += "property uchar blue\nproperty double quality\nproperty int label\nend_header\n"
    rows = [(0.5, -1.0, 2.0, 255, 0, 51, 0.1, 4), (1.5, 0.0, 0.25, 0, 255, 0, 0.2, 0), (3, 3, 3, 0, 0, 0, 0.3, 1)]
    if form == "ascii":
        return (head + "3 1 2 3\n1 9\n" + "\n".join(" ".join(map(str, r)) for r in rows) + "\n").encode()
    strips = b"".join(bytes([len(s)]) + np.array(s, order + "i2").tobytes() for s in ([1, 2, 3], [9]))
    kind = [(n, order + "f4") for n in "xyz"] + [(n, "u1") for n in "rgb"] + [("q", order + "f8"), ("l", order + "i4")]
    return head.encode() + strips + np.array(rows, kind).tobytes()


@pytest.mark.parametrize(("form", "order"), [("ascii", "<"), ("binary_little_endian", "<"), ("binary_big_endian", ">")])
def test_ply_of_all_three_forms(tmp_path, form, order):
    cloud = read_cloud(written(tmp_path / "a.ply", ply(form, order)))
    assert cloud.points.tolist() == [[0.5, -1, 2], [1.5, 0, 0.25], [3, 3, 3]]
    assert cloud.labels.tolist() == [4, 0, 1] and cloud.colours[0].tolist() == pytest.approx([1, 0, 0.2])


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("faces", [[[0, 1, 2], [0, 2, 3]], [[0, 1, 2, 3], [0, 1, 2]]])
def test_ply_meshes(tmp_path, form, faces):
    order = ">" if "big" in form else "<"
    head = f"ply\r\nformat {form} 1.0\r\nelement vertex 4\r\nproperty double x\r\nproperty double y\r\nproperty double z\r\n"
    head += f"element face {len(faces)}\r\nproperty list uchar int vertex_indices\r\nend_header\r\n"
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], order + "f8")
    if form == "ascii":
        body = "\n".join(" ".join(map(str, c)) for c in corners.tolist()) + "\n"
        body = (body + "\n".join(f"{len(f)} " + " ".join(map(str, f)) for f in faces)).encode()
    else:
        body = corners.tobytes() + b"".join(bytes([len(f)]) + np.array(f, order + "i4").tobytes() for f in faces)
    mesh = point_files.read_ply(written(tmp_path / "a.ply", head.encode() + body))
    assert len(mesh.triangles) == sum(len(f) - 2 for f in faces) and mesh.vertices[2].tolist() == [1, 1, 0]
    cloud = read_cloud(tmp_path / "a.ply", 100)
    assert len(cloud) == 100 and float(cloud.points[:, 2].abs().max()) == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda b: b[:-5], "cut short"),
        (lambda b: b.replace(b"ply", b"abc", 1), "no PLY file"),
        (lambda b: b.replace(b"float x", b"float64x x"), "not understood: property float64x x"),
        (lambda b: b.replace(b"float x", b"float w"), "no vertices with x, y and z"),
        (lambda b: b.replace(b"binary_little_endian", b"zip"), "format is 'zip'"),
    ],
)
def test_what_is_wrong_with_a_ply_file_is_said(tmp_path, change, problem):
    with pytest.raises(DataError, match=problem):
        read_cloud(written(tmp_path / "a.ply", change(ply("binary_little_endian"))))


def test_a_cloud_is_written_and_read_back(tmp_path):
    cloud = Cloud(torch.randn(9, 3), torch.randn(9, 3), torch.rand(9, 3), torch.arange(9) - 1)
    write_ply(tmp_path / "a.ply", cloud)
    again = read_cloud(tmp_path / "a.ply")
    assert torch.equal(again.points, cloud.points) and torch.equal(again.normals, cloud.normals)
    assert torch.equal(again.labels, cloud.labels) and torch.allclose(again.colours, cloud.colours, atol=0.003)


def test_columns_are_told_by_number_and_value(tmp_path):
    unit = "\n".join("1 2 3 0 0.6 0.8" for _ in range(4))
    assert read_cloud(written(tmp_path / "n.txt", unit)).normals[0].tolist() == pytest.approx([0, 0.6, 0.8])
    colours = read_cloud(written(tmp_path / "c.csv", "x,y,z,r,g,b,label\n1,2,3,255,0,51,7\n4,5,6,0,0,0,2\n"))
    assert colours.colours[0].tolist() == pytest.approx([1, 0, 0.2]) and colours.labels.tolist() == [7, 2]
    assert len(read_cloud(written(tmp_path / "a.pts", "2\n1 2 3\n4 5 1e-3\n"))) == 2
    np.save(tmp_path / "a.npy", np.ones((5, 3), np.float32))
    assert read_cloud(tmp_path / "a.npy").points.shape == (5, 3)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.xyz", "", "holds no points"),
        ("a.xyz", "1 2\n3 4\n", "at least x, y and z"),
        ("a.xyz", "1 2 3\n4 5\n", "cut short"),
        ("a.xyz", "1 2 3\n4 five 6\n", "not a table of numbers"),
        ("a.xyz", "1 2 3\n4 nan 6\n", "point 2 is not finite"),
        ("a.xyz", "1 2 3 0.5\n", "labels are not whole numbers"),
        ("a.xyz", b"\xff\xfe\x00", "not a text file"),
        ("a.npy", b"nothing", "not a readable .npy"),
        ("a.obj", "v 1 2 3", ".off, .ply, .npy"),
    ],
)
def test_what_is_wrong_with_a_file_of_points_is_said(tmp_path, name, content, problem):
    with pytest.raises(DataError, match=problem):
        read_cloud(written(tmp_path / name, content))
    with pytest.raises(DataError, match="no such file"):
        read_cloud(tmp_path / "none.xyz")


# -- sets --------------------------------------------------------------------------------------------------------------


def test_modelnet_folders(tmp_path):
    for label in ("bed", "sofa"):
        for split, count in (("train", 2), ("test", 1)):
            for i in range(count):
                written(tmp_path / label / split / f"{label}_{i}.off", "OFF" + CUBE)
    train, test = open_clouds(tmp_path, "train"), open_clouds(tmp_path, "test")
    assert train.labels == ["bed", "sofa"] and train.targets == [0, 0, 1, 1] and test.targets == [0, 1]
    assert len(train[0][0]) == point_files.SURFACE_POINTS


def test_resampled_modelnet(tmp_path):
    written(tmp_path / "modelnet40_shape_names.txt", "night_stand\nbed\n")
    written(tmp_path / "modelnet40_train.txt", "night_stand_0001\nbed_0001\n")
    written(tmp_path / "modelnet40_test.txt", "bed_0002\nlamp_0001\n")
    written(tmp_path / "night_stand" / "night_stand_0001.txt", "0,0,0,0,0,9\n1,1,1,0,0,9\n")
    train = open_clouds(tmp_path, "train")
    assert train.labels == ["night_stand", "bed"] and train.targets == [0, 1]
    assert train[0][0].normals is not None and train[0][0].colours is None
    with pytest.raises(DataError, match="modelnet40_test.txt: line 2: the class of 'lamp_0001'"):
        open_clouds(tmp_path, "test")
    with pytest.raises(DataError, match="bed_0001.txt: no such file"):
        train[1]


def shapenet(root, listing="json", names=(("Mug", "0379"), ("Bag", "0277"))):
    written(root / "synsetoffset2category.txt", "".join(f"{name}\t{folder}\n" for name, folder in names))
    shapes = {"train": "a", "val": "b", "test": "c"}
    for split, shape in shapes.items():
        entries = [f"shape_data/{folder}/{shape}" for _, folder in names] + ["shape_data/9999/z"]
        text = json.dumps(entries) if listing == "json" else "\n".join(entries)
        written(root / "train_test_split" / f"shuffled_{split}_file_list.{listing}", text)
    for _, folder in names:
        first = 36 if folder == "0379" else 4
        rows = [f"{i} 0 0 0 0 1 {first + i % 2}.0" for i in range(5)]
        for shape in shapes.values():
            written(root / folder / f"{shape}.txt", "\n".join(rows))
    return root


@pytest.mark.parametrize("listing", ["json", "txt"])
def test_shapenet_part(tmp_path, listing):
    root = shapenet(tmp_path, listing)
    train, test = open_clouds(root, "train"), open_clouds(root, "test")
    assert train.labels == ["Bag", "Mug"] and sorted(train.targets) == [0, 0, 1, 1] and sorted(test.targets) == [0, 1]
    assert train.parts == {"Bag": [4, 5], "Mug": [36, 37]} and len(train.point_labels) == 50
    cloud, target = train[train.targets.index(1)]
    assert cloud.labels.tolist() == [36, 37, 36, 37, 36] and cloud.normals[0].tolist() == [0, 0, 1]
    assert sum(SHAPENET_PARTS.values()) == 50


def test_parts_of_other_categories_are_read_from_the_training_files(tmp_path):
    root = shapenet(tmp_path, names=(("Cup", "0379"), ("Bag", "0277")))
    for split in ("train", "test"):
        assert open_clouds(root, split).parts == {"Bag": [4, 5], "Cup": [36, 37]}


def test_what_is_wrong_with_a_shape_set_is_said(tmp_path):
    root = shapenet(tmp_path)
    written(root / "0277" / "a.txt", "0 0 0 0 0 1 77\n")
    train = open_clouds(root, "train")
    with pytest.raises(DataError, match="a.txt: has the label 77; there are 50"):
        train[train.targets.index(0)]
    written(root / "train_test_split" / "shuffled_test_file_list.json", "[1")
    with pytest.raises(DataError, match="shuffled_test_file_list.json: not readable JSON"):
        open_clouds(root, "test")
    written(root / "synsetoffset2category.txt", "Mug\n")
    with pytest.raises(DataError, match="line 1 is not 'name folder'"):
        open_clouds(root, "train")


def test_rooms(tmp_path):
    rows = np.concatenate(
        [np.random.default_rng(0).random((40, 3)) * 3, np.full((40, 3), 128.0), np.arange(40)[:, None] % 13], 1
    )
    for name in ("Area_1_office_1", "Area_5_hallway_2"):
        np.save(tmp_path / f"{name}.npy", rows)
    train, test = open_clouds(tmp_path, "train"), open_clouds(tmp_path, "test")
    assert [len(train), len(test)] == [1, 1] and "Area_5" in test.paths[0] and train.point_labels[8] == "chair"
    assert train[0][0].colours[0].tolist() == pytest.approx([128 / 255] * 3)
    own = tmp_path / "own"
    written(own / "classes.txt", "floor\nchair\n")
    written(own / "train" / "a.txt", "0 0 0 1\n1 1 1 0\n")
    assert open_clouds(own, "train")[0][0].labels.tolist() == [1, 0]
    written(own / "test" / "b.xyz", "0 0 0\n1 1 1\n")
    with pytest.raises(DataError, match="b.xyz: its points have no labels"):
        open_clouds(own, "test")[0]


def test_class_folders_and_wrong_places(tmp_path):
    for label in ("a", "b"):
        for i in range(10):
            written(tmp_path / label / f"{i}.xyz", "0 0 0\n1 1 1\n")
    train, test = open_clouds(tmp_path, "train"), open_clouds(tmp_path, "test")
    assert [len(train), len(test)] == [16, 4] and not set(train.paths) & set(test.paths)
    with pytest.raises(PaperZooError, match="did you mean solids"):
        open_clouds("solid")
    with pytest.raises(DataError, match="no such folder"):
        open_clouds(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no class folders"):
        open_clouds(tmp_path / "a")
    with pytest.raises(DataError, match="this is a file"):
        open_clouds(tmp_path / "a" / "0.xyz")


# -- solids ------------------------------------------------------------------------------------------------------------


def test_points_lie_on_their_surfaces_evenly():
    m, one = solids.Maker(2, 50_000, 0), torch.ones(2)
    ball = m.ball(2 * one)
    assert (
        torch.allclose(ball.points.norm(dim=2), torch.tensor(2.0), atol=1e-5) and abs(float(ball.points.mean())) < 0.02
    )
    torus = m.torus(one, 0.5 * one)
    ring = torus.points[..., :2].norm(dim=2)
    assert torch.allclose((ring - 1).square() + torus.points[..., 2].square(), torch.tensor(0.25), atol=1e-4)
    assert float(ring.mean()) == pytest.approx(1.125, abs=0.005)  # R + r^2 / (2 R), more outside than inside
    side = m.frustum(one, 0 * one, 2 * one, closed=False)
    assert float(side.points[..., 2].mean()) == pytest.approx(-1 / 3, abs=0.01)  # a cone's side: a third of its height
    box = m.box(one, 2 * one, 3 * one)
    on_top = (box.points[..., 2].abs() > 2.999).float().mean()
    assert float(on_top) == pytest.approx(2 / 11, abs=0.01)  # areas 6 : 3 : 2
    tube = m.tube(one, 0.5 * one, 2 * one)
    assert float(tube.area[0]) == pytest.approx(2 * math.pi * (2 + 1 + 0.75), rel=1e-5)


def test_sets_are_the_same_each_time_and_share_nothing():
    kept = solids.solid_parts("train")
    solids.solid_parts.cache_clear()
    again, test = solids.solid_parts("train"), solids.solid_parts("test")
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert not torch.isin(test.points[:, 0, 0], again.points[:, 0, 0]).any()
    for k, (name, parts) in enumerate(open_clouds("solid_parts").parts.items()):
        assert set(again.labels[again.targets == k].unique().tolist()) == set(parts), name
    rooms = solids.solid_rooms("test")
    assert all(len(r.unique()) >= 4 for r in rooms.labels) and float(rooms.points.abs().max()) < 6


# -- what a network sees -----------------------------------------------------------------------------------------------


def test_clouds_smaller_than_the_sample_repeat_behind_a_mask():
    rows, mask = point_batches.choose(5, 12)
    assert sorted(rows[mask].tolist()) == [0, 1, 2, 3, 4] and int(mask.sum()) == 5 and int(rows.max()) == 4
    rows, mask = point_batches.choose(50, 12)
    assert len(set(rows.tolist())) == 12 and mask.all()


@pytest.mark.parametrize("size", [3, 10, 11, 25])
def test_views_cover_every_point(size):
    rows, mask = point_batches.covering(size, 10, torch.Generator().manual_seed(0))
    assert set(rows[mask].tolist()) == set(range(size)) and rows.shape[1] == 10


def test_turns_keep_lengths_and_the_axis_that_points_up():
    cloud = Cloud(torch.randn(50, 3), torch.randn(50, 3))
    config = replace(SMALL, jitter=0.0, up="y")
    turned = point_batches.augmented(cloud, config)
    assert torch.allclose(turned.points[:, 1], cloud.points[:, 1], atol=1e-5)
    assert torch.allclose(turned.points.norm(dim=1), cloud.points.norm(dim=1), atol=1e-4)
    anyhow = point_batches.augmented(cloud, replace(config, rotate="any"))
    matrix = torch.linalg.lstsq(cloud.points, anyhow.points)[0]
    assert torch.det(matrix) == pytest.approx(1, abs=1e-3) and not torch.allclose(anyhow.points, cloud.points)
    assert torch.allclose(cloud.normals @ matrix, anyhow.normals, atol=1e-4)


def test_dropped_points_are_the_first_one_again():
    clouds = open_clouds("solid_parts", "train")
    data = point_batches.Objects(clouds, replace(SMALL, task="parts", drop=0.9, rotate="none", jitter=0.0), train=True)
    item = data[0]
    gone = ~item["mask"]
    assert gone.any() and torch.equal(item["points"][gone], item["points"][:1].expand(int(gone.sum()), -1))
    assert (item["labels"][gone] == -1).all() and (item["labels"][~gone] >= 0).all()


def test_blocks_of_rooms():
    config = replace(
        SMALL, task="scenes", num_points=64, features=("place",), block_size=1.5, rotate="none", jitter=0.0
    )
    clouds = open_clouds("solid_rooms", "test")
    item = point_batches.Blocks(clouds, config, train=True)[0]
    assert item["points"].shape == (64, 6) and float(item["points"][:, :2].abs().max()) <= 0.751
    assert 0 <= float(item["points"][:, 3:].min()) and float(item["points"][:, 3:].max()) <= 1
    cloud = clouds[0][0].take(torch.arange(0, 8192, 8))
    points, rows, mask = point_batches.views(cloud, config)
    assert set(rows[mask].tolist()) == set(range(len(cloud))) and points.shape[1:] == (64, 6)


def test_missing_features_are_named():
    with pytest.raises(DataError, match="bare: its points have no colours"):
        point_batches.with_features(Cloud(torch.randn(4, 3)), ("colours",), "bare")


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_part_iou_by_hand():
    truth = torch.tensor([4, 4, 4, 5, 5, -1])
    assert shape_iou(torch.tensor([4, 4, 5, 5, 5, 4]), truth, [4, 5]) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert shape_iou(torch.tensor([4, 4, 4, 5, 5, 4]), truth, [4, 5, 6]) == 1.0  # a part neither has
    assert shape_iou(torch.tensor([4, 4, 4, 5, 6, 4]), truth, [4, 5, 6]) == pytest.approx((1 + 0.5 + 0) / 3)


def test_answers_are_restricted_to_the_parts_of_the_category():
    scores = torch.tensor([[0.9, 0.0, 0.1, 0.2], [0.5, 0.6, 0.2, 0.1]])
    assert restricted(scores, [2, 3]).tolist() == [3, 2]


def test_instance_and_category_means():
    ious = PartIoU(3)
    right, half = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 0])
    ious.add(right, right, 0, [0, 1])
    ious.add(half, right, 0, [0, 1])  # IoUs 1/2 and 0
    ious.add(right + 2, right + 2, 2, [2, 3])
    found = ious.metrics(lambda t: t)
    assert found["instance_miou"] == pytest.approx((1 + 0.25 + 1) / 3)
    assert found["category_miou"] == pytest.approx((0.625 + 1) / 2)
    assert found["point_accuracy"] == pytest.approx(10 / 12)


# -- the tasks ---------------------------------------------------------------------------------------------------------


def taken(config: Config, steps: int = 2) -> PointCloudRecipe:
    recipe = PointCloudRecipe(config, Runtime(0))
    for _ in range(steps):
        one_step(recipe, None)
    return recipe


def test_classification(tmp_path):
    recipe = taken(replace(SMALL, features=("normals",), norm_momentum=0.5, decay_steps=1, schedule="staircase"))
    assert recipe.model.bn1.momentum == 0.25 and recipe.scheduler.get_last_lr()[0] == pytest.approx(0.002 * 0.25)
    metrics = recipe.evaluate()
    truth = torch.tensor(recipe.test_clouds.targets)
    counts = recipe.confusion(recipe.test_clouds)
    assert metrics["accuracy"] == pytest.approx(float(counts.diag().sum()) / len(truth))
    paths = recipe.samples(tmp_path)
    results = recipe.predict(paths)
    assert len(results) == 8 and sum(results[0].probabilities.values()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(DataError, match="no normals"):
        recipe.predict([np.random.default_rng(0).random((30, 3))])


@pytest.mark.parametrize("model", ["pointnet_part_seg", "pointnet2_part_seg_small"])
def test_parts(tmp_path, model):
    recipe = taken(replace(SMALL, model=model, task="parts", data="solid_parts"), 1)
    paths = recipe.samples(tmp_path)
    results = recipe.predict(paths)
    assert [r.category for r in results] == [path.split("/")[-2] for path in paths]
    assert set(results[0].shares) <= {"dumbbell bar", "dumbbell weights"} and len(results[0].labels) == 512
    cloud = read_cloud(paths[0])
    assert recipe.predict([(cloud, "lamp")])[0].category == "lamp"
    assert recipe.predict([cloud.points.numpy()[:70]])[0].category in recipe.facts["labels"]
    with pytest.raises(PaperZooError, match="'cup' is no category"):
        recipe.predict([(cloud, "cup")])
    assert recipe.draw(paths[0], results[0]).width == 224


def test_scenes_label_every_point():
    config = replace(
        SMALL, model="pointnet2_sem_seg", task="scenes", data="solid_rooms", num_points=256, features=("place",),
        normalise="none", block_size=4.0, batch_size=2,
    )  # fmt: skip
    recipe = taken(config, 1)
    clouds = recipe.test_clouds
    cloud = clouds[0][0].take(torch.arange(0, 8192, 8))
    result = recipe.predict([cloud])[0]
    assert len(result.labels) == 1024 and sum(result.shares.values()) == pytest.approx(1)
    clouds.targets, clouds.read = [0], lambda i: cloud
    metrics = recipe.evaluate()
    hits = float((result.labels == cloud.labels).float().mean())
    assert metrics["point_accuracy"] == pytest.approx(hits) and 0 <= metrics["miou"] <= 1


class Masked(nn.Module):
    """Knows which rows are points."""

    takes_mask = True

    def forward(self, points: Tensor, mask: Tensor) -> Tensor:
        return (points * mask[..., None]).sum(1) @ torch.ones(3, 8)


def test_networks_that_ask_for_the_mask_get_it():
    recipe = PointCloudRecipe(SMALL, Runtime(0))
    recipe.model = Masked()
    few = np.random.default_rng(0).random((5, 3))
    once = recipe.one_view(few)
    assert int(once["mask"].sum()) == 5
    out = recipe.output(recipe.model, {"points": once["points"][None], "mask": once["mask"][None]})
    assert out.shape == (1, 8) and torch.allclose(out, torch.zeros(1, 8), atol=1e-5)  # the mean was taken out


def test_a_cloud_is_many_things(tmp_path):
    rows = [[0.0, 0, 0], [1, 1, 1]]
    for value in (rows, np.array(rows), torch.tensor(rows)):
        assert to_cloud(value).points.tolist() == rows
    for value, problem in (([1, 2], "is an array"), ("a.jpg", "not a file of points"), (object(), "not object")):
        with pytest.raises(PaperZooError, match=problem):
            to_cloud(value)


def test_wrong_settings_are_said():
    for change, problem in (
        ({"scale": (2.0, 1.0)}, "smaller factor comes first"),
        ({"features": ("place",)}, "goes with task scenes"),
        ({"task": "parts"}, "its shapes have no parts"),
        ({"task": "scenes"}, "its points have no classes"),
    ):
        with pytest.raises(PaperZooError, match=problem):
            PointCloudRecipe(replace(SMALL, **change), Runtime(0))


def test_near_points_are_drawn_over_far_ones():
    points = torch.tensor([[0.0, 0, 1], [0, 0, -1], [1, 0, 0], [-1, 0, 0]])
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    picture = np.asarray(
        cloud_picture(points, colours, "z", 64, elevation=90.0)
    )  # from above: the first hides the second
    red, green, _ = picture[32, 32].tolist()
    assert red > 200 and green < 50
