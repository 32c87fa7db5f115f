"""CutPaste against PIL's pasting, scikit-learn's covariance, Grad-CAM by backpropagation, torchvision's network, and patches one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F2

from paperzoo.engine.parity import Case
from paperzoo.papers.anomaly.cutpaste import model, technique


def cases() -> Iterator[Case]:
    import PIL
    import sklearn
    import torchvision

    # -- pasting
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    for name, transform in (("CutPaste", technique.CutPaste(jitter=0.0)), ("scar", technique.CutPasteScar(jitter=0.0))):
        drawn = [transform.make_params([image]) for _ in range(12)]
        yield Case(f"{name}, twelve places", lambda t=transform, d=drawn: [t.transform(image, p) for p in d],
                   lambda d=drawn: [_pasted(image, p) for p in d], (), f"Pillow {PIL.__version__} crop, rotate and paste")  # fmt: skip
    yield Case("sizes and places as sec. 2.2 draws them", lambda: _extent(technique.CutPaste(), 4000),
               lambda: {"area": (0.02, 0.15), "aspect": (0.3, 1 / 0.3), "below one": 0.5, "inside": 1.0}, (), "4000 draws, the bounds",
               atol=0.03, rtol=0.03)  # fmt: skip
    yield Case("no place or size of a scar is outside", lambda: _inside(technique.CutPasteScar((2, 16), (10, 25)), (20, 24)),
               lambda: 1.0, (), "150 draws in an image smaller than a scar is long")  # fmt: skip
    labels = torch.tensor([1, 2])
    yield Case("labels pass through, images are not changed in place", lambda: _untouched(technique.CutPaste(), image, labels),
               lambda: {"labels": labels, "image": image}, (), "the inputs")  # fmt: skip

    # -- the density
    for count, dimensions in ((12, 20), (200, 9)):
        x = torch.randn(count, dimensions) @ torch.randn(dimensions, dimensions)
        yield Case(f"density of {count} features in {dimensions} dimensions", technique.fit_density, _ledoit_wolf, (x,),
                   f"scikit-learn {sklearn.__version__} LedoitWolf")  # fmt: skip
        mean, precision = technique.fit_density(x)
        yield Case(f"distances, {dimensions} dimensions", lambda y, m=mean, p=precision: technique.mahalanobis(y, m, p),
                   lambda y, m=mean, p=precision: _by_log_probability(y, m, p), (x.double(),), "torch's MultivariateNormal.log_prob")  # fmt: skip

    # -- networks
    tv = f"torchvision {torchvision.__version__.split('+')[0]}"
    reference = torchvision.models.resnet18()
    network = model.cutpaste_resnet18()
    network.backbone.load_state_dict({n: t for n, t in reference.state_dict().items() if not n.startswith("fc.")})
    x = torch.randn(4, 3, 64, 80)
    plain = _Classifier(reference, network)
    network.eval()
    yield Case("logits", network.logits, plain.eval(), (x,), f"{tv} resnet18 and its head")
    _fit(network, 512)
    yield Case("score and Grad-CAM of a whole image", network, lambda x: _by_backpropagation(network, x), (x,),
               "grad_cam on layer4 of -log p")  # fmt: skip
    yield Case(
        "a training step",
        _Trained(network),
        _Trained(plain),
        (x,),
        f"{tv} resnet18",
        gradients=True,
        rtol=1e-3,
        atol=1e-4,
    )

    small = model.cutpaste_patch_resnet8(patch_size=16, stride=4).eval()
    _fit(small, 64)
    for size in ((2, 3, 32, 24), (1, 3, 16, 20)):
        x = torch.randn(size)
        yield Case(f"patches of {size[2]} x {size[3]}", small, lambda x: _patch_by_patch(small, x), (x,),
                   "patches one by one, each spread over its pixels")  # fmt: skip


def _pasted(image: Tensor, params: dict) -> Tensor:
    whole = Image.fromarray(image.permute(1, 2, 0).numpy())
    top, left, height, width = params["source"]
    patch = whole.crop((left, top, left + width, top + height))
    if "target" in params:
        whole.paste(patch, (params["target"][1], params["target"][0]))
    else:
        inside = Image.new("L", patch.size, 255)
        patch, inside = (p.rotate(params["angle"], expand=True) for p in (patch, inside))
        room = (image.shape[1] - patch.height + 1, image.shape[2] - patch.width + 1)
        y, x = (int(part * extent) for part, extent in zip(params["place"], room, strict=True))
        whole.paste(patch, (x, y), inside)
    return F2.pil_to_tensor(whole)


def _extent(transform: technique.CutPaste, draws: int) -> dict:
    size, areas, aspects, inside = (1000, 1600), [], [], True
    image = torch.empty(3, *size, dtype=torch.uint8)
    for _ in range(draws):
        params = transform.make_params([image])
        top, left, height, width = params["source"]
        areas.append(height * width / (size[0] * size[1]))
        aspects.append(width / height)
        for y, x in ((top, left), params["target"]):
            inside &= 0 <= y <= size[0] - height and 0 <= x <= size[1] - width
    below = sum(a < 1 for a in aspects) / draws
    return {
        "area": (min(areas), max(areas)),
        "aspect": (min(aspects), max(aspects)),
        "below one": below,
        "inside": float(inside),
    }


def _inside(transform: technique.CutPasteScar, size: tuple[int, int]) -> float:
    """The share of draws that could be pasted and left the image its size."""
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    kept = [transform(image).shape == image.shape for _ in range(150)]
    return sum(kept) / len(kept)


def _untouched(transform: v2.Transform, image: Tensor, labels: Tensor) -> dict:
    mine = image.clone()
    _, passed = transform(mine, {"labels": labels})
    return {"labels": passed["labels"], "image": mine}


def _ledoit_wolf(x: Tensor) -> tuple[Tensor, Tensor]:
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf().fit(x.double().numpy())
    return torch.from_numpy(fitted.location_), torch.from_numpy(fitted.precision_)


def _by_log_probability(x: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    normal = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    return (2 * (normal.log_prob(mean) - normal.log_prob(x))).sqrt()


@torch.no_grad()
def _fit(network: model.CutPasteNet, width: int) -> None:
    mean, precision = technique.fit_density(torch.rand(30, width))
    network.mean.copy_(mean)
    network.precision.copy_(precision)


class _Classifier(nn.Module):
    """torchvision's network with the projection head written out; parameters under the names of ours."""

    def __init__(self, reference: nn.Module, network: model.CutPasteNet) -> None:
        super().__init__()
        reference.fc = nn.Identity()
        self.backbone = reference
        self.head, self.out = copy.deepcopy(network.head), copy.deepcopy(network.out)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.head(self.backbone(x)))

    logits = forward


class _Trained(nn.Module):
    """The pretext loss in training mode, as a function of the parameters of the backbone and the heads."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head, self.out = network.backbone, network.head, network.out
        self.network = [network]

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network[0].train().logits(x.detach())
        return nn.functional.cross_entropy(logits, torch.arange(len(x)) % 3)


def _by_backpropagation(network: model.CutPasteNet, x: Tensor) -> dict[str, Tensor]:
    from paperzoo.papers.interpretability.grad_cam.technique import GradCAM, upsample

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = network.backbone

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * technique.mahalanobis(self.backbone(x), network.mean, network.precision).square()

    coarse = GradCAM(Half(), "backbone.layer4").coarse(x, lambda score: score)
    score = technique.mahalanobis(network.views(x)[:, 0], network.mean, network.precision)
    return {"map": upsample(coarse, x.shape[-2:]), "score": score}


def _patch_by_patch(network: model.CutPastePatchNet, x: Tensor) -> dict[str, Tensor]:
    size, stride, maps, scores = network.patch_size, network.stride, [], []
    at = torch.arange(size) - (size - 1) / 2
    kernel = torch.exp(-(at[:, None] ** 2 + at**2) / (2 * (size / 4) ** 2))
    for image in x:
        total, cover, worst = torch.zeros(x.shape[2:]), torch.zeros(x.shape[2:]), 0.0
        for top in range(0, x.shape[2] - size + 1, stride):
            for left in range(0, x.shape[3] - size + 1, stride):
                here = (slice(top, top + size), slice(left, left + size))
                delta = network.backbone(image[(slice(None), *here)][None])[0] - network.mean
                distance = float((delta @ network.precision @ delta).sqrt().detach())
                total[here] += distance * kernel
                cover[here] += kernel
                worst = max(worst, distance)
        maps.append(total / cover)
        scores.append(worst)
    return {"map": torch.stack(maps), "score": torch.tensor(scores)}
