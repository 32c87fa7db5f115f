"""CvT against transformers', and its attention against the equations one pair of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.cvt import model as cvt

SIZES = {
    "cvt_13": {},
    "cvt_21": {"depth": [1, 4, 16]},
    "cvt_w24": {"embed_dim": [192, 768, 1024], "num_heads": [3, 12, 16], "depth": [2, 2, 20]},
}


def cases() -> Iterator[Case]:
    import transformers

    peer = f"transformers {transformers.__version__} CvtForImageClassification"
    torch.manual_seed(0)
    for name, height, width in (("cvt_13", 224, 224), ("cvt_13", 97, 130), ("cvt_21", 64, 64)):
        ours, reference = both(name, activation="gelu")
        x = torch.randn(2 if height < 224 else 1, 3, height, width)
        yield Case(f"{name} eval {height}x{width}", ours.eval(), reference.eval(), (x,), peer)

    # The released weights were learned with the sigmoid approximation of the GELU, which transformers leaves out.
    ours, reference = both("cvt_13", num_labels=5)
    for module in reference.modules():
        if isinstance(module, nn.GELU):
            module.forward = lambda x: x / (1 + torch.exp(-1.702 * x))
    x = torch.randn(2, 3, 64, 80)
    yield Case("approximate GELU", ours.eval(), reference.eval(), (x,), f"{peer}, its GELU replaced")
    yield Case("stages", ours.stages, lambda x: list(reference(x, output_hidden_states=True)), (x,),
               f"{peer}, its GELU replaced, hidden states")  # fmt: skip
    narrow = {
        "embed_dim": [64, 384, 512],
        "num_heads": [1, 6, 8],
        "depth": [2, 2, 3],
    }  # the wide network's kind, narrower
    ours, reference = both("cvt_w24", activation="gelu", num_channels=1, drop_path_rate=[0.0] * 3, **narrow)
    x = torch.randn(3, 1, 48, 33)
    named = Renamed(reference)
    yield Case("training, one channel", lambda x: learned(ours.train(), x), lambda x: learned(named.train(), x), (x,),
               peer, gradients=True)  # fmt: skip

    for extra in (0, 1):
        part = settled(cvt.Attention(12, 3)).double().eval()
        tokens = torch.randn(2, 5 * 4 + extra, 12, dtype=torch.float64)
        yield Case(f"attention, {extra} class tokens", lambda x, p=part: p(x, 5, 4), lambda x, p=part: slow(p, x, 5, 4), (tokens,),
                   "one pair of tokens at a time", gradients=True)  # fmt: skip


def both(name: str, activation: str = "quick_gelu", **config) -> tuple[cvt.CvT, nn.Module]:
    """Ours and transformers' with the same weights; `config` in transformers' words."""
    from transformers import CvtConfig, CvtForImageClassification

    config = {"num_labels": 1000, **SIZES[name], **config}
    reference = settled(CvtForImageClassification(CvtConfig(**config)))
    reference.config.return_dict = False
    ours = getattr(cvt, name)(
        activation=activation,
        num_classes=config["num_labels"],
        in_channels=config.get("num_channels", 3),
        drop_path_rate=0.0,
        **{k: config[k] for k in ("embed_dim", "num_heads", "depth") if k in config},
    )
    ours.load_state_dict(cvt.from_official(reference.state_dict()))
    return ours, Logits(reference)


class Logits(nn.Module):
    """transformers' network, called as ours: the logits, or the hidden states when asked for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, output_hidden_states: bool = False):
        found = self.network(x, output_hidden_states=output_hidden_states)
        return found[1] if output_hidden_states else found[0]


class Renamed(nn.Module):
    """A reference whose parameters go by our names."""

    def __init__(self, wrapped: Logits) -> None:
        super().__init__()
        self.wrapped = wrapped

    def named_parameters(self, *args, **options):
        for name, p in self.wrapped.network.named_parameters():
            yield next(iter(cvt.from_official({name: p}))), p

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x)


def learned(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The logits in training mode, and the loss's gradient for every parameter by our name."""
    logits = network(x)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(x)))
    names, parameters = zip(*network.named_parameters(), strict=True)
    return {"logits": logits} | dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def settled(network: nn.Module) -> nn.Module:
    """Norms as after some training, so that a mix-up of any of them shows."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


def slow(part: cvt.Attention, x: Tensor, height: int, width: int) -> Tensor:
    """Convolutions, projections and attention, place by place and head by head."""
    extra = x.shape[1] - height * width
    dim, head = x.shape[-1], x.shape[-1] // part.num_heads

    def projected(convolution: cvt.ConvProjection, linear: nn.Linear, image: Tensor, stride: int) -> list[Tensor]:
        bn, kernel = convolution.bn, convolution.conv.weight[:, 0]
        tokens = [image[i] for i in range(extra)]
        for row in range(0, height, stride):
            for column in range(0, width, stride):
                total = x.new_zeros(dim)
                for i in range(3):
                    for j in range(3):
                        a, b = row + i - 1, column + j - 1
                        if 0 <= a < height and 0 <= b < width:
                            total = total + kernel[:, i, j] * image[extra + a * width + b]
                tokens.append((total - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias)
        return [linear.weight @ t + linear.bias for t in tokens]

    images = []
    for image in x:
        q = projected(part.conv_proj_q, part.proj_q, image, 1)
        k = projected(part.conv_proj_k, part.proj_k, image, 2)
        v = projected(part.conv_proj_v, part.proj_v, image, 2)
        rows = []
        for query in q:
            mixed = []
            for n in range(part.num_heads):
                at = slice(n * head, (n + 1) * head)
                weights = torch.stack([query[at] @ key[at] / dim**0.5 for key in k]).softmax(0)
                mixed.append(sum(weight * value[at] for weight, value in zip(weights, v, strict=True)))
            rows.append(part.proj.weight @ torch.cat(mixed) + part.proj.bias)
        images.append(torch.stack(rows))
    return torch.stack(images)


def images(batch: int) -> tuple[Tensor]:
    return (torch.randn(batch, 3, 224, 224),)


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures."""

    def peer() -> nn.Module:
        from transformers import CvtConfig, CvtForImageClassification

        return CvtForImageClassification(CvtConfig(num_labels=1000, drop_path_rate=[0.0, 0.0, 0.0], return_dict=False))

    ours = lambda: cvt.cvt_13(drop_path_rate=0.0, activation="gelu")  # noqa: E731
    return {"cvt_13": Pair(ours, peer, images, "transformers:CvtForImageClassification", train_batch=2)}
