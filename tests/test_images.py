"""Reading images: folders, tables, files of every mode, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.data.images import open_images, read_image, to_image
from paperzoo.errors import DataError, PaperZooError, UnknownName


def write(path, colour, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for label, colour in (("cat", "red"), ("dog", "blue")):
        for i in range(10):
            write(tmp_path / "data" / label / f"{i}.png", colour)
    return tmp_path / "data"


def test_digits_are_split_and_whole():
    train, test = open_images("digits", "train"), open_images("digits", "test")
    assert (len(train), len(test)) == (1438, 359)
    image, label = train[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and label in range(10)
    assert not {tuple(x.flatten().tolist()) for x in test.pixels} & {
        tuple(x.flatten().tolist()) for x in train.pixels[:200]
    }


def test_a_folder_of_classes_is_split_without_overlap(folder):
    train, test = open_images(folder, "train"), open_images(folder, "test")
    assert train.labels == test.labels == ["cat", "dog"]
    assert (len(train), len(test)) == (16, 4)
    assert not set(train.paths) & set(test.paths)
    assert train[0][0].shape == (3, 6, 8)


def test_train_and_val_folders_are_used(tmp_path):
    write(tmp_path / "train" / "a" / "1.png", "red")
    write(tmp_path / "train" / "b" / "1.png", "red")
    write(tmp_path / "val" / "b" / "2.jpg", "red")
    test = open_images(tmp_path, "test")
    assert test.labels == ["a", "b"] and test.targets == [1]


def test_a_table_of_paths_and_labels(folder):
    lines = ["path,label"] + [f"{label}/{i}.png,{label}" for label in ("dog", "cat") for i in range(10)]
    (folder / "list.csv").write_text("\n".join(lines))
    train, test = open_images(folder / "list.csv", "train"), open_images(folder / "list.csv", "test")
    assert train.labels == ["cat", "dog"] and len(train) + len(test) == 20 and len(test) == 4
    assert train[0][0].shape == (3, 6, 8)


def test_a_tables_own_split_and_numeric_labels(folder):
    (folder / "list.csv").write_text("file,class,split\ncat/1.png,10,train\ndog/1.png,9,train\ndog/2.png,9,test\n")
    assert open_images(folder / "list.csv", "train").labels == ["9", "10"]
    assert open_images(folder / "list.csv", "test").targets == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "columns path and label"),
        ("path,label\n", "no rows"),
        ("path,label\nx.png,\n", "line 2 has no path or no label"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_images(tmp_path / "list.csv")


def test_unknown_and_missing_places_are_named(tmp_path):
    with pytest.raises(UnknownName, match="did you mean digits"):
        open_images("digit")
    with pytest.raises(DataError, match="no such file or folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no class folders"):
        open_images(tmp_path)
    with pytest.raises(DataError, match="unpack its original files"):
        open_images("cifar10")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 5), 65535, np.uint16)).save(path)
        assert int(read_image(path).max()) == 255
    else:
        Image.new("RGB", (5, 4), "white").convert(mode).save(path)
    assert read_image(path).shape == (3, 4, 5)


def test_exif_turns_the_image(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (3, 8, 4)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_broken_files_are_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match="x.png: not a readable image"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((4, 5)),
        np.zeros((4, 5, 3), np.uint8),
        np.zeros((4, 5, 4), np.uint8),
        torch.zeros(3, 4, 5),
        np.full((4, 5), 7, np.int64),
    ],
)
def test_arrays_are_taken_as_users_have_them(value):
    assert to_image(value).shape == (3, 4, 5)


@pytest.mark.parametrize(
    "value",
    [np.zeros((2, 3, 4, 5)), np.full((4, 5), 3.0), np.full((4, 5), 300), np.full((4, 5), np.nan), 7, np.zeros((0, 4))],
)
def test_what_is_no_image_is_refused(value):
    with pytest.raises(PaperZooError):
        to_image(value)


def write_shards(folder, count=12):
    """Two tar files of coloured squares, with .cls files."""
    import io
    import tarfile

    for shard in range(2):
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / f"data-{shard:04d}.tar", "w") as archive:
            for i in range(count):
                colour = (i % 2) * 255
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (colour, 0, 0)).save(buffer, "PNG")
                for ending, content in (("png", buffer.getvalue()), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{shard}{i:03d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def test_shards_are_read_and_split(tmp_path):
    write_shards(tmp_path / "shards")
    train, test = (open_images(tmp_path / "shards", split) for split in ("train", "test"))
    assert train.labels == ["0", "1"] and len(train) + len(test) == 24 and len(test) > 0
    assert not set(train.paths) & set(test.paths)
    for image, label in (train[i] for i in range(len(train))):
        assert int(image[0, 0, 0]) == label * 255


def test_shards_by_range_and_subset(tmp_path):
    write_shards(tmp_path)
    data = open_images(f"{tmp_path}/data-{{0000..0001}}.tar", "train")
    assert [int(image[0, 0, 0]) // 255 for image, _ in (data.subset([1, 2])[i] for i in range(2))] == data.targets[1:3]


@pytest.mark.parametrize("damage", ["cut", "text", "unlabelled"])
def test_broken_shards_are_named(tmp_path, damage):
    write_shards(tmp_path)
    file = tmp_path / "data-0000.tar"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:700])
    elif damage == "text":
        file.write_text("this is no archive")
    else:
        import tarfile

        with tarfile.open(file, "w") as archive:
            Image.new("RGB", (4, 4)).save(tmp_path / "lonely.png")
            archive.add(tmp_path / "lonely.png", "lonely.png")
    with pytest.raises(DataError, match="data-0000.tar"):
        open_images(f"{tmp_path}/data-*.tar", "train")


def test_a_parquet_table_is_read_like_a_csv(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    table = pyarrow.table({"path": ["a.png"] * 10, "label": ["cat", "dog"] * 5, "split": ["train"] * 8 + ["test"] * 2})
    parquet.write_table(table, tmp_path / "list.parquet")
    assert len(open_images(tmp_path / "list.parquet", "train")) == 8
    assert open_images(tmp_path / "list.parquet", "test").labels == ["cat", "dog"]
