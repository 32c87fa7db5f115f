"""Crops around people: the affine maps of the field's released code, and what is random about them while learning."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from paperzoo.data.poses import PoseData
from paperzoo.data.skeletons import Skeleton
from paperzoo.errors import DataError
from paperzoo.tasks.pose_boxes import Boxes

PIXELS = 200.0  # a scale of 1 is a person of this height, a convention of MPII
PADDING = 1.25  # boxes are widened by this factor


def centre_and_scale(boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) -> the middles (N, 2) and sides in 200 pixels (N, 2) of their crops: of the crop's shape, a quarter wider.

    Middles count, as keypoints do, from the middle of the first pixel; boxes from its edge.
    """
    extent = boxes[:, 2:] - boxes[:, :2]
    ratio = size[1] / size[0]
    width = torch.maximum(extent[:, 0], extent[:, 1] * ratio)
    return boxes[:, :2] + 0.5 * extent - 0.5, PADDING / PIXELS * torch.stack([width, width / ratio], 1)


def crop_matrix(centre: Tensor, scale: Tensor, degrees: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 2, 3): what leads from pixels of a crop (H, W) = size back to those of the image.

    The middle of the image's part comes to x = W / 2, y = H / 2, half a pixel beside the crop's own, as in the released code
    and so in its weights; its width fills the crop's. The image is turned by the angle, counter-clockwise if it is positive.
    """
    radians = torch.deg2rad(degrees)
    zoom = scale[:, 0] * PIXELS / size[1]
    cos, sin = radians.cos() * zoom, radians.sin() * zoom
    linear = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    middle = scale.new_tensor([size[1] / 2, size[0] / 2])
    return torch.cat([linear, (centre - linear @ middle)[..., None]], 2)


def apply(matrix: Tensor, points: Tensor) -> Tensor:
    """Affine maps (N, 2, 3) of points (N, K, 2)."""
    return points @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]


def mirrored(centre: Tensor, scale: Tensor, degrees: Tensor, size: tuple[int, int], width: int) -> Tensor:
    """The crop of the mirrored image, whose column x is the column `width` - 1 - x of the image; see `crop_matrix`."""
    mirror, edge = torch.tensor([[-1.0, 0.0], [0.0, 1.0]]), torch.tensor([width - 1.0, 0.0])
    matrix = crop_matrix(centre @ mirror + edge, scale, degrees, size)
    return torch.cat([mirror @ matrix[:, :, :2], (matrix[:, :, 2] @ mirror + edge)[..., None]], 2)


def inverse(matrix: Tensor) -> Tensor:
    """Of affine maps (N, 2, 3)."""
    linear = torch.linalg.inv(matrix[:, :, :2])
    return torch.cat([linear, -linear @ matrix[:, :, 2:]], 2)


def crop(image: Tensor, matrix: Tensor, size: tuple[int, int], fill: float = 0.0) -> Tensor:
    """Parts of an image (C, H, W), float: (N, C, *size), bilinear, `fill` beyond it. `matrix` as `crop_matrix` makes it."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    at = apply(matrix, torch.stack([x, y], -1).reshape(1, -1, 2).to(matrix))  # (N, h * w, 2)
    grid = (2 * at + 1) / at.new_tensor([image.shape[2], image.shape[1]]) - 1
    source = (image - fill)[None].expand(len(matrix), -1, -1, -1)
    return F.grid_sample(source, grid.unflatten(1, size), padding_mode="zeros", align_corners=False) + fill


def normalised(crops: Tensor, facts: dict) -> Tensor:
    """Crops (N, 3, H, W) of pixels 0 to 255, as a network takes them."""
    mean, deviation = (crops.new_tensor(facts[key])[:, None, None] for key in ("mean", "deviation"))
    return (crops / 255 - mean) / deviation


class Crops(Dataset):
    """The people of a data set, one crop each: randomly scaled, turned and mirrored to learn from, or plain."""

    def __init__(self, data: PoseData, config: Any, facts: dict, train: bool, boxes: Boxes | None = None) -> None:
        self.data, self.config, self.facts, self.train, self.boxes = data, config, facts, train, boxes
        self.skeleton = Skeleton.read(facts["skeleton"])
        self.rows = data.people.learnable() if boxes is None else torch.arange(len(boxes))
        if not len(self.rows):
            raise DataError(data.path(0), "no person with keypoints in this split")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, size, people = int(self.rows[index]), self.config.image_size, self.data.people
        box = (people.boxes if self.boxes is None else self.boxes.boxes)[row]
        centre, scale = centre_and_scale(box[None], size)
        image = self.data.image(int((people.image if self.boxes is None else self.boxes.image)[row])).float()
        if not self.train:
            picture = normalised(crop(image, crop_matrix(centre, scale, torch.zeros(1), size), size), self.facts)[0]
            return {"images": picture, "centre": centre[0], "scale": scale[0], "row": torch.tensor(row)}
        keypoints, visible = people.keypoints[row], people.visible[row] > 0
        return self.augmented(image, keypoints, visible, centre, scale)

    def augmented(self, image: Tensor, keypoints: Tensor, visible: Tensor, centre: Tensor, scale: Tensor) -> dict:
        c, size = self.config, self.config.image_size
        if c.half_body and float(torch.rand(())) < c.half_body:
            centre, scale = self.half(keypoints, visible, centre, scale)
        if c.jitter == "normal":
            factor = (torch.randn(()) * c.scale_jitter).clamp(-c.scale_jitter, c.scale_jitter) + 1
            degrees = (torch.randn(()) * c.rotate).clamp(-2 * c.rotate, 2 * c.rotate)
        else:
            factor = 1 + (2 * torch.rand(()) - 1) * c.scale_jitter
            degrees = (2 * torch.rand(()) - 1) * c.rotate
        degrees = degrees * (torch.rand(()) < c.rotate_share)
        matrix = crop_matrix(centre, scale * factor, degrees[None], size)
        if float(torch.rand(())) < c.flip:
            matrix = mirrored(centre, scale * factor, degrees[None], size, image.shape[2])
            keypoints, visible = keypoints[self.skeleton.flip], visible[self.skeleton.flip]
        picture = crop(image, matrix, size)
        if c.colour_jitter:
            from torchvision.transforms import v2

            change = v2.ColorJitter(c.colour_jitter, c.colour_jitter, c.colour_jitter)
            picture = change(picture / 255) * 255
        keypoints = apply(inverse(matrix), keypoints[None])[0]
        return {"images": normalised(picture, self.facts)[0], "keypoints": keypoints, "weight": visible.float()}

    def half(self, keypoints: Tensor, visible: Tensor, centre: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The crop around the visible keypoints of the upper (seven times in ten) or the lower half, 1.5 times as large as they spread."""
        upper = torch.zeros(len(visible), dtype=torch.bool)
        upper[list(self.skeleton.upper)] = True
        if int(visible.sum()) <= 8:
            return centre, scale
        chosen, other = (upper, ~upper) if float(torch.rand(())) < 0.7 else (~upper, upper)
        chosen = chosen if int((chosen & visible).sum()) > 2 else other
        points = keypoints[chosen & visible]
        if len(points) < 2:
            return centre, scale
        height, width = self.config.image_size
        extent = points.amax(0) - points.amin(0)
        side = torch.maximum(extent[0], extent[1] * width / height) * 1.5 / PIXELS
        return points.mean(0)[None], torch.stack([side, side * height / width])[None]
