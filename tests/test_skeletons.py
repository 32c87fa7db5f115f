"""Skeleton actions: gestures, readers of the real layouts, upright bodies, streams, sampling, the recipe."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from paperzoo.blocks.skeleton_graphs import LAYOUTS, spatial_graph
from paperzoo.data.gestures import LABELS, gestures
from paperzoo.data.skeleton_clips import open_skeletons, read_ntu
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError, UnknownName
from paperzoo.tasks.skeleton_actions import Config, SkeletonActionRecipe, Streams
from paperzoo.tasks.skeleton_samples import SkeletonSamples, frames_of, normalised, people_first, shared, stream

NTU = LAYOUTS["ntu"]
SMALL = Config(
    model="stgcn_plus_plus_tiny",
    model_arguments={"width": 8, "stages": 2},
    frames=8,
    steps=2,
    batch_size=4,
    test_clips=2,
)


def ntu_file(path, bodies, frames=12, joints=25, break_at=None):
    """Bodies: name -> (scale of movement, first frame, last frame)."""
    lines = [str(frames)]
    for frame in range(frames):
        here = {n: b for n, b in bodies.items() if b[1] <= frame < b[2]}
        lines.append(str(len(here)))
        for name, (scale, *_) in here.items():
            lines += [f"{name} 0 1 1 1 1 0 0.1 0.2 2", str(joints)]
            for joint in range(joints):
                x, y, z = 0.01 * joint, 0.1 * joint + scale * frame, 3.0
                lines.append(f"{x} {y} {z} 1 2 3 4 0 0 0 1 2")
    if break_at is not None:
        lines[break_at] = "broken"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def pyskl_file(path, joints=17, channels=2, count=6):
    rng = np.random.default_rng(0)
    annotations = []
    for i in range(count):
        one = {
            "frame_dir": f"clip{i}",
            "label": i % 3,
            "img_shape": (100, 200),
            "total_frames": 9,
            "keypoint": rng.uniform(1, 90, (1 + i % 2, 9, joints, channels)).astype(np.float16),
        }
        if channels == 2:
            one["keypoint_score"] = np.ones((1 + i % 2, 9, joints), np.float16)
            one["keypoint_score"][0, 0, 0] = 0
        annotations.append(one)
    split = {"xsub_train": [f"clip{i}" for i in range(4)], "xsub_val": ["clip4", "clip5"]}
    path.write_bytes(pickle.dumps({"split": split, "annotations": annotations}))
    return annotations


def kinetics(root):
    for part in ("train", "val"):
        frames = [
            {
                "frame_index": k + 1,
                "skeleton": [{"pose": [0.75, 0.25] * 18, "score": [s] * 18} for s in (0.2, 0.9, 0.5)],
            }
            for k in range(5)
        ]
        (root / f"kinetics_{part}").mkdir(parents=True)
        text = json.dumps({"data": frames, "label": "waving", "label_index": 1})
        (root / f"kinetics_{part}" / "abc.json").write_text(text)
        labels = {
            "abc": {"has_skeleton": True, "label": "waving", "label_index": 1},
            "def": {"has_skeleton": False, "label": "running", "label_index": 0},
        }
        (root / f"kinetics_{part}_label.json").write_text(json.dumps(labels))
    return root


# -- gestures ------------------------------------------------------------------------------------------------------------


def test_gestures_follow_from_the_seed():
    a = gestures("train", 16)
    gestures.cache_clear()
    b = gestures("train", 16)
    assert all(torch.equal(a[i].joints, b[i].joints) for i in range(16))
    assert not torch.equal(a[0].joints, gestures("test", 16)[0].joints[:, : a[0].joints.shape[1]])
    assert [a[i].label for i in range(8)] == list(range(8)) and len(a.labels) == 8
    assert all(
        24 <= clip.joints.shape[1] <= 48 and clip.joints.shape[2:] == (25, 3) for clip in (a[i] for i in range(16))
    )


def test_two_people_are_there_where_two_are_needed():
    data = gestures("train", 64)
    for i in range(64):
        second = bool((data[i].joints[1] != 0).any())
        assert second == (LABELS[data[i].label] in ("come together", "part"))


def test_both_of_a_pair_have_the_same_poses():
    """The mean pose over all frames does not tell a gesture from the one backwards; the order of its first and last frame does."""
    data = gestures("train", 400)
    for pair in range(4):
        means, ways = {}, {}
        for way in (0, 1):
            clips = [data[i].joints[0] for i in range(400) if data[i].label == 2 * pair + way]
            height = [c[:, :, 1].amax(1) - c[:, [14, 18], 1].amax(1) for c in clips]
            means[way] = np.mean([float(h.mean()) for h in height])
            ways[way] = np.mean([float(h[-3:].mean() - h[:3].mean()) for h in height])
        assert abs(means[0] - means[1]) < 0.06
        if pair in (0, 2):
            assert ways[0] * ways[1] < 0 and abs(ways[0] - ways[1]) > 0.2


# -- layouts -------------------------------------------------------------------------------------------------------------


def test_ntu_files_keep_the_bodies_that_move_most(tmp_path):
    bodies = {"7": (0.0, 0, 12), "8": (0.05, 0, 12), "9": (0.2, 0, 12), "1": (0.9, 0, 4)}
    clip = read_ntu(ntu_file(tmp_path / "S001C002P003R002A013.skeleton", bodies))
    assert clip.label == 12 and clip.joints.shape == (2, 12, 25, 3)
    assert clip.joints[0, 1, 3].tolist() == pytest.approx(
        [0.03, 0.5, 3.0]
    )  # body 9; body 1 is there for too short a time
    assert clip.joints[1, 1, 3].tolist() == pytest.approx([0.03, 0.35, 3.0])


def test_ntu_frames_without_anybody_are_left_out(tmp_path):
    clip = read_ntu(ntu_file(tmp_path / "S001C001P001R001A001.skeleton", {"3": (0.1, 2, 9)}))
    assert clip.joints.shape == (2, 7, 25, 3) and not clip.joints[1].any()


@pytest.mark.parametrize(("protocol", "train"), [("xsub", ["P001", "P002"]), ("xview", ["C002"]), ("xset", ["S002"])])
def test_ntu_protocols(tmp_path, protocol, train):
    for setup in (1, 2):
        for camera in (1, 2):
            for person in (1, 2, 3):
                name = f"S{setup:03d}C{camera:03d}P{person:03d}R001A{setup:03d}.skeleton"
                ntu_file(tmp_path / name, {"1": (0.1, 0, 3)}, frames=3)
    data, test = (open_skeletons(tmp_path, split, protocol) for split in ("train", "test"))
    assert len(data) + len(test) == 12 and len(data.labels) == 60
    assert all(any(t in path.name for t in train) for path in data.sources)
    assert not any(any(t in path.name for t in train) for path in test.sources)


def test_broken_ntu_files_are_named_with_their_line(tmp_path):
    path = tmp_path / "S001C001P001R001A001.skeleton"
    ntu_file(path, {"1": (0.1, 0, 3)}, frames=3, break_at=6)
    with pytest.raises(DataError, match=r"A001\.skeleton:7: a joint was expected"):
        read_ntu(path)
    ntu_file(path, {"1": (0.1, 0, 3)}, frames=3, break_at=1)
    with pytest.raises(DataError, match=r":2: the number of bodies must be a whole number, not 'broken'"):
        read_ntu(path)
    lines = ntu_file(path, {"1": (0.1, 0, 3)}, frames=3).read_text().splitlines()
    path.write_text("\n".join(lines[:20]))
    with pytest.raises(DataError, match=r":21: a joint was expected.*the end of the file"):
        read_ntu(path)
    ntu_file(path, {"1": (0.1, 0, 3)}, frames=3, joints=17)
    with pytest.raises(DataError, match=r":4: a body has 17 joints"):
        read_ntu(path)
    ntu_file(path, {}, frames=3)
    with pytest.raises(DataError, match="no body"):
        read_ntu(path)
    with pytest.raises(DataError, match="the name must be"):
        open_skeletons(ntu_file(tmp_path / "other.skeleton", {"1": (0.1, 0, 3)}).parent, "train")


def test_pyskl_files_of_flat_skeletons(tmp_path):
    annotations = pyskl_file(tmp_path / "hrnet.pkl")
    data, test = (open_skeletons(tmp_path / "hrnet.pkl", split) for split in ("train", "test"))
    assert (len(data), len(test)) == (4, 2) and data.layout == "coco" and data.flat and data.labels == ["0", "1", "2"]
    clip = data[1]
    assert clip.joints.shape == (2, 9, 17, 3) and clip.label == 1
    assert clip.joints[0, 0, 0].tolist() == [0, 0, 0]  # not seen
    x, y = annotations[1]["keypoint"][1, 2, 3].astype(np.float32)
    assert clip.joints[1, 2, 3].tolist() == pytest.approx([(x - 100) / 100, (y - 50) / 50, 1.0])


def test_pyskl_files_of_three_dimensional_skeletons(tmp_path):
    annotations = pyskl_file(tmp_path / "ntu.pkl", joints=25, channels=3)
    data = open_skeletons(tmp_path / "ntu.pkl", "test")
    assert data.layout == "ntu" and not data.flat
    assert torch.equal(data[0].joints, torch.from_numpy(annotations[4]["keypoint"].astype(np.float32)))


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_pickles_that_would_run_code_are_refused(tmp_path, capsys):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"annotations": [Evil()]}))
    with pytest.raises(DataError, match=r"builtins\.print"):
        open_skeletons(tmp_path / "evil.pkl", "train")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"keypoint": np.zeros((2, 3))}, "keypoint must be an array"),
        ({"label": -1}, "label is -1"),
        ({"keypoint_score": np.zeros((1, 2))}, "keypoint_score must have the shape"),
        ({"keypoint": np.zeros((1, 9, 5, 3))}, "known are 25"),
    ],
)
def test_wrong_annotations_are_named(tmp_path, change, problem):
    pyskl_file(tmp_path / "a.pkl", joints=25, channels=3, count=1)
    values = pickle.loads((tmp_path / "a.pkl").read_bytes())
    values["annotations"][0].update(change)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(values))
    with pytest.raises(DataError, match=problem):
        open_skeletons(tmp_path / "a.pkl", "train")


def test_kinetics_keeps_the_surest_people(tmp_path):
    data = open_skeletons(kinetics(tmp_path), "train")
    assert len(data) == 1 and data.labels == ["running", "waving"] and data.layout == "openpose"
    clip = data[0]
    assert clip.joints.shape == (2, 5, 18, 3) and clip.label == 1
    assert clip.joints[0, 0, 0].tolist() == pytest.approx([0.5, -0.5, 0.9])
    assert clip.joints[1, 0, 0, 2].item() == pytest.approx(0.5)
    (tmp_path / "kinetics_train" / "abc.json").write_text('{"data": [{"frame_index": 1}]}')
    with pytest.raises(DataError, match=r"abc\.json: not a Kinetics-skeleton file"):
        data[0]
    (tmp_path / "kinetics_val_label.json").write_text("[1]")
    with pytest.raises(DataError, match="kinetics_val_label"):
        open_skeletons(tmp_path, "test")


def test_what_is_not_there_is_told_in_a_line(tmp_path):
    with pytest.raises(UnknownName, match="gestures"):
        open_skeletons("gesture")
    with pytest.raises(DataError, match="no such file or folder"):
        open_skeletons(tmp_path / "none.pkl")
    with pytest.raises(DataError, match="holds no .skeleton files"):
        open_skeletons(tmp_path)
    with pytest.raises(UnknownName, match="xsub"):
        open_skeletons(tmp_path, "train", "xsubject")
    with pytest.raises(PaperZooError, match="train and test"):
        open_skeletons("gestures", "val")
    (tmp_path / "cut.pkl").write_bytes(b"\x80\x04cut")
    with pytest.raises(DataError, match=r"cut\.pkl"):
        open_skeletons(tmp_path / "cut.pkl")


# -- samples -------------------------------------------------------------------------------------------------------------


def test_bodies_are_put_upright():
    torch.manual_seed(0)
    joints = torch.randn(1, 4, 25, 3)
    joints[0, 2, 7] = 0
    found = normalised(joints, NTU)
    assert torch.allclose(found[0, 0, 1], torch.zeros(3), atol=1e-6)
    spine, across = found[0, 0, 1] - found[0, 0, 0], found[0, 0, 8] - found[0, 0, 4]
    assert torch.allclose(spine / spine.norm(), torch.tensor([0.0, 0.0, 1.0]), atol=1e-5) or spine[2] > 0
    assert torch.allclose(across / across.norm(), torch.tensor([1.0, 0.0, 0.0]), atol=1e-5)
    assert found[0, 2, 7].tolist() == [0, 0, 0]
    before, after = torch.cdist(joints[0, 1], joints[0, 1]), torch.cdist(found[0, 1], found[0, 1])
    assert torch.allclose(before, after, atol=1e-4)  # only turned and shifted


def test_a_turned_and_shifted_clip_is_the_same_once_upright():
    clip = gestures("train", 8)[2].joints
    angle = torch.tensor(0.7)
    turn = torch.tensor([[angle.cos(), 0, angle.sin()], [0, 1, 0], [-angle.sin(), 0, angle.cos()]])
    seen = (clip != 0).any(-1, keepdim=True)
    other = (clip @ turn.T + torch.tensor([1.0, 2.0, -3.0])) * seen
    apart = (normalised(clip, NTU) - normalised(other, NTU)).abs()
    assert apart.max() < 0.1 and apart.mean() < 0.02  # two smallest rotations, one after the other: not exactly


def test_who_is_seen_more_comes_first():
    joints = torch.ones(2, 5, 25, 3)
    joints[0, 1:] = 0
    joints[1] *= 2
    joints[1, 4] = 0
    found = people_first(joints)
    assert found.shape[1] == 4 and bool((found[0] == 2).all())


def test_streams_by_hand():
    joints = torch.zeros(1, 3, 25, 3)
    joints[0, :, 1] = torch.tensor([[1.0, 0, 0], [2, 0, 0], [4, 0, 0]])
    bones = stream(joints, "bone", NTU, flat=False)
    assert bones[0, 1, 1].tolist() == [2, 0, 0] and bones[0, 1, 0].tolist() == [-2, 0, 0] and not bones[0, :, 20].any()
    motion = stream(joints, "joint_motion", NTU, flat=False)
    assert motion[0, :, 1, 0].tolist() == [1, 2, 0]
    flat = torch.rand(1, 3, 17, 3)
    found = stream(flat, "bone_motion", LAYOUTS["coco"], flat=True)
    sure = (flat[..., 2] + flat[:, :, list(LAYOUTS["coco"].bones), 2]) / 2
    assert torch.allclose(found[:, :2, :, 2], (sure[:, 1:] + sure[:, :-1]) / 2)


@pytest.mark.parametrize(("count", "length"), [(7, 10), (10, 10), (13, 10), (20, 10), (97, 10)])
def test_frames_are_one_from_each_part(count, length):
    rng = np.random.default_rng(0)
    for _ in range(20):
        frames = frames_of(count, length, rng)
        assert len(frames) == length and frames.min() >= 0 and frames.max() < count
        if count < length:
            assert (np.diff(frames) % count == 1).all()
        else:
            assert (np.diff(frames) > 0).all()
        if count >= 2 * length:
            borders = np.arange(length + 1) * count // length
            assert (borders[:-1] <= frames).all() and (frames < borders[1:]).all()
    if count < length:
        starts = [frames_of(count, length, rng, k, 5)[0] for k in range(5)]
        assert starts == [k * count // 5 for k in range(5)]


def test_samples_have_streams_side_by_side_and_tests_repeat_exactly():
    config = replace(SMALL, streams=("joint", "bone_motion"), people=3)
    data = gestures("test", 8)
    test = SkeletonSamples(data, config, test=True)
    one, label = test[3]
    assert one.shape == (2, 3, 8, 25, 6) and label == 3 and torch.equal(one, test[3][0])
    assert not one[:, 2].any()
    train, _ = SkeletonSamples(data, config, test=False)[3]
    assert train.shape == (3, 8, 25, 6)
    still, _ = SkeletonSamples(data, replace(config, still=True), test=True)[3]
    assert torch.equal(still[0, 0, 0, :, :3], still[1, 0, 7, :, :3]) and not still[..., 3:].any()


def test_shares_of_the_streams():
    assert shared(None, ("joint", "bone", "joint_motion", "bone_motion")) == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6])
    assert shared((1, 3), ("joint", "bone")) == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_graphs_are_trees(name):
    layout = LAYOUTS[name]
    graph = spatial_graph(layout)
    assert len(layout.inward) == layout.joints - 1 and len(layout.bones) == layout.joints
    assert torch.equal(graph[0], torch.eye(layout.joints))
    assert bool(((graph.sum(1) - 1).abs() < 1e-6).logical_or(graph.sum(1) == 0).all())
    reached, links = {0}, [*layout.inward]
    for _ in range(layout.joints):
        reached |= {b for a, b in links if a in reached} | {a for a, b in links if b in reached}
    assert len(reached) == layout.joints


# -- the recipe ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe():
    torch.manual_seed(0)
    return SkeletonActionRecipe(replace(SMALL, streams=("joint", "bone")), Runtime())


def test_streams_learn_as_if_alone(recipe):
    """The gradient of a stream's network in the sum is that of its own loss."""
    recipe.runtime.begin()
    skeletons, labels = recipe.batch()
    recipe.model.train()
    loss = recipe.step((skeletons, labels))["loss"]
    weight = recipe.model.networks[1].cls_head.fc_cls.weight
    together = torch.autograd.grad(loss, weight)[0]
    alone = torch.nn.functional.cross_entropy(recipe.model.networks[1](skeletons[..., 3:].contiguous()), labels)
    assert torch.allclose(together, torch.autograd.grad(alone, weight)[0], atol=1e-6)


def test_the_answer_is_the_mean_of_the_streams(recipe):
    x = torch.randn(3, 2, 8, 25, 6)
    model = recipe.model.eval()
    with torch.inference_mode():
        parts = [n(p).softmax(1) for n, p in zip(model.networks, x.chunk(2, 4), strict=True)]
        assert torch.allclose(model(x).softmax(1), (parts[0] + parts[1]) / 2, atol=1e-6)
    assert isinstance(model, Streams)


def test_predict_takes_files_and_arrays(recipe, tmp_path):
    ntu = ntu_file(tmp_path / "S001C001P001R001A001.skeleton", {"1": (0.1, 0, 12)})
    samples = recipe.samples(tmp_path)
    first, second, third = recipe.predict([samples[0], str(ntu), np.load(samples[1])[0]])
    assert sum(first.probabilities.values()) == pytest.approx(1, abs=1e-5) and first.label in LABELS
    assert (second.people, second.frames) == (1, 12) and third.people == 1
    assert recipe.draw(samples[0], first).width > 400
    again = recipe.predict([samples[0]])[0]
    assert again.probabilities == first.probabilities


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("clip.avi", "a .skeleton, a .json or a .npy"),
        ("none.npy", "no such file"),
        (np.zeros((4, 17, 3)), r"must be \(people, frames, 25, 3\)"),
        (np.full((1, 4, 25, 3), np.nan), "no numbers"),
        (np.zeros((1, 4, 25, 3)), "no body"),
    ],
)
def test_what_is_no_clip_is_told_in_a_line(recipe, value, problem):
    with pytest.raises(DataError, match=problem) as caught:
        recipe.predict([value])
    assert "\n" not in str(caught.value)


def test_wrong_streams_are_refused():
    with pytest.raises(PaperZooError, match="each may be named once"):
        SkeletonActionRecipe(replace(SMALL, streams=("joint", "joint")), Runtime())
    with pytest.raises(PaperZooError, match="has 1 values"):
        SkeletonActionRecipe(replace(SMALL, streams=("joint", "bone"), stream_weights=(1.0,)), Runtime())


def test_weights_of_each_stream_are_taken_and_the_head_is_new(tmp_path):
    from paperzoo.engine.models import create
    from paperzoo.engine.weights import save_weights

    published = {}
    for name in ("joint", "bone"):
        published[name] = create("stgcn_plus_plus_tiny", **SMALL.model_arguments)
        save_weights(tmp_path / f"{name}.safetensors", published[name])
    config = replace(SMALL, streams=("joint", "bone"), weights=str(tmp_path / "{stream}.safetensors"))
    networks = SkeletonActionRecipe(config, Runtime()).model.networks
    for name, network in zip(("joint", "bone"), networks, strict=True):
        assert torch.equal(network.backbone.gcn[1].gcn.A, published[name].backbone.gcn[1].gcn.A)
        assert torch.equal(network.backbone.gcn[0].tcn.bn.weight, published[name].backbone.gcn[0].tcn.bn.weight)
        assert torch.equal(network.backbone.gcn[0].gcn.conv.weight, published[name].backbone.gcn[0].gcn.conv.weight)
        assert network.cls_head.fc_cls.out_features == 8
