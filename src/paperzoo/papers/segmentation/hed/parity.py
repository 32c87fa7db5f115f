"""Parity of HED: with the most used port (stored outputs), and the authors' crop-aligned transposed convolutions written out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.segmentation.hed import golden, model
from paperzoo.papers.segmentation.pspnet.golden import by_rule as by_rule  # for golden.py
from paperzoo.tasks.edges import CAFFE_MEAN, balanced_loss

SOURCE = "github sniklaus/pytorch-hed, stored outputs"
OURS = {
    "netVggOne.0": "features.0",
    "netVggThr.3": "features.12",
    "netVggFiv.5": "features.28",
    "netScoreOne": "side.0",
    "netScoreFou": "side.3",
    "netCombine.0": "fuse",
}


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    network = model.hed_vgg16_interpolated().eval()
    network.load_state_dict(model.from_official(golden.weights(port_names(network.state_dict()))))
    yield Case(
        "the port: probabilities of two photographs",
        lambda: network(normalised(golden.pictures()))[:, :, ::2, ::2].sigmoid().detach(),
        lambda: stored["probabilities"],
        against=SOURCE,
        note="names converted, its channels blue first; every second pixel",
    )
    yield Case(
        "the port: loss and gradients",
        lambda: training_step(network),
        lambda: {name: stored[name] for name in ("loss", *golden.WATCHED)},
        against=f"{SOURCE}, eq. 2 written out",
        rtol=1e-5,
        atol=1e-8,
        note="in double precision; the loss of the fused output; 50 values each of six gradients",
    )
    for size, train in (((2, 3, 48, 64), False), ((1, 3, 37, 53), False), ((2, 3, 30, 41), True)):
        net = lively(model.HED((6, 6, 0, 8, 8, 0, 10, 10, 10, 0, 12, 12, 12, 0, 12, 12, 12))).double().train(train)
        yield Case(
            f"crop-aligned, {'train' if train else 'eval'} {size}",
            net,
            WrittenOut(net),
            (torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),),
            "the authors' layers: pad 35, transposed convolutions, crops of 34, 35, 36, 38, 42",
            gradients=True,
        )
    net = lively(model.HED((4, 0, 6, 0, 8), 0, "average")).double().eval()
    x = torch.randn(2, 3, 17, 22, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    yield Case(
        "the average of all outputs",
        lambda: net(x).sigmoid().detach(),
        lambda: average(net, x),
        against="eq. 8",
    )
    yield from losses()


def losses() -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, dtype=torch.float64, generator=rng)
    drawn = torch.rand(3, 4, 5, generator=rng) < 0.2
    counts = torch.rand(3, 4, 5, generator=rng) < 0.8
    drawn[2] = False
    yield Case(
        "balanced cross-entropy, pixel by pixel",
        lambda v: balanced_loss(v, drawn, counts),
        lambda v: slow_loss(v, drawn, counts),
        (logits,),
        "eq. 2 as a loop",
        gradients=True,
    )
    yield Case(
        "balanced cross-entropy by hand",
        lambda: balanced_loss(torch.zeros(1, 1, 4).double(), drawn_one(), torch.ones(1, 1, 4, dtype=torch.bool)),
        lambda: torch.tensor([1.5], dtype=torch.float64) * torch.tensor(2.0, dtype=torch.float64).log(),
        against="one edge among four pixels, all at 1/2: (3/4 + 3/4) log 2",
    )


def drawn_one() -> Tensor:
    return torch.tensor([[[True, False, False, False]]])


def slow_loss(logits: Tensor, drawn: Tensor, counts: Tensor) -> Tensor:
    totals = []
    for picture, edges, counted in zip(logits, drawn, counts, strict=True):
        beta = float((~edges & counted).sum()) / float(counted.sum())
        terms = [picture.new_zeros(())]
        for v, e, c in zip(picture.flatten(), edges.flatten(), counted.flatten(), strict=True):
            if c:
                p = 1 / (1 + torch.exp(-v))
                terms.append(-beta * p.log() if e else -(1 - beta) * (1 - p).log())
        totals.append(torch.stack(terms).sum())
    return torch.stack(totals)


def average(network: model.HED, x: Tensor) -> Tensor:
    with torch.no_grad():
        sides = network.sides(x)
        every = [network.fuse(torch.cat(sides, 1)), *sides]
        return sum(v.sigmoid() for v in every) / len(every)


def lively(network: model.HED) -> model.HED:
    """Side outputs that differ, where training would start with zeros."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in (*network.side, network.fuse):
            part.weight.copy_(torch.randn(part.weight.shape, generator=rng) * 0.5)
            part.bias.copy_(torch.randn(part.bias.shape, generator=rng))
    return network


def normalised(pictures: Tensor) -> Tensor:
    return 255 * (pictures - torch.tensor(CAFFE_MEAN, dtype=pictures.dtype)[:, None, None])


def port_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`from_official` turned round, for the names alone."""
    names = {}
    stages = {0: "One", 4: "Two", 9: "Thr", 16: "Fou", 23: "Fiv"}
    for name, value in state.items():
        part, number, *rest = name.split(".")
        if part == "features":
            start = max(s for s in stages if s <= int(number))
            names[f"netVgg{stages[start]}.{int(number) - start}.{rest[0]}"] = value
        elif part == "side":
            names[f"netScore{list(stages.values())[int(number)]}.{rest[0]}"] = value
        else:
            names[f"netCombine.0.{number}"] = value
    return names


def training_step(network: model.HED) -> dict[str, Tensor]:
    network.double().eval().zero_grad()
    logits, drawn = network(normalised(golden.pictures().double())), golden.edges()
    loss = balanced_loss(logits[:, 0], drawn, torch.ones_like(drawn)).mean()
    loss.backward()
    found = {name: golden.sampled(network.get_submodule(ours).weight.grad) for name, ours in OURS.items()}
    return {"loss": loss.detach()} | found


class WrittenOut(nn.Module):
    """The authors' layers: the first convolution pads by 35, side maps go through transposed convolutions of kernel 2s and stride s, and
    are cut to the picture from the offsets that aligning the layers' pixels gives."""

    def __init__(self, network: model.HED) -> None:
        super().__init__()
        self.features, self.side, self.fuse = network.features, network.side, network.fuse
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor | list[Tensor]]:
        height, width = x.shape[-2:]
        maps, first = [], True
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
                x = F.max_pool2d(x, 2, 2, ceil_mode=True)
            elif isinstance(layer, nn.Conv2d):
                x, first = F.conv2d(x, layer.weight, layer.bias, padding=35 if first else 1), False
            else:
                x = x.clamp(min=0)
        sides = []
        for level, (score, feature) in enumerate(zip(self.side, [*maps, x], strict=True)):
            logits = torch.einsum("oc,bchw->bohw", score.weight[:, :, 0, 0], feature) + score.bias[:, None, None]
            s, offset = 2**level, 34
            if level:
                at = 1 - (torch.arange(2 * s, dtype=x.dtype) - (2 * s - 1) / 2).abs() / s
                logits = F.conv_transpose2d(logits, (at[:, None] * at)[None, None], stride=s)
                offset += s // 2
            sides.append(logits[:, :, offset : offset + height, offset : offset + width])
        fused = sum(w * s for w, s in zip(self.fuse.weight.flatten(), sides, strict=True)) + self.fuse.bias
        return {"out": fused, "aux": sides} if self.training else fused


class Port(nn.Module):
    """torchvision's VGG-16 with the port's side outputs."""

    def __init__(self) -> None:
        super().__init__()
        import torchvision

        layers = torchvision.models.vgg16().features
        self.stages = nn.ModuleList(layers[a:b] for a, b in ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)))
        self.scores = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in (64, 128, 256, 512, 512))
        self.combine = nn.Conv2d(5, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, found = x.shape[-2:], []
        for stage, score in zip(self.stages, self.scores, strict=True):
            x = stage(x)
            found.append(F.interpolate(score(x), size, mode="bilinear", align_corners=False))
        return self.combine(torch.cat(found, 1))


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: forward passes of equal work."""
    import torchvision

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 320, 480),)

    against = f"torchvision {torchvision.__version__} vgg16 with the side outputs of sniklaus/pytorch-hed"
    return {"hed_vgg16_interpolated": Pair(model.hed_vgg16_interpolated, Port, images, against, train_batch=1)}
