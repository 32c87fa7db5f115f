"""nnU-Net against its own released code, stored (see golden.py): networks, plans, resampling; against the first paper's table; against MONAI's DynUNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.medical.nnunet import golden
from paperzoo.papers.medical.nnunet.model import PlannedUNet, from_official, nnunet_3d
from paperzoo.papers.medical.nnunet.planning import (
    BUDGET_2D,
    BUDGET_3D,
    counts_of_halvings,
    memory,
    plan_2d,
    plan_3d,
    target_spacing,
)
from paperzoo.papers.medical.nnunet.preprocessing import normalised, resampled, resampled_labels, thick_axis
from paperzoo.papers.medical.nnunet.recipe import Plateau, decided, folds
from paperzoo.tasks.volume_metrics import soft_dice

PLANNED = "nnunet 1.7.1, stored"
NETWORK = "dynamic-network-architectures 0.4.4 PlainConvUNet, stored"

# Table 1 of the paper: median size with the slices first, training cases, modalities, structures; patch and batch in 2-D, patch and halvings in 3-D.
TABLE = {
    "BrainTumour": ((138, 169, 138), 484, 4, 3, (192, 160), 89, (128, 128, 128), (5, 5, 5)),
    "Heart": ((115, 320, 232), 20, 1, 1, (320, 256), 33, (80, 192, 128), (4, 5, 5)),
    "Liver": ((482, 512, 512), 131, 1, 2, (512, 512), 10, (128, 128, 128), (5, 5, 5)),
    "Hippocampus": ((36, 50, 35), 260, 1, 2, (56, 40), 366, (40, 56, 40), (3, 3, 3)),
    "Prostate": ((20, 320, 319), 32, 2, 2, (320, 320), 26, (20, 192, 192), (2, 5, 5)),
    "Lung": ((252, 512, 512), 63, 1, 1, (512, 512), 10, (112, 128, 128), (4, 5, 5)),
    "Pancreas": ((96, 512, 512), 282, 1, 2, (512, 512), 10, (96, 160, 128), (4, 5, 5)),
}


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    torch.manual_seed(0)
    stored = load_file(Path(__file__).with_name("golden.safetensors"))
    for name, (t, size) in golden.networks().items():
        network = PlannedUNet(3, 2, t["strides"], t["kernels"], t["base"], t["most"], deep_supervision=True).double()
        golden.filled(network)
        levels = sum(k.startswith(f"{name} ") and k[-1].isdigit() for k in stored)
        wanted = {"logits": [stored[f"{name} {k}"] for k in range(levels)], "gradients": stored[f"{name} gradients"]}
        yield Case(
            f"the network, {name}: logits of all levels, gradients",
            lambda x, net=network: trained(net, x),
            lambda _, w=wanted: w,
            (golden.rule((2, 2, *size), 90),),
            NETWORK,
        )
        letters = stored[f"{name} names"]
        yield Case(
            f"the network, {name}: names of parameters",
            lambda net=network: written(net),
            lambda w=letters: w,
            (),
            NETWORK,
        )
    yield dynunet()
    for name, ours in (("3d", full_plans), ("2d", slice_plans)):
        yield Case(
            f"plans of {golden.CASES} data sets, {name}",
            ours,
            lambda n=name: stored[f"plans {n}"],
            (),
            f"{PLANNED}: ExperimentPlanner",
            atol=0,
            rtol=0,
        )
    yield Case(
        "patch, and batch to one, of seven sets, 2-D",
        paper_slices,
        lambda: torch.tensor([v for row in TABLE.values() for v in (*row[4], 1)]),
        (),
        "table 1",
        atol=0,
        note="the paper has 42 slices of 256 x 256 as its measure, but not the estimate that it divides by",
    )
    yield Case("halvings of seven sets, 3-D", paper_halvings, lambda: numbers(7), (), "table 1", atol=0, rtol=0)
    for k, (image, labels, before, after) in enumerate(golden.volumes()):
        axis = thick_axis(before, after)
        size = [round(n * a / b) for n, a, b in zip(image.shape[1:], before, after, strict=True)]
        yield Case(
            f"resampling, {before} to {after} mm",
            lambda image=image, size=size, axis=axis: torch.from_numpy(
                np.stack([resampled(c.numpy(), size, 3, axis) for c in image])
            ).flatten()[::3],
            lambda k=k: stored[f"image {k}"],
            (),
            f"{PLANNED}: resample_patient, scikit-image resize",
        )
        yield Case(
            f"resampling of labels, {before} to {after} mm",
            lambda labels=labels, size=size, axis=axis: torch.from_numpy(
                resampled_labels(labels[0].numpy(), size, axis)
            )[None],
            lambda k=k: stored[f"labels {k}"],
            (),
            f"{PLANNED}: resample_patient, batchgenerators resize_segmentation",
            atol=0,
        )
    yield Case(
        "memory: the maps of a real network, counted",
        counted_by_formula,
        counted_by_hooks,
        (),
        "forward hooks on every convolution",
        atol=0,
        rtol=0,
    )
    yield Case(
        "target spacing",
        lambda: torch.from_numpy(target_spacing(*thick())),
        spacing_by_hand,
        (),
        "the rule by hand: 10th percentile of thick slices, else the median",
    )
    yield Case("z-scores within the mask", *masked_scores(), "mean and deviation of the voxels that are not 0")
    yield Case("CT: clipped, less the set's mean, over its deviation", *clipped(), "numpy")
    yield Case("five folds", fold_sizes, lambda: torch.tensor([5, 5, 5, 4, 4, 1]), (), "every case is left out once")
    yield Case(
        "the largest piece",
        lambda: decided(two_pieces(), [1])[0].long(),
        lambda: (two_pieces()[1] > 0.5).long() * (torch.arange(9) < 5).view(9, 1, 1),
        (),
        "by hand",
    )
    logits, truth = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64), torch.randint(0, 3, (2, 4, 5, 6))
    yield Case(
        "soft Dice of the batch",
        lambda x: batch_dice(x, truth),
        lambda x: dice_slowly(x, truth),
        (logits,),
        "-2/|K| sum_k sum(u v) / (sum(u) + sum(v)), one class after the other",
        gradients=True,
    )
    yield Case(
        "the plateau",
        plateau,
        lambda: torch.tensor([1.0, 1.0, 0.2, 0.2, 0.04, 0.04], dtype=torch.float64),
        (),
        "by hand: no gain for longer than the patience",
    )


def trained(network: PlannedUNet, x: Tensor) -> dict:
    network.zero_grad()
    output = network.train()(x.detach())
    every = [output["out"], *output["aux"]]
    sum(o.square().mean() for o in every).backward()
    gradients = torch.stack(
        [p.grad.norm() if p.grad is not None else p.new_zeros(()) for _, p in sorted(network.named_parameters())]
    )
    return {"logits": [o.detach().flatten()[::5] for o in every], "gradients": gradients}


def written(network: nn.Module) -> Tensor:
    return torch.tensor([ord(c) for c in " ".join(sorted(k for k, _ in network.named_parameters()))], dtype=torch.int16)


def dynunet() -> Case:
    import monai
    from monai.networks.nets import DynUNet

    theirs = DynUNet(
        3, 2, 3, [3, 3, 3], [1, 2, 2], [2, 2], [6, 12, 24], norm_name=("INSTANCE", {"affine": True}), trans_bias=True
    ).eval()
    ours = PlannedUNet(3, 2, [[2] * 3] * 2, [[3] * 3] * 3, 6).eval()
    blocks = {
        "encoder.stages.0.0": "input_block",
        "encoder.stages.1.0": "downsamples.0",
        "encoder.stages.2.0": "bottleneck",
    }
    blocks |= {f"decoder.stages.{i}": f"upsamples.{i}.conv_block" for i in range(2)}
    state = {}
    for mine, block in blocks.items():
        for k in (0, 1):
            for a, b in (("conv", f"conv{k + 1}.conv"), ("norm", f"norm{k + 1}")):
                part = theirs.get_submodule(f"{block}.{b}")
                state[f"{mine}.convs.{k}.{a}.weight"] = part.weight.detach()
                bias = part.bias if part.bias is not None else torch.zeros(len(part.weight))
                state[f"{mine}.convs.{k}.{a}.bias"] = bias.detach()
    for i in range(2):
        up = theirs.get_submodule(f"upsamples.{i}.transp_conv.conv")
        state |= {
            f"decoder.transpconvs.{i}.weight": up.weight.detach(),
            f"decoder.transpconvs.{i}.bias": up.bias.detach(),
        }
    head = theirs.get_submodule("output_block.conv.conv")
    own = ours.state_dict()
    state |= {k: own[k] for k in own if "seg_layers" in k}
    state |= {"decoder.seg_layers.1.weight": head.weight.detach(), "decoder.seg_layers.1.bias": head.bias.detach()}
    second = {
        k.replace("conv.weight", "all_modules.0.weight"): v for k, v in state.items() if k.endswith("conv.weight")
    }
    ours.load_state_dict(from_official(state | second))  # as a checkpoint, with second names
    return Case(
        "the network, 3-D",
        ours,
        theirs,
        (torch.randn(2, 2, 8, 12, 8),),
        f"monai {monai.__version__} DynUNet",
        gradients=False,
    )


def full_plans() -> Tensor:
    found: list[int] = []
    for median, spacing, number, channels, classes in golden.sets():
        row = golden.packed(plan_3d(spacing, median, number, channels, classes, BUDGET_3D, 30, 999, "cube"))
        found += [len(row), *row]
    return torch.tensor(found, dtype=torch.int32)


def slice_plans() -> Tensor:
    found: list[int] = []
    for median, spacing, number, channels, classes in golden.sets():
        row = golden.packed(plan_2d(spacing, median, number, channels, classes, BUDGET_2D, 30, 999, fits=50))
        found += [len(row), *row]
    return torch.tensor(found, dtype=torch.int32)


def numbers(*columns: int) -> Tensor:
    return torch.tensor([int(v) for row in TABLE.values() for c in columns for v in np.ravel(row[c])])


def paper_slices() -> Tensor:
    found: list[int] = []
    for median, number, channels, structures, _, batch, *_ in TABLE.values():
        plan = plan_2d(np.ones(3), np.array(median), number, channels, structures + 1, BUDGET_2D, 30, 6)
        found += [*plan["patch"], int(abs(plan["batch_size"] - batch) <= 1)]
    return torch.tensor(found)


def paper_halvings() -> Tensor:
    return torch.tensor([n for row in TABLE.values() for n in counts_of_halvings(row[6], 5)])


STRIDES = [[2, 2, 2], [1, 2, 2], [2, 2, 1]]


def counted_by_formula() -> int:
    return memory((8, 16, 8), STRIDES, 4, 12, 2, 3)


def counted_by_hooks() -> int:
    network, total = PlannedUNet(3, 2, STRIDES, [[3] * 3] * 4, 4, 12).eval(), []
    heads = set(network.decoder.seg_layers[:-1])
    for part in network.modules():
        if isinstance(part, nn.Conv3d | nn.ConvTranspose3d) and part not in heads:
            part.register_forward_hook(lambda _, __, out: total.append(out.numel()))
    x = torch.zeros(1, 2, 8, 16, 8)
    with torch.inference_mode():
        network(x)
    return sum(total) + x.numel()


def thick() -> tuple[list, list]:
    rng = np.random.RandomState(1)
    return [[0.8 + 0.1 * rng.rand(), 0.8, 5 + rng.rand()] for _ in range(21)], [[500, 512, 40 + k] for k in range(21)]


def spacing_by_hand() -> Tensor:
    spacings = sorted(row[2] for row in thick()[0])
    first = sorted(row[0] for row in thick()[0])
    return torch.tensor([first[10], 0.8, spacings[2]], dtype=torch.float64)  # 10 % of 20 steps: the third of 21


def masked_scores() -> tuple[Callable, Callable, tuple]:
    image = torch.randn(2, 5, 6, 7) * 30 + 100
    image[:, :2] = 0
    facts = {"schemes": ["zscore", "zscore"], "within_mask": True, "intensity": {}}

    def by_hand(x: Tensor) -> Tensor:
        out = np.zeros(x.shape)
        for c, channel in enumerate(x.numpy()):
            inside = channel[2:]
            out[c, 2:] = (inside - inside.mean()) / inside.std()
        return torch.from_numpy(out).float()

    return lambda x: normalised(x, facts), by_hand, (image,)


def clipped() -> tuple[Callable, Callable, tuple]:
    facts = {
        "schemes": ["ct"],
        "within_mask": False,
        "intensity": {"low": [-90.0], "high": [200.0], "mean": [40.0], "deviation": [55.0]},
    }
    return lambda x: normalised(x, facts), lambda x: (x.clip(-90, 200) - 40) / 55, (torch.randn(1, 4, 5, 6) * 300,)


def fold_sizes() -> Tensor:
    parts = folds(23)
    return torch.tensor([*map(len, parts), int(sorted(i for p in parts for i in p) == list(range(23)))])


def two_pieces() -> Tensor:
    one = torch.zeros(9, 3, 3)
    one[:4], one[6:8] = 0.9, 0.8
    return torch.stack([1 - one, one])


def batch_dice(logits: Tensor, truth: Tensor) -> Tensor:
    above, below = (part.sum(0) for part in soft_dice(logits.softmax(1), truth, squares=False))
    return -(above / below).mean()


def dice_slowly(logits: Tensor, truth: Tensor) -> Tensor:
    u, total = logits.softmax(1), 0.0
    for k in (1, 2):
        v = (truth == k).double()
        total = total + 2 * (u[:, k] * v).sum() / (u[:, k].sum() + v.sum())
    return -total / 2


def plateau() -> Tensor:
    """Factors of the learning rate after six epochs of two steps, of which only the first lowers the loss."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    schedule, seen = Plateau(optimizer, 2, 1), []
    for _ in range(6):
        for _ in range(2):
            schedule.observe(torch.tensor(1.0))
            schedule.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return torch.tensor(seen, dtype=torch.float64)


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import monai
    from monai.networks.nets import DynUNet

    def patches(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 1, 64, 64, 64),)

    def reference() -> nn.Module:
        widths = [min(30 * 2**i, 320) for i in range(6)]
        return DynUNet(
            3,
            1,
            2,
            [3] * 6,
            [1, 2, 2, 2, 2, 2],
            [2] * 5,
            widths,
            norm_name=("INSTANCE", {"affine": True}),
            trans_bias=True,
        )

    return {"nnunet_3d": Pair(nnunet_3d, reference, patches, f"monai:DynUNet {monai.__version__}", train_batch=2)}
