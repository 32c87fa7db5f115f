"""Pictures of one scene with known cameras, for radiance fields.

    open_views("rendered_objects", "train")     objects from all around on nothing, with opacity; always there
    open_views("rendered_room", "train")        a room from side to side, for forward-facing scenes; always there
    open_views("lego", "test", downscale=2)     transforms_train.json, transforms_test.json: the Blender layout, with opacity
    open_views("fern", "train", downscale=8)    poses_bounds.npy and images/ or images_8/: the LLFF layout
    open_views("mine", "train")                 transforms.json as nerfstudio and instant-ngp write it, lens distortion included

Where a set does not split its pictures itself, every `holdout`-th in the order of their names is for testing, from the first on.

Blender and LLFF pixels are seen along ((i - W/2) / f, -(j - H/2) / f, -1), as the released NeRF has it, which is half a pixel off the pixel's middle;
published weights were trained so. All other sets go through the middles.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from paperzoo.blocks.rays import Cameras, average_pose, common_target, inverse, moved, scaling, spherified
from paperzoo.data.images import is_picture, pil_to_tensor
from paperzoo.errors import DataError, PaperZooError, UnknownName

EMBEDDED = ("rendered_objects", "rendered_room")
LAYOUTS = "transforms_train.json, poses_bounds.npy or transforms.json"
BLENDER_NEAR, BLENDER_FAR = 2.0, 6.0  # of the released configurations
DISTANCE = 4.0  # of inward-looking cameras that are brought to a common scale, as in the Blender scenes
BOUND_FACTOR = 0.75  # of LLFF: the nearest depth becomes 1 / 0.75
PINHOLE = {"SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "PERSPECTIVE"}


@dataclass(frozen=True)
class Views:
    """Pictures of a scene and where they were taken from.

    images: uint8 (3 or 4, H, W) each, RGB, the fourth channel opacity (not premultiplied).
    cameras: as many, in the scene's coordinates.
    near, far: the depths between which the scene lies; along the new rays if `ndc`.
    bounds: the same in the scene's coordinates.
    ndc: rays are to be brought to normalised device coordinates.
    forward: the cameras look forward, else inward.
    similarity: (4, 4), from the data's coordinates to the scene's.
    names: of the pictures, for errors.
    """

    images: list[Tensor] = field(repr=False)
    cameras: Cameras
    near: float
    far: float
    bounds: tuple[float, float]
    ndc: bool = False
    forward: bool = False
    similarity: Tensor = field(default_factory=lambda: torch.eye(4, dtype=torch.float64))
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, i: int, white_background: bool) -> Tensor:
        """Picture i as float32 (3, H, W) in [0, 1], over white or black where it is not opaque."""
        return over(self.images[i], white_background)


def over(image: Tensor, white_background: bool) -> Tensor:
    """uint8 (3 or 4, …) -> float32 (3, …) in [0, 1], over white or black."""
    values = image.float() / 255
    if len(values) == 3:
        return values
    colour, opacity = values[:3], values[3:]
    return colour * opacity + (1 - opacity) if white_background else colour * opacity


def open_views(
    data: str | Path,
    split: str = "train",
    downscale: int = 1,
    holdout: int = 8,
    test_skip: int = 1,
    ndc: bool = True,
    spherify: bool = False,
) -> Views:
    """A scene by name or place; see the module's docstring.

    Args:
        split: "train" or "test".
        downscale: pictures are made so many times smaller, by averaging.
        holdout: every so many-th picture is for testing where the set does not say.
        test_skip: only every so many-th test picture.
        ndc: forward-facing scenes in normalised device coordinates.
        spherify: LLFF's cameras look inward, at something that they go around.

    Raises:
        PaperZooError, UnknownName: if there is no such set or split.
        DataError: if the folder has none of the layouts, or a file of it is missing or wrong.
    """
    if split not in ("train", "test"):
        raise PaperZooError(f"split is '{split}'; a scene has train and test")
    if str(data) in EMBEDDED:
        from paperzoo.data import rendered_scenes

        return getattr(rendered_scenes, str(data))(split)
    root = Path(data).expanduser()
    if root.is_file() and root.suffix == ".json":
        return open_transforms(root, split, downscale, holdout, test_skip)
    if not root.is_dir():
        if root.suffix or len(root.parts) > 1:
            raise DataError(root, f"no such folder; a scene's folder holds {LAYOUTS}")
        raise UnknownName("scene or folder", str(data), EMBEDDED)
    if (root / "transforms_train.json").exists():
        return open_blender(root, split, downscale, test_skip)
    if (root / "poses_bounds.npy").exists():
        return open_llff(root, split, downscale, holdout, ndc, spherify)
    if (root / "transforms.json").exists():
        return open_transforms(root / "transforms.json", split, downscale, holdout, test_skip)
    raise DataError(root, f"holds none of {LAYOUTS}")


# -- files ---------------------------------------------------------------------------------------------------------------


def read_view(path: Path, downscale: int = 1) -> Tensor:
    """A picture uint8 (3, H, W), or (4, H, W) where the file has opacity; made smaller by averaging.

    Raises:
        DataError: if the file is missing, is no picture, or is smaller than `downscale`.
    """
    try:
        with Image.open(path) as file:
            file.load()
            if "A" in file.getbands() or "transparency" in file.info:
                image = torch.from_numpy(np.array(file.convert("RGBA"))).permute(2, 0, 1).contiguous()
            else:
                image = pil_to_tensor(file)
    except FileNotFoundError:
        raise DataError(path, "no such file; the cameras name it") from None
    except Exception as error:  # decoders raise whatever they like on broken files
        raise DataError(path, f"not a readable image ({type(error).__name__}: {str(error)[:120]})") from None
    if downscale == 1:
        return image
    size = (image.shape[1] // downscale, image.shape[2] // downscale)
    if min(size) < 1:
        raise DataError(path, f"is {image.shape[2]} x {image.shape[1]} pixels, too small for downscale {downscale}")
    return F.interpolate(image[None].float(), size, mode="area")[0].round().to(torch.uint8)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(path, "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}", f"not JSON ({error.msg})") from None
    frames = values.get("frames") if isinstance(values, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(f, dict) for f in frames):
        raise DataError(path, "has no 'frames'; it must be a list of objects with file_path and transform_matrix")
    return values


def pose_of(frame: dict[str, Any], place: str) -> Tensor:
    """A frame's camera-to-world matrix, float64 (3, 4)."""
    try:
        matrix = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
    except (KeyError, TypeError, ValueError):
        raise DataError(place, "transform_matrix is missing or no matrix; it must be 4 x 4 numbers") from None
    return checked_pose(matrix, place)


def checked_pose(matrix: Tensor, place: str) -> Tensor:
    """A camera-to-world matrix (3, 4) or (4, 4) as (3, 4), its rotation freed of scale.

    Raises:
        DataError: if it has another shape, or is no rotation and shift.
    """
    if tuple(matrix.shape) not in ((3, 4), (4, 4)) or not bool(matrix.isfinite().all()):
        raise DataError(place, f"a pose is 3 x 4 or 4 x 4 finite numbers, not {tuple(matrix.shape)}")
    pose = matrix[:3].double()
    rotation = pose[:, :3]
    scale = rotation.det()
    if scale <= 1e-12:
        raise DataError(place, f"the pose mirrors or flattens space (determinant {float(scale):.3g}); it must turn it")
    rotation = rotation / scale.pow(1 / 3)
    if (rotation @ rotation.T - torch.eye(3, dtype=torch.float64)).abs().max() > 1e-2:
        raise DataError(place, "the pose's first three columns are no rotation; are rows and columns exchanged?")
    return torch.cat([rotation, pose[:, 3:]], 1)


def number(values: dict[str, Any], key: str, place: str) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(place, f"{key} is {value!r}; it must be a number")
    return float(value)


def intrinsics_of(
    values: dict[str, Any], place: str, width: int, height: int, middles: bool
) -> tuple[list[float], list[float]]:
    """fx, fy, cx, cy for a picture of this size, and k1, k2, p1, p2; `values` may be for a larger picture.

    Args:
        middles: pixel i's middle is i + 0.5 in the file's coordinates.
    """
    full_width, full_height = number(values, "w", place) or width, number(values, "h", place) or height
    x, y = width / full_width, height / full_height
    fx = number(values, "fl_x", place)
    if fx is None:
        angle = number(values, "camera_angle_x", place)
        if angle is None or not 0 < angle < math.pi:
            raise DataError(place, "has neither fl_x (pixels) nor camera_angle_x (radians, above 0 and below pi)")
        fx = 0.5 * full_width / math.tan(angle / 2)
    fy = number(values, "fl_y", place)
    if fy is None:
        angle = number(values, "camera_angle_y", place)
        fy = fx if angle is None else 0.5 * full_height / math.tan(angle / 2)
    if min(fx, fy) <= 0:
        raise DataError(place, f"a focal length is {min(fx, fy):g}; it must be above 0")
    cx, cy = number(values, "cx", place), number(values, "cy", place)
    half = 0.5 if middles else 0.0
    centre = [
        (full_width / 2 if cx is None else cx) * x - half,
        (full_height / 2 if cy is None else cy) * y - half,
    ]
    lens = [number(values, key, place) or 0.0 for key in ("k1", "k2", "p1", "p2")]
    return [fx * x, fy * y, *centre], lens


def cameras_of(poses: list[Tensor], intrinsics: list, lenses: list, images: list[Tensor]) -> Cameras:
    lens = torch.tensor(lenses, dtype=torch.float32)
    return Cameras(
        torch.stack(poses).float(),
        torch.tensor(intrinsics, dtype=torch.float32),
        torch.tensor([tuple(i.shape[1:]) for i in images]),
        lens if bool((lens != 0).any()) else None,
    )


# -- layouts -------------------------------------------------------------------------------------------------------------


def open_blender(root: Path, split: str, downscale: int = 1, test_skip: int = 1) -> Views:
    """transforms_{train,test}.json with camera_angle_x, and PNG pictures with opacity (file_path has no ending there)."""
    path = root / f"transforms_{split}.json"
    if split == "test" and not path.exists() and (root / "transforms_val.json").exists():
        path = root / "transforms_val.json"
    values = read_json(path)
    frames = values["frames"][:: test_skip if split == "test" else 1]
    images, poses, intrinsics, lenses, names = [], [], [], [], []
    for i, frame in enumerate(frames):
        place = f"{path}: frame {i}"
        file = picture_path(root, frame, place)
        images.append(read_view(file, downscale))
        poses.append(pose_of(frame, place))
        height, width = images[-1].shape[1:]
        found = intrinsics_of({**values, **frame}, place, width, height, middles=False)
        intrinsics.append(found[0])
        lenses.append(found[1])
        names.append(str(file))
    cameras = cameras_of(poses, intrinsics, lenses, images)
    bounds = (BLENDER_NEAR, BLENDER_FAR)
    return Views(images, cameras, *bounds, bounds, names=tuple(names))


def picture_path(root: Path, frame: dict[str, Any], place: str) -> Path:
    name = frame.get("file_path")
    if not isinstance(name, str) or not name:
        raise DataError(place, "file_path is missing; it names the picture, relative to the scene's folder")
    path = root / name
    return path if is_picture(path) else path.with_name(path.name + ".png")


def open_transforms(path: Path, split: str, downscale: int = 1, holdout: int = 8, test_skip: int = 1) -> Views:
    """One transforms.json: intrinsics for all or for each frame, OpenCV's lens distortion, optional lists of names for the splits.

    The scene is brought to Blender's scale: what the cameras look at lies in the origin, they are 4 away from it on average.
    """
    root, values = path.parent, read_json(path)
    model = values.get("camera_model", "OPENCV")
    if model not in PINHOLE:
        raise DataError(path, f"camera_model {model!r} is not read; it must be one of {', '.join(sorted(PINHOLE))}")
    frames = sorted(enumerate(values["frames"]), key=lambda pair: str(pair[1].get("file_path")))
    poses = torch.stack([pose_of(frame, f"{path}: frame {i}") for i, frame in frames])
    similarity = normalised(poses)
    chosen = rows_of_split(path, values, [frame for _, frame in frames], split, holdout)
    if split == "test":
        chosen = chosen[::test_skip]
    images, intrinsics, lenses, names = [], [], [], []
    for row in chosen:
        i, frame = frames[row]
        place = f"{path}: frame {i}"
        file = picture_path(root, frame, place)
        smaller = file.parent.with_name(f"{file.parent.name}_{downscale}") / file.name
        there = downscale > 1 and smaller.exists()
        images.append(read_view(smaller if there else file, 1 if there else downscale))
        height, width = images[-1].shape[1:]
        merged = {**values, **frame}
        if not there and ("w" not in merged or "h" not in merged):
            merged |= {"w": width * downscale, "h": height * downscale}
        found = intrinsics_of(merged, place, width, height, middles=True)
        intrinsics.append(found[0])
        lenses.append(found[1])
        names.append(str(file))
    cameras = cameras_of(list(moved(poses[chosen], similarity)), intrinsics, lenses, images)
    away = moved(poses, similarity)[:, :, 3].norm(dim=1)
    bounds = (0.05 * DISTANCE, float(away.max()) + 0.75 * DISTANCE)
    return Views(images, cameras, *bounds, bounds, similarity=similarity, names=tuple(names))


def normalised(poses: Tensor) -> Tensor:
    """The similarity (4, 4) that puts what cameras (N, 3, 4) look at into the origin, and them at a mean distance of DISTANCE."""
    parallel = len(poses) < 2 or poses[:, :, 2].mean(0).norm() > 0.999
    centre = poses[:, :, 3].mean(0) if parallel else common_target(poses)
    shift = torch.eye(4, dtype=poses.dtype)
    shift[:3, 3] = -centre
    distance = float((poses[:, :, 3] - centre).norm(dim=1).mean())
    return scaling(DISTANCE / distance if distance > 1e-9 else 1.0) @ shift


def rows_of_split(path: Path, values: dict[str, Any], frames: list[dict], split: str, holdout: int) -> list[int]:
    """Which frames belong to a split: as the file's lists of names say, else every `holdout`-th for testing."""
    keys = ("train_filenames",) if split == "train" else ("test_filenames", "val_filenames")
    listed = next((values[k] for k in keys if values.get(k)), None)
    if listed is not None:
        rows = {str(frame.get("file_path")): i for i, frame in enumerate(frames)}
        unknown = [name for name in listed if name not in rows]
        if unknown:
            raise DataError(path, f"{keys[0]} names '{unknown[0]}', which is no frame's file_path")
        return [rows[name] for name in listed]
    rows = [i for i in range(len(frames)) if (i % holdout == 0) == (split == "test")]
    if not rows:
        raise DataError(
            path, f"has {len(frames)} frames, too few to hold out every {holdout}th; two are needed at least"
        )
    return rows


def open_llff(
    root: Path, split: str, downscale: int = 1, holdout: int = 8, ndc: bool = True, spherify: bool = False
) -> Views:
    """poses_bounds.npy: a row a picture, 3 x 5 numbers (pose with the axes down, right, backward; then height, width, focal) and the depths of the
    nearest and farthest point. Scaled so that the nearest depth is 4/3, and recentred on the mean pose."""
    path = root / "poses_bounds.npy"
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(path, f"not a readable .npy file of numbers ({error})") from None
    if table.ndim != 2 or table.shape[1] != 17 or not len(table) or table.dtype.kind not in "fiu":
        raise DataError(path, f"has shape {table.shape}; it must be (pictures, 17)")
    rows = torch.from_numpy(table.astype(np.float64))
    if not bool(rows.isfinite().all()) or float(rows[:, 15].min()) <= 0:
        broken = int((~rows.isfinite().all(1) | (rows[:, 15] <= 0)).nonzero()[0])
        raise DataError(f"{path}: row {broken}", "numbers must be finite, and the nearest depth above 0")
    files, factor = llff_pictures(root, downscale)
    if len(files) != len(rows):
        raise DataError(files[0].parent, f"holds {len(files)} pictures, poses_bounds.npy {len(rows)} rows")
    matrices, bounds = rows[:, :15].view(-1, 3, 5), rows[:, 15:]
    poses = torch.stack([matrices[:, :, 1], -matrices[:, :, 0], matrices[:, :, 2], matrices[:, :, 3]], 2)
    poses = torch.stack([checked_pose(pose, f"{path}: row {i}") for i, pose in enumerate(poses)])
    scale = 1.0 / (float(bounds.min()) * BOUND_FACTOR)
    similarity = scaling(scale)
    similarity = inverse(average_pose(moved(poses, similarity))) @ similarity
    if spherify:
        round_about = spherified(moved(poses, similarity))
        similarity, scale = round_about @ similarity, scale * float(round_about[:3, :3].det()) ** (1 / 3)
    near, far = float(bounds.min()) * scale, float(bounds.max()) * scale
    kept = [i for i in range(len(rows)) if (i % holdout == 0) == (split == "test")]
    if not kept:
        raise DataError(path, f"has {len(rows)} rows, too few to hold out every {holdout}th; two are needed at least")
    images = [read_view(files[i], factor) for i in kept]
    intrinsics = []
    for i, image in zip(kept, images, strict=True):
        height, width = image.shape[1:]
        focal = float(matrices[i, 2, 4]) * width / float(matrices[i, 1, 4])
        intrinsics.append([focal, focal, width / 2, height / 2])
    cameras = cameras_of(list(moved(poses, similarity)[kept]), intrinsics, [[0.0] * 4] * len(kept), images)
    use_ndc = ndc and not spherify
    depths = (0.0, 1.0) if use_ndc else (0.9 * near, far)
    names = tuple(str(files[i]) for i in kept)
    return Views(images, cameras, *depths, (near, far), use_ndc, not spherify, similarity, names)


def llff_pictures(root: Path, downscale: int) -> tuple[list[Path], int]:
    """The pictures by name, and by how much they are still to be made smaller."""
    ready = root / f"images_{downscale}"
    folder, factor = (ready, 1) if downscale > 1 and ready.is_dir() else (root / "images", downscale)
    files = sorted(p for p in folder.glob("*") if is_picture(p)) if folder.is_dir() else []
    if not files:
        raise DataError(folder, "holds no pictures; LLFF's layout has them in images/ or images_8/")
    return files, factor


def read_poses(path: Path) -> Tensor:
    """The poses of a transforms file, float64 (N, 3, 4), in its own coordinates."""
    frames = read_json(path)["frames"]
    return torch.stack([pose_of(frame, f"{path}: frame {i}") for i, frame in enumerate(frames)])


__all__ = ["EMBEDDED", "Views", "open_views", "over", "read_poses", "read_view"]
