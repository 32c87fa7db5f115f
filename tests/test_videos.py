"""Videos: files and lists of the field's formats, time stamps, damaged packets, clips, views, pictures."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paperzoo.data import moving_digits, videos
from paperzoo.data.videos import ArrayVideo, open_video, open_videos, write_video
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import DataError, MissingExtra, PaperZooError, UnknownName
from paperzoo.tasks import action_recognition, video_clips
from paperzoo.tasks.action_recognition import ActionRecognitionRecipe, Config
from paperzoo.tasks.video_clips import Clips, moments, starts, views

av = pytest.importorskip("av")

FACTS = {"labels": ["a", "b"], "mean": [0.0] * 3, "deviation": [1.0] * 3}


def ramp(count: int, height: int = 32, width: int = 48) -> torch.Tensor:
    """Frame k is all of the grey level 8 k: uint8 (T, 3, H, W)."""
    levels = 8 * torch.arange(count, dtype=torch.uint8)
    return levels[:, None, None, None].expand(count, 3, height, width).contiguous()


def levels(frames: torch.Tensor) -> list[int]:
    """Which frames of `ramp` these are."""
    return (frames.float().mean((1, 2, 3)) / 8).round().int().tolist()


def variable(path: Path, stamps: list[int], sides: tuple[int, int] = (48, 32), gop: int = 12) -> Path:
    """A file whose k-th frame of `ramp` is shown from `stamps[k]` milliseconds on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.width, stream.height, stream.pix_fmt = *sides, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.options, stream.gop_size = {"qscale": "2"}, gop
        for k, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.full((sides[1], sides[0], 3), 8 * k, np.uint8), "rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def small(path: Path, count: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, ramp(count, 8, 8), 25.0)


# -- one video -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".mp4", ".avi", ".mkv", ".npz"])
def test_a_written_video_is_read_again(ending, tmp_path):
    video = open_video(write_video(tmp_path / f"a{ending}", ramp(20), 10.0))
    assert (
        len(video) == 20 and video.rate == pytest.approx(10, rel=0.01) and video.duration == pytest.approx(2, rel=0.02)
    )
    frames = video.frames([0.0, 0.35, 0.3, 1.05, 1.95])
    assert frames.shape == (5, 3, 32, 48) and frames.dtype == torch.uint8
    assert levels(frames) == [0, 3, 3, 10, 19]


def test_frames_are_found_by_their_time_stamps(tmp_path):
    """Ten frames in the first tenth of a second, ten in the nine that follow."""
    stamps = [*range(0, 100, 10), *range(100, 1000, 90)]
    video = open_video(variable(tmp_path / "changing.mkv", stamps))
    assert video.times.tolist() == pytest.approx([s / 1000 for s in stamps])
    assert levels(video.frames([0.005, 0.055, 0.099, 0.1, 0.3, 0.5, 0.999])) == [0, 5, 9, 10, 12, 14, 19]
    assert video.rate == pytest.approx(19 / 0.91)


def test_seeking_gives_the_same_frames_as_reading_through(tmp_path):
    video = open_video(variable(tmp_path / "a.mp4", list(range(0, 31 * 40, 40)), gop=5))
    for first in (0.0, 0.21, 0.6, 1.1):
        wanted = [first, first + 0.04, first + 0.081]
        moment = np.asarray(wanted) + videos.EARLY
        through = video.decoded(moment, None, seek=False)
        assert levels(video.frames(wanted)) == levels(torch.from_numpy(np.stack(through)).permute(0, 3, 1, 2))
        assert levels(video.frames(wanted)) == [min(30, int(t / 0.04 + 1e-6)) for t in wanted]


def test_moments_outside_hold_the_first_and_last_frame(tmp_path):
    for video in (ArrayVideo(ramp(5), 10.0), open_video(write_video(tmp_path / "a.mp4", ramp(5), 10.0))):
        assert levels(video.frames([-1.0, 0.45, 9.0])) == [0, 4, 4]


def test_the_shorter_side_is_resized(tmp_path):
    tall = torch.zeros(2, 3, 60, 40, dtype=torch.uint8)
    for video in (ArrayVideo(tall), open_video(write_video(tmp_path / "a.mp4", tall, 25.0))):
        assert video.frames([0.0], 20).shape == (1, 3, 30, 20)


def test_damaged_packets_are_skipped_and_told(tmp_path, caplog):
    path = variable(tmp_path / "a.avi", list(range(0, 20 * 40, 40)), gop=1)
    stored = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][8]
        stored[packet.pos + 8 : packet.pos + packet.size] = b"\x00" * (packet.size - 8)
    path.write_bytes(bytes(stored))
    video = open_video(path)
    frames = levels(video.frames(video.times[:20].tolist()))
    assert frames == [7 if k == 8 else k for k in range(20)]
    assert "1 damaged packet(s) were skipped" in caplog.text


def test_a_video_that_breaks_off_is_read_as_far_as_it_goes(tmp_path):
    path = variable(tmp_path / "a.mkv", list(range(0, 24 * 40, 40)), gop=4)
    stored = path.read_bytes()
    path.write_bytes(stored[: len(stored) * 2 // 3])
    video = open_video(path)
    assert 4 < len(video) < 24
    assert levels(video.frames([0.0, 0.12])) == [0, 3]


@pytest.mark.parametrize("content", [b"", b"not a video at all", b"\x00\x00\x00\x18ftypmp42" + bytes(200)])
def test_a_file_that_is_no_video_is_named(content, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.mp4: not a video|a\.mp4: holds no") as error:
        open_video(path)
    assert "\n" not in str(error.value)


def test_a_sound_file_is_no_video(tmp_path):
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match="only sound"):
        open_video(path)


def test_without_pyav_its_extra_is_named(tmp_path, monkeypatch):
    import sys

    path = small(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"paperzoo\[video\]"):
        open_video(path)


def test_a_folder_of_pictures_is_a_video(tmp_path):
    from PIL import Image

    for k in range(3):
        Image.new("RGB", (10, 8), (8 * k,) * 3).save(tmp_path / f"{k:03d}.png")
    video = open_video(tmp_path)
    assert len(video) == 3 and levels(video.frames([0.0, 0.04, 0.08])) == [0, 1, 2]
    Image.new("RGB", (12, 8)).save(tmp_path / "003.png")
    with pytest.raises(DataError, match="different sizes"):
        video = open_video(tmp_path)
        video.frames(video.times)


def test_an_animated_picture_is_a_video(tmp_path):
    from PIL import Image

    frames = [Image.new("RGB", (16, 16), (60 * k,) * 3) for k in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    video = open_video(tmp_path / "a.gif")
    assert len(video) == 4 and video.rate == pytest.approx(10)


def test_frames_in_memory():
    array = np.zeros((5, 8, 10, 3), np.uint8)
    assert open_video(array).frames([0.0]).shape == (1, 3, 8, 10)
    assert open_video(torch.rand(5, 3, 8, 10)).frames([0.0]).dtype == torch.uint8
    for wrong in (np.zeros((5, 8, 10)), np.full((5, 8, 10, 3), 2.0), np.full((5, 8, 10, 3), 300)):
        with pytest.raises(PaperZooError, match="video"):
            open_video(wrong)
    with pytest.raises(PaperZooError, match="not int"):
        open_video(3)


@pytest.mark.parametrize(
    "arrays",
    [{"pixels": np.zeros(3)}, {"frames": np.zeros((2, 4, 4))}, {"frames": np.zeros((2, 4, 4, 3)), "rate": 0.0}],
)
def test_a_wrong_npz_is_named(arrays, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=r"a\.npz"):
        open_video(tmp_path / "a.npz")


# -- folders and lists ---------------------------------------------------------------------------------------------------


def test_class_folders_hold_out_one_in_five(tmp_path):
    for label in ("jump", "run"):
        for k in range(10):
            small(tmp_path / label / f"{k}.npz")
    (tmp_path / "run" / "._0.npz").write_bytes(b"")
    train, test = open_videos(tmp_path, "train"), open_videos(tmp_path, "test")
    assert train.labels == test.labels == ["jump", "run"] and len(train) == 16 and len(test) == 4
    assert not set(train.paths) & set(test.paths)
    video, target = test[0]
    assert len(video) == 4 and target == 0


def test_folders_with_a_split_of_their_own(tmp_path):
    for split, label in (("train", "a"), ("train", "b"), ("val", "b")):
        small(tmp_path / split / label / "x.npz")
    assert len(open_videos(tmp_path, "train")) == 2
    assert open_videos(tmp_path, "test").targets == [1]
    small(tmp_path / "val" / "c" / "x.npz")
    with pytest.raises(DataError, match="does not occur"):
        open_videos(tmp_path, "test")


def test_folders_of_pictures_in_class_folders(tmp_path):
    from PIL import Image

    for name in ("one", "two"):
        (tmp_path / "train" / "wave" / name).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "train" / "wave" / name / f"{k}.jpg")
    (tmp_path / "test" / "wave").mkdir(parents=True)
    assert len(open_videos(tmp_path, "train")) == 2
    with pytest.raises(DataError, match="no videos"):
        open_videos(tmp_path, "test")


def test_ucf101_lists(tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n")
    (lists / "trainlist01.txt").write_text("ApplyEyeMakeup/a.avi 1\nArchery/b.avi 2\n")
    (lists / "testlist01.txt").write_text("Archery/c.avi\n")
    for name in ("ApplyEyeMakeup/a.avi", "Archery/b.avi", "Archery/c.avi"):
        small(tmp_path / "UCF-101" / name)
    train, test = (open_videos(lists / "trainlist01.txt", split) for split in ("train", "test"))
    assert train.labels == ["ApplyEyeMakeup", "Archery"] and train.targets == [0, 1] and test.targets == [1]
    assert len(train[0][0]) == 4 and len(test[0][0]) == 4


@pytest.mark.parametrize("separator", [" ", ",", "\t"])
def test_lists_of_paths_and_labels(separator, tmp_path):
    for name, rows in (("train.csv", [("a b.npz", 10), ("c.npz", 2)]), ("val.csv", [("d.npz", 2)])):
        (tmp_path / name).write_text("".join(f"{file}{separator}{label}\n" for file, label in rows))
    for file in ("a b.npz", "c.npz", "d.npz"):
        small(tmp_path / file)
    train, test = (open_videos(tmp_path / "train.csv", split) for split in ("train", "test"))
    assert train.labels == ["2", "10"] and train.targets == [1, 0] and test.targets == [0]
    assert [Path(p).name for p in train.paths] == ["a b.npz", "c.npz"] and len(train[0][0]) == 4


def test_tables_with_a_header(tmp_path):
    (tmp_path / "list.csv").write_text("path,label,split\na.npz,up,train\nb.npz,down,test\n")
    assert open_videos(tmp_path / "list.csv", "test").targets == [0]
    (tmp_path / "list.csv").write_text("path,label\na.npz,up\nb.npz,\n")
    with pytest.raises(DataError, match=r"list\.csv: line 3"):
        open_videos(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("video,what\na.npz,up\n")
    with pytest.raises(DataError, match="columns path and label"):
        open_videos(tmp_path / "list.csv")


def test_kinetics_annotations(tmp_path, caplog):
    head = "label,youtube_id,time_start,time_end,split,is_cc\n"
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "train.csv").write_text(
        head + "abseiling,aaaa,1,11,train,0\nzumba,bbbb,36,46,train,0\n"
    )
    (tmp_path / "annotations" / "val.csv").write_text(head + "zumba,cccc,0,10,val,0\nzumba,gone,0,10,val,0\n")
    small(tmp_path / "train" / "aaaa_000001_000011.mp4")
    small(tmp_path / "train" / "zumba" / "bbbb_000036_000046.mp4")
    small(tmp_path / "val" / "cccc_000000_000010.mp4")
    train, test = open_videos(tmp_path, "train"), open_videos(tmp_path, "test")
    assert train.labels == ["abseiling", "zumba"] and train.targets == [0, 1] and test.targets == [1]
    assert "1 of 2 videos are not there" in caplog.text
    assert open_videos(tmp_path / "annotations" / "train.csv", "test").paths == test.paths
    (tmp_path / "annotations" / "val.csv").write_text(head + "zumba,cccc,x,10,val,0\n")
    with pytest.raises(DataError, match=r"val\.csv: line 2"):
        open_videos(tmp_path, "test")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.avi 0\nb.avi\n", r"line 2 has no label"),
        ("a.avi\n", "line 1 has no label"),
        ("\n# nothing\n", "holds no videos"),
    ],
)
def test_wrong_lists_are_named(text, said, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=said):
        open_videos(tmp_path / "list.txt")


def test_places_that_do_not_exist(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_videos(tmp_path / "nothing" / "here")
    with pytest.raises(UnknownName, match="moving_digits"):
        open_videos("moving_digit")
    with pytest.raises(DataError, match="no class folders"):
        open_videos(tmp_path)


# -- moving digits -------------------------------------------------------------------------------------------------------


def test_moving_digits_are_balanced_and_fixed():
    clips = moving_digits.draw_clips(32)
    assert clips["labels"].bincount().tolist() == [4] * 8
    assert clips["ink"].shape == (32, moving_digits.FRAMES, moving_digits.SIZE, moving_digits.SIZE)
    moving_digits.draw_clips.cache_clear()
    assert all(torch.equal(v, clips[k]) for k, v in moving_digits.draw_clips(32).items())
    assert not torch.equal(clips["ink"], moving_digits.draw_clips(32, "test")["ink"])


def test_a_digits_class_is_how_its_ink_moves():
    clips = moving_digits.draw_clips(64)
    ink = clips["ink"].double() + 1e-6
    at = torch.arange(moving_digits.SIZE).double()
    x = (ink * at).sum((2, 3)) / ink.sum((2, 3))
    y = (ink * at[:, None]).sum((2, 3)) / ink.sum((2, 3))
    area, label = ink.sum((2, 3)), clips["labels"]
    assert (x[label == 0, -1] < x[label == 0, 0] - 2).all() and (x[label == 1, -1] > x[label == 1, 0] + 2).all()
    assert (y[label == 2, -1] < y[label == 2, 0] - 2).all() and (y[label == 3, -1] > y[label == 3, 0] + 2).all()
    assert (area[label == 6, -1] > 1.5 * area[label == 6, 0]).all()
    for k in (4, 5):
        assert ((x[label == k].std(1) < 1.5) & (y[label == k].std(1) < 1.5)).all()


# -- clips and views -----------------------------------------------------------------------------------------------------


def test_moments_of_a_video_that_is_too_short():
    video = ArrayVideo(ramp(4), 10.0)
    assert levels(video.frames(moments(video, 0.0, 6, 0.1, "hold"))) == [0, 1, 2, 3, 3, 3]
    assert levels(video.frames(moments(video, 0.0, 6, 0.1, "loop"))) == [0, 1, 2, 3, 0, 1]


def test_clips_are_spread_over_a_video():
    video = ArrayVideo(ramp(21), 10.0)
    assert starts(video, 3, 5, 0.1) == pytest.approx([0.0, 0.8, 1.6])
    assert starts(video, 1, 5, 0.1) == pytest.approx([0.8]) and starts(video, 2, 50, 0.1) == [0.0, 0.0]


def test_views_are_clips_times_crops():
    frames = ramp(10, 8, 16)
    frames[:, :, :, 8:] += 1  # the right half is a level brighter
    config = Config(frames=4, stride=2, image_size=8, test_clips=2, test_crops=3)
    got = views(ArrayVideo(frames, 10.0), config, FACTS)
    assert got.shape == (6, 3, 4, 8, 8)
    means = (got.mean((1, 3, 4)) * 255).round(decimals=1)
    assert means[0].tolist() == pytest.approx([0, 16, 32, 48]) and means[3].tolist() == pytest.approx([24, 40, 56, 72])
    assert (means[1] - means[0]).tolist() == pytest.approx([0.5] * 4) and (
        means[2] - means[0]
    ).tolist() == pytest.approx([1] * 4)


def test_a_stride_counts_at_the_rate_that_was_asked_for():
    config = Config(frames=3, stride=2, rate=5.0, image_size=8)
    got = views(ArrayVideo(ramp(30, 8, 8), 20.0), config, FACTS)  # 0.4 s apart: 8 of the video's frames
    assert ((got[0, 0].mean((1, 2)) * 255 / 8).round().diff() == 8).all()


def test_a_training_clip_is_changed_as_a_whole():
    frames = torch.randint(0, 255, (1, 3, 20, 24), dtype=torch.uint8).expand(12, 3, 20, 24)
    data = videos.Videos(["a"], [0])
    data.video = lambda i: ArrayVideo(frames)
    data.path = lambda i: "a"
    config = Config(frames=6, image_size=12, short_side=(14, 18), flip=True, randaugment=9)
    for seed in range(4):
        torch.manual_seed(seed)
        clip, label = Clips(data, config, FACTS)[0]
        assert clip.shape == (3, 6, 12, 12) and label == 0
        assert (clip == clip[:, :1]).all()


def test_pictures_smaller_than_the_crop_are_refused():
    with pytest.raises(DataError, match="smaller than 64"):
        views(ArrayVideo(ramp(4)), Config(image_size=64, frames=4), FACTS)


# -- the recipe ----------------------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """Bright clips are of the second class."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        level = x.mean((1, 2, 3, 4))
        return torch.stack([0.5 - level, level - 0.5], 1) * self.scale


class Bright(ActionRecognitionRecipe):
    def build(self) -> nn.Module:
        return Brightness()


@pytest.fixture
def bright(tmp_path) -> Bright:
    for split in ("train", "test"):
        for label, level in (("dark", 40), ("light", 210)):
            for k in range(3):
                folder = tmp_path / split / label
                folder.mkdir(parents=True, exist_ok=True)
                write_video(folder / f"{k}.npz", torch.full((8, 3, 16, 20), level, dtype=torch.uint8), 8.0)
    write_video(tmp_path / "test" / "dark" / "odd.npz", torch.full((8, 3, 16, 20), 250, dtype=torch.uint8), 8.0)
    config = Config(
        data=str(tmp_path), frames=4, image_size=12, test_clips=2, test_crops=3, mixup=0.2, steps=2, batch_size=4
    )
    facts = {"labels": ["dark", "light"], "mean": [0.0] * 3, "deviation": [1.0] * 3}
    return Bright(config, Runtime(), facts)


def test_evaluation_counts_videos_not_views(bright):
    metrics = bright.evaluate()
    assert metrics["accuracy"] == pytest.approx(6 / 7) and metrics["mean_class_accuracy"] == pytest.approx(
        (3 / 4 + 1) / 2
    )
    matrix, sums = bright.confusion()
    assert matrix.tolist() == [[3, 1], [0, 3]] and sums[2] == 7


def test_probabilities_are_averaged_over_views(bright):
    every = torch.stack([torch.full((3, 4, 12, 12), level) for level in (0.4, 0.9)])[None]
    expected = torch.stack([bright.model(v[None]).softmax(1)[0] for v in every[0]]).mean(0)
    with torch.inference_mode():
        assert torch.allclose(bright.probabilities(every)[0], expected, atol=1e-6)


def test_a_step_with_mixup(bright):
    out = bright.step(bright.batch())
    assert torch.isfinite(out["loss"]) and out["loss"].requires_grad


def test_predictions_and_their_pictures(bright, tmp_path):
    value = str(tmp_path / "test" / "light" / "0.npz")
    result = bright.predict([value])[0]
    assert (result.label, result.index, result.views) == ("light", 1, 6) and result.duration == pytest.approx(1)
    assert result.top(1) == [("light", result.probability)]
    picture = bright.draw(value, result)
    assert picture.width > 300 and picture.height > 96
    assert len(bright.samples(tmp_path)) == 6
    assert set(bright.figures()) == {"Confusion matrix", "Held-out videos"}


def test_other_classes_are_refused(bright):
    bright.facts["labels"] = ["dark", "dim"]
    with pytest.raises(DataError, match="not the 2 that were learned"):
        bright.evaluate()


def test_one_class_is_refused(tmp_path):
    for split in ("train", "test"):
        small(tmp_path / split / "a" / "0.npz")
    with pytest.raises(DataError, match="at least two"):
        ActionRecognitionRecipe(Config(data=str(tmp_path)), Runtime())


def test_wrong_sizes_are_refused():
    with pytest.raises(PaperZooError, match="short_side"):
        Bright(Config(image_size=32, short_side=(24, 40)), Runtime(), FACTS)


def test_a_broken_video_is_replaced_in_training_and_left_out_of_tests(tmp_path):
    for split in ("train", "test"):
        for k in range(120):
            folder = tmp_path / split / "a"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{k:03d}.mp4").write_bytes(b"")
    good = write_video(tmp_path / "good.npz", torch.zeros(4, 3, 12, 12, dtype=torch.uint8), 4.0)
    for split in ("train", "test"):
        for k in range(1, 120):
            (tmp_path / split / "a" / f"{k:03d}.mp4").unlink()
            (tmp_path / split / "a" / f"{k:03d}.npz").write_bytes(good.read_bytes())
    for split in ("train", "test"):
        (tmp_path / split / "b").mkdir()
        (tmp_path / split / "b" / "0.npz").write_bytes(good.read_bytes())
    facts = {"labels": ["a", "b"], "mean": [0.0] * 3, "deviation": [1.0] * 3}
    recipe = Bright(Config(data=str(tmp_path), frames=2, image_size=12, batch_size=121), Runtime(), facts)
    clips, _ = recipe.batch()
    assert len(clips) == 121 and len(recipe.runtime.broken) == 1
    recipe.runtime.broken.clear()
    assert recipe.confusion("test")[1][2] == 120


def test_statistics_are_of_the_middle_frames():
    data = videos.Videos(["a"], [0, 0])
    data.video = lambda i: ArrayVideo(torch.full((3, 3, 4, 4), 51 if i else 153, dtype=torch.uint8))
    mean, deviation = video_clips.statistics(data)
    assert mean == pytest.approx([0.4] * 3) and deviation == pytest.approx([0.2] * 3)


def test_spread():
    assert action_recognition.spread(3, 6) == [0, 1, 2] and action_recognition.spread(0, 6) == []
