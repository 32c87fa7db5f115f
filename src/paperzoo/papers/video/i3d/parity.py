"""I3D against the answers of piergiaj/pytorch-i3d (`golden.py`), a still video against the image network, padding by hand, stated sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.classification.googlenet.model import googlenet
from paperzoo.papers.video.i3d import model as here
from paperzoo.papers.video.i3d.golden import CLASSES, CLIPS, FILE, clip, gradients, write_weights
from paperzoo.papers.video.i3d.model import I3D, from_images, i3d, i3d_flow, inflate, pad_same, pool_same

SOURCE = "piergiaj/pytorch-i3d at 05783d1, stored answers"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    golden = load_file(str(FILE))
    for name in ("full", "odd"):
        channels, frames, size, _ = CLIPS[name]
        model = write_weights(I3D(1.0, CLASSES, channels)).double().eval()
        expected = golden[f"{name}.logits"]
        yield Case(
            f"{channels} channels, {frames} frames of {size} pixels",
            model,
            lambda x, y=expected: y,
            (clip(name),),
            SOURCE,
        )
    model = write_weights(I3D(1.0, CLASSES, 3, drop_rate=0.0)).double().train()
    yield Case(
        "training: logits and gradients",
        lambda: gradients(model, clip("train")),
        lambda: {k.removeprefix("train."): v for k, v in golden.items() if k.startswith("train.")},
        (),
        SOURCE,
    )
    images = write_weights(googlenet(num_classes=CLASSES, aux_logits=False)).double().eval()
    video = i3d(CLASSES).double().eval()
    video.load_state_dict(from_images(images.state_dict()))
    picture = torch.randn(2, 3, 63, 63, dtype=torch.float64)
    yield Case(
        "a video that stands still gives the image network's logits",
        lambda x: endless(video, x[:, :, None].expand(-1, -1, 16, -1, -1)),
        images,
        (picture,),
        "sec. 2.4: inflated `googlenet`",
        note="63 pixels, where both pad alike; time is continued by its ends, since zeros before and after a video are no still video",
    )
    x = torch.randn(2, 3, 6, 9, 9, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    yield Case(
        "a filter at the boring video fixed point",
        lambda: F.conv3d(x[:, :, :1].expand(-1, -1, 7, -1, -1), inflate(weight, 7))[:, :, 0],
        lambda: F.conv2d(x[:, :, 0], weight),
        (),
        "sec. 2.4: repeated N times and divided by N",
    )
    for sizes, kernel, stride in (
        ((7, 10, 11), (3, 3, 3), (2, 2, 2)),
        ((8, 9, 5), (1, 3, 3), (1, 2, 2)),
        ((5, 4, 4), (2, 2, 2), (2, 2, 2)),
    ):
        maps = torch.rand(2, 3, *sizes, dtype=torch.float64)
        yield Case(
            f"max pooling of {sizes}, kernel {kernel}, stride {stride}",
            lambda m, k=kernel, s=stride: pool_same(m, k, s),
            lambda m, k=kernel, s=stride: windows(m, k, s),
            (maps,),
            "TensorFlow's rule: ceil(size / stride) windows, the odd cell of padding behind; a loop over places",
        )
    with torch.device("meta"):
        colour, flow = i3d(), i3d_flow()
    yield Case(
        "parameters of both streams, millions",
        lambda: round(sum(p.numel() for net in (colour, flow) for p in net.parameters()) / 1e6),
        lambda: 25,
        (),
        "table 1 of the paper",
    )


def endless(network: nn.Module, clips: Tensor) -> Tensor:
    """A network on a video that goes on before its first frame and after its last one as it was there."""

    def padded(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
        time = pad_same(x[:, :, :, :1, :1], (kernel[0], 1, 1), (stride[0], 1, 1)).shape[2] - x.shape[2]
        rows = (torch.arange(x.shape[2] + time) - time // 2).clamp(0, x.shape[2] - 1)
        return pad_same(x[:, :, rows], (1, *kernel[1:]), (1, *stride[1:]))

    with patch.object(here, "pad_same", padded), torch.no_grad():
        return network(clips)


def windows(maps: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    counts = [-(-n // s) for n, s in zip(maps.shape[2:], stride, strict=True)]
    before = [
        max((c - 1) * s + k - n, 0) // 2 for c, s, k, n in zip(counts, stride, kernel, maps.shape[2:], strict=True)
    ]
    out = torch.empty(*maps.shape[:2], *counts, dtype=maps.dtype)
    for place in np.ndindex(*counts):
        parts = []
        for at, s, k, b, n in zip(place, stride, kernel, before, maps.shape[2:], strict=True):
            first = at * s - b
            parts.append(slice(max(0, first), min(n, first + k)))
        out[:, :, *place] = maps[:, :, *parts].amax((2, 3, 4))
    return out
