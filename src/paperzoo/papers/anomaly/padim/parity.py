"""PaDiM against anomalib's answers (see `golden.py`), torchvision's backbones, and versions that go place by place."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.region_overlap import RegionOverlap, area_up_to, overlap_curve
from paperzoo.engine.parity import Case
from paperzoo.papers.anomaly.padim import golden, model


def cases() -> Iterator[Case]:
    import torchvision
    from safetensors.torch import load_file

    # -- anomalib: the same scores from the same features
    answers, peer = load_file(str(golden.FILE)), "anomalib 2.7.0"
    embedded = model.embed(golden.maps(), golden.channels()).flatten(2).transpose(1, 2)  # (B, P, d)
    fitted, scored = embedded[: golden.FITTED], embedded[golden.FITTED :]
    mean, inverse = model.fit_gaussians(fitted, 0.01001)
    note = "anomalib adds 1e-5 to the paper's 0.01 on the diagonal; so does this case"
    yield Case("Gaussians", lambda: {"mean": mean, "inverse_covariance": inverse},
               lambda: {"mean": answers["mean"].T, "inverse_covariance": answers["inverse_covariance"]}, (), peer, rtol=1e-3,
               atol=1e-3, note=f"{note}, whose inverse is in float32")  # fmt: skip
    distances = model.mahalanobis(scored, answers["mean"].T, answers["inverse_covariance"])
    yield Case("distances", lambda: distances, lambda: answers["distances"], (), peer)
    network = model.padim_resnet18(golden.KEPT)
    maps = network.to_maps(distances, golden.SHAPES[0][1:], (golden.SIZE, golden.SIZE))
    edge = slice(16, -16)  # the filter's radius
    yield Case("maps", lambda: maps[:, edge, edge], lambda: answers["maps"][:, edge, edge], (), peer,
               note="away from the border, which anomalib mirrors without its edge, and scipy (and this code) with it")  # fmt: skip

    # -- place by place
    torch.manual_seed(0)
    features = torch.randn(9, 6, 5) @ torch.randn(5, 5)
    for kept, count in (("fewer", 4), ("more", 9)):
        yield Case(f"Gaussians, {kept} images than channels", lambda n=count: model.fit_gaussians(features[:n]),
                   lambda n=count: _gaussians(features[:n]), (), f"numpy {np.__version__} cov and inv at each place")  # fmt: skip
    mean, inverse = model.fit_gaussians(features)
    yield Case("Mahalanobis distances", model.mahalanobis, _distances, (torch.randn(3, 6, 5), mean, inverse),
               "scipy's distance, place by place")  # fmt: skip
    yield Case("each image left out", lambda: model.left_out_distances(features), lambda: _left_out(features), (),
               "as many fits as images")  # fmt: skip
    odd = [torch.randn(2, 4, 9, 7), torch.randn(2, 3, 5, 4), torch.randn(2, 2, 3, 2)]
    channels = torch.tensor([0, 3, 4, 6, 7, 8])
    yield Case("side by side, odd sizes", lambda: model.embed(odd, channels), lambda: _side_by_side(odd, channels), (),
               "each place looks up the coarser cell that covers it")  # fmt: skip

    # -- backbones
    tv = f"torchvision {torchvision.__version__.split('+')[0]}"
    x = torch.randn(2, 3, 64, 96)
    for name in ("resnet18", "wide_resnet50_2"):
        reference = getattr(torchvision.models, name)().eval()
        ours = getattr(model, f"padim_{name}")().eval()
        ours.load_backbone(reference.state_dict())
        layers = (reference.layer1, reference.layer2, reference.layer3)
        yield Case(f"{name}: layer1 to layer3", ours.backbone, Hooked(reference, layers), (x,), tv)
    reference = torchvision.models.efficientnet_b5().eval()
    ours = model.padim_efficientnet_b5().eval()
    ours.load_backbone(reference.state_dict())
    blocks = [block for stage in reference.features[1:8] for block in stage]
    layers = tuple(blocks[i - 1] for i in (7, 20, 26))
    yield Case("efficientnet_b5: blocks 7, 20, 26", ours.backbone, Hooked(reference, layers), (x,), tv)

    # -- whole
    network = model.padim_resnet18(20).eval()
    network.mean, network.inverse_covariance = model.fit_gaussians(torch.rand(5, 16 * 24, 20))
    yield Case("image to map", network, lambda x: _literal(network, x), (x,), "the parts above, and scipy's filter")
    again = model.padim_resnet18(20).eval()
    again.load_state_dict(copy.deepcopy(network.state_dict()))
    yield Case("Gaussians of any number of places reload", again, network, (x,), "the network that was saved")

    # -- PRO
    generator = torch.Generator().manual_seed(3)
    heat = (torch.rand(4, 12, 10, generator=generator) * 20).round() / 20  # with ties
    masks = torch.rand(4, 12, 10, generator=generator) > 0.85
    masks[2] = False
    for limit in (0.3, 0.05, 1.0):
        yield Case(f"per-region overlap up to {limit}", lambda a, b, m=limit: _pro(a, b, m), lambda a, b, m=limit: _literal_pro(a, b, m),
                   (heat, masks), "every threshold, image and region in a loop, regions by skimage")  # fmt: skip
    yield Case("area under a straight line", lambda: area_up_to(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), 0.3),
               lambda: torch.tensor(0.15), (), "by hand")  # fmt: skip


class Hooked(nn.Module):
    """The outputs of some of a network's layers."""

    def __init__(self, network: nn.Module, layers: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.network, self.layers = network, layers

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        handles = [layer.register_forward_hook(lambda _, __, output: found.append(output)) for layer in self.layers]
        self.network(x)
        for handle in handles:
            handle.remove()
        return found


def _gaussians(features: Tensor, epsilon: float = 0.01) -> tuple[Tensor, Tensor]:
    means, inverses = [], []
    for place in features.double().numpy().transpose(1, 0, 2):
        means.append(place.mean(0))
        inverses.append(np.linalg.inv(np.cov(place, rowvar=False) + epsilon * np.eye(place.shape[1])))
    return torch.tensor(np.stack(means)), torch.tensor(np.stack(inverses))


def _distances(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    from scipy.spatial.distance import mahalanobis

    return torch.tensor(
        [
            [mahalanobis(v.numpy(), m.numpy(), s.double().numpy()) for v, m, s in zip(row, mean, inverse, strict=True)]
            for row in x
        ]
    )


def _left_out(features: Tensor) -> Tensor:
    rows = []
    for k in range(len(features)):
        others = _gaussians(torch.cat([features[:k], features[k + 1 :]]))
        rows.append(_distances(features[k : k + 1].double(), *others)[0])
    return torch.stack(rows)


def _side_by_side(maps: list[Tensor], channels: Tensor) -> Tensor:
    height, width = maps[0].shape[2:]
    out = torch.zeros(len(maps[0]), sum(x.shape[1] for x in maps), height, width)
    for i in range(height):
        for j in range(width):
            out[:, :, i, j] = torch.cat([x[:, :, i * x.shape[2] // height, j * x.shape[3] // width] for x in maps], 1)
    return out[:, channels]


def _literal(network: model.PaDiM, x: Tensor) -> dict[str, Tensor]:
    from scipy.ndimage import gaussian_filter

    with torch.no_grad():
        features = _side_by_side(network.backbone(x), network.channels)
    distances = _distances(features.flatten(2).transpose(1, 2), network.mean, network.inverse_covariance)
    coarse = distances.view(len(x), 1, *features.shape[2:]).float()
    fine = F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    maps = torch.stack([torch.from_numpy(gaussian_filter(m.numpy(), 4)) for m in fine])
    return {"map": maps, "score": maps.flatten(1).max(1).values}


def _pro(heat: Tensor, masks: Tensor, limit: float) -> dict:
    metric = RegionOverlap(limit)
    for start in range(0, len(heat), 3):
        metric.update(heat[start : start + 3], masks[start : start + 3])
    x, y = overlap_curve(heat, masks)
    return {"area": metric.compute(), "false_positives": x, "overlap": y}


def _literal_pro(heat: Tensor, masks: Tensor, limit: float) -> dict:
    from skimage.measure import label

    regions = [label(m.numpy(), connectivity=2) for m in masks]
    x, y = [0.0], [0.0]
    for threshold in heat.unique().flip(0):
        found, overlaps = (heat >= threshold).numpy(), []
        for image, numbers in zip(found, regions, strict=True):
            overlaps += [image[numbers == k].mean() for k in range(1, numbers.max() + 1)]
        x.append(float(found[~masks.numpy()].mean()))
        y.append(float(np.mean(overlaps)))
    area = 0.0  # trapezoids between neighbouring thresholds; vertical pieces have no area
    for k in range(1, len(x)):
        left, right = min(x[k - 1], limit), min(x[k], limit)
        if right > left:
            slope = (y[k] - y[k - 1]) / (x[k] - x[k - 1])
            area += (right - left) * (y[k - 1] + 0.5 * slope * (right - left))
    return {"area": area / limit, "false_positives": torch.tensor(x), "overlap": torch.tensor(y)}
