"""ConvMixer against timm, its own equations written out, and the paper's counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.engine.weights import parameter_count
from paperzoo.papers.classification.convmixer import model as convmixer
from paperzoo.papers.classification.resnet.parity import images


def cases() -> Iterator[Case]:
    import timm
    from timm.models.convmixer import ConvMixer as Theirs

    torch.manual_seed(0)
    for name in ("convmixer_768_32", "convmixer_1024_20_ks9_p14"):
        peer = f"timm {timm.__version__} {name}"
        reference = seen(timm.create_model(name), 56)
        ours = getattr(convmixer, name)().eval()
        ours.load_state_dict(reference.state_dict())
        for shape in ((1, 3, 112, 112), (2, 3, 75, 60)):
            yield Case(f"{name} eval, {shape[2]} x {shape[3]}", ours, reference, (torch.randn(shape),), peer)
    reference = Theirs(768, 3, 7, 7, 1, 5, act_layer=nn.ReLU).double()
    ours = convmixer.ConvMixer(768, 3, 7, 7, 5, 1, activation=nn.ReLU).double()
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(3, 1, 42, 35).double()
    yield Case("768/3 training, one channel", ours.train(), reference.train(), (x,), "timm ConvMixer", gradients=True)

    net = seen(convmixer.convmixer_digits(), 32)
    yield Case("eq. 1 to 3 written out", net, equations(net), (torch.randn(2, 3, 32, 30),), "paper, sec. 2", gradients=False)  # fmt: skip
    chain = as_chain(net)
    named = {k: v.clone() for k, v in chain.state_dict().items()}
    yield Case("the authors' names", lambda: convmixer.from_official(named), lambda: dict(net.state_dict()), against="one nn.Sequential, as the authors' code has it", rtol=0.0, atol=0.0)  # fmt: skip
    yield Case("the chain", chain, net, (torch.randn(2, 3, 32, 32),), "one nn.Sequential, as the authors' code has it")
    for name, stated in (("convmixer_1536_20", 51.6), ("convmixer_768_32", 21.1), ("convmixer_1024_20_ks9_p14", 24.4)):
        yield Case(
            f"{name}: millions of parameters",
            lambda n=name: round(on_meta(n) / 1e6, 1),
            lambda s=stated: s,
            against="paper, table 1",
            rtol=1e-9,
        )


def seen(net: nn.Module, size: int) -> nn.Module:
    """In eval mode, with batch norms that know their inputs' statistics: untrained ones let nothing of an image through."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average of what was seen
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        net.train()(torch.randn(4, 3, size, size))
    return net.eval()


def equations(net: convmixer.ConvMixer):
    w = net.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(
            x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"]
        )

    def forward(x: Tensor) -> Tensor:
        p = net.patch_size
        patches = F.unfold(x, p, stride=p)  # (B, C p^2, N)
        z = w["stem.0.weight"].flatten(1) @ patches + w["stem.0.bias"][:, None]
        z = norm(F.gelu(z).unflatten(2, (x.shape[2] // p, x.shape[3] // p)), "stem.2")
        for i in range(len(net.blocks)):
            b = f"blocks.{i}"
            k = w[f"{b}.0.fn.0.weight"]
            y = F.conv2d(z, k, w[f"{b}.0.fn.0.bias"], padding=k.shape[-1] // 2, groups=z.shape[1])
            z = norm(F.gelu(y), f"{b}.0.fn.2") + z
            y = torch.einsum("bihw,oi->bohw", z, w[f"{b}.1.weight"][:, :, 0, 0]) + w[f"{b}.1.bias"][:, None, None]
            z = norm(F.gelu(y), f"{b}.3")
        return z.flatten(2).mean(2) @ w["head.weight"].T + w["head.bias"]

    return forward


def as_chain(net: convmixer.ConvMixer) -> nn.Sequential:
    return nn.Sequential(*net.stem, *net.blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head).eval()


def on_meta(name: str) -> int:
    with torch.device("meta"):
        return parameter_count(getattr(convmixer, name)())


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import timm

    return {
        "convmixer_768_32": Pair(
            convmixer.convmixer_768_32,
            lambda: timm.create_model("convmixer_768_32"),
            images,
            "timm:convmixer_768_32",
            train_batch=2,
        )
    }
