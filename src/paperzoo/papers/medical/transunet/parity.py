"""TransUNet against what the authors' code answered (see golden.py), and its parts against timm."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.medical.transunet import golden
from paperzoo.papers.medical.transunet.model import (
    LAYER,
    StdConv2d,
    TransUNet,
    from_official,
    read_official,
    transunet,
    transunet_slim,
)
from paperzoo.papers.medical.transunet.recipe import dice_loss

SOURCE = "Beckschen/TransUNet 02ef001, stored"


def cases() -> Iterator[Case]:
    from safetensors.torch import load_file

    torch.manual_seed(0)
    stored = load_file(Path(__file__).with_name("golden.safetensors"))
    network, official = narrow(), official_names()
    network.load_state_dict(from_official(by_rule(official)))
    network.double()
    for mode in ("eval", "train"):
        wanted = {"logits": stored[f"{mode} logits"], "gradients": stored[f"{mode} gradients"]}
        yield Case(
            f"the network, {mode}: logits and gradients",
            lambda x, m=mode: answers(network, x, m, list(official)),
            lambda _, w=wanted: w,
            (golden.image(),),
            SOURCE,
        )
    yield Case(
        "names and sizes of the authors' checkpoints",
        lambda: written(official),
        lambda: stored["names"],
        (),
        SOURCE,
        atol=0,
    )
    yield Case(
        "ImageNet-21k weights of the encoder (.npz)",
        from_npz,
        lambda: stored["from the JAX file"],
        (),
        f"{SOURCE}: load_from",
    )
    logits, truth = (
        3 * golden.rule((2, 3, 6, 7), 8),
        (1.5 * golden.rule((2, 6, 7), 9).abs() * 2).floor().clamp(0, 2).long(),
    )
    yield Case(
        "the Dice loss",
        lambda: dice_loss(logits.softmax(1), truth)[None],
        lambda: stored["dice loss"],
        (),
        f"{SOURCE}: DiceLoss",
        atol=1e-6,
    )
    hidden = truth.clone()
    hidden[:, 0] = 255
    yield Case(
        "the Dice loss without what does not count",
        lambda x: dice_loss(x, hidden),
        lambda x: dice_loss(x[:, :, 1:], truth[:, 1:]),
        (logits.softmax(1),),
        "the rows left out",
        gradients=True,
    )
    yield timm_convolution()
    yield timm_encoder()
    small = transunet_slim(3, 1, 48).eval()
    nn.init.normal_(small.transformer.embeddings.position_embeddings, std=0.5)
    yield Case(
        "odd sizes: zeros added and cut again",
        small,
        lambda x: small(torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, 11), (0, 5)))))[:, :, :37, :43],
        (torch.randn(2, 1, 37, 43),),
        "numpy.pad",
    )
    yield Case("positions for another size", *positions(small), "torch interpolate, bicubic, of the stored grid alone")
    yield repeated()


def narrow() -> TransUNet:
    g = golden
    return TransUNet(
        g.CLASSES, 1, g.SIZE, 64, (1, 1, 1), g.TOKENS, g.DEPTH, g.HEADS, g.HIDDEN, g.HEAD, g.WIDTHS, drop_rate=0.0
    )


def official_names() -> dict[str, Tensor]:
    """Our tensors under the authors' names."""
    back, found = {ours: theirs for theirs, ours in LAYER}, {}
    for name, value in narrow().state_dict().items():
        head, middle, tail = name, "", ""
        if name.startswith("transformer.encoder.layer."):
            head, number, rest = "transformer.encoder.layer.", name.split(".")[3], ".".join(name.split(".")[4:])
            middle, _, tail = rest.rpartition(".")
            name = f"{head}{number}.{back[middle]}.{tail}"
        found[name] = value
    return dict(sorted(found.items()))


def by_rule(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters as golden.py fills them; running statistics as they are."""
    return {
        k: p if "running" in k or not p.is_floating_point() else golden.value(k, tuple(p.shape)).float()
        for k, p in official.items()
    }


def written(official: dict[str, Tensor]) -> Tensor:
    text = " ".join(f"{k}:{'x'.join(map(str, v.shape))}" for k, v in official.items())
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def answers(network: TransUNet, x: Tensor, mode: str, names: list[str]) -> dict[str, Tensor]:
    network.train(mode == "train")
    network.zero_grad()
    kept = {k: v.clone() for k, v in network.state_dict().items()}
    out = network(x.detach())
    out.square().mean().backward()
    own = {theirs: p for theirs, p in zip(names, ordered(network, names), strict=True) if p is not None}
    gradients = torch.stack([own[name].grad.norm() for name in sorted(own)])
    network.load_state_dict(kept)  # running statistics as before
    return {"logits": out.detach().flatten()[::5], "gradients": gradients}


def ordered(network: TransUNet, names: list[str]) -> list[nn.Parameter | None]:
    """The parameters in the order of the authors' names; None for buffers."""
    own = dict(network.named_parameters())
    marks = {k: torch.tensor(float(i)) for i, k in enumerate(names)}
    renamed = {int(v): ours for ours, v in from_official(marks).items()}
    return [own.get(renamed[i]) for i in range(len(names))]


def from_npz() -> Tensor:
    network = narrow()
    network.load_state_dict(from_official(by_rule(official_names())))
    network = network.double()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "R50+ViT-B_16.npz"
        np.savez(path, **{k: v.numpy() for k, v in golden.arrays().items()})
        network.load_state_dict(read_official(path, network))
    with torch.no_grad():
        return network.eval()(golden.image()).flatten()[::5]


def timm_convolution() -> Case:
    import timm
    from timm.layers import StdConv2d as Theirs

    theirs, ours = Theirs(6, 8, 3, stride=2, padding=1, bias=False, eps=1e-5), StdConv2d(6, 8, 3, 2, 1, bias=False)
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.double(), theirs.double()
    return Case(
        "standardised convolution",
        ours,
        theirs,
        (torch.randn(2, 6, 9, 11, dtype=torch.float64),),
        f"timm {timm.__version__} StdConv2d",
        gradients=True,
    )


def timm_encoder() -> Case:
    """The transformer's layers against timm's, whose queries, keys and values are one map."""
    import timm
    from timm.models.vision_transformer import Block as Theirs

    ours = narrow().transformer.encoder.layer[0].eval()
    theirs = Theirs(
        golden.TOKENS,
        golden.HEADS,
        golden.HIDDEN / golden.TOKENS,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()
    own = ours.state_dict()
    state = {}
    for kind in ("weight", "bias"):
        state[f"attn.qkv.{kind}"] = torch.cat(
            [own[f"attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
        )
        for a, b in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
        ):
            state[f"{a}.{kind}"] = own[f"{b}.{kind}"]
    theirs.load_state_dict(state)
    return Case(
        "a layer of the transformer",
        ours,
        theirs,
        (torch.randn(2, 7, golden.TOKENS),),
        f"timm {timm.__version__} vision_transformer.Block",
    )


def positions(network: TransUNet) -> tuple:
    embeddings = network.transformer.embeddings

    def by_hand(x: Tensor) -> Tensor:
        coarse, _ = embeddings.hybrid_model(x)
        tokens = embeddings.patch_embeddings(coarse).flatten(2).transpose(1, 2)
        stored = embeddings.position_embeddings[0].t().view(1, -1, 3, 3)
        return tokens + F.interpolate(stored, size=(4, 2), mode="bicubic", align_corners=False).flatten(2).transpose(
            1, 2
        )

    return lambda x: embeddings(x)[0], by_hand, (torch.randn(2, 3, 64, 32),)


def repeated() -> Case:
    one, three = transunet_slim(2, 1, 48).eval(), transunet_slim(2, 3, 48).eval()
    three.load_state_dict(one.state_dict())
    return Case(
        "a single channel is repeated three times",
        one,
        lambda x: three(torch.cat([x, x, x], 1)),
        (torch.randn(2, 1, 48, 32),),
        "the same network for three channels",
    )


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: the encoder's layers dominate; timm's hybrid of the same parts is the peer, without a decoder."""
    import timm

    def images(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 224, 224),)

    def reference() -> nn.Module:
        return timm.create_model("vit_base_r50_s16_224", num_classes=0, global_pool="")

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = transunet(2, 3).transformer

        def forward(self, x: Tensor) -> Tensor:
            return self.net.encoder(self.net.embeddings(x)[0])

    return {
        "transunet": Pair(
            Encoder, reference, images, f"timm:vit_base_r50_s16_224 {timm.__version__}, the encoder", train_batch=1
        )
    }
