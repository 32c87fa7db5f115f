"""How golden.safetensors was made: a well-known PyTorch implementation on weights from a rule, so that none are stored.

git clone https://github.com/jfzhang95/pytorch-deeplab-xception FOLDER
PYTHONPATH=FOLDER python -m paperzoo.papers.segmentation.deeplabv3_plus.golden
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from paperzoo.papers.segmentation.pspnet.golden import CLASSES, by_rule, masks, pictures

FILE = Path(__file__).with_name("golden.safetensors")
STRIDES = (16, 8)
GRADIENTS = (
    "backbone.layer1.0.conv2",
    "backbone.layer4.2.conv2",
    "aspp.aspp3.atrous_conv",
    "aspp.global_avg_pool.1",
    "decoder.conv1",
    "decoder.last_conv.4",
)


def main() -> None:
    from modeling.aspp import build_aspp  # the reference's
    from modeling.backbone.resnet import ResNet101
    from modeling.decoder import build_decoder
    from safetensors.torch import save_file

    class DeepLab(nn.Module):
        """Its class of this name, without the download in its constructor."""

        def __init__(self, output_stride: int) -> None:
            super().__init__()
            self.backbone = ResNet101(output_stride, nn.BatchNorm2d, pretrained=False)
            self.aspp = build_aspp("resnet", output_stride, nn.BatchNorm2d)
            self.decoder = build_decoder(CLASSES, "resnet", nn.BatchNorm2d)

        def forward(self, x):
            deep, low = self.backbone(x)
            scores = self.decoder(self.aspp(deep), low)
            return F.interpolate(scores, size=x.shape[2:], mode="bilinear", align_corners=True)

    stored = {}
    for stride in STRIDES:
        network = DeepLab(stride)
        network.load_state_dict(by_rule(network.state_dict()))
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            stored[f"{stride}.logits"] = network.eval()(pictures())[:, :, ::4, ::4].contiguous()
        logits = network.double().train()(pictures().double())
        loss = F.cross_entropy(logits, masks(), ignore_index=255)
        loss.backward()
        stored[f"{stride}.loss"] = loss.detach()
        for which in GRADIENTS:
            gradient = network.get_submodule(which).weight.grad
            stored[f"{stride}.{which}"] = gradient.flatten()[:: max(1, gradient.numel() // 50)].contiguous()
    save_file(stored, str(FILE))


if __name__ == "__main__":
    main()
