"""PAN against the authors' code (golden values, see `golden.py`), and losses, growing and reading against literal loops."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.ocr.pixel_aggregation_network import golden
from paperzoo.papers.ocr.pixel_aggregation_network.model import PAN, pan, pan_resnet18
from paperzoo.papers.ocr.pixel_aggregation_network.technique import (
    KernelTargets,
    hard_pixels,
    pixel_aggregation,
    similarity_losses,
    texts_from_maps,
)

SOURCE = "pan_pp.pytorch, the authors' code at 674e4d8"


# -- literal versions --------------------------------------------------------------------------------------------------


def slow_growth(text: np.ndarray, kernels: np.ndarray, vectors: np.ndarray, distance: float) -> np.ndarray:
    """Sec. 3.4 with a queue, a pixel at a time; kernels are numbered where a scan meets them first."""
    height, width = text.shape
    labels = np.zeros((height, width), dtype=np.int64)
    kernels, number = kernels & text, 0
    for start in zip(*np.nonzero(kernels), strict=True):
        if labels[start]:
            continue
        number += 1
        labels[start], stack = number, [start]
        while stack:
            y, x = stack.pop()
            for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= place[0] < height and 0 <= place[1] < width
                if inside and kernels[place] and not labels[place]:
                    labels[place] = number
                    stack.append(place)
    means = [vectors[:, labels == i].astype(np.float64).mean(1) for i in range(1, number + 1)]
    queue = deque(zip(*np.nonzero(labels), strict=True))
    while queue:
        y, x = queue.popleft()
        for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if not (0 <= place[0] < height and 0 <= place[1] < width) or not text[place] or labels[place]:
                continue
            if np.linalg.norm(vectors[:, place[0], place[1]] - means[labels[y, x] - 1]) < distance:
                labels[place] = labels[y, x]
                queue.append(place)
    return labels


def slow_losses(maps: Tensor, instances: Tensor, kernels: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """Eq. 1 to 7 for each picture, text and pair in turn, then their mean over the pictures."""
    found: dict[str, list[Tensor]] = {"text": [], "kernel": [], "aggregation": [], "discrimination": [], "size": []}
    for m, instance, kernel, count in zip(maps, instances, kernels, counted, strict=True):
        text = instance > 0
        positives, negatives = int((text & count).sum()), sorted(m[0][~text].tolist(), reverse=True)
        wanted = min(3 * positives, len(negatives))
        chosen = count if wanted == 0 else ((m[0] >= negatives[wanted - 1]) | text) & count
        for name, logits, target, mask in (("text", m[0], text, chosen), ("kernel", m[1], kernel, text & count)):
            p, g = torch.sigmoid(logits[mask]), target[mask].float()
            found[name].append(1 - 2 * (p * g).sum() / ((p * p).sum() + 0.001 + (g * g).sum() + 0.001))
        means, pulls = [], []
        for number in instance.unique().tolist():
            mine = (instance == number) & count
            if number == 0 or not bool((mine & kernel).any()):
                continue
            mean = m[2:, mine & kernel].mean(1)
            means.append(mean)
            pulls.append(torch.stack([pull(vector, mean) for vector in m[2:, mine].T]).mean())
        zero = m.sum() * 0
        found["aggregation"].append(torch.stack(pulls).mean() if pulls else zero)
        pairs = [
            (F.relu(3 - (a - b).norm()) ** 2 + 1).log()
            for i, a in enumerate(means)
            for j, b in enumerate(means)
            if i != j
        ]
        found["discrimination"].append(torch.stack(pairs).mean() if pairs else zero)
        found["size"].append(sum(((mean.norm() + 1).log() for mean in means), zero) / (len(means) + 1))
    weights = {"text": 1, "kernel": 0.5, "aggregation": 0.25, "discrimination": 0.25, "size": 0.25 * 0.001}
    return {name: weights[name] * torch.stack(values).mean() for name, values in found.items()}


def pull(vector: Tensor, mean: Tensor) -> Tensor:
    return (F.relu((vector - mean).norm() - 0.5) ** 2 + 1).log()


class SlowPAN(nn.Module):
    """Fig. 3 written down over torchvision's ResNet-18, in eval mode, with the weights of ours."""

    def __init__(self, ours: PAN, fpem: int) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.state, self.fpem, self.body = ours.state_dict(), fpem, resnet18()
        own = {k.removeprefix("backbone.body."): v for k, v in self.state.items() if k.startswith("backbone.body.")}
        self.body.load_state_dict(own, strict=False)
        self.body.eval()

    def norm(self, x: Tensor, name: str) -> Tensor:
        s = self.state
        mean, variance = s[f"{name}.running_mean"], s[f"{name}.running_var"]
        return F.relu(F.batch_norm(x, mean, variance, s[f"{name}.weight"], s[f"{name}.bias"]))

    def separable(self, x: Tensor, module: str, name: str, stride: int) -> Tensor:
        x = F.conv2d(x, self.state[f"{module}.dwconv{name}.weight"], stride=stride, padding=1, groups=x.shape[1])
        x = F.conv2d(x, self.state[f"{module}.smooth_layer{name}.conv.weight"])
        return self.norm(x, f"{module}.smooth_layer{name}.bn")

    def forward(self, images: Tensor) -> Tensor:
        b, maps = self.body, []
        x = b.maxpool(b.relu(b.bn1(b.conv1(images))))
        for i, layer in enumerate((b.layer1, b.layer2, b.layer3, b.layer4), 1):
            x = layer(x)
            reduced = F.conv2d(x, self.state[f"reduce_layer{i}.conv.weight"])
            maps.append(self.norm(reduced, f"reduce_layer{i}.bn"))
        total = [torch.zeros_like(m) for m in maps]
        for k in range(1, self.fpem + 1):
            for i in (2, 1, 0):
                above = F.interpolate(maps[i + 1], maps[i].shape[2:], mode="bilinear")
                maps[i] = self.separable(above + maps[i], f"fpem{k}", f"{i + 1}_1", 1)
            for i in (1, 2, 3):
                here = F.interpolate(maps[i], maps[i - 1].shape[2:], mode="bilinear")
                maps[i] = self.separable(here + maps[i - 1], f"fpem{k}", f"{i + 1}_2", 2)
            total = [t + m for t, m in zip(total, maps, strict=True)]
        x = torch.cat([F.interpolate(t, total[0].shape[2:], mode="bilinear") for t in total], 1)
        s = self.state
        x = self.norm(F.conv2d(x, s["det_head.conv1.weight"], s["det_head.conv1.bias"], padding=1), "det_head.bn1")
        return F.conv2d(x, s["det_head.conv2.weight"], s["det_head.conv2.bias"])


# -- cases -------------------------------------------------------------------------------------------------------------


def our_losses(model: PAN, batch: int) -> tuple[Tensor, Tensor]:
    """The parts (3, batch) as the authors' code has them, and fingerprints of the gradients of their sum."""
    golden.write_weights(model).train()
    m = golden.maps(batch)
    made = [dict(zip(m, values, strict=True)) for values in zip(*m.values(), strict=True)]
    images = golden.noise((batch, 3, *golden.LOSS_CANVAS))
    losses = model(images, made)
    names, parameters = zip(*sorted(model.named_parameters()), strict=True)
    gradients = torch.autograd.grad(sum(losses.values()), parameters)
    prints = golden.fingerprint(dict(zip(names, gradients, strict=True)))
    similarity = losses["aggregation"] + losses["discrimination"] + losses["size"]
    parts = torch.stack([losses["text"], losses["kernel"], similarity]).detach()
    return parts, torch.stack([prints[name] for name in sorted(prints)])


def random_maps(batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps (batch, 6, 20, 30) and targets: up to three texts, the last picture without any, some pixels ignored."""
    draw = torch.Generator().manual_seed(seed)
    maps = torch.randn(batch, 6, 20, 30, generator=draw) * 1.5
    instances = torch.zeros(batch, 20, 30, dtype=torch.int32)
    for picture in range(max(1, batch - 1)):
        for number in range(1, 4):
            top, left = torch.randint(12, (2,), generator=draw).tolist()
            instances[picture, top : top + 7, left : left + 12] = number
    kernels = (instances > 0) & (torch.rand(instances.shape, generator=draw) < 0.3)
    counted = torch.rand(instances.shape, generator=draw) < 0.9
    counted &= instances != 3
    return maps, instances, kernels, counted


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    theirs = load_file(golden.FILE)
    model = golden.write_weights(pan_resnet18()).eval()
    yield Case(
        "parameters of the released network",
        lambda: sum(p.numel() for p in model.parameters()),
        lambda: int(theirs["parameters"]),
        against=SOURCE,
    )
    for name, (batch, height, width) in golden.CANVASES.items():
        images = golden.noise((batch, 3, height, width))
        yield Case(
            f"raw maps, eval mode, {batch} x {height} x {width}",
            model,
            lambda x, n=name: theirs[f"maps/{n}"],
            (images,),
            SOURCE,
            rtol=1e-3,
            atol=1e-4,
        )
    for batch in golden.BATCHES:
        yield Case(
            f"losses and all gradients, train mode, batch of {batch}",
            lambda b=batch: our_losses(model, b),
            lambda b=batch: (theirs[f"losses/{b}"].mean(1), theirs[f"gradients/{b}"]),
            against=SOURCE,
            rtol=2e-3,
            atol=1e-4,
            note="text, kernel, similarity; of each gradient its length and a projection. One text ignored, one without kernel, "
            "one picture empty",
        )
    for name, (text, kernels, vectors, distance) in golden.grown().items():
        yield Case(
            f"pixel aggregation, {name}",
            lambda a=(text, kernels, vectors, distance): pixel_aggregation(*a),
            lambda n=name: theirs[f"labels/{n}"],
            against=f"{SOURCE}, their Cython queue",
        )
    yield from literal_cases()
    yield from reading_cases()


def literal_cases() -> Iterator[Case]:
    torch.manual_seed(0)
    bare = Bare()
    for batch, seed in ((1, 0), (2, 1), (3, 2)):
        maps, *rest = random_maps(batch, seed)
        yield Case(
            f"losses and their gradient, batch of {batch}",
            lambda m, r=rest: bare.loss(m, *r),
            lambda m, r=rest: slow_losses(m, *r),
            (maps,),
            "eq. 1 to 7, a text, a pixel and a pair at a time",
            gradients=True,
        )
    empty = torch.zeros(2, 20, 30, dtype=torch.int32)
    everything = torch.ones(2, 20, 30, dtype=torch.bool)
    yield Case(
        "no text at all: everything counts, no similarity to learn",
        lambda: (
            hard_pixels(torch.randn(2, 20, 30), empty > 0, everything),
            similarity_losses(torch.randn(2, 4, 20, 30), empty, empty > 0, everything),
        ),
        lambda: (everything, (torch.zeros(2),) * 3),
        against="by hand",
    )
    for seed in range(4):
        rng = np.random.RandomState(seed)
        text, kernels = rng.rand(40, 55) < 0.8, rng.rand(40, 55) < (0.02, 0.05, 0.1, 0.3)[seed]
        vectors = rng.randn(4 if seed else 2, 40, 55).astype(np.float32) * 3
        yield Case(
            f"pixel aggregation at distance 6, drawing {seed}",
            lambda a=(text, kernels, vectors, 6.0): pixel_aggregation(*a),
            lambda a=(text, kernels, vectors, 6.0): slow_growth(*a),
            against="a queue, sec. 3.4",
        )
    for fpem in (1, 2, 4):
        ours = golden.write_weights(pan(backbone="resnet18", fpem=fpem, channels=32)).eval()
        yield Case(
            f"ResNet-18 by name, {fpem} FPEM: raw maps",
            ours,
            SlowPAN(ours, fpem),
            (torch.rand(2, 3, 64, 96),),
            "fig. 3 and 4 written down over torchvision's resnet18",
        )


class Bare(PAN):
    """Only the loss."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def reading_cases() -> Iterator[Case]:
    square = {"polygons": [torch.tensor([[10.0, 10], [50, 10], [50, 30], [10, 30]])], "ignore": torch.tensor([False])}
    # A = 800, L = 120, d = 800 (1 - 0.49) / 120 = 3.4: from 13.4 to 46.6 and 26.6, that is pixels 13 … 46 and 13 … 26, as centres count
    expected = torch.zeros(40, 60, dtype=torch.bool)
    expected[13:27, 13:47] = True
    yield Case(
        "the kernel of a rectangle",
        lambda: KernelTargets(0.7)(square, (40, 60))["kernels"],
        lambda: expected,
        against="d = A (1 - r^2) / L by hand, sec. 3.5",
    )
    maps = np.full((6, 12, 20), -4.0, dtype=np.float32)
    maps[2:] = 0
    maps[0, 2:6, 3:11] = 4
    maps[1, 3:5, 4:10] = 4
    maps[0, 8:10, 2:4] = maps[1, 8, 2] = 1  # too unsure: 0.73
    yield Case(
        "reading one text, another being too unsure",
        lambda: texts_from_maps(maps, 4.0, rectangles=True),
        lambda: (
            [np.array([[12, 8], [44, 8], [44, 24], [12, 24]], dtype=np.float32)],
            np.array([1 / (1 + np.exp(-4))]),
        ),
        against="by hand",
        note="columns 3 to 10 and rows 2 to 5 of maps at stride 4",
    )
