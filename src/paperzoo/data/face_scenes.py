"""Drawn faces on photographs: a small world for face detection that is always there.

People of `paperzoo.data.face_drawing` stand before crops of the real photographs of `paperzoo.data.scenes`, near and far,
some behind a pasted piece of another photograph; boxes and landmarks are exact, as they follow from the drawing. Training
and test scenes share no person and no part of a photograph. The photograph with a real person in it is left out: nobody
marked her face.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paperzoo.data import face_drawing
from paperzoo.data.arrays import cached_arrays
from paperzoo.data.scenes import PHOTOGRAPHS, photographs

WITH_PERSON = 2 + PHOTOGRAPHS.index("astronaut.png")  # the first two photographs are scikit-learn's
CANVAS = 0.534  # height of a face's box as a part of the drawing's side, for a head that does not tilt
PEOPLE = {"train": (100_000, 300), "test": (200_000, 100)}  # first number and count of the identities
EMPTY = 0.06  # the share of scenes without faces
HIDDEN = 0.15  # the share of faces with something before them
COLUMNS = 0.7  # the part of each photograph, from the left, that training scenes have
EASY, MEDIUM = 32.0, 20.0  # pixels of height from which a face is in the easy and the medium subset
TRIES = 20  # places that are tried for each face


@functools.lru_cache(maxsize=16)
def drawn_faces(
    count: int,
    size: int = 128,
    split: str = "train",
    max_faces: int = 3,
    scale: tuple[float, float] = (0.1, 0.5),
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Scenes with faces, drawn once and kept in the user's cache directory; treat the tensors as read-only.

    Args:
        count: how many scenes; the first ones do not depend on it.
        size: height and width in pixels, at least 48.
        split: "train" or "test".
        max_faces: a scene has 0 (6% of them) to `max_faces` faces; where there is no free place left, fewer.
        scale: smallest and largest height of a face's box, as a part of `size`. Heights are log-uniform, at least 10 pixels.
        seed: every choice follows from it (and from `split`, `size`, `max_faces`, `scale`).

    Returns:
        One dict a scene:
        image: uint8 (3, size, size);
        boxes: float32 (N, 4), x1 y1 x2 y2 in pixels, inside the image;
        landmarks: float32 (N, 5, 2), x and y in pixels, in the order of `face_drawing.LANDMARKS`;
        hidden: bool (N,), something covers a part of the face;
        identities: int64 (N,).

    Raises:
        ValueError: if an argument is outside its range.
    """
    if split not in PEOPLE:
        raise ValueError(f"split is '{split}'; it must be 'train' or 'test'")
    if count < 1 or max_faces < 1:
        raise ValueError(f"count is {count} and max_faces {max_faces}; both must be 1 or more")
    if size < 48:
        raise ValueError(f"size is {size}; it must be 48 or more")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is {scale}; it must be (smallest, largest) with 0 < smallest <= largest <= 1")
    code = zlib.crc32(Path(face_drawing.__file__).read_bytes() + Path(__file__).read_bytes())
    name = f"drawn_faces_{split}_{count}_{size}_{max_faces}_{scale[0]:g}_{scale[1]:g}_{seed}_{code:08x}"
    arrays = cached_arrays(name, lambda: _draw(count, size, split, max_faces, scale, seed))
    values = {key: torch.from_numpy(value) for key, value in arrays.items()}
    first = torch.cat([torch.zeros(1, dtype=torch.int64), values["faces"].cumsum(0)]).tolist()
    keys = ("boxes", "landmarks", "hidden", "identities")
    return [
        {"image": values["images"][i]} | {key: values[key][first[i] : first[i + 1]] for key in keys}
        for i in range(count)
    ]


def _draw(count: int, size: int, split: str, max_faces: int, scale: tuple[float, float], seed: int) -> dict:
    images, faces, rows = np.empty((count, 3, size, size), np.uint8), np.zeros(count, np.int64), []
    for i in range(count):
        rng = np.random.default_rng([seed, i, size, split == "test"])
        scene = _Scene(_background(size, split, rng), rng)
        wanted = 0 if rng.random() < EMPTY else int(rng.integers(1, max_faces + 1))
        first, people = PEOPLE[split]
        for _ in range(wanted):
            low, high = np.log(max(10.0, scale[0] * size)), np.log(max(10.0, scale[1] * size))
            scene.add(first + int(rng.integers(people)), float(np.exp(rng.uniform(low, high))))
        scene.cover(split)
        images[i], faces[i] = scene.image.round().clip(0, 255).astype(np.uint8), len(scene.faces)
        rows += [(*face, hidden) for face, hidden in zip(scene.faces, scene.hidden, strict=True)]
    return {
        "images": images,
        "faces": faces,
        "boxes": np.array([r[0] for r in rows], np.float32).reshape(-1, 4),
        "landmarks": np.array([r[1] for r in rows], np.float32).reshape(-1, 5, 2),
        "identities": np.array([r[2] for r in rows], np.int64),
        "hidden": np.array([r[3] for r in rows], bool),
    }


class _Scene:
    """One scene while it is drawn: the image (3, S, S) as floats, and the faces so far."""

    def __init__(self, image: np.ndarray, rng: np.random.Generator) -> None:
        self.image, self.rng, self.size = image, rng, image.shape[-1]
        self.faces: list[tuple[np.ndarray, np.ndarray, int]] = []
        self.hidden: list[bool] = []

    def add(self, identity: int, height: float) -> None:
        """Paste a face of this height where it is inside the picture and leaves the others visible; or none."""
        face = face_drawing.draw(identity, self.rng, max(16, round(height / CANVAS)))
        side, box = face.alpha.shape[0], face.box.numpy()
        mask = face.alpha.numpy()
        for _ in range(TRIES):
            centre = self.rng.uniform(0.04, 0.96, 2) * self.size
            x, y = (round(float(c - (a + b) / 2)) for c, a, b in zip(centre, box[:2], box[2:], strict=True))
            placed = box + (x, y, x, y)
            cut = placed.clip(0, self.size)
            visible = (cut[2:] - cut[:2]).clip(0).prod() / (box[2:] - box[:2]).prod()
            if visible >= 0.85 and all(self._covered(other, mask, x, y) < 0.1 for other, _, _ in self.faces):
                break
        else:
            return
        left, top, right, bottom = max(0, x), max(0, y), min(self.size, x + side), min(self.size, y + side)
        alpha = mask[top - y : bottom - y, left - x : right - x]
        source = face.image.numpy()[:, top - y : bottom - y, left - x : right - x].astype(np.float32)
        target = self.image[:, top:bottom, left:right]
        target += alpha * (source - target)
        self.faces.append((cut, face.landmarks.numpy() + (x, y), identity))
        self.hidden.append(False)

    @staticmethod
    def _covered(box: np.ndarray, mask: np.ndarray, x: int, y: int) -> float:
        """The part of a box that a picture with this mask at (x, y) would cover."""
        x1, y1, x2, y2 = (int(v) for v in (box - (x, y, x, y)).round())
        inside = mask[max(0, y1) : max(0, y2), max(0, x1) : max(0, x2)]
        return float(inside.sum()) / max(1, (x2 - x1) * (y2 - y1))

    def cover(self, split: str) -> None:
        """Paste a piece of a photograph over a part of some faces: below the nose, or one side."""
        for k, (box, _, _) in enumerate(self.faces):
            if self.rng.random() >= HIDDEN:
                continue
            (x1, y1, x2, y2), part = box, self.rng.uniform(0.25, 0.4)
            where = int(self.rng.integers(3))
            width, height = x2 - x1, y2 - y1
            if where == 0:
                y1 = y2 - part * height
            elif where == 1:
                x2 = x1 + part * width
            else:
                x1 = x2 - part * width
            left, top = max(0, int(x1)), max(0, int(y1))
            right, bottom = min(self.size, int(x2) + 1), min(self.size, int(y2) + 1)
            piece = _background(max(bottom - top, right - left, 8), split, self.rng)
            self.image[:, top:bottom, left:right] = piece[:, : bottom - top, : right - left]
            self.hidden[k] = True


def _background(size: int, split: str, rng: np.random.Generator) -> np.ndarray:
    """A random square of the split's part of a photograph: float32 (3, size, size) in 0 … 255."""
    chosen = [p for i, p in enumerate(photographs()) if i != WITH_PERSON]
    photograph = chosen[int(rng.integers(len(chosen)))]
    border = int(photograph.shape[2] * COLUMNS)
    part = photograph[:, :, :border] if split == "train" else photograph[:, :, border:]
    largest = min(part.shape[1:])
    side = int(min(largest, size * rng.uniform(0.8, 2.0)))
    top, left = (int(rng.integers(n - side + 1)) for n in part.shape[1:])
    square = part[None, :, top : top + side, left : left + side].float()
    square = F.interpolate(square, (size, size), mode="bilinear", antialias=True)[0].numpy()
    square = square[:, :, ::-1] if rng.random() < 0.5 else square
    return np.ascontiguousarray(square * rng.uniform(0.55, 1.05), dtype=np.float32)
