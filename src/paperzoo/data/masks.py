"""Images with segmentation masks: folders of pictures and class-id pictures, Pascal VOC, ADE20K, Cityscapes, CamVid; three embedded sets.

An item is `(image, mask)`: `tv_tensors.Image` uint8 (3, H, W) and `tv_tensors.Mask` int64 (H, W) whose values are class ids
0 … K-1 or 255 for "do not count". Files are decoded when an item is asked for; a broken one raises `DataError` naming it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import tv_tensors

from paperzoo.data.images import HELD_OUT, SUFFIXES, read_image
from paperzoo.errors import DataError, PaperZooError

IGNORE = 255
IMAGE_FOLDERS = ("images", "leftImg8bit", "imgs", "img")
MASK_FOLDERS = ("masks", "annotations", "gtFine", "labels", "mask")
SPLITS = {"train": ("train", "training"), "test": ("val", "validation", "valid", "test", "testing")}

VOC_LABELS = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
CITYSCAPES_LABELS = (
    "road;sidewalk;building;wall;fence;pole;traffic light;traffic sign;vegetation;terrain;sky;person;rider;car;truck;bus;"
    "train;motorcycle;bicycle"
).split(";")
CAMVID_LABELS = (
    "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
)  # of SegNet's release
CITYSCAPES_IDS = (
    7,
    8,
    11,
    12,
    13,
    17,
    19,
    20,
    21,
    22,
    23,
    24,
    25,
    26,
    27,
    28,
    31,
    32,
    33,
)  # labelIds of the 19 classes


class MaskFiles(Dataset):
    """Pairs of an image file and a mask file.

    Args:
        pairs: (image, mask) paths.
        labels: class names; a mask may hold 0 … len(labels) - 1 and 255.
        remap: 256 values: what each stored id stands for (255: ignored); None keeps ids as they are.
    """

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], labels: Sequence[str], remap: np.ndarray | None = None
    ) -> None:
        self.pairs, self.labels, self.remap = list(pairs), list(labels), remap

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, i: int) -> Path:
        return self.pairs[i][0]

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        image_path, mask_path = self.pairs[i]
        image = read_image(image_path)
        ids = read_ids(mask_path)
        if self.remap is not None:
            if ids.max(initial=0) >= len(self.remap):
                raise DataError(
                    mask_path, f"holds the class id {ids.max()}; this layout stores ids up to {len(self.remap) - 1}"
                )
            ids = self.remap[ids]
        if ids.shape != image.shape[1:]:
            raise DataError(
                mask_path,
                f"is {_size(ids.shape)} pixels, its image {image_path.name} is {_size(image.shape[1:])}; they must be equal",
            )
        strange = ids[(ids >= len(self.labels)) & (ids != IGNORE)]
        if strange.size:
            raise DataError(
                mask_path,
                f"holds the class id {strange.flat[0]}; known are 0 to {len(self.labels) - 1} and {IGNORE} for 'ignore'",
            )
        return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(ids.astype(np.int64)))


class SceneMasks(Dataset):
    """The embedded sets: real digit scans on real photographs, with exact masks.

    "digit_ink" has two classes, background and digit; in "digit_scenes" class d + 1 is the digit d. The splits share no scan and no
    part of a photograph. Digits are larger than in the detection scenes: a stroke must survive a stride of 8.
    """

    def __init__(self, split: str, by_class: bool) -> None:
        from paperzoo.data.scenes import digit_scenes

        self.scenes = digit_scenes(
            1024 if split == "train" else 128, size=64, max_objects=2, split=split, scale=(0.5, 0.8)
        )
        self.labels = ["background", *map(str, range(10))] if by_class else ["background", "digit"]
        self.by_class = by_class

    def __len__(self) -> int:
        return len(self.scenes)

    def path(self, i: int) -> str:
        return f"digit scene {i}"

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        scene = self.scenes[i]
        ids = torch.zeros(scene["image"].shape[1:], dtype=torch.int64)
        for label, mask in zip(scene["labels"], scene["masks"], strict=True):
            ids[mask] = label + 1 if self.by_class else 1
        return tv_tensors.Image(scene["image"]), tv_tensors.Mask(ids)


class ShapeMasks(Dataset):
    """ "shape_masks": drawn shapes and real digit scans over real photographs, with exact masks of eight classes.

    Shapes of 40 to 80% of the image partly hide one another; a digit lies in front of them in half of the scenes. A tenth of the
    shapes' scenes are empty, some hold a shape of one pixel, and in some a crowd of tiny shapes does not count (255). The splits share no
    scan and no part of a photograph. Made in about three seconds and kept.
    """

    def __init__(self, split: str) -> None:
        from paperzoo.data.shape_scenes import LABELS

        self.labels = ["background", *LABELS, "digit"]
        self.images, self.masks = shape_masks(1024 if split == "train" else 192, split)

    def __len__(self) -> int:
        return len(self.images)

    def path(self, i: int) -> str:
        return f"shape scene {i}"

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        return tv_tensors.Image(self.images[i]), tv_tensors.Mask(self.masks[i].long())


@functools.cache
def shape_masks(count: int, split: str, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, 3, size, size) and class ids uint8 (N, size, size): 0, shapes from 1, the digit last; 255 for a crowd."""
    from paperzoo.data.scenes import digit_scenes
    from paperzoo.data.shape_scenes import LABELS, shape_scenes

    shapes = shape_scenes(count, size, max_objects=2, split=split, scale=(0.4, 0.8))
    images = torch.stack([scene["image"] for scene in shapes]).float() / 255
    ids = torch.zeros(count, size, size, dtype=torch.uint8)
    for of_scene, scene in zip(ids, shapes, strict=True):
        meant = torch.where(scene["crowd"], IGNORE, scene["labels"] + 1).to(torch.uint8)
        of_scene += (scene["masks"] * meant[:, None, None]).sum(0, dtype=torch.uint8)  # they do not overlap

    # A digit before every other scene: its scan's ink, with a soft edge, much lighter or darker than what it covers.
    digits = digit_scenes(count, size, seed=1, max_objects=1, split=split, scale=(0.5, 0.8))
    ink = torch.stack([scene["masks"].any(0) for scene in digits]).float()[:, None]
    ink[::2] = 0
    ink = F.avg_pool2d(ink, 3, 1, 1)
    covered = (images.mean(1, keepdim=True) * ink).sum((1, 2, 3)) / ink.sum((1, 2, 3)).clamp(min=1)
    rng = torch.Generator().manual_seed(2 * count + (split == "test"))
    strength = 0.35 + 0.15 * torch.rand(count, generator=rng)
    bright = covered + torch.where(covered < 0.5, strength, -strength)
    colour = (bright[:, None] + 0.3 * (torch.rand(count, 3, generator=rng) - 0.5)).clamp(0, 1)
    images = torch.lerp(images, colour[:, :, None, None], ink)
    ids[ink[:, 0] > 0.5] = len(LABELS) + 1
    return (images * 255).round().to(torch.uint8), ids


EMBEDDED: dict[str, Callable[[str], Dataset]] = {
    "digit_ink": lambda split: SceneMasks(split, by_class=False),
    "digit_scenes": lambda split: SceneMasks(split, by_class=True),
    "shape_masks": ShapeMasks,
}


def open_masks(name_or_path: str, split: str = "train") -> Dataset:
    """A segmentation data set by name or folder.

    Args:
        name_or_path: "digit_ink", "digit_scenes" or "shape_masks" (embedded), or a folder in one of these layouts:
            `images/` and `masks/` with equal file names, with or without `train/` and `val/` inside (every fifth image is held out
            without) and optionally `labels.txt`, one class name a line; `ADEChallengeData2016`; Cityscapes (`leftImg8bit`, `gtFine`);
            Pascal VOC (`JPEGImages`, `SegmentationClass`, `ImageSets/Segmentation`); CamVid as SegNet's authors gave it out
            (`train`, `trainannot`, `test`, `testannot`).
        split: "train" or "test".

    Raises:
        PaperZooError: if there is no such set.
        DataError: if the folder has none of these layouts, or an image has no mask.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is one of train, test")
    if name_or_path in EMBEDDED:
        return EMBEDDED[name_or_path](split)
    root = Path(name_or_path)
    if not root.is_dir():
        raise PaperZooError(
            f"data '{name_or_path}' is neither an embedded segmentation set ({', '.join(EMBEDDED)}) nor a folder"
        )
    if (root / "trainannot").is_dir():
        return _open_camvid(root, split)
    voc = _voc_root(root)
    return _open_voc(voc, split) if voc else _open_folders(root, split)


# -- folders ---------------------------------------------------------------------------------------------------------


def _open_folders(root: Path, split: str) -> MaskFiles:
    images, masks = _first(root, IMAGE_FOLDERS), _first(root, MASK_FOLDERS)
    if images is None or masks is None:
        raise DataError(
            root, "needs the folders images/ and masks/ (or JPEGImages/ and SegmentationClass/, as Pascal VOC)"
        )
    pairs = {name: _pairs(images, masks, name) for name in SPLITS}
    labels = _read_labels(root)
    if masks.name == "gtFine":
        by_train_id = pairs["train"] and pairs["train"][0][1].stem.endswith("TrainIds")
        remap = None if by_train_id else _table(dict(zip(CITYSCAPES_IDS, range(19), strict=True)))
        return MaskFiles(pairs[split], labels or CITYSCAPES_LABELS, remap)
    if masks.name == "annotations" and (masks / "training").is_dir():  # ADE20K: 0 is "other", which does not count
        labels = labels or [f"class {i}" for i in range(1, 151)]
        return MaskFiles(pairs[split], labels, _table({i + 1: i for i in range(len(labels))}))
    remap = None
    if labels is None or len(labels) == 2:
        found = _ids_in(mask for _, mask in pairs["train"])
        if found == {0, 255}:  # a black-and-white mask: white is the object
            remap, labels = _table({0: 0, 255: 1}), labels or ["background", "object"]
        labels = labels or [f"class {i}" for i in range(max(found - {IGNORE}, default=0) + 1)]
    return MaskFiles(pairs[split], labels, remap)


def _pairs(images: Path, masks: Path, split: str) -> list[tuple[Path, Path]]:
    """Each picture with its mask: the same relative name, up to the extension and Cityscapes' endings."""
    inside = _first(images, SPLITS[split])
    if inside is None and any((images / name).is_dir() for names in SPLITS.values() for name in names):
        raise DataError(images, f"has no folder for the split '{split}'; expected one of {', '.join(SPLITS[split])}")
    folder = masks if inside is None else masks / inside.name
    source = inside or images
    by_key: dict[str, Path] = {}
    for mask in _pictures(folder):
        key = _key(mask.relative_to(folder))
        if key is not None and (key not in by_key or mask.stem.endswith("TrainIds")):
            by_key[key] = mask
    pictures = _pictures(source)
    if not pictures:
        raise DataError(source, f"has no pictures ({', '.join(sorted(SUFFIXES))})")
    pairs = []
    for i, image in enumerate(pictures):
        if inside is None and (i % HELD_OUT == HELD_OUT - 1) != (split == "test"):
            continue
        mask = by_key.get(_key(image.relative_to(source)))
        if mask is None:
            raise DataError(image, f"has no mask; expected {folder / image.relative_to(source).with_suffix('.png')}")
        pairs.append((image, mask))
    if not pairs:
        raise DataError(
            source, f"has too few pictures to hold any out for testing: at least {HELD_OUT} are needed, or a val folder"
        )
    return pairs


def _key(relative: Path) -> str | None:
    stem = relative.with_suffix("").as_posix()
    if stem.endswith(("_gtFine_color", "_gtFine_instanceIds")):
        return None
    for ending in ("_leftImg8bit", "_gtFine_labelTrainIds", "_gtFine_labelIds", "_mask"):
        stem = stem.removesuffix(ending)
    return stem


def _read_labels(root: Path) -> list[str] | None:
    path = root / "labels.txt"
    if not path.is_file():
        return None
    labels = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(labels) < 2:
        raise DataError(path, "needs at least two class names, one a line, the first for id 0")
    return labels


def _ids_in(masks: Iterable[Path]) -> set[int]:
    """All ids in all masks; reads every file, so a labels.txt makes opening a large set faster."""
    from tqdm import tqdm

    found: set[int] = set()
    for mask in tqdm(list(masks), desc="reading class ids", delay=1.0, leave=False, disable=None):
        try:
            found.update(np.unique(read_ids(mask)).tolist())
        except DataError:
            continue  # reported when the file's turn comes
    return found


# -- CamVid ----------------------------------------------------------------------------------------------------------


def _open_camvid(root: Path, split: str) -> MaskFiles:
    """Eleven classes; the twelfth id, 11, does not count. `test` is testannot/, or valannot/ where that is missing."""
    names = ("train",) if split == "train" else ("test", "val")
    for name in names:
        images, masks = root / name, root / f"{name}annot"
        if images.is_dir() and masks.is_dir():
            break
    else:
        raise DataError(root, f"has no folders {' or '.join(f'{name}/ with {name}annot/' for name in names)}")
    pairs = []
    for image in _pictures(images):
        mask = masks / f"{image.stem}.png"
        if not mask.is_file():
            raise DataError(image, f"has no mask; expected {mask}")
        pairs.append((image, mask))
    if not pairs:
        raise DataError(images, f"has no pictures ({', '.join(sorted(SUFFIXES))})")
    return MaskFiles(pairs, CAMVID_LABELS, _table({i: i for i in range(len(CAMVID_LABELS))}))


# -- Pascal VOC ------------------------------------------------------------------------------------------------------


def _voc_root(root: Path) -> Path | None:
    for path in (
        root,
        *sorted(root.glob("VOC20*"), reverse=True),
        *sorted(root.glob("VOCdevkit/VOC20*"), reverse=True),
    ):
        if (path / "JPEGImages").is_dir():
            return path
    return None


def _open_voc(root: Path, split: str) -> MaskFiles:
    """`train` is ImageSets/Segmentation/train.txt, or train_aug.txt with SegmentationClassAug (SBD) where that exists; `test` is val.txt."""
    lists = root / "ImageSets" / "Segmentation"
    wanted = [("val.txt", "SegmentationClass")]
    if split == "train":
        augmented = [(name, "SegmentationClassAug") for name in ("train_aug.txt", "trainaug.txt")]
        wanted = [*augmented, ("train.txt", "SegmentationClass")]
    for name, folder in wanted:
        if (lists / name).is_file() and (root / folder).is_dir():
            break
    else:
        raise DataError(lists, f"needs {wanted[-1][0]} and the folder {root / wanted[-1][1]}")
    pairs = []
    for line in (lists / name).read_text(encoding="utf-8").split():
        image, mask = root / "JPEGImages" / f"{line}.jpg", root / folder / f"{line}.png"
        for path in (image, mask):
            if not path.is_file():
                raise DataError(lists / name, f"names '{line}', but {path} does not exist")
        pairs.append((image, mask))
    if not pairs:
        raise DataError(lists / name, "is empty; one image name a line is expected")
    return MaskFiles(pairs, VOC_LABELS)


# -- files -----------------------------------------------------------------------------------------------------------


def read_ids(path: str | Path) -> np.ndarray:
    """A mask file as int64 (H, W): grey values, or the indices (not the colours) of a palette picture.

    Raises:
        DataError: if the file is missing, broken, or a colour picture.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            return _stored_ids(picture, path)
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(path, f"not a readable mask ({type(error).__name__}: {str(error)[:120]})") from None


def _stored_ids(picture: Image.Image, path: str | Path) -> np.ndarray:
    if picture.mode in ("RGB", "RGBA"):
        pixels = np.array(picture)[..., :3]
        if (pixels == pixels[..., :1]).all():
            return pixels[..., 0].astype(np.int64)
        raise DataError(path, "is a colour picture; a mask stores class ids as 8-bit grey values or palette indices")
    if picture.mode not in ("P", "L", "1", "I", "I;16"):
        raise DataError(
            path, f"has the pixel mode {picture.mode}; a mask stores class ids as 8-bit grey values or palette indices"
        )
    return np.array(picture).astype(np.int64)


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(folder, "is not a folder")
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _table(known: dict[int, int]) -> np.ndarray:
    table = np.full(256, IGNORE, dtype=np.int64)
    for stored, meaning in known.items():
        table[stored] = meaning
    return table


def _size(shape) -> str:
    return f"{shape[-1]} x {shape[-2]}"
