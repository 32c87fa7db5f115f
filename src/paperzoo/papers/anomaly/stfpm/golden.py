"""Writes `golden.safetensors`: what anomalib answers for features that can be written down.

    python -m paperzoo.papers.anomaly.stfpm.golden path/to/anomalib

needs the folder of the package (2.7.0 was used). Of the package only the loss and the map are run; its training framework is not
imported. `parity.py` makes the same features by the same rule and compares.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from torch import Tensor

from paperzoo.papers.anomaly.padim.golden import bare, noise

FILE = Path(__file__).with_name("golden.safetensors")
SHAPES = ((2, 6, 12, 10), (2, 9, 6, 5), (2, 5, 3, 3))
SIZE = (24, 20)


def features() -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's and the student's maps; like after a ReLU, with zeros, and at some places nothing but zeros."""
    teacher = [(noise(shape, i) - 0.3).clamp_min(0) for i, shape in enumerate(SHAPES)]
    student = [(noise(shape, i + 5) - 0.2).clamp_min(0) for i, shape in enumerate(SHAPES)]
    teacher[1][0, :, 2, 3] = 0
    return teacher, student


def main(root: Path) -> None:
    from safetensors.torch import save_file

    bare(root, "anomalib", "anomalib.models", "anomalib.models.image", "anomalib.models.image.stfpm")
    folder = "anomalib.models.image.stfpm"
    loss = import_module(f"{folder}.loss").STFPMLoss()
    generator = import_module(f"{folder}.anomaly_map").AnomalyMapGenerator()
    teacher, student = (dict(zip("abc", maps, strict=True)) for maps in features())
    for value in student.values():
        value.requires_grad_()
    value = loss(teacher, student)
    value.backward()
    found = {"loss": value.detach(), **{f"gradient.{name}": maps.grad for name, maps in student.items()}}
    found["map"] = generator(teacher_features=teacher, student_features=student, image_size=SIZE).detach()[:, 0]
    save_file({name: value.contiguous() for name, value in found.items()}, str(FILE))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
