"""Swin V2 against timm's and torchvision's, and its attention against the paper's equations one pair at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.swin_v2 import model as swin


def cases() -> Iterator[Case]:
    import timm
    import torchvision

    peer, tv = f"timm {timm.__version__}", f"torchvision {torchvision.__version__.split('+')[0]}"
    torch.manual_seed(0)
    for name in (
        "swinv2_tiny_window8_256",
        "swinv2_tiny_window16_256",
        "swinv2_base_window12_192",
        "swinv2_base_window12to24_192to384",
    ):
        size = int(re.search(r"(\d+)$", name)[1])
        depth = (1, 1, 2, 2) if "base" in name else (2, 2, 6, 2)
        reference = settled(timm.create_model(name, depths=depth))
        ours = getattr(swin, name)(depth=depth)
        ours.load_state_dict(reference.state_dict())
        yield Case(
            f"{name} eval, depths {depth}",
            ours.eval(),
            reference.eval(),
            (torch.randn(1, 3, size, size),),
            f"{peer} {name}",
        )

    small = {"num_classes": 7, "in_chans": 1, "img_size": 64, "drop_path_rate": 0.0}
    reference = settled(timm.create_model("swinv2_small_window8_256", **small, depths=(2, 2, 4, 2)))
    ours = swin.swinv2_small_window8_256(
        num_classes=7, in_channels=1, image_size=64, drop_path_rate=0.0, depth=(2, 2, 4, 2)
    )
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 1, 64, 64)
    yield Case("64px: windows shrink to the map; training", ours.train(), reference.train(), (x,),
               f"{peer} swinv2_small", gradients=True)  # fmt: skip
    yield Case("stages", ours.stages, lambda x: reference.forward_intermediates(x, intermediates_only=True), (x,),
               f"{peer} forward_intermediates")  # fmt: skip
    yield Case("embed", ours.embed, lambda x: reference.forward_head(reference.forward_features(x), pre_logits=True), (x,),
               f"{peer} forward_head(pre_logits=True)")  # fmt: skip

    # Sizes that windows do not divide: torchvision pads.
    for height, width in ((224, 224), (101, 180)):
        reference = settled(torchvision.models.swin_v2_t(num_classes=5)).eval()
        ours = swin.swinv2_tiny_window8_256(num_classes=5)
        ours.load_state_dict(swin.from_official(reference.state_dict()))
        x = torch.randn(1, 3, height, width)
        yield Case(f"{height}x{width}, from torchvision", ours.eval(), reference, (x,), f"{tv} swin_v2_t")

    # The authors' files merge patches at the end of a stage and hold the buffers.
    ours = settled(swin.swinv2_digits()).eval()
    again = swin.swinv2_digits(drop_rate=0.5).eval()
    again.load_state_dict(swin.from_official(as_released(ours)))
    yield Case("from_official", again, ours, (torch.randn(2, 3, 32, 32),), "the same weights under the authors' names")

    for known in (None, 3):
        part = swin.WindowAttention(12, (2, 3), 3, known).double()
        for p in part.parameters():
            nn.init.normal_(p, std=0.5)
        nn.init.constant_(part.logit_scale[0], 9.0)  # tau below 0.01 is held there
        x = torch.randn(8, 6, 12, dtype=torch.float64)  # two images of 4 x 6
        mask = swin.shift_mask(4, 6, (2, 3), (1, 1), x)
        yield Case(f"attention, known window {known}", part, lambda x, p=part, k=known: slow_attention(p, x, k, None), (x,),
                   "eq. (2) to (4), one pair at a time")  # fmt: skip
        yield Case(f"masked attention, known window {known}", lambda x, p=part, m=mask: p(x, m),
                   lambda x, p=part, k=known: slow_attention(p, x, k, (4, 6, 1, 1)), (x,),
                   "eq. (2) to (4), one pair at a time", gradients=True)  # fmt: skip

    # Sec. 3.2: the extra norms sit on the main branch after every sixth block.
    plain = settled(swin.swinv2_digits(depth=(2, 12))).eval()
    ours = swin.swinv2_digits(depth=(2, 12), extra_norm=6).eval()
    ours.load_state_dict(plain.state_dict(), strict=False)
    yield Case("extra norms", ours, lambda x: with_extra_norms(plain, x), (torch.randn(2, 3, 32, 32),), "sec. 3.2")
    fresh = swin.swinv2_digits().eval()
    yield Case("a fresh block is the identity", lambda x: fresh.layers[0](x), lambda x: x, (torch.randn(1, 8, 8, 48),),
               "norms that end a branch start at zero", rtol=0.0, atol=0.0)  # fmt: skip


def settled(network: nn.Module) -> nn.Module:
    """Random norms and logit scales instead of their initial zeros, so that every branch counts."""
    for name, p in network.named_parameters():
        if "norm" in name:
            (nn.init.uniform_(p, 0.3, 1.0) if name.endswith("weight") else nn.init.normal_(p, std=0.1))
        elif name.endswith(("logit_scale", "q_bias", "v_bias", "qkv.bias")):
            with torch.no_grad():
                p.add_(torch.randn_like(p) * 0.3)
    return network


def slow_attention(part: swin.WindowAttention, x: Tensor, known: int | None, shift: tuple | None) -> Tensor:
    """Every window, head and pair of places by itself. `shift` is the map's size and shift, for the mask."""
    h, w = part.window_size
    dim, heads = x.shape[-1], part.num_heads
    width = dim // heads
    wq, wk, wv = part.qkv.weight.chunk(3)
    places = [(a, b) for a in range(h) for b in range(w)]

    def squeeze(offset: int, size: int) -> float:
        offset = 8 * offset / ((known or size) - 1)
        return math.copysign(math.log2(1 + abs(offset)) / 3, offset)

    def region(window: int, place: tuple[int, int]) -> tuple[int, int]:
        """Whether a place came from beyond the map's edge, once the map was shifted."""
        rows, columns, down, right = shift
        row, column = divmod(window % (rows // h * (columns // w)), columns // w)
        return row * h + place[0] >= rows - down, column * w + place[1] >= columns - right

    outputs = []
    for n, window in enumerate(x):
        q, k, v = window @ wq.T + part.q_bias, window @ wk.T, window @ wv.T + part.v_bias
        mixed = []
        for head in range(heads):
            part_of = slice(head * width, (head + 1) * width)
            tau = 1 / torch.exp(torch.minimum(part.logit_scale[head, 0, 0], x.new_tensor(math.log(100.0))))
            rows = []
            for i, (a, b) in enumerate(places):
                logits = []
                for j, (c, d) in enumerate(places):
                    offset = x.new_tensor([squeeze(a - c, h), squeeze(b - d, w)])
                    hidden = (part.cpb_mlp[0].weight @ offset + part.cpb_mlp[0].bias).clamp_min(0)
                    bias = 16 * torch.sigmoid(part.cpb_mlp[2].weight[head] @ hidden)
                    cosine = torch.cosine_similarity(q[i, part_of], k[j, part_of], dim=0)
                    apart = shift is not None and region(n, places[i]) != region(n, places[j])
                    logits.append(cosine / tau + bias - (100 if apart else 0))
                rows.append(torch.stack(logits).softmax(0) @ v[:, part_of])
            mixed.append(torch.stack(rows))
        outputs.append(torch.cat(mixed, dim=1) @ part.proj.weight.T + part.proj.bias)
    return torch.stack(outputs)


def as_released(network: swin.SwinTransformerV2) -> dict[str, Tensor]:
    """A state under the names of the authors' files."""
    state = {
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
    }
    for name, value in network.state_dict().items():
        name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        state[name.replace("head.fc.", "head.")] = value
    return state


def with_extra_norms(network: swin.SwinTransformerV2, x: Tensor) -> Tensor:
    x = network.layers[1].downsample(network.layers[0](network.patch_embed(x)))
    for i, block in enumerate(network.layers[1].blocks):
        x = block(x, (0, 0), None)  # one window
        if i in (5, 11):
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return network.head["fc"](network.norm(x).mean((1, 2)))


def images(batch: int) -> tuple[Tensor]:
    return (torch.randn(batch, 3, 256, 256),)


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import timm

    name = "swinv2_tiny_window8_256"
    peer = lambda: timm.create_model(name, drop_path_rate=0.2)  # noqa: E731
    return {name: Pair(swin.swinv2_tiny_window8_256, peer, images, f"timm:{name}", train_batch=2)}
