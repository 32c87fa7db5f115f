"""ConvNeXt against torchvision, timm, transformers and a version of the isotropic network written out with functions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.convnext import model as convnext
from paperzoo.papers.classification.resnet.parity import images


def cases() -> Iterator[Case]:
    import timm
    import torchvision
    import transformers

    tv, peer = f"torchvision {torchvision.__version__.split('+')[0]}", f"timm {timm.__version__}"
    torch.manual_seed(0)
    reference = lively(torchvision.models.convnext_tiny()).eval()
    ours = convnext.convnext_tiny().eval()
    ours.load_state_dict(reference.state_dict())
    for shape in ((1, 3, 224, 224), (2, 3, 97, 65)):
        x = torch.randn(shape)
        yield Case(f"convnext_tiny eval {shape[2]}x{shape[3]}", ours, reference, (x,), f"{tv} convnext_tiny")
    yield Case("stages", ours.stages, staged(reference), (x,), f"{tv} features.1, 3, 5, 7")
    yield Case("embed", ours.embed, lambda x: reference.classifier[:2](reference.avgpool(reference.features(x))), (x,),
               f"{tv} classifier[:2]")  # fmt: skip

    for name, shape in (("convnext_small", (2, 3, 64, 96)), ("convnext_base", (1, 3, 65, 64))):
        reference = lively(timm.create_model(name)).eval()
        ours = getattr(convnext, name)().eval()
        ours.load_state_dict(convnext.from_official(reference.state_dict()))
        yield Case(f"{name} eval", ours, reference, (torch.randn(shape),), f"{peer} {name}")
    for name in ("convnext_large", "convnext_xlarge"):  # the published widths; as deep as fits in seconds
        with torch.device("meta"):
            full = getattr(convnext, name)()
        depths, widths = (1, 1, 2, 1), full.stage_channels
        reference = lively(timm.create_model(name, depths=depths)).eval()
        ours = convnext.ConvNeXt(depths, widths).eval()
        ours.load_state_dict(convnext.from_official(reference.state_dict()))
        yield Case(f"{name}, shallow", ours, reference, (torch.randn(1, 3, 64, 64),), f"{peer} {name}")

    reference = lively(timm.create_model("convnext_tiny", num_classes=5, in_chans=1))
    ours = convnext.convnext_tiny(num_classes=5, in_channels=1)
    ours.load_state_dict(convnext.from_official(reference.state_dict()))
    x = torch.randn(3, 1, 65, 80)
    yield Case("convnext_tiny training, one channel", with_loss(ours.train()), with_loss(reference.train()), (x,),
               f"{peer} convnext_tiny", gradients=True)  # fmt: skip
    reference = lively(torchvision.models.convnext_tiny(num_classes=7, stochastic_depth_prob=0.0))
    ours = convnext.convnext_tiny(num_classes=7)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 64, 64)
    yield Case("every parameter's gradient", ours.train(), reference.train(), (x,), f"{tv} convnext_tiny",
               gradients=True, rtol=1e-3, atol=1e-3)  # fmt: skip
    reference, ours = (
        torchvision.models.convnext_tiny(stochastic_depth_prob=0.4),
        convnext.convnext_tiny(drop_path_rate=0.4),
    )
    yield Case(
        "shares of left-out branches", lambda: shares(ours), lambda: shares(reference), (), f"{tv} convnext_tiny"
    )

    config = transformers.ConvNextConfig(depths=(2, 1, 3, 1), hidden_sizes=(16, 24, 32, 48), num_labels=9)
    reference = lively(transformers.ConvNextForImageClassification(config)).eval()
    ours = convnext.ConvNeXt((2, 1, 3, 1), (16, 24, 32, 48), 9).eval()
    ours.load_state_dict(convnext.from_official(reference.state_dict()))
    yield Case("from_official, transformers", ours, lambda x: reference(x).logits, (torch.randn(2, 3, 64, 96),),
               f"transformers {transformers.__version__} ConvNextForImageClassification")  # fmt: skip
    state = timm.create_model("convnext_tiny").state_dict()
    yield Case("the authors' parameter names", lambda: sorted_shapes(convnext.from_official(authors(state))),
               lambda: sorted_shapes(convnext.convnext_tiny().state_dict()), (), "the released code")  # fmt: skip

    for layer_scale in (None, 1e-6):
        net = lively(convnext.IsotropicConvNeXt(48, 4, layer_scale=layer_scale)).eval()
        official = {authors_isotropic(k): v for k, v in net.state_dict().items()}
        loaded = convnext.IsotropicConvNeXt(48, 4, layer_scale=layer_scale).eval()
        loaded.load_state_dict(convnext.from_official(official))
        yield Case(f"isotropic, layer scale {layer_scale}", loaded, written_out(official, 4),
                   (torch.randn(2, 3, 97, 80),), "fig. 4 written out with functions")  # fmt: skip
    for name, work, parameters in STATED:
        yield Case(f"{name}: cost", lambda n=name: cost(n), lambda w=work, p=parameters: [w, p], (),
                   "tables 1 and 2", rtol=0)  # fmt: skip


# billions of multiply-adds at 224 px, millions of parameters
STATED = (
    ("convnext_tiny", 4.5, 29),
    ("convnext_small", 8.7, 50),
    ("convnext_base", 15.4, 89),
    ("convnext_large", 34.4, 198),
    ("convnext_xlarge", 60.9, 350),
    ("convnext_isotropic_small", 4.3, 22),
    ("convnext_isotropic_base", 16.9, 87),
    ("convnext_isotropic_large", 59.7, 306),
)


def lively(network: nn.Module) -> nn.Module:
    """Norms and layer scales as after training: with factors of a millionth no branch would show."""
    for name, p in network.named_parameters():
        if name.endswith(("gamma", "layer_scale", "layer_scale_parameter")):
            nn.init.uniform_(p, 0.2, 0.6)
        elif p.ndim == 1:
            nn.init.uniform_(p, 0.5, 1.5) if name.endswith("weight") else nn.init.normal_(p, std=0.1)
        elif p.ndim == 4:
            nn.init.kaiming_normal_(p)
    return network


def staged(reference: nn.Module):
    def maps(x: Tensor) -> list[Tensor]:
        outputs = []
        for layer in reference.features:
            x = layer(x)
            outputs.append(x)
        return outputs[1::2]

    return maps


def with_loss(network: nn.Module):
    return lambda x: F.cross_entropy(network(x), torch.arange(len(x)))


def shares(network: nn.Module) -> list[float]:
    return [m.p for m in network.modules() if type(m).__name__ == "StochasticDepth"]


def sorted_shapes(state: dict[str, Tensor]) -> list:
    """Names as numbers, so that the two sides are compared name by name."""
    return [[float(sum(name.encode())), *map(float, value.shape)] for name, value in sorted(state.items())]


def authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those of the released code."""
    pairs = (
        ("blocks.", ""), ("conv_dw", "dwconv"), ("mlp.fc", "pwconv"), ("head.norm", "norm"), ("head.fc", "head"),
        ("stem.", "downsample_layers.0."),
    )  # fmt: skip
    renamed = {}
    for name, value in state.items():
        if ".downsample." in name:
            name = name.replace("stages", "downsample_layers").replace(".downsample", "")
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def authors_isotropic(name: str) -> str:
    for number, part in ((0, "dwconv"), (2, "norm"), (3, "pwconv1"), (5, "pwconv2")):
        name = name.replace(f".block.{number}.", f".{part}.")
    return name.replace("layer_scale", "gamma")


def written_out(w: dict[str, Tensor], depth: int):
    """The isotropic network without modules, from the authors' names."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def forward(x: Tensor) -> Tensor:
        x = F.conv2d(x, w["stem.weight"], w["stem.bias"], stride=16)
        for b in (f"blocks.{i}" for i in range(depth)):
            y = F.conv2d(x, w[f"{b}.dwconv.weight"], w[f"{b}.dwconv.bias"], padding=3, groups=x.shape[1])
            y = norm(y.movedim(1, -1), f"{b}.norm") @ w[f"{b}.pwconv1.weight"].T + w[f"{b}.pwconv1.bias"]
            y = y * (1 + torch.erf(y / 2**0.5)) / 2
            y = (y @ w[f"{b}.pwconv2.weight"].T + w[f"{b}.pwconv2.bias"]).movedim(-1, 1)
            x = x + y * w.get(f"{b}.gamma", torch.ones(()))
        return norm(x.flatten(2).mean(2), "norm") @ w["head.weight"].T + w["head.bias"]

    return forward


def cost(name: str) -> list[float]:
    """Multiply-adds of one image in billions, and parameters in millions, rounded as the tables are."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = getattr(convnext, name)().eval()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            net(torch.empty(1, 3, 224, 224))
    return [round(counter.get_total_flops() / 2e9, 1), round(sum(p.numel() for p in net.parameters()) / 1e6)]


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    from torchvision import models

    return {
        "convnext_tiny": Pair(
            convnext.convnext_tiny,
            lambda: models.convnext_tiny(weights=None),
            images,
            "torchvision:convnext_tiny",
            train_batch=2,
        )
    }
