"""STFPM against anomalib's answers (see `golden.py`), torchvision's network, and the equations place by place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.anomaly.padim.parity import Hooked
from paperzoo.papers.anomaly.stfpm import golden, model


def cases() -> Iterator[Case]:
    import torchvision
    from safetensors.torch import load_file

    # -- anomalib: the same loss, gradients and map from the same features
    answers, peer = load_file(str(golden.FILE)), "anomalib 2.7.0"
    yield Case("loss and gradients", _loss_and_gradients, lambda: _of_a_batch(answers), (), peer,
               note="anomalib sums over the images of a batch; the paper and the released code average")  # fmt: skip
    teacher, student = golden.features()
    given = model.STFPM(Given(teacher), Given(student)).eval()
    blank = torch.zeros(2, 3, *golden.SIZE)
    yield Case("map", lambda: given(blank)["map"], lambda: answers["map"], (), peer)

    # -- the equations
    yield Case("distances are one minus the cosine", lambda: model.distances(teacher, student), lambda: _cosines(teacher, student),
               (), "each place, float64; eq. 2")  # fmt: skip

    # -- the network
    tv = f"torchvision {torchvision.__version__.split('+')[0]} resnet18"
    torch.manual_seed(0)
    references = [torchvision.models.resnet18().eval() for _ in range(2)]
    network = model.stfpm_resnet18().eval()
    network.load_teacher(references[0].state_dict())
    network.student.load_classifier(references[1].state_dict())
    for size in ((2, 3, 64, 64), (1, 3, 90, 61)):
        x = torch.randn(size)
        yield Case(
            f"image to map {size[2]} x {size[3]}",
            network,
            _Literal(references),
            (x,),
            f"{tv} twice, eq. 1, 2 and sec. 3.3",
        )
    official = {f"model.{i}.{name}": value for i, part in enumerate(list(references[1].children())[:-2])
                for name, value in part.state_dict().items()}  # fmt: skip
    again = model.stfpm_resnet18().eval()
    again.load_state_dict(model.from_official(official), strict=False)
    yield Case(
        "a released student",
        lambda x: again.student(x),
        lambda x: network.student(x),
        (x,),
        "the names of the authors' Sequential",
    )
    x = torch.randn(3, 3, 64, 64)
    yield Case("a training step", _Trained(network), _LiteralTrained(references), (x,), f"{tv} twice, the teacher in evaluation mode",
               gradients=True, rtol=1e-3)  # fmt: skip


class Given(nn.Module):
    """Features that do not depend on the images."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.maps


def _loss_and_gradients() -> dict[str, Tensor]:
    teacher, student = golden.features()
    student = [maps.requires_grad_() for maps in student]
    loss = model.matching_loss(teacher, student)
    gradients = torch.autograd.grad(loss, student)
    return {"loss": loss.detach(), **{f"gradient.{n}": g for n, g in zip("abc", gradients, strict=True)}}


def _of_a_batch(answers: dict[str, Tensor]) -> dict[str, Tensor]:
    images = golden.SHAPES[0][0]
    return {name: value / images for name, value in answers.items() if name != "map"}


def _cosines(teacher: list[Tensor], student: list[Tensor]) -> list[Tensor]:
    out = []
    for t, s in zip(teacher, student, strict=True):
        t, s = t.double(), s.double()
        found = torch.zeros(len(t), *t.shape[2:], dtype=torch.float64)
        for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
            u, v = t[b, :, i, j], s[b, :, i, j]
            # the vector of zeros has no direction: half the squared length of the other, scaled one is left
            found[b, i, j] = (
                1 - (u @ v) / (u.norm() * v.norm()) if u.any() and v.any() else 0.5 * bool(u.any() or v.any())
            )
        out.append(found)
    return out


def _maps(network: nn.Module, x: Tensor) -> list[Tensor]:
    return Hooked(network, (network.layer1, network.layer2, network.layer3))(x)


class _Literal(nn.Module):
    def __init__(self, references: list[nn.Module]) -> None:
        super().__init__()
        self.references = references

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        heat = 1.0
        for t, s in zip(*(_maps(network, x) for network in self.references), strict=True):
            cosine = F.cosine_similarity(t, s, dim=1)[:, None]
            heat = heat * F.interpolate(1 - cosine, size=x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return {"map": heat, "score": heat.flatten(1).max(1).values}


class _Trained(nn.Module):
    """The loss in training mode, as a function of the student's parameters."""

    def __init__(self, network: model.STFPM) -> None:
        super().__init__()
        self.network = [network]  # not a part of this module: parameters are shared under plain names below
        self.student = network.student

    def forward(self, x: Tensor) -> Tensor:
        network = self.network[0].train()
        return network.loss(x.detach())


class _LiteralTrained(nn.Module):
    def __init__(self, references: list[nn.Module]) -> None:
        super().__init__()
        self.teacher, self.student = [references[0]], references[1]

    def forward(self, x: Tensor) -> Tensor:
        self.student.train()
        with torch.no_grad():
            teacher = _maps(self.teacher[0], x.detach())
        student, total = _maps(self.student, x.detach()), 0.0
        for t, s in zip(teacher, student, strict=True):
            total = total + (1 - F.cosine_similarity(t, s, dim=1)).mean((1, 2)).mean()
        return total
