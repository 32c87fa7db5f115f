"""MobileNet against timm, transformers (the authors' arithmetic) and pytorchcv, and the paper's counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.mobilenet_v1 import model as mobilenet
from paperzoo.papers.classification.resnet.parity import images, settled


def cases() -> Iterator[Case]:
    import timm
    import transformers
    from pytorchcv.model_provider import get_model

    peer = f"timm {timm.__version__} mobilenetv1_100"
    torch.manual_seed(0)
    reference = lively(timm.create_model("mobilenetv1_100"))
    ours = mobilenet.mobilenetv1_100()
    ours.load_state_dict(reference.state_dict())
    for shape in ((1, 3, 224, 224), (2, 3, 97, 65)):
        x = torch.randn(shape)
        yield Case(f"mobilenetv1_100 eval {shape[2]}x{shape[3]}", ours.eval(), reference.eval(), (x,), peer)
    stages = timm.create_model("mobilenetv1_100", features_only=True)
    stages.load_state_dict({k: v for k, v in reference.state_dict().items() if not k.startswith("classifier")})
    yield Case("stages", ours.stages, stages.eval(), (x,), f"{peer} features_only")
    yield Case("embed", ours.embed, lambda x: reference.forward_head(reference.forward_features(x), pre_logits=True),
               (x,), peer)  # fmt: skip
    reference = lively(timm.create_model("mobilenetv1_100", num_classes=5, in_chans=1))
    ours = mobilenet.mobilenetv1_100(num_classes=5, in_channels=1)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(3, 1, 65, 80)
    yield Case("mobilenetv1_100 training, one channel", ours.train(), reference.train(), (x,), peer, gradients=True)

    # The authors' arithmetic: uneven padding, epsilon 1e-3, 1001 classes; loaded through `from_official`.
    for name, width in (("mobilenetv1_100", 1.0), ("mobilenetv1_025", 0.25)):
        config = transformers.MobileNetV1Config(depth_multiplier=width, num_labels=1001)
        reference = lively(transformers.MobileNetV1ForImageClassification(config)).eval()
        ours = getattr(mobilenet, name)(num_classes=1001, same_padding=True, norm_eps=1e-3)
        ours.load_state_dict(mobilenet.from_official(reference.state_dict()))
        for size in (128, 97):
            yield Case(f"{name} with the authors' padding {size}px", ours.eval(), Logits(reference),
                       (torch.randn(2, 3, size, size),), f"transformers {transformers.__version__} MobileNetV1")  # fmt: skip

    for name, peer in (("mobilenetv1_075", "mobilenet_w3d4"), ("mobilenetv1_025", "mobilenet_wd4")):
        reference = lively(get_model(peer), top=1.3).eval()  # nothing clips ReLU
        ours = getattr(mobilenet, name)(activation=nn.ReLU)
        values = (v for k, v in reference.state_dict().items())  # the same layers in the same order
        ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
        yield Case(f"{name} with ReLU", ours.eval(), reference, (torch.randn(1, 3, 224, 224),), f"pytorchcv {peer}")

    for name in ("mobilenetv1_shallow", "mobilenetv1_conv"):
        net = lively(getattr(mobilenet, name)()).eval()
        yield Case(name, net, written_out(net), (torch.randn(1, 3, 64, 96),), "table 1 written out with functions")

    # Tables 4 to 7: parameters as printed, multiplications and additions within two percent.
    for name, size, work, parameters in STATED:
        yield Case(f"{name} at {size}px: {work}M multiply-adds, {parameters}M parameters",
                   lambda n=name, s=size, w=work: stated(*cost(n, s), w), lambda p=parameters: [p, True], (), "tables 4 to 7")  # fmt: skip

    # Eq. (5) over eq. (2): a separable block costs 1/N + 1/D_K^2 of the full one.
    yield Case("separable over full", lambda: ratio(256), lambda: 1 / 256 + 1 / 9, (), "sec. 3.1", rtol=1e-9)


def lively(network: nn.Module, top: float = 1.6) -> nn.Module:
    """Norms as after some training, and kernels and scales that keep the signal's size: the input reaches the output."""
    for module in settled(network).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, top)
    return network


STATED = (
    ("mobilenetv1_100", 224, 569, 4.2),
    ("mobilenetv1_075", 224, 325, 2.6),
    ("mobilenetv1_050", 224, 149, 1.3),
    ("mobilenetv1_025", 224, 41, 0.5),
    ("mobilenetv1_100", 160, 290, 4.2),
    ("mobilenetv1_shallow", 224, 307, 2.9),
    ("mobilenetv1_conv", 224, 4866, 29.3),
)


def cost(name: str, size: int) -> list[float]:
    """Multiply-adds of one image and parameters, in millions."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = getattr(mobilenet, name)().eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, size, size))
    return [counter.get_total_flops() / 2e6, sum(p.numel() for p in net.parameters()) / 1e6]


def stated(work: float, parameters: float, printed: float) -> list[float]:
    return [round(parameters, 1), abs(work / printed - 1) < 0.02]


def ratio(channels: int) -> float:
    """Weights of the convolutions of the two blocks; the work is each of them times the map."""
    counts = []
    for block in (mobilenet.DepthwiseSeparable, mobilenet.FullConvolution):
        with torch.device("meta"):
            counts.append(sum(p.numel() for p in block(channels, channels).parameters() if p.ndim == 4))
    return counts[0] / counts[1]


class Logits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).logits


def written_out(net: nn.Module):
    """The network in evaluation mode, from its weights alone."""
    w = net.state_dict()

    def conv(x: Tensor, kernel: str, norm: str, stride: int) -> Tensor:
        kernel, mean, var = w[f"{kernel}.weight"], w[f"{norm}.running_mean"], w[f"{norm}.running_var"]
        x = F.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, groups=x.shape[1] // kernel.shape[1])
        scale = w[f"{norm}.weight"] / (var + 1e-5).sqrt()
        return (x * scale.view(-1, 1, 1) + (w[f"{norm}.bias"] - mean * scale).view(-1, 1, 1)).clamp(0, 6)

    def forward(x: Tensor) -> Tensor:
        x = conv(x, "conv_stem", "bn1", 2)
        for stage, depth in enumerate(len(s) for s in net.blocks):
            for block in range(depth):
                name, stride = f"blocks.{stage}.{block}", 2 if stage and not block else 1
                if f"{name}.conv.weight" in w:
                    x = conv(x, f"{name}.conv", f"{name}.bn1", stride)
                else:
                    x = conv(x, f"{name}.conv_dw", f"{name}.bn1", stride)
                    x = conv(x, f"{name}.conv_pw", f"{name}.bn2", 1)
        return x.flatten(2).mean(2) @ w["classifier.weight"].T + w["classifier.bias"]

    return forward


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import timm

    return {
        "mobilenetv1_100": Pair(
            mobilenet.mobilenetv1_100,
            lambda: timm.create_model("mobilenetv1_100"),
            images,
            "timm:mobilenetv1_100",
            train_batch=4,
        )
    }
