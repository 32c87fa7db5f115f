"""Parity of FarSeg: with torchgeo's network and the authors' loss (stored outputs), and sec. 3 line by line."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.remote_sensing.farseg import golden, model
from paperzoo.papers.segmentation.pspnet.golden import by_rule
from paperzoo.papers.segmentation.segnet.parity import lively

NETWORK, LOSS = "torchgeo 0.8.1 FarSeg, stored outputs", "github Z-Zheng/FarSeg module/loss.py, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    network = model.farseg_resnet50_torchgeo(golden.CLASSES).eval()
    network.load_state_dict(by_rule(network.state_dict()))
    yield Case(
        "logits of two photographs",
        lambda x: network(x)[:, :, ::4, ::4].detach(),
        lambda x: stored["logits"],
        (golden.pictures(),),
        NETWORK,
        note="every fourth pixel",
    )
    yield Case(
        "loss and gradients of a training step",
        lambda: training_step(network),
        lambda: {name: stored[name] for name in ("loss", *golden.WATCHED)},
        against=f"{NETWORK}, with the authors' loss",
        rtol=1e-6,
        atol=1e-10,
        note="in double precision; 50 values each of eight gradients",
    )
    for step, kind in golden.STEPS:
        yield Case(
            f"loss and its gradient, {kind} annealing, step {step} of {golden.OVER}",
            lambda step=step, kind=kind: loss_and_gradient(step, kind),
            lambda step=step, kind=kind: stored[f"{kind} {step}"],
            against=LOSS,
            rtol=1e-6,
            atol=1e-12,
        )
    authors = model.farseg_resnet50(golden.CLASSES)
    yield Case(
        "the authors' names",
        lambda: {name: float(value.shape[0] if value.ndim else 0) for name, value in authors.state_dict().items()},
        lambda: {
            name: float(value.shape[0] if value.ndim else 0)
            for name, value in model.from_official(released_names(authors.state_dict())).items()
        },
        against="github Z-Zheng/FarSeg and SimpleCV: en.resnet, fpn.fpn_inner1, sr, cls_pred_conv",
    )
    for name, size, train in (
        ("farseg_resnet50", (1, 3, 64, 96), False),
        ("farseg_slim", (2, 3, 47, 70), False),
        ("farseg_slim", (3, 3, 64, 33), True),
    ):
        net = lively(getattr(model, name)(3).double().eval()).train(train)
        yield Case(
            f"{name} {'train' if train else 'eval'} {size}",
            net,
            WrittenOut(net),
            (torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),),
            "sec. 3.2 and 3.3, line by line",
            gradients=True,
        )
    yield from identities()


def identities() -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=rng) * 3
    ids = torch.randint(0, 4, (2, 6, 5), generator=rng)
    plain = F.cross_entropy(logits, ids, reduction="sum")
    for share in (0.0, 0.3, 1.0):
        yield Case(
            f"the sum of the losses is kept, zeta {share}",
            lambda share=share: model.foreground_aware_loss(logits, ids, share)[0].sum(),
            lambda: plain,
            against="eq. 5: Z keeps the sum",
        )
    yield Case(
        "weights fall with the probability of the class, two pixels by hand",
        lambda: by_hand(),
        lambda: torch.tensor([0.25, 0.01], dtype=torch.float64) * (-torch.tensor([0.5, 0.9]).double().log()),
        against="eq. 4 with p 0.5 and 0.9, gamma 2, before the normaliser",
    )


def by_hand() -> Tensor:
    p = torch.tensor([0.5, 0.9], dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()])[None, :, None]
    losses, focal = model.focal_parts(logits, torch.zeros(1, 1, 2, dtype=torch.int64), 2.0)
    return (losses * focal).flatten()


def training_step(network: nn.Module) -> dict[str, Tensor]:
    network.double().train().zero_grad()
    logits, ids = network(golden.pictures().double()), golden.masks()
    losses, _ = model.foreground_aware_loss(logits, ids, model.annealed(400 / golden.OVER))
    loss = losses.sum() / ((ids != 255).sum() + len(ids))
    loss.backward()
    found = {name: golden.sampled(network.get_submodule(name).weight.grad) for name in golden.WATCHED}
    return {"loss": loss.detach()} | found


def loss_and_gradient(step: int, kind: model.Annealing) -> Tensor:
    logits, ids = golden.scores().requires_grad_(), golden.masks()
    losses, _ = model.foreground_aware_loss(logits, ids, model.annealed(step / golden.OVER, kind))
    loss = losses.sum() / ((ids != 255).sum() + len(ids))
    loss.backward()
    return torch.cat([loss.detach()[None], golden.sampled(logits.grad)])


def released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`from_official` turned round, with the counter that the authors' files hold."""
    renamed = {"buffer_step": torch.zeros(())}
    for name, value in state.items():
        for ours, theirs in (("backbone.", "en.resnet."), ("fsr.", "sr."), ("decoder.classifier.0.", "cls_pred_conv.")):
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        if name.startswith("fpn."):
            _, kind, number, _, last = name.split(".")
            name = f"fpn.fpn_{kind.removesuffix('_blocks')}{int(number) + 1}.{last}"
        renamed[name] = value
    return renamed


class WrittenOut(nn.Module):
    """The network on its own maps, line by line."""

    def __init__(self, network: model.FarSeg) -> None:
        super().__init__()
        self.backbone, self.fpn, self.fsr, self.decoder = (
            network.backbone,
            network.fpn,
            network.fsr,
            network.decoder,
        )

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone.stages(images)
        u = maps[-1].flatten(2).sum(2) / maps[-1][0, 0].numel()
        refined = []
        for i, v in enumerate(self.fpn(maps)):
            first, _, second = self.fsr.scene_encoder[i]
            scene = linear(second, linear(first, u).clamp(min=0))
            psi, k = (unit(part[i], v) for part in (self.fsr.content_encoders, self.fsr.feature_reencoders))
            r = (psi * scene[:, :, None, None]).sum(1, keepdim=True)
            refined.append(k * 0.5 * (1 + torch.tanh(r / 2)))  # 1 / (1 + exp(-r))
        enlarged = []
        for i, z in enumerate(refined):
            for j, (convolution, norm, _) in enumerate(self.decoder.blocks[i]):
                z = norm(F.conv2d(z, convolution.weight, padding=1)).clamp(min=0)
                if i:
                    z = grid_sampled(z, refined[i - 1 - j].shape[-2:])
            enlarged.append(z)
        last = self.decoder.classifier[0]
        mean = torch.stack(enlarged).mean(0)
        return grid_sampled(F.conv2d(mean, last.weight, last.bias, padding=last.padding), images.shape[-2:])


def linear(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return x @ layer.weight[:, :, 0, 0].T + layer.bias


def unit(part: nn.Sequential, x: Tensor) -> Tensor:
    convolution, norm, _ = part
    return norm(
        torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], x) + convolution.bias[:, None, None]
    ).clamp(min=0)


def grid_sampled(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear with the corners on the corners, as matrices for rows and columns."""
    rows, columns = (hat(old, new) for old, new in zip(x.shape[-2:], size, strict=True))
    return torch.einsum("ih,bchw,jw->bcij", rows, x, columns)


def hat(old: int, new: int) -> Tensor:
    at = torch.linspace(0, old - 1, new, dtype=torch.float64) if new > 1 else torch.zeros(1, dtype=torch.float64)
    return (1 - (at[:, None] - torch.arange(old)).abs()).clamp(min=0)


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: segmentation-models-pytorch's FPN stands in, a pyramid on the same ResNet with a like decoder."""
    import segmentation_models_pytorch

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 256, 256),)

    def reference() -> nn.Module:
        return segmentation_models_pytorch.FPN("resnet50", encoder_weights=None, classes=16)

    against = f"segmentation-models-pytorch {segmentation_models_pytorch.__version__}: FPN, which has no scene relation"
    return {"farseg_resnet50": Pair(model.farseg_resnet50, reference, images, against, train_batch=2)}
