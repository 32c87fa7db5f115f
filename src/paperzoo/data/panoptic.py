"""Panoptic data: COCO's layout, and embedded scenes of things (drawn shapes) on stuff (two tinted grounds of four).

    open_panoptic("panoptic_scenes", "train")          always there
    open_panoptic("path/to/coco", "test")              annotations/panoptic_val2017.json, annotations/panoptic_val2017/*.png,
                                                       val2017/*.jpg
    open_panoptic("coco", "train")                     a folder of this name under $PAPERZOO_DATA or ~/.cache/paperzoo/data

An item is a dict:
    image   uint8 (3, H, W)
    map     `paperzoo.blocks.panoptic.PanopticMap`: categories are 0 … len(data.labels) - 1
    id      int, the file's own number of the image (or its position)
`data.labels` names the categories, `data.things` holds the countable ones.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from paperzoo.blocks.panoptic import PanopticMap, panoptic_map, rgb_to_ids
from paperzoo.data.coco import SPLITS, read_json
from paperzoo.data.shape_scenes import LABELS, shape_scenes
from paperzoo.errors import DataError, PaperZooError

STUFF = ["sea", "clay", "grass", "sand"]
TINTS = ((-40.0, -10.0, 40.0), (40.0, -20.0, -20.0), (-25.0, 35.0, -25.0), (30.0, 25.0, -45.0))


class PanopticScenes(Dataset):
    """The embedded scenes; see `panoptic_scenes`."""

    labels = [*LABELS, *STUFF]
    things = frozenset(range(len(LABELS)))

    def __init__(self, split: str, count: int = 64, size: int = 96, **options: Any) -> None:
        self.split, self.scenes = split, panoptic_scenes(count, size, split, **options)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict:
        return self.scenes[index] | {"id": index}

    def path(self, index: int) -> str:
        return f"{self.split} scene {index}"


@functools.lru_cache(maxsize=8)
def panoptic_scenes(
    count: int, size: int, split: str, max_objects: int = 4, scale: tuple[float, float] = (0.2, 0.45)
) -> list[dict[str, Any]]:
    """Shapes (`paperzoo.data.shape_scenes`) on two of four grounds, which a waving line parts and a tint tells apart.

    A strip of a few pixels along the line is in no segment, as the ground's border is not sure; crowds are marked. Kept in
    memory, so treat the tensors as read-only. `max_objects` and `scale` are those of `shape_scenes`.
    """
    rng = torch.Generator().manual_seed(count * 2 + (split == "test"))
    height, slope, phase = torch.rand(3, count, generator=rng)
    x = torch.arange(size) / size
    wave = (
        0.35
        + 0.3 * height[:, None]
        + 0.1 * (2 * torch.pi * (x + phase[:, None])).sin()
        + 0.2 * (slope[:, None] - 0.5) * x
    )
    line = wave[:, None, :] * size  # (N, 1, S)
    row = torch.arange(size)[None, :, None] + 0.5
    lower, unsure = row > line, (row - line).abs() < 0.02 * size
    upper = torch.randint(len(STUFF), (count,), generator=rng)
    other = (upper + torch.randint(1, len(STUFF), (count,), generator=rng)) % len(STUFF)
    tints = torch.tensor(TINTS)[..., None, None]
    tint = torch.where(lower[:, None], tints[other], tints[upper])
    scenes = []
    for i, scene in enumerate(shape_scenes(count, size, max_objects=max_objects, split=split, scale=scale)):
        ids = torch.where(lower[i], 2, 1).masked_fill(unsure[i], 0)
        covered = torch.zeros(size, size, dtype=torch.bool)
        categories, crowds = {1: len(LABELS) + int(upper[i]), 2: len(LABELS) + int(other[i])}, []
        for k, (mask, label) in enumerate(zip(scene["masks"], scene["labels"].tolist(), strict=True)):
            ids[mask], categories[3 + k] = 3 + k, label
            covered |= mask
            if scene["crowd"][k]:
                crowds.append(3 + k)
        image = torch.where(covered, scene["image"].float(), (scene["image"] + tint[i]).clamp(0, 255)).to(torch.uint8)
        found = panoptic_map(ids, categories, PanopticScenes.things, crowds)
        scenes.append({"image": image, "map": found})
    return scenes


class CocoPanoptic(Dataset):
    """COCO's panoptic annotations: a JSON file, a folder of pictures whose colours are ids, and the photographs.

    Raises:
        DataError: naming the file, and the image in it, if something does not fit; of a picture when it is asked for.
    """

    def __init__(self, annotations: str | Path, maps: str | Path, images: str | Path) -> None:
        self.file, self.maps, self.images = Path(annotations), Path(maps), Path(images)
        content = read_json(self.file)
        try:
            categories = sorted((int(c["id"]), str(c["name"]), bool(c["isthing"])) for c in content["categories"])
            self.labels = [name for _, name, _ in categories]
            self.category_ids = [number for number, _, _ in categories]
            self.things = frozenset(i for i, entry in enumerate(categories) if entry[2])
            names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
            self.entries = list(content["annotations"])
            self.names = [names[int(entry["image_id"])] for entry in self.entries]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                self.file, f"is no panoptic file with categories (isthing), images and annotations: {error!r}"
            ) from None
        if not self.entries:
            raise DataError(self.file, "has no annotations")
        self.rows = {number: i for i, number in enumerate(self.category_ids)}

    def __len__(self) -> int:
        return len(self.entries)

    def path(self, index: int) -> str:
        return str(self.images / self.names[index])

    def __getitem__(self, index: int) -> dict:
        from paperzoo.data.images import read_image

        image, entry = read_image(Path(self.path(index))), self.entries[index]
        found = self.map(index)
        if found.ids.shape != image.shape[1:]:
            raise DataError(self.path(index), f"has another size than its map {entry['file_name']}")
        return {"image": image, "map": found, "id": int(entry["image_id"])}

    def map(self, index: int) -> PanopticMap:
        """The map alone, without its photograph."""
        from paperzoo.data.images import read_image

        entry = self.entries[index]
        try:
            path = self.maps / entry["file_name"]
            described = {int(s["id"]): self.rows[int(s["category_id"])] for s in entry["segments_info"]}
            crowds = [int(s["id"]) for s in entry["segments_info"] if s.get("iscrowd")]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                self.file, f"image {entry.get('image_id')}: a segment needs id and a known category_id: {error!r}"
            ) from None
        try:
            return panoptic_map(rgb_to_ids(read_image(path)), described, self.things, crowds)
        except ValueError as error:
            raise DataError(path, f"{error} in {self.file.name}") from None


def open_panoptic(data: str | Path, split: str = "train", **options: Any) -> Dataset:
    """Panoptic data of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Args:
        options: of `PanopticScenes`, where that is the data.

    Raises:
        DataError: if the place is missing or its layout is not known.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is train or test")
    if str(data) == "panoptic_scenes":
        return PanopticScenes(split, **options)
    from paperzoo.data.images import data_folder

    root = Path(data).expanduser()
    if not root.exists() and len(root.parts) == 1:
        root = data_folder() / root
    if not root.is_dir():
        raise DataError(root, "no such folder; give panoptic_scenes or a folder in COCO's panoptic layout")
    for name in SPLITS[split]:
        for file in sorted((root / "annotations").glob(f"panoptic_{name}*.json"))[:1]:
            place = file.stem.removeprefix("panoptic_")
            folders = [base / n for n in (place, name) for base in (root, root / "images")]
            images = next((folder for folder in folders if folder.is_dir()), folders[0])
            return CocoPanoptic(file, file.with_suffix(""), images)
    looked = " or ".join(f"annotations/panoptic_{name}*.json" for name in SPLITS[split][:2])
    raise DataError(root, f"no panoptic annotations for the split '{split}'; looked for {looked}")
