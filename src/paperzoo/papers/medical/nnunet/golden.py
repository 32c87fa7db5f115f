"""Writes golden.safetensors: what nnU-Net's own planners and resampling (nnunet 1.7.1) and its network (dynamic-network-architectures 0.4.4) answer.

    pip download --no-deps nnunet==1.7.1 batchgenerators==0.25.1 dynamic-network-architectures==0.4.4      (unpacked side by side into DIR)
    python -m paperzoo.papers.medical.nnunet.golden DIR

Modules that only read files (SimpleITK) or train are replaced by empty ones. Inputs follow from a rule; none is stored.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CASES = 60


def rule(shape: tuple[int, ...], number: int) -> Tensor:
    """Values in -1 … 1 that look random and follow from their place, float64."""
    count = torch.Size(shape).numel()
    return (
        torch.sin(torch.arange(count, dtype=torch.float64) * (1.37 + 0.11 * number) + number).mul(7.0).sin().view(shape)
    )


def filled(network: nn.Module) -> nn.Module:
    """Every parameter by the rule, in the order of our names, at the scale of its fan-in."""
    named = {
        k: v for k, v in network.named_parameters() if ".all_modules." not in k and not k.startswith("decoder.encoder.")
    }
    with torch.no_grad():
        for number, (name, p) in enumerate(sorted(named.items())):
            value = rule(tuple(p.shape), number)
            p.copy_(
                value * 1.7 / p[0].numel() ** 0.5
                if p.ndim > 1
                else 1 + 0.4 * value
                if "norm.weight" in name
                else 0.2 * value
            )
    return network


def networks() -> dict[str, tuple[dict[str, Any], tuple[int, ...]]]:
    """Name -> (topology, size of the input)."""
    flat = {"strides": [[1, 2, 2], [2, 2, 2]], "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}
    deep = {"strides": [[2, 2], [2, 1], [2, 2]], "kernels": [[3, 3]] * 4}
    return {
        "volume": ({**flat, "base": 6, "most": 10}, (4, 12, 8)),
        "plane": ({**deep, "base": 5, "most": 64}, (16, 24)),
    }


def sets() -> list[tuple[np.ndarray, np.ndarray, int, int, int]]:
    """Median sizes, spacings, cases, channels and classes of imagined data sets, the axis of the largest spacing first."""
    rng = np.random.RandomState(0)
    made = []
    for _ in range(CASES):
        plane = rng.uniform(0.4, 2.0)
        spacing = np.array([plane * rng.choice([1.0, 1.3, 2.2, 4.0, 7.0]), plane, plane * rng.choice([1.0, 0.9])])
        median = np.array([rng.randint(8, 300), rng.randint(40, 520), rng.randint(40, 520)])
        made.append((median, spacing, int(rng.randint(5, 500)), int(rng.randint(1, 5)), int(rng.randint(2, 15))))
    return made


def packed(plan: dict[str, Any]) -> list[int]:
    """A plan as numbers."""
    values = [*plan["patch"], plan["batch_size"], len(plan["strides"])]
    return [int(v) for v in (*values, *np.ravel(plan["strides"]), *np.ravel(plan["kernels"]))]


def volumes() -> list[tuple[Tensor, Tensor, tuple, tuple]]:
    """Images, labels, spacing before and after."""
    image, labels = rule((2, 6, 11, 9), 3), (2 * rule((1, 6, 11, 9), 4)).abs().floor().clamp(0, 2)
    made = [(image, labels, (2.0, 1.0, 1.0), (1.3, 1.4, 0.7)), (image, labels, (5.0, 1.0, 1.0), (2.4, 1.3, 0.8))]
    return [*made, (image, labels, (5.0, 1.0, 1.0), (9.0, 0.7, 1.7))]


def main(folder: Path) -> None:
    from safetensors.torch import save_file

    for name in ("SimpleITK", "nnunet.training", "nnunet.training.model_restore", "nnunet.training.network_training"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["nnunet.training.model_restore"].recursive_find_python_class = None
    sys.path[:0] = [str(p) for p in (folder, *folder.iterdir()) if p.is_dir()]
    import scipy.ndimage

    for old in ("filters", "interpolation"):
        sys.modules[f"scipy.ndimage.{old}"] = scipy.ndimage
    np.int = int
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from nnunet.experiment_planning.experiment_planner_baseline_2DUNet import ExperimentPlanner2D
    from nnunet.experiment_planning.experiment_planner_baseline_3DUNet import ExperimentPlanner
    from nnunet.preprocessing.preprocessing import resample_patient

    found: dict[str, Tensor] = {}
    for name, (t, size) in networks().items():
        axes = len(size)
        widths = [min(t["base"] * 2**i, t["most"]) for i in range(len(t["kernels"]))]
        network = PlainConvUNet(
            2, len(widths), widths, (nn.Conv2d, nn.Conv3d)[axes - 2], t["kernels"], [[1] * axes, *t["strides"]], 2, 3, 2, True,
            (nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 2], {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
            deep_supervision=True,
        )  # fmt: skip
        filled(network).double()
        out = network(rule((2, 2, *size), 90))[:-1]  # the deepest has the weight 0 in nnU-Net's loss
        sum(o.square().mean() for o in out).backward()
        for level, o in enumerate(out):
            found[f"{name} {level}"] = o.detach().flatten()[::5]
        named = sorted(
            (k, v)
            for k, v in network.named_parameters()
            if ".all_modules." not in k and not k.startswith("decoder.encoder.")
        )
        found[f"{name} gradients"] = torch.stack(
            [v.new_zeros(()) if v.grad is None else v.grad.norm() for _, v in named]
        )
        found[f"{name} names"] = torch.tensor([ord(c) for c in " ".join(k for k, _ in named)], dtype=torch.int16)

    def bare(kind: type) -> Any:
        planner = object.__new__(kind)
        planner.unet_base_num_features, planner.unet_max_numpool, planner.unet_min_batch_size = 30, 999, 2
        planner.unet_max_num_filters = 320 if kind is ExperimentPlanner else 480
        planner.unet_featuremap_min_edge_length, planner.conv_per_stage = 4, 2
        planner.batch_size_covers_max_percent_of_dataset, planner.anisotropy_threshold = 0.05, 3
        return planner

    for name, kind in (("3d", ExperimentPlanner), ("2d", ExperimentPlanner2D)):
        numbers: list[int] = []
        for median, spacing, cases, channels, classes in sets():
            plan = bare(kind).get_properties_for_stage(spacing, spacing, median, cases, channels, classes)
            row = packed(
                {
                    "patch": plan["patch_size"],
                    "batch_size": plan["batch_size"],
                    "strides": plan["pool_op_kernel_sizes"],
                    "kernels": plan["conv_kernel_sizes"],
                }
            )
            numbers += [len(row), *row]
        found[f"plans {name}"] = torch.tensor(numbers, dtype=torch.int32)
    for k, (image, labels, before, after) in enumerate(volumes()):
        a, b = resample_patient(
            image.numpy(),
            labels.numpy(),
            np.array(before),
            np.array(after),
            3,
            1,
            force_separate_z=None,
            order_z_data=0,
            order_z_seg=0,
        )
        found[f"image {k}"], found[f"labels {k}"] = (
            torch.from_numpy(a).flatten()[::3].clone(),
            torch.from_numpy(b).to(torch.uint8),
        )
    save_file({k: v.contiguous() for k, v in found.items()}, Path(__file__).with_name("golden.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
