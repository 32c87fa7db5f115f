"""How golden.safetensors was made: the authors' modules on weights from a rule, so that none are stored.

git clone https://github.com/zhanghang1989/PyTorch-Encoding FOLDER      # at ac74841
PYTHONPATH=FOLDER python -m paperzoo.papers.segmentation.encnet.golden

Their package needs compiled operators to be imported. Here only the files of ResNet, EncHead, FCNHead and Encoding are, and the two
operators under Encoding are the lines of their C++ for CPUs in PyTorch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from paperzoo.papers.segmentation.bisenet_v1.golden import pictures
from paperzoo.papers.segmentation.pspnet.golden import by_rule

FILE = Path(__file__).with_name("golden.safetensors")
CLASSES = 5
NETWORKS = {"encnet_resnet50": (3, 4, 6, 3), "encnet_resnet101": (3, 4, 23, 3)}
LATERAL = {"encnet_resnet50": True, "encnet_resnet101": False}
WATCHED = (
    "layer4.0.conv2",
    "head.conv5.0",
    "head.encmodule.encoding.0",
    "head.encmodule.encoding.3.codewords",
    "head.encmodule.encoding.3.scale",
    "head.encmodule.fc.0",
    "head.encmodule.selayer",
    "head.conv6.1",
)


def masks() -> Tensor:
    """Class ids for the pictures, int64 (2, 96, 128), every seventh row ignored; the second picture lacks two classes."""
    ids = torch.arange(2 * 96 * 128).view(2, 96, 128) // 300 % CLASSES
    ids[1] = ids[1].clamp(max=2)
    ids[:, ::7] = 255
    return ids


def scaled_l2(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """ScaledL2_Forward_CPU: (B, N, D), (K, D), (K,) -> (B, N, K)."""
    return scale * (x[:, :, None] - words).pow(2).sum(3)


def aggregate(weights: Tensor, x: Tensor, words: Tensor) -> Tensor:
    """Aggregate_Forward_CPU: (B, N, K), (B, N, D), (K, D) -> (B, K, D)."""
    return (weights[..., None] * (x[:, :, None] - words)).sum(1)


class AnyNorm(nn.BatchNorm2d):
    """Their synchronised batch norm takes maps and vectors alike."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Mean(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dim)


def their_modules() -> tuple[type, type, type, type]:
    """ResNet, Bottleneck, EncHead and FCNHead of the folder on the path."""
    root = next(Path(p) for p in sys.path if (Path(p) / "encoding" / "models" / "sseg" / "encnet.py").exists())

    def package(name: str, **contents: object) -> None:
        module = ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        vars(module).update(contents)
        sys.modules[name] = module

    package("encoding")
    package("encoding.functions", scaled_l2=scaled_l2, aggregate=aggregate, pairwise_cosine=None)
    package("encoding.nn")
    parts = {"Mean": Mean, "SyncBatchNorm": AnyNorm, "Encoding": import_module("encoding.nn.encoding").Encoding}
    missing = ("ConcurrentModule", "SplAtConv2d", "DropBlock2D", "RFConv2d")
    package("encoding.nn", GlobalAvgPool2d=nn.Identity, **parts, **dict.fromkeys(missing))
    for name in ("encoding.models", "encoding.models.sseg", "encoding.models.backbone"):
        package(name)
    package("encoding.models.model_store", get_model_file=None)
    package("encoding.models.sseg.base", BaseNet=nn.Module)
    resnet = import_module("encoding.models.backbone.resnet")
    heads = [import_module(f"encoding.models.sseg.{name}") for name in ("encnet", "fcn")]
    return resnet.ResNet, resnet.Bottleneck, heads[0].EncHead, heads[1].FCNHead


def step(out: Tensor, presence: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    """The three losses as in their SegmentationLosses, and the sum with the script's weights; every class's presence by torch.histc."""
    target = torch.stack([torch.histc(m.float(), bins=CLASSES, min=0, max=CLASSES - 1) > 0 for m in masks()])
    losses = [nn.functional.cross_entropy(x, masks(), ignore_index=255) for x in (out, aux)]
    losses.append(nn.functional.binary_cross_entropy(presence.sigmoid(), target.to(presence.dtype)))
    return torch.stack(losses), losses[0] + 0.2 * losses[1] + 0.2 * losses[2]


def main() -> None:
    from safetensors.torch import save_file

    resnet, bottleneck, enc_head, fcn_head = their_modules()

    class EncNet(nn.Module):
        """Their EncNet without the loading of files; `forward` as theirs."""

        def __init__(self, layers: tuple[int, ...], lateral: bool) -> None:
            super().__init__()
            self.pretrained = resnet(bottleneck, layers, dilated=True, deep_stem=True, norm_layer=AnyNorm)
            self.pretrained.fc = None
            self.head = enc_head(2048, CLASSES, se_loss=True, lateral=lateral, norm_layer=AnyNorm)
            self.auxlayer = fcn_head(1024, CLASSES, norm_layer=AnyNorm)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            p, size = self.pretrained, x.shape[2:]
            maps = [p.layer1(p.maxpool(p.relu(p.bn1(p.conv1(x)))))]
            for layer in (p.layer2, p.layer3, p.layer4):
                maps.append(layer(maps[-1]))
            out, presence = self.head(*maps)
            larger = [
                nn.functional.interpolate(y, size, mode="bilinear", align_corners=True)
                for y in (out, self.auxlayer(maps[2]))
            ]
            return larger[0], presence, larger[1]

    stored = {}
    for name, layers in NETWORKS.items():
        network = EncNet(layers, LATERAL[name])
        network.load_state_dict(by_rule(network.state_dict()))
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            out, presence, aux = network.eval()(pictures())
        stored |= {f"{name}.out": out[:, :, ::5, ::5].contiguous(), f"{name}.presence": presence}
        stored[f"{name}.aux"] = aux[:, :, ::5, ::5].contiguous()
        losses, loss = step(*network.double().train()(pictures().double()))
        loss.backward()
        stored[f"{name}.losses"] = losses.detach()
        gradients = {key.removesuffix(".weight"): p.grad for key, p in network.named_parameters()}
        for which in WATCHED:
            gradient = gradients[f"pretrained.{which}" if which.startswith("layer") else which]
            stored[f"{name}.{which}"] = gradient.flatten()[:: max(1, gradient.numel() // 40)].contiguous()
    save_file(stored, str(FILE))


if __name__ == "__main__":
    main()
