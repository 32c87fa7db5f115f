"""How golden.safetensors was made: the released network on weights from a rule, so that none are stored.

git clone https://github.com/speedinghzl/CCNet FOLDER      # at 1fae6c6
PYTHONPATH=FOLDER python -m paperzoo.papers.segmentation.ccnet.golden

Its in-place batch norm needs a compiler for GPUs; here it is batch norm and the activation that it stands for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.papers.segmentation.bisenet_v1.golden import CLASSES, masks, pictures
from paperzoo.papers.segmentation.pspnet.golden import by_rule

FILE = Path(__file__).with_name("golden.safetensors")
WATCHED = (
    "layer3.0.conv2",
    "layer4.2.conv2",
    "head.conva.0",
    "head.cca.query_conv",
    "head.cca.key_conv",
    "head.cca.value_conv",
    "head.convb.0",
    "head.bottleneck.0",
    "dsn.0",
)


class InPlaceABNSync(nn.BatchNorm2d):
    def __init__(self, channels: int, activation: str = "leaky_relu", affine: bool = True) -> None:
        super().__init__(channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.leaky_relu(x, 0.01) if self.activation == "leaky_relu" else x


def main() -> None:
    from safetensors.torch import save_file

    for name, contents in (
        ("inplace_abn", {"InPlaceABN": InPlaceABNSync, "InPlaceABNSync": InPlaceABNSync}),
        ("utils", {}),
        ("utils.pyt_utils", {"load_model": None}),
    ):
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)
    torch.Tensor.cuda = lambda self, *_: self  # its mask is made on a GPU
    from networks.ccnet import Seg_Model

    network = Seg_Model(CLASSES, recurrence=2)
    network.load_state_dict(by_rule(network.state_dict()))
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0

    def enlarged(x: Tensor) -> list[Tensor]:
        return [F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True) for y in network(x)]

    network.eval()
    with torch.no_grad():
        stored = {f"logits.{i}": y[:, :, ::5, ::5].contiguous() for i, y in enumerate(enlarged(pictures()))}
    network.double().train()
    losses = torch.stack([F.cross_entropy(y, masks(), ignore_index=255) for y in enlarged(pictures().double())])
    (losses[0] + 0.4 * losses[1]).backward()
    stored["losses"] = losses.detach()
    for which in WATCHED:
        gradient = network.get_submodule(which).weight.grad
        stored[which] = gradient.flatten()[:: max(1, gradient.numel() // 40)].contiguous()
    stored["head.cca.gamma"] = network.head.cca.gamma.grad
    save_file(stored, str(FILE))


if __name__ == "__main__":
    main()
