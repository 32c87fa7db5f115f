"""Parity of SegNet: with pytorchcv's network, torchvision's encoder, the layers written out, and the formulas of sec. 3.2 as loops."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.segmentation.segnet import model
from paperzoo.papers.segmentation.segnet.recipe import weighted_loss

PIXELS = [10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595, 3719877, 405385, 184967]
IMAGES = [366, 365, 366, 367, 349, 319, 351, 173, 360, 317, 201]
"""Pixels of each class in the 367 training masks of CamVid (360 x 480), and the images it appears in; counted from the released masks."""
CENTRAL = sorted(p / (i * 360 * 480) for p, i in zip(PIXELS, IMAGES, strict=True))[5]


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms with statistics and weights that are not 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.6, 1.5),
                (module.weight.data, 0.7, 1.3),
                (module.bias.data, -0.2, 0.3),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return network


def cases() -> Iterator[Case]:
    import pytorchcv
    import torchvision
    from pytorchcv.models.segnet import segnet_cityscapes

    torch.manual_seed(0)
    against = f"pytorchcv {pytorchcv.__version__} segnet_cityscapes"
    reference = lively(segnet_cityscapes(num_classes=5).eval())
    ours = model.segnet(num_classes=5).eval()
    ours.load_state_dict(model.from_official(reference.state_dict()))
    for size in ((1, 3, 64, 96), (3, 3, 32, 32)):
        yield Case(f"segnet eval {size}", ours, reference, (torch.randn(size),), against)
    yield Case(
        "segnet train: logits and the gradient of the input",
        ours.double().train(),
        reference.double().train(),
        (torch.randn(2, 3, 64, 32, dtype=torch.float64),),
        against,
        gradients=True,
        note="in double precision",
    )
    yield Case(
        "segnet train: the gradient of every weight",
        lambda x: model.from_official(dict(zip(names(reference), gradients(reference, x), strict=True))),
        lambda x: dict(zip(names(ours), gradients(ours, x), strict=True)),
        (torch.randn(2, 3, 32, 64, dtype=torch.float64),),
        against,
        rtol=1e-6,
        note="in double precision",
    )
    stack = model.SegNet(num_classes=2).eval()
    for batch_norm in (True, False):
        name = "vgg16_bn" if batch_norm else "vgg16"
        classifier = lively(getattr(torchvision.models, name)(weights=None, init_weights=False).eval())
        stack.load_backbone(classifier.state_dict())
        yield Case(
            f"the encoder with the weights of {name}",
            stack.features if batch_norm else without_norms(stack.features),
            classifier.features,
            (torch.randn(2, 3, 64, 96),),
            f"torchvision {torchvision.__version__} {name}.features",
        )

    for name, network, size in (
        ("segnet_slim, odd sizes", model.segnet_slim(num_classes=4), (2, 3, 45, 35)),
        ("segnet_slim, one pixel high", model.segnet_slim(num_classes=4), (1, 3, 1, 37)),
        (
            "segnet at CamVid's proportions",
            model.SegNet((4, 0, 6, 0, 8, 0, 8, 0, 8, 0), num_classes=3),
            (1, 3, 90, 120),
        ),
        ("segnet_basic", model.SegNetBasic(8, num_classes=4), (2, 3, 45, 60)),
    ):
        net = lively(network.eval())
        yield Case(name, net, lambda x, net=net: plainly(net, x), (torch.randn(size),), "fig. 2 and 3, pixel by pixel")

    x = torch.relu(torch.randn(2, 3, 7, 9))
    yield Case(
        "pooling and unpooling keep the largest of every window in its place",
        lambda x: model.unpool(*model.pool(x), x.shape[-2:]),
        kept_in_place,
        (x,),
        "the definition: loops over windows",
    )

    pixels, images = torch.tensor(PIXELS), torch.tensor(IMAGES)
    yield Case(
        "median frequency balancing of CamVid",
        lambda: model.median_frequency_weights(pixels, images * 360 * 480).tolist(),
        lambda: [CENTRAL / (p / (i * 360 * 480)) for p, i in zip(PIXELS, IMAGES, strict=True)],
        (),
        "sec. 3.2 in plain numbers",
    )
    weights = torch.tensor([0.5, 2.0, 0.0, 1.5])
    masks = torch.randint(0, 4, (2, 6, 5))
    masks[:, :2] = 255
    yield Case(
        "the weighted loss and its gradient",
        lambda logits: weighted_loss(logits, masks, weights, 255, counted=(masks != 255).sum()),
        lambda logits: loss_by_pixel(logits, masks, weights),
        (torch.randn(2, 4, 6, 5),),
        "caffe-segnet's softmax_loss_layer.cpp, pixel by pixel",
        gradients=True,
    )
    nothing = torch.full((1, 3, 3), 255)
    yield Case(
        "all pixels ignored: no loss, and no NaN",
        lambda logits: weighted_loss(logits, nothing, weights, 255, counted=torch.tensor(0)),
        lambda logits: (0.0 * logits).sum(),
        (torch.randn(1, 4, 3, 3),),
        "zero",
        gradients=True,
    )


def names(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_parameters()]


def gradients(network: nn.Module, x: Tensor) -> list[Tensor]:
    loss = network(x).square().mean()
    return list(torch.autograd.grad(loss, list(network.parameters())))


def without_norms(stack: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(layer for layer in stack if not isinstance(layer, nn.BatchNorm2d)))


def plainly(net: model.SegNet | model.SegNetBasic, x: Tensor) -> Tensor:
    """The network layer by layer, with pooling and unpooling as loops over windows."""
    basic = isinstance(net, model.SegNetBasic)
    if basic:
        power = sum(F.pad(x.square(), (0, 0, 0, 0, 2, 2))[:, i : i + x.shape[1]] for i in range(5))
        x = x / (1 + 1e-4 / 5 * power) ** 0.75  # Caffe's across-channel normalisation
    encoders = list(net.encoder) if basic else split(net.features)
    places = []
    for stage in encoders:
        for conv, norm in convolutions(stage):
            x = normalised(conv, norm, x).clamp(min=0)
        x, place = pooled(x)
        places.append(place)
    for stage in net.decoder:
        x = scattered(x, *places.pop())
        for conv, norm in convolutions(stage):
            x = normalised(conv, norm, x)
            x = x if basic else x.clamp(min=0)
    return F.conv2d(x, net.classifier.weight, net.classifier.bias, padding=0 if basic else 1)


def split(stack: nn.Sequential) -> list[list[nn.Module]]:
    ends = [-1, *(i for i, layer in enumerate(stack) if isinstance(layer, nn.MaxPool2d))]
    return [list(stack)[a + 1 : b] for a, b in pairwise(ends)]


def convolutions(stage: nn.Module | list) -> list[tuple[nn.Module, nn.Module]]:
    layers = list(stage)
    return [(layers[i], layers[i + 1]) for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]


def normalised(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    h = F.conv2d(x, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (h - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def pooled(x: Tensor) -> tuple[Tensor, tuple]:
    """Values (B, C, h, w), and for each the row and column it came from, with the size before."""
    batch, channels, height, width = x.shape
    down, across = -(-height // 2), -(-width // 2)
    values, places = torch.zeros(batch, channels, down, across), {}
    for b in range(batch):
        for c in range(channels):
            for i in range(down):
                for j in range(across):
                    window = [
                        (y, z) for y in (2 * i, 2 * i + 1) for z in (2 * j, 2 * j + 1) if y < height and z < width
                    ]
                    plane = x[b, c].detach()
                    best = max(window, key=lambda at, plane=plane: plane[at].item())
                    values[b, c, i, j] = plane[best]
                    places[b, c, i, j] = best
    return values, (places, (height, width))


def scattered(values: Tensor, places: dict, size: tuple[int, int]) -> Tensor:
    out = torch.zeros(*values.shape[:2], *size)
    for (b, c, i, j), (y, z) in places.items():
        out[b, c, y, z] = values[b, c, i, j]
    return out


def kept_in_place(x: Tensor) -> Tensor:
    values, places = pooled(x)
    return scattered(values, *places)


def loss_by_pixel(logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    total, counted = torch.zeros(()), 0
    for b in range(masks.shape[0]):
        for i in range(masks.shape[1]):
            for j in range(masks.shape[2]):
                label = int(masks[b, i, j])
                if label != 255:
                    total = total - weights[label] * logits[b, :, i, j].softmax(0)[label].log()
                    counted += 1
    return total / counted


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    from pytorchcv.models.segnet import segnet_cityscapes

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 224, 224),)

    return {
        "segnet": Pair(
            lambda: model.segnet(num_classes=19),
            segnet_cityscapes,
            images,
            "pytorchcv:segnet_cityscapes",
            train_batch=2,
        )
    }
