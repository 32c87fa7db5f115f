"""ArcFace against pytorch-metric-learning's losses, the authors' networks, and slow versions that say the equations aloud."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paperzoo.blocks.face_alignment import face_template, similarity_transform, warp
from paperzoo.engine.parity import Case
from paperzoo.papers.face.arcface import golden, model
from paperzoo.papers.face.arcface.technique import (
    ArcFace,
    CentresSGD,
    CombinedMargin,
    CosFace,
    MarginSoftmax,
    PartialFC,
)

RELEASED = "numbers of the authors' iresnet.py (commit 7fadd420), run with these weights"


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from loss_cases()
    yield from margin_cases()
    yield from spread_cases()
    yield from network_cases()
    yield from alignment_cases()


# -- the losses --------------------------------------------------------------------------------------------------------


def by_loops(embeddings: Tensor, centres: Tensor, labels: Tensor, margin: float, scale: float) -> Tensor:
    """Eq. 3, one face and one class at a time, with angles."""
    total = embeddings.new_zeros(())
    for x, y in zip(embeddings, labels.tolist(), strict=True):
        powers = []
        for j, w in enumerate(centres):
            cosine = (x / x.norm()) @ (w / w.norm())
            if j == y:
                angle = cosine.acos()
                beyond = float(angle.detach()) + margin >= math.pi
                cosine = cosine - margin * math.sin(margin) if beyond else (angle + margin).cos()
            powers.append(scale * cosine)
        total = total - (powers[y] - torch.stack(powers).logsumexp(0))
    return total / len(embeddings)


def with_centres(head: nn.Module, labels: Tensor):
    """A head as a function of embeddings and centres, so that both gradients are compared."""

    def call(embeddings: Tensor, centres: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": centres}, (embeddings, labels))

    return call


def loss_cases() -> Iterator[Case]:
    from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss

    from paperzoo.tasks.face_verification import NormalisedSoftmax

    def theirs(loss: nn.Module, labels: Tensor):
        def call(embeddings: Tensor, centres: Tensor) -> Tensor:
            loss.cast_types = lambda dtype, device: None  # it would put the parameter's data in place of ours
            del loss._parameters["W"]
            loss.W = centres.T
            value = loss(embeddings, labels)
            del loss.W
            loss.register_parameter("W", nn.Parameter(torch.empty(0)))
            return value

        return call

    for batch, classes, size, spread in ((8, 10, 16, 1.0), (5, 100, 32, 7.0), (1, 3, 512, 0.2)):
        x, w, y = spread * torch.randn(batch, size), torch.randn(classes, size), torch.randint(classes, (batch,))
        shape = f"B={batch}, {classes} classes, D={size}"
        for margin, scale in ((0.5, 64.0), (0.3, 30.0)):
            yield Case(
                f"ArcFace, {shape}, m={margin}, s={scale:g}",
                with_centres(ArcFace(classes, size, margin, scale), y),
                theirs(ArcFaceLoss(classes, size, margin=math.degrees(margin), scale=scale), y),
                (x, w),
                against="pytorch-metric-learning 2.9.0, ArcFaceLoss",
                gradients=True,
                atol=2e-5,
            )
        yield Case(
            f"CosFace, {shape}",
            with_centres(CosFace(classes, size), y),
            theirs(CosFaceLoss(classes, size, margin=0.35, scale=64), y),
            (x, w),
            against="pytorch-metric-learning 2.9.0, CosFaceLoss",
            gradients=True,
        )
        yield Case(
            f"without a margin, {shape}",
            with_centres(NormalisedSoftmax(classes, size, 20.0), y),
            theirs(NormalizedSoftmaxLoss(classes, size, temperature=0.05), y),
            (x, w),
            against="pytorch-metric-learning 2.9.0, NormalizedSoftmaxLoss",
            gradients=True,
        )
    x, w, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), torch.randint(5, (6,))
    x[0], x[1] = -2.0 * w[y[0]] + 0.1 * x[0], 3.0 * w[y[1]] + 0.1 * x[1]  # one beyond pi - m, one near its centre
    yield Case(
        "ArcFace in float64, a face behind its centre and one before it",
        with_centres(ArcFace(5, 4).double(), y),
        lambda x, w: by_loops(x, w, y, 0.5, 64.0),
        (x, w),
        against="a loop over faces and classes with acos, eq. 3",
        gradients=True,
        rtol=1e-7,
        atol=1e-9,
    )
    at_centre = torch.eye(4)[:3].clone()
    yield Case(
        "ArcFace, faces exactly on their centres",
        lambda x: float(torch.autograd.grad(ArcFaceAt(at_centre)(x), x)[0].isfinite().all()) + ArcFaceAt(at_centre)(x),
        lambda x: 1.0 + math.log1p(2 * math.exp(64 * (0.0 - math.cos(0.5)))) + 0.0 * x.sum(),
        (at_centre.clone().requires_grad_(True),),
        against="by hand: log(1 + 2 e^{-64 cos 0.5}), and a finite gradient",
        note="the cosine's gradient with acos is infinite there",
    )


class ArcFaceAt(nn.Module):
    """ArcFace whose centres are given, face i of class i."""

    def __init__(self, centres: Tensor) -> None:
        super().__init__()
        self.head = ArcFace(len(centres), centres.shape[1])
        self.head.weight.data.copy_(centres)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x, torch.arange(len(x)))


def margin_cases() -> Iterator[Case]:
    angles = torch.linspace(0.02, 3.12, 156, dtype=torch.float64)
    cosines = angles.cos()

    def sphereface(m: float):
        from pytorch_metric_learning.losses import SphereFaceLoss

        return SphereFaceLoss(2, 2, margin=m).modify_cosine_of_target_classes

    for m in (2, 3, 4):
        yield Case(
            f"SphereFace's margin, m1={m}",
            CombinedMargin(float(m), 0.0, 0.0),
            sphereface(m),
            (cosines,),
            against="pytorch-metric-learning 2.9.0, SphereFaceLoss",
            gradients=True,
            note="theirs by the multiple-angle formula",
        )
    for m1, m2, m3 in ((1.0, 0.3, 0.2), (0.9, 0.4, 0.15), (1.0, 0.0, 0.35)):
        inside = cosines[m1 * angles + m2 < math.pi - 1e-3]
        yield Case(
            f"combined margin {m1:g}, {m2:g}, {m3:g}",
            CombinedMargin(m1, m2, m3),
            lambda c, m1=m1, m2=m2, m3=m3: (m1 * c.acos() + m2).cos() - m3,
            (inside,),
            against="cos(m1 acos(c) + m2) - m3, eq. 4 and table 2",
            gradients=True,
        )
    for margin in ((1.0, 0.5, 0.0), (0.9, 0.4, 0.15), (4.0, 0.0, 0.0)):
        yield Case(
            f"a larger angle never gives more, margin {margin}",
            lambda c, margin=margin: (CombinedMargin(*margin)(c).diff() < 1e-9).all().double(),
            lambda c: 1.0,
            (torch.linspace(0.0, math.pi, 1000, dtype=torch.float64).cos(),),
            against="what the branch beyond pi is for",
        )


# -- classes spread over processes -------------------------------------------------------------------------------------


def spread_cases() -> Iterator[Case]:
    """On one process: the head that is made of parts, all of them here, equals the whole one. Two processes: tests/test_face_heads.py."""
    for batch, classes, size in ((6, 11, 8), (3, 40, 16)):
        x, w, y = torch.randn(batch, size), torch.randn(classes, size), torch.randint(classes, (batch,))
        for name, margin in (("ArcFace", CombinedMargin()), ("CosFace", CombinedMargin(1.0, 0.0, 0.35))):
            yield Case(
                f"spread {name}, B={batch}, {classes} classes",
                with_centres(PartialFC(classes, size, margin), y),
                with_centres(MarginSoftmax(classes, size, margin), y),
                (x, w),
                against="the whole head with torch's cross-entropy",
                gradients=True,
                rtol=1e-5,
                atol=1e-6,
            )

    def sampled_step(ours: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        head = PartialFC(20, 6, sample_rate=0.4)
        x, y = torch.randn(4, 6), torch.tensor([3, 17, 3, 9])
        before = head.weight.detach().clone()
        optimizer = CentresSGD(head, lr=0.1, momentum=0.9, weight_decay=0.01)
        for step in range(2):
            torch.manual_seed(step)
            head.zero_grad()
            head(x, y).backward()
            optimizer.step()
        if ours:
            return {"weight": head.weight.detach(), "momentum": optimizer.state[head.weight]["momentum_buffer"]}
        weight, velocity = before, torch.zeros_like(before)
        for step in range(2):
            torch.manual_seed(step)
            order = torch.rand(20)
            order[[3, 9, 17]] = 2.0
            rows = sorted(order.argsort(descending=True)[:8].tolist())
            part = weight[rows].clone().requires_grad_(True)
            logits = ArcFace(8, 6)
            del logits._parameters["weight"]
            logits.weight = part
            logits(x, torch.tensor([rows.index(k) for k in y.tolist()])).backward()
            for place, row in enumerate(rows):
                velocity[row] = 0.9 * velocity[row] + part.grad[place] + 0.01 * weight[row]
                weight[row] = weight[row] - 0.1 * velocity[row]
        return {"weight": weight, "momentum": velocity}

    yield Case(
        "two updates with 8 of 20 centres sampled",
        lambda: sampled_step(True),
        lambda: sampled_step(False),
        against="a head of the sampled centres alone, updated row by row; the others stay",
        atol=1e-6,
    )


# -- networks ----------------------------------------------------------------------------------------------------------


def network_cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    theirs = load_file(golden.FILE)
    ours = golden.answers(
        lambda name: getattr(model, name)(), lambda: model.iresnet18(num_features=64, image_size=golden.SMALL)
    )
    words = {
        "iresnet34.state": "names and shapes of iresnet34's state",
        "iresnet100.state": "names and shapes of iresnet100's state",
        "iresnet18.eval": "iresnet18, 3 pictures",
        "iresnet50.eval": "iresnet50, 1 picture",
        "step.outputs": "iresnet18 while it learns, 5 pictures",
        "step.loss": "its loss",
        "step.gradients": "its gradients: norms, and products with fixed numbers",
        "step.running": "its running statistics",
    }
    for key, value in theirs.items():
        scale = float(value.abs().max())
        yield Case(
            words[key],
            lambda k=key: ours[k],
            lambda v=value: v,
            against=RELEASED,
            rtol=1e-7,
            atol=1e-9 * max(1.0, scale),
        )


# -- alignment ---------------------------------------------------------------------------------------------------------


def alignment_cases() -> Iterator[Case]:
    import numpy as np
    from skimage.transform import SimilarityTransform
    from skimage.transform import warp as skimage_warp

    template = face_template(112)
    points = template + 6 * torch.randn(7, 5, 2)
    points = points @ torch.tensor([[0.8, 0.6], [-0.6, 0.8]]) * 1.7 + 20

    def umeyama(p: Tensor) -> Tensor:
        found = [SimilarityTransform.from_estimate(q, template.double().numpy()).params[:2] for q in p.double().numpy()]
        return torch.from_numpy(np.stack(found))

    yield Case(
        "similarity transforms of 7 faces",
        lambda p: similarity_transform(p.double(), template.double().expand_as(p)),
        umeyama,
        (points,),
        against="scikit-image's SimilarityTransform (Umeyama by singular values)",
        rtol=1e-9,
        atol=1e-9,
    )
    images = torch.rand(2, 3, 90, 130)
    matrices = similarity_transform(points[:2] * 0.5 + 10, template.expand(2, 5, 2))

    def by_skimage(x: Tensor, m: Tensor) -> Tensor:
        crops = []
        for image, matrix in zip(x.numpy(), m.double().numpy(), strict=True):
            inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
            crop = skimage_warp(image.transpose(1, 2, 0), inverse, output_shape=(112, 112), order=1, mode="constant")
            crops.append(crop.transpose(2, 0, 1))
        return torch.from_numpy(np.stack(crops))[:, :, 8:-8, 8:-8]

    yield Case(
        "aligned crops",
        lambda x, m: warp(x, m, 112)[:, :, 8:-8, 8:-8],
        by_skimage,
        (images, matrices),
        against="scikit-image's warp, bilinear",
        atol=2e-4,
        note="coordinates in float32 are off by 1e-5 of a pixel",
    )
