"""Parity of DenseDepth: the network on torchvision's DenseNet, SSIM with scikit-image, the loss written out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.depth.densedepth import model, technique


class Plain(nn.Module):
    """torchvision's features by their numbers, and the decoder's convolutions one after the other."""

    def __init__(self, features: nn.Module, convs: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"features": features})  # our names, so that gradients are compared by name
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, padding=k // 2) for a, b, k in convs)

    def forward(self, images: Tensor) -> Tensor:
        maps = [images]
        for layer in self.encoder["features"]:
            maps.append(layer(maps[-1]))
        x = self.convs[0](maps[12].clamp(min=0))
        for i, skip in enumerate((maps[8], maps[6], maps[4], maps[3])):
            x = F.interpolate(x, size=(skip.shape[2], skip.shape[3]), mode="bilinear", align_corners=True)
            x = torch.cat([x, skip], 1)
            for conv in (self.convs[2 * i + 1], self.convs[2 * i + 2]):
                x = conv(x)
                x = torch.where(x > 0, x, 0.2 * x)
        return self.convs[9](x)


def plain169(half: bool = False) -> Plain:
    """DenseNet-169 with the decoder's published sizes."""
    from torchvision.models import densenet169

    n = 832 if half else 1664
    plan = [(1664, n, 1)]
    for inside, skip, out in ((n, 256, n // 2), (n // 2, 128, n // 4), (n // 4, 64, n // 8), (n // 8, 64, n // 16)):
        plan += [(inside + skip, out, 3), (out, out, 3)]
    return Plain(densenet169(weights=None).features, [*plan, (n // 16, 1, 3)])


def take(plain: Plain, ours: model.DenseDepth) -> Plain:
    plain.encoder["features"].load_state_dict(ours.encoder.features.state_dict())
    decoder = ours.decoder
    blocks = [c for b in (decoder.up1, decoder.up2, decoder.up3, decoder.up4) for c in (b.convA, b.convB)]
    for conv, source in zip(plain.convs, [decoder.conv2, *blocks, decoder.conv3], strict=True):
        conv.load_state_dict(source.state_dict())
    return plain.train(ours.training)


def cases() -> Iterator[Case]:
    import skimage
    import torchvision
    from torchvision.models import densenet169, densenet201

    torch.manual_seed(0)
    against = f"torchvision {torchvision.__version__} densenet169 and a plain decoder"
    ours = model.densedepth169().eval()
    classifier = densenet169(weights=None).eval()
    old = {  # as the published files write it
        k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v
        for k, v in classifier.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    ours.load_backbone(old)
    yield Case("densedepth169 eval (64, 96)", ours, take(plain169(), ours), (torch.rand(2, 3, 64, 96),), against)
    yield Case(
        "densedepth169 eval, odd size (75, 101)",
        ours,
        take(plain169(), ours),
        (torch.rand(1, 3, 75, 101),),
        against,
    )
    x = torch.rand(1, 3, 64, 64)
    yield Case(
        "an encoder from a classifier's published file ends with the classifier's features",
        lambda x, net=ours: net.encoder(x)[-1],
        lambda x, net=classifier: F.relu(net.features(x)),
        (x,),
        f"torchvision {torchvision.__version__} densenet169",
    )
    official = {f"encoder.original_model.{k}": v for k, v in classifier.state_dict().items()}
    official |= {k: v for k, v in ours.state_dict().items() if k.startswith("decoder.")}
    again = model.densedepth169().eval()
    again.load_state_dict(model.from_official(official))
    yield Case("the authors' names", again, ours, (x,), "the same network")
    del ours, again, classifier, old, official

    half = model.densedepth169_half().train()
    yield Case(
        "densedepth169_half train (32, 64)",
        half.double(),
        take(plain169(half=True).double(), half),
        (torch.rand(2, 3, 32, 64).double(),),
        against,
        gradients=True,
        note="in double precision",
    )
    del half
    large = model.densedepth201_half().eval()
    reference = densenet201(weights=None).eval()
    reference.features.load_state_dict(large.encoder.features.state_dict())
    yield Case(
        "densedepth201's encoder",
        lambda x: large.encoder(x)[-1],
        lambda x: F.relu(reference.features(x)),
        (x,),
        f"torchvision {torchvision.__version__} densenet201",
    )

    one, other = 1 + 20 * torch.rand(2, 1, 24, 31).double(), 1 + 20 * torch.rand(2, 1, 24, 31).double()
    other[0] = (3 * one[0] + other[0]) / 4

    def by_skimage(a: Tensor, b: Tensor) -> float:
        from skimage.metrics import structural_similarity

        maps = [
            structural_similarity(
                p[0].numpy(),
                q[0].numpy(),
                data_range=100,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                full=True,
            )[1][5:-5, 5:-5]
            for p, q in zip(a, b, strict=True)
        ]
        return float(np.mean(maps))

    yield Case(
        "SSIM", technique.ssim, by_skimage, (one, other), f"scikit-image {skimage.__version__}, away from the border"
    )
    yield Case(
        "the loss",
        lambda y: technique.densedepth_loss(y, other).total,
        lambda y: slow_loss(y, other),
        (one,),
        "eq. (1) to (5) with loops over pixels",
        gradients=True,
        atol=1e-8,
        note="in double precision",
    )
    known = torch.ones_like(other, dtype=torch.bool)
    yield Case(
        "the loss where all is known",
        lambda y: technique.densedepth_loss(y, other, known).total,
        lambda y: technique.densedepth_loss(y, other).total,
        (one,),
        "identity",
        gradients=True,
        atol=1e-9,
    )
    depth = torch.tensor([[[[0.0, 0.05, 0.5], [2.0, 10.0, 40.0]]]])
    yield Case(
        "reciprocal depth and back",
        lambda d: (technique.reciprocal(d, 10.0), technique.depth_of(technique.reciprocal(d, 10.0), 10.0)[..., 1, :]),
        lambda d: (
            torch.tensor([[[[0.0, 100.0, 20.0], [5.0, 1.0, 1.0]]]]),
            torch.tensor([[[2.0, 10.0, 10.0]]]),
        ),
        (depth,),
        "computed by hand: 10 / depth between 0.1 and 10",
    )
    y = torch.tensor([[[[2.0, 4.0, 0.0, 0.0], [0.0, 6.0, 0.0, 0.0]]]])
    yield Case(
        "half resolution over known pixels",
        lambda y: technique.reduced(y, (1, 2)),
        lambda y: (torch.tensor([[[[4.0, 0.0]]]]), torch.tensor([[[[True, False]]]])),
        (y,),
        "computed by hand",
    )


def slow_loss(y: Tensor, truth: Tensor) -> Tensor:
    """Distance, slopes (the last row and column have none), and SSIM with a two-dimensional window, term by term."""
    batch, _, height, width = y.shape
    count = y.numel()
    distance = sum((y[i] - truth[i]).abs().sum() for i in range(batch)) / count
    edges = 0.0
    for r in range(height):
        for c in range(width):
            if r + 1 < height:
                edges = (
                    edges
                    + ((y[:, 0, r + 1, c] - y[:, 0, r, c]) - (truth[:, 0, r + 1, c] - truth[:, 0, r, c])).abs().sum()
                )
            if c + 1 < width:
                edges = (
                    edges
                    + ((y[:, 0, r, c + 1] - y[:, 0, r, c]) - (truth[:, 0, r, c + 1] - truth[:, 0, r, c])).abs().sum()
                )
    line = torch.tensor([np.exp(-((k - 5) ** 2) / (2 * 1.5**2)) for k in range(11)], dtype=y.dtype)
    window = line[:, None] * line[None] / line.sum() ** 2
    values = []
    for r in range(height - 10):
        for c in range(width - 10):
            a, b = y[:, 0, r : r + 11, c : c + 11], truth[:, 0, r : r + 11, c : c + 11]
            m, n = (a * window).sum((1, 2)), (b * window).sum((1, 2))
            va, vb = (a * a * window).sum((1, 2)) - m * m, (b * b * window).sum((1, 2)) - n * n
            cov = (a * b * window).sum((1, 2)) - m * n
            values.append(
                (2 * m * n + 1) * (2 * cov + 9) / ((m * m + n * n + 1) * (va + vb + 9))
            )  # (0.01 * 100)^2, (0.03 * 100)^2
    return 0.1 * distance + edges / count + (1 - torch.stack(values).mean()) / 2


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: torchvision's DenseNet with a plain decoder."""
    return {
        "densedepth169": Pair(
            model.densedepth169,
            plain169,
            lambda batch: (torch.rand(batch, 3, 240, 320),),
            "torchvision:densenet169 and a plain decoder",
            train_batch=2,
        )
    }
