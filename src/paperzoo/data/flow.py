"""Pairs of pictures with optical flow: FlyingChairs, FlyingThings3D, MPI Sintel, KITTI, folders, videos, and embedded moving layers.

    open_flow("moving_layers", "train")                  photographs under known motion, always there; see `paperzoo.data.moving_layers`
    open_flow("FlyingChairs_release", "train")           data/00001_img1.ppm, 00001_img2.ppm, 00001_flow.flo; FlyingChairs_train_val.txt
    open_flow("FlyingThings3D", "test")                  frames_cleanpass/TEST/A/0000/left/0006.png, optical_flow/TEST/A/0000/into_future/…
    open_flow("Sintel", "train", render_pass="final")    training/final/alley_1/frame_0001.png, training/flow/alley_1/frame_0001.flo, …
    open_flow("KITTI", "train")                          training/image_2 (2015), colored_0 or image_0 (2012), flow_occ, flow_noc
    open_flow("path/to/folder", "test")                  first/, second/ and perhaps flow/ with equal names, with or without train/ and val/ above
    open_flow("holiday.mp4", "train")                    a video, or a folder of a video's pictures: pairs without flow

An item is a dict:
    first, second   uint8 (3, H, W)
    flow            float32 (2, H, W), pixels to the right and down, from the first picture to the second \\
    valid           bool (1, H, W), where the flow is known; the flow is 0 elsewhere                      |  only of sets that have flow
    occluded        bool (1, H, W), what the second picture does not show; all false where that is unknown /

The split "all" is everything that has flow. Sintel's and KITTI's hidden test sets have none: there every fifth film or pair of `training` is
held out, or what val_scenes.txt lists, a film's name or a pair's number a line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.depth import VIDEOS, DepthData, VideoFrames, open_folder, pictures_in, split_folder
from paperzoo.data.images import HELD_OUT, read_image
from paperzoo.errors import DataError, PaperZooError, UnknownName

FLO_MAGIC = 202021.25
LARGEST = 1e9  # components beyond it mean "unknown" in .flo files
SPLITS = ("train", "test", "all")
FIRST, SECOND, FLOW = ("first", "frame1", "img1"), ("second", "frame2", "img2"), ("flow", "flows")
FLOW_FILES = {".flo", ".png", ".pfm", ".npy"}


# -- files -------------------------------------------------------------------------------------------------------------


def read_flow(path: str | Path) -> tuple[Tensor, Tensor]:
    """A flow file, float32 (2, H, W), and where it is known, bool (1, H, W).

    `.flo` (Middlebury), `.png` (KITTI, three channels of 16 bits), `.pfm` (FlyingThings3D), `.npy` (H, W, 2) or (2, H, W).

    Raises:
        DataError: if the file is missing or broken, or of none of these kinds.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], np.ndarray]] = {".flo": _flo, ".pfm": _pfm, ".npy": _npy, ".png": _kitti_png}
    if path.suffix.lower() not in readers:
        raise DataError(path, "not a flow file; .flo, .png of KITTI, .pfm or .npy is expected")
    if not path.is_file():
        raise DataError(path, "no such file")
    try:
        values = readers[path.suffix.lower()](path)
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever they like on broken files
        raise DataError(path, f"not a readable flow file ({type(error).__name__}: {str(error)[:120]})") from None
    flow = torch.from_numpy(np.ascontiguousarray(values[:2], dtype=np.float32))
    valid = (torch.isfinite(flow) & (flow.abs() < LARGEST)).all(0, keepdim=True)
    if len(values) == 3:
        valid &= torch.from_numpy(values[2:] > 0)
    return torch.where(valid, flow, 0.0), valid


def _flo(path: Path) -> np.ndarray:
    data = path.read_bytes()
    if len(data) < 12 or np.frombuffer(data, "<f4", 1)[0] != np.float32(FLO_MAGIC):
        raise DataError(path, f"does not begin with the number {FLO_MAGIC} of a .flo file")
    width, height = (int(n) for n in np.frombuffer(data, "<i4", 2, 4))
    if width < 1 or height < 1 or len(data) != 12 + 8 * width * height:
        raise DataError(path, f"says {width} x {height} pixels, but holds {len(data) - 12} bytes of flow")
    return np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2).transpose(2, 0, 1)


def _pfm(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        kind, sizes, scale = (file.readline().strip() for _ in range(3))
        if kind != b"PF":
            raise DataError(path, f"begins with {kind[:8]!r}; a colour .pfm file begins with 'PF'")
        width, height = (int(n) for n in sizes.split())
        values = np.frombuffer(file.read(), "<f4" if float(scale) < 0 else ">f4")
    if values.size != width * height * 3:
        raise DataError(path, f"says {width} x {height} pixels, but holds {values.size} numbers")
    return values.reshape(height, width, 3)[::-1].transpose(2, 0, 1)[:2]  # rows from the bottom


def _npy(path: Path) -> np.ndarray:
    values = np.load(path, allow_pickle=False)
    if values.ndim != 3 or 2 not in (values.shape[0], values.shape[2]) or values.dtype.kind not in "fiu":
        raise DataError(path, f"has the shape {values.shape} of {values.dtype}; (H, W, 2) or (2, H, W) is expected")
    return values if values.shape[0] == 2 else values.transpose(2, 0, 1)


def _kitti_png(path: Path) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_image

    pixels = decode_image(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    if pixels.dtype != torch.uint16 or len(pixels) != 3:
        bits = 16 if pixels.dtype == torch.uint16 else 8
        raise DataError(path, f"has {len(pixels)} channels of {bits} bits; KITTI's flow has 3 of 16")
    values = pixels.numpy().astype(np.float32)
    values[:2] = (values[:2] - 2**15) / 64
    return values


def write_flo(path: str | Path, flow: Tensor) -> None:
    """A flow (2, H, W) as a .flo file."""
    height, width = flow.shape[1:]
    head = np.array([FLO_MAGIC], "<f4").tobytes() + np.array([width, height], "<i4").tobytes()
    Path(path).write_bytes(head + flow.permute(1, 2, 0).contiguous().numpy().astype("<f4").tobytes())


def read_mask(path: Path) -> Tensor:
    """A picture in black and white as bool (1, H, W)."""
    return read_image(path)[:1] > 127


# -- sets --------------------------------------------------------------------------------------------------------------


class FlowData(Dataset):
    """What every set shares; a subclass reads. `has_flow`: its items have flow. `has_occlusion`: it is known what is hidden."""

    has_flow = True
    has_occlusion = False

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, i: int) -> str:
        """What an error calls item i."""
        raise NotImplementedError

    def images(self, i: int) -> tuple[Tensor, Tensor]:
        """The pair, uint8 (3, H, W) each."""
        raise NotImplementedError

    def truth(self, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Flow (2, H, W), valid (1, H, W), and occluded (1, H, W) or None."""
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        first, second = self.images(i)
        if first.shape != second.shape:
            raise DataError(self.path(i), f"is {_size(first)} pixels, its second picture {_size(second)}")
        item = {"first": first, "second": second}
        if self.has_flow:
            flow, valid, occluded = self.truth(i)
            occluded = torch.zeros_like(valid) if occluded is None else occluded
            for name, value in (("flow", flow), ("occlusion", occluded)):
                if value.shape[1:] != first.shape[1:]:
                    raise DataError(self.path(i), f"is {_size(first)} pixels, its {name} {_size(value)}")
            item |= {"flow": flow, "valid": valid, "occluded": occluded}
        return item


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]}"


class FlowFiles(FlowData):
    """Pairs of files.

    Args:
        pairs: first and second picture.
        flows: files of flow; None without.
        visible: for each pair the file of flow with only what both pictures show (KITTI's flow_noc); or None.
        occlusions, invalid: for each pair a mask of what is hidden, and of what does not count; or None.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        flows: Sequence[Path] | None = None,
        visible: Sequence[Path] | None = None,
        occlusions: Sequence[Path] | None = None,
        invalid: Sequence[Path] | None = None,
    ) -> None:
        self.pairs, self.flows, self.visible = list(pairs), flows, visible
        self.occlusions, self.invalid = occlusions, invalid
        self.has_flow = flows is not None
        self.has_occlusion = visible is not None or occlusions is not None

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, i: int) -> str:
        return str(self.pairs[i][0])

    def images(self, i: int) -> tuple[Tensor, Tensor]:
        first, second = self.pairs[i]
        return read_image(first), read_image(second)

    def truth(self, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        flow, valid = read_flow(self.flows[i])
        occluded = None
        if self.visible is not None:
            occluded = valid & ~read_flow(self.visible[i])[1]
        elif self.occlusions is not None:
            occluded = read_mask(self.occlusions[i])
        if self.invalid is not None:
            valid = valid & ~read_mask(self.invalid[i])
        return flow, valid, occluded


class Film(FlowData):
    """Each picture of a video or of a folder with the one after it; without flow."""

    has_flow = False

    def __init__(self, frames: DepthData) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def path(self, i: int) -> str:
        return self.frames.path(i)

    def images(self, i: int) -> tuple[Tensor, Tensor]:
        return self.frames.image(i), self.frames.image(i, 1)


class MovingLayers(FlowData):
    """The embedded set, see `paperzoo.data.moving_layers`: 256 pairs for training and 64 for testing, 96 x 64 pixels."""

    has_occlusion = True

    def __init__(self, split: str) -> None:
        from paperzoo.data.moving_layers import moving_layers

        self.layers = moving_layers(256 if split == "train" else 64, split="train" if split == "train" else "test")

    def __len__(self) -> int:
        return len(self.layers.first)

    def path(self, i: int) -> str:
        return f"moving layers {i}"

    def images(self, i: int) -> tuple[Tensor, Tensor]:
        return self.layers.first[i], self.layers.second[i]

    def truth(self, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        flow = self.layers.flow[i]
        return flow, torch.ones_like(flow[:1], dtype=torch.bool), self.layers.occluded[i]


def open_flow(data: str | Path, split: str = "train", render_pass: str = "final") -> FlowData:
    """A set of pairs by name or place; see the module's docstring.

    Args:
        split: "train", "test" or "all".
        render_pass: of Sintel and FlyingThings3D: "clean", "final", or "both", one after the other.

    Raises:
        PaperZooError, UnknownName: if there is no such set, split or pass.
        DataError: if a folder has none of the layouts, or a file of it is missing or broken.
    """
    if split not in SPLITS:
        raise PaperZooError(f"split '{split}' is not known; it is one of {', '.join(SPLITS)}")
    if render_pass not in ("clean", "final", "both"):
        raise PaperZooError(f"render_pass '{render_pass}' is not known; it is clean, final or both")
    passes = ("clean", "final") if render_pass == "both" else (render_pass,)
    if str(data) == "moving_layers":
        return MovingLayers(split)
    path = Path(data).expanduser()
    if path.suffix.lower() in VIDEOS:
        return Film(VideoFrames(path, "train" if split == "all" else split, (1,), 0.8))
    if not path.is_dir():
        if path.suffix or len(path.parts) > 1:
            raise DataError(path, "no such file or folder")
        raise UnknownName("optical flow data set or path", str(data), ["moving_layers"])
    training = path / "training" if (path / "training").is_dir() else path
    if any((training / p).is_dir() for p in ("clean", "final")) and (training / "flow").is_dir():
        return sintel(training, split, passes)
    if (training / "flow_occ").is_dir():
        return kitti(training, split)
    if (path / "optical_flow").is_dir():
        return flying_things(path, split, passes)
    chairs = path / "data" if (path / "data").is_dir() else path
    if any(chairs.glob("*_img1.ppm")):
        return flying_chairs(chairs, path, split)
    return folders(path, split)


def need(paths: Sequence[Path]) -> list[Path]:
    """The paths, all of which must be files."""
    for path in paths:
        if not path.is_file():
            raise DataError(path, "no such file")
    return list(paths)


def held_out(root: Path, names: Sequence[str], split: str) -> set[str]:
    """The names of a split: those in val_scenes.txt are for testing, without it every fifth."""
    if split == "all":
        return set(names)
    listed = root / "val_scenes.txt"
    listed = listed if listed.is_file() else root.parent / "val_scenes.txt"
    if listed.is_file():
        test = set(listed.read_text(encoding="utf-8").split())
        for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip() and line.strip() not in names:
                raise DataError(f"{listed}:{number}", f"names '{line.strip()}', which is not in {root}")
    else:
        test = set(names[HELD_OUT - 1 :: HELD_OUT])
    chosen = test if split == "test" else set(names) - test
    if not chosen:
        raise DataError(root, f"has nothing for the split '{split}': {len(names)} in all, {len(test)} held out")
    return chosen


def sintel(training: Path, split: str, passes: Sequence[str]) -> FlowFiles:
    """Consecutive frames of each film. Pixels of `invalid` are left out of learning; measuring counts all, as the benchmark does."""
    films = sorted(p.name for p in (training / "flow").iterdir() if p.is_dir())
    chosen = held_out(training, films, split)
    pairs, flows, occlusions, invalid = [], [], [], []
    for name in passes:
        for film in (f for f in films if f in chosen):
            frames = sorted((training / name / film).glob("frame_*.png"))
            if len(frames) < 2:
                raise DataError(training / name / film, "has fewer than two pictures frame_0001.png, …")
            pairs += list(zip(frames, frames[1:], strict=False))
            flows += [training / "flow" / film / f"{f.stem}.flo" for f in frames[:-1]]
            occlusions += [training / "occlusions" / film / f.name for f in frames[:-1]]
            invalid += [training / "invalid" / film / f.name for f in frames[:-1]]
    has = {name: (training / name).is_dir() for name in ("occlusions", "invalid")}
    return FlowFiles(
        pairs,
        need(flows),
        occlusions=need(occlusions) if has["occlusions"] else None,
        invalid=need(invalid) if has["invalid"] and split == "train" else None,
    )


def kitti(training: Path, split: str) -> FlowFiles:
    """Frames 10 and 11 of each scene; flow_occ is the truth, what flow_noc lacks of it is hidden."""
    pictures = next((training / n for n in ("image_2", "colored_0", "image_0") if (training / n).is_dir()), None)
    if pictures is None:
        raise DataError(training, "has no image_2 (2015), colored_0 or image_0 (2012)")
    flows = sorted((training / "flow_occ").glob("*_10.png"))
    if not flows:
        raise DataError(training / "flow_occ", "has no files as 000000_10.png")
    numbers = [p.stem.removesuffix("_10") for p in flows]
    chosen = held_out(training, numbers, split)
    flows = [p for p, n in zip(flows, numbers, strict=True) if n in chosen]
    pairs = [(pictures / p.name, pictures / p.name.replace("_10.", "_11.")) for p in flows]
    need([p for pair in pairs for p in pair])
    visible = [training / "flow_noc" / p.name for p in flows]
    return FlowFiles(pairs, flows, visible=need(visible) if (training / "flow_noc").is_dir() else None)


def flying_chairs(data: Path, root: Path, split: str) -> FlowFiles:
    """The official split file has a 1 for training and a 2 for testing, a line a pair."""
    firsts = sorted(data.glob("*_img1.ppm"))
    if split != "all":
        name = "FlyingChairs_train_val.txt"
        listed = next((p for p in (root / name, root.parent / name, data / name) if p.is_file()), None)
        if listed is None:
            raise DataError(root / name, "is needed: the official split, a line of 1 (training) or 2 (testing) a pair")
        marks = listed.read_text(encoding="utf-8").split()
        if len(marks) != len(firsts):
            raise DataError(listed, f"has {len(marks)} lines; there are {len(firsts)} pairs in {data}")
        for number, mark in enumerate(marks, 1):
            if mark not in ("1", "2"):
                raise DataError(f"{listed}:{number}", f"is '{mark}'; 1 is for training, 2 for testing")
        wanted = "1" if split == "train" else "2"
        firsts = [p for p, mark in zip(firsts, marks, strict=True) if mark == wanted]
        if not firsts:
            raise DataError(listed, f"marks no pair with {wanted}, for the split '{split}'")
    stems = [p.name.removesuffix("_img1.ppm") for p in firsts]
    pairs = [(p, data / f"{s}_img2.ppm") for p, s in zip(firsts, stems, strict=True)]
    need([second for _, second in pairs])
    return FlowFiles(pairs, need([data / f"{s}_flow.flo" for s in stems]))


def flying_things(root: Path, split: str, passes: Sequence[str]) -> FlowFiles:
    """Both cameras, forwards and backwards in time."""
    parts = ("TRAIN", "TEST") if split == "all" else (split.upper(),)
    pairs, flows = [], []
    for name, part in ((n, p) for n in passes for p in parts):
        frames = root / f"frames_{name}pass" / part
        films = sorted(p for p in frames.glob("*/*") if p.is_dir())
        if not films:
            raise DataError(frames, "has no films as A/0000")
        for film, camera in ((f, c) for f in films for c in ("left", "right")):
            pictures = sorted((film / camera).glob("*.png"))
            for way, order in (("into_future", pictures), ("into_past", pictures[::-1])):
                folder = root / "optical_flow" / part / film.relative_to(frames) / way / camera
                if not folder.is_dir():
                    continue
                word = "".join(w.title() for w in way.split("_"))
                for a, b in zip(order, order[1:], strict=False):
                    pairs.append((a, b))
                    flows.append(folder / f"OpticalFlow{word}_{a.stem}_{camera[0].upper()}.pfm")
    if not pairs:
        raise DataError(root / "optical_flow", "has no flow for any of the films, as TRAIN/A/0000/into_future/left")
    return FlowFiles(pairs, need(flows))


def folders(root: Path, split: str) -> FlowData:
    """first/, second/ and flow/; or the pictures of a video. Without train/ and val/ every fifth pair is for testing."""
    inside = None if split == "all" else split_folder(root, split)
    source = inside or root
    first = next((source / n for n in FIRST if (source / n).is_dir()), None)
    if first is None:
        return Film(open_folder(root, "train" if split == "all" else split, (1,), False, 1000.0, 0.8))
    second = next((source / n for n in SECOND if (source / n).is_dir()), None)
    if second is None:
        raise DataError(source, f"has {first.name}/, but no folder of second pictures: {' or '.join(SECOND)}")
    pictures = pictures_in(first)
    if not inside and split != "all":
        pictures = [p for i, p in enumerate(pictures) if ((i + 1) % HELD_OUT == 0) == (split == "test")]
    if not pictures:
        raise DataError(first, f"has no pictures for the split '{split}'; {HELD_OUT} are needed to hold one out")
    others = {p.relative_to(second).with_suffix("").as_posix(): p for p in pictures_in(second)}
    truths = next((source / n for n in FLOW if (source / n).is_dir()), None)
    known = {}
    if truths is not None:
        files = (p for p in truths.rglob("*") if p.suffix.lower() in FLOW_FILES)
        known = {p.relative_to(truths).with_suffix("").as_posix(): p for p in files}
    pairs, flows = [], []
    for picture in pictures:
        key = picture.relative_to(first).with_suffix("").as_posix()
        for place, table in ((second, others), (truths, known)):
            if place is not None and key not in table:
                raise DataError(picture, f"has no partner; expected {place / key} with a suffix of its kind")
        pairs.append((picture, others[key]))
        flows += [known[key]] if truths is not None else []
    return FlowFiles(pairs, flows if truths is not None else None)
