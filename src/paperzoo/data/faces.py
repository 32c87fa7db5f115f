"""Face detection data: WIDER FACE and its landmarks, CelebA, COCO files with keypoints, and the embedded drawn faces.

    open_face_detection("drawn_faces", "train")      drawn people on photographs, always there
    open_face_detection("path/to/wider", "test")     wider_face_split/*_bbx_gt.txt with WIDER_val/images/; see `open_wider`
    open_face_detection("path/to/retinaface", …)     train/label.txt with train/images/: the landmarks of RetinaFace
    open_face_detection("path/to/celeba", …)         list_bbox_celeba.txt and list_landmarks_celeba.txt with img_celeba/
    open_face_detection("path/to/coco", …)           COCO's layout, five keypoints an annotation where there are landmarks
    open_face_detection("wider_face", …)             a folder of this name under $PAPERZOO_DATA or ~/.cache/paperzoo/data

An item is a dict:
    image           uint8 (3, H, W)
    boxes           float32 (N, 4), x1 y1 x2 y2 in pixels, x2 and y2 exclusive, cut to the image; without any area: dropped
    landmarks       float32 (N, 5, 2), x and y in pixels: the eyes, the nose, the corners of the mouth, left ones (in the
                    picture) first; zeros where there are none
    has_landmarks   bool (N,)
    ignored         bool (N,): too small or unclear to be judged (WIDER's "invalid"): not learned from, and neither found
                    nor wrongly found in evaluation
    subsets         bool (N, 3): which of the faces count in the easy, medium and hard subset; absent where nobody says
    id              int, the number of the image
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.coco import CocoDetection, open_coco
from paperzoo.data.face_drawing import LANDMARKS
from paperzoo.data.face_scenes import EASY, MEDIUM, drawn_faces
from paperzoo.errors import DataError, PaperZooError

SUBSETS = ("easy", "medium", "hard")
POINTS = len(LANDMARKS)
PARTS = {"train": "train", "test": "val"}  # WIDER FACE has no public annotations for its own test images
CELEBA_PARTS = {"train": (0,), "test": (1, 2)}
CELEBA_BOX = "list_bbox_celeba.txt"


class FaceData(Dataset):
    """Images with faces: rows of a table by image, decoded when asked for. `path(i)` names image i.

    Args:
        paths: of the images.
        faces: for each image (N, 4) boxes x1 y1 x2 y2, of any place and size.
        landmarks: for each image (N, 10), x1 y1 … x5 y5, NaN where a face has none; None where no face has any.
        ignored: for each image bool (N,); None where no face is.
        subsets: for each image bool (N, 3); None where nobody says.
    """

    labels = ["face"]

    def __init__(
        self,
        paths: Sequence[str | Path],
        faces: Sequence[np.ndarray],
        landmarks: Sequence[np.ndarray] | None = None,
        ignored: Sequence[np.ndarray] | None = None,
        subsets: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.paths, self.faces, self.landmarks = [str(p) for p in paths], faces, landmarks
        self.ignored, self.subsets = ignored, subsets

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return self.paths[index]

    def image(self, index: int) -> Tensor:
        from paperzoo.data.images import read_image

        return read_image(self.paths[index])

    def __getitem__(self, index: int) -> dict:
        rows = [None if t is None else t[index] for t in (self.landmarks, self.ignored, self.subsets)]
        return make_item(self.image(index), self.faces[index], *rows, index)


def make_item(
    image: Tensor,
    boxes: np.ndarray,
    landmarks: np.ndarray | None,
    ignored: np.ndarray | None,
    subsets: np.ndarray | None,
    number: int,
) -> dict:
    """One sample in the common form; see the module's docstring."""
    boxes = torch.as_tensor(np.asarray(boxes, dtype=np.float32)).reshape(-1, 4)
    count = len(boxes)
    limit = torch.tensor([image.shape[2], image.shape[1]] * 2, dtype=torch.float32)
    boxes = boxes.clamp(min=0).minimum(limit)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if landmarks is None:
        landmarks = np.full((count, 2 * POINTS), np.nan)
    points = torch.as_tensor(np.asarray(landmarks, dtype=np.float32)).reshape(-1, POINTS, 2)
    marked = torch.isfinite(points).flatten(1).all(1)
    item = {
        "image": image,
        "boxes": boxes[kept],
        "landmarks": torch.where(marked[:, None, None], points, 0.0)[kept],
        "has_landmarks": marked[kept],
        "ignored": torch.zeros(count, dtype=torch.bool)[kept] if ignored is None else torch.from_numpy(ignored)[kept],
        "id": number,
    }
    return item if subsets is None else item | {"subsets": torch.from_numpy(subsets)[kept]}


class DrawnFaces(FaceData):
    """`paperzoo.data.face_scenes.drawn_faces` as a data set.

    Easy are faces of 32 pixels of height that nothing covers, medium those of 20 pixels, hard are all.
    """

    def __init__(self, split: str, count: int = 256, size: int = 128, **options: Any) -> None:
        self.split, self.scenes = split, drawn_faces(count, size, split, **options)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict:
        scene = self.scenes[index]
        boxes, hidden = scene["boxes"].numpy(), scene["hidden"].numpy()
        height = boxes[:, 3] - boxes[:, 1]
        subsets = np.stack([(height >= EASY) & ~hidden, (height >= MEDIUM) & ~hidden, height > 0], axis=1)
        return make_item(scene["image"], boxes, scene["landmarks"].flatten(1).numpy(), None, subsets, index)

    def path(self, index: int) -> str:
        return f"{self.split} scene {index}"


class CocoFaces(CocoDetection):
    """A COCO file whose annotations may have five `keypoints` (x, y, visibility each; 0 is not marked). `iscrowd` is ignored."""

    def _read_boxes(self, annotations: Sequence[dict]) -> None:
        super()._read_boxes(annotations)
        table = np.full((len(annotations), 2 * POINTS), np.nan, dtype=np.float32)
        for i, annotation in enumerate(annotations):
            values = annotation.get("keypoints") or []
            if not values:
                continue
            try:
                points = np.array(values, dtype=np.float32).reshape(POINTS, 3)
            except ValueError:
                problem = f"annotation {annotation.get('id', i + 1)}: keypoints are {POINTS} times x, y, visibility"
                raise DataError(self.file, problem) from None
            if (points[:, 2] > 0).all():
                table[i] = points[:, :2].ravel()
        self.rows = {number: i for i, number in enumerate(self.ids)}
        owner = np.array([self.rows[int(a["image_id"])] for a in annotations], dtype=np.int64)
        self.points = table[np.argsort(owner, kind="stable")]  # as the boxes are ordered

    def item(self, image: Tensor, boxes: Any, labels: Any, crowd: Any, area: Any, number: int) -> dict:
        rows = slice(*self.first[self.rows[number] :][:2])
        return make_item(image, boxes, self.points[rows], crowd, None, number)


# -- annotation files ----------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"cannot be read: {error}") from None


def numbers(path: Path, number: int, line: str, counts: Sequence[int], what: str) -> list[float]:
    """The numbers of a line, of which there must be one of `counts`.

    Raises:
        DataError: naming file and line.
    """
    try:
        values = [float(v) for v in line.split()]
    except ValueError:
        values = []
    if len(values) not in counts or not np.isfinite(values).all():
        wanted = " or ".join(map(str, counts))
        raise DataError(path, f"line {number}: {what} is {wanted} numbers, not '{line.strip()[:60]}'")
    return values


def read_wider(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """WIDER FACE's annotations: for each image its name and (N, 10): x, y, width, height, blur, expression, illumination,
    invalid, occlusion, pose.

    Raises:
        DataError: naming file and line.
    """
    lines = read_lines(path)
    at = 0
    while at < len(lines):
        name = lines[at].strip()
        if not name:
            at += 1
            continue
        if name.replace(" ", "").replace(".", "").isdigit():
            raise DataError(path, f"line {at + 1}: an image's name should stand here, not '{name[:60]}'")
        if at + 1 >= len(lines) or not lines[at + 1].strip().isdigit():
            raise DataError(path, f"line {at + 2}: the number of faces in {name} should stand here")
        count = int(lines[at + 1])
        at += 2
        if at + count > len(lines):
            raise DataError(
                path, f"line {at}: {count} faces are announced for {name}, and {len(lines) - at} lines follow"
            )
        rows = [
            numbers(path, i + 1, lines[i], (10,), "a face (x y width height and six attributes)")
            for i in range(at, at + count)
        ]
        at += count
        if count == 0 and at < len(lines) and lines[at].split() == ["0"] * 10:
            at += 1  # images without faces are followed by a line of zeros
        yield name, np.array(rows, dtype=np.float32).reshape(-1, 10)


def read_label_file(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """RetinaFace's label.txt: for each image its name, boxes (N, 4) x y width height, and landmarks (N, 10), NaN without.

    A face is a line: x y width height, then five times x y and a flag, then the blur; or the four numbers alone.

    Raises:
        DataError: naming file and line.
    """
    name, boxes, points = None, [], []

    def finished() -> tuple[str, np.ndarray, np.ndarray]:
        return name, np.array(boxes, np.float32).reshape(-1, 4), np.array(points, np.float32).reshape(-1, 2 * POINTS)

    for number, line in enumerate(read_lines(path), 1):
        if line.startswith("#"):
            if name is not None:
                yield finished()
            name, boxes, points = line[1:].strip(), [], []
        elif line.strip():
            if name is None:
                raise DataError(path, f"line {number}: the first line of an image begins with '# '")
            row = numbers(path, number, line, (4, 19, 20), "a face (a box, and five landmarks with flags)")
            boxes.append(row[:4])
            marks = np.array(row[4:19]).reshape(-1, 3)[:, :2].ravel() if len(row) > 4 else np.full(2 * POINTS, np.nan)
            points.append(np.full(2 * POINTS, np.nan) if (marks < 0).any() else marks)
    if name is None:
        raise DataError(path, "lists no images")
    yield finished()


def corners(boxes: np.ndarray) -> np.ndarray:
    """x y width height to x1 y1 x2 y2; of negative size: a box without area."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:4].clip(min=0)], axis=1)


def read_subset(path: Path) -> dict[str, np.ndarray]:
    """A list of WIDER's evaluation, wider_<subset>_val.mat: image's name -> which of its faces count, from 0.

    Raises:
        DataError: if the file has another form.
    """
    from paperzoo.data.arrays import read_mat

    content = read_mat(path, ("event_list", "file_list", "gt_list"))
    found = {}
    try:
        for event, files, chosen in zip(*(content[key].ravel() for key in content), strict=True):
            for file, rows in zip(files.ravel(), chosen.ravel(), strict=True):
                found[f"{event.item()}/{file.item()}.jpg"] = np.asarray(rows, dtype=np.int64).ravel() - 1
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(path, f"is no list of WIDER's evaluation ({error})") from None
    return found


# -- layouts -------------------------------------------------------------------------------------------------------------


def open_face_detection(data: str | Path, split: str = "train", **options: Any) -> Dataset:
    """The faces of a split, "train" or "test"; see the module's docstring for what `data` may be.

    Args:
        options: of `drawn_faces`, where that is the data.

    Raises:
        DataError: if the place is missing or its layout is not known, or a line is wrong.
    """
    if split not in PARTS:
        raise PaperZooError(f"split '{split}' is not known; it is train or test")
    if str(data) == "drawn_faces":
        return DrawnFaces(split, **options)
    from paperzoo.data.images import data_folder

    root = Path(data).expanduser()
    if not root.is_dir() and len(root.parts) == 1:
        root = data_folder() / root
    if not root.is_dir():
        raise DataError(root, "no such folder; give drawn_faces, or a folder of WIDER FACE, CelebA or in COCO's layout")
    if (root / "wider_face_split").is_dir() or find_label_file(root, PARTS[split]):
        return open_wider(root, split)
    if next(root.rglob(CELEBA_BOX), None):
        return open_celeba(root, split)
    if (root / "annotations").is_dir() or any(root.glob("*/_annotations.coco.json")):
        plain = open_coco(root, split)
        return CocoFaces(plain.file, plain.folder)
    raise DataError(root, "has no wider_face_split/, train/label.txt, list_bbox_celeba.txt or annotations/")


def find_label_file(root: Path, part: str) -> Path | None:
    places = (root / part, root / "retinaface_gt_v1.1" / part, root / "wider_face_split" / part)
    return next((p / "label.txt" for p in places if (p / "label.txt").is_file()), None)


def open_wider(root: Path, split: str) -> FaceData:
    """WIDER FACE. To learn: train/label.txt (RetinaFace's, with landmarks) where it is there, else the original annotations.

    To test: the original annotations of the validation part, with the subsets of ground_truth/wider_easy_val.mat and its
    two fellows (also in eval_tools/ground_truth/) where they are there.
    """
    part = PARTS[split]
    original, labels = root / "wider_face_split" / f"wider_face_{part}_bbx_gt.txt", find_label_file(root, part)
    folders = [root / f"WIDER_{part}" / "images", root / part / "images", root / f"WIDER_{part}"]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise DataError(root, f"no folder with the images of '{part}'; looked for {folders[0]}, {folders[1]}")
    if labels is not None and (split == "train" or not original.is_file()):
        names, boxes, points = zip(*read_label_file(labels), strict=True)
        return FaceData([folder / n for n in names], [corners(b) for b in boxes], points)
    entries = list(read_wider(original))
    if not entries:
        raise DataError(original, "lists no images")
    names = [name for name, _ in entries]
    subsets = wider_subsets(root, original, entries) if split == "test" else None
    invalid = [rows[:, 7] == 1 for _, rows in entries]
    return FaceData([folder / n for n in names], [corners(r) for _, r in entries], None, invalid, subsets)


def wider_subsets(root: Path, original: Path, entries: list[tuple[str, np.ndarray]]) -> list[np.ndarray] | None:
    places = [base / "ground_truth" for base in (root, root / "eval_tools", root / "wider_face_split")]
    place = next((p for p in places if (p / "wider_easy_val.mat").is_file()), None)
    if place is None:
        return None
    table = [np.zeros((len(rows), len(SUBSETS)), dtype=bool) for _, rows in entries]
    for k, subset in enumerate(SUBSETS):
        file = place / f"wider_{subset}_val.mat"
        chosen = read_subset(file)
        for (name, rows), mask in zip(entries, table, strict=True):
            counted = chosen.get(name, np.empty(0, np.int64))
            if len(counted) and not 0 <= counted.min() <= counted.max() < len(rows):
                raise DataError(file, f"{name}: names face {counted.max() + 1}, but {original.name} has {len(rows)}")
            mask[counted, k] = True
    return table


def open_celeba(root: Path, split: str) -> FaceData:
    """CelebA: one face an image, with landmarks. Part 0 of list_eval_partition.txt is to learn from, 1 and 2 to test."""
    lists = {}
    for name, count in ((CELEBA_BOX, 4), ("list_landmarks_celeba.txt", 2 * POINTS)):
        file = next(root.rglob(name), None)
        if file is None:
            raise DataError(root / name, "no such file; CelebA's boxes and landmarks are both needed")
        table = {}
        for number, line in enumerate(read_lines(file)[2:], 3):  # a count and the header come first
            if line.strip():
                image, _, rest = line.strip().partition(" ")
                table[image] = numbers(file, number, rest, (count,), "what follows the name")
        lists[name] = table
    partition = next(root.rglob("list_eval_partition.txt"), None)
    parts = {}
    if partition is not None:
        for number, line in enumerate(read_lines(partition), 1):
            if len(words := line.split()) != 2 or words[1] not in ("0", "1", "2"):
                raise DataError(partition, f"line {number}: an image's name and 0, 1 or 2, not '{line[:60]}'")
            parts[words[0]] = int(words[1])
    boxes, points = lists[CELEBA_BOX], lists["list_landmarks_celeba.txt"]
    names = [n for n in boxes if n in points and parts.get(n, 0) in CELEBA_PARTS[split]]
    folder = next((f for f in (root / "img_celeba", root / "Img" / "img_celeba") if f.is_dir()), None)
    if folder is None or not names:
        raise DataError(root, "no folder img_celeba/ here" if folder is None else f"no images for the split '{split}'")
    faces = [corners(np.array([boxes[n]], dtype=np.float32)) for n in names]
    return FaceData([folder / n for n in names], faces, [np.array([points[n]], dtype=np.float32) for n in names])
