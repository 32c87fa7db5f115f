"""PSPNet against the authors' PyTorch code (its outputs on weights from a rule are stored, see `golden.py`), and its module against another library's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.segmentation.pspnet import golden, model

SOURCE = "github hszhao/semseg, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    for name in golden.NETWORKS.values():
        network = getattr(model, name)(golden.CLASSES, drop_rate=0.0).eval()
        released = golden.by_rule(released_names(network.state_dict()))
        network.load_state_dict(model.from_official(released))
        yield Case(
            f"{name}, logits of two photographs",
            lambda x, n=network: n(x)[:, :, ::4, ::4].detach(),
            lambda x, n=name: stored[f"{n}.logits"],
            (golden.pictures(),),
            SOURCE,
            note="names converted; every fourth pixel",
        )
        yield Case(
            f"{name}, losses and gradients of a training step",
            lambda n=network, s=name: training_step(n, s, stored),
            lambda s=name: {key: value for key, value in stored.items() if key.startswith(s) and "logits" not in key},
            against=SOURCE,
            rtol=1e-6,
            atol=1e-10,
            note="in double precision; 50 values each of six gradients",
        )
    yield from module_cases()
    yield from stem_cases()
    yield from size_cases()


def released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names as the authors have them: the inverse of `from_official`."""
    back = {ours: theirs for theirs, ours in model.STEM.items()}
    found = {}
    for name, value in state.items():
        name = name.removeprefix("backbone.")
        module, _, leaf = name.rpartition(".")
        found[f"{back.get(module, module)}.{leaf}"] = value
    return found


def training_step(network: nn.Module, name: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    network.double().train()
    output = network(golden.pictures().double())
    losses = [F.cross_entropy(output[head], golden.masks(), ignore_index=255) for head in ("out", "aux")]
    (losses[0] + 0.4 * losses[1]).backward()
    found = {f"{name}.losses": torch.stack(losses).detach()}
    for key in stored:
        which = key.removeprefix(f"{name}.")
        if key.startswith(f"{name}.") and which not in ("losses", "logits"):
            ours = model.from_official({f"{which}.weight": torch.empty(0)})
            gradient = network.get_parameter(next(iter(ours))).grad
            found[key] = gradient.flatten()[:: max(1, gradient.numel() // 50)]
    network.float().eval()
    return found


def module_cases() -> Iterator[Case]:
    from importlib.metadata import version

    from segmentation_models_pytorch.decoders.pspnet.decoder import PSPModule

    torch.manual_seed(0)
    for height, width in ((12, 12), (13, 7), (6, 5)):
        ours, theirs = model.PyramidPooling(16).eval(), PSPModule(16).eval()
        with torch.no_grad():
            for branch, block in zip(ours.features, theirs.blocks, strict=True):
                norm, (conv, other, _) = branch[2], block.pool[1]
                nn.init.normal_(norm.running_mean, std=0.2)
                nn.init.uniform_(norm.running_var, 0.5, 2)
                nn.init.normal_(norm.bias, std=0.2)
                if isinstance(other, nn.BatchNorm2d):
                    conv.weight.copy_(branch[1].weight)
                    other.load_state_dict(norm.state_dict())
                else:  # theirs has no norm for the whole image: ours is folded into its convolution
                    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                    conv.weight.copy_(branch[1].weight * scale[:, None, None, None])
                    conv.bias.copy_(norm.bias - norm.running_mean * scale)
        yield Case(
            f"pyramid pooling of {height} x {width}",
            ours,
            lambda x, m=theirs: torch.cat([m(x)[:, 16:], m(x)[:, :16]], 1),
            (torch.randn(2, 16, height, width),),
            f"segmentation-models-pytorch {version('segmentation-models-pytorch')} PSPModule",
            note="it puts the map last",
        )
    x, layer = torch.randn(2, 8, 9, 11), model.PyramidPooling(8).train()
    yield Case(
        "pyramid pooling, one region after the other, training", layer, lambda x: slowly(layer, x), (x,), "sec. 3.2"
    )


def slowly(layer: model.PyramidPooling, x: Tensor) -> Tensor:
    """Region by region: those of n along h pixels reach from floor(i h / n) to ceil((i + 1) h / n)."""
    parts, (height, width) = [x], x.shape[-2:]
    for n, branch in zip(model.BINS, layer.features, strict=True):
        means = torch.empty(*x.shape[:2], n, n)
        for i in range(n):
            for j in range(n):
                rows = slice(i * height // n, -(-(i + 1) * height // n))
                columns = slice(j * width // n, -(-(j + 1) * width // n))
                means[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
        reduced = torch.einsum("oc,bcij->boij", branch[1].weight[:, :, 0, 0], means)
        deviation = (reduced.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        reduced = ((reduced - reduced.mean((0, 2, 3), keepdim=True)) / deviation).clamp(min=0)
        grown = torch.empty(*reduced.shape[:2], height, width)
        for row in range(height):
            for column in range(width):
                y, z = row * (n - 1) / (height - 1), column * (n - 1) / (width - 1)  # corner on corner
                top, left = min(int(y), max(n - 2, 0)), min(int(z), max(n - 2, 0))
                below, right = min(top + 1, n - 1), min(left + 1, n - 1)
                upper = reduced[:, :, top, left] * (1 - (z - left)) + reduced[:, :, top, right] * (z - left)
                lower = reduced[:, :, below, left] * (1 - (z - left)) + reduced[:, :, below, right] * (z - left)
                grown[:, :, row, column] = upper * (1 - (y - top)) + lower * (y - top)
        parts.append(grown)
    return torch.cat(parts, 1)


def stem_cases() -> Iterator[Case]:
    import timm

    torch.manual_seed(0)
    ours = model.DeepStemResNet((3, 4, 6, 3), num_classes=7).eval()
    theirs = timm.create_model("resnet50s", num_classes=7).eval()
    theirs.load_state_dict(ours.state_dict())
    yield Case(
        "the ResNet-50 with its stem",
        ours,
        theirs,
        (torch.randn(2, 3, 75, 64),),
        f"timm {timm.__version__} resnet50s",
        note="the same names",
    )


def size_cases() -> Iterator[Case]:
    """Without the module's averages the network has no size of its own: dilation gives every shifted answer of the strided network."""
    from paperzoo.blocks.dilation import dilate

    torch.manual_seed(0)
    strided = model.SlimResNet(widths=(4, 4, 6, 8, 8)).eval()
    dense = dilate(model.SlimResNet(widths=(4, 4, 6, 8, 8)), 4).eval()
    dense.load_state_dict(strided.state_dict())
    yield Case(
        "at every fourth position the dilated network is the strided one",
        lambda x: dense.stages(x)[-1][:, :, ::4, ::4],
        lambda x: strided.stages(x)[-1],
        (torch.randn(2, 3, 64, 96),),
        "the same weights with strides, sec. 3.2",
    )


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: the whole network with the other library's pyramid and scores in our backbone's place."""
    from segmentation_models_pytorch.decoders.pspnet.decoder import PSPModule

    class Reference(nn.Module):
        """The authors' network in plain words, with another library's pyramid."""

        def __init__(self) -> None:
            super().__init__()
            own = model.pspnet_resnet50(21)
            self.backbone, self.cls, self.aux = own.backbone, own.cls, own.aux
            self.psp = PSPModule(2048)

        def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
            *_, middle, last = self.backbone.stages(x)
            out = F.interpolate(self.cls(self.psp(last)), x.shape[-2:], mode="bilinear", align_corners=True)
            if not self.training:
                return out
            aux = F.interpolate(self.aux(middle), x.shape[-2:], mode="bilinear", align_corners=True)
            return {"out": out, "aux": aux}

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 225, 225),)

    return {
        "pspnet_resnet50": Pair(
            lambda: model.pspnet_resnet50(21),
            Reference,
            images,
            "segmentation-models-pytorch PSPModule on the same backbone",
            train_batch=2,
        )
    }
