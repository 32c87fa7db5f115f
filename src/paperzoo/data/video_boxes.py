"""Videos with boxes: ImageNet VID, COCO-like files of videos (TAO, CocoVID), MOT Challenge, and the embedded blurred digits.

    open_video_boxes("blurred_digits", "train")     digits that move, blur and hide over photographs, always there
    open_video_boxes("path/to/ILSVRC", "test")      Data/VID/val/<video>/000000.JPEG and Annotations/VID/val/<video>/000000.xml
    open_video_boxes("path/to/TAO", "train")        annotations/train*.json with videos, images, annotations; pictures in frames/, images/ or beside it
    open_video_boxes("path/to/MOT17", "train")      train/<sequence>/img1/000001.jpg and gt/gt.txt; the first half of each learns, the second tests
    open_video_boxes("vid", "train")                a folder of this name under $PAPERZOO_DATA or ~/.cache/paperzoo/data

A `VideoBoxes` has videos 0 … len - 1, each with frames 0 … length(v) - 1:
    labels           the class names
    image(v, t)      uint8 (3, H, W)
    truth(v, t)      boxes float32 (N, 4), x1 y1 x2 y2 in pixels, x2 and y2 exclusive, inside the image; labels int64 (N,); tracks int64 (N,), equal
                     for the same object within a video; crowd bool (N,), not learned from, ignored in evaluation; area float32 (N,)
    annotated(v)     the frames that have annotations (N may be 0 there); sets annotate all of a video, or some
    degraded(v)      bool (length(v),), frames that are blurred or hidden; None where nobody knows
"""

from __future__ import annotations

import configparser
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from paperzoo.data.coco import SPLITS, CocoDetection, DetectionData, open_detection, read_json, read_xml
from paperzoo.data.images import data_folder, is_picture, read_image
from paperzoo.errors import DataError, PaperZooError

VID_CLASSES = {
    "n02691156": "airplane", "n02419796": "antelope", "n02131653": "bear", "n02834778": "bicycle", "n01503061": "bird",
    "n02924116": "bus", "n02958343": "car", "n02402425": "cattle", "n02084071": "dog", "n02121808": "domestic cat",
    "n02503517": "elephant", "n02118333": "fox", "n02510455": "giant panda", "n02342885": "hamster", "n02374451": "horse",
    "n02129165": "lion", "n01674464": "lizard", "n02484322": "monkey", "n03790512": "motorcycle", "n02324045": "rabbit",
    "n02509815": "red panda", "n02411705": "sheep", "n01726692": "snake", "n02355227": "squirrel", "n02129604": "tiger",
    "n04468005": "train", "n01662784": "turtle", "n04530566": "watercraft", "n02062744": "whale", "n02391049": "zebra",
}  # fmt: skip
"""ImageNet VID's thirty classes by their WordNet numbers, in the challenge's order."""

MOT_PERSON, MOT_LIKE_PERSONS = 1, (2, 7, 8, 12)  # a pedestrian; on a vehicle, static, a distractor, a reflection


class VideoBoxes:
    """What the readers share; see the module's docstring. A reader gives `__len__`, `length`, `path`, `rows` and the pictures."""

    labels: list[str]

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} does not say how many videos it has")

    def length(self, video: int) -> int:
        raise NotImplementedError(f"{type(self).__name__} does not say how long its videos are")

    def path(self, video: int, frame: int = 0) -> str:
        raise NotImplementedError(f"{type(self).__name__} does not say where its frames are")

    def rows(self, video: int, frame: int) -> tuple[Any, Any, Any, Any]:
        """Boxes (N, 4), labels, tracks and crowd (N,) of a frame, as they are annotated."""
        raise NotImplementedError(f"{type(self).__name__} has no annotations")

    def image(self, video: int, frame: int) -> Tensor:
        picture = read_image(self.path(video, frame))
        if tuple(picture.shape[1:]) != self.size(video):
            height, width = self.size(video)
            found = f"{picture.shape[2]}x{picture.shape[1]}"
            raise DataError(self.path(video, frame), f"is {found} pixels, its video {width}x{height}")
        return picture

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a data set lives as long as its run
    def size(self, video: int) -> tuple[int, int]:
        """Height and width of a video, from its first frame."""
        path = self.path(video, 0)
        try:
            with Image.open(path) as picture:
                return picture.height, picture.width
        except (OSError, ValueError) as error:
            raise DataError(path, f"not a readable image ({type(error).__name__})") from None

    def annotated(self, video: int) -> list[int]:
        return list(range(self.length(video)))

    def degraded(self, video: int) -> Tensor | None:
        return None

    def truth(self, video: int, frame: int) -> dict[str, Tensor]:
        """The objects of a frame. Boxes are cut to the image; those without any area left are dropped."""
        height, width = self.size(video)
        boxes, labels, tracks, crowd = self.rows(video, frame)
        boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=torch.float32))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return {
            "boxes": boxes[kept],
            "labels": torch.as_tensor(labels, dtype=torch.int64)[kept],
            "tracks": torch.as_tensor(tracks, dtype=torch.int64)[kept],
            "crowd": torch.as_tensor(crowd, dtype=torch.bool)[kept],
            "area": (boxes[kept, 2:] - boxes[kept, :2]).prod(1),
        }


class PictureFolders(VideoBoxes):
    """Videos that are folders of pictures, in the order of their names."""

    def __init__(self, labels: list[str], folders: list[Path]) -> None:
        self.labels, self.folders = labels, folders

    def __len__(self) -> int:
        return len(self.folders)

    @functools.lru_cache(maxsize=65536)  # noqa: B019 - a data set lives as long as its run
    def files(self, video: int) -> list[Path]:
        found = sorted(p for p in self.folders[video].iterdir() if is_picture(p))
        if not found:
            raise DataError(self.folders[video], "holds no pictures; a folder a video, a picture a frame is needed")
        return found

    def length(self, video: int) -> int:
        return len(self.files(video))

    def path(self, video: int, frame: int = 0) -> str:
        return str(self.files(video)[frame])


# -- ImageNet VID --------------------------------------------------------------------------------------------------------


class ImageNetVid(PictureFolders):
    """ImageNet VID: an XML file a frame, with a WordNet number and a track number an object.

    Pixels are counted from 0 and the upper corner is inclusive; here it is exclusive. Objects of other classes are passed over,
    as the challenge does.

    Raises:
        DataError: naming the XML or image file, when the frame is asked for.
    """

    def __init__(self, root: Path, folders: list[Path]) -> None:
        super().__init__(list(VID_CLASSES.values()), folders)
        self.pictures, self.notes = root / "Data" / "VID", root / "Annotations" / "VID"

    def rows(self, video: int, frame: int) -> tuple[list, list, list, list]:
        path = (self.notes / self.files(video)[frame].relative_to(self.pictures)).with_suffix(".xml")
        boxes, labels, tracks = annotated_objects(path, tracked=True)
        return boxes, labels, tracks, [False] * len(boxes)


class ImageNetDet(DetectionData):
    """Pictures of ImageNet DET that show VID's thirty classes, for learning beside the videos; other objects in them are passed over.

    Which pictures is in a list: lines "train/ILSVRC2013_train/n02691156/n02691156_10012 1", as the authors' DET_train_30classes.txt.

    Raises:
        DataError: naming the list, or the XML or image file when the sample is asked for.
    """

    def __init__(self, root: Path, names: Path) -> None:
        self.root, self.labels = root, list(VID_CLASSES.values())
        try:
            self.names = [line.split()[0] for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(names, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if not self.names:
            raise DataError(names, "lists no pictures")

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return str(self.root / "Data" / "DET" / f"{self.names[index]}.JPEG")

    def __getitem__(self, index: int) -> dict:
        note = self.root / "Annotations" / "DET" / f"{self.names[index]}.xml"
        boxes, labels, _ = annotated_objects(note, tracked=False)
        area = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes]
        return self.item(read_image(self.path(index)), boxes, labels, [False] * len(boxes), area, index)


def annotated_objects(path: Path, tracked: bool) -> tuple[list, list, list]:
    """The thirty classes' boxes, upper corners exclusive, labels and (where `tracked`) tracks in one of ImageNet's XML files."""
    numbers = {number: i for i, number in enumerate(VID_CLASSES)}
    boxes, labels, tracks = [], [], []
    for number, entry in enumerate(read_xml(path).iter("object"), 1):
        name, corners = (entry.findtext("name") or "").strip(), entry.find("bndbox")
        try:
            x1, y1, x2, y2 = (float(corners.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
            track = int(entry.findtext("trackid")) if tracked else number
        except (AttributeError, TypeError, ValueError):
            needed = "a trackid and a bndbox" if tracked else "a bndbox"
            raise DataError(path, f"object {number} ({name}) needs {needed} with xmin, ymin, xmax, ymax") from None
        if not all(map(math.isfinite, (x1, y1, x2, y2))) or x2 < x1 or y2 < y1:
            raise DataError(
                path, f"object {number} ({name}) spans from {x1:g}, {y1:g} to {x2:g}, {y2:g}: that is no box"
            )
        if name in numbers:
            boxes.append((x1, y1, x2 + 1, y2 + 1))
            labels.append(numbers[name])
            tracks.append(track)
    return boxes, labels, tracks


def open_imagenet_vid(root: Path, split: str) -> ImageNetVid:
    base = root / "Data" / "VID" / ("train" if split == "train" else "val")
    if not base.is_dir():
        raise DataError(base, f"no such folder; ImageNet VID keeps the split '{split}' there")
    # train has parts of 1,000 videos, val and small copies have the videos themselves
    folders = []
    for place in sorted(p for p in base.iterdir() if p.is_dir()):
        inner = sorted(p for p in place.iterdir() if p.is_dir())
        folders += inner or [place]
    if not folders:
        raise DataError(base, "no folders of videos in it")
    return ImageNetVid(root, folders)


# -- COCO's format with videos -------------------------------------------------------------------------------------------


class CocoVideos(VideoBoxes):
    """A COCO file whose images belong to videos: `videos` with ids; images with `video_id` and `frame_index` (or `frame_id`);
    annotations with `track_id` (or `instance_id`). As TAO, CocoVID and many others have it. The listed images are the video.

    Raises:
        DataError: naming the file, and the entry in it, if something does not fit.
    """

    def __init__(self, file: Path, folder: Path) -> None:
        content = read_json(file)
        self.coco = _Tracked(file, folder)
        self.labels = self.coco.labels
        for key in ("videos", "images"):
            if not isinstance(content.get(key), list) or not content[key]:
                raise DataError(
                    file, f"has no list '{key}'; a file of videos has videos, images, annotations, categories"
                )
        order: dict[int, list[tuple[int, int]]] = {}
        for row, entry in enumerate(content["images"]):
            number = next((entry[k] for k in ("frame_index", "frame_id") if k in entry), None)
            if number is None or "video_id" not in entry:
                raise DataError(file, f"image {entry.get('id')} has no video_id or no frame_index")
            order.setdefault(int(entry["video_id"]), []).append((int(number), row))
        known = [int(entry["id"]) for entry in content["videos"]]
        strange = next((video for video in order if video not in set(known)), None)
        if strange is not None:
            raise DataError(file, f"video_id {strange} of an image is not among the file's videos")
        self.order = [[row for _, row in sorted(order[video])] for video in known if video in order]

    def __len__(self) -> int:
        return len(self.order)

    def length(self, video: int) -> int:
        return len(self.order[video])

    def path(self, video: int, frame: int = 0) -> str:
        return self.coco.path(self.order[video][frame])

    def rows(self, video: int, frame: int) -> tuple:
        c, row = self.coco, self.order[video][frame]
        rows = slice(c.first[row], c.first[row + 1])
        return c.boxes[rows], c.targets[rows], c.tracks[rows], c.crowd[rows]


class _Tracked(CocoDetection):
    """The annotations of a COCO file with their tracks, in the same order."""

    def _read_boxes(self, annotations: Any) -> None:
        super()._read_boxes(annotations)
        rows = {number: i for i, number in enumerate(self.ids)}
        tracks = []
        for a in annotations:
            number = next((a[k] for k in ("track_id", "instance_id") if a.get(k) is not None), None)
            if not isinstance(number, int):
                raise DataError(self.file, f"annotation {a.get('id')} has no track_id; whole numbers are needed")
            tracks.append(number)
        order = np.argsort([rows[int(a["image_id"])] for a in annotations], kind="stable")
        self.tracks = np.asarray(tracks, np.int64)[order]


def open_coco_videos(root: Path, split: str) -> CocoVideos:
    """annotations/<split>*.json (or instances_<split>*.json); file names start from frames/, images/, <split>/ or the folder itself."""
    for name in SPLITS[split]:
        files = [f for p in ("", "instances_", "*_") for f in sorted((root / "annotations").glob(f"{p}{name}*.json"))]
        if files:
            first = read_json(files[0]).get("images") or [{}]
            shown = str(first[0].get("file_name"))
            places = [root / place for place in ("frames", "images", name, "")]
            folder = next((p for p in places if (p / shown).is_file()), None)
            if folder is None:
                raise DataError(
                    files[0], f"its first picture, {shown}, is not in frames/, images/ or {name}/ beside it"
                )
            return CocoVideos(files[0], folder)
    raise DataError(root, f"no annotations for the split '{split}'; looked for annotations/{SPLITS[split][0]}*.json")


# -- MOT Challenge -------------------------------------------------------------------------------------------------------


class MotVideos(PictureFolders):
    """MOT Challenge's sequences: gt/gt.txt with frame, track, x, y, width, height, considered, class, visibility.

    One class, "pedestrian". What is not considered, and what looks like a person but is none, is `crowd`; cars and the like are left out.
    The test sequences have no public truth, so that the first half of each training sequence learns and the second half tests.

    Raises:
        DataError: naming the file and the line that cannot be read.
    """

    def __init__(self, folders: list[Path], split: str) -> None:
        super().__init__(["pedestrian"], folders)
        self.split = split

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - a data set lives as long as its run
    def files(self, video: int) -> list[Path]:
        place, folder = "img1", self.folders[video]
        settings = configparser.ConfigParser()
        if (folder / "seqinfo.ini").is_file() and settings.read(folder / "seqinfo.ini", encoding="utf-8"):
            place = settings.get("Sequence", "imDir", fallback=place)
        found = sorted(p for p in (folder / place).glob("*") if is_picture(p))
        if len(found) < 2:
            raise DataError(folder / place, "holds fewer than two pictures")
        half = (len(found) + 1) // 2
        return found[:half] if self.split == "train" else found[half:]

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - a data set lives as long as its run
    def table(self, video: int) -> np.ndarray:
        """Rows frame, track, x1, y1, x2, y2, crowd."""
        path = self.folders[video] / "gt" / "gt.txt"
        rows = []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = [float(v) for v in line.split(",")]
                frame, track, x, y, width, height, considered = values[:7]
                finite = all(map(math.isfinite, values[:7]))
            except ValueError:
                finite = False
            if not finite or width < 0 or height < 0:
                raise DataError(path, f"line {number} is not frame,track,x,y,width,height,considered,…: '{line[:40]}'")
            kind = int(values[7]) if len(values) > 7 else -1  # 2015's files have no classes
            person = kind in (MOT_PERSON, -1)
            if person or kind in MOT_LIKE_PERSONS:
                crowd = not (person and considered)
                rows.append((frame, track, x - 1, y - 1, x - 1 + width, y - 1 + height, crowd))  # counted from 1
        return np.asarray(rows, np.float64).reshape(-1, 7)

    def rows(self, video: int, frame: int) -> tuple:
        table, name = self.table(video), self.files(video)[frame].stem
        if not name.isdigit():
            raise DataError(self.path(video, frame), "its name is no frame number")
        here = table[table[:, 0] == int(name)]
        return here[:, 2:6], np.zeros(len(here)), here[:, 1], here[:, 6]


# -- finding the files ---------------------------------------------------------------------------------------------------


def open_video_boxes(data: str | Path, split: str = "train", **options: Any) -> VideoBoxes:
    """The videos of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Args:
        options: of `paperzoo.data.blurred_digits.BlurredDigits`, where that is the data.

    Raises:
        DataError: if the place is missing or its layout is not known.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is train or test")
    if str(data) == "blurred_digits":
        from paperzoo.data.blurred_digits import BlurredDigits

        return BlurredDigits(split, **options)
    root = place_of(data)
    if not root.is_dir():
        raise DataError(
            root, "no such folder; give blurred_digits, or a folder in ImageNet VID's, TAO's or MOT's layout"
        )
    if (root / "Data" / "VID").is_dir():
        return open_imagenet_vid(root, split)
    if (root / "annotations").is_dir():
        return open_coco_videos(root, split)
    sequences = sorted(p.parent.parent for p in root.glob("train/*/gt/gt.txt"))
    if sequences:
        return MotVideos(sequences, split)
    looked = "Data/VID (ImageNet VID), annotations/*.json (TAO, CocoVID), train/*/gt/gt.txt (MOT Challenge)"
    raise DataError(root, f"no videos with boxes in it; looked for {looked}")


def open_stills(data: str | Path) -> DetectionData:
    """Pictures to learn from beside videos: ImageNet DET by the list ImageSets/DET_train_30classes.txt, or any set of `open_detection`.

    Raises:
        DataError: if the place is missing or its layout is not known.
    """
    root = place_of(data)
    if (root / "Annotations" / "DET").is_dir():
        return ImageNetDet(root, root / "ImageSets" / "DET_train_30classes.txt")
    return open_detection(data, "train")


def place_of(data: str | Path) -> Path:
    """A path as it is, or a name under the folder of data sets."""
    root = Path(data).expanduser()
    return data_folder() / root if not root.exists() and len(root.parts) == 1 else root
