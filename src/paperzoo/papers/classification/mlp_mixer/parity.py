"""MLP-Mixer against timm, and a version with the authors' arrays written out with functions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.mlp_mixer import model as mixer
from paperzoo.papers.classification.resnet.parity import images


def cases() -> Iterator[Case]:
    import timm
    from timm.models.mlp_mixer import MlpMixer

    peer = f"timm {timm.__version__}"
    torch.manual_seed(0)
    for name, batch in (("mixer_b16_224", 1), ("mixer_s32_224", 2), ("mixer_s16_224", 2)):
        reference = lively(timm.create_model(name)).eval()
        ours = getattr(mixer, name)().eval()
        ours.load_state_dict(reference.state_dict())
        x = torch.randn(batch, 3, 224, 224)
        yield Case(f"{name} eval 224px", ours, reference, (x,), f"{peer} {name}")
    yield Case("embed", ours.embed, lambda x: reference.forward_head(reference.forward_features(x), pre_logits=True),
               (x,), f"{peer} mixer_s16_224")  # fmt: skip
    yield Case("stages", ours.stages, lambda x: [reference.forward_intermediates(x, 1, norm=True)[1][0]], (x,),
               f"{peer} forward_intermediates")  # fmt: skip

    for name, width, patch, size in (("B/32", 768, 32, 64), ("L/16", 1024, 16, 96), ("L/32", 1024, 32, 96)):
        reference = MlpMixer(img_size=size, patch_size=patch, num_blocks=3, embed_dim=width)  # wide, but not deep
        reference = lively(reference).eval()
        ours = mixer.MlpMixer(width, 3, patch, image_size=size).eval()
        ours.load_state_dict(reference.state_dict())
        x = torch.randn(2, 3, size, size)
        yield Case(f"Mixer-{name}, three blocks, {size}px", ours, reference, (x,), f"{peer} MlpMixer")
    for name in ("mixer_b32_224", "mixer_l32_224", "mixer_l16_224"):
        with torch.device("meta"):
            reference, ours = timm.create_model(name), getattr(mixer, name)()
        yield Case(f"{name}: names and shapes", lambda o=ours: shapes(o), lambda r=reference: shapes(r), (),
                   f"{peer} {name}")  # fmt: skip

    reference = lively(timm.create_model("mixer_s16_224", img_size=(64, 96), num_classes=5, in_chans=1))
    ours = mixer.mixer_s16_224(num_classes=5, in_channels=1, image_size=(64, 96))
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(3, 1, 64, 96)
    yield Case("training, one channel, not square", with_loss(ours.train()), with_loss(reference.train()), (x,),
               f"{peer} mixer_s16_224", gradients=True)  # fmt: skip
    yield Case("every parameter's gradient", ours, reference, (x,), f"{peer} mixer_s16_224",
               gradients=True, rtol=1e-3, atol=1e-3)  # fmt: skip

    for gelu in ("tanh", "none"):
        net = lively(mixer.MlpMixer(24, 3, 4, 7, image_size=(16, 20), gelu=gelu)).eval()
        arrays = authors(net.state_dict())
        loaded = mixer.MlpMixer(24, 3, 4, 7, image_size=(16, 20), gelu=gelu).eval()
        loaded.load_state_dict(mixer.from_official(arrays))
        yield Case(f"the authors' arrays, gelu {gelu}", loaded, written_out(arrays, 3, gelu),
                   (torch.randn(2, 3, 16, 20),), "eq. (1) written out with functions")  # fmt: skip
    for name, stated in STATED.items():
        yield Case(f"{name}: parameters within a million of the table", lambda n=name, s=stated: as_stated(n, s),
                   lambda: True, (), "table 1")  # fmt: skip


STATED = {"mixer_s32_224": 19, "mixer_s16_224": 18, "mixer_b32_224": 60, "mixer_b16_224": 59, "mixer_l32_224": 206,
          "mixer_l16_224": 207, "mixer_h14_224": 431}  # fmt: skip


def as_stated(name: str, stated: float) -> bool:
    """The table counts the networks without their heads, in whole millions."""
    with torch.device("meta"):
        net = getattr(mixer, name)(num_classes=0)
    return abs(sum(p.numel() for p in net.parameters()) / 1e6 - stated) < 1


def lively(network: nn.Module) -> nn.Module:
    """Norms as after training, biases that matter, and a head that is not zero."""
    for name, p in network.named_parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.5, 1.5) if "norm" in name and name.endswith("weight") else nn.init.normal_(p, std=0.2)
    nn.init.normal_(network.head.weight, std=0.1)
    return network


def with_loss(network: nn.Module):
    return lambda x: F.cross_entropy(network(x), torch.arange(len(x)))


def shapes(network: nn.Module) -> list:
    """Names as numbers, so that the two sides are compared name by name."""
    rows = sorted(network.state_dict().items())
    return [[float(sum(name.encode())), *map(float, value.shape)] for name, value in rows]


def authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """These names to the authors' arrays."""
    parts = {new: old for old, new in mixer.PARTS.items()} | {new: old for old, new in mixer.OUTER.items()}
    arrays = {}
    for name, value in state.items():
        part, _, kind = name.rpartition(".")
        prefix = ""
        if part.startswith("blocks."):
            _, number, part = part.split(".", 2)
            prefix = f"MixerBlock_{number}/"
        if kind == "weight":
            kind = "scale" if value.ndim == 1 else "kernel"
            value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T if value.ndim == 2 else value
        arrays[f"{prefix}{parts[part].replace('.', '/')}/{kind}"] = value
    return arrays


def written_out(w: dict[str, Tensor], depth: int, gelu: str):
    """Eq. (1) with the authors' arrays: kernels (inputs, outputs)."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * w[f"{name}/scale"] + w[f"{name}/bias"]

    def mlp(x: Tensor, name: str) -> Tensor:
        x = F.gelu(x @ w[f"{name}/Dense_0/kernel"] + w[f"{name}/Dense_0/bias"], approximate=gelu)
        return x @ w[f"{name}/Dense_1/kernel"] + w[f"{name}/Dense_1/bias"]

    def forward(x: Tensor) -> Tensor:
        kernel = w["stem/kernel"]
        p = kernel.shape[0]
        patches = x.unfold(2, p, p).unfold(3, p, p)  # (B, C, rows, columns, p, p)
        x = torch.einsum("bcrsij,ijco->brso", patches, kernel).flatten(1, 2) + w["stem/bias"]
        for b in (f"MixerBlock_{i}" for i in range(depth)):
            x = x + mlp(norm(x, f"{b}/LayerNorm_0").mT, f"{b}/token_mixing").mT
            x = x + mlp(norm(x, f"{b}/LayerNorm_1"), f"{b}/channel_mixing")
        return norm(x, "pre_head_layer_norm").mean(1) @ w["head/kernel"] + w["head/bias"]

    return forward


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import timm

    return {
        "mixer_b16_224": Pair(
            mixer.mixer_b16_224,
            lambda: timm.create_model("mixer_b16_224"),
            images,
            "timm:mixer_b16_224",
            train_batch=2,
        )
    }
