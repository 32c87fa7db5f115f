"""NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis (Mildenhall et al., ECCV 2020, arXiv:2003.08934).

A scene is two networks of one shape, each from a point and a viewing direction to a colour and a density. Along a ray the coarse one is asked at
evenly spaced points; where it finds weight more points are drawn, and the fine one is asked at all of them. What the ray sees is the
quadrature of eq. (3), in `paperzoo.blocks.volume_rendering`.

Parameter names are those of the PyTorch port by Yen-Chen Lin, below `coarse.` and `fine.`. `read_official` reads its checkpoints
(`network_fn_state_dict`, `network_fine_state_dict`) and the lists of arrays of the authors' TensorFlow code (`model_200000.npy` beside
`model_fine_200000.npy`).

As all released code, and unlike eq. (4): the encoding has no factor pi, and the point itself goes in as well.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.volume_rendering import composite, importance_samples, intervals, ray_weights, stratified
from paperzoo.errors import PaperZooError


class Encoding(nn.Module):
    """x -> (x, sin(x), cos(x), sin(2x), cos(2x), …, cos(2^(octaves - 1) x)), eq. (4). (…, 3) -> (…, 3 + 6 * octaves)."""

    def __init__(self, octaves: int) -> None:
        super().__init__()
        self.channels = 3 + 6 * octaves
        self.register_buffer("frequencies", 2.0 ** torch.arange(octaves), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = x[..., None, :] * self.frequencies[:, None]  # (…, octaves, 3)
        waves = torch.stack([angles.sin(), angles.cos()], -2)  # (…, octaves, 2, 3)
        return torch.cat([x, waves.flatten(-3)], -1)


class Field(nn.Module):
    """The network F of sec. 3 and fig. 7: points (N, S, 3), viewing directions (N, 3) -> raw colours (N, S, 3), raw densities (N, S).

    A colour is the sigmoid of the raw one, a density the ReLU. The viewing direction enters behind the density, so that a
    surface's place cannot depend on who looks.

    Args:
        depth, width: of the hidden layers before the density.
        skip: the encoded point goes in again behind the layer with this number, counted from 0.
    """

    def __init__(self, depth: int, width: int, skip: int, position_octaves: int, direction_octaves: int) -> None:
        super().__init__()
        self.encode_points, self.encode_views = Encoding(position_octaves), Encoding(direction_octaves)
        point, view = self.encode_points.channels, self.encode_views.channels
        sizes = [point] + [width + point if i == skip else width for i in range(depth - 1)]
        self.skip = skip
        self.pts_linears = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.views_linears = nn.ModuleList([nn.Linear(view + width, width // 2)])
        self.feature_linear = nn.Linear(width, width)
        self.alpha_linear = nn.Linear(width, 1)
        self.rgb_linear = nn.Linear(width // 2, 3)
        for layer in (*self.pts_linears, *self.views_linears, self.feature_linear, self.alpha_linear, self.rgb_linear):
            # as the authors' code (Keras): Glorot's uniform and no bias; under torch's own a small network often stays empty
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def trunk(self, points: Tensor) -> Tensor:
        """The hidden layers: points (M, 3) -> (M, width)."""
        encoded = self.encode_points(points)
        x = encoded
        for i, layer in enumerate(self.pts_linears):
            x = F.relu(layer(x))
            if i == self.skip:
                x = torch.cat([encoded, x], 1)
        return x

    def density(self, points: Tensor) -> Tensor:
        """Raw densities alone: (N, S, 3) -> (N, S)."""
        return self.alpha_linear(self.trunk(points.flatten(0, 1))).view(points.shape[:2])

    def forward(self, points: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(points.flatten(0, 1))
        density = self.alpha_linear(x).view(points.shape[:2])
        layer, width = self.views_linears[0], x.shape[1]
        weight, bias = layer.weight[:, :width], layer.bias
        # a ray's viewing direction is the same for all of its points, so its share of the layer is computed once a ray
        once = F.linear(self.encode_views(views), layer.weight[:, width:], bias)
        if self.training:
            x = F.linear(self.feature_linear(x), weight)
        else:  # nothing lies between the two maps, so they are one
            x = F.linear(x, weight @ self.feature_linear.weight, weight @ self.feature_linear.bias)
        x = F.relu(x.view(*points.shape[:2], -1) + once[:, None])
        return self.rgb_linear(x), density


class NeRF(nn.Module):
    """A scene: rays float32 (N, 12), see `paperzoo.blocks.rays`, to what they see.

    In eval (N, 5): red, green, blue, depth, opacity, sampled at fixed places. In training a dict: `colours` (2, N, 3), of the coarse and
    of the fine network, sampled at random places.

    Args:
        samples: N_c of sec. 5.2, where the coarse network is asked.
        fine_samples: N_f, how many more the fine one is asked at.
        noise: standard deviation of what is added to raw densities in training (appendix A: real scenes).
        white_background: what lies behind the scene; else black.
        in_disparity: coarse samples evenly spaced in 1 / depth.
        depth, width, skip, position_octaves, direction_octaves: of both networks, see `Field`.
    """

    def __init__(
        self,
        samples: int = 64,
        fine_samples: int = 128,
        noise: float = 0.0,
        white_background: bool = False,
        in_disparity: bool = False,
        depth: int = 8,
        width: int = 256,
        skip: int = 4,
        position_octaves: int = 10,
        direction_octaves: int = 4,
    ) -> None:
        super().__init__()
        if samples < 3 or fine_samples < 1:
            raise ValueError(f"samples and fine_samples are {samples} and {fine_samples}; they must be 3 and 1 or more")
        if not 0 <= skip < depth - 1:
            raise ValueError(f"skip is {skip}; it must be 0 … {depth - 2}, as layers before and behind it are needed")
        self.samples, self.fine_samples, self.noise = samples, fine_samples, noise
        self.white_background, self.in_disparity = white_background, in_disparity
        self.coarse = Field(depth, width, skip, position_octaves, direction_octaves)
        self.fine = Field(depth, width, skip, position_octaves, direction_octaves)

    def weights(self, density: Tensor, depths: Tensor, norms: Tensor) -> Tensor:
        """Of raw densities (N, S)."""
        density = at_least_single(density)
        if self.training and self.noise > 0:
            density = density + self.noise * torch.randn_like(density)
        return ray_weights(F.relu(density), intervals(depths, norms))

    def forward(self, rays: Tensor) -> Tensor | dict[str, Tensor]:
        origins, directions, views, near, far, _ = rays.split([3, 3, 3, 1, 1, 1], 1)
        norms = directions.norm(dim=1, keepdim=True)

        def points(depths: Tensor) -> Tensor:
            return origins[:, None] + directions[:, None] * depths[..., None]

        depths = stratified(near, far, self.samples, self.training, self.in_disparity)
        stages = []
        if self.training:
            colours, density = self.coarse(points(depths), views)
            weights = self.weights(density, depths, norms)
            stages.append(composite(weights, at_least_single(colours).sigmoid(), depths, self.white_background)[0])
        else:  # its colours are not asked for
            weights = self.weights(self.coarse.density(points(depths)), depths, norms)
        more = importance_samples(depths, weights, self.fine_samples, self.training)
        depths = torch.cat([depths, more], 1).sort(1).values
        colours, density = self.fine(points(depths), views)
        weights = self.weights(density, depths, norms)
        seen, depth, opacity = composite(weights, at_least_single(colours).sigmoid(), depths, self.white_background)
        if self.training:
            return {"colours": torch.stack([*stages, seen])}
        return torch.cat([seen, depth[:, None], opacity[:, None]], 1)


def at_least_single(x: Tensor) -> Tensor:
    """What autocast made shorter, in single precision: sums along rays need it."""
    return x.float() if x.dtype.itemsize < 4 else x


def nerf(**arguments: Any) -> NeRF:
    """The paper's: 8 layers of 256, 64 + 128 samples."""
    return NeRF(**arguments)


def nerf_tiny(**arguments: Any) -> NeRF:
    """Not of the paper: 4 layers of 64, 12 + 8 samples, 5 octaves; for pictures of some 40 pixels."""
    small = {"samples": 12, "fine_samples": 8, "depth": 4, "width": 64, "skip": 1, "position_octaves": 5}
    return NeRF(**{**small, "direction_octaves": 2, **arguments})


# -- published weights ---------------------------------------------------------------------------------------------------


def from_official(checkpoint: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A checkpoint of the PyTorch port as this network's state; without a fine network the coarse one is taken for it.

    Raises:
        KeyError: if it has no `network_fn_state_dict`.
    """
    coarse = checkpoint["network_fn_state_dict"]
    fine = checkpoint.get("network_fine_state_dict") or coarse
    return {f"{part}.{k}": v for part, state in (("coarse", coarse), ("fine", fine)) for k, v in state.items()}


def from_keras(arrays: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """One network of the authors' TensorFlow code, its kernels (in, out) and biases by turns: the hidden layers, features, viewing direction, colour,
    density.

    Raises:
        ValueError: if there are not as many as a network has.
    """
    layers = len(arrays) // 2 - 4
    if len(arrays) % 2 or layers < 2:
        raise ValueError(f"holds {len(arrays)} arrays; a network of 8 layers with viewing directions has 24")
    names = [f"pts_linears.{i}" for i in range(layers)]
    names += ["feature_linear", "views_linears.0", "rgb_linear", "alpha_linear"]
    state = {}
    for i, name in enumerate(names):
        state[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(np.asarray(arrays[2 * i], np.float32).T))
        state[f"{name}.bias"] = torch.from_numpy(np.ascontiguousarray(np.asarray(arrays[2 * i + 1], np.float32)))
    return state


class ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays in lists, and nothing else."""

    allowed = re.compile(r"(numpy\.(_?core\.multiarray\._reconstruct|ndarray|dtype)|_codecs\.encode)")

    def find_class(self, module: str, name: str) -> Any:
        if not self.allowed.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only arrays are read")
        return super().find_class(module, name)


def read_arrays(path: Path) -> list[np.ndarray]:
    """A list of arrays of different shapes, as numpy.save writes it.

    Raises:
        PaperZooError: if the file is missing, damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            _, _, kind = read(file)
            if not kind.hasobject:
                raise ValueError("it holds one array; a list of arrays is needed")
            arrays = list(ArraysOnly(file, encoding="latin1").load())
    except FileNotFoundError:
        raise PaperZooError(f"{path}: no such file") from None
    except Exception as error:  # a damaged pickle fails in many ways
        raise PaperZooError(f"{path}: not the weights of a NeRF ({' '.join(str(error).split())[:120]})") from None
    if not all(isinstance(a, np.ndarray) and a.dtype.kind == "f" for a in arrays):
        raise PaperZooError(f"{path}: not the weights of a NeRF (it holds something else than arrays of numbers)")
    return arrays


def read_official(path: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """The state in a file of the authors' or the port's format; None for others. With `model_200000.npy` goes `model_fine_200000.npy`."""
    if path.suffix == ".npy":
        partner = path.with_name(path.name.replace("model_", "model_fine_", 1))
        fine = partner if "model_fine_" not in path.name and partner.exists() else path
        try:
            return {
                f"{part}.{k}": v
                for part, file in (("coarse", path), ("fine", fine))
                for k, v in from_keras(read_arrays(file)).items()
            }
        except ValueError as error:
            raise PaperZooError(f"{path}: not the weights of a NeRF ({error})") from None
    if path.suffix not in (".tar", ".pt", ".pth", ".ckpt"):
        return None
    from paperzoo.engine.checkpoint import read_pickle_safely

    checkpoint = read_pickle_safely(path)
    return from_official(checkpoint) if isinstance(checkpoint, dict) and "network_fn_state_dict" in checkpoint else None
