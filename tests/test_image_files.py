"""A user's own pictures, in every layout and kind of file that classification promises to read, through to a trained step."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.catalog.cards import find
from paperzoo.data.images import open_images, read_image, to_image
from paperzoo.data.multi_label import open_multi_label
from paperzoo.engine.loop import Settings, one_step
from paperzoo.engine.run import build
from paperzoo.errors import DataError
from paperzoo.tasks.classification import ClassificationRecipe, Config

RED, LIME, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def noise(side: int = 48) -> Image.Image:
    """A picture that no format compresses to nothing."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(image: torch.Tensor, row: int = 0, column: int = 0) -> tuple[int, ...]:
    return tuple(image[:, row, column].tolist())


# -- kinds of files ------------------------------------------------------------------------------------------------------------


def test_a_cmyk_jpeg_has_its_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=95)
    assert np.abs(np.array(pixel(read_image(tmp_path / "x.jpg"))) - RED).max() <= 3


def test_a_grey_picture_has_three_equal_channels(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert torch.equal(image[0], torch.arange(64, dtype=torch.uint8).view(8, 8)) and (image == image[:1]).all()


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_become_the_upper_eight(tmp_path, ending):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"x.{ending}")
    difference = read_image(tmp_path / f"x.{ending}")[0].long() - torch.from_numpy((ramp // 257).astype(np.int64))
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation):
    """A camera held in some way stores the pixels turned; all eight ways show the same picture."""
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0], upright[0, 5], upright[3, 0] = RED, LIME, BLUE
    turned = upright.transpose(1, 0, 2)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)
    image = read_image(tmp_path / "x.png")
    assert image.shape == (3, 4, 6)
    assert (pixel(image), pixel(image, 0, 5), pixel(image, 3, 0)) == (RED, LIME, BLUE)


def test_a_palette_with_transparency_has_its_colours(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.putpixel((7, 7), (0, 255, 0, 128))
    image.quantize(4).save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").mode == "P"
    assert (pixel(read_image(tmp_path / "x.png")), pixel(read_image(tmp_path / "x.png"), 7, 7)) == (RED, LIME)


@pytest.mark.parametrize(("ending", "options"), [("gif", {}), ("webp", {"lossless": True}), ("tif", {})])
def test_of_many_frames_the_first_is_read(tmp_path, ending, options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, LIME, BLUE)]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], **options)
    image = read_image(tmp_path / f"x.{ending}")
    assert image.shape == (3, 8, 8) and pixel(image) == RED


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_file_that_was_cut_short_is_named(tmp_path, kind, part):
    content = encoded(noise(), kind)
    (tmp_path / "x.png").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DataError, match=r"x\.png: not a readable image"):
        read_image(tmp_path / "x.png")


def test_a_progressive_jpeg_that_was_cut_short_is_named(tmp_path):
    content = encoded(noise(), "JPEG", progressive=True)
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="truncated"):
        read_image(tmp_path / "x.jpg")


def test_the_ending_need_not_be_the_kind(tmp_path):
    noise().save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert torch.equal(read_image(tmp_path / "x.jpg"), to_image(noise()))


def test_missing_files_and_folders_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "x.png")
    with pytest.raises(DataError, match="folder"):
        read_image(tmp_path)


# -- layouts -------------------------------------------------------------------------------------------------------------------


def folder_of(root, count: int = 10, kinds: tuple[str, ...] = ("png",)):
    """Class folders cat and dog with pictures of different sizes."""
    for label, colour in (("cat", RED), ("dog", BLUE)):
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (8 + i, 6), colour).save(root / label / f"{i}.{kinds[i % len(kinds)]}")
    return root


def test_endings_in_capitals_and_folders_below_are_found(tmp_path):
    (tmp_path / "cat" / "2024" / "june").mkdir(parents=True)
    (tmp_path / "dog").mkdir()
    for path in ("cat/2024/june/a.JPG", "cat/b.Jpeg", "dog/c.PNG"):
        kind = "PNG" if path.endswith("PNG") else "JPEG"
        (tmp_path / path).write_bytes(encoded(noise(8), kind))
    (tmp_path / "dog" / "notes.txt").write_text("no picture")
    paths = open_images(tmp_path, "train").paths + open_images(tmp_path, "test").paths
    assert sorted(path.rpartition("/")[2] for path in paths) == ["a.JPG", "b.Jpeg", "c.PNG"]


def test_a_hold_out_does_not_depend_on_the_place(tmp_path):
    here, there = folder_of(tmp_path / "here"), folder_of(tmp_path / "elsewhere" / "deep")
    ours, theirs = ([p.split("/")[-2:] for p in open_images(root, "test").paths] for root in (here, there))
    assert ours == theirs


def test_a_spreadsheets_csv_is_read(tmp_path):
    """With a byte order mark, Windows line ends, quoted names, capitals in the header, and columns nobody asked for."""
    folder_of(tmp_path, 1)
    (tmp_path / "a, b.png").write_bytes(encoded(noise(8)))
    text = '\ufeffLabel,Path,Remark\r\ncat,"a, b.png",x\r\ndog,dog/0.png,y\r\n' + "cat,cat/0.png,\r\n" * 4
    (tmp_path / "list.csv").write_bytes(text.encode("utf-8"))
    data = [open_images(tmp_path / "list.csv", split) for split in ("train", "test")]
    assert data[0].labels == ["cat", "dog"] and sum(map(len, data)) == 6
    assert {path.removeprefix(f"{tmp_path}/") for d in data for path in d.paths} == {
        "a, b.png",
        "dog/0.png",
        "cat/0.png",
    }


def test_absolute_paths_in_a_table(tmp_path):
    folder_of(tmp_path / "elsewhere", 1)
    (tmp_path / "lists").mkdir()
    lines = [f"{tmp_path}/elsewhere/{label}/0.png,{label},train" for label in ("cat", "dog")]
    (tmp_path / "lists" / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    data = open_images(tmp_path / "lists" / "list.csv", "train")
    assert [pixel(image) for image, _ in (data[0], data[1])] == [RED, BLUE]


def test_a_tables_missing_picture_is_named_when_it_is_read(tmp_path):
    (tmp_path / "list.csv").write_text("path,label,split\ngone.png,cat,train\n")
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        open_images(tmp_path / "list.csv", "train")[0]


def test_a_table_in_another_encoding_or_with_other_separators_is_refused(tmp_path):
    (tmp_path / "latin.csv").write_bytes("path,label\na.png,caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match="latin.csv: not a readable CSV"):
        open_images(tmp_path / "latin.csv")
    (tmp_path / "semicolons.csv").write_text("path;label\na.png;cat\n")
    with pytest.raises(DataError, match="path;label"):
        open_images(tmp_path / "semicolons.csv")


def test_a_row_that_ends_early_is_named(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\na.png,cat\nb.png\n")
    with pytest.raises(DataError, match="line 3"):
        open_images(tmp_path / "list.csv")


def test_a_parquet_tables_numbers_are_labels(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    noise(8).save(tmp_path / "a.png")
    table = pyarrow.table({"image": ["a.png"] * 12, "class": [9, 10, 100] * 4})
    parquet.write_table(table, tmp_path / "list.parquet")
    train, test = (open_images(tmp_path / "list.parquet", split) for split in ("train", "test"))
    assert train.labels == ["9", "10", "100"] and len(train) + len(test) == 12
    assert train[0][0].shape == (3, 8, 8)


def test_a_broken_parquet_table_and_an_empty_cell_are_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="broken.parquet"):
        open_images(tmp_path / "broken.parquet")
    parquet.write_table(pyarrow.table({"path": ["a.png", None], "label": ["x", "y"]}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match="line 3 has no path"):
        open_images(tmp_path / "list.parquet")


def shard(path, samples: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_shards_with_folders_long_endings_and_three_kinds_of_answers(tmp_path):
    """A sample's name ends at its first dot; its class is in a .cls, a .txt or the "label" of a .json."""
    samples = {
        "train/0.input.png": encoded(Image.new("RGB", (8, 8), RED)), "train/0.cls": b"cat\n",
        "train/1.JPG": encoded(Image.new("RGB", (8, 8), BLUE), "JPEG"), "train/1.txt": b"dog",
        "other/0.webp": encoded(Image.new("RGB", (8, 8), LIME), "WEBP", lossless=True),
        "other/0.json": json.dumps({"label": "bird", "width": 8}).encode(),
    }  # fmt: skip
    shard(tmp_path / "train" / "a.tar", samples)
    shard(tmp_path / "val" / "a.tar", {"9.png": encoded(noise(8)), "9.cls": b"dog"})
    train, test = open_images(tmp_path, "train"), open_images(tmp_path, "test")
    assert train.labels == test.labels == ["bird", "cat", "dog"]
    assert [train.labels[k] for k in train.targets] == ["cat", "dog", "bird"] and test.targets == [2]
    assert pixel(train[0][0]) == RED and pixel(train[2][0]) == LIME


def test_a_shards_broken_picture_is_named_by_sample(tmp_path):
    content = encoded(noise(), "JPEG")
    shard(tmp_path / "a.tar", {"7.jpg": content[: len(content) // 2], "7.cls": b"cat"})
    with pytest.raises(DataError, match=r"a\.tar:7: not a readable image"):
        data = [
            open_images(tmp_path / "a.tar", split) for split in ("train", "test") if has_rows(tmp_path / "a.tar", split)
        ]
        data[0][0]


def has_rows(path, split: str) -> bool:
    try:
        return len(open_images(path, split)) > 0
    except DataError:
        return False


def test_a_shard_that_is_not_there_is_named(tmp_path):
    shard(tmp_path / "a-0000.tar", {"7.png": encoded(noise(8)), "7.cls": b"cat"})
    with pytest.raises(DataError, match=r"a-0001\.tar"):
        open_images(f"{tmp_path}/a-{{0000..0001}}.tar")


# -- through to learning -------------------------------------------------------------------------------------------------------


def recipe(data, **changes) -> ClassificationRecipe:
    config = Config(model="resnet20_cifar", data=str(data), image_size=16, steps=4, batch_size=8, learning_rate=0.01)
    settings = Settings(device="cpu")
    return build(find("resnet"), dataclasses.replace(config, **changes), settings, recipe_class=ClassificationRecipe)


def mixed(root):
    """Class folders of grey, CMYK, 16-bit, turned, palette, animated and ordinary pictures of all sizes."""
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        Image.new("L", (30, 9), 80).save(root / label / "grey.png")
        Image.new("CMYK", (9, 30), (0, 255, 255, 0)).save(root / label / "cmyk.jpg")
        Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(root / label / "deep.png")
        exif = Image.Exif()
        exif[274] = 6
        noise(24).crop((0, 0, 24, 10)).save(root / label / "turned.jpg", exif=exif)
        Image.new("RGBA", (12, 12), (9, 9, 9, 0)).quantize(4).save(root / label / "palette.png")
        frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, LIME)]
        frames[0].save(root / label / "animated.gif", save_all=True, append_images=frames[1:])
        for i in range(10):
            noise(9 + i).save(root / label / f"{i}.webp")
    return root


@pytest.mark.parametrize("augment", ["none", "flip_shift", "crop_flip"])
def test_pictures_of_all_kinds_are_learned_from_together(tmp_path, augment):
    made = recipe(mixed(tmp_path / "data"), augment=augment)
    assert made.facts["labels"] == ["cat", "dog"]
    for _ in range(2):
        assert torch.isfinite(one_step(made, tmp_path)["loss"])
    assert 0 <= made.evaluate("test")["accuracy"] <= 1
    assert not made.runtime.broken


def test_one_broken_picture_is_reported_and_replaced(tmp_path):
    root = folder_of(tmp_path / "data", 10)
    train = open_images(root, "train")
    with open(train.paths[3], "wb") as file:
        file.write(encoded(noise())[:100])
    made = recipe(root, augment="none")
    for _ in range(4):
        assert torch.isfinite(one_step(made, tmp_path)["loss"])
    assert list(made.runtime.broken) == [train.paths[3]]


def test_many_broken_pictures_stop_a_run(tmp_path):
    root = folder_of(tmp_path / "data", 10)
    for path in open_images(root, "train").paths[:8]:
        with open(path, "wb") as file:
            file.write(b"no picture")
    with pytest.raises(DataError):
        made = recipe(root, augment="none")
        for _ in range(4):
            one_step(made, tmp_path)


def test_predictions_take_what_a_user_has(tmp_path):
    made = recipe(folder_of(tmp_path / "data", 10))
    Image.new("L", (50, 20)).save(tmp_path / "grey.png")
    inputs = [
        str(tmp_path / "grey.png"),
        tmp_path / "grey.png",
        noise(5),
        np.zeros((7, 9, 4), np.uint8),
        torch.rand(3, 40, 2),
    ]
    results = made.predict(inputs)
    assert [r.label in ("cat", "dog") for r in results] == [True] * 5
    assert results[0] == results[1]


def test_classes_that_were_not_learned_are_refused(tmp_path):
    made = recipe(folder_of(tmp_path / "data", 10))
    (tmp_path / "data" / "bird").mkdir()
    noise(8).save(tmp_path / "data" / "bird" / "0.png")
    with pytest.raises(DataError, match="not the 2 that were learned"):
        made.evaluate("test")


def test_several_labels_from_a_parquet_table(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    Image.new("CMYK", (9, 9)).save(tmp_path / "a.jpg")
    table = pyarrow.table(
        {"file": ["a.jpg"] * 3, "tags": ["cat, dog", None, "dog"], "split": ["train", "train", "test"]}
    )
    parquet.write_table(table, tmp_path / "list.parquet")
    train = open_multi_label(tmp_path / "list.parquet", "train")
    assert train.labels == ["cat", "dog"] and train.targets.tolist() == [[1, 1], [0, 0]]
    assert train[0][0].shape == (3, 9, 9)


# -- traps ---------------------------------------------------------------------------------------------------------------------


def test_a_dark_picture_of_sixteen_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "x.png")  # 200 of 65,535
    assert int(read_image(tmp_path / "x.png").max()) == 0


def test_floating_point_pictures_in_either_range(tmp_path):
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / "one.tif")
    Image.fromarray(ramp * 255).save(tmp_path / "many.tif")
    one, many = read_image(tmp_path / "one.tif"), read_image(tmp_path / "many.tif")
    assert int(one.max()) == 255 and (one.int() - many.int()).abs().max() <= 1


def test_what_macos_leaves_behind_is_no_class_and_no_picture(tmp_path):
    folder_of(tmp_path, 5)
    (tmp_path / "cat" / "._0.png").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    data = [open_images(tmp_path, split) for split in ("train", "test")]
    assert data[0].labels == ["cat", "dog"] and sum(map(len, data)) == 10


def test_a_train_folder_alone_is_split(tmp_path):
    folder_of(tmp_path / "train", 10)
    train, test = open_images(tmp_path, "train"), open_images(tmp_path, "test")
    assert train.labels == ["cat", "dog"] and (len(train), len(test)) == (16, 4)


def test_a_class_that_is_only_held_out_is_named(tmp_path):
    folder_of(tmp_path / "train", 2)
    folder_of(tmp_path / "val", 2)
    (tmp_path / "val" / "bird").mkdir()
    with pytest.raises(DataError, match="bird: this class does not occur"):
        open_images(tmp_path, "test")


def test_a_blank_label_is_none(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\na.png,  \nb.png,cat\n")
    with pytest.raises(DataError, match="line 2 has no path or no label"):
        open_images(tmp_path / "list.csv")


def test_a_tables_validation_rows_are_not_tested_on(tmp_path):
    (tmp_path / "list.csv").write_text("path,label,split\na.png,cat,Train\nb.png,dog,val\nc.png,dog,test\n")
    assert open_images(tmp_path / "list.csv", "test").paths == [str(tmp_path / "c.png")]


@pytest.mark.parametrize("part", ["", "trian"])
def test_a_row_of_no_split_is_named(tmp_path, part):
    (tmp_path / "list.csv").write_text(f"path,label,split\na.png,cat,train\nb.png,dog,{part}\nc.png,dog,test\n")
    with pytest.raises(DataError, match="line 3: its split is"):
        open_images(tmp_path / "list.csv")
