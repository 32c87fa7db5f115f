"""STFPM: Student-Teacher Feature Pyramid Matching for Anomaly Detection (arXiv 2103.04257).

A student of the teacher's architecture learns to give the features of a pretrained, frozen teacher, on normal images alone. Where the
two disagree, the student has never seen the like. They are compared at three depths, as vectors of length one, and a place counts only
if it is suspicious at all of them.

Parameter names are `teacher.` and `student.` with torchvision's; layer4 and the classifier are left out. `from_official` reads the
released students.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.first_stages import FirstStages
from paperzoo.papers.classification.resnet.model import resnet18


def distances(teacher: list[Tensor], student: list[Tensor]) -> list[Tensor]:
    """At every place half the squared distance of the features, scaled to length one (eq. 1, 2): (B, C_l, h, w) -> (B, h, w).

    Equal to one minus their cosine: in [0, 1] after a ReLU.
    """
    pairs = zip(teacher, student, strict=True)
    return [0.5 * (F.normalize(t, dim=1) - F.normalize(s, dim=1)).square().sum(1) for t, s in pairs]


def matching_loss(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    """The sum over depths of the mean distance over places (eq. 3), averaged over the batch: ()."""
    return torch.stack([d.mean() for d in distances(teacher, student)]).sum()


class STFPM(nn.Module):
    """Images (B, 3, H, W) -> {"map": (B, H, W), "score": (B,)}; the score is the map's maximum.

    Args:
        teacher, student: images -> maps of several depths, with equal shapes.

    In training mode the teacher stays in evaluation mode. The buffer `threshold` () is the score from which an image counts as anomalous.
    """

    threshold: Tensor

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student
        self.register_buffer("threshold", torch.tensor(float("inf")))
        self.teacher.eval()

    def train(self, mode: bool = True) -> STFPM:
        super().train(mode)
        self.teacher.eval()
        return self

    def features(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's and the student's maps; gradients reach the student alone."""
        with torch.no_grad():
            teacher = self.teacher(x)
        return teacher, self.student(x)

    def loss(self, x: Tensor) -> Tensor:
        return matching_loss(*self.features(x))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        product = torch.ones_like(x[:, 0])
        for level in distances(*self.features(x)):  # sec. 3.3
            product = product * F.interpolate(level[:, None], size=x.shape[-2:], mode="bilinear")[:, 0]
        return {"map": product, "score": product.amax((1, 2))}

    def load_teacher(self, state: Mapping[str, Tensor]) -> None:
        """Take over a ResNet classifier (its state dict), whose layer4 and dense layer are not used."""
        self.teacher.load_classifier(state)


def stfpm_resnet18() -> STFPM:
    """Teacher and student are ResNet-18 up to layer3, the paper's choice."""
    return STFPM(FirstStages(resnet18()), FirstStages(resnet18()))


# the released student is a Sequential of ResNet-18's parts
PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3"}


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released student (`model.0.weight`, …; its unused layer4 is dropped) to this model's `student.` names.

    The teacher is not in those files: it is torchvision's ResNet-18, for `load_teacher`. Other names come through unchanged.
    """
    renamed = {}
    for name, value in state_dict.items():
        head, _, rest = name.removeprefix("model.").partition(".")
        if name.startswith("model."):
            if head in PARTS:
                renamed[f"student.{PARTS[head]}.{rest}"] = value
        else:
            renamed[name] = value
    return renamed
