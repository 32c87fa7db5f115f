"""Attention U-Net against the authors' code (stored answers, see golden.py), MONAI's `AttentionUnet`, and the gate written out voxel by voxel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.medical.attention_unet import golden
from paperzoo.papers.medical.attention_unet.model import (
    AttentionUNet,
    FullGate,
    GridAttention,
    MonaiAttentionUNet,
    attention_unet,
    attention_unet_monai,
)


def cases() -> Iterator[Case]:
    import monai
    from monai.networks.nets import AttentionUnet
    from monai.networks.nets.attentionunet import AttentionBlock
    from safetensors.torch import load_file

    torch.manual_seed(0)
    yield Case(
        "the authors' network: logits, the training loss, all gradients' lengths",
        lambda: golden.answers(golden.write_weights(attention_unet(golden.CLASSES))),
        lambda: load_file(golden.FILE),
        (),
        "github.com/ozan-oktay/Attention-Gated-Networks eee4881, unet_CT_single_att_dsv_3D",
    )
    for size, coarse, channels in (((4, 6, 8), (2, 3, 4), 6), ((6, 4, 4), (1, 1, 2), 4)):
        gate = GridAttention(channels, 2 * channels, channels).eval().double()
        livelier(gate)
        inputs = (torch.randn(2, channels, *size).double(), torch.randn(2, 2 * channels, *coarse).double())
        yield Case(
            f"the gate on a grid, x {size}, g {coarse}",
            gate.coefficients,
            lambda x, g, gate=gate: written_out(gate, x, g),
            inputs,
            "eq. 1, one place of the grid at a time",
        )
        yield Case(
            f"what passes the gate, x {size}",
            gate,
            lambda x, g, gate=gate: gate.W(written_out(gate, x, g) * x),
            inputs,
            "alpha times x, then 1x1x1 and batch norm",
        )
    fresh = AttentionUNet(3, 1, (4, 8, 8), depth=2)
    yield Case(
        "gates let features pass at first",
        lambda: torch.stack([b.gate_block_1.coefficients(x, g).mean() for b, x, g in gated(fresh)]) > 0.8,
        lambda: torch.ones(1, dtype=torch.bool),
        (),
        "the paper's rule of initialisation",
    )
    odd = AttentionUNet(2, 1, (4, 8, 8), depth=2).eval()
    yield Case(
        "odd sizes: continued by the last voxels",
        odd,
        lambda x: odd(F.pad(x, (0, 3, 0, 0, 0, 1), mode="replicate"))[:, :, :7, :, :9],
        (torch.randn(1, 1, 7, 12, 9),),
        "the padded volume, cut",
    )

    source = f"monai {monai.__version__}"
    for train, channels, classes, size in ((False, 2, 3, (16, 24, 16)), (True, 1, 2, (16, 16, 32))):
        reference = AttentionUnet(3, channels, classes, (4, 8, 12), (2, 2)).double().train(train)
        livelier(reference)
        ours = MonaiAttentionUNet(classes, channels, (4, 8, 12)).double().train(train)
        ours.load_state_dict(reference.state_dict())
        yield Case(
            f"MONAI's network, {'training' if train else 'eval'} {size}",
            ours,
            reference,
            (torch.randn(2, channels, *size).double(),),
            f"{source} AttentionUnet",
            gradients=True,
        )
    theirs, ours = AttentionBlock(3, 4, 8, 8).eval(), FullGate(8).eval()
    livelier(theirs)
    ours.load_state_dict(theirs.state_dict())
    yield Case(
        "MONAI's gate",
        ours,
        theirs,
        (torch.randn(2, 8, 3, 4, 5), torch.randn(2, 8, 3, 4, 5)),
        f"{source} AttentionBlock",
        gradients=True,
    )


def livelier(network: nn.Module) -> None:
    """Norms and biases that are not at their start, so that leaving one out shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Conv3d):
            nn.init.normal_(module.weight, std=0.4)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.3)


def written_out(gate: GridAttention, x: Tensor, g: Tensor) -> Tensor:
    """q = psi^T relu(W_x^T x + W_g^T g + b_g) + b_psi at every place of the coarse grid, sigmoid, resampled to x."""
    grid = tuple(n // 2 for n in x.shape[2:])
    w_x, w_g, b_g = gate.theta.weight, gate.phi.weight[:, :, 0, 0, 0], gate.phi.bias
    psi, b_psi = gate.psi.weight[0, :, 0, 0, 0], gate.psi.bias
    signal = torch.einsum("fg,bgxyz->bfxyz", w_g, g) + b_g.view(-1, 1, 1, 1)
    signal = F.interpolate(signal, size=grid, mode="trilinear", align_corners=False)
    alpha = torch.empty(len(x), 1, *grid, dtype=x.dtype)
    for b in range(len(x)):
        for i in range(grid[0]):
            for j in range(grid[1]):
                for k in range(grid[2]):
                    part = x[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2]
                    projected = (w_x * part).sum((1, 2, 3, 4)) + signal[b, :, i, j, k]
                    alpha[b, 0, i, j, k] = 1 / (1 + torch.exp(-(psi @ projected.clamp(min=0) + b_psi[0])))
    return F.interpolate(alpha, size=x.shape[2:], mode="trilinear", align_corners=False)


def gated(network: AttentionUNet) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """The gates of a network with what they were called with for a random volume."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    blocks = [getattr(network, f"attentionblock{level}") for level in range(2, network.depth + 1)]
    hooks = [b.register_forward_hook(lambda block, inputs, _: seen.append((block, *inputs))) for b in blocks]
    with torch.no_grad():
        network.eval()(torch.randn(1, 1, 16, 16, 16))
    for hook in hooks:
        hook.remove()
    return seen


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import monai
    from monai.networks.nets import AttentionUnet

    def volumes(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 1, 32, 32, 32),)

    def reference() -> nn.Module:
        return AttentionUnet(3, 1, 2, (16, 32, 64, 128, 256), (2, 2, 2, 2))

    against = f"monai:AttentionUnet {monai.__version__}"
    return {"attention_unet_monai": Pair(attention_unet_monai, reference, volumes, against, train_batch=2)}
