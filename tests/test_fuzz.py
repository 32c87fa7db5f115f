"""Two hundred odd inputs: each gives an answer or a clean error, never a traceback."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from paperzoo.catalog.cards import find
from paperzoo.data.images import open_images, read_image, to_image
from paperzoo.engine.configure import configure, field_names
from paperzoo.engine.run import load
from paperzoo.engine.weights import from_pretrained, load_weights, save_weights
from paperzoo.errors import PaperZooError

FUZZ = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def answered(call) -> None:
    """An answer, or an error of ours in one line."""
    try:
        call()
    except PaperZooError as error:
        assert "\n" not in str(error) and str(error)


def sample(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = (np.arange(24 * 20 * 3) % 251).astype(np.uint8).reshape(24, 20, 3)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@FUZZ
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP"]),
    cut=st.integers(0, 400),
    at=st.integers(0, 2000),
    junk=st.binary(max_size=20),
)
def test_images(tmp_path_factory, kind, cut, at, junk):
    data = sample(kind)
    at %= len(data)
    data = data[:at] + junk + data[at + cut :]
    path = tmp_path_factory.mktemp("fuzz") / f"x.{kind.lower()}"
    path.write_bytes(data)
    answered(lambda: read_image(path))


@FUZZ
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from([np.uint8, np.int64, np.float32, np.float64, np.bool_]),
    fill=st.floats(),
)
def test_arrays(shape, dtype, fill):
    with np.errstate(all="ignore"):
        value = np.full(
            shape, np.nan_to_num(fill, posinf=9, neginf=-9) if dtype not in (np.float32, np.float64) else fill
        ).astype(dtype)
    answered(lambda: to_image(value))


@FUZZ
@given(
    text=st.one_of(
        st.text(max_size=200),
        st.lists(st.text(st.characters(codec="utf-8"), max_size=10), max_size=9)
        .map("\n".join)
        .map("path,label\n{}".format),
    ),
    encoding=st.sampled_from(["utf-8", "utf-16", "latin-1"]),
)
def test_tables(tmp_path_factory, text, encoding):
    path = tmp_path_factory.mktemp("fuzz") / "x.csv"
    path.write_bytes(text.encode(encoding, errors="replace"))

    def use() -> None:
        for image, label in [open_images(path, "train")[0]]:
            assert image.shape[0] == 3 and label >= 0

    answered(use)


@FUZZ
@given(data=st.data())
def test_configs(data):
    config = find("wide_resnet").module("recipe").PRESETS["embedded"]
    name = data.draw(st.one_of(st.sampled_from(field_names(config)), st.text(max_size=12)))
    value = data.draw(
        st.one_of(
            st.text(max_size=12),
            st.integers(),
            st.floats(),
            st.booleans(),
            st.none(),
            st.lists(st.floats(), max_size=3),
        )
    )
    answered(lambda: configure(config, {name: value}))


@FUZZ
@given(
    at=st.integers(0, 4000),
    junk=st.binary(max_size=40),
    cut=st.integers(0, 4000),
    kind=st.sampled_from(["safetensors", "pt"]),
)
def test_checkpoints(tmp_path_factory, at, junk, cut, kind):
    model, folder = nn.Linear(8, 8), tmp_path_factory.mktemp("fuzz")
    path = folder / f"w.{kind}"
    save_weights(path, model) if kind == "safetensors" else torch.save(model.state_dict(), path)
    data = path.read_bytes()
    at %= len(data)
    path.write_bytes(data[:at] + junk + data[at + cut :])
    answered(lambda: load_weights(nn.Linear(8, 8), path))


@FUZZ
@given(
    config=st.one_of(
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=8),
            lambda x: (
                st.lists(x, max_size=3)
                | st.dictionaries(st.sampled_from(["model", "arguments", "facts", "paper"]), x, max_size=3)
            ),
            max_leaves=6,
        ).map(json.dumps),
        st.text(max_size=50),
    )
)
def test_pretrained_folders(tmp_path_factory, config):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_text(config, encoding="utf-8", errors="replace")
    (folder / "config.toml").write_text(config, encoding="utf-8", errors="replace")
    answered(lambda: from_pretrained(folder))
    answered(lambda: load(folder))


@pytest.mark.parametrize(
    "changes",
    [{}, {"paper": 3}, {"config": 7}, {"settings": {"seed": -1}}, {"preset": ["x"]}, {"config": {"stepps": 3}}],
)
def test_run_configurations(tmp_path, changes):
    import tomli_w

    data = {"paper": "wide_resnet", "preset": "embedded", "config": {}, "settings": {}} | changes
    (tmp_path / "config.toml").write_text(tomli_w.dumps(data))
    with pytest.raises(PaperZooError):
        load(tmp_path)
