"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from paperzoo.cli import app, main

COMMANDS = [
    "list",
    "search",
    "show",
    "run",
    "train",
    "evaluate",
    "predict",
    "resume",
    "export",
    "verify",
    "bench",
    "cite",
    "new",
]


def call(*words: str, code: int = 0) -> str:
    """The output of a command in this process, its errors included."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of Wide ResNet."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    call(
        "train",
        "wide_resnet10_2",
        "--steps",
        "60",
        "--batch-size",
        "32",
        "--device",
        "cpu",
        "--out",
        str(folder),
        "--json",
    )
    return folder


def test_listing_imports_nothing_heavy():
    script = "import sys, paperzoo; from paperzoo.cli import app; app(['list'], standalone_mode=False); print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.split("'")[1].split(".")[0] for name in done.stderr.strip("[]\n").split(", ")}
    heavy = {
        "torch",
        "torchvision",
        "numpy",
        "PIL",
        "matplotlib",
        "torchmetrics",
        "sklearn",
        "rich",
    }
    assert loaded & heavy == set()
    assert "wide_resnet" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples(command):
    text = call(command, "--help")
    assert "Examples:" in text and f"paperzoo {command}" in text


def test_list_filters_and_speaks_json():
    rows = json.loads(call("list", "--area", "classification", "--json"))
    assert {r["area"] for r in rows} == {"classification"} and "wide_resnet" in {r["slug"] for r in rows}
    assert "resnet50" in call("list", "--models", "resnet*").split()


@pytest.mark.parametrize(
    ("query", "slug"),
    [
        ("wide residual", "wide_resnet"),
        ("宽", "wide_resnet"),
        ("squeeze excitation", "senet"),
        ("physics-informed", "gpinn"),
    ],
)
def test_search_finds(query, slug):
    assert slug in [r["slug"] for r in json.loads(call("search", query, "--json"))][:5]


def test_show_has_the_facts():
    text = call("show", "WRN")
    for part in ("Wide Residual Networks", "1605.07146", "wide_resnet28_10", "notes.md"):
        assert part in text
    assert json.loads(call("show", "wide_resnet", "--json"))["year"] == 2016


def test_cite_prints_bibtex():
    text = call("cite", "adam", "resnet")
    assert text.count("@") == 2 and "Deep Residual Learning" in text


def test_completion_knows_the_papers():
    from paperzoo.cli import complete_name

    assert "wide_resnet" in complete_name("wide") and "wide_resnet28_10" in complete_name("wide")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "wide_resnt"], "did you mean wide_resnet"),
        (["train", "wide_resnet", "--learning-rat", "1"], "did you mean learning_rate"),
        (["train", "wide_resnet", "--steps", "0"], "'steps' is 0"),
        (["train", "wide_resnet", "--preset", "publishd"], "did you mean published"),
        (["train", "wide_resnet", "--data", "digts"], "did you mean digits"),
        (["train", "wide_resnet", "--precision", "fp8"], "precision"),
        (["train", "wide_resnet", "--steps"], "--steps needs a value"),
        (["predict", "no/such/run", "x.png"], "no paper or model named"),
        (["resume", "no/such/run"], "config.toml: no such file"),
        (["verify"], "--all"),
        (["verify", "adam", "--step", "climbs"], "'climbs' is not a step"),
        (["bench", "nothing"], "no model with a reference"),
        (["new", "Bad-Slug", "--area", "x", "--title", "y"], "lower-case"),
    ],
)
def test_mistakes_get_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paperzoo", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert message in error[-1] and error[-1].startswith("error: ")


def test_a_run_leaves_its_files(finished):
    names = {p.name for p in finished.iterdir()}
    assert {
        "config.toml",
        "metrics.csv",
        "checkpoint.pt",
        "model.safetensors",
        "config.json",
        "report.html",
        "log.txt",
    } <= names
    page = (finished / "report.html").read_text()
    assert "Confusion matrix" in page and page.count("data:image/png") >= 4 and "http" not in page.split("<style>")[0]


def test_predict_on_a_file(finished, tmp_path):
    from paperzoo.data.images import open_images

    image, _ = open_images("digits", "test")[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "digit.png")
    rows = json.loads(
        call("predict", str(finished), str(tmp_path / "digit.png"), "--draw", str(tmp_path / "out"), "--json")
    )
    assert abs(sum(rows[0]["result"]["probabilities"].values()) - 1) < 1e-4
    assert Image.open(rows[0]["picture"]).size[0] > 0


def test_evaluate_repeats_the_runs_figure(finished):
    stored = json.loads((finished / "config.json").read_text())["metrics"]["accuracy"]
    assert json.loads(call("evaluate", str(finished), "--json"))["accuracy"] == pytest.approx(stored)


@pytest.mark.parametrize(("format", "name"), [("onnx", "model.onnx"), ("torch", "model.pt2")])
def test_export_agrees(finished, tmp_path, format, name):
    row = json.loads(call("export", str(finished), "--format", format, "--out", str(tmp_path / name), "--json"))
    assert row["agrees"] and (tmp_path / name).exists()


def test_train_on_a_folder_and_on_a_table_with_a_broken_file(tmp_path):
    """The user's own images: the folder, then the CSV, one file of 120 broken."""
    from paperzoo.data.images import open_images

    digits, lines = open_images("digits", "train"), ["path,label"]
    for i in range(240):
        image, target = digits[i]
        if target < 2 or i < 120:
            path = tmp_path / "data" / f"class{target % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            lines.append(f"{path.relative_to(tmp_path)},{target % 2}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    victim = next((tmp_path / "data" / "class1").iterdir())
    victim.write_bytes(b"broken")
    common = ["--steps", "6", "--batch-size", "32", "--device", "cpu", "--json"]
    for data in (tmp_path / "data", tmp_path / "list.csv"):
        out = tmp_path / f"run_{data.name}"
        output = call("train", "wide_resnet10_2", "--data", str(data), "--out", str(out), *common)
        result = json.loads(output[output.index("{") :])  # a warning names the broken file first
        assert 0 <= result["metrics"]["accuracy"] <= 1
    assert (
        victim.name
        in (tmp_path / "run_data" / "log.txt").read_text() + (tmp_path / "run_list.csv" / "log.txt").read_text()
    )


def test_new_writes_a_skeleton_that_fails_until_it_is_filled(tmp_path):
    from paperzoo.catalog.cards import Paper, read_card
    from paperzoo.catalog.schema import check
    from paperzoo.errors import PaperZooError

    facts = {
        "slug": "my_net",
        "area": "classification",
        "kind": "model",
        "name": "MyNet",
        "title": "My Net",
        "year": 2020,
        "arxiv": "2001.00001",
        "task": "image classification",
        "reference": ["pypi:timm"],
    }
    (tmp_path / "papers.jsonl").write_text(json.dumps(facts) + "\n")
    call("new", "my_net", "--facts", str(tmp_path / "papers.jsonl"), "--into", str(tmp_path / "papers"))
    folder = tmp_path / "papers" / "classification" / "my_net"
    assert {p.name for p in folder.iterdir()} == {
        "__init__.py",
        "card.toml",
        "notes.md",
        "model.py",
        "recipe.py",
        "parity.py",
    }
    with pytest.raises(PaperZooError, match=r"card.toml:\d+: "):
        check(Paper("my_net", "classification", folder, read_card(folder / "card.toml")))


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{sys.executable} -m paperzoo list | head -1", shell=True, capture_output=True, text=True, env=os.environ
    )
    assert "Traceback" not in done.stderr
