"""CutPaste: Self-Supervised Learning for Anomaly Detection and Localization (arXiv 2104.04015), the networks.

A classifier learns, from scratch, to tell normal images from copies with a pasted patch or scar. Then its head is thrown away, and a
Gaussian over the features of normal images says how unusual a new image is. Where the defect is says Grad-CAM, or a network for small
patches that is applied at every place.

Parameter names of the backbone are torchvision's with the prefix `backbone.`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.anomaly.cutpaste.technique import mahalanobis
from paperzoo.papers.classification.resnet.model import BasicBlock, CifarResNet, ResNet, resnet18


class CutPasteNet(nn.Module):
    """A whole image at a time: images (B, 3, H, W) -> {"map": (B, H, W), "score": (B,)}; zeros until there is a Gaussian.

    Args:
        backbone: without a classifier, with `stages`, `num_features`.
        num_classes: of the pretext task: normal, CutPaste, scar.
        hidden: widths of the projection head's hidden layers.
        projected: width of its output, on which the classifier stands.

    Buffers: `mean` (D,), `precision` (D, D), zeros until they are fitted; `threshold` (), the score from which an image counts as anomalous.
    """

    mean: Tensor
    precision: Tensor
    threshold: Tensor

    def __init__(
        self,
        backbone: ResNet | CifarResNet,
        num_classes: int = 3,
        hidden: tuple[int, ...] = (512,) * 8,
        projected: int = 128,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        widths = [backbone.num_features, *hidden]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], projected))
        self.out = nn.Linear(projected, num_classes)
        width = backbone.num_features
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("precision", torch.zeros(width, width))
        self.register_buffer("threshold", torch.tensor(float("inf")))

    def logits(self, x: Tensor) -> Tensor:
        """Of the pretext task: (B, num_classes)."""
        return self.out(self.head(self.backbone.embed(x)))

    def views(self, x: Tensor, stride: int | None = None) -> Tensor:
        """What the Gaussian is fitted to, for each image: its features (B, 1, D). `stride` is for networks of patches."""
        return self.backbone.embed(x)[:, None]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.backbone.stages(x)[-1]
        delta = maps.mean((2, 3)) - self.mean
        pulled = delta @ self.precision
        score = (pulled * delta).sum(1).clamp_min(0).sqrt()
        # Grad-CAM of -log p, in closed form: behind the last map are only its mean over places and a square form, whose gradient is
        # the same at every place
        alpha = pulled / (maps.shape[2] * maps.shape[3])
        cam = F.relu((alpha[:, :, None, None] * maps).sum(1, keepdim=True))
        return {"map": F.interpolate(cam, size=x.shape[-2:], mode="bilinear")[:, 0], "score": score}


class CutPastePatchNet(CutPasteNet):
    """Every patch of an image (sec. 4.2): images (B, 3, H, W) -> {"map": (B, H, W), "score": (B,)}.

    The patches' distances from the Gaussian are spread over their pixels by a Gaussian kernel, where they overlap averaged with it; the
    score is the largest distance.

    Args:
        patch_size: of the square patches that the network was trained with.
        stride: between patches; H and W less the patch size must be multiples of it.
    """

    def __init__(self, backbone: ResNet | CifarResNet, patch_size: int, stride: int, **options) -> None:
        super().__init__(backbone, **options)
        self.patch_size, self.stride = patch_size, stride
        at = torch.arange(patch_size) - (patch_size - 1) / 2
        bell = (-0.5 * (at / (patch_size / 4)).square()).exp()
        self.register_buffer("kernel", (bell[:, None] * bell).view(1, 1, patch_size, patch_size), persistent=False)

    def patches(self, x: Tensor, stride: int | None = None) -> Tensor:
        """All patches, image by image, row by row: (B, n, m, C, p, p).

        Raises:
            ValueError: if they do not cover the images.
        """
        size, stride = self.patch_size, stride or self.stride
        if any(extent < size or (extent - size) % stride for extent in x.shape[-2:]):
            raise ValueError(
                f"images of {tuple(x.shape[-2:])} are not covered by patches of {size} with stride {stride}; "
                f"give {size} pixels and a multiple of {stride} more"
            )
        return x.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5)

    def views(self, x: Tensor, stride: int | None = None) -> Tensor:
        """The features of every patch: (B, n * m, D)."""
        patches = self.patches(x, stride)
        count = patches.shape[1] * patches.shape[2]
        return self.backbone.embed(patches.flatten(0, 2)).unflatten(0, (-1, count))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        rows, columns = ((extent - self.patch_size) // self.stride + 1 for extent in x.shape[-2:])
        distances = mahalanobis(self.views(x).flatten(0, 1), self.mean, self.precision)
        coarse = distances.view(-1, 1, rows, columns)
        spread = F.conv_transpose2d(coarse, self.kernel, stride=self.stride)
        cover = F.conv_transpose2d(coarse.new_ones(1, 1, rows, columns), self.kernel, stride=self.stride)
        return {"map": (spread / cover)[:, 0], "score": coarse.amax((1, 2, 3))}


def cutpaste_resnet18(num_classes: int = 3) -> CutPasteNet:
    """The paper's network for whole images of 256 pixels."""
    return CutPasteNet(resnet18(num_classes=0), num_classes)


def cutpaste_patch_resnet18(num_classes: int = 3, patch_size: int = 64, stride: int = 4) -> CutPastePatchNet:
    """The paper's network for patches."""
    return CutPastePatchNet(resnet18(num_classes=0), patch_size, stride, num_classes=num_classes)


def cutpaste_patch_resnet8(num_classes: int = 3, patch_size: int = 32, stride: int = 8) -> CutPastePatchNet:
    """Not in the paper: patches of 32 pixels and a network for them that learns in seconds on a CPU."""
    backbone = CifarResNet(BasicBlock, 8, num_classes=0)
    return CutPastePatchNet(backbone, patch_size, stride, num_classes=num_classes, hidden=(64,), projected=32)
