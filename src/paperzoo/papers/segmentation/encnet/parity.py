"""Parity of EncNet: with the authors' modules (stored outputs), and the encoding layer and the presence loss as loops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.segmentation.bisenet_v1.golden import pictures
from paperzoo.papers.segmentation.encnet import golden, model
from paperzoo.papers.segmentation.pspnet.golden import by_rule
from paperzoo.papers.segmentation.segnet.parity import lively

SOURCE = "github zhanghang1989/PyTorch-Encoding, stored outputs"
HEADS = ("out", "presence", "aux")


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    for name, lateral in golden.LATERAL.items():
        network = getattr(model, name)(golden.CLASSES, drop_rate=0.0, lateral=lateral).eval()
        network.load_state_dict(model.from_official(by_rule(released_names(network.state_dict()))))
        mine = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(name)}
        yield Case(
            f"{name}: logits and presence for two photographs",
            lambda x, n=network: all_outputs(n, x),
            lambda x, m=mine: {key: m[key] for key in HEADS},
            (pictures(),),
            SOURCE,
            note=f"names converted; every fifth pixel; {'with' if lateral else 'without'} the finer maps",
        )
        yield Case(
            f"{name}: losses and gradients of a training step",
            lambda n=network: training_step(n),
            lambda m=mine: {key: value for key, value in m.items() if key not in HEADS},
            against=SOURCE,
            rtol=1e-6,
            atol=1e-10,
            note="in double precision; 40 values each of eight gradients",
        )

    torch.manual_seed(0)
    for shape, words in (((2, 6, 3, 4), 5), ((3, 4, 1, 7), 1), ((1, 8, 5, 5), 9)):
        layer = model.Encoding(shape[1], words).double()
        nn.init.normal_(layer.codewords)
        yield Case(
            f"encoding {shape}, {words} codewords",
            layer,
            Slow(layer),
            (torch.randn(shape, dtype=torch.float64),),
            "eq. 1, one pixel and one codeword at a time",
            gradients=True,
        )
    part = lively(model.ContextEncoding(6, 4, 3).double())
    yield Case(
        "the module: gates and presence, train",
        part.train(),
        lambda x: gated(part, x),
        (torch.randn(3, 6, 4, 5, dtype=torch.float64),),
        "fig. 2, line by line",
        gradients=True,
    )
    masks = torch.randint(0, 3, (4, 7, 5))
    masks[1], masks[2, 1:] = 255, 2
    yield Case(
        "the semantic encoding loss; an image without labels does not count",
        lambda logits: model.semantic_encoding_loss(logits, masks),
        lambda logits: presence_loss(logits, masks),
        (torch.randn(4, 3),),
        "sec. 3.2, a loop over images and classes",
        gradients=True,
    )
    yield Case(
        "all pixels ignored: no loss, and no NaN",
        lambda logits: model.semantic_encoding_loss(logits, torch.full((2, 3, 3), 255)),
        lambda logits: (0 * logits).sum(),
        (torch.randn(2, 3),),
        "zero",
        gradients=True,
    )


def released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names as the authors have them: the inverse of `from_official`."""
    return {
        name.replace("backbone.", "pretrained.").replace("auxlayer.", "auxlayer.conv5."): value
        for name, value in state.items()
    }


def all_outputs(network: model.EncNet, x: Tensor) -> dict[str, Tensor]:
    """Logits, presence and auxiliary logits, with running statistics."""
    network.training = True  # of the network itself: its layers stay in eval
    output = network(x)
    network.training = False
    return {key: (y if key == "presence" else y[:, :, ::5, ::5]).detach() for key, y in output.items()}


def training_step(network: model.EncNet) -> dict[str, Tensor]:
    network.double().train().zero_grad()
    output = network(pictures().double())
    losses = [F.cross_entropy(output[key], golden.masks(), ignore_index=255) for key in ("out", "aux")]
    losses.append(model.semantic_encoding_loss(output["presence"], golden.masks()))
    (losses[0] + 0.2 * losses[1] + 0.2 * losses[2]).backward()
    found = {"losses": torch.stack(losses).detach()}
    gradients = {key.removesuffix(".weight"): p.grad for key, p in network.named_parameters()}
    for which in golden.WATCHED:
        gradient = gradients[f"backbone.{which}" if which.startswith("layer") else which]
        found[which] = gradient.flatten()[:: max(1, gradient.numel() // 40)]
    return found


class Slow(nn.Module):
    """Eq. 1 as loops, with the parameters of a layer."""

    def __init__(self, layer: model.Encoding) -> None:
        super().__init__()
        self.codewords, self.scale = layer.codewords, layer.scale

    def forward(self, x: Tensor) -> Tensor:
        count = len(self.scale)
        images = []
        for image in x:
            sums = [x.new_zeros(x.shape[1]) for _ in range(count)]
            for pixel in image.flatten(1).T:
                residuals = [pixel - self.codewords[k] for k in range(count)]
                raw = [torch.exp(self.scale[k] * residuals[k].square().sum()) for k in range(count)]
                sums = [sums[k] + raw[k] / sum(raw) * residuals[k] for k in range(count)]
            images.append(torch.stack(sums))
        return torch.stack(images)


def gated(part: model.ContextEncoding, x: Tensor) -> tuple[Tensor, Tensor]:
    convolution, norm, _, layer, words_norm, _ = part.encoding
    h = convolution(x)
    h = (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), keepdim=True, correction=0) + norm.eps).sqrt()
    h = (h * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    residuals = h.flatten(2).transpose(1, 2)[:, :, None] - layer.codewords
    weights = (layer.scale * residuals.square().sum(3)).softmax(2)
    e = (weights[..., None] * residuals).sum(1)
    e = (e - e.mean((0, 2), keepdim=True)) / (e.var((0, 2), keepdim=True, correction=0) + words_norm.eps).sqrt()
    e = (e * words_norm.weight[:, None] + words_norm.bias[:, None]).clamp(min=0)
    vector = e.sum(1) / len(layer.scale)
    gates = 1 / (1 + (-(vector @ part.fc[0].weight.T + part.fc[0].bias)).exp())
    presence = vector @ part.selayer.weight.T + part.selayer.bias
    return (x * (1 + gates[:, :, None, None])).clamp(min=0), presence


def presence_loss(logits: Tensor, masks: Tensor) -> Tensor:
    total, images = torch.zeros(()), 0
    for row, mask in zip(logits, masks, strict=True):
        if (mask == 255).all():
            continue
        images += 1
        for k in range(logits.shape[1]):
            p = torch.sigmoid(row[k])
            total = total - (p.log() if (mask == k).any() else (1 - p).log()) / logits.shape[1]
    return total / images


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: the encoding layer against the authors' formula for CPUs, with its tensor of all residuals."""

    class Theirs(model.Encoding):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).transpose(1, 2).contiguous()
            return golden.aggregate(golden.scaled_l2(x, self.codewords, self.scale).softmax(2), x, self.codewords)

    def maps(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 512, 60, 60),)

    against = "PyTorch-Encoding's formula: B x 3600 x 32 x 512 residuals"
    ours = lambda: model.Encoding(512, 32)  # noqa: E731
    return {"encoding": Pair(ours, lambda: Theirs(512, 32), maps, against, train_batch=2)}
