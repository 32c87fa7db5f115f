"""PaDiM: A Patch Distribution Modeling Framework for Anomaly Detection and Localization (arXiv 2011.08785).

Nothing is trained. Features of normal images from three depths of a pretrained classifier are laid side by side at every place of the
finest map, a random choice of their channels is kept, and at every place a Gaussian is fitted. The Mahalanobis distance of a test
image's features from the Gaussian of their place is the heat map.

Backbone parameter names are those of the classifier with the prefix `backbone.`; what follows the deepest map is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.first_stages import FirstStages
from paperzoo.papers.anomaly.patchcore.model import gaussian_smooth
from paperzoo.papers.classification.efficientnet.model import EfficientNet, efficientnet_b5
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.classification.wide_resnet.model import wide_resnet50_2

EPSILON = 0.01  # of the regularisation, sec. III-B
CHUNK = 2**26  # numbers of the covariances that are inverted at a time

# -- the distribution of normal patches (sec. III-A, III-B) -------------------------------------------------------------


def embed(maps: list[Tensor], channels: Tensor) -> Tensor:
    """Features of several depths side by side at the first map's resolution (sec. III-A): (B, C_i, H_i, W_i) -> (B, d, H_0, W_0).

    A coarser map's vector is shared by all places that it covers, so maps grow by nearest neighbour. `channels` int64 (d,) says which
    of the sum of C_i are kept.
    """
    size = maps[0].shape[-2:]
    grown = [x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="nearest") for x in maps]
    return torch.cat(grown, 1).index_select(1, channels)


def fit_gaussians(features: Tensor, epsilon: float = EPSILON) -> tuple[Tensor, Tensor]:
    """A Gaussian at every place (eq. 1): (N, P, d) of N normal images -> mean (P, d), inverse covariance (P, d, d).

    The covariance is the unbiased one plus `epsilon` I, which makes it invertible however few images there are; of a single image it
    is `epsilon` I. Computed in float64, as directions in which normal images hardly differ are nearly singular.
    """
    inverse = features.new_empty(features.shape[1], *[features.shape[2]] * 2)
    for places in chunks(features):
        inverse[places] = inverse_covariance(centre(features, places), max(1, len(features) - 1), epsilon).to(inverse)
    return features.mean(0), inverse


def left_out_distances(features: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Each normal image's distances from the Gaussians of all others: (N, P, d) -> (N, P).

    Not by fitting N times. Without image k, with delta its distance from the mean of all, the mean moves by -delta / (N - 1) and the
    scatter loses delta delta^T N / (N - 1); the Sherman-Morrison formula gives the inverse after such a loss.

    Raises:
        ValueError: if there are fewer than three images.
    """
    count = len(features)
    if count < 3:
        raise ValueError(f"it takes at least 3 images to leave one out, got {count}")
    distances = features.new_empty(features.shape[:2])
    lost = count / ((count - 1) * (count - 2))
    for places in chunks(features):
        centred = centre(features, places)
        inverse = inverse_covariance(centred, count - 2, epsilon)
        square = ((centred @ inverse) * centred).sum(-1)  # (p, N)
        # lost * square stays below 1 in exact arithmetic, as the covariance without image k is still positive definite
        square = square / (1 - lost * square).clamp_min(torch.finfo(square.dtype).eps)
        distances[:, places] = (count / (count - 1) * square.clamp_min(0).sqrt()).T.to(distances)
    return distances


def centre(features: Tensor, places: slice) -> Tensor:
    """(N, P, d) at some of the places, as float64 (p, N, d) around their mean."""
    chosen = features[:, places].double()
    return (chosen - chosen.mean(0)).transpose(0, 1)


def inverse_covariance(centred: Tensor, degrees: int, epsilon: float) -> Tensor:
    """(p, N, d), centred -> (p, d, d)."""
    covariance = centred.transpose(1, 2) @ centred / degrees
    covariance.diagonal(dim1=1, dim2=2).add_(epsilon)
    return torch.cholesky_inverse(torch.linalg.cholesky(covariance))


def chunks(features: Tensor) -> list[slice]:
    """Slices of the places of (N, P, d) whose covariances fit in a bounded memory together."""
    size = max(1, CHUNK // features.shape[2] ** 2)
    return [slice(start, start + size) for start in range(0, features.shape[1], size)]


def mahalanobis(features: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """The distance of each feature from the Gaussian of its place (eq. 2): (B, P, d), (P, d), (P, d, d) -> (B, P)."""
    delta = (features - mean).transpose(0, 1)  # (P, B, d)
    return (delta.bmm(inverse) * delta).sum(-1).clamp_min(0).sqrt().T


# -- backbones ----------------------------------------------------------------------------------------------------------


class FirstBlocks(nn.Module):
    """EfficientNet up to the 26th of its blocks: images -> the outputs of blocks 7, 20 and 26, counted from 1, strides 4, 16, 16.

    These are the layers that the paper names, with their levels 2, 4 and 5, for EfficientNet-B5.
    """

    LEVELS = (2, 4, 5)

    def __init__(self, network: EfficientNet, blocks: tuple[int, int, int] = (7, 20, 26)) -> None:
        super().__init__()
        self.features = network.features[: self.LEVELS[-1] + 1]
        before, taken, self.stage_channels = 0, [], []
        for level, stage in enumerate(self.features[1:], 1):
            if level in self.LEVELS:
                place = blocks[len(taken)] - before - 1
                if not 0 <= place < len(stage):
                    raise ValueError(f"block {blocks[len(taken)]} is not in level {level}")
                taken.append(place)
                self.stage_channels.append(stage[place].block[-1][0].out_channels)
            before += len(stage)
        self.taken = taken
        self.features[-1] = self.features[-1][: taken[-1] + 1]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for level, stage in enumerate(self.features):
            if level not in self.LEVELS:
                x = stage(x)
                continue
            for place, block in enumerate(stage):
                x = block(x)
                if place == self.taken[len(maps)]:
                    found = x
            maps.append(found)
        return maps

    def load_classifier(self, state: Mapping[str, Tensor]) -> None:
        """Take over a whole EfficientNet-B5 (its state dict, torchvision's names); what follows block 26 is not used."""
        wanted = self.state_dict().keys()
        self.load_state_dict({name: value for name, value in state.items() if name in wanted})


# -- the network --------------------------------------------------------------------------------------------------------


class PaDiM(nn.Module):
    """Images (B, 3, H, W) -> {"map": (B, H, W), "score": (B,)}, distances; zeros until Gaussians are there.

    The size is that of the images that the Gaussians were fitted to, as every place has its own.

    Args:
        backbone: images -> three maps, finest first; has `stage_channels` and `load_classifier`.
        features: d, how many of the channels are kept.
        sigma: of the Gaussian that smooths the map, in pixels.

    Buffers, so that a saved model is complete: `channels` int64 (d,), drawn when the model is made; `mean` (P, d) and
    `inverse_covariance` (P, d, d), which take the number of places of whatever is loaded; `threshold` (), the score from which an image
    counts as anomalous.
    """

    resizable_buffers = ("mean", "inverse_covariance")
    channels: Tensor
    mean: Tensor
    inverse_covariance: Tensor
    threshold: Tensor

    def __init__(self, backbone: nn.Module, features: int, sigma: float = 4.0) -> None:
        super().__init__()
        self.backbone, self.sigma = backbone, sigma
        total = sum(backbone.stage_channels)
        if not 1 <= features <= total:
            raise ValueError(f"features must be between 1 and the {total} channels of the backbone, got {features}")
        self.register_buffer("channels", torch.randperm(total)[:features].sort().values)
        self.register_buffer("mean", torch.zeros(0, features))
        self.register_buffer("inverse_covariance", torch.zeros(0, features, features))
        self.register_buffer("threshold", torch.tensor(float("inf")))

    def features(self, x: Tensor) -> Tensor:
        """The kept channels at every place: (B, d, H / 4, W / 4)."""
        return embed(self.backbone(x), self.channels)

    def to_maps(self, distances: Tensor, places: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Distances (B, P) at the places (h, w) -> smoothed maps (B, H, W)."""
        fine = F.interpolate(distances.unflatten(1, places)[:, None], size=size, mode="bilinear")[:, 0]
        return gaussian_smooth(fine, self.sigma)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if len(self.mean) == 0:
            return {"map": x.new_zeros(len(x), *x.shape[-2:]), "score": x.new_zeros(len(x))}
        features = self.features(x)
        if features.shape[2] * features.shape[3] != len(self.mean):
            raise ValueError(
                f"images of {tuple(x.shape[-2:])} have {features.shape[2] * features.shape[3]} places, "
                f"the Gaussians {len(self.mean)}; give images of the size that the Gaussians were fitted to"
            )
        patches = features.flatten(2).transpose(1, 2)  # (B, P, d)
        distances = mahalanobis(patches, self.mean, self.inverse_covariance)
        maps = self.to_maps(distances, tuple(features.shape[-2:]), tuple(x.shape[-2:]))
        return {"map": maps, "score": maps.amax((1, 2))}

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Take over a classifier (its state dict)."""
        self.backbone.load_classifier(state)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        for name in self.resizable_buffers:
            stored, here = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape[1:] == here.shape[1:]:
                setattr(self, name, here.new_zeros(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def padim_resnet18(features: int = 100, sigma: float = 4.0) -> PaDiM:
    """PaDiM-R18-Rd100."""
    return PaDiM(FirstStages(resnet18()), features, sigma)


def padim_wide_resnet50_2(features: int = 550, sigma: float = 4.0) -> PaDiM:
    """PaDiM-WR50-Rd550."""
    return PaDiM(FirstStages(wide_resnet50_2()), features, sigma)


def padim_efficientnet_b5(features: int = 344, sigma: float = 4.0) -> PaDiM:
    """On EfficientNet-B5. The paper does not say how many channels it keeps there; all 40 + 128 + 176 by default."""
    return PaDiM(FirstBlocks(efficientnet_b5(drop_path_rate=0.0)), features, sigma)
