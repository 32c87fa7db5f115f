"""Cityscapes' panoptic annotations, as cityscapesscripts' createPanopticImgs writes them; and one door to all panoptic data.

    open_panoptic_data("path/to/cityscapes", "test")   gtFine/cityscapes_panoptic_val.json, gtFine/cityscapes_panoptic_val/*.png,
                                                       leftImg8bit/val/<city>/*_leftImg8bit.png
    open_panoptic_data(…)                              whatever else `paperzoo.data.panoptic.open_panoptic` takes

Items and attributes are those of `paperzoo.data.panoptic`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from paperzoo.data.coco import SPLITS, read_json
from paperzoo.data.panoptic import CocoPanoptic, open_panoptic
from paperzoo.errors import DataError


class CityscapesPanoptic(CocoPanoptic):
    """COCO's format with names in place of numbers: an image's id is "<city>_<sequence>_<frame>", which its files begin with.

    Raises:
        DataError: naming the file, if it is no such file; of a picture when it is asked for.
    """

    def __init__(self, annotations: str | Path, maps: str | Path, images: str | Path) -> None:
        self.file, self.maps, self.images = Path(annotations), Path(maps), Path(images)
        content = read_json(self.file)
        try:
            categories = sorted((int(c["id"]), str(c["name"]), bool(c["isthing"])) for c in content["categories"])
            self.labels = [name for _, name, _ in categories]
            self.category_ids = [number for number, _, _ in categories]
            self.things = frozenset(i for i, entry in enumerate(categories) if entry[2])
            frames = [str(entry["image_id"]) for entry in content["annotations"]]
            self.entries = [entry | {"image_id": i} for i, entry in enumerate(content["annotations"])]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                self.file, f"is no panoptic file with categories (isthing), images and annotations: {error!r}"
            ) from None
        if not self.entries:
            raise DataError(self.file, "has no annotations")
        self.names = [f"{frame.split('_')[0]}/{frame}_leftImg8bit.png" for frame in frames]
        self.rows = {number: i for i, number in enumerate(self.category_ids)}


def open_panoptic_data(data: str | Path, split: str = "train", **options: Any) -> Dataset:
    """Panoptic data of a split, "train" or "test": Cityscapes' layout, or what `open_panoptic` takes.

    Raises:
        DataError, PaperZooError: as `open_panoptic`.
    """
    from paperzoo.data.images import data_folder

    root = Path(data).expanduser()
    if not root.exists() and len(root.parts) == 1:
        root = data_folder() / root
    for name in SPLITS.get(split, ()):
        file = root / "gtFine" / f"cityscapes_panoptic_{name}.json"
        if file.is_file():
            return CityscapesPanoptic(file, file.with_suffix(""), root / "leftImg8bit" / name)
    return open_panoptic(data, split, **options)
