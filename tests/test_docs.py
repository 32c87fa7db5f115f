"""README.md and CONTRIBUTING.md are true: their commands and code run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """(what stands behind the language, the code) of every fenced block of a language."""
    return re.findall(rf"^```{language} ?([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def environment(folder: Path) -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    own = {"PAPERZOO_SHELF": str(folder / "shelf.sqlite"), "OMP_NUM_THREADS": "2"}
    return os.environ | own | {"PATH": binaries + os.pathsep + os.environ["PATH"]}


def test_readme_commands_run(tmp_path):
    commands = "\n".join(code for _, code in blocks(README, "bash"))
    assert commands.count("paperzoo") >= 9
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_readme_python_runs(tmp_path):
    code = "\n".join(code for _, code in blocks(README, "python"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wide_resnet" in done.stdout


def test_readme_commands_with_data_run(tmp_path):
    """The commands on the user's own data, with a folder of images in place."""
    from PIL import Image

    for label in ("left", "right"):
        for i in range(10):
            path = tmp_path / "path" / "to" / "imagefolder" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), "red" if label == "left" else "blue").save(path)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "photo.jpg")
    code = next(code for _, code in blocks(README, "console") if "imagefolder" in code)
    lines = [line.split("#")[0] for line in code.splitlines()]
    lines[0] = lines[0].strip() + " --steps 30 --batch-size 16"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "label left" in done.stdout


def test_readme_backbone_commands_run(tmp_path):
    from PIL import Image

    from paperzoo.engine.streams import VideoWriter

    (tmp_path / "holiday").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "holiday" / "a.png")
    writer = VideoWriter(tmp_path / "film.mp4", 10.0)
    for _ in range(3):
        writer.add(Image.new("RGB", (64, 48), "blue"))
    writer.close()
    code = next(code for _, code in blocks(README, "console") if "--model.backbone" in code)
    lines = code.splitlines()
    lines[0] += " --steps 2 --batch-size 2 --scenes 8"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "film.mp4").is_file() and (tmp_path / "out" / "000_a.png").is_file()


def test_readme_distributed_command_runs(tmp_path):
    code = next(code for _, code in blocks(README, "console") if "--shard" in code)
    line = next(line for line in code.splitlines() if "--shard" in line).split("#")[0]
    line = line.replace("--processes 8", "--processes 2") + " --steps 3 --batch-size 8 --device cpu"
    done = subprocess.run(
        line,
        shell=True,
        cwd=tmp_path,
        env=environment(tmp_path) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("runs/wide_resnet/*/model.safetensors"))


def test_readme_commands_of_deployment_run(tmp_path):
    """Optimise a run by the README's three commands, shortened; then serve it and ask as the README does."""
    import os
    import signal
    import time
    import urllib.error
    import urllib.request

    from PIL import Image

    one_thread = environment(tmp_path) | {"OMP_NUM_THREADS": "1"}

    def run(line: str) -> subprocess.CompletedProcess:
        return subprocess.run(line, shell=True, cwd=tmp_path, env=one_thread, capture_output=True, text=True)

    done = run("paperzoo train wide_resnet10_2 --steps 20 --batch-size 16 --out runs/wide_resnet/a")
    assert done.returncode == 0, done.stderr[-2000:]
    Image.new("RGB", (20, 20), "red").save(tmp_path / "photo.jpg")
    code = next(code for _, code in blocks(README, "console") if "paperzoo optimize" in code)
    lines = [line.split("#")[0] for line in code.splitlines()]
    assert len(lines) == 3
    for line in lines:
        line = line.replace("path/to/imagefolder", "digits").replace("--max-drop 0.005", "")
        line = line.replace("--tune-steps 200", "--tune-steps 2")
        more = " --target onnxruntime --rounds 3" + (" --max-drop 1 --min-same 0" if "int8" in line else "")
        done = run(line + more)
        assert done.returncode == 0 and "wrote" in done.stdout, done.stderr[-2000:]
    code = next(code for _, code in blocks(README, "console") if "curl" in code)
    serve, _, curl = code.splitlines()
    port = 20_000 + os.getpid() % 20_000
    with (tmp_path / "log.txt").open("w") as log:
        service = subprocess.Popen(
            f"exec {serve.split('#')[0].strip()} --port {port}",
            shell=True,
            cwd=tmp_path,
            env=one_thread,
            stdout=log,
            stderr=log,
        )
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and service.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        photo = (tmp_path / "photo.jpg").read_bytes()
        assert "@photo.jpg" in curl and "image/jpeg" in curl
        path = curl.rsplit("8000", 1)[1]
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", photo, {"content-type": "image/jpeg"})
        assert b'"label"' in urllib.request.urlopen(request, timeout=30).read()
    finally:
        service.send_signal(signal.SIGTERM)
        assert service.wait(30) == 0, (tmp_path / "log.txt").read_text()[-2000:]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^ *|`)make (\w+)", README + CONTRIBUTING, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere():
    for text in (README, CONTRIBUTING):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_table_of_papers_is_complete():
    from paperzoo.catalog.cards import papers

    table = README.split("<!-- papers -->")[1].split("<!-- /papers -->")[0]
    assert [slug for slug, paper in papers().items() if paper.has_code and f"[{slug}]" not in table] == []


def test_contributing_builds_a_paper_that_climbs_the_ladder(tmp_path):
    folder = tmp_path / "papers" / "classification" / "maxout"
    folder.mkdir(parents=True)
    for name, code in blocks(CONTRIBUTING, r"(?:python|toml)"):
        (folder / name).write_text(code, encoding="utf-8")
    (folder / "notes.md").write_text("# Maxout in five minutes\n")
    assert {p.name for p in folder.iterdir()} == {"card.toml", "notes.md", "model.py", "recipe.py", "parity.py"}
    command = [sys.executable, "-m", "paperzoo", "verify", "maxout"]
    done = subprocess.run(
        command,
        env=environment(tmp_path) | {"PAPERZOO_PAPERS": str(tmp_path / "papers")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 4


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_readme_names_the_two_commands(name):
    assert f"make {name}" in README
