"""PatchCore: Towards Total Recall in Industrial Anomaly Detection (arXiv 2106.08265).

Nothing is trained. Middle features of a pretrained classifier, averaged over 3x3 neighbourhoods, are collected from normal images into a
memory bank; greedy k-centre selection keeps a few percent. A patch is as anomalous as it is far from its nearest neighbour in the bank,
an image as its most anomalous patch, re-weighted by how rare that neighbour is.

The features follow the authors' code (amazon-science/patchcore-inspection), which says what the paper leaves open: unfold 3x3, average the
(channel, 3, 3) values in order down to a common width, resize the coarser map, average the two layers down to `feature_dim` again. What
follows the paper and not that code: Euclidean distances (the code's are squared) and the re-weighting of eq. 7 (the code has none).

Backbone parameter names are torchvision's with the prefix `backbone.`; layer4 and the classifier are not needed and left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.classification.resnet.model import ResNet, resnet18
from paperzoo.papers.classification.wide_resnet.model import wide_resnet50_2

# -- features (sec. 3.1) -----------------------------------------------------------------------------------------------


def aware_patches(x: Tensor, feature_dim: int, patch_size: int = 3) -> Tensor:
    """Every position's neighbourhood, averaged down to a common width (eq. 1, 2): (B, C, H, W) -> (B, feature_dim, H, W).

    The (C, patch_size, patch_size) values of a neighbourhood, in this order and with zeros beyond the border, are split into `feature_dim` equal
    runs (adaptive average pooling); with C equal to `feature_dim` that is the mean over the neighbourhood of each channel.
    """
    batch, _, height, width = x.shape
    unfolded = F.unfold(x, patch_size, padding=patch_size // 2).transpose(1, 2)  # (B, H * W, C * patch_size**2)
    pooled = F.adaptive_avg_pool1d(unfolded, feature_dim)
    return pooled.transpose(1, 2).reshape(batch, feature_dim, height, width)


def join_layers(maps: list[Tensor], feature_dim: int, patch_size: int = 3) -> Tensor:
    """Patch features of several layers at the first one's resolution: list of (B, C_i, H_i, W_i) -> (B, feature_dim, H_0, W_0)."""
    size = maps[0].shape[-2:]
    aware = [aware_patches(x, feature_dim, patch_size) for x in maps]
    resized = [x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear") for x in aware]
    both = torch.cat(resized, dim=1).permute(0, 2, 3, 1)  # (B, H, W, layers * feature_dim)
    return F.adaptive_avg_pool1d(both.flatten(1, 2), feature_dim).unflatten(1, size).permute(0, 3, 1, 2)


# -- the memory bank (sec. 3.2) ----------------------------------------------------------------------------------------


def greedy_coreset(features: Tensor, count: int, generator: torch.Generator, projected_dim: int = 128) -> Tensor:
    """Rows that cover all rows well (algorithm 1): (N, D) -> int64 (count,).

    Starting from a random row, always the row that is farthest from those selected (greedy k-centre), none twice. Distances are taken after a random
    linear projection to `projected_dim` dimensions, which nearly preserves them (Johnson-Lindenstrauss).

    Raises:
        ValueError: if `count` is not in 1 … N.
    """
    from tqdm import trange

    if not 1 <= count <= len(features):
        raise ValueError(f"count must be between 1 and the {len(features)} features, got {count}")
    if projected_dim < features.shape[1]:
        projection = torch.randn(features.shape[1], projected_dim, generator=generator) / projected_dim**0.5
        features = features @ projection.to(features)
    first = torch.randint(len(features), (1,), generator=generator).to(features.device)
    chosen = first.repeat(count)
    length = features.square().sum(1)
    nearest = torch.full_like(length, float("inf"))  # squared distance to the selected rows; -inf: selected
    for i in trange(count, desc="selecting the coreset", delay=1.0, leave=False, disable=None):
        row = first[0] if i == 0 else nearest.argmax()
        chosen[i] = row
        nearest = torch.minimum(nearest, length + length[row] - 2 * features @ features[row])
        nearest[row] = -float("inf")
    return chosen


def nearest_neighbours(queries: Tensor, bank: Tensor, k: int = 1, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Euclidean distances and bank rows of the k nearest, nearest first: (Q, D), (M, D) -> (Q, k), int64 (Q, k).

    Only (Q, chunk) distances are held at a time. k is cut to M.
    """
    k = min(k, len(bank))
    distances, rows = [], []
    for start in range(0, len(bank), chunk):
        part = bank[start : start + chunk]
        near, at = torch.cdist(queries, part, compute_mode="use_mm_for_euclid_dist").topk(
            min(k, len(part)), dim=1, largest=False
        )
        distances.append(near)
        rows.append(at + start)
    if len(distances) == 1:
        return distances[0], rows[0]
    best, order = torch.cat(distances, 1).topk(k, dim=1, largest=False)
    return best, torch.cat(rows, 1).gather(1, order)


# -- scores (sec. 3.3) -------------------------------------------------------------------------------------------------


def image_scores(distances: Tensor, rows: Tensor, patches: Tensor, bank: Tensor, neighbours: int = 9) -> Tensor:
    """The score of each image (eq. 6, 7): (B,).

    Args:
        distances, rows: (B, P), each patch's distance to its nearest bank row, and that row.
        patches: (B, P, D).
        neighbours: b of eq. 7, the bank rows nearest to m* that say how rare it is; below 2 there is no re-weighting.
    """
    score, worst = distances.max(dim=1)  # s* and the patch m_test*
    if neighbours < 2 or len(bank) < 2:
        return score
    index = worst[:, None]
    test_patch = patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))  # (B, 1, D)
    memory_patch = bank[rows.gather(1, index)[:, 0]]  # m*, (B, D)
    _, around = nearest_neighbours(memory_patch, bank, neighbours)  # N_b(m*), itself among them
    to_test = (test_patch - bank[around]).square().sum(-1).sqrt()  # (B, b)
    score = (test_patch[:, 0] - memory_patch).square().sum(-1).sqrt()  # s* again, as exactly as its neighbours'
    # exp of a large distance overflows: 1 - exp(s*) / sum exp = 1 - exp(s* - logsumexp)
    return (1 - (score - to_test.logsumexp(dim=1)).exp()) * score


def gaussian_smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian filter as `scipy.ndimage.gaussian_filter`: cut at 4 sigma, the border mirrored with its edge. (B, H, W) -> (B, H, W)."""
    radius = int(4 * sigma + 0.5)
    at = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = (-0.5 * (at / sigma) ** 2).exp()
    kernel = kernel / kernel.sum()
    for axis in (1, 2):
        size = maps.shape[axis]
        index = torch.arange(-radius, size + radius, device=maps.device) % (2 * size)
        padded = maps.index_select(axis, torch.where(index < size, index, 2 * size - 1 - index))
        shape = (1, 1, -1, 1) if axis == 1 else (1, 1, 1, -1)
        maps = F.conv2d(padded[:, None], kernel.view(shape))[:, 0]
    return maps


# -- the network -------------------------------------------------------------------------------------------------------


class PatchCore(nn.Module):
    """Images (B, 3, H, W) -> {"map": (B, H, W), "score": (B,)}, distances; zeros while the bank is empty.

    Args:
        backbone: a ResNet; its layer2 and layer3 give the features.
        feature_dim: width of a patch feature.
        patch_size: of the neighbourhood that is averaged; odd.
        neighbours: b of eq. 7; 1 turns the re-weighting off.
        sigma: of the Gaussian that smooths the map, in pixels.

    Buffers: `memory_bank` (M, feature_dim), which takes the length of whatever is loaded; `threshold` (), the score from which an image
    counts as anomalous.
    """

    resizable_buffers = ("memory_bank",)
    memory_bank: Tensor
    threshold: Tensor

    def __init__(
        self, backbone: ResNet, feature_dim: int = 1024, patch_size: int = 3, neighbours: int = 9, sigma: float = 4.0
    ) -> None:
        super().__init__()
        if patch_size % 2 == 0:
            raise ValueError(f"patch_size must be odd, got {patch_size}")
        for unused in ("layer4", "avgpool", "fc"):
            delattr(backbone, unused)
        self.backbone = backbone
        self.feature_dim, self.patch_size, self.neighbours, self.sigma = feature_dim, patch_size, neighbours, sigma
        self.register_buffer("memory_bank", torch.zeros(0, feature_dim))
        self.register_buffer("threshold", torch.tensor(float("inf")))

    def maps(self, x: Tensor) -> list[Tensor]:
        """Outputs of layer2 and layer3, strides 8 and 16."""
        net = self.backbone
        x = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        middle = net.layer2(x)
        return [middle, net.layer3(middle)]

    def features(self, x: Tensor) -> Tensor:
        """Patch features (B, feature_dim, H / 8, W / 8)."""
        return join_layers(self.maps(x), self.feature_dim, self.patch_size)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if len(self.memory_bank) == 0:
            return {"map": x.new_zeros(len(x), *x.shape[-2:]), "score": x.new_zeros(len(x))}
        features = self.features(x)
        patches = features.flatten(2).transpose(1, 2)  # (B, P, D)
        distances, rows = nearest_neighbours(patches.flatten(0, 1), self.memory_bank)
        distances, rows = distances.view(patches.shape[:2]), rows.view(patches.shape[:2])
        score = image_scores(distances, rows, patches, self.memory_bank, self.neighbours)
        coarse = distances.unflatten(1, features.shape[-2:])
        fine = F.interpolate(coarse[:, None], size=x.shape[-2:], mode="bilinear")[:, 0]
        return {"map": gaussian_smooth(fine, self.sigma), "score": score}

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Take over a ResNet classifier (its state dict), whose layer4 and dense layer are not used."""
        self.backbone.load_state_dict({n: t for n, t in state.items() if not n.startswith(("layer4.", "fc."))})

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        stored = state_dict.get(prefix + "memory_bank")
        if stored is not None and stored.shape[1:] == self.memory_bank.shape[1:]:
            self.memory_bank = self.memory_bank.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def patchcore_resnet18(
    feature_dim: int = 1024, patch_size: int = 3, neighbours: int = 9, sigma: float = 4.0
) -> PatchCore:
    """On ResNet-18: small and quick."""
    return PatchCore(resnet18(), feature_dim, patch_size, neighbours, sigma)


def patchcore_wide_resnet50_2(
    feature_dim: int = 1024, patch_size: int = 3, neighbours: int = 9, sigma: float = 4.0
) -> PatchCore:
    """On WideResNet-50-2, the paper's backbone."""
    return PatchCore(wide_resnet50_2(), feature_dim, patch_size, neighbours, sigma)
