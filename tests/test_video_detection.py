"""Object detection in videos: samples, chains of boxes, metrics, and the recipe around a detector."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from paperzoo.blocks.sequence_nms import sequence_nms
from paperzoo.data.video_boxes import VideoBoxes
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, PaperZooError
from paperzoo.tasks.video_detection import Config, VideoDetectionRecipe, around, strip_of, windowed
from paperzoo.tasks.video_detection_metrics import VideoAP, average_precision, motion_iou
from paperzoo.tasks.video_detection_samples import CollateWindows, Windows, alike


def picture(path, width=40, height=30, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, 0, 0)).save(path)


# -- samples -------------------------------------------------------------------------------------------------------------


class Numbered(VideoBoxes):
    """Frames whose grey is their number; an object that moves a pixel a frame, and is a crowd in frame 1."""

    labels = ["b", "a"]

    def __init__(self, lengths=(5, 9)) -> None:
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def length(self, video):
        return self.lengths[video]

    def size(self, video):
        return 32, 48

    def path(self, video, frame=0):
        return f"video {video}, frame {frame}"

    def image(self, video, frame):
        return torch.full((3, 32, 48), 20 * video + frame, dtype=torch.uint8)

    def rows(self, video, frame):
        return [[4 + frame, 5, 20 + frame, 25]], [video], [7], [frame == 1]


def recipe_of(**changes):
    config = Config(model="none", image_sizes=(32,), normalise="none", augment="none", spread=2, **changes)

    class Holder:
        facts = {"labels": ["a", "b"], "mean": [0.0] * 3, "deviation": [1.0] * 3}

    Holder.config = config
    return Holder


def grey(sample: dict) -> list[int]:
    return (sample["images"][:, 0, 0, 0] * 255).round().int().tolist()


def test_windows_are_a_frame_and_its_neighbours():
    data = Windows(Numbered(), recipe_of(), 2)
    torch.manual_seed(0)
    for index in range(len(data)):
        sample, (video, frame) = data[index], data.rows[index]
        assert grey(sample) == [20 * video + frame + d for d in sample["offsets"].tolist()]
        assert sample["offsets"][0] == 0 and sample["offsets"].abs().max() <= 2


def test_windows_have_the_objects_of_their_first_frame():
    data = Windows(Numbered(), recipe_of(), 2)
    sample = data[3]
    assert (sample["boxes"].tolist(), sample["labels"].tolist(), sample["tracks"].tolist()) == (
        [[7, 5, 23, 25]],
        [1],
        [7],
    )
    assert len(data[1]["boxes"]) == 0  # crowds are not learned from


def test_windows_at_the_ends_stay_in_the_video():
    data = Windows(Numbered((2,)), recipe_of(), 4)
    torch.manual_seed(0)
    assert all(set(grey(data[0])) <= {0, 1} for _ in range(10))


def test_windows_take_some_frames_of_each_video():
    assert Windows(Numbered(), recipe_of(frames_per_video=3), 0).rows == [
        (0, 0),
        (0, 1),
        (0, 3),
        (1, 0),
        (1, 3),
        (1, 6),
    ]


def test_more_neighbours_than_there_are_frames_are_refused():
    with pytest.raises(PaperZooError, match="neighbours is 6; within a spread of 2 there are 5"):
        Windows(Numbered(), recipe_of(), 6)


def test_flipping_turns_boxes_and_all_frames():
    holder = recipe_of()
    holder.config = dataclasses.replace(holder.config, augment="flip")
    data = Windows(Numbered(), holder, 1)
    torch.manual_seed(0)
    boxes = {tuple(data[0]["boxes"][0].tolist()) for _ in range(12)}
    assert boxes == {(4, 5, 20, 25), (28, 5, 44, 25)}


def test_pictures_are_their_own_neighbours():
    class Stills(torch.utils.data.Dataset):
        labels = ["a"]

        def __len__(self):
            return 1

        def __getitem__(self, i):
            empty = torch.zeros(1, dtype=torch.bool)
            return {
                "image": torch.full((3, 32, 48), 99, dtype=torch.uint8),
                "boxes": torch.tensor([[1.0, 2, 9, 9]]),
                "labels": torch.tensor([0]),
                "crowd": empty,
            }

    sample = Windows(Numbered(), recipe_of(still_share=0.999), 2, Stills())[0]
    assert grey(sample) == [99, 99, 99] and sample["offsets"].tolist() == [0, 0, 0]
    assert sample["labels"].tolist() == [0]


def test_a_batch_pads_all_frames_alike():
    data = Windows(Numbered(), recipe_of(), 2)
    small = data[0]
    small["images"] = small["images"][..., :40]
    batch = CollateWindows(32)([small, data[7]])
    assert batch["images"].shape == (2, 3, 3, 32, 64) and batch["sizes"].tolist() == [[32, 40], [32, 48]]
    assert not batch["images"][0, ..., 40:].any()
    assert batch["images"][1, ..., :48].all() and not batch["images"][1, ..., 48:].any()
    assert [t["labels"].tolist() for t in batch["targets"]] == [[1], [0]]


def test_videos_side_by_side_have_one_length():
    assert alike(Numbered((5, 9, 5, 5)), 2) == [[0, 2], [1], [3]]


# -- windows of a video --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [0, 1, 3, 9])
def test_every_frame_sees_those_around_it(reach):
    for i, (before, frame, after) in enumerate(around(range(7), reach)):
        assert frame == i
        assert before == list(range(max(0, i - reach), i)) and after == list(range(i + 1, min(7, i + reach + 1)))
    assert i == 6


def test_a_model_without_a_stream_gets_windows():
    seen = []

    class Watcher(nn.Module):
        def forward(self, images):
            seen.append(images[0, :, 0, 0, 0].tolist())
            return (images[:, 0],)

    frames = [torch.full((1, 3, 2, 2), float(t)) for t in range(3)]
    assert len(list(windowed(Watcher(), frames, 1))) == 3
    assert seen == [[0, 1], [1, 0, 2], [2, 1]]


# -- chains of boxes -----------------------------------------------------------------------------------------------------


def boxes_at(*rows):
    """(x, score, label): boxes of 10 pixels."""
    return {
        "boxes": torch.tensor([[x, 0, x + 10, 10] for x, *_ in rows], dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor([s for _, s, _ in rows], dtype=torch.float32),
        "labels": torch.tensor([k for *_, k in rows], dtype=torch.int64),
    }


def test_a_chain_lifts_its_weak_box():
    frames = sequence_nms([boxes_at((0, 0.9, 0)), boxes_at((1, 0.1, 0)), boxes_at((2, 0.8, 0))])
    assert [f["scores"].tolist() for f in frames] == [[pytest.approx(0.6)]] * 3


def test_a_chain_drops_what_overlaps_it_in_its_frames():
    frames = sequence_nms([boxes_at((0, 0.9, 0), (2, 0.8, 0), (40, 0.3, 0)), boxes_at((0, 0.5, 0))])
    assert frames[0]["boxes"][:, 0].tolist() == [0, 40]
    assert frames[0]["scores"].tolist() == pytest.approx([0.7, 0.3])


def test_chains_do_not_cross_classes():
    frames = sequence_nms([boxes_at((0, 0.9, 0)), boxes_at((0, 0.1, 1))])
    assert [f["scores"].tolist() for f in frames] == [[pytest.approx(0.9)], [pytest.approx(0.1)]]


def test_chains_break_where_boxes_jump():
    frames = sequence_nms([boxes_at((0, 0.9, 0)), boxes_at((8, 0.1, 0))])
    assert [f["scores"].tolist() for f in frames] == [[pytest.approx(0.9)], [pytest.approx(0.1)]]


def test_after_a_chain_is_taken_the_others_are_found_anew():
    """Two objects cross the video; the second best chain goes around what the first one took."""
    frames = [boxes_at((2 * t, 0.9, 0), (100 - 3 * t, 0.5, 0), (100 - 3 * t + 2, 0.4, 0)) for t in range(4)]
    found = sequence_nms(frames)
    assert [len(f["boxes"]) for f in found] == [2] * 4
    assert [f["scores"].tolist() for f in found] == [pytest.approx([0.9, 0.5])] * 4


def test_chains_of_nothing():
    assert sequence_nms([]) == []
    assert [len(f["boxes"]) for f in sequence_nms([boxes_at(), boxes_at()])] == [0, 0]
    assert [len(f["boxes"]) for f in sequence_nms([boxes_at(), boxes_at((3, 0.5, 2)), boxes_at()])] == [0, 1, 0]


# -- metrics -------------------------------------------------------------------------------------------------------------


def truth_at(*rows, crowd=()):
    """(x, label, track): boxes of 100 pixels, so that the tolerance plays no part."""
    return {
        "boxes": torch.tensor([[x, 0, x + 100, 100] for x, *_ in rows], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([k for _, k, _ in rows], dtype=torch.int64),
        "tracks": torch.tensor([t for *_, t in rows], dtype=torch.int64),
        "crowd": torch.tensor([t in crowd for *_, t in rows], dtype=torch.bool),
    }


def found_at(*rows):
    found = boxes_at(*rows)
    found["boxes"] = torch.cat([found["boxes"][:, :2], found["boxes"][:, :2] + 100], 1)
    return found


def test_motion_iou_by_hand():
    truth = [truth_at((0, 0, 1)), truth_at((50, 0, 1), (0, 0, 2)), truth_at((0, 0, 2))]
    speeds = motion_iou([0, 1, 2], truth)
    assert [s.tolist() for s in speeds] == [[pytest.approx(1 / 3)], [pytest.approx(1 / 3), 1.0], [1.0]]


def test_motion_iou_looks_ten_frames_far():
    truth = [truth_at((0, 0, 1)), truth_at((50, 0, 1)), truth_at((0, 0, 1))]
    near, far = motion_iou([0, 10, 30], truth), motion_iou([0, 11, 30], truth)
    assert [float(s) for s in near] == [pytest.approx(1 / 3), pytest.approx(1 / 3), 0.0]
    assert [float(s) for s in far] == [0.0, 0.0, 0.0]


def test_average_precision_by_hand():
    right, wrong = torch.tensor([1.0, 0, 1]).numpy(), torch.tensor([0.0, 1, 0]).numpy()
    assert average_precision(right, wrong, 2) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert average_precision(right[:0], wrong[:0], 2) == 0.0


def test_each_object_is_found_once():
    ap = VideoAP(1)
    ap.update(found_at((0, 0.9, 0), (2, 0.8, 0)), truth_at((0, 0, 1)), torch.ones(1))
    ap.update(found_at((0, 0.7, 0)), truth_at((0, 0, 1)), torch.ones(1))
    assert ap.compute()["vid_mAP"] == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_small_objects_may_be_found_less_exactly():
    objects = truth_at((0, 0, 1))
    objects["boxes"] = torch.tensor([[0.0, 0, 8, 8]])
    found = boxes_at((0, 0.9, 0))
    found["boxes"] = torch.tensor([[4.0, 0, 12, 8]])  # IoU 1/3; 64 / 324 is enough
    ap = VideoAP(1)
    ap.update(found, objects, torch.ones(1))
    assert ap.compute()["vid_mAP"] == 1.0


def test_speeds_look_at_their_own_objects():
    ap = VideoAP(1)
    ap.update(found_at((0, 0.9, 0)), truth_at((0, 0, 1), (500, 0, 2)), torch.tensor([0.95, 0.2]))
    numbers = ap.compute()
    assert (numbers["vid_mAP"], numbers["vid_mAP_slow"], numbers["vid_mAP_fast"]) == (0.5, 1.0, 0.0)
    assert "vid_mAP_medium" not in numbers


def test_a_false_alarm_counts_for_the_speed_that_it_is_nearest_to():
    ap = VideoAP(1)
    objects, speeds = truth_at((0, 0, 1), (500, 0, 2)), torch.tensor([0.95, 0.2])
    ap.update(
        found_at((70, 0.9, 0), (0, 0.8, 0), (500, 0.7, 0)), objects, speeds
    )  # the first is a miss beside the slow one
    numbers = ap.compute()
    assert (numbers["vid_mAP_slow"], numbers["vid_mAP_fast"]) == (0.5, 1.0)


def test_degraded_frames_are_measured_by_themselves():
    ap = VideoAP(1)
    ap.update(found_at((0, 0.9, 0)), truth_at((0, 0, 1)), torch.ones(1), degraded=False)
    ap.update(found_at(), truth_at((0, 0, 1)), torch.ones(1), degraded=True)
    assert (ap.compute()["vid_mAP"], ap.compute()["vid_mAP_degraded"]) == (0.5, 0.0)


def test_what_lies_in_a_crowd_counts_neither_way():
    ap = VideoAP(1)
    ap.update(found_at((0, 0.9, 0), (300, 0.8, 0)), truth_at((300, 0, 1), (0, 0, 2), crowd=(2,)), torch.ones(2))
    assert ap.compute()["vid_mAP"] == 1.0


def test_frames_without_objects_count_false_alarms():
    ap = VideoAP(1)
    ap.update(found_at((0, 0.9, 0)), truth_at(), torch.zeros(0))
    ap.update(found_at((0, 0.8, 0)), truth_at((0, 0, 1)), torch.ones(1))
    assert ap.compute()["vid_mAP"] == pytest.approx(0.5)


# -- the recipe ----------------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Knows where `Numbered`'s object is from the grey of the frame; looks half as far to the right where it is alone."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor, targets=None):
        number = (images[:, 0, 0, 0, 0] * 255).round()
        if targets is not None:
            return {"loss": self.weight.square().sum()}
        video, frame = (number >= 20).float(), number % 20
        shift = frame + (0.0 if images.shape[1] > 1 else 12.0)
        boxes = torch.stack([4 + shift, 5 + 0 * shift, 20 + shift, 25 + 0 * shift], 1)
        return boxes[:, None], 1 - video[:, None]

    def postprocess(self, outputs, sizes, canvas, suppress=True):
        boxes, labels = outputs
        return [{"boxes": b, "scores": torch.ones(1), "labels": k.long()} for b, k in zip(boxes, labels, strict=True)]


class OracleRecipe(VideoDetectionRecipe):
    def build(self):
        return Oracle()

    def open(self, split):
        return Numbered((4, 4))


def oracle(**changes):
    options = {"model": "none", "image_sizes": (32,), "normalise": "none", "augment": "none", "test_videos": 2}
    facts = {"labels": ["a", "b"], "mean": [0.0] * 3, "deviation": [1.0] * 3}
    return OracleRecipe(Config(**options | changes), Runtime(device="cpu"), facts)


def test_evaluation_goes_through_all_frames():
    numbers = oracle(reach=1).evaluate()
    assert numbers["vid_mAP"] == 1.0 and numbers["mAP"] == pytest.approx(1.0)


def test_evaluation_without_neighbours_is_frame_by_frame():
    assert oracle(reach=0).evaluate()["vid_mAP"] < 0.5


def test_evaluation_can_chain_boxes():
    assert oracle(reach=1, seq_nms=True).evaluate()["vid_mAP"] == 1.0


def test_a_prediction_has_every_frame_in_its_own_pixels():
    recipe = oracle(reach=1)
    large = torch.stack([torch.full((3, 64, 96), t, dtype=torch.uint8) for t in range(3)])
    found = recipe.predict([large])[0]
    assert [f.boxes for f in found.frames] == [[(2 * (4 + t), 10, 2 * (20 + t), 50)] for t in range(3)]
    assert [f.labels for f in found.frames] == [["b"]] * 3
    assert recipe.draw(large, found).size[0] > 3 * 160


def test_a_folder_of_frames_is_a_video(tmp_path):
    for t in range(3):
        picture(tmp_path / f"{t}.png", 48, 32, t)
    assert len(oracle(reach=1).predict([str(tmp_path)])[0].frames) == 3


def test_a_class_that_was_not_learned_is_named():
    recipe = oracle()
    recipe.facts = recipe.facts | {"labels": ["a", "c"]}
    with pytest.raises(DataError, match="the class 'b', which is not among the 2 learned"):
        recipe.evaluate()


def test_a_strip_prefers_some_frames_and_is_full_where_it_can_be():
    assert strip_of(12, []) == [0, 2, 4, 6, 8, 10] and strip_of(3, []) == [0, 1, 2]
    assert strip_of(12, [4, 9]) == [0, 1, 2, 3, 4, 9]
    assert strip_of(20, list(range(8, 20))) == [8, 10, 12, 14, 16, 18]


def test_figures_show_what_was_found_and_what_is_there():
    assert set(oracle(reach=1).figures()) == {"Found", "There"}


def test_a_step_learns_from_the_losses():
    recipe = oracle(batch_size=2)
    recipe.runtime.begin()
    batch = recipe.batch()
    assert batch["images"].shape == (2, 3, 3, 32, 48)
    assert float(recipe.step(batch)["loss"].detach()) == 0.0
