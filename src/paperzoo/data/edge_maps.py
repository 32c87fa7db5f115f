"""Pictures with edge maps by one or several annotators: BSDS500, folders of PNG, HED's lists of pairs, and an embedded set.

    open_edges("shape_edges")          shapes over photographs; edges are where a shape ends, and nothing else
    open_edges("BSR")                  BSDS500 as released: images/train/*.jpg, groundTruth/train/*.mat
    open_edges("folder")               images/ and edges/ with equal names; a folder edges/NAME/ holds several annotators' maps
    open_edges("HED-BSDS")             train_pair.lst with "image edges" a line; test.lst

An item is `(image, maps)`: `tv_tensors.Image` uint8 (3, H, W), and `tv_tensors.Mask` uint8 (A, H, W), 1 on the edges that each of A annotators
drew. Files are decoded when an item is asked for; a broken one raises `DataError` naming it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from paperzoo.data.images import HELD_OUT, SUFFIXES, read_image
from paperzoo.data.masks import IMAGE_FOLDERS, SPLITS, read_ids
from paperzoo.errors import DataError, PaperZooError

EDGE_FOLDERS = ("edges", "edge_maps", "edge", "gt", "groundTruth", "boundaries")


class EdgeFiles(Dataset):
    """Pairs of a picture and what its edges are read from: a .mat file, a picture, or a folder of pictures."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]]) -> None:
        self.pairs = list(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, i: int) -> Path:
        return self.pairs[i][0]

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        picture, edges = self.pairs[i]
        image = read_image(picture)
        maps = read_edges(edges)
        if maps.shape[1:] != image.shape[1:]:
            size, wanted = (" x ".join(map(str, reversed(x.shape[1:]))) for x in (maps, image))
            raise DataError(edges, f"is {size} pixels, its image {picture.name} is {wanted}; they must be equal")
        return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(maps))


class ShapeEdges(Dataset):
    """ "shape_edges": shapes over photographs in patches of light and shade; edges are the shapes' outlines alone.

    Made of `paperzoo.data.shape_scenes`, those without a crowd; the splits share no part of a photograph. What a photograph or a pattern on a
    shape holds, and where shade begins, is no edge. An outline lies on the pixels that have another shape, or none, to their right or below,
    as in BSDS500, thinned to one pixel.
    """

    def __init__(self, split: str) -> None:
        self.split = split
        self.images, self.maps = shape_edges(384 if split == "train" else 48, split)

    def __len__(self) -> int:
        return len(self.images)

    def path(self, i: int) -> str:
        return f"{self.split} shape scene {i}"

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        return tv_tensors.Image(self.images[i]), tv_tensors.Mask(self.maps[i][None])


@functools.cache
def shape_edges(count: int, split: str, size: int = 64) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, size, size) and edges uint8 (N, size, size)."""
    from skimage.morphology import thin

    from paperzoo.data.shape_scenes import shape_scenes

    scenes = shape_scenes(2 * count, size, seed=3, max_objects=3, split=split, scale=(0.3, 0.6))
    chosen = [s for s in scenes if not bool(s["crowd"].any()) and len(s["masks"])][:count]
    ids = torch.zeros(len(chosen), size, size, dtype=torch.int64)
    for of_scene, scene in zip(ids, chosen, strict=True):
        of_scene += (scene["masks"] * torch.arange(1, len(scene["masks"]) + 1)[:, None, None]).sum(0)
    images = torch.stack([s["image"] for s in chosen]).float() / 255
    edges = np.stack([thin(e) for e in boundaries(ids).numpy() > 0])
    rng = torch.Generator().manual_seed(count + (split == "test"))
    return shaded(images, rng), torch.from_numpy(edges.astype(np.uint8))


def shaded(images: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures (N, 3, S, S) in [0, 1] with two straight borders of shade each, and the noise of a sensor: uint8."""
    count, size = len(images), images.shape[-1]
    at = torch.arange(size) + 0.5
    for _ in range(2):
        angle = torch.rand(count, generator=rng)[:, None, None] * 2 * np.pi
        through = size * (0.15 + 0.7 * torch.rand(2, count, generator=rng))[:, :, None, None]
        away = (at - through[0]) * angle.cos() + (at[:, None] - through[1]) * angle.sin()
        dark = 0.35 + 0.35 * torch.rand(count, generator=rng)[:, None, None]
        images = images * torch.lerp(torch.ones(()), dark, (away + 0.5).clamp(0, 1))[:, None]
    images = images + 0.03 * torch.randn(images.shape, generator=rng)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def boundaries(ids: Tensor) -> Tensor:
    """Regions' ids (…, H, W) as edges uint8 (…, H, W): 1 where the pixel to the right, below or below on the right has another id."""
    edges = torch.zeros_like(ids, dtype=torch.bool)
    edges[..., :, :-1] |= ids[..., :, :-1] != ids[..., :, 1:]
    edges[..., :-1, :] |= ids[..., :-1, :] != ids[..., 1:, :]
    edges[..., :-1, :-1] |= ids[..., :-1, :-1] != ids[..., 1:, 1:]
    return edges.to(torch.uint8)


EMBEDDED: dict[str, Callable[[str], Dataset]] = {"shape_edges": ShapeEdges}


def open_edges(name_or_path: str, split: str = "train") -> Dataset:
    """An edge data set by name or folder; see the module's docstring. BSDS500 learns from train and val together, as is usual.

    Raises:
        PaperZooError: if there is no such set.
        DataError: if the folder has none of these layouts, or a picture has no edges.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is one of train, test")
    if name_or_path in EMBEDDED:
        return EMBEDDED[name_or_path](split)
    root = Path(name_or_path)
    if not root.is_dir():
        raise PaperZooError(f"data '{name_or_path}' is neither the embedded set shape_edges nor a folder")
    for inside in (root, root / "data", root / "BSDS500" / "data", root / "BSR" / "BSDS500" / "data"):
        if (inside / "groundTruth").is_dir() and (inside / "images").is_dir():
            return EdgeFiles(_bsds(inside, split))
    lists = sorted(root.glob("train*pair*.lst"))
    if lists:
        return EdgeFiles(_listed(root, lists[0] if split == "train" else root / "test_pair.lst"))
    images = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    edges = next((root / name for name in EDGE_FOLDERS if (root / name).is_dir()), None)
    if images is None or edges is None:
        raise DataError(
            root, "needs the folders images/ and edges/, or images/ and groundTruth/ as BSDS500, or train_pair.lst"
        )
    return EdgeFiles(_folders(images, edges, split))


# -- layouts -------------------------------------------------------------------------------------------------------------


def _bsds(root: Path, split: str) -> list[tuple[Path, Path]]:
    pairs = []
    for name in ("train", "val") if split == "train" else ("test",):
        for picture in _pictures(root / "images" / name):
            pairs.append((picture, root / "groundTruth" / name / f"{picture.stem}.mat"))
    return _checked(root / "images", pairs)


def _listed(root: Path, path: Path) -> list[tuple[Path, Path]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(path, "no such file; 'image edges' a line is expected") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2:
            raise DataError(f"{path}:{number}", f"has {len(words)} words; a picture and its edges are expected")
        for word in words:
            if not (root / word).is_file():
                raise DataError(f"{path}:{number}", f"names {root / word}, which does not exist")
        pairs.append((root / words[0], root / words[1]))
    return _checked(path, pairs)


def _folders(images: Path, edges: Path, split: str) -> list[tuple[Path, Path]]:
    """With or without train/ and val/ or test/ inside; every fifth picture is held out without."""
    inside = next((name for name in SPLITS[split] if (images / name).is_dir()), None)
    pictures = _pictures(images / inside if inside else images)
    if inside is None:
        pictures = [p for i, p in enumerate(pictures) if (i % HELD_OUT == HELD_OUT - 1) == (split == "test")]
    folder = edges / inside if inside else edges
    pairs = []
    for picture in pictures:
        options = [folder / picture.stem, *(folder / f"{picture.stem}{s}" for s in (".png", ".mat", ".bmp", ".tif"))]
        pairs.append((picture, next((o for o in options if o.exists()), options[1])))
    return _checked(images, pairs)


def _checked(source: Path, pairs: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    if not pairs:
        raise DataError(source, "has no pictures for this split")
    for picture, edges in pairs:
        if not edges.exists():
            raise DataError(picture, f"has no edges; expected {edges}")
    return pairs


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(folder, "is not a folder")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


# -- files -----------------------------------------------------------------------------------------------------------


def read_edges(path: str | Path) -> np.ndarray:
    """The annotators' maps uint8 (A, H, W), 1 on edges: of a .mat file of BSDS500, a picture (half of white or more), or a folder of pictures.

    Raises:
        DataError: if a file is missing, broken, or holds no edge maps.
    """
    path = Path(path)
    if path.is_dir():
        maps = [read_edges(p)[0] for p in _pictures(path)]
        if not maps or len({m.shape for m in maps}) > 1:
            raise DataError(path, f"holds {len(maps)} edge maps; at least one is needed, all of one size")
        return np.stack(maps)
    if path.suffix.lower() != ".mat":
        ids = read_ids(path)
        return (ids > (127 if ids.max(initial=0) > 1 else 0)).astype(np.uint8)[None]
    import scipy.io

    try:
        stored = scipy.io.loadmat(path)["groundTruth"]
        maps = [cell["Boundaries"][0, 0] for cell in stored.flatten()]
        return (np.stack(maps) > 0).astype(np.uint8)
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except Exception as error:  # the reader raises whatever it likes on broken files
        raise DataError(
            path,
            f"not BSDS500's ground truth: groundTruth{{i}}.Boundaries is needed ({type(error).__name__}: {str(error)[:80]})",
        ) from None
