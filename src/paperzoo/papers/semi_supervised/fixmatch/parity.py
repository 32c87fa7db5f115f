"""Checks of FixMatch against slow, obvious versions, torchvision's image operations and torch's own averaging."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from paperzoo.engine.parity import Case
from paperzoo.papers.semi_supervised.fixmatch.technique import (
    GREY,
    POOL,
    FixMatchLoss,
    FlipAndShift,
    RandAugmentCutout,
    cosine_7_16,
    cutout,
    pseudo_labels,
)


def loss_by_loops(logits, labels, weak, strong):
    """Eq. 3 and 4 read aloud, one image at a time."""
    supervised = unsupervised = 0.0
    for row, label in zip(logits, labels, strict=True):
        supervised = supervised - (row[label] - row.logsumexp(0))
    for weak_row, strong_row in zip(weak, strong, strict=True):
        q = (weak_row - weak_row.logsumexp(0)).exp().detach()
        if float(q.max()) >= 0.95:
            label = int(q.argmax())
            unsupervised = unsupervised - (strong_row[label] - strong_row.logsumexp(0))
    return supervised / len(logits) + unsupervised / len(weak)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from loss_cases()
    yield from schedule_and_average_cases()
    yield from augmentation_cases()


def loss_cases() -> Iterator[Case]:
    for batch, mu, scale in ((4, 7, 4.0), (3, 1, 1.0), (8, 3, 8.0)):
        logits, weak, strong = torch.randn(batch, 10), scale * torch.randn(mu * batch, 10), torch.randn(mu * batch, 10)
        labels = torch.randint(10, (batch,))
        yield Case(
            f"loss, B={batch}, mu={mu}, logits x{scale:g}",
            lambda *x: FixMatchLoss()(*x)[0],
            loss_by_loops,
            (logits, labels, weak, strong),
            against="slow loop over images, eq. 3 and 4",
            gradients=True,
            note="no gradient reaches the weak view on either side",
        )
    probabilities = torch.tensor([[0.95, 0.05], [0.9499, 0.0501], [0.02, 0.98], [0.5, 0.5]], dtype=torch.float64)
    yield Case(
        "threshold",
        lambda p: pseudo_labels((p / p[:, :1]).log() + 3.0, 0.95 - 1e-12),
        lambda p: (torch.tensor([0, 0, 1, 0]), torch.tensor([1.0, 0.0, 1.0, 0.0])),
        (probabilities,),
        against="hand-computed example, sec. 2.2",
    )
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(4 * 15, 3, 8, 8)

    def interleaved(x):
        mixed = x.reshape(-1, 15, *x.shape[1:]).transpose(0, 1).reshape(x.shape)
        out = network(mixed)
        return out.reshape(15, -1, *out.shape[1:]).transpose(0, 1).reshape(out.shape)

    yield Case(
        "one forward pass, batch norm over all views",
        network,
        interleaved,
        (images,),
        against="the authors' interleave and de-interleave",
        note="interleaving mixes the views for devices with batch norm of their own; over a global batch it changes nothing",
    )


def schedule_and_average_cases() -> Iterator[Case]:
    steps = 2**20

    def by_scheduler(k):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.03)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine_7_16(int(k), steps))
        return scheduler.get_last_lr()[0]

    for k in (0, 1, steps // 2, steps):
        yield Case(
            f"learning rate at step {k}",
            by_scheduler,
            lambda k: 0.03 * math.cos(7 * math.pi * int(k) / (16 * steps)),
            (k,),
            against="eta cos(7 pi k / 16 K), sec. 2.4",
            rtol=1e-9,
            atol=1e-12,
        )

    def average(by_hand: bool):
        torch.manual_seed(1)
        network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
        kept: dict[str, torch.Tensor] = {}
        for _ in range(6):
            network(torch.randn(8, 4))
            with torch.no_grad():
                for p in network.parameters():
                    p.add_(torch.randn_like(p))
            averaged.update_parameters(network)
            for name, value in network.state_dict().items():
                if value.is_floating_point():
                    kept[name] = 0.999 * kept.get(name, value) + 0.001 * value
        return kept if by_hand else {name: averaged.module.state_dict()[name] for name in kept}

    yield Case(
        "running average of weights and batch-norm statistics",
        lambda: average(False),
        lambda: average(True),
        against="theta' <- 0.999 theta' + 0.001 theta by hand; ours is torch.optim.swa_utils.AveragedModel",
        note="torch's average starts at the weights after the first update",
    )


def augmentation_cases() -> Iterator[Case]:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as TF

    images = (torch.rand(6, 3, 12, 12) * 256).byte()
    images = (images.float() * torch.tensor([0.3, 1, 0.6, 0.9, 1, 0.2])[:, None, None, None]).byte()

    def warp(x, v, **how):
        plain = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | how
        return TF.affine(x, **plain, interpolation=InterpolationMode.NEAREST, fill=[float(GREY)] * 3)

    one_by_one = {
        "autocontrast": lambda x, v: TF.autocontrast(x),
        "brightness": TF.adjust_brightness,
        "color": TF.adjust_saturation,
        "contrast": TF.adjust_contrast,
        "equalize": lambda x, v: TF.equalize(x),
        "identity": lambda x, v: x,
        "posterize": lambda x, v: TF.posterize(x, int(v)),
        "rotate": lambda x, v: warp(x, v, angle=-v),
        "sharpness": TF.adjust_sharpness,
        "shear_x": lambda x, v: warp(x, v, center=[0, 0], shear=[math.degrees(math.atan(v)), 0.0]),
        "shear_y": lambda x, v: warp(x, v, center=[0, 0], shear=[0.0, math.degrees(math.atan(v))]),
        "solarize": lambda x, v: TF.solarize(x, 255 * v),
        "translate_x": lambda x, v: warp(x, v, translate=[-int(v * 12), 0]),
        "translate_y": lambda x, v: warp(x, v, translate=[0, -int(v * 12)]),
    }
    for name, (operation, low, high) in POOL.items():
        values = low + (high - low) * torch.tensor([0.03, 0.9, 0.27, 0.5, 0.77, 0.61])
        reference = one_by_one[name]
        blended = high == 0.95
        yield Case(
            f"operation {name}",
            lambda x, v, o=operation: o(x, v) / 255,
            lambda x, v, r=reference: torch.stack([r(a, float(b)) for a, b in zip(x, v, strict=True)]) / 255,
            (images, values),
            against="torchvision 0.29.2, transforms.v2.functional, one image at a time",
            atol=1.01 / 255 if blended else 0.0,
            note="up to one grey level of 255, where a blend is rounded" if blended else "",
        )

    def holes(x, centre):
        x = x.clone()
        for image, (row, column) in zip(x, (centre * 12).long().tolist(), strict=True):
            image[:, max(0, row - 3) : row + 3, max(0, column - 3) : column + 3] = GREY
        return x

    centres = torch.rand(6, 2)
    yield Case("cutout", lambda x, c: cutout(x, c, 6), holes, (images, centres), against="slow loop over images")

    def shifted(x, noise):
        out = []
        for image, (down, right) in zip(x, noise[:, :2].tolist(), strict=True):
            padded = F.pad(image[None].float(), (2, 2, 2, 2), mode="reflect")[0].byte()
            image = padded[:, int(down * 5) : int(down * 5) + 12, int(right * 5) : int(right * 5) + 12]
            out.append(image)
        return torch.stack(out)

    noise = torch.rand(6, 3)
    yield Case(
        "weak augmentation without flip",
        FlipAndShift(flip=False, shift=2 / 12),
        shifted,
        (images, noise),
        against="pad by reflection, then crop",
    )
    yield Case(
        "weak augmentation, flip only",
        FlipAndShift(shift=0.0),
        lambda x, n: torch.stack([a.flip(2) if b[2] < 0.5 else a for a, b in zip(x, n, strict=True)]),
        (images, noise),
        against="torch.flip",
    )
    strong = RandAugmentCutout()
    many = torch.rand(6, strong.noise)
    yield Case(
        "strong augmentation, a batch and its halves",
        strong,
        lambda x, n: torch.cat([strong(x[:2], n[:2]), strong(x[2:], n[2:])]),
        (images, many),
        against="the same numbers on two processes",
    )
