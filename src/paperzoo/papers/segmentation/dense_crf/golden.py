"""Makes `golden.safetensors`: marginals by pydensecrf (its C++ code) on a small picture.

python -m paperzoo.papers.segmentation.dense_crf.golden      needs pydensecrf, which is built from source
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).with_name("golden.safetensors")
ITERATIONS = (1, 5)
SMOOTH, NEAR, COLOUR = 3.0, (20.0, 10.0), (2.0, 6.0)  # theta_gamma; (theta_alpha, theta_beta); the weights w2 and w1


def picture() -> Tensor:
    """uint8 (3, 32, 44): a part of scikit-image's astronaut. Pixels are a multiple of four: its SSE code spoils those left over."""
    from skimage.data import astronaut

    return torch.from_numpy(astronaut()[40:168:4, 150:326:4].copy()).permute(2, 0, 1)


def energies() -> Tensor:
    """Unary energies (4, 32, 44), from a rule."""
    generator = torch.Generator().manual_seed(0)
    return -torch.randn(4, 32, 44, generator=generator).softmax(0).log()


def main() -> None:
    import numpy as np
    from pydensecrf.densecrf import DenseCRF2D
    from safetensors.torch import save_file

    image, unary = picture(), energies()
    labels, height, width = unary.shape
    made = {}
    for iterations in ITERATIONS:
        crf = DenseCRF2D(width, height, labels)
        crf.setUnaryEnergy(np.ascontiguousarray(unary.flatten(1).numpy()))
        crf.addPairwiseGaussian(sxy=SMOOTH, compat=COLOUR[0])
        rows = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        crf.addPairwiseBilateral(sxy=NEAR[0], srgb=NEAR[1], rgbim=rows, compat=COLOUR[1])
        made[f"q{iterations}"] = torch.from_numpy(np.array(crf.inference(iterations))).view(unary.shape).contiguous()
    save_file(made, str(FILE))


if __name__ == "__main__":
    main()
