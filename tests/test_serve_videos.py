"""Videos as inputs of served models: what is taken, what is refused and why; without processes."""

from __future__ import annotations

import base64
import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("python_multipart")
av = pytest.importorskip("av")

from paperzoo.data.videos import Video, open_video, write_video  # noqa: E402
from paperzoo.engine.runtime import Runtime  # noqa: E402
from paperzoo.serve import answers, protocol, video_inputs  # noqa: E402
from paperzoo.serve.endpoints import read_typed  # noqa: E402
from paperzoo.serve.kinds import kind_for  # noqa: E402
from paperzoo.serve.limits import Limits, Refused  # noqa: E402
from paperzoo.serve.pictures import Pixels  # noqa: E402
from paperzoo.serve.video_inputs import SentVideo, ShortVideo  # noqa: E402


def frames(count: int = 5, height: int = 32, width: int = 48) -> torch.Tensor:
    """Frames whose grey rises: uint8 (T, 3, H, W)."""
    grey = torch.linspace(40, 200, count).round().to(torch.uint8)
    return grey[:, None, None, None].expand(-1, 3, height, width).contiguous()


def film(tmp_path, ending: str = ".mp4", **sizes: int) -> bytes:
    return write_video(tmp_path / f"film{ending}", frames(**sizes), 10.0).read_bytes()


def kind(**limits: Any) -> ShortVideo:
    example = (torch.zeros(2, 3, 4, 33, 40),)
    return ShortVideo(SimpleNamespace(example=lambda: example), Limits(**limits))


def ask(content: bytes, content_type: str = "application/json", **limits: Any) -> list[Any]:
    return read_typed("m", kind(**limits), {"query": {}, "type": content_type}, content).values


def refused(content: bytes, content_type: str = "video/mp4", **limits: Any) -> Refused:
    with pytest.raises(Refused) as error:
        ask(content, content_type, **limits)
    assert "\n" not in str(error.value)
    return error.value


def as_json(content: bytes) -> bytes:
    return json.dumps({"input": {"base64": base64.b64encode(content).decode()}}).encode()


# -- what is taken -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".avi", ".mov"])
def test_a_file_is_decoded_from_memory(tmp_path, ending):
    video = open_video(ask(film(tmp_path, ending), "video/mp4")[0])
    assert isinstance(video, Video) and len(video) == 5 and video.rate == pytest.approx(10, rel=0.05)
    found = video.frames(video.times.tolist())
    assert found.shape == (5, 3, 32, 48) and (found.float() - frames().float()).abs().mean() < 4


def test_an_animated_picture_is_a_video():
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (48, 32), (40 * t, 0, 0)) for t in range(4)]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    assert len(ask(buffer.getvalue(), "image/gif")[0]) == 4


def test_files_come_as_json_forms_and_tensors(tmp_path):
    content = film(tmp_path)
    assert len(ask(as_json(content))[0]) == 5
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n' + content + b"\r\n"
    assert [len(v) for v in ask(part * 2 + b"--x--\r\n", 'multipart/form-data; boundary="x"')] == [5, 5]
    column = np.empty(1, object)
    column[0] = content
    assert len(kind().from_tensors({"video": column}, Pixels(10**6))[0]) == 5
    pixels = np.zeros((2, 3, 16, 20, 3), np.uint8)
    assert [v.shape for v in kind().from_tensors({"video": pixels}, Pixels(10**6))] == [(3, 16, 20, 3)] * 2


def test_the_example_is_taken_and_as_large_as_the_network_wants():
    made = kind()
    video = made.warm_up()
    assert isinstance(video, SentVideo) and video.frames([0.0]).shape == (1, 3, 34, 40)
    assert len(ask(json.dumps({"inputs": [made.example()] * 2}).encode())) == 2


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "it is none of MP4"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "it is none of MP4"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "it is none of MP4"),
        (b"\x00\x00\x00\x18ftypisom" + bytes(200), "not a readable video"),
        (b"\x1aE\xdf\xa3" + bytes(99), "not a readable video"),
        (b"RIFF\xff\xff\xff\xffAVI " + b"\x07" * 99, "not a readable video"),
        (b"GIF89a" + bytes(4), "not a readable video"),
    ],
)
def test_what_is_no_video_is_refused_in_a_line(content, said):
    error = refused(content)
    assert said in str(error) and error.status == 422


def test_a_file_that_breaks_off_is_refused_or_shorter(tmp_path):
    assert "not a readable video" in str(refused(film(tmp_path, ".mp4")[:-200]))  # its index was at the end
    whole = film(tmp_path, ".mkv", count=40, height=64, width=64)
    assert 0 < len(ask(whole[: len(whole) * 3 // 4], "video/mp4")[0]) < 40


def test_frames_that_cannot_be_decoded_are_refused(tmp_path):
    content = bytearray(film(tmp_path, ".mkv"))
    at = content.index(b"\x1f\x43\xb6\x75")  # the cluster: packets
    content[at + 40 :] = b"\xff" * (len(content) - at - 40)
    assert refused(bytes(content)).status == 422


def test_too_many_frames_seconds_or_pixels(tmp_path, monkeypatch):
    content = film(tmp_path)
    monkeypatch.setattr(video_inputs, "MOST_FRAMES", 4)
    assert ("the video has 5 frames; at most 4", 413) == (str(refused(content)), refused(content).status)
    monkeypatch.setattr(video_inputs, "MOST_FRAMES", 5)
    monkeypatch.setattr(video_inputs, "MOST_SECONDS", 0.3)
    assert refused(content).status == 413 and "takes" in str(refused(content))
    monkeypatch.setattr(video_inputs, "MOST_SECONDS", 9)
    enough = 5 * 32 * 48 // video_inputs.FOLD
    assert len(ask(content, "video/mp4", pixels=enough)) == 1
    assert "5 frames of 48 x 32 is too large" in str(refused(content, pixels=enough - 1))
    monkeypatch.setattr(video_inputs, "FRAME_PIXELS", 32 * 48 - 1)
    assert "frames of 48 x 32 pixels are too large" in str(refused(content))


def test_frames_larger_than_the_file_says_are_not_decoded(tmp_path, monkeypatch):
    """The limit holds for the decoder, whatever the container's header claims."""
    monkeypatch.setattr(video_inputs, "FRAME_PIXELS", 32 * 48 - 1)
    monkeypatch.setattr(SentVideo, "check", lambda self, pixels: None)
    assert "no frame can be decoded" in str(refused(film(tmp_path)))


def test_codecs_are_known_ones(tmp_path):
    with av.open(str(tmp_path / "film.avi"), "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
    assert "are coded as rawvideo" in str(refused((tmp_path / "film.avi").read_bytes()))


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    assert "only sound" in str(refused((tmp_path / "sound.mp4").read_bytes()))


@pytest.mark.parametrize("item", ["a.mp4", {"base64": "/etc/passwd!"}, {"base64": 3}, {"path": "a.mp4"}, None, []])
def test_paths_are_not_opened(item):
    assert refused(json.dumps({"input": item}).encode(), "application/json").status == 422


@pytest.mark.parametrize(
    "tensor",
    [np.zeros((2, 3, 4, 5), np.uint8), np.zeros((1, 3, 4, 5, 4), np.uint8), np.zeros((1, 3, 4, 5, 3), np.float32)],
)
def test_tensors_of_other_shapes_are_refused(tensor):
    with pytest.raises(Refused, match=r"it is UINT8 \[N, T, H, W, 3\]"):
        kind().from_tensors({"video": tensor}, Pixels(10**6))


# -- what answers ------------------------------------------------------------------------------------------------------


def test_detectors_and_recognisers_answer_a_sent_video():
    from paperzoo.catalog.cards import find
    from paperzoo.tasks import action_recognition

    facts = {"labels": ["a", "b"], "mean": [0.5] * 3, "deviation": [0.25] * 3}
    detector, runtime = find("fgfa").module("recipe"), Runtime(device="cpu")
    config = action_recognition.Config(model="c3d_slim", image_size=24)
    for recipe in (
        detector.RECIPE(detector.PRESETS["embedded"], runtime, facts),
        action_recognition.ActionRecognitionRecipe(config, runtime, facts),
    ):
        made = kind_for(recipe, Limits())
        assert type(made) is ShortVideo
        known = made.warm_up()
        found = recipe.predict([known, np.zeros((3, 64, 64, 3), np.uint8)])
        assert len(found) == 2 and answers.write_json(answers.to_json(found[0]))
        assert recipe.draw(known, found[0]).width > 100
        described = protocol.metadata("m", made, found[0])
        assert described["inputs"][0]["name"] == "video" and described["outputs"]
