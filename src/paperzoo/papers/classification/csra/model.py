"""CSRA: class-specific residual attention for multi-label recognition (Zhu and Wu, ICCV 2021, arXiv:2108.02456).

A head for any network that ends in a map of features: each class scores every place, and its logit is the mean of those scores plus
`lam` times their mean weighted by a softmax over the places, so that the places where the class is seen count more.

Weights of the authors' release (`conv1.weight`, `classifier.multi_head.0.head.weight`) are converted by `from_official`.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import create_backbone

# Temperatures of 1, 2, 4, 6 and 8 heads (sec. 3.3, released code); the last one is a maximum, which the release writes as T = 99.
TEMPERATURES = {
    1: (1.0,),
    2: (1.0, math.inf),
    4: (1.0, 2.0, 4.0, math.inf),
    6: (1.0, 2.0, 3.0, 4.0, 5.0, math.inf),
    8: (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, math.inf),
}


class ResidualAttention(nn.Module):
    """One head, eq. (2) to (6): a map (B, C, H, W) -> logits (B, num_classes).

    Class i has the features f = g + lam * a, with g their mean over the places and a their mean weighted by s, and the logit
    m_i^T f. Multiplied out, that is the mean of the scores plus lam times their weighted mean; no features are formed.

    Args:
        temperature: T of the softmax over the places; infinite for the largest score alone.
        lam: the weight of the attention beside the mean.
    """

    def __init__(self, in_channels: int, num_classes: int, temperature: float = 1.0, lam: float = 0.1) -> None:
        super().__init__()
        self.temperature, self.lam = temperature, lam
        self.head = nn.Conv2d(in_channels, num_classes, 1, bias=False)

    def scores(self, x: Tensor) -> Tensor:
        """x_j^T m_i with m_i of length 1, for each class and place: (B, num_classes, H, W)."""
        return F.conv2d(x, F.normalize(self.head.weight, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x).flatten(2)
        if math.isinf(self.temperature):
            attended = scores.amax(2)
        else:
            attended = (scores * (self.temperature * scores).softmax(2)).sum(2)
        return scores.mean(2) + self.lam * attended

    def attention(self, x: Tensor) -> Tensor:
        """s of eq. (2): how much each place counts for each class, (B, num_classes, H, W), one over the places."""
        scores = self.scores(x)
        if math.isinf(self.temperature):
            shares = (scores == scores.amax((2, 3), keepdim=True)).to(scores)
            return shares / shares.sum((2, 3), keepdim=True)
        return (self.temperature * scores).flatten(2).softmax(2).view_as(scores)


class MultiHead(nn.Module):
    """Heads with weights of their own and different temperatures, added up (sec. 3.3). (B, C, H, W) -> (B, num_classes)."""

    def __init__(self, in_channels: int, num_classes: int, num_heads: int = 1, lam: float = 0.1) -> None:
        super().__init__()
        if num_heads not in TEMPERATURES:
            raise ValueError(
                f"num_heads is {num_heads}; temperatures are published for {', '.join(map(str, TEMPERATURES))}"
            )
        self.multi_head = nn.ModuleList(
            ResidualAttention(in_channels, num_classes, temperature, lam) for temperature in TEMPERATURES[num_heads]
        )

    def forward(self, x: Tensor) -> Tensor:
        return sum(head(x) for head in self.multi_head)

    def scores(self, x: Tensor) -> Tensor:
        """The scores of all heads, added up: (B, num_classes, H, W)."""
        return sum(head.scores(x) for head in self.multi_head)


class AttentiveClassifier(nn.Module):
    """A backbone with residual attention on its last map: images (B, in_channels, H, W), normalised -> logits (B, num_classes).

    Args:
        backbone: a classifier with feature maps by stage, by name.
        num_heads, lam: of the attention. The release sets lam by data set: 0.1 for VOC 2007, 0.5 for COCO.
        out_index: which of the backbone's stages is attended to.
        arguments: what else the backbone's function takes.
    """

    def __init__(
        self,
        num_classes: int = 20,
        in_channels: int = 3,
        backbone: str = "resnet101",
        num_heads: int = 1,
        lam: float = 0.1,
        out_index: int = -1,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.num_heads, self.lam = num_heads, lam
        self.backbone = create_backbone(backbone, in_channels=in_channels, out_indices=(out_index,), **arguments)
        self.num_features = self.backbone.out_channels[-1]
        size = getattr(self.backbone.body, "image_size", None)
        if size:
            self.image_size = size
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh heads for another number of classes; 0 for none."""
        self.classifier: nn.Module = nn.Identity()
        if num_classes:
            like = next(self.backbone.parameters())
            self.classifier = MultiHead(self.num_features, num_classes, self.num_heads, self.lam).to(like)

    def features(self, x: Tensor) -> Tensor:
        """The map that is attended to, (B, num_features, H', W')."""
        return self.backbone(x)[-1]

    def embed(self, x: Tensor) -> Tensor:
        """The mean over the places, (B, num_features)."""
        return self.features(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) if isinstance(self.classifier, nn.Identity) else self.classifier(self.features(x))

    def attention(self, x: Tensor) -> Tensor:
        """Where each class is looked for by the first head, (B, num_classes, H', W'); each map adds up to 1."""
        return self.classifier.multi_head[0].attention(self.features(x))


# -- variants ------------------------------------------------------------------------------------------------------------------


def csra(num_classes: int = 20, in_channels: int = 3, **options) -> AttentiveClassifier:
    """ResNet-101 with one head, as for VOC 2007; `options` as `AttentiveClassifier`, for example another backbone or more heads."""
    return AttentiveClassifier(num_classes, in_channels, **options)


def csra_digits(num_classes: int = 10, in_channels: int = 3, **options) -> AttentiveClassifier:
    """For the embedded scenes: a small backbone with maps of an eighth of the picture's side."""
    sizes: dict[str, Any] = {"backbone": "vgg11_slim", "out_index": 2} | options
    return AttentiveClassifier(num_classes, in_channels, **sizes)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The release's names to these: its ResNet stands at the top, without a prefix."""
    kept = ("classifier.", "backbone.")
    return {k if k.startswith(kept) else f"backbone.body.{k}": v for k, v in state_dict.items()}
