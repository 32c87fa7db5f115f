"""Clips of moving skeletons with a label each: NTU RGB+D's text files, PYSKL's pickles, Kinetics-skeleton, embedded gestures.

    open_skeletons("gestures", "train")                        generated stick figures, always there
    open_skeletons("ntu/", "train", "xsub")                    S001C001P001R001A001.skeleton …, NTU RGB+D 60 and 120
    open_skeletons("ntu60_3danno.pkl", "train", "xsub")        a PYSKL annotation file: its splits are named xsub_train, xsub_val
    open_skeletons("kinetics-skeleton/", "train")              kinetics_train/*.json and kinetics_train_label.json

A clip holds float32 (M, T, V, C): up to M people, T frames, V joints, C coordinates. Three-dimensional joints are x, y, z in metres; flat ones x and y, -1 … 1 of
the picture, y down, and how sure they are, 0 … 1. A joint that was not seen is 0, 0, 0; so is a person who is not there.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.blocks.skeleton_graphs import LAYOUTS, NTU, layout_of
from paperzoo.errors import DataError, PaperZooError, UnknownName

EMBEDDED = ("gestures",)
PEOPLE = 2
NTU_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})")
# cross-subject: who is for training, of 40 and of 106 people; cross-view: the cameras; cross-setup: even numbers
SUBJECTS_60 = "1 2 4 5 8 9 13 14 15 16 17 18 19 25 27 28 31 34 35 38"
SUBJECTS_120 = SUBJECTS_60 + (
    " 45 46 47 49 50 52 53 54 55 56 57 58 59 70 74 78 80 81 82 83 84 85 86 89 91 92 93 94 95 97 98 100 103"
)
TRAIN_SUBJECTS = frozenset(map(int, SUBJECTS_120.split()))
TRAIN_CAMERAS = frozenset((2, 3))
PROTOCOLS = ("xsub", "xview", "xset")
SHORTEST = 11  # frames; a body that is there for less is a mistake of the sensor
FRAME_WORDS, BODY_WORDS, JOINT_WORDS = 1, 10, 12


@dataclass(frozen=True)
class SkeletonClip:
    """joints: float32 (M, T, V, C); label: None where it is not known; name: for errors."""

    joints: Tensor = field(repr=False)
    label: int | None
    name: str


class SkeletonClips(Dataset):
    """Clips by number. `labels` are the classes' names, `layout` the joints' (see `paperzoo.blocks.skeleton_graphs`), `channels` C.

    `sources` are clips, or files that are read when they are asked for.
    """

    def __init__(self, sources: Sequence[Any], labels: list[str], layout: str, flat: bool, read: Any = None) -> None:
        self.sources, self.labels, self.layout, self.flat = sources, labels, layout, flat
        self.read = read or (lambda source: source)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, i: int) -> SkeletonClip:
        return self.read(self.sources[i])


def open_skeletons(data: str | Path, split: str = "train", protocol: str = "xsub") -> SkeletonClips:
    """Clips by name or place; see the module's docstring.

    Args:
        split: "train" or "test".
        protocol: which split of NTU RGB+D: "xsub" (other people), "xview" (another camera), "xset" (other set-ups); of a PYSKL file the name before
            _train and _val.

    Raises:
        PaperZooError, UnknownName: if there is no such set, split or protocol.
        DataError: if a file is missing, has none of the layouts, or is broken.
    """
    if split not in ("train", "test"):
        raise PaperZooError(f"split is '{split}'; skeletons have train and test")
    if str(data) == "gestures":
        from paperzoo.data.gestures import gestures

        return gestures(split)
    path = Path(data).expanduser()
    if path.is_file():
        return open_pickle(path, split, protocol)
    if not path.is_dir():
        if path.suffix or len(path.parts) > 1:
            raise DataError(
                path, "no such file or folder; skeletons are .skeleton files, a .pkl or kinetics_train/*.json"
            )
        raise UnknownName("set of skeletons", str(data), EMBEDDED)
    if any(path.glob("kinetics_*")):
        return open_kinetics(path, split)
    return open_ntu(path, split, protocol)


# -- NTU RGB+D -----------------------------------------------------------------------------------------------------------


def open_ntu(root: Path, split: str, protocol: str) -> SkeletonClips:
    """A folder of .skeleton files, whose names say who, where and what."""
    if protocol not in PROTOCOLS:
        raise UnknownName("protocol", protocol, PROTOCOLS)
    files = sorted(root.rglob("*.skeleton"))
    if not files:
        raise DataError(root, "holds no .skeleton files")
    chosen, actions = [], set()
    for file in files:
        setup, camera, person, action = ntu_numbers(file)
        actions.add(action)
        train = {"xsub": person in TRAIN_SUBJECTS, "xview": camera in TRAIN_CAMERAS, "xset": setup % 2 == 0}[protocol]
        if train == (split == "train"):
            chosen.append(file)
    if not chosen:
        raise DataError(root, f"holds no .skeleton files for {split} by {protocol}")
    count = 60 if max(actions) <= 60 else 120
    return SkeletonClips(chosen, [f"A{k:03d}" for k in range(1, count + 1)], "ntu", False, read_ntu)


def ntu_numbers(path: Path) -> tuple[int, int, int, int]:
    """Set-up, camera, person and action, counted from 1, of a file's name."""
    match = NTU_NAME.fullmatch(path.stem)
    if match is None:
        raise DataError(
            path, "the name must be SsssCcccPpppRrrrAaaa.skeleton: set-up, camera, person, repetition, action"
        )
    setup, camera, person, _, action = map(int, match.groups())
    return setup, camera, person, action


def read_ntu(path: Path, people: int = PEOPLE) -> SkeletonClip:
    """A .skeleton file: those bodies that are real and move most.

    The number of frames; for each the number of bodies; for each of those a line whose first word identifies it, the number of joints (25), and a line a
    joint whose first three words are x, y, z in metres.

    Raises:
        DataError: naming the line that is wrong, or if no body is there.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"not a text file that can be read ({type(error).__name__})") from None
    place = 0

    def take(words: int, what: str) -> list[str]:
        nonlocal place
        found = lines[place].split() if place < len(lines) else []
        place += 1
        if len(found) < words:
            said = f"'{' '.join(found)[:40]}'" if place <= len(lines) else "the end of the file"
            raise DataError(f"{path}:{place}", f"{what} was expected, {words} words or more, not {said}")
        return found

    def whole(what: str) -> int:
        text = take(FRAME_WORDS, what)[0]
        if not text.isdigit():
            raise DataError(f"{path}:{place}", f"{what} must be a whole number, not '{text[:40]}'")
        return int(text)

    frames = whole("the number of frames")
    bodies: dict[str, np.ndarray] = {}
    for frame in range(frames):
        for _ in range(whole("the number of bodies")):
            name = take(BODY_WORDS, "a body")[0]
            joints = whole("the number of joints")
            if joints != NTU.joints:
                raise DataError(f"{path}:{place}", f"a body has {joints} joints; it must be {NTU.joints}")
            body = bodies.setdefault(name, np.zeros((frames, NTU.joints, 3), np.float32))
            for joint in range(joints):
                words = take(JOINT_WORDS, "a joint")
                try:
                    body[frame, joint] = [float(w) for w in words[:3]]
                except ValueError:
                    raise DataError(
                        f"{path}:{place}", f"x, y, z must be numbers, not '{' '.join(words[:3])}'"
                    ) from None
    kept = moving_bodies([np.nan_to_num(b) for b in bodies.values()], people)
    if not kept:
        raise DataError(path, "no body was seen in it")
    values = np.zeros((people, frames, NTU.joints, 3), np.float32)
    values[: len(kept)] = kept
    there = (values != 0).any((0, 2, 3))
    _, _, _, action = ntu_numbers(path)
    return SkeletonClip(torch.from_numpy(values[:, there]), action - 1, str(path))


def moving_bodies(bodies: list[np.ndarray], people: int) -> list[np.ndarray]:
    """Bodies (T, V, 3), those that move most first, at most so many; of several, those that are short or wider than high in most frames are left out."""
    if len(bodies) > 1:
        real = [b for b in bodies if (b != 0).any((1, 2)).sum() >= SHORTEST and not sprawling(b)]
        bodies = real or bodies
    spread = []
    for body in bodies:
        seen = body[(body != 0).any((1, 2))]
        spread.append(float(seen.reshape(-1, 3).var(0).sum()) if len(seen) else 0.0)
    order = sorted(range(len(bodies)), key=lambda k: -spread[k])
    return [bodies[k] for k in order[:people] if (bodies[k] != 0).any()]


def sprawling(body: np.ndarray) -> bool:
    """Whether a body is 0.8 times as wide as high, or more, in over 69.754% of its frames: the data set's own sign of a false one."""
    seen = body[(body != 0).any((1, 2))]
    width, height = np.ptp(seen[..., 0], 1), np.ptp(seen[..., 1], 1)
    return float((width > 0.8 * height).mean()) >= 0.69754 if len(seen) else True


# -- PYSKL ---------------------------------------------------------------------------------------------------------------


class ArraysOnly(pickle.Unpickler):
    """Unpickles plain values and NumPy arrays in dicts and lists, and nothing else."""

    allowed = re.compile(
        r"(numpy\.(_?core\.multiarray\.(_reconstruct|scalar)|_?core\.numeric\._frombuffer|ndarray|dtype)|_codecs\.encode|collections\.OrderedDict)"
    )

    def find_class(self, module: str, name: str) -> Any:
        if not self.allowed.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def open_pickle(path: Path, split: str, protocol: str = "xsub") -> SkeletonClips:
    """A dict of `split` (name -> the clips' names) and `annotations` (dicts of frame_dir, label, keypoint, and of flat ones keypoint_score, img_shape)."""
    try:
        with path.open("rb") as file:
            values = ArraysOnly(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise DataError(
            path, f"refused or damaged: {error}; only arrays, dicts, lists and plain values are read"
        ) from None
    except Exception as error:  # a damaged pickle fails in many ways
        raise DataError(path, f"not a readable pickle ({type(error).__name__}); is the file complete?") from None
    if not isinstance(values, dict) or not isinstance(values.get("annotations"), list) or not values["annotations"]:
        raise DataError(path, "has no 'annotations'; it must be a dict of split and annotations, as PYSKL's files")
    annotations = values["annotations"]
    splits = values.get("split") or {}
    if splits:
        names = [f"{protocol}_train"] if split == "train" else [f"{protocol}_val", f"{protocol}_test"]
        names += ["train"] if split == "train" else ["val", "test"]
        found = next((splits[n] for n in names if n in splits), None)
        if found is None:
            raise UnknownName(f"split of {path.name}", names[0], splits)
        wanted = set(found)
        annotations = [a for a in annotations if a.get("frame_dir") in wanted]
    checked = [annotation_shape(a, f"{path}: annotation {i}") for i, a in enumerate(annotations)]
    if not checked:
        raise DataError(path, f"none of its annotations belongs to {split}")
    joints, flat = checked[0]
    layout = layout_of(joints)
    if layout is None:
        known = ", ".join(f"{known.joints} ({known.name})" for known in LAYOUTS.values())
        raise DataError(path, f"its skeletons have {joints} joints; known are {known}")
    if any(c != checked[0] for c in checked):
        other = next(i for i, c in enumerate(checked) if c != checked[0])
        raise DataError(
            f"{path}: annotation {other}", f"has {checked[other][0]} joints, the first one {joints}; they must be alike"
        )
    count = max(int(a["label"]) for a in values["annotations"]) + 1
    return SkeletonClips(annotations, [str(k) for k in range(count)], layout.name, flat, read_annotation)


def annotation_shape(annotation: Any, place: str) -> tuple[int, bool]:
    """Joints of an annotation, and whether they are flat.

    Raises:
        DataError: if it is none.
    """
    points = annotation.get("keypoint") if isinstance(annotation, dict) else None
    if not isinstance(points, np.ndarray) or points.ndim != 4 or points.shape[3] not in (2, 3) or not points.size:
        raise DataError(place, "keypoint must be an array (people, frames, joints, 2 or 3)")
    if not isinstance(annotation.get("label"), int | np.integer) or int(annotation["label"]) < 0:
        raise DataError(place, f"label is {annotation.get('label')!r}; it must be a whole number, 0 or more")
    scores = annotation.get("keypoint_score")
    if scores is not None and (not isinstance(scores, np.ndarray) or scores.shape != points.shape[:3]):
        raise DataError(place, f"keypoint_score must have the shape {points.shape[:3]}, as keypoint")
    return points.shape[2], points.shape[3] == 2


def read_annotation(annotation: dict[str, Any]) -> SkeletonClip:
    points = torch.from_numpy(np.asarray(annotation["keypoint"], np.float32))
    if points.shape[3] == 2:
        scores = annotation.get("keypoint_score")
        sure = torch.ones(points.shape[:3]) if scores is None else torch.from_numpy(np.asarray(scores, np.float32))
        height, width = annotation.get("img_shape") or annotation.get("original_shape") or (1080, 1920)
        points = flat_joints(points, sure, float(width), float(height))
    return SkeletonClip(points, int(annotation["label"]), str(annotation.get("frame_dir", "annotation")))


def flat_joints(points: Tensor, sure: Tensor, width: float, height: float) -> Tensor:
    """Pixels (…, 2) -> x and y, -1 … 1 of the picture, and how sure they are: (…, 3); what is not seen (at most 0.01) is 0."""
    half = torch.tensor([width / 2, height / 2])
    values = torch.cat([(points - half) / half, sure[..., None]], -1)
    return torch.where(sure[..., None] > 0.01, values, torch.zeros(()))


# -- Kinetics-skeleton ---------------------------------------------------------------------------------------------------


def open_kinetics(root: Path, split: str) -> SkeletonClips:
    """kinetics_{train,val}/*.json, OpenPose's 18 joints, with kinetics_{train,val}_label.json beside them."""
    part = "train" if split == "train" else "val"
    folder, table = root / f"kinetics_{part}", root / f"kinetics_{part}_label.json"
    try:
        labels = json.loads(table.read_text(encoding="utf-8"))
        rows = [
            (name, row["label"], int(row["label_index"]), bool(row.get("has_skeleton", True)))
            for name, row in labels.items()
        ]
    except FileNotFoundError:
        raise DataError(table, "no such file; it holds the labels of the clips") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            table, f"must be an object of clips with label and label_index ({type(error).__name__}: {error})"
        ) from None
    names: dict[int, str] = {index: label for _, label, index, _ in rows}
    files = [folder / f"{name}.json" for name, _, _, there in rows if there]
    if not files or min(names) < 0:
        raise DataError(table, "names no clip with a skeleton, or a negative label_index")
    return SkeletonClips(files, [names.get(k, str(k)) for k in range(max(names) + 1)], "openpose", True, read_kinetics)


def read_kinetics(path: Path, people: int = PEOPLE) -> SkeletonClip:
    """`data` is a list of frames, each with skeletons of `pose` (x and y by turns, 0 … 1 of the picture) and `score`; the surest people are kept.

    Raises:
        DataError: if the file is missing or another.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        frames = values["data"]
        joints = np.zeros((people, max(int(f["frame_index"]) for f in frames), 18, 3), np.float32)
        for frame in frames:
            seen = sorted(frame["skeleton"], key=lambda s: -sum(s["score"]))[:people]
            for k, skeleton in enumerate(seen):
                row = joints[k, int(frame["frame_index"]) - 1]
                row[:, :2] = np.asarray(skeleton["pose"], np.float32).reshape(18, 2)
                row[:, 2] = skeleton["score"]
        label = int(values["label_index"])
    except FileNotFoundError:
        raise DataError(path, "no such file; kinetics_…_label.json names it") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(path, f"not a Kinetics-skeleton file ({type(error).__name__}: {str(error)[:100]})") from None
    values = torch.from_numpy(joints)
    return SkeletonClip(flat_joints(values[..., :2], values[..., 2], 1.0, 1.0), label, str(path))
