"""ViViT against `transformers` (model 1), its factorised layers as masked joint attention, an image transformer of timm, stated sizes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.video.vivit.model import (
    FactorisedAttentionLayer,
    FactorisedHeads,
    ViViT,
    from_official,
    inflated,
    vivit_b_16x2,
    vivit_b_16x2_factorised_attention,
    vivit_b_16x2_factorised_encoder,
    vivit_b_16x2_factorised_heads,
)


def cases() -> Iterator[Case]:
    import transformers

    torch.manual_seed(0)
    source = f"transformers {transformers.__version__} VivitForVideoClassification"
    for frames, size, tubelet, batch, train in (
        (8, 32, (2, 16, 16), 3, False),
        (9, 24, (3, 8, 8), 2, True),
        (16, 48, (4, 16, 16), 1, False),
    ):
        theirs = reference(frames, size, tubelet).double().train(train)
        ours = ViViT("joint", 24, 3, 4, 40, 0, tubelet, 7, 3, frames, size).double().train(train)
        ours.load_state_dict(from_official(theirs.network.state_dict()))
        names = {our_name(n): n for n, _ in theirs.network.named_parameters()}
        yield Case(
            f"model 1, {batch} x {frames} frames of {size} pixels, tubelets of {tubelet}: logits and all gradients",
            lambda x, net=ours, names=names: gradients_of(net, net, x, {n: n for n in names}),
            lambda x, net=theirs, names=names: gradients_of(net, net.network, x, names),
            (torch.randn(batch, 3, frames, size, size, dtype=torch.float64),),
            source,
        )
    moments, places, width = 5, 6, 16
    tokens = torch.randn(2, moments * places, width, dtype=torch.float64)
    heads = livelier(FactorisedHeads(width, 4, (moments, places)).double())
    yield Case(
        "model 4's attention",
        heads,
        lambda x: masked_heads(heads, x),
        (tokens,),
        "sec. 3.3: joint attention in which half of the heads may look at the same moment alone, the others at the same place",
    )
    layer = livelier(FactorisedAttentionLayer(width, 4, 20, 0.0, (moments, places)).double())
    yield Case(
        "model 3's layer",
        layer,
        lambda x: masked_layer(layer, x),
        (tokens,),
        "eq. 4 to 6: joint attention under two masks, one after the other",
    )
    encoder = livelier(ViViT("factorised_encoder", 16, 2, 4, 20, 2, (2, 8, 8), 5, 3, 6, 16).double()).eval()
    clips = torch.randn(2, 3, 6, 16, 16, dtype=torch.float64)
    yield Case(
        "model 2",
        encoder,
        lambda x: moment_by_moment(encoder, x),
        (clips,),
        "fig. 5: a loop over moments, then one transformer over what came out",
    )
    for function, millions in (
        (vivit_b_16x2, 88.9),
        (vivit_b_16x2_factorised_encoder, 115.1),
        (vivit_b_16x2_factorised_attention, 117.3),
        (vivit_b_16x2_factorised_heads, 88.9),
    ):
        with torch.device("meta"):
            network = function()
        count = sum(p.numel() for p in network.parameters())
        yield Case(
            f"parameters of {function.__name__}, millions",
            lambda n=count: round(n / 1e6),
            lambda m=millions: round(m),
            (),
            "table 2 of the paper",
        )
    yield from from_images()


def from_images() -> Iterator[Case]:
    """Weights of timm's image transformer: a still clip, or the clip's middle frames, give the image's class token."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    source = f"timm {timm.__version__} VisionTransformer"
    torch.manual_seed(1)
    act = functools.partial(nn.GELU, approximate="tanh")
    image = VisionTransformer(32, 8, embed_dim=24, depth=2, num_heads=4, mlp_ratio=2, num_classes=0, act_layer=act)
    image = livelier(image.double()).eval()
    picture = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for init in ("uniform", "central_frame"):
        clip = picture[:, :, None].repeat(1, 1, 4, 1, 1)
        if init == "central_frame":
            clip[:, :, [0, 1, 3]] = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)
        net = ViViT("joint", 24, 2, 4, 48, 0, (4, 8, 8), 5, 3, 4, 32).double().eval()
        net.load_image_weights(image.state_dict(), init)
        yield Case(
            f"one moment, filters started by '{init}'",
            net.embed,
            lambda _: image(picture),
            (clip,),
            f"{source}: eq. 8 and 9, one tubelet in time sees the image",
        )
    twice = picture[:, :, None].repeat(1, 1, 4, 1, 1)
    net = ViViT("factorised_encoder", 24, 2, 4, 48, 1, (2, 8, 8), 5, 3, 4, 32).double().eval()
    net.load_image_weights(image.state_dict())
    tokens = net.vivit.embeddings.patch_embeddings(twice)
    yield Case("model 2's moments", lambda: net.vivit(tokens[:, 1]), lambda: image(picture), (), source)
    weight = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    frames = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    yield Case(
        "a filter for three frames",
        lambda: [
            F.conv3d(frames[:, :, None].expand(-1, -1, 3, -1, -1), inflated(weight, 3, i)).flatten()
            for i in ("uniform", "central_frame")
        ],
        lambda: [F.conv2d(frames, weight).flatten()] * 2,
        (),
        "eq. 8 and 9",
    )


class Reference(nn.Module):
    """transformers' network, called with (B, C, T, H, W)."""

    def __init__(self, config: object) -> None:
        from transformers import VivitForVideoClassification

        super().__init__()
        self.network = VivitForVideoClassification(config)

    def forward(self, clips: Tensor) -> Tensor:
        return self.network(pixel_values=clips.transpose(1, 2)).logits


def reference(frames: int, size: int, tubelet: tuple[int, int, int]) -> Reference:
    from transformers import VivitConfig

    config = VivitConfig(
        image_size=size,
        num_frames=frames,
        tubelet_size=list(tubelet),
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        num_labels=7,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return livelier(Reference(config))


@torch.no_grad()
def livelier(network: nn.Module) -> nn.Module:
    """No parameter at its start, so that leaving one out shows."""
    for parameter in network.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def our_name(name: str) -> str:
    return next(iter(from_official({name: torch.zeros(1)})))


def gradients_of(call: nn.Module, owner: nn.Module, x: Tensor, names: dict[str, str]) -> dict[str, Tensor]:
    """Logits, and the gradients of their mean square, by our names."""
    x = x.clone().requires_grad_(True)
    logits, own = call(x), dict(owner.named_parameters())
    found = torch.autograd.grad(logits.square().mean(), [x, *(own[n] for n in names.values())])
    return {"logits": logits, "input": found[0], **dict(zip(names, found[1:], strict=True))}


def joint(attention: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Attention among all tokens of which those of `mask` count; softmax written out."""
    parts = attention.attention
    q, k, v = (m(x).unflatten(2, (attention.heads, -1)).transpose(1, 2) for m in (parts.query, parts.key, parts.value))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(3)
    return attention.output((weights @ v).transpose(1, 2).flatten(2))


def same(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which pairs of tokens are of one moment, and which of one place: bool (N, N) each."""
    number = torch.arange(grid[0] * grid[1])
    moment, place = number // grid[1], number % grid[1]
    return moment[:, None] == moment, place[:, None] == place


def masked_heads(attention: FactorisedHeads, x: Tensor) -> Tensor:
    moment, place = same(attention.grid)
    half = attention.heads // 2
    return joint(attention, x, torch.stack([moment] * half + [place] * half))


def masked_layer(layer: FactorisedAttentionLayer, x: Tensor) -> Tensor:
    moment, place = same(layer.grid)
    x = x + joint(layer.attention, layer.layernorm_before(x), moment)
    x = x + joint(layer.temporal_attention, layer.layernorm_temporal(x), place)
    hidden = layer.intermediate(layer.layernorm_after(x))
    inner = hidden * (2 / torch.pi) ** 0.5 * (1 + 0.044715 * hidden**2)
    return x + layer.output(0.5 * hidden * (1 + inner.tanh()))


def moment_by_moment(net: ViViT, clips: Tensor) -> Tensor:
    vectors = []
    for t in range(3):
        part = clips[:, :, 2 * t : 2 * t + 2]
        weight, bias = (
            net.vivit.embeddings.patch_embeddings.projection.weight,
            net.vivit.embeddings.patch_embeddings.projection.bias,
        )
        cut = part.unfold(3, 8, 8).unfold(4, 8, 8)  # (B, C, 2, 2, 2, 8, 8)
        tokens = torch.einsum("bctijhw,octhw->bijo", cut, weight).flatten(1, 2) + bias
        vectors.append(net.vivit(tokens))
    return net.classifier(net.temporal(torch.stack(vectors, 1)))


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""
    import transformers
    from transformers import VivitConfig

    def clips(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3, 8, 112, 112),)

    def theirs() -> Reference:
        return Reference(VivitConfig(image_size=112, num_frames=8, num_labels=400))

    def ours() -> ViViT:
        return vivit_b_16x2(frames=8, image_size=112)

    return {
        "vivit_b_16x2": Pair(
            ours, theirs, clips, f"transformers:VivitForVideoClassification {transformers.__version__}", train_batch=1
        )
    }
