"""Cameras and their rays, for scenes that are rendered from known viewpoints.

A camera looks along its own -z axis, x to the right, y up (as Blender, OpenGL and NeRF have it); its pose (3, 4) takes its
coordinates to the world's. Rays are rows of one tensor float32 (N, 12), so that they are shuffled, cut and exported together:

    0 … 2    origin
    3 … 5    direction, one unit of depth long (not of length one): the depth of origin + t * direction is t
    6 … 8    viewing direction in the world, of length one; it stays what it was when origin and direction change their space
    9, 10    near, far: the depths between which the scene lies
    11       radius: of a pixel's cone at depth 1 (2 / sqrt(12) of a pixel, as mip-NeRF has it)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

COLUMNS = 12
UNDISTORT_STEPS = 12


@dataclass(frozen=True)
class Cameras:
    """N cameras.

    poses: float32 (N, 3, 4).
    intrinsics: float32 (N, 4): fx, fy, cx, cy in pixels. Pixel (column i, row j) is seen along ((i - cx) / fx, -(j - cy) / fy, -1).
    sizes: int64 (N, 2): height, width.
    distortion: float32 (N, 4): k1, k2, p1, p2 of OpenCV's model; None where lenses do not distort.
    """

    poses: Tensor
    intrinsics: Tensor
    sizes: Tensor
    distortion: Tensor | None = None

    def __len__(self) -> int:
        return len(self.poses)

    def __getitem__(self, rows: Tensor | slice) -> Cameras:
        distortion = None if self.distortion is None else self.distortion[rows]
        return Cameras(self.poses[rows], self.intrinsics[rows], self.sizes[rows], distortion)

    def moved(self, similarity: Tensor) -> Cameras:
        """In the coordinates that a similarity float (4, 4) takes the world to."""
        return replace(self, poses=moved(self.poses, similarity))

    def directions(self, rows: Tensor, columns: Tensor, lines: Tensor) -> Tensor:
        """Directions (M, 3) in the world of pixels (column, line) float (M,) of cameras `rows` int64 (M,)."""
        fx, fy, cx, cy = self.intrinsics[rows].unbind(1)
        x, y = (columns - cx) / fx, (lines - cy) / fy
        if self.distortion is not None:
            x, y = undistorted(x, y, self.distortion[rows])
        own = torch.stack([x, -y, -torch.ones_like(x)], 1)
        return (self.poses[rows, :, :3] @ own[..., None])[..., 0]

    def rays(self, rows: Tensor, columns: Tensor, lines: Tensor, near: float, far: float, ndc: bool = False) -> Tensor:
        """Rays (M, 12) of pixels.

        Args:
            rows, columns, lines: int64 (M,): which camera, and the pixel's place.
            near, far: the depths between which the scene lies; with `ndc` they are 0 and 1 of the space that the rays are brought to.
            ndc: normalised device coordinates, for cameras that all look along the world's -z (see `ndc_rays`).
        """
        directions = self.directions(rows, columns.to(self.poses.dtype), lines.to(self.poses.dtype))
        origins = self.poses[rows, :, 3]
        views = F.normalize(directions, dim=1)
        focal = self.intrinsics[rows, :2]
        if ndc:
            origins, directions = ndc_rays(origins, directions, focal, self.sizes[rows])
        depths = directions.new_tensor([[near, far]]).expand(len(rows), 2)
        radius = 2 / math.sqrt(12) / focal[:, :1]
        return torch.cat([origins, directions, views, depths, radius], 1)

    def all_rays(self, row: int, near: float, far: float, ndc: bool = False) -> Tensor:
        """Rays (H * W, 12) of all pixels of one camera, line by line."""
        height, width = self.sizes[row].tolist()
        device = self.poses.device
        lines, columns = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        return self.rays(
            torch.full((height * width,), row, device=device), columns.flatten(), lines.flatten(), near, far, ndc
        )


def undistorted(x: Tensor, y: Tensor, distortion: Tensor) -> tuple[Tensor, Tensor]:
    """Where distorted image points (M,), in focal lengths, would be without the lens: OpenCV's model inverted by fixed-point steps."""
    k1, k2, p1, p2 = distortion.unbind(1)
    u, v = x, y
    for _ in range(UNDISTORT_STEPS):
        square = u * u + v * v
        radial = 1 + square * (k1 + square * k2)
        shift_x = 2 * p1 * u * v + p2 * (square + 2 * u * u)
        shift_y = p1 * (square + 2 * v * v) + 2 * p2 * u * v
        u, v = (x - shift_x) / radial, (y - shift_y) / radial
    return u, v


def ndc_rays(origins: Tensor, directions: Tensor, focal: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Rays (M, 3), (M, 3) in normalised device coordinates (NeRF, appendix C), near plane at 1.

    All that cameras which look along -z see, from the near plane to infinity, becomes a cube from -1 to 1; depths 0 … 1 along the new
    rays go from the near plane to infinity. focal: (M, 2); sizes: (M, 2), height and width.
    """
    shift = -(1.0 + origins[:, 2:]) / directions[:, 2:]
    origins = origins + shift * directions  # to the near plane
    scale = -2.0 * focal / sizes.flip(1)  # of x and y: -focal / (half of the width), -focal / (half of the height)
    place, slope = origins[:, :2] / origins[:, 2:], directions[:, :2] / directions[:, 2:]
    inverse = 2.0 / origins[:, 2:]
    return torch.cat([scale * place, 1.0 + inverse], 1), torch.cat([scale * (slope - place), -inverse], 1)


# -- poses ---------------------------------------------------------------------------------------------------------------


def moved(poses: Tensor, similarity: Tensor) -> Tensor:
    """Poses (N, 3, 4) in the coordinates that a similarity (4, 4), a rotation, shift and scale, takes the world to."""
    linear = similarity[:3, :3].to(poses)
    scale = linear.double().det().pow(1 / 3).to(poses)
    places = poses[:, :, 3] @ linear.T + similarity[:3, 3].to(poses)
    return torch.cat([linear / scale @ poses[:, :, :3], places[..., None]], 2)


def looking(backward: Tensor, up: Tensor, place: Tensor) -> Tensor:
    """A pose (3, 4) whose z axis is `backward`, and whose y axis is as near to `up` as can be."""
    z = F.normalize(backward, dim=0)
    x = F.normalize(torch.linalg.cross(up, z), dim=0)
    return torch.stack([x, torch.linalg.cross(z, x), z, place], 1)


def average_pose(poses: Tensor) -> Tensor:
    """The mean place, looking along the mean direction: (N, 3, 4) -> (3, 4)."""
    return looking(poses[:, :, 2].sum(0), poses[:, :, 1].sum(0), poses[:, :, 3].mean(0))


def inverse(pose: Tensor) -> Tensor:
    """The similarity (4, 4) that takes the world to a camera's own coordinates."""
    whole = torch.eye(4, dtype=pose.dtype)
    whole[:3, :3], whole[:3, 3] = pose[:, :3].T, -pose[:, :3].T @ pose[:, 3]
    return whole


def scaling(factor: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.diag(torch.tensor([factor, factor, factor, 1.0], dtype=dtype))


def common_target(poses: Tensor) -> Tensor:
    """The point (3,) that is nearest to all cameras' optical axes, by least squares."""
    axes = poses[:, :, 2]
    across = (
        torch.eye(3, dtype=poses.dtype) - axes[:, :, None] * axes[:, None]
    )  # what is left of a vector beside an axis
    right = across @ poses[:, :, 3:]
    return torch.linalg.lstsq((across.mT @ across).mean(0), (across.mT @ right).mean(0)).solution[:, 0]


def spherified(poses: Tensor) -> Tensor:
    """The similarity (4, 4) that puts what inward-looking cameras (N, 3, 4) look at into the origin, their mean place above it on the z
    axis, and them at a root mean square distance of 1 (the released code's "spherify")."""
    centre = common_target(poses)
    z = F.normalize((poses[:, :, 3] - centre).mean(0), dim=0)
    x = F.normalize(torch.linalg.cross(poses.new_tensor([0.1, 0.2, 0.3]), z), dim=0)
    frame = torch.stack([x, torch.linalg.cross(z, x), z, centre], 1)
    places = moved(poses, inverse(frame))[:, :, 3]
    radius = places.square().sum(1).mean().sqrt()
    return scaling(1 / float(radius), poses.dtype) @ inverse(frame)


def path_of(poses: Tensor, bounds: tuple[float, float], forward: bool) -> dict[str, list]:
    """A path for a film of a scene, from the cameras (N, 3, 4) that took its pictures, as plain numbers for `along`.

    Cameras that look inward: a turntable, a circle about the vertical (z) through what they look at, at their mean height and distance.
    Cameras that look forward: a winding one about their mean pose, which keeps a point between the `bounds` of depth in sight.
    """
    poses = poses.double()
    if not forward:
        centre = common_target(poses)
        away = poses[:, :, 3] - centre
        height = float(away[:, 2].mean())
        radius = max(float(away.norm(dim=1).mean()) ** 2 - height**2, 1e-6) ** 0.5
        return {"centre": centre.tolist(), "circle": [radius, height]}
    pose, (near, far) = average_pose(poses), bounds
    focus = 1.0 / (0.25 / (near * 0.9) + 0.75 / (far * 5.0))
    target = pose[:, 3] - focus * pose[:, 2]
    spread = poses[:, :, 3].abs().quantile(0.9, dim=0)
    return {
        "pose": pose.tolist(),
        "target": target.tolist(),
        "spread": spread.tolist(),
        "up": poses[:, :, 1].sum(0).tolist(),
    }


def along(path: dict[str, list], count: int) -> Tensor:
    """Poses float32 (count, 3, 4) along a path of `path_of`; the first would follow the last."""
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in path.items()}
    angles = torch.arange(count, dtype=torch.float64) / count * 2 * math.pi
    if "circle" in path:
        radius, height = path["circle"]
        offsets = torch.stack([radius * angles.cos(), radius * angles.sin(), torch.full_like(angles, height)], 1)
        up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        return torch.stack([looking(offset, up, values["centre"] + offset) for offset in offsets]).float()
    pose, turns = values["pose"], 2 * angles
    offsets = torch.stack([turns.cos(), -turns.sin(), -(turns / 2).sin()], 1) * values["spread"]
    places = offsets @ pose[:, :3].T + pose[:, 3]
    return torch.stack([looking(place - values["target"], values["up"], place) for place in places]).float()
