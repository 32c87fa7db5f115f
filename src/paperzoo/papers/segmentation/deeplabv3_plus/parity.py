"""DeepLabv3+ against a well-known implementation (its outputs on weights from a rule are stored, see `golden.py`), the aligned Xception
against timm, and the separable pyramid and decoder against plain functions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.segmentation.deeplabv3_plus import golden, model
from paperzoo.papers.segmentation.deeplabv3_plus.xception import AlignedXception
from paperzoo.papers.segmentation.pspnet.golden import CLASSES, by_rule, masks, pictures

SOURCE = "github jfzhang95/pytorch-deeplab-xception, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored, released = load_file(str(golden.FILE)), {}
    for stride in golden.STRIDES:
        network = model.deeplabv3plus_resnet101(CLASSES, drop_rate=0.0, output_stride=stride).eval()
        if not released:  # the weights know nothing of strides
            released = by_rule({released_name(name): value for name, value in network.state_dict().items()})
        network.load_state_dict(model.from_official(released))
        yield Case(
            f"ResNet-101 at output stride {stride}, logits of two photographs",
            lambda x, n=network: n(x)[:, :, ::4, ::4].detach(),
            lambda x, s=stride: stored[f"{s}.logits"],
            (pictures(),),
            SOURCE,
            note="names converted; every fourth pixel",
        )
        yield Case(
            f"ResNet-101 at output stride {stride}, loss and gradients of a training step",
            lambda n=network, s=stride: training_step(n, s),
            lambda s=stride: {
                key: value for key, value in stored.items() if key.startswith(f"{s}.") and "logits" not in key
            },
            against=SOURCE,
            rtol=1e-6,
            atol=1e-10,
            note="in double precision; 50 values each of six gradients",
        )
    yield from xception_cases()
    yield from separable_cases()


def released_name(name: str) -> str:
    """Our name as the reference has it: the inverse of `from_official`."""
    kind, _, rest = name.partition(".")
    if kind == "backbone":
        return name
    parts = rest.split(".")
    if kind == "aspp":
        if parts[0] == "project":
            return f"aspp.{('conv1', 'bn1')[int(parts[1])]}.{parts[2]}"
        if parts[1] == "4":
            return f"aspp.global_avg_pool.{parts[2]}.{parts[3]}"
        return f"aspp.aspp{int(parts[1]) + 1}.{('atrous_conv', 'bn')[int(parts[2])]}.{parts[3]}"
    if parts[0] == "reduce":
        return f"decoder.{('conv1', 'bn1')[int(parts[1])]}.{parts[2]}"
    if parts[0] == "score":
        return f"decoder.last_conv.8.{parts[1]}"
    return f"decoder.last_conv.{4 * int(parts[1]) + int(parts[2])}.{parts[3]}"


def training_step(network: nn.Module, stride: int) -> dict[str, Tensor]:
    network.double().train()
    loss = F.cross_entropy(network(pictures().double()), masks(), ignore_index=255)
    loss.backward()
    found = {f"{stride}.loss": loss.detach()}
    for which in golden.GRADIENTS:
        ours = next(iter(model.from_official({f"{which}.weight": torch.empty(0)})))
        gradient = network.get_parameter(ours).grad
        found[f"{stride}.{which}"] = gradient.flatten()[:: max(1, gradient.numel() // 50)]
    network.float().eval()
    return found


def xception_cases() -> Iterator[Case]:
    import timm

    from paperzoo.blocks.dilation import dilate

    torch.manual_seed(0)
    state: dict[str, Tensor] = {}
    for stride, train in ((32, False), (16, False), (8, False), (16, True)):
        theirs = timm.create_model(
            "xception65", num_classes=0, output_stride=stride, features_only=True, out_indices=(1, 4)
        )
        ours = dilate(AlignedXception(), stride)
        if not state:
            state = by_rule(ours.state_dict())
            for name in [name for name in state if name.endswith("conv3.bn_pw.weight")]:
                state[name] = state[name] / 5  # twenty residuals would add up to large numbers
        ours.load_state_dict(state)
        theirs.load_state_dict(
            {k.replace("stem.", "stem_", 1).replace("blocks.", "blocks_", 1): v for k, v in state.items()}
        )
        ours, theirs, x = ours.train(train), theirs.train(train), torch.randn(2, 3, 97, 80)
        if train:
            ours, theirs, x = ours.double(), theirs.double(), x.double()
        yield Case(
            f"aligned Xception-65 at output stride {stride}, {'train' if train else 'eval'}",
            Named(ours),
            lambda x, n=theirs: n(x),
            (x,),
            f"timm {timm.__version__} xception65",
            gradients=train,
            note="theirs gives the finer map after ReLU" + ("; in double precision" if train else ""),
        )


class Named(nn.Module):
    """The two maps, the finer one after ReLU as timm hands it out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        low, last = self.network.stages(x)
        return [low.clamp(min=0), last]


def separable_cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for train in (False, True):
        network = nn.ModuleDict(
            {
                "aspp": model.ASPP(2048, (6, 12, 18), drop_rate=0.0, convolution=model.AtrousSeparable),
                "decoder": model.Decoder(256, 256, 4, convolution=model.AtrousSeparable),
            }
        )
        network.load_state_dict(by_rule(network.state_dict()))
        pyramid, decoder = network["aspp"].train(train), network["decoder"].train(train)
        deep, low = torch.randn(2, 2048, 7, 9), torch.randn(2, 256, 25, 33)
        if train:
            network, deep, low = network.double(), deep.double(), low.double()
        yield Case(
            f"separable pyramid and decoder, {'train' if train else 'eval'}",
            lambda x, y, p=pyramid, d=decoder: d(p(x), y),
            lambda x, y, n=network, t=train: plainly(n.state_dict(), x, y, t),
            (deep, low),
            "sec. 3.1 and fig. 2 written out with every rate a number",
            gradients=True,
            note="in double precision" if train else "",
        )
    x = torch.randn(2, 6, 12, 11)
    layer = model.AtrousSeparable(6, 5, 3).eval()
    depth, point = layer[0].weight, layer[3].weight
    full = torch.einsum("oi,ikl->oikl", point[:, :, 0, 0], depth[:, 0])
    yield Case(
        "without what lies between, a separable convolution is one of rank 1",
        lambda x: layer[3](layer[0](x)),
        lambda x: F.conv2d(x, full, padding=3, dilation=3),
        (x,),
        "sec. 3.1, the factorised filter multiplied out",
    )


def plainly(state: dict[str, Tensor], x: Tensor, low: Tensor, train: bool) -> Tensor:
    def normed(x: Tensor, name: str) -> Tensor:
        parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        mean, var, scale, shift = (part[:, None, None] for part in parts)
        if train:
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

    def point(x: Tensor, conv: str, norm: str) -> Tensor:
        return normed(torch.einsum("oc,bchw->bohw", state[f"{conv}.weight"][:, :, 0, 0], x), norm)

    def separable(x: Tensor, name: str, rate: int) -> Tensor:
        taps, padded = state[f"{name}.0.weight"], F.pad(x, (rate,) * 4)
        (height, width), total = x.shape[-2:], 0
        for i in range(3):
            for j in range(3):
                seen = padded[:, :, i * rate : i * rate + height, j * rate : j * rate + width]
                total = total + taps[:, 0, i, j, None, None] * seen
        return point(normed(total, f"{name}.1"), f"{name}.3", f"{name}.4")

    parts = [point(x, "aspp.convs.0.0", "aspp.convs.0.1")]
    parts += [separable(x, f"aspp.convs.{i}", 6 * i) for i in (1, 2, 3)]
    image = point(x.mean((2, 3), keepdim=True), "aspp.convs.4.1", "aspp.convs.4.2")
    parts.append(image + torch.zeros_like(parts[0]))
    h = point(torch.cat(parts, 1), "aspp.project.0", "aspp.project.1")
    h = F.interpolate(h, low.shape[-2:], mode="bilinear", align_corners=True)
    h = torch.cat([h, point(low, "decoder.reduce.0", "decoder.reduce.1")], 1)
    for i in (0, 1):
        h = separable(h, f"decoder.refine.{i}", 1)
    weight, bias = state["decoder.score.weight"][:, :, 0, 0], state["decoder.score.bias"]
    return torch.einsum("oc,bchw->bohw", weight, h) + bias[:, None, None]


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures. The other library's decoder is lighter: one separable convolution where the paper has two."""
    import segmentation_models_pytorch

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 256, 256),)

    def reference() -> nn.Module:
        options = {"encoder_weights": None, "classes": 21, "encoder_output_stride": 16, "decoder_aspp_separable": False}
        return segmentation_models_pytorch.DeepLabV3Plus("resnet50", **options)

    against = f"segmentation-models-pytorch {segmentation_models_pytorch.__version__} DeepLabV3Plus resnet50"
    return {"deeplabv3plus_resnet50": Pair(model.deeplabv3plus_resnet50, reference, images, against, train_batch=2)}
