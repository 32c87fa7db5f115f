"""Writes `golden.safetensors`: what the authors' PyTorch code answers for weights, pictures and texts that can be written down.

    python -m paperzoo.papers.ocr.master.golden path/to/MASTER-pytorch

needs a checkout of wenwenyu/MASTER-pytorch at its first release, commit 8728c61 (later ones use one decoder layer three times, see
notes.md). `parity.py` makes the same weights, pictures and texts by the same rule and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.safetensors")
CHARACTERS = 94
BLOCKS = {"one_add": (1, "add"), "four_add": (4, "add"), "eight_concat": (8, "concat"), "one_concat": (1, "concat")}
NETWORKS = {"one_concat": (1, "concat"), "eight_add": (8, "add")}
PARTS = {"padding": 0, "end": 1, "start": 2, "unknown": 3}  # of the authors' numbering; characters follow


def noise(shape: tuple[int, ...], phase: float = 0.0) -> Tensor:
    """Numbers between 0 and 1 that look random and need no generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((n * 12.9898 + phase).sin() * 437.585).remainder(1).float().reshape(shape)


@torch.no_grad()
def write_weights(model: nn.Module) -> nn.Module:
    """Every parameter and buffer of the authors' module filled with `noise`, by the order of the names."""
    state = model.state_dict()
    for phase, name in enumerate(sorted(n for n in state if not n.endswith((".pe", "num_batches_tracked")))):
        value = state[name]
        values = noise(tuple(value.shape), phase) - 0.5
        if value.ndim > 1:
            value.copy_(values * 3.4 / value[0].numel() ** 0.5)
        elif name.endswith("running_var") or (name.endswith(".weight") and value.ndim == 1):
            value.copy_(1 + values)
        else:
            value.copy_(0.4 * values)
    return model


def pictures() -> Tensor:
    return 2 * noise((2, 3, 48, 80)) - 1


def texts() -> Tensor:
    """Two texts of five and three characters in the authors' numbering, with start, end and padding: int64 (2, 7)."""
    first, second = [2, 10, 50, 97, 4, 10, 1], [2, 60, 60, 5, 1, 0, 0]
    return torch.tensor([first, second])


def theirs(heads: int, fusion: str) -> nn.Module:
    from model.master import MASTER

    context = {"ratio": 0.0625, "headers": heads, "att_scale": True, "fusion_type": f"channel_{fusion}",
               "layers": [False, True, True, True]}  # fmt: skip
    part = {"stacks": 3, "dropout": 0.2, "feed_forward_size": 2048}
    return MASTER(
        common_kwargs={"n_class": -1, "with_encoder": False, "model_size": 512, "multiheads": 8},
        backbone_kwargs={"in_channels": 3, "gcb_kwargs": context}, encoder_kwargs=part, decoder_kwargs=part,
    )  # fmt: skip


def make(checkout: Path) -> dict[str, Tensor]:
    sys.path.insert(0, str(checkout))
    import torch.nn.functional as F
    from model.context_block import MultiAspectGCAttention
    from utils.decode_util import greedy_decode_with_probability
    from utils.label_util import LabelTransformer

    found = {}
    for name, (heads, fusion) in BLOCKS.items():
        block = write_weights(MultiAspectGCAttention(16, 0.25, heads, fusion_type=f"channel_{fusion}"))
        found[f"block.{name}"] = block(noise((2, 16, 3, 5))).detach()
    LabelTransformer.nclass = CHARACTERS + 4
    for name, (heads, fusion) in NETWORKS.items():
        model = write_weights(theirs(heads, fusion)).eval()
        found[f"{name}.parameters"] = torch.tensor(sum(p.numel() for p in model.parameters()))
        with torch.no_grad():
            found[f"{name}.memory"] = model.encode(pictures(), None)[:, ::7, ::16]
            found[f"{name}.logits"] = model(pictures(), texts()[:, :-1])
            tokens, p = greedy_decode_with_probability(
                model, pictures(), 5, PARTS["start"], PARTS["padding"], padding=True
            )
            found[f"{name}.greedy"], found[f"{name}.probability"] = tokens, p
    # one step of training, without dropout, whose random numbers cannot be shared
    model = write_weights(theirs(8, "add")).train()  # "concat" overwrites what its backward pass needs
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    outputs = model(pictures(), texts()[:, :-1])
    loss = F.cross_entropy(outputs.flatten(0, 1), texts()[:, 1:].flatten(), ignore_index=PARTS["padding"])
    loss.backward()
    found["train.loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("conv_mask.weight"):
            found[f"train.gradient.{name}"] = parameter.grad.flatten()[::32].clone()
    return found


if __name__ == "__main__":
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in make(Path(sys.argv[1])).items()}, str(FILE))
    print(FILE, FILE.stat().st_size)
