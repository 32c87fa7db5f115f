"""Click-through tables: reading, encoding, splitting, the cache, memory, errors."""

import gzip
import subprocess
import sys

import numpy as np
import pytest
import torch

from paperzoo.data.encoding import MISSING, UNKNOWN, Encoding
from paperzoo.data.tables import CRITEO, assign, mapping_rows, open_table, read_rows
from paperzoo.errors import DataError, PaperZooError, UnknownName

COLUMNS = {"dense": ("price",), "sparse": ("site", "hour")}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERZOO_CACHE", str(tmp_path / "cache"))


def text(rows: int = 500) -> str:
    lines = [f"{i % 3 % 2},{i % 50},{'abcdefg'[i % 7]},{i % 24}" for i in range(rows)]
    return "\n".join(["label,price,site,hour", *lines]) + "\n"


def write(path, content) -> str:
    path.write_text(content) if isinstance(content, str) else path.write_bytes(content)
    return str(path)


def everything(table) -> list:
    return [part.tolist() for part in table.rows(slice(None))]


def test_rows_are_encoded(tmp_path):
    table = open_table(write(tmp_path / "log.csv", text()), "train", **COLUMNS)
    dense, sparse, labels = table.rows(torch.tensor([0, 3]))
    assert dense.shape == (2, 1) and sparse.shape == (2, 2) and labels.shape == (2,)
    assert (dense.dtype, sparse.dtype, labels.dtype) == (torch.float32, torch.int64, torch.float32)
    assert table.encoding.field_sizes == (9, 26)
    assert float(dense[0, 0]) == 0.0  # log(price - min + 1) of the first row, whose price is the least


def test_splits_are_disjoint_and_whole(tmp_path):
    path = write(tmp_path / "log.csv", text(2000))
    sizes = {split: len(open_table(path, split, **COLUMNS)) for split in ("train", "validation", "test")}
    assert sum(sizes.values()) == 2000
    assert 1500 < sizes["train"] < 1700 and 140 < sizes["test"] < 260


def test_last_rows_can_be_held_out():
    held_out = assign(np.arange(700), 700, 1 / 7)
    assert not held_out[:600].any() and held_out[600:].all()
    assert 25 < (held_out == 1).sum() < 75  # halves, at random


def test_formats_agree(tmp_path):
    from pyarrow import csv, parquet

    plain = write(tmp_path / "a.csv", text())
    expected = everything(open_table(plain, "train", **COLUMNS))
    zipped = write(tmp_path / "b.csv.gz", gzip.compress(text().encode()))
    tabs = write(tmp_path / "c.tsv", text().replace(",", "\t"))
    parquet.write_table(csv.read_csv(plain), tmp_path / "d.parquet", row_group_size=64)
    for path in (zipped, tabs, str(tmp_path / "d.parquet")):
        assert everything(open_table(path, "train", **COLUMNS)) == expected


def test_blocks_do_not_matter(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", text(3000))
    expected = everything(open_table(path, "train", **COLUMNS))
    monkeypatch.setattr("paperzoo.data.tables.BLOCK_BYTES", 2000)
    monkeypatch.setenv("PAPERZOO_CACHE", str(tmp_path / "other"))
    assert everything(open_table(path, "train", **COLUMNS)) == expected


def test_folder_with_train_and_test(tmp_path):
    write(tmp_path / "test.csv", text(30))
    (tmp_path / "train").mkdir()
    write(tmp_path / "train" / "part0.csv", text(40))
    write(tmp_path / "train" / "part1.csv", text(50))
    assert len(open_table(tmp_path, "train", **COLUMNS)) == 90
    assert len(open_table(tmp_path, "test", **COLUMNS)) == 30


def test_criteo_layout(tmp_path):
    lines = [
        "\t".join([str(i % 2), *(str(i + j - 3) for j in range(13)), *(f"{i * j % 5:08x}" for j in range(26))])
        for i in range(200)
    ]
    lines[0] = "\t".join(["0"] + [""] * 39)
    table = open_table(write(tmp_path / "train.txt", "\n".join(lines) + "\n"), "train")
    assert table.encoding.dense == CRITEO[1:14] and table.encoding.sparse == CRITEO[14:]
    assert bool((table.rows([0])[1] == MISSING).all()) and not table.rows([0])[0].any()


def test_columns_are_told_apart(tmp_path):
    encoding = open_table(write(tmp_path / "a.csv", text())).encoding
    assert encoding.dense == ("price", "hour") and encoding.sparse == ("site",)
    encoding = open_table(write(tmp_path / "a.csv", text()), sparse=("hour", "site")).encoding
    assert encoding.dense == ("price",)


def test_rare_and_unknown_values(tmp_path):
    path = write(tmp_path / "a.csv", text() + "1,3,seldom,3\n" * 2)
    encoding = open_table(path, **COLUMNS, min_count=5).encoding
    rows = [{"price": 1, "site": "a", "hour": 3}, {"site": "seldom", "hour": "never"}, {"site": None}]
    dense, sparse = mapping_rows(rows, encoding)
    assert (
        sparse[0].min() > MISSING
        and sparse[1].tolist() == [UNKNOWN, UNKNOWN]
        and sparse[2].tolist() == [MISSING, MISSING]
    )
    assert dense[1:].tolist() == [[0.0], [0.0]]


def test_many_values_are_hashed(tmp_path):
    encoding = open_table(write(tmp_path / "a.csv", text()), **COLUMNS, max_values=10).encoding
    assert encoding.vocabulary["hour"] == 10 and len(encoding.vocabulary["site"]) == 7
    _, sparse = mapping_rows([{"hour": h} for h in range(100)], encoding)
    assert 2 <= int(sparse[:, 1].min()) and int(sparse[:, 1].max()) < encoding.field_sizes[1]


def test_facts_are_json_and_complete(tmp_path):
    import json

    table = open_table(write(tmp_path / "a.csv", text()), **COLUMNS, transform="standard")
    again = Encoding.from_facts(json.loads(json.dumps(table.encoding.to_facts())))
    assert again == table.encoding
    path = write(tmp_path / "rows.csv", "site,price,hour\na,7,3\nz,,\n")
    ((dense, sparse),) = read_rows(path, again)
    assert dense[1].tolist() == [0.0] and sparse[1].tolist() == [UNKNOWN, MISSING]
    assert torch.equal(dense[0], mapping_rows([{"price": 7, "site": "a", "hour": 3}], again)[0][0])


def test_statistics_are_of_the_training_rows(tmp_path):
    table = open_table(write(tmp_path / "a.csv", text()), **COLUMNS, transform="standard")
    values = table.rows(slice(None))[0]
    assert abs(float(values.mean())) < 1e-5 and abs(float(values.std(correction=0)) - 1) < 1e-5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("label,price,site,hour\n1,2,a,3\n0,3\n", "row 3: 2 columns instead of 4"),
        ("label,price,site,hour\n" + "1,2,a,3\n" * 40 + "1,cheap,a,3\n", "row 42: 'cheap' in the dense column 'price'"),
        ("label,price,site,hour\n1,2,a,3\n2,2,a,3\n", "row 3: the label column 'label' is '2'"),
        ("label,price,site,hour\n1,2,a,3\n,2,a,3\n", "row 3: the label column 'label' is empty"),
        ("label,price,site,hour\n1,inf,a,3\n", "row 2: the dense column 'price' holds an infinite value"),
        ("", "the file is empty"),
        ("label,price,site,hour\n", "no training rows"),
        ("label,price,site\n1,2,a\n", "no column 'hour'"),
    ],
)
def test_broken_rows_are_named(tmp_path, content, said):
    path = write(tmp_path / "log.csv", content)
    with pytest.raises(DataError) as caught:
        open_table(path, **COLUMNS)
    assert said in str(caught.value) and path in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cut.csv.gz", "cut.parquet"])
def test_broken_files_are_named(tmp_path, name):
    content = gzip.compress(text(3000).encode())[:900] if name.endswith("gz") else b"PAR1 and then nothing"
    with pytest.raises(DataError, match=name):
        open_table(write(tmp_path / name, content), **COLUMNS)


def test_names_that_do_not_exist(tmp_path):
    with pytest.raises(UnknownName):
        open_table("cliks")
    with pytest.raises(DataError):
        open_table(tmp_path / "missing.csv")
    encoding = open_table("clicks", "test").encoding
    with pytest.raises(PaperZooError, match="no column 'colour'"):
        mapping_rows([{"colour": "red"}], encoding)


def test_cache_is_used_and_renewed(tmp_path):
    import os

    path = tmp_path / "log.csv"
    table = open_table(write(path, text(300)), **COLUMNS)
    stamp = table.source.stat().st_mtime_ns
    assert open_table(path, **COLUMNS).source.stat().st_mtime_ns == stamp
    write(path, text(400))
    os.utime(path, ns=(1, 1))
    assert len(open_table(path, **COLUMNS)) > len(table)


def test_a_failed_conversion_leaves_nothing(tmp_path):
    path = write(tmp_path / "log.csv", text(50) + "1,2\n")
    for _ in range(2):
        with pytest.raises(DataError):
            open_table(path, **COLUMNS)
    assert not list((tmp_path / "cache" / "tables").glob("*.partial"))


def test_memory_is_bounded(tmp_path):
    """Fifty megabytes of text are converted while the process grows by less than twenty."""
    path = tmp_path / "large.csv"
    block = "".join(f"{i % 2},{i * 7 % 1001},site{i % 977},{i % 24}\n" for i in range(50_000))
    with path.open("w") as file:
        file.write("label,price,site,hour\n")
        for _ in range(64):
            file.write(block)
    program = (
        "import resource, sys\n"
        "from paperzoo.data import tables\n"
        "tables.BLOCK_BYTES = 1 << 18\n"
        "options = {'dense': ('price',), 'sparse': ('site', 'hour')}\n"
        "tables.open_table(sys.argv[1], **options)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "table = tables.open_table(sys.argv[2], **options)\n"
        "table.rows([0, len(table) - 1])\n"
        "print(len(table), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    small = write(tmp_path / "small.csv", "label,price,site,hour\n" + block[:600_000].rsplit("\n", 1)[0] + "\n")
    done = subprocess.run([sys.executable, "-c", program, small, str(path)], capture_output=True, text=True, check=True)
    rows, grown = done.stdout.split()
    assert int(rows) > 2_500_000 and path.stat().st_size > 50e6
    assert float(grown) < 20


def test_clicks_have_a_known_best():
    from torchmetrics.functional.classification import binary_auroc

    table = open_table("clicks", "test")
    labels = table.rows(slice(None))[2].long()
    assert 0.90 < float(binary_auroc(torch.from_numpy(table.probability), labels)) < 0.92
    assert abs(float(labels.float().mean()) - table.probability.mean()) < 0.01
