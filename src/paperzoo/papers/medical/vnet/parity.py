"""V-Net against MONAI's `VNet` (weights through `from_official`), its stages written out, and the Dice loss and its gradient as the paper prints them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.medical.vnet.model import MONAI, VNet, from_official, vnet
from paperzoo.papers.medical.vnet.recipe import histogram_matched
from paperzoo.tasks.volume_metrics import soft_dice


def cases() -> Iterator[Case]:
    import monai
    from monai.networks.nets import VNet as Theirs

    torch.manual_seed(0)
    source = f"monai {monai.__version__} VNet"
    full, reference = vnet(3, 4).eval(), Theirs(3, 4, 3, "prelu").eval()
    livelier(reference)
    full.load_state_dict(from_official(reference.state_dict()))
    yield Case("the network, eval", full, reference, (torch.randn(1, 4, 16, 16, 16),), source)
    for train, batch, size in ((False, 2, (16, 32, 16)), (True, 3, (32, 16, 16))):
        # in double precision, as batch norms of a few voxels amplify rounding
        reference = narrow(1, 2).double().train(train)
        livelier(reference)
        ours = VNet(2, 1, width=4).double().train(train)
        names = {our_name(name): name for name, _ in reference.named_parameters()}
        ours.load_state_dict(from_official({narrowed(k): v for k, v in reference.state_dict().items()}))
        yield Case(
            f"4 to 64 channels, {'training' if train else 'eval'}, {size}: logits and all gradients",
            lambda x, net=ours, names=names: gradients_of(net, x, {name: name for name in names}),
            lambda x, net=reference, names=names: gradients_of(net, x, names),
            (torch.randn(batch, 1, *size, dtype=torch.float64),),
            f"{source}, built of its stages",
        )
    ours = VNet(2, 3, 4, (1, 2), (2, 1), (4, 2), 3).double().eval()
    yield Case(
        "the input repeated to channels that are no multiple of it",
        ours.in_tr,
        lambda x: repeated(ours, x),
        (torch.randn(2, 3, 5, 6, 7, dtype=torch.float64),),
        "fig. 2: channel i of the sum is channel i modulo 3; MONAI refuses such a count",
    )
    padded = torch.randn(1, 3, 7, 12, 9, dtype=torch.float64)
    yield Case(
        "odd sizes: the volume continued by its last voxels",
        ours,
        lambda x: ours(torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, 1), (0, 0), (0, 3)), mode="edge")))[
            :, :, :7, :, :9
        ],
        (padded,),
        "numpy.pad; MONAI refuses such sizes",
    )

    from monai.losses import DiceLoss

    logits, truth = torch.randn(2, 3, 6, 5, 4, dtype=torch.float64), torch.randint(0, 3, (2, 6, 5, 4))
    truth[0, :2] = 0
    theirs = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=1e-5)
    yield Case(
        "the Dice loss",
        lambda x: loss(x, truth),
        lambda x: theirs(x, truth[:, None]),
        (logits,),
        f"monai {monai.__version__} DiceLoss with squared_pred",
        gradients=True,
    )
    yield Case(
        "the Dice coefficient of sec. 3 and its gradient",
        lambda: with_gradient(logits[:, :2].softmax(1)),
        lambda: printed(logits[:, :2].softmax(1), (truth > 0).long()),
        (),
        "the two formulas of sec. 3, written out",
        atol=1e-4,
        note="D = 2 sum(p g) / (sum(p^2) + sum(g^2)); ours adds 1e-5 above and below",
    )
    values, reference = torch.randn(7, 9), torch.randn(63).exp()
    yield Case(
        "histogram matching",
        lambda: histogram_matched(values, reference),
        lambda: reference.sort().values[values.flatten().argsort().argsort()].view(7, 9),
        (),
        "the k-th smallest value becomes the k-th smallest of the reference",
    )
    longer = torch.rand(1000)
    yield Case(
        "histogram matching, other counts",
        lambda: histogram_matched(values, longer).flatten().sort().values,
        lambda: np.quantile(longer.numpy(), (np.arange(63) + 0.5) / 63, method="hazen").astype(np.float32),
        (),
        "numpy.quantile",
    )


def narrow(channels: int, classes: int) -> nn.Module:
    """MONAI's network with a quarter of its channels: its own stages and forward pass."""
    from monai.networks.nets import vnet as theirs

    class Narrow(theirs.VNet):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            down = {"act": "prelu", "bias": True}
            up = {"act": "prelu", "dropout_prob": (None, 0.0)}
            self.in_tr = theirs.InputTransition(3, channels, 4, **down)
            for i, steps in enumerate((1, 2, 3, 2)):
                setattr(self, f"down_tr{32 * 2**i}", theirs.DownTransition(3, 4 * 2**i, steps, **down))
            for name, width, out, steps in ((256, 64, 64, 2), (128, 64, 32, 2), (64, 32, 16, 1), (32, 16, 8, 1)):
                setattr(self, f"up_tr{name}", theirs.UpTransition(3, width, out, steps, **up))
            self.out_tr = theirs.OutputTransition(3, 8, classes, **down)

    return Narrow()


def narrowed(name: str) -> str:
    """MONAI's stages are called by their channels; with a quarter of them ours have other names."""
    return re.sub(r"_tr(\d+)", lambda match: f"_tr{int(match[1]) // 4}", name)


def our_name(name: str) -> str:
    name = narrowed(name)
    for pattern, new in MONAI:
        name = re.sub(pattern, new, name)
    return name


def livelier(network: nn.Module) -> None:
    """Norms that are not at their start, so that leaving one out shows."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm3d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            part.running_mean.normal_(std=0.2)
            part.running_var.uniform_(0.5, 1.5)


TRUTH_SEED = 3


def loss(logits: Tensor, truth: Tensor) -> Tensor:
    above, below = soft_dice(logits.softmax(1), truth)
    return (1 - above / below).mean()


def with_gradient(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    truth = foreground(probabilities)
    p = probabilities.detach().requires_grad_(True)
    above, below = soft_dice(p, truth)
    coefficient = above / below
    return coefficient, torch.autograd.grad(coefficient.sum(), p)[0][:, 1]


def foreground(like: Tensor) -> Tensor:
    return torch.randint(0, 2, (len(like), *like.shape[2:]), generator=torch.Generator().manual_seed(TRUTH_SEED))


def printed(probabilities: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """D and dD/dp_j = 2 [g_j (sum p^2 + sum g^2) - 2 p_j (sum p g)] / (sum p^2 + sum g^2)^2."""
    coefficients, gradients = [], []
    for p, g in zip(probabilities[:, 1], foreground(probabilities).double(), strict=True):
        both, squares = (p * g).sum(), (p**2).sum() + (g**2).sum()
        coefficients.append((2 * both / squares).view(1))
        gradients.append(2 * (g * squares - 2 * p * both) / squares**2)
    return torch.stack(coefficients), torch.stack(gradients)


def repeated(net: VNet, x: Tensor) -> Tensor:
    stage = net.in_tr
    h = F.conv3d(x, stage.conv1.weight, stage.conv1.bias, padding=1)
    norm = stage.bn1
    shape = (-1, 1, 1, 1)
    h = (h - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    h = h * norm.weight.view(shape) + norm.bias.view(shape)
    h = torch.stack([h[:, i] + x[:, i % 3] for i in range(4)], 1)
    return torch.where(h > 0, h, stage.relu1.weight.view(shape) * h)


def gradients_of(net: nn.Module, x: Tensor, names: dict[str, str]) -> dict[str, Tensor]:
    """Logits, and the gradients of their mean square with respect to the input and the parameters, by our names."""
    x = x.clone().requires_grad_(True)
    logits = net(x)
    own = dict(net.named_parameters())
    found = torch.autograd.grad(logits.square().mean(), [x, *(own[name] for name in names.values())])
    return {"logits": logits, "input": found[0], **dict(zip(names, found[1:], strict=True))}


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import monai
    from monai.networks.nets import VNet as Theirs

    def volumes(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 1, 32, 32, 32),)

    def reference() -> nn.Module:
        return Theirs(3, 1, 2, "prelu", dropout_prob_down=None, dropout_prob_up=(None, 0.0), bias=True)

    return {"vnet": Pair(vnet, reference, volumes, f"monai:VNet {monai.__version__}", train_batch=2)}
