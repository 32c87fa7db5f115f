"""Aerial pictures of one date with class masks: iSAID's coloured masks, generated terrain, and whatever `paperzoo.data.masks` opens.

An item is `(image, mask)` as in `paperzoo.data.masks`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from paperzoo.data.images import read_image
from paperzoo.data.masks import SPLITS, open_masks
from paperzoo.errors import DataError, PaperZooError

ISAID = {
    "background": (0, 0, 0),
    "ship": (0, 0, 63),
    "storage tank": (0, 63, 63),
    "baseball diamond": (0, 63, 0),
    "tennis court": (0, 63, 127),
    "basketball court": (0, 63, 191),
    "ground track field": (0, 63, 255),
    "bridge": (0, 127, 63),
    "large vehicle": (0, 127, 127),
    "small vehicle": (0, 0, 127),
    "helicopter": (0, 0, 191),
    "swimming pool": (0, 0, 255),
    "roundabout": (0, 191, 127),
    "soccer ball field": (0, 127, 191),
    "plane": (0, 127, 255),
    "harbor": (0, 100, 155),
}
"""Classes of iSAID and the colours of its masks, in the order of its ids."""

ENDING = "_instance_color_RGB.png"


class ColouredMasks(Dataset):
    """Pictures P0000.png with masks P0000_instance_color_RGB.png, a colour for each class."""

    labels = list(ISAID)

    def __init__(self, images: Path, masks: Path) -> None:
        pictures = sorted(p for p in images.glob("*.png") if not p.name.startswith("."))
        if not pictures:
            raise DataError(images, "has no PNG pictures")
        self.pairs = [(p, masks / (p.stem + ENDING)) for p in pictures]
        for picture, mask in self.pairs:
            if not mask.is_file():
                raise DataError(picture, f"has no mask; expected {mask}")

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, i: int) -> Path:
        return self.pairs[i][0]

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        picture, mask = self.pairs[i]
        image, colours = read_image(picture), read_image(mask)
        if colours.shape != image.shape:
            size, wanted = (" x ".join(map(str, reversed(x.shape[1:]))) for x in (colours, image))
            raise DataError(mask, f"is {size} pixels, its image {picture.name} is {wanted}; they must be equal")
        return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(ids_of(colours.numpy(), mask)))


def ids_of(colours: np.ndarray, path: Path) -> np.ndarray:
    """Colours uint8 (3, H, W) as ids int64 (H, W).

    Raises:
        DataError: for a colour that stands for no class.
    """
    codes = (colours[0].astype(np.int64) << 16) | (colours[1].astype(np.int64) << 8) | colours[2]
    known = np.array([(r << 16) | (g << 8) | b for r, g, b in ISAID.values()])
    order = np.argsort(known)
    places = np.searchsorted(known[order], codes).clip(max=len(known) - 1)
    ids = order[places]
    strange = codes[known[ids] != codes]
    if strange.size:
        code = int(strange.flat[0])
        raise DataError(
            path, f"holds the colour {(code >> 16, code >> 8 & 255, code & 255)}, which is no class of iSAID"
        )
    return ids


def open_aerial(name_or_path: str, split: str = "train") -> Dataset:
    """An aerial data set by name or folder.

    Args:
        name_or_path: "terrain" or "terrain_buildings" (embedded, generated); a folder of iSAID (train/images, train/masks with coloured masks, val/…); or what
            `paperzoo.data.masks.open_masks` takes.
        split: "train" or "test".

    Raises:
        PaperZooError: if there is no such set.
        DataError: if the folder has none of these layouts, or a picture has no mask.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is one of train, test")
    if name_or_path in ("terrain", "terrain_buildings"):
        from paperzoo.data.terrain import TerrainMasks

        return TerrainMasks(split, buildings=name_or_path == "terrain_buildings")
    for name in SPLITS[split]:
        images, masks = Path(name_or_path, name, "images"), Path(name_or_path, name, "masks")
        if images.is_dir() and masks.is_dir() and any(masks.glob(f"*{ENDING}")):
            return ColouredMasks(images, masks)
    return open_masks(name_or_path, split)
