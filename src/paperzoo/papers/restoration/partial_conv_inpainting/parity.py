"""Parity of partial convolutions: the authors' layer and a port's network (stored outputs), the released layers written out, the losses term by term."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.restoration.partial_conv_inpainting import golden, model, technique

LAYER = "github NVIDIA/partialconv, stored outputs"
PORT = "github naoto0804/pytorch-inpainting-with-partial-conv, stored outputs"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    stored = load_file(str(golden.FILE))
    for i, shape in enumerate(golden.SHAPES):
        yield Case(
            f"the authors' layer {shape}",
            lambda shape=shape: layer(shape),
            lambda i=i: (stored[f"layer{i}.out"], stored[f"layer{i}.mask"]),
            against=LAYER,
            note="theirs convolves a mask of every channel with ones",
        )
    network = model.PartialConvUNet(model.ENCODER[: golden.LAYERS]).eval()
    network.load_state_dict(model.from_official(golden.weights(port_state(network))))
    yield Case(
        "the port: two pictures with large holes",
        lambda: network(golden.pictures(), golden.holes())[:, :, ::2, ::2].detach(),
        lambda: stored["answer"],
        against=PORT,
        note="names and scale converted",
    )
    yield Case(
        "the port: loss and gradients",
        lambda: training_step(network),
        lambda: {name: stored[name] for name in ("loss", *golden.WATCHED)},
        against=PORT,
        rtol=1e-6,
        atol=1e-9,
        note="in double precision; 50 values each of six gradients",
    )
    for size, train in (((2, 3, 32, 48), False), ((1, 3, 29, 37), False), ((2, 3, 31, 18), True)):
        rng = torch.Generator().manual_seed(size[2])
        net = lively(model.PartialConvUNet(((6, 7), (8, 5), (10, 3)))).double().train(train)
        masks = F.interpolate(torch.rand(size[0], 1, 4, 5, generator=rng), size[2:]) < 0.6
        yield Case(
            f"masks of every channel, {'train' if train else 'eval'} {size}",
            net,
            WrittenOut(net),
            (torch.rand(size, dtype=torch.float64, generator=rng), masks),
            "the released layers written out",
            gradients=True,
        )
    yield from losses()


def losses() -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    out, images = torch.rand(2, 2, 3, 5, 6, dtype=torch.float64, generator=rng)
    masks = (torch.rand(2, 1, 5, 6, generator=rng) < 0.6).double()
    composite = images * masks + out * (1 - masks)
    yield Case(
        "losses of the hole and the rest",
        lambda: technique.hole_losses(out, images, masks),
        lambda: (
            sum(abs(o - i) for o, i, m in values(out, images, masks) if not m) / out.numel(),
            sum(abs(o - i) for o, i, m in values(out, images, masks) if m) / out.numel(),
        ),
        against="sec. 3.3, value by value",
    )
    yield Case(
        "the seam, pixel by pixel",
        lambda: technique.seam_loss(composite, masks),
        lambda: slow_seam(composite, masks),
        against="eq. 6",
    )
    maps = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=rng)
    yield Case(
        "Gram matrices",
        lambda: technique.gram(maps),
        lambda: torch.einsum("bchw,bdhw->bcd", maps, maps) / (4 * 3 * 5),
        against="eq. 4",
    )
    yield from features()


def features() -> Iterator[Case]:
    """VGG-16's maps, from a file with torchvision's names, and eq. 3 to 5 on them."""
    import tempfile
    from pathlib import Path

    from safetensors.torch import save_file
    from torchvision.models import vgg16

    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = vgg16(weights=None).features[:17].eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vgg16.safetensors"
        save_file({f"features.{name}": value for name, value in theirs.state_dict().items()}, str(path))
        ours = technique.vgg_features(str(path), torch.device("cpu"))
    pictures = golden.pictures()[:, :, :32, :40]
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (technique.MEAN, technique.DEVIATION))

    def reference(images: Tensor) -> list[Tensor]:
        x = (images - mean) / deviation
        return [theirs[:5](x), theirs[:10](x), theirs[:17](x)]

    yield Case("VGG-16's first three poolings", ours, reference, (pictures,), "torchvision vgg16 features", atol=1e-4)
    out, composite = pictures.flip(2), pictures.flip(3)
    yield Case(
        "perceptual and style losses",
        lambda: technique.feature_losses(ours, out, composite, pictures),
        lambda: slow_feature_losses(reference, out, composite, pictures),
        against="eq. 3 to 5 over torchvision's maps",
        atol=1e-4,
    )


# -- references ------------------------------------------------------------------------------------------------------


def layer(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    inputs, outputs, kernel, stride = shape
    ours = model.PartialConv2d(inputs, outputs, kernel, stride, kernel // 2)
    ours.load_state_dict(golden.layer_weights(shape))
    x, mask = golden.layer_inputs(inputs)
    with torch.no_grad():
        return ours(x * mask, mask.mean(1, keepdim=True))


def port_state(network: model.PartialConvUNet) -> dict[str, Tensor]:
    """Empty values with the port's names and shapes."""
    state = {}
    for name, value in network.state_dict().items():
        room, rest = name.split(".", 1)
        port = rest.replace(room[:3], f"{room[:3]}_", 1).replace("conv.", "conv.input_conv.")
        if port == "enc_1.conv.input_conv.bias":
            continue
        state[port] = value
        if port.endswith("input_conv.weight"):
            state[port.replace("input_conv", "mask_conv")] = value.new_ones(value.shape)
    return state


def training_step(network: model.PartialConvUNet) -> dict[str, Tensor]:
    """The squared error in training mode, and some of its gradients, by the port's names and in its scale."""
    network = network.double().train()
    loss = (network(golden.pictures().double(), golden.holes().double()) - golden.pictures()).square().mean()
    network.zero_grad()
    loss.backward()
    found = {"loss": loss.detach()}
    for name in golden.WATCHED:
        room = "encoder" if name.startswith("enc") else "decoder"
        part = network.get_submodule(f"{room}.{name.replace('_', '', 1).replace('conv.input_conv', 'conv')}")
        scale = part.weight[0].numel() if isinstance(part, nn.Conv2d) else 1
        found[name] = golden.sampled(part.weight.grad) / scale
    network.float().eval()
    network.load_state_dict(model.from_official(golden.weights(port_state(network))))
    return found


class WrittenOut(nn.Module):
    """The released layers as they are written: a mask for every channel, convolved with ones."""

    def __init__(self, net: model.PartialConvUNet) -> None:
        super().__init__()
        self.encoder, self.decoder, self.layers = net.encoder, net.decoder, net.layers

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        x, mask = images, masks.to(images.dtype).expand_as(images)
        kept = [(x, mask)]
        for i in range(1, self.layers + 1):
            kept.append(self.layer(getattr(self.encoder, f"enc{i}"), *kept[-1]))
        x, mask = kept.pop()
        for i in range(self.layers, 0, -1):
            skip, skip_mask = kept.pop()
            x = torch.cat([F.interpolate(x, skip.shape[-2:]), skip], 1)
            mask = torch.cat([F.interpolate(mask, skip.shape[-2:]), skip_mask], 1)
            x, mask = self.layer(getattr(self.decoder, f"dec{i}"), x, mask)
        return x

    @staticmethod
    def layer(block: model.MaskConvModule, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        conv = block.conv
        where = {"stride": conv.stride, "padding": conv.padding}
        with torch.no_grad():
            known = F.conv2d(mask, torch.ones_like(conv.weight), **where)
            factor = conv.weight[0].numel() / (known + 1e-8)
            known = known.clamp(0, 1)
            factor = factor * known
        out = F.conv2d(x * mask, conv.weight, conv.bias, **where)
        if conv.bias is None:
            out = out * factor
        else:
            bias = conv.bias[:, None, None]
            out = ((out - bias) * factor + bias) * known
        out = out if block.bn is None else block.bn(out)
        return out if block.activation is None else block.activation(out), known


def lively(net: nn.Module) -> nn.Module:
    """The network with values from a seed, so that every part of it matters."""
    rng = torch.Generator().manual_seed(5)
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=rng))
        elif value.is_floating_point():
            fan = value[0].numel() if value.ndim > 1 else 4
            value.copy_(torch.randn(value.shape, generator=rng) * fan**-0.5)
    return net


def values(out: Tensor, images: Tensor, masks: Tensor) -> list[tuple[float, float, float]]:
    three = (out, images, masks.expand_as(out))
    return list(zip(*(t.flatten().tolist() for t in three), strict=True))


def slow_seam(composite: Tensor, masks: Tensor) -> float:
    batch, channels, height, width = composite.shape
    total = 0.0
    for b in range(batch):
        region = {
            (y + dy, x + dx)
            for y in range(height)
            for x in range(width)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if not masks[b, 0, y, x]
        }
        for y, x in region:
            for beside in ((y + 1, x), (y, x + 1)):
                inside = 0 <= y < height and 0 <= x < width and beside[0] < height and beside[1] < width
                if beside in region and inside and min(beside) >= 0:
                    total += float((composite[b, :, y, x] - composite[b, :, beside[0], beside[1]]).abs().sum())
    return total / (batch * channels * height * width)


def slow_feature_losses(look, out: Tensor, composite: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    perceptual = style = 0.0
    for answer in (out, composite):
        for ours, theirs in zip(look(answer), look(images), strict=True):
            perceptual = perceptual + F.l1_loss(ours, theirs)
            size = ours[0].numel()
            grams = [torch.einsum("bchw,bdhw->bcd", m, m) / size for m in (ours, theirs)]
            style = style + F.l1_loss(*grams)
    return perceptual, style


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(0)
        masks = (F.interpolate(torch.rand(batch, 1, 8, 8, generator=rng), (256, 256)) < 0.7).float()
        return torch.rand(batch, 3, 256, 256, generator=rng) * masks, masks

    def reference() -> nn.Module:
        return WrittenOut(model.pconv_unet_256())

    against = "the released layers written out"
    return {"pconv_unet_256": Pair(model.pconv_unet_256, reference, inputs, against, train_batch=2)}
