"""HashNet: Deep Learning to Hash by Continuation (Cao et al., ICCV 2017, arXiv:1702.00758). The network.

A classifier without its last layer, a hash layer in its place, and tanh(beta z), whose slope beta grows while it learns until
the values are as good as signs. The deployed code is sgn(z), the signs of what the network returns.

The backbone keeps the names it has here, below `backbone.`; torchvision's AlexNet and ResNet-50 load through
`load_backbone`. The hash layer starts from N(0, 0.01^2) and zero, as in the released code (thuml/HashNet).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paperzoo.engine.models import create


class HashNet(nn.Module):
    """Images (B, in_channels, H, W) -> relaxed codes (B, bits) in (-1, 1), tanh(beta z); their signs are the code.

    Args:
        backbone: any classifier that has `embed`, by name; its last layer is left out.
        bits: length of the code, K in the paper.
        in_channels: channels of the image.
        deviation: of the hash layer's first weights; 0.01 suits the 4096 features of AlexNet, few features need more.
        arguments: what else the classifier's function takes.

    Buffer: `beta` (), the slope; 1 at first.
    """

    beta: Tensor

    def __init__(
        self,
        backbone: str = "alexnet",
        bits: int = 48,
        in_channels: int = 3,
        deviation: float = 0.01,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if bits < 1:
            raise ValueError(f"bits is {bits}; it must be 1 or more")
        self.backbone = create(backbone, num_classes=0, in_channels=in_channels, **arguments)
        if not hasattr(self.backbone, "embed"):
            raise ValueError(f"backbone {backbone} has no embed(): it cannot carry a hash layer")
        self.num_features: int = self.backbone.num_features
        self.hash_layer = nn.Linear(self.num_features, bits)
        nn.init.normal_(self.hash_layer.weight, 0, deviation)
        nn.init.zeros_(self.hash_layer.bias)
        self.register_buffer("beta", torch.ones(()))

    def logits(self, x: Tensor) -> Tensor:
        """z of the paper: (B, bits)."""
        return self.hash_layer(self.backbone.embed(x))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.beta * self.logits(x))

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Weights of the same classifier, whatever its number of classes.

        Raises:
            ValueError: if they are another network's.
        """
        wanted = self.backbone.state_dict()
        wrong = [name for name, value in wanted.items() if name in state and state[name].shape != value.shape]
        wrong += [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
        if wrong:
            raise ValueError(f"'{wrong[0]}' is missing or has another shape; weights of the same classifier are needed")
        self.backbone.load_state_dict({name: state.get(name, value) for name, value in wanted.items()})


def hashnet(backbone: str = "alexnet", bits: int = 48, in_channels: int = 3, **arguments: Any) -> HashNet:
    """A hash layer of `bits` on any classifier; the paper's is AlexNet."""
    return HashNet(backbone, bits, in_channels, **arguments)


def hashnet_resnet50(bits: int = 48, in_channels: int = 3, **arguments: Any) -> HashNet:
    """On ResNet-50, the released PyTorch code's default."""
    return HashNet("resnet50", bits, in_channels, **arguments)
