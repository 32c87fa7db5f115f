"""Pictures for image restoration: clean ones, or pairs of a degraded and a clean one.

    open_restoration("photographs", "train")          photographs that come with scikit-image and scikit-learn; other ones for "test"
    open_restoration("path/to/folder", "train")       clean pictures, in sub-folders or not; or pairs (below)
    open_restoration("HR", "train", degraded="LR")    pairs in two folders
    open_restoration("photo.png", "test")             one picture, which is both splits

Splits: folders whose names say train, or test, val, valid, validation; "test" without any of them is one picture in five. `split="all"`
takes everything.

Pairs are found by names, in one folder or two. A folder (or else a file) whose name has the word gt, hr, clean, sharp, target, high, groundtruth or
original holds the clean ones; with lr, lq, noisy, blur, blurry, input, degraded, rain, rainy, hazy, haze, low or compressed the degraded
ones. The rest of path and name has to agree, but for a scale (`x4`, `X4`, `SRF_4`), of which the one asked for is taken:

    DIV2K_train_HR/0001.png          DIV2K_train_LR_bicubic/X4/0001x4.png
    Set5/HR/baby.png                 Set5/LR_bicubic/X2/babyx2.png               Set5/GTmod12, Set5/LRbicx4
    image_SRF_4/img_001_SRF_4_HR.png image_SRF_4/img_001_SRF_4_LR.png            (Urban100, Set14 as published with SelfExSR)
    GoPro/train/GOPR0372/sharp/000047.png   GoPro/train/GOPR0372/blur/000047.png
    SIDD/train/gt_crops/0001_s001.png       SIDD/train/input_crops/0001_s001.png
    0001_001_S6/GT_SRGB_010.PNG             0001_001_S6/NOISY_SRGB_010.PNG       (SIDD as published)

Item i is (degraded or None, clean), uint8 or uint16 (C, h, w) and (C, h * scale, w * scale) as in the files; a clean picture that is a few pixels
larger is cropped, as benchmarks do.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.images import HELD_OUT, SUFFIXES, read_image
from paperzoo.data.picture_files import read_pixels
from paperzoo.errors import DataError, UnknownName

CLEAN = {"gt", "hr", "clean", "sharp", "target", "high", "groundtruth", "original"}
DEGRADED = {
    *("lr", "lq", "noisy", "blur", "blurry", "input", "degraded", "rain", "rainy", "hazy", "haze", "low", "compressed")
}
TRAIN, TEST = {"train", "training"}, {"test", "testing", "val", "valid", "validation"}
JOINED = re.compile(r"^(gt|lr|hr)(?:mod\d+|bic(?:ubic)?)?(?:x\d+)?$")  # GTmod12, LRbicx4
CACHE = 512 * 2**20  # bytes of decoded pictures that are kept


class Pictures(Dataset):
    """Clean pictures or pairs, decoded when asked for; the last ones are kept. `names[i]` names picture i."""

    def __init__(
        self,
        clean: Sequence[str | Tensor],
        degraded: Sequence[str | Tensor] | None = None,
        names: Sequence[str] | None = None,
        scale: int = 1,
    ) -> None:
        self.clean, self.degraded, self.scale = list(clean), None if degraded is None else list(degraded), scale
        self.names = list(names) if names is not None else [Path(str(path)).stem for path in self.clean]
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def paired(self) -> bool:
        return self.degraded is not None

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> tuple[Tensor | None, Tensor]:
        clean = self.pixels(self.clean[index])
        if self.degraded is None:
            return None, clean
        degraded = self.pixels(self.degraded[index])
        height, width = (n * self.scale for n in degraded.shape[1:])
        spare = (clean.shape[1] - height, clean.shape[2] - width)
        if not all(0 <= n < max(2, self.scale) for n in spare):
            sizes = f"{clean.shape[2]}x{clean.shape[1]} of the clean picture are not {self.scale} times {degraded.shape[2]}x{degraded.shape[1]}"
            raise DataError(self.degraded[index] if isinstance(self.degraded[index], str) else self.names[index], sizes)
        return degraded, clean[:, :height, :width]

    def pixels(self, source: str | Tensor) -> Tensor:
        if isinstance(source, Tensor):
            return source
        if source in self._kept:
            self._kept.move_to_end(source)
        else:
            self._kept[source] = read_pixels(source)
            while sum(t.nbytes for t in self._kept.values()) > CACHE and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return self._kept[source]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": OrderedDict()}


# -- the embedded photographs ------------------------------------------------------------------------------------------

LEARNED = (
    "chelsea.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "ihc.png",
    "brick.png",
    "grass.png",
    "gravel.png",
    "coins.png",
)
HELD = {  # left, top of the pieces of other photographs that are tested
    "astronaut.png": ((130, 10), (250, 210)),
    "coffee.png": ((40, 150), (300, 40)),
    "flower": ((230, 60), (60, 220)),
}
PIECE = 192  # pixels


@functools.cache
def photographs(split: str) -> Pictures:
    """Nine photographs to learn from; for "test" six pieces of 192 x 192 pixels of three other photographs. Colour, 8 bits."""
    import skimage
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.__file__).parent / "data"
    china, flower = (torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images)
    if split == "train":
        pictures = [china, *(read_image(folder / name) for name in LEARNED)]
        return Pictures([p.contiguous() for p in pictures], names=["china", *(name.split(".")[0] for name in LEARNED)])
    pieces, names = [], []
    for name, corners in HELD.items():
        whole = flower if name == "flower" else read_image(folder / name)
        for k, (left, top) in enumerate(corners):
            pieces.append(whole[:, top : top + PIECE, left : left + PIECE].contiguous())
            names.append(f"{name.split('.')[0]}_{k + 1}")
    return Pictures(pieces, names=names)


# -- the user's files --------------------------------------------------------------------------------------------------


def open_restoration(data: str | Path, split: str = "train", scale: int = 1, degraded: str | None = None) -> Pictures:
    """The pictures of a split; see the module's docstring.

    Args:
        data: "photographs", a folder, or one picture.
        split: "train", "test" or "all".
        scale: how many times larger the clean pictures are than the degraded ones, where there are pairs.
        degraded: a folder with the degraded pictures of the clean ones in `data`, matched by name.

    Raises:
        DataError: if the place is missing or empty, or a picture has no partner.
        UnknownName: if `data` is neither a set's name nor a path.
    """
    name = str(data)
    if name == "photographs":
        return photographs("train" if split == "train" else "test")
    path = Path(name).expanduser()
    if path.is_file():
        return Pictures([str(path)])
    if not path.is_dir():
        if path.suffix or len(path.parts) > 1:
            raise DataError(
                path, "no such file or folder; give a folder of clean pictures, or of pairs, or one picture"
            )
        raise UnknownName("data set or path", name, ["photographs"])
    files = {f: f.relative_to(path) for f in pictures_in(path)}
    if degraded is not None:
        other = Path(degraded).expanduser()
        if not other.is_dir():
            raise DataError(other, "no such folder; the degraded pictures are expected here")
        rows = partners(files, {f: f.relative_to(other) for f in pictures_in(other)}, scale, False)
    else:
        rows = found_pairs(path, files, scale)
    if split != "all":
        splits = splits_of(files)
        rows = [row for row in rows if (splits[row[0]] == "test") == (split != "train")]
    if not rows:
        raise DataError(path, f"no pictures for the split '{split}'")
    pairs = rows[0][1] is not None
    names = [files[row[0]].with_suffix("").as_posix() for row in rows]
    return Pictures([str(row[0]) for row in rows], [str(row[1]) for row in rows] if pairs else None, names, scale)


def pictures_in(folder: Path) -> list[Path]:
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".") and "__MACOSX" not in p.parts
    )
    if not files:
        raise DataError(folder, f"no pictures here; files ending in {', '.join(sorted(SUFFIXES))} are read")
    return files


def words(text: str) -> set[str]:
    """The words of a name: "DIV2K_train_HR" -> div2k, train, hr; "GTmod12" -> gt."""
    found = {w for w in re.split(r"[^a-z0-9]+", text.lower()) if w}
    return (
        found
        | {m[1] for w in found if (m := JOINED.match(w))}
        | ({"groundtruth"} if "ground_truth" in text.lower() else set())
    )


def role(text: str) -> str | None:
    """Whether a name says "clean" or "degraded"; None where it says neither, or both."""
    found = words(text)
    clean, spoiled = bool(found & CLEAN), bool(found & DEGRADED)
    return None if clean == spoiled else "clean" if clean else "degraded"


def stem_scale(stem: str) -> int | None:
    """The scale that a file's name ends in or names: "0001x4", "img_001_SRF_4_LR" -> 4."""
    match = re.search(r"srf_?(\d+)|x(\d)$", stem.lower())
    return int(match[1] or match[2]) if match else None


def folder_scale(name: str) -> int | None:
    """The scale that a folder's name says: "X4", "LRbicx4", "image_SRF_4" -> 4."""
    match = re.fullmatch(r"x(\d)", name.lower()) or (stem_scale(name) is not None and re.search(r"(\d)$", name))
    return int(match[1]) if match and (role(name) or re.fullmatch(r"x\d|.*srf_?\d", name.lower())) else None


def key_of(path: Path, of_file: bool, without_scale: bool) -> tuple[str, ...]:
    """What the two pictures of a pair have in common: the folders but for roles and scales, and the file's name."""
    folders = []
    for name in path.parent.parts:
        if role(name) or folder_scale(name) is not None:
            said = words(name)
            folders += ["train"] * bool(said & TRAIN) + ["test"] * bool(said & TEST)
        else:
            folders.append(name.lower())
    stem = path.stem.lower()
    if of_file:
        stem = re.sub(r"_?srf_?\d+", "", stem)
        stem = "_".join(w for w in re.split(r"[_\-\s.]+", stem) if w and w not in CLEAN | DEGRADED)
    return (*folders, re.sub(r"x\d$", "", stem) if without_scale else stem)


def found_pairs(root: Path, files: dict[Path, Path], scale: int) -> list[tuple[Path, Path | None]]:
    """(clean, degraded) by what folders, or else files, are called; (clean, None) where nothing says that there are pairs."""
    both = {"clean", "degraded"}
    roles = {f: next((r for r in map(role, reversed(p.parent.parts)) if r), None) for f, p in files.items()}
    of_file = False
    if not both <= set(roles.values()):
        roles, of_file = {f: role(p.stem) for f, p in files.items()}, True
    if not both <= set(roles.values()):
        return [(f, None) for f in files]
    clean, degraded = ({f: p for f, p in files.items() if roles[f] == side} for side in ("clean", "degraded"))
    if of_file:  # a folder for each scale holds both
        clean = {f: p for f, p in clean.items() if folders_fit(p, scale)}
    return partners(clean, degraded, scale, of_file)


def folders_fit(path: Path, scale: int) -> bool:
    """Whether no folder along a path says another scale."""
    return all(folder_scale(name) in (None, scale) for name in path.parent.parts)


def partners(
    clean: dict[Path, Path], degraded: dict[Path, Path], scale: int, of_file: bool
) -> list[tuple[Path, Path | None]]:
    """(clean, degraded) with the same key; degraded pictures of other scales are left out.

    Raises:
        DataError: for a picture without partner, or with several.
    """
    keys = {key_of(p, of_file, False): f for f, p in clean.items()}
    if len(keys) < len(clean):
        again = next(f for f, p in clean.items() if keys[key_of(p, of_file, False)] != f)
        raise DataError(
            again, f"is called like {keys[key_of(clean[again], of_file, False)]}; nothing tells whose partner is whose"
        )
    found: dict[Path, Path] = {}
    for path, inner in degraded.items():
        if not folders_fit(inner, scale):
            continue
        key = key_of(inner, of_file, False)
        if key not in keys:
            if stem_scale(inner.stem) not in (None, scale):
                continue
            key = key_of(inner, of_file, True)
        if key not in keys:
            raise DataError(path, "has no clean picture with the same name")
        if keys[key] in found:
            other = found[keys[key]]
            raise DataError(
                path, f"{other} would belong to the same clean picture; name the folder of one of them as `degraded`"
            )
        found[keys[key]] = path
    lonely = next((f for f in clean if f not in found), None)
    if lonely is not None:
        raise DataError(lonely, f"has no degraded picture of its name at scale {scale}")
    return [(f, found[f]) for f in clean]


def splits_of(files: dict[Path, Path]) -> dict[Path, str]:
    """ "train" or "test" for each file, by the names of its folders; where they say nothing, one in five is for testing."""
    said = {}
    for file, inner in files.items():
        found = set().union(*map(words, inner.parent.parts))
        said[file] = "train" if found & TRAIN else "test" if found & TEST else ""
    kinds = set(said.values())
    if "test" in kinds:  # what no folder says is for training
        return {file: kind or "train" for file, kind in said.items()}
    order = sorted(files, key=lambda f: (zlib.crc32(files[f].stem.encode()), str(files[f])))
    held_out = {f for i, f in enumerate(order) if i % HELD_OUT == 0}
    return {file: "test" if file in held_out else "train" for file in files}
