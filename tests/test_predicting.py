"""Predicting on folders, videos and streams: in small batches, a broken file at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paperzoo import terminal
from paperzoo.data.images import to_image
from paperzoo.engine.predicting import BATCH, predict_all
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.streams import VideoWriter, camera, sources
from paperzoo.errors import DataError, PaperZooError


@dataclass(frozen=True)
class Brightness:
    mean: float


class Meter(Recipe):
    """Predicts how bright a picture is; remembers how many came at a time."""

    reads_images = True

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict(self, inputs: list) -> list[Brightness]:
        results = [Brightness(float(to_image(value).float().mean())) for value in inputs]
        self.batches.append(len(inputs))
        return results

    def draw(self, value, result):
        return Image.fromarray(to_image(value).permute(1, 2, 0).numpy())


class Words(Recipe):
    def __init__(self) -> None: ...

    def predict(self, inputs: list) -> list[int]:
        return [len(text) for text in inputs]


def picture(path: Path, grey: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), (grey,) * 3).save(path)
    return path


@pytest.fixture
def film(tmp_path) -> Path:
    writer = VideoWriter(tmp_path / "film.mp4", 10.0)
    for grey in range(0, 250, 10):
        writer.add(Image.new("RGB", (64, 48), (grey,) * 3))
    writer.close()
    return tmp_path / "film.mp4"


def test_a_folder_is_read_in_order_and_in_batches(tmp_path):
    for i in range(BATCH + 3):
        picture(tmp_path / "in" / f"{i:03d}.png", i)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    recipe = Meter()
    found = list(predict_all(recipe, [str(tmp_path / "in")]))
    assert [p.result.mean for p in found] == list(range(BATCH + 3))
    assert recipe.batches == [BATCH, 3]


def test_named_pictures_share_a_batch(tmp_path):
    recipe = Meter()
    list(predict_all(recipe, [str(picture(tmp_path / f"{i}.png", i)) for i in range(3)]))
    assert recipe.batches == [3]


def test_a_broken_file_in_a_folder_stops_nothing(tmp_path):
    picture(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_bytes(b"no picture")
    picture(tmp_path / "c.png", 3)
    found = list(predict_all(Meter(), [str(tmp_path)]))
    assert [p.error is None for p in found] == [True, False, True]
    assert "b.png: not a readable image" in found[1].error and found[2].result.mean == 3


def test_a_broken_file_that_was_named_is_an_error(tmp_path):
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="not a readable image"):
        list(predict_all(Meter(), [str(tmp_path / "b.png")]))


def test_a_folder_without_pictures_says_what_is_read(tmp_path):
    with pytest.raises(DataError, match=r"no pictures here; files ending in \.bmp"):
        list(predict_all(Meter(), [str(tmp_path)]))


def test_a_video_becomes_a_video(film, tmp_path):
    found = list(predict_all(Meter(), [str(film)], draw=tmp_path / "out"))
    assert len(found) == 25 and found[0].picture == str(tmp_path / "out" / "film.mp4")
    assert found[1].name.endswith("film.mp4#1 (0.10 s)")
    means = [p.result.mean for p in found]
    assert means == sorted(means) and means[-1] - means[0] > 200
    again = next(sources([found[0].picture]))
    assert again.count == 25 and len(list(again.items)) == 25
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["film.mp4"]


def test_as_many_frames_as_asked_for(film):
    assert len(list(predict_all(Meter(), [str(film)], frames=4))) == 4


def test_a_video_in_a_folder_is_read_too(film, tmp_path):
    picture(tmp_path / "a.png", 7)
    found = list(predict_all(Meter(), [str(tmp_path)], frames=2))
    assert [p.result.mean for p in found][0] == 7 and len(found) == 3


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_a_file_that_is_no_video_is_named(tmp_path, content):
    (tmp_path / "x.mp4").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.mp4"):
        list(predict_all(Meter(), [str(tmp_path / "x.mp4")]))


def test_a_missing_video_is_named(tmp_path):
    with pytest.raises(DataError, match=r"y\.mp4: no such file"):
        list(predict_all(Meter(), [str(tmp_path / "y.mp4")]))


def test_a_video_that_was_cut_short_gives_what_is_there_or_says_so(film, tmp_path):
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cut\.mp4"):
        list(predict_all(Meter(), [str(tmp_path / "cut.mp4")]))


def test_cameras_are_numbered():
    with pytest.raises(PaperZooError, match="cameras are camera:0"):
        camera("camera:front", None)


def test_a_camera_that_is_not_there_is_named():
    with pytest.raises(DataError, match="camera:97: this camera cannot be opened"):
        list(predict_all(Meter(), ["camera:97"]))


def test_words_that_look_like_a_folder_stay_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hello").mkdir()
    assert [p.result for p in predict_all(Words(), ["hello", "a.mp4"])] == [5, 5]


def test_json_is_one_list(tmp_path, capsys):
    picture(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert terminal.predictions(Meter(), [str(tmp_path)], None, None, True) == 1
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["result"] == {"mean": 1.0} and "not a readable image" in rows[1]["error"]


def test_lines_name_each_input(tmp_path, capsys):
    path = picture(tmp_path / "a.png", 2)
    assert terminal.predictions(Meter(), [str(path)], tmp_path / "out", None, False) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: mean 2") and (tmp_path / "out" / "000_a.png").is_file()


def test_frames_are_upright_rgb_arrays(film):
    _, frame = next(next(sources([str(film)])).items)
    assert frame.shape == (48, 64, 3) and frame.dtype == np.uint8
