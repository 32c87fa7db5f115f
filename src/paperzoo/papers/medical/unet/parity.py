"""U-Net against a version with the paper's numbers written out, MONAI's `BasicUNet`, and slow versions of the weight map, the metric and the mirror."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.medical.unet.model import UNet, mirrored, unet_padded
from paperzoo.papers.medical.unet.recipe import object_ious
from paperzoo.papers.medical.unet.technique import balancing, border_weights, elastic_places, read


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    ours, reference = UNet(2, 1, width=2).eval(), WrittenOut(2, 1, width=2).eval()
    livelier(ours)
    reference.load_state_dict(ours.state_dict())
    for batch, side, gradients in ((1, 572, False), (2, 188, True), (1, 220, True)):
        yield Case(
            f"batch {batch}, {side} x {side} -> {side - 184} x {side - 184}",
            ours,
            reference,
            (torch.randn(batch, 1, side, side),),
            "fig. 1, arrow by arrow",
            gradients=gradients,
        )

    name, make = monai_unet()
    for train, size in ((False, (32, 48)), (False, (64, 64)), (True, (32, 32))):
        ours = UNet(3, 3, width=4, padded=True).double().train(train)
        livelier(ours)
        reference = make(4, 3).double().train(train)
        places = into_monai(ours, reference)
        yield Case(
            f"padded, {'training' if train else 'eval'} {size}: logits and all gradients",
            lambda x, net=ours, places=places: gradients_of(net, x, {k: k for k in places}),
            lambda x, net=reference, places=places: gradients_of(net, x, places),
            (torch.randn(2, 3, *size, dtype=torch.float64),),
            name,
            note="its last upsampling keeps twice the channels; the surplus ones have weights of zero",
        )

    whole, tiles = UNet(2, 3, width=4, depth=2, tile=1000).eval(), UNet(2, 3, width=4, depth=2, tile=20).eval()
    tiles.load_state_dict(whole.state_dict())
    for size in ((61, 50), (9, 33)):
        yield Case(
            f"overlap-tile: no seams {size}",
            tiles,
            whole,
            (torch.randn(2, 3, *size),),
            "the picture in one piece (fig. 2)",
        )
    for n, before, after in ((7, 4, 3), (5, 20, 33), (2, 3, 3), (1, 2, 2)):
        yield Case(
            f"mirrored border, {n} pixels",
            lambda n=n, b=before, a=after: mirrored(n, b, a),
            lambda n=n, b=before, a=after: np.pad(np.arange(n), (b, a), mode="reflect"),
            (),
            "numpy.pad, reflect",
        )

    rng = np.random.default_rng(0)
    mask = torch.zeros(17, 21, dtype=torch.int64)
    mask[2:7, 2:8] = mask[2:7, 9:13] = mask[10:15, 4:9] = 1
    mask[9:12, 12:18] = 2
    mask[0, :3] = 255
    shares = torch.tensor([0.7, 1.5, 2.0])
    yield Case(
        "the weight map",
        lambda: border_weights(mask, shares, 10.0, 3.0),
        lambda: slow_weights(mask, shares, 10.0, 3.0),
        (),
        "eq. 2 as loops over pixels and cells",
    )
    one = (mask == 2).long()
    yield Case(
        "the weight map of a single cell",
        lambda: border_weights(one, shares),
        lambda: shares[one],
        (),
        "no second cell, no border",
    )
    counts = torch.tensor([900.0, 90.0, 0.0, 10.0])
    yield Case(
        "w_c: every class weighs the same, the mean over pixels is 1",
        lambda: (balancing(counts) * counts, (balancing(counts) * counts).sum() / counts.sum()),
        lambda: (torch.tensor([1000 / 3, 1000 / 3, 0.0, 1000 / 3]), 1.0),
        (),
        "identity",
        atol=1e-3,
    )

    answer = rng.random((17, 21)) < 0.75
    yield Case(
        "IoU of objects",
        lambda: torch.tensor(object_ious(answer * mask.numpy(), mask.numpy())),
        lambda: torch.tensor(slow_ious(answer * mask.numpy(), mask.numpy())),
        (),
        "sets of pixels, flood fill",
    )
    picture = torch.randn(2, 9, 12)
    yield Case(
        "reading without a deformation is a crop with a mirrored border",
        lambda: read(picture, elastic_places((21, 23), 0.0, 3, 0.0, False) + torch.tensor([4.0, 6.0]), nearest=False),
        lambda: np.pad(picture.numpy(), ((0, 0), (6, 6), (5, 6)), mode="reflect"),
        (),
        "numpy.pad, reflect",
    )


class WrittenOut(UNet):
    """Fig. 1 arrow by arrow: blue (convolution, ReLU), red (pooling), green (up-convolution), grey (copy and crop)."""

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(self.named_parameters())

        def blue(h: Tensor, name: str, place: int) -> Tensor:
            kernel, bias = (weights[f"{name}.double_conv.{place}.{part}"] for part in ("weight", "bias"))
            return F.conv2d(h, kernel, bias).clamp(min=0)

        h, copies = x, []
        for name in ("inc", *(f"down{i}.maxpool_conv.1" for i in range(1, 5))):
            h = F.max_pool2d(h, 2, 2) if copies else h
            h = blue(blue(h, name, 0), name, 2)
            copies.append(h)
        if x.shape[-1] == 572:  # the sizes that the figure states
            assert [copy.shape[-1] for copy in copies] == [568, 280, 136, 64, 28]
        for step, (name, cut) in enumerate((("up1", 4), ("up2", 16), ("up3", 40), ("up4", 88))):
            h = F.conv_transpose2d(h, weights[f"{name}.up.weight"], weights[f"{name}.up.bias"], stride=2)
            copy = copies[3 - step][:, :, cut:-cut, cut:-cut]
            h = blue(blue(torch.cat([copy, h], 1), f"{name}.conv", 0), f"{name}.conv", 2)
        return F.conv2d(h, weights["outc.conv.weight"], weights["outc.conv.bias"])


def livelier(network: nn.Module) -> None:
    """Norms and biases that are not at their start, so that leaving one out shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
        elif getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.1)


def gradients_of(net: nn.Module, x: Tensor, places: dict[str, str]) -> dict[str, Tensor]:
    """Logits, and the gradients of their summed squares by our parameters' names; of MONAI's wider ones the part that is ours."""
    x = x.clone().requires_grad_(True)
    logits = net(x)
    own = dict(net.named_parameters())
    found = torch.autograd.grad(logits.square().sum(), [x, *(own[name] for name in places.values())])
    result = {"logits": logits, "input": found[0]}
    for (name, place), gradient in zip(places.items(), found[1:], strict=True):
        surplus = place.startswith("upcat_1.upsample") or place == "upcat_1.convs.conv_0.conv.weight"
        result[name] = narrowed(place, gradient) if surplus else gradient
    return result


def narrowed(place: str, gradient: Tensor) -> Tensor:
    """Of MONAI's last upsampling the first half of the channels that it makes; of the convolution behind it those that it sees."""
    if place.endswith("deconv.weight"):
        return gradient[:, : gradient.shape[1] // 2] if gradient.shape[0] == gradient.shape[1] else gradient
    if place.endswith("deconv.bias"):
        return gradient[: len(gradient) // 2]
    return gradient[:, : 2 * len(gradient)]


def slow_weights(mask: Tensor, shares: Tensor, w0: float, sigma: float) -> Tensor:
    """Eq. 2, one pixel and one cell at a time."""
    cells = flood(mask.numpy())
    out = torch.zeros(mask.shape)
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            k = int(mask[i, j])
            if k == 255:
                continue
            out[i, j] = shares[k]
            if k == 0:
                d1, d2 = sorted(min(math.hypot(i - a, j - b) for a, b in cell) for cell in cells)[:2]
                out[i, j] += w0 * math.exp(-((d1 + d2) ** 2) / (2 * sigma**2))
    return out


def flood(ids: np.ndarray) -> list[set[tuple[int, int]]]:
    """Connected parts of each class but 0 and 255, by class, in the order of their first pixels."""
    found = []
    for k in sorted(set(ids.ravel().tolist()) - {0, 255}):
        left = {(int(i), int(j)) for i, j in zip(*np.nonzero(ids == k), strict=True)}
        while left:
            part, edge = set(), [min(left)]
            while edge:
                i, j = edge.pop()
                if (i, j) in left:
                    left.remove((i, j))
                    part.add((i, j))
                    edge += [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
            found.append(part)
    return found


def slow_ious(answer: np.ndarray, truth: np.ndarray) -> list[float]:
    ious = []
    for k in sorted(set(truth.ravel().tolist()) - {0, 255}):
        parts = flood(np.where(answer == k, k, 0))
        for thing in flood(np.where(truth == k, k, 0)):
            match = [part for part in parts if len(part & thing) > 0.5 * len(thing)]
            ious.append(len(match[0] & thing) / len(match[0] | thing) if match else 0.0)
    return ious


def monai_unet():
    """The name and a function (width, classes) that makes MONAI's network with our kind of norm and activation."""
    import monai
    from monai.networks.nets import BasicUNet

    def make(width: int, classes: int) -> nn.Module:
        features = (width, 2 * width, 4 * width, 8 * width, 16 * width, width)
        return BasicUNet(2, 3, classes, features, act=("relu", {"inplace": True}), norm="batch")

    return f"monai {monai.__version__} BasicUNet", make


def into_monai(ours: UNet, theirs: nn.Module) -> dict[str, str]:
    """Copy weights; biases before batch norm and the channels that only MONAI's network has become zero. Our parameters' names to its."""
    own = ours.state_dict()
    places: dict[str, str] = {}
    pairs = {"conv_0.conv_0": "inc.double_conv.0", "conv_0.conv_1": "inc.double_conv.3"}
    for i in range(1, 5):
        pairs |= {f"down_{i}.convs.conv_{c}": f"down{i}.maxpool_conv.1.double_conv.{3 * c}" for c in (0, 1)}
        pairs |= {f"upcat_{5 - i}.convs.conv_{c}": f"up{i}.conv.double_conv.{3 * c}" for c in (0, 1)}
        places |= {f"up{i}.up.{p}": f"upcat_{5 - i}.upsample.deconv.{p}" for p in ("weight", "bias")}
    places |= {f"outc.conv.{p}": f"final_conv.{p}" for p in ("weight", "bias")}
    for name, mine in pairs.items():
        stem, place = mine.rsplit(".", 1)
        places[f"{mine}.weight"] = f"{name}.conv.weight"
        for key in ("weight", "bias", "running_mean", "running_var"):
            places[f"{stem}.{int(place) + 1}.{key}"] = f"{name}.adn.N.{key}"
    taken = {theirs_name: own[name] for name, theirs_name in places.items()}
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            value.zero_()
            if name in taken:
                value[tuple(slice(0, n) for n in taken[name].shape)] = taken[name]
    return {name: place for name, place in places.items() if "running" not in name}


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    name, make = monai_unet()

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 128, 128),)

    return {"unet_padded": Pair(unet_padded, lambda: make(64, 2), images, name.replace(" ", ":", 1), train_batch=2)}
