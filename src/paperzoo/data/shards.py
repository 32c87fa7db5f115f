"""Images in tar files, as webdataset writes them: files of one sample lie together and share the name up to its first dot.

    000123.jpg  000123.cls      a picture and its class, a number or a name (or 000123.txt, or "label" in 000123.json)

The tar files are read once for their table of contents; a sample is then read at its place, so they can be larger than memory.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from paperzoo.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff")
ANSWERS = ("cls", "txt", "json")
LONGEST_ANSWER = 65_536  # bytes


class Shards:
    """Samples of several tar files: `paths[i]` names sample i as "file.tar:name", `answers[i]` is its class as text."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.places: list[tuple[Path, int, int]] = []
        self.paths: list[str] = []
        self.answers: list[str] = []
        for file in files:
            self.index(file)

    def index(self, file: Path) -> None:
        """Read a tar file's table of contents.

        Raises:
            DataError: if it is no tar file, is cut short, or has a picture without an answer.
        """
        pictures: dict[str, tuple[int, int]] = {}
        answers: dict[str, str] = {}
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    key, kind = f"{folder}/{stem}".lstrip("/"), ending.lower().rpartition(".")[2]
                    if not member.isfile():
                        continue
                    if kind in PICTURES:
                        pictures[key] = (member.offset_data, member.size)
                    elif kind in ANSWERS and member.size <= LONGEST_ANSWER:
                        answers[key] = said(kind, archive.extractfile(member).read())
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(file, f"not a readable, uncompressed tar file ({error})") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(file, f"{key}: its answer cannot be read ({error})") from None
        for key, (offset, size) in pictures.items():
            if key not in answers:
                raise DataError(file, f"{key} has a picture but no .cls, .txt or .json with its label")
            self.places.append((file, offset, size))
            self.paths.append(f"{file}:{key}")
            self.answers.append(answers[key])

    def read(self, number: int) -> Tensor:
        """A sample's picture, uint8 (3, H, W).

        Raises:
            DataError: if the file is gone or the picture is broken.
        """
        from paperzoo.data.images import pil_to_tensor

        file, offset, size = self.places[number]
        try:
            with file.open("rb") as archive:
                archive.seek(offset)
                content = archive.read(size)
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                return pil_to_tensor(image)
        except Exception as error:  # decoders raise whatever they like on broken files
            raise DataError(
                self.paths[number], f"not a readable image ({type(error).__name__}: {str(error)[:120]})"
            ) from None


def said(kind: str, content: bytes) -> str:
    """The label that a .cls, .txt or .json file holds."""
    text = content.decode("utf-8").strip()
    if kind == "json":
        value = json.loads(text)
        return str(value["label"] if isinstance(value, dict) else value)
    return text


def shard_files(pattern: str) -> list[Path]:
    """The tar files of a pattern: one file, a folder of them, or a name with * or with a range in braces (train-{0000..0012}.tar)."""
    import glob
    import re

    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match:
        low, high, width = int(match[1]), int(match[2]), len(match[1])
        names = [pattern[: match.start()] + f"{i:0{width}d}" + pattern[match.end() :] for i in range(low, high + 1)]
        return [Path(name) for name in names]
    path = Path(pattern)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return sorted(Path(name) for name in glob.glob(pattern)) if "*" in pattern else [path]
