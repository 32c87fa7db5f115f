"""Images that are normal or have a defect: MVTec AD's folder layout, a folder of good images, embedded textures and an object with drawn defects.

An item is (image, label, mask): uint8 (3, H, W); 0 for normal, 1 for a defect; bool (H, W), the defect's pixels. Training images are
all normal. Files are decoded when an item is asked for; a broken one raises `DataError` naming it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.images import SUFFIXES, read_image
from paperzoo.data.masks import read_ids
from paperzoo.errors import DataError, PaperZooError

GOOD = "good"
TEXTURES = ("brick", "grass", "gravel")
OBJECT = "flower"
TRAIN_COLUMNS = 0.6  # of an embedded texture's picture; test crops come from the rest
SIZE = 96  # pixels of an embedded image


class AnomalyFiles(Dataset):
    """One category of MVTec AD's layout: `train/good`, `test/<defect>`, `ground_truth/<defect>/<name>_mask.png`."""

    def __init__(self, root: Path, split: str) -> None:
        self.files: list[tuple[Path, Path | None]] = []
        self.defects: list[str] = []
        folder = root / split
        kinds = sorted(p for p in folder.iterdir() if p.is_dir())
        if split == "train":
            strange = [p.name for p in kinds if p.name != GOOD]
            if strange:
                raise DataError(folder / strange[0], f"only normal images are for training, in {folder / GOOD}")
        for kind in kinds:
            for image in sorted(p for p in kind.iterdir() if p.suffix.lower() in SUFFIXES):
                self.files.append((image, None if kind.name == GOOD else self._mask(root, kind.name, image)))
                self.defects.append(kind.name)
        if not self.files:
            raise DataError(folder, f"has no pictures; expected {folder / GOOD}/*.png")

    @staticmethod
    def _mask(root: Path, kind: str, image: Path) -> Path:
        folder = root / "ground_truth" / kind
        for name in (f"{image.stem}_mask.png", f"{image.stem}.png"):
            if (folder / name).is_file():
                return folder / name
        raise DataError(image, f"has no mask; expected {folder / f'{image.stem}_mask.png'}")

    def __len__(self) -> int:
        return len(self.files)

    def path(self, i: int) -> Path:
        return self.files[i][0]

    def __getitem__(self, i: int) -> tuple[Tensor, int, Tensor]:
        path, mask_path = self.files[i]
        image = read_image(path)
        if mask_path is None:
            return image, 0, torch.zeros(image.shape[1:], dtype=torch.bool)
        mask = torch.from_numpy(read_ids(mask_path) > 0)
        if mask.shape != image.shape[1:]:
            raise DataError(
                mask_path,
                f"is {tuple(mask.shape)} (height, width), its image is {tuple(image.shape[1:])}; they must be equal",
            )
        return image, 1, mask


class GoodFiles(Dataset):
    """A folder of good images alone, subfolders included. Every fifth, by name, is held out.

    Training: the others. Test: each held-out image as it is, and once more with a defect drawn into it. What is measured so speaks of
    drawn defects, not of those that will come.
    """

    EVERY = 5

    def __init__(self, root: Path, split: str) -> None:
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if len(files) < 2:
            raise DataError(
                root,
                f"has {len(files)} pictures; it needs at least 2 good ones, or MVTec AD's folders train/good and test/<defect>",
            )
        held_out = files[self.EVERY - 1 :: self.EVERY] or files[-1:]
        self.files = [p for p in files if p not in set(held_out)] if split == "train" else held_out
        kinds = list(DEFECTS)
        self.defects = [GOOD] * len(self.files)
        if split == "test":
            self.defects += [kinds[i % len(kinds)] for i in range(len(self.files))]

    def __len__(self) -> int:
        return len(self.defects)

    def path(self, i: int) -> Path:
        return self.files[i % len(self.files)]

    def __getitem__(self, i: int) -> tuple[Tensor, int, Tensor]:
        image, kind = read_image(self.path(i)), self.defects[i]
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
        if kind == GOOD:
            return image, 0, mask
        rng = np.random.default_rng([i, len(self.files)])
        side = min(image.shape[1:])  # defects are drawn into a square, around the middle that a network sees
        top, left = ((extent - side) // 2 for extent in image.shape[1:])
        square = image[:, top : top + side, left : left + side]
        drawn, drawn_mask = DEFECTS[kind](square.permute(1, 2, 0).contiguous().numpy(), rng)
        image = image.clone()
        image[:, top : top + side, left : left + side] = torch.from_numpy(drawn.copy()).permute(2, 0, 1)
        mask[top : top + side, left : left + side] = torch.from_numpy(drawn_mask)
        return image, 1, mask


class TextureDefects(Dataset):
    """Crops of a real photographed texture, with defects of four kinds drawn into some of them; everything follows from the seed.

    Training: `count` normal crops of the picture's left 60%. Test: crops of the rest, a third of them normal.
    """

    def __init__(self, texture: str, split: str, count: int, seed: int = 0) -> None:
        whole = picture(f"{texture}.png")
        border = int(whole.shape[1] * TRAIN_COLUMNS)
        part = whole[:, :border] if split == "train" else whole[:, border:]
        rng = np.random.default_rng([seed, TEXTURES.index(texture), split == "test"])
        kinds = [GOOD] if split == "train" else [GOOD, GOOD, *DEFECTS]
        self.defects = [kinds[i % len(kinds)] for i in range(count)]
        self.items: list[tuple[Tensor, int, Tensor]] = []
        for kind in self.defects:
            crop = random_crop(part, SIZE, rng)
            mask = np.zeros((SIZE, SIZE), bool)
            if kind != GOOD:
                crop, mask = DEFECTS[kind](crop, rng)
            image = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1).contiguous()
            self.items.append((image, int(kind != GOOD), torch.from_numpy(mask)))

    def __len__(self) -> int:
        return len(self.items)

    def path(self, i: int) -> str:
        return f"{self.defects[i]} {i}"

    def __getitem__(self, i: int) -> tuple[Tensor, int, Tensor]:
        return self.items[i]


class ObjectDefects(Dataset):
    """An object in the middle of the picture, photographed again and again: the same picture, moved, turned and scaled a little, with
    other light and noise, and with defects of four kinds drawn into some; everything follows from the seed.

    Training: `count` normal pictures. Test: a third of `count` are normal.
    """

    def __init__(self, name: str, split: str, count: int, seed: int = 0) -> None:
        whole = picture(name)
        side = min(whole.shape[:2])
        rng = np.random.default_rng([seed, split == "test"])
        kinds = [GOOD] if split == "train" else [GOOD, GOOD, *DEFECTS]
        self.defects = [kinds[i % len(kinds)] for i in range(count)]
        self.items: list[tuple[Tensor, int, Tensor]] = []
        for kind in self.defects:
            shot, mask = photographed(whole, side * 0.8, SIZE, rng), np.zeros((SIZE, SIZE), bool)
            if kind != GOOD:
                shot, mask = DEFECTS[kind](shot, rng)
            image = torch.from_numpy(np.ascontiguousarray(shot)).permute(2, 0, 1).contiguous()
            self.items.append((image, int(kind != GOOD), torch.from_numpy(mask)))

    def __len__(self) -> int:
        return len(self.items)

    def path(self, i: int) -> str:
        return f"{self.defects[i]} {i}"

    def __getitem__(self, i: int) -> tuple[Tensor, int, Tensor]:
        return self.items[i]


def open_anomaly(name_or_path: str, split: str = "train") -> Dataset:
    """An anomaly-detection set by name or folder.

    Args:
        name_or_path: "defects_brick", "defects_grass", "defects_gravel" or "defects_flower" (embedded); or one category's folder in MVTec AD's layout:
            `train/good`, `test/good`, `test/<defect>`, `ground_truth/<defect>`; or a folder of good images (see `GoodFiles`).
        split: "train" or "test".

    Raises:
        PaperZooError: if there is no such set. DataError: if the folder has another layout, or a mask is missing.
    """
    if split not in ("train", "test"):
        raise PaperZooError(f"split '{split}' is not known; it is one of train, test")
    names = {f"defects_{texture}": texture for texture in (*TEXTURES, OBJECT)}
    if name_or_path in names:
        return _embedded(names[name_or_path], split)
    root = Path(name_or_path)
    if not root.is_dir():
        raise PaperZooError(f"data '{name_or_path}' is neither an embedded set ({', '.join(names)}) nor a folder")
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        categories = sorted(p.name for p in root.iterdir() if (p / "train").is_dir())
        if categories:
            raise DataError(root, f"holds several categories; choose one, for example {root / categories[0]}")
        if (root / "train").is_dir() or (root / "test").is_dir():
            raise DataError(
                root, "needs the folders train/good and test/<defect> (and ground_truth/<defect>), as MVTec AD"
            )
        return GoodFiles(root, split)
    return AnomalyFiles(root, split)


@functools.cache
def _embedded(name: str, split: str) -> Dataset:
    count = 48 if split == "train" else 60
    return ObjectDefects(f"{name}.jpg", split, count) if name == OBJECT else TextureDefects(name, split, count)


# -- the embedded pictures ---------------------------------------------------------------------------------------------


@functools.cache
def picture(name: str) -> np.ndarray:
    """A picture that ships inside scikit-image, or scikit-learn's flower: uint8 (H, W, 3). Do not modify it."""
    if name == f"{OBJECT}.jpg":
        import sklearn.datasets as home

        path = Path(home.__file__).parent / "images" / name
    else:
        import skimage as home

        path = Path(home.__file__).parent / "data" / name
    return np.asarray(Image.open(path).convert("RGB"))


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square of `size` pixels, mirrored at random, with a little random gain: uint8 (size, size, 3)."""
    top, left = (int(rng.integers(0, extent - size + 1)) for extent in image.shape[:2])
    crop = image[top : top + size, left : left + size]
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    return (crop * rng.uniform(0.9, 1.1)).clip(0, 255).astype(np.uint8)


def photographed(image: np.ndarray, extent: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """The square of about `extent` pixels in an image's middle, as if photographed anew: uint8 (size, size, 3).

    Turned by up to 8 degrees, moved by up to 3%, scaled by up to 5%, with a gain of up to 10% and noise of 3 grey levels.
    """
    angle, scale = np.deg2rad(rng.uniform(-8, 8)), extent / size * rng.uniform(0.95, 1.05)
    x, y = np.array(image.shape[1::-1]) / 2 + rng.uniform(-0.03, 0.03, 2) * extent
    c, s = np.cos(angle) * scale, np.sin(angle) * scale
    half = size / 2
    back = (c, s, x - half * (c + s), -s, c, y - half * (c - s))  # from the new pixels to the image's
    shot = Image.fromarray(image).transform((size, size), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
    values = np.asarray(shot) * rng.uniform(0.9, 1.1) + rng.normal(0, 3, (size, size, 3))
    return values.clip(0, 255).astype(np.uint8)


def scratch(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A broken line of 2 or 3 pixels, much lighter or darker."""
    size = len(image)
    points = [rng.uniform(0.15, 0.85, 2) * size]
    angle = rng.uniform(0, 2 * np.pi)
    for _ in range(3):
        angle += rng.uniform(-0.6, 0.6)
        points.append(points[-1] + size * rng.uniform(0.08, 0.16) * np.array([np.cos(angle), np.sin(angle)]))
    canvas = Image.new("1", (size, size))
    ImageDraw.Draw(canvas).line([tuple(p) for p in points], fill=1, width=int(rng.integers(2, 4)))
    mask = np.array(canvas)
    out = image.copy()
    out[mask] = (out[mask] + rng.choice([-1, 1]) * rng.uniform(80, 120)).clip(0, 255).astype(np.uint8)
    return out, mask


def stain(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A darker, slightly coloured ellipse through which the texture still shows."""
    mask = _ellipse(len(image), rng, 0.06, 0.14)
    tint = rng.uniform(0.4, 0.65) * rng.uniform(0.85, 1.0, 3)
    out = image.copy()
    out[mask] = (out[mask] * tint).astype(np.uint8)
    return out, mask


def displaced(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A rectangle of the same image, turned by 90 degrees and negated, at another place."""
    size, side = len(image), int(rng.integers(len(image) // 8, len(image) // 4))
    (y, x), (v, u) = rng.integers(0, size - side, 2), rng.integers(0, size - side, 2)
    mask = np.zeros((size, size), bool)
    mask[y : y + side, x : x + side] = True
    out = image.copy()
    out[y : y + side, x : x + side] = 255 - np.rot90(image[v : v + side, u : u + side])
    return out, mask


def smudge(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An ellipse in which the texture is blurred away."""
    mask = _ellipse(len(image), rng, 0.08, 0.16)
    blurred = np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(4)))
    return np.where(mask[..., None], blurred, image), mask


def _ellipse(size: int, rng: np.random.Generator, smallest: float, largest: float) -> np.ndarray:
    cy, cx = rng.uniform(0.2, 0.8, 2) * size
    a, b = rng.uniform(smallest, largest, 2) * size
    y, x = np.mgrid[:size, :size]
    return ((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 <= 1


DEFECTS: dict[str, Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]] = {
    "scratch": scratch,
    "stain": stain,
    "displaced": displaced,
    "smudge": smudge,
}

# Pictures for a short training of a feature extractor: which picture a crop comes from is its class.
SOURCES = (
    "astronaut.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "hubble_deep_field.jpg", "ihc.png",
    "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip


class PictureCrops(Dataset):
    """Random crops with the picture they come from as their class; none shows an embedded anomaly set's texture.

    An item is (uint8 (3, size, size), int). Crops are drawn anew every time from numpy's global generator, which the runtime seeds.
    """

    labels = [name.split(".")[0] for name in SOURCES]

    def __init__(self, size: int, count: int = 4096) -> None:
        self.size, self.count = size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        label = i % len(SOURCES)
        image = picture(SOURCES[label])
        rng = np.random.default_rng(np.random.randint(2**31))
        side = int(rng.integers(self.size // 2, min(2 * self.size, *image.shape[:2]) + 1))
        crop = Image.fromarray(random_crop(image, side, rng)).resize((self.size, self.size), Image.Resampling.BILINEAR)
        turned = np.rot90(np.asarray(crop), int(rng.integers(4)))
        return torch.from_numpy(turned.copy()).permute(2, 0, 1).contiguous(), label
