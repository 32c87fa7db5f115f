"""The first stages of a residual network, as a feature extractor: the rest of the network is thrown away."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class FirstStages(nn.Module):
    """Images (B, 3, H, W) -> one map for each of the first stages, strides 4, 8, 16, …

    Args:
        network: with torchvision's names: conv1, bn1, relu, maxpool, layer1, …; and `stage_channels`, `stage_strides`.
        stages: how many are kept.

    Parameter names stay those of the network, so its checkpoints load by `load_classifier`.
    """

    def __init__(self, network: nn.Module, stages: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self.names = [f"layer{i + 1}" for i in range(stages)]
        for name in self.names:
            self.add_module(name, getattr(network, name))
        self.stage_channels, self.stage_strides = network.stage_channels[:stages], network.stage_strides[:stages]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for name in self.names:
            x = getattr(self, name)(x)
            maps.append(x)
        return maps

    def load_classifier(self, state: Mapping[str, Tensor]) -> None:
        """Take over the weights of a whole classifier (its state dict); later stages and the dense layer are not used.

        Raises:
            RuntimeError: if a weight is missing or has another shape.
        """
        wanted = {name for name, _ in self.named_children()}
        self.load_state_dict({name: value for name, value in state.items() if name.split(".")[0] in wanted})
