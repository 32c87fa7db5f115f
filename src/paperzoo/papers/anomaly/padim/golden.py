"""Writes `golden.safetensors`: what anomalib answers for features that can be written down.

    python -m paperzoo.papers.anomaly.padim.golden path/to/anomalib

needs the folder of the package (2.7.0 was used) and kornia. Of the package only the files that compute are run; its training framework
is not imported. `parity.py` makes the same features by the same rule and compares.
"""

from __future__ import annotations

import sys
import types
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).with_name("golden.safetensors")
SHAPES = ((6, 8, 8), (10, 4, 4), (16, 2, 2))  # of the three maps of an image
KEPT = 12  # of 32 channels
FITTED, SCORED, SIZE = 9, 3, 48  # images for the Gaussians, images to score, pixels of an image


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).float().reshape(shape)


def maps() -> list[Tensor]:
    """The three maps of all images, FITTED and then SCORED."""
    return [2 * noise((FITTED + SCORED, *shape), i) for i, shape in enumerate(SHAPES)]


def channels() -> Tensor:
    """Which channels are kept: int64 (KEPT,), rising."""
    return noise((sum(shape[0] for shape in SHAPES),), 9).argsort()[:KEPT].sort().values


def bare(root: Path, *packages: str) -> None:
    """Make packages of `root` importable without running what their `__init__.py` imports."""
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module


def main(root: Path) -> None:
    from safetensors.torch import save_file

    parts = "anomalib.models.components"
    bare(root, "anomalib", "anomalib.models", parts, f"{parts}.base", f"{parts}.filters", f"{parts}.stats")
    bare(root, "anomalib.models.image", "anomalib.models.image.padim", "anomalib.data")
    sys.modules["anomalib.data"].InferenceBatch = dict
    sys.modules[f"{parts}.base"].DynamicBufferMixin = import_module(f"{parts}.base.dynamic_buffer").DynamicBufferMixin
    gaussian = import_module(f"{parts}.stats.multi_variate_gaussian").MultiVariateGaussian()
    extras = sys.modules[parts]
    extras.GaussianBlur2d = import_module(f"{parts}.filters.blur").GaussianBlur2d
    extras.MultiVariateGaussian, extras.TimmFeatureExtractor = type(gaussian), None
    bare(root, f"{parts}.feature_extractors")
    sys.modules[f"{parts}.feature_extractors"].dryrun_find_featuremap_dims = None
    PadimModel = import_module("anomalib.models.image.padim.torch_model").PadimModel
    generator = import_module("anomalib.models.image.padim.anomaly_map").AnomalyMapGenerator()

    names = ["layer1", "layer2", "layer3"]
    self = types.SimpleNamespace(layers=names, idx=channels())
    embedding = PadimModel.generate_embedding(self, dict(zip(names, maps(), strict=True)))
    mean, inverse = gaussian.fit(embedding[:FITTED])
    scored = embedding[FITTED:]
    found = {
        "mean": mean,
        "inverse_covariance": inverse,
        "distances": generator.compute_distance(scored, [mean, inverse]).flatten(1),
        "maps": generator(embedding=scored, mean=mean, inv_covariance=inverse, image_size=(SIZE, SIZE))[:, 0],
    }
    save_file({name: value.contiguous() for name, value in found.items()}, str(FILE))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
