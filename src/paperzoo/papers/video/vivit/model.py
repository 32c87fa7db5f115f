"""ViViT: A Video Vision Transformer (Arnab et al., ICCV 2021, arXiv:2103.15691).

A clip is cut into tubelets of t x h x w pixels, each becomes a token by one linear map (sec. 3.2), and a vision transformer reads the tokens.
Four ways to attend over space and time (sec. 3.3), each a variant here:

- model 1, `vivit_b_16x2`: every token to every other;
- model 2, `…_factorised_encoder`: a transformer on each moment's tokens, then one over the moments;
- model 3, `…_factorised_attention`: every layer attends in space, then in time;
- model 4, `…_factorised_heads`: half of every layer's heads attend in space, the other half in time.

A tubelet of one frame is the paper's uniform frame sampling. `load_image_weights` starts from an image transformer (sec. 3.4).

Parameter names are those of `google/vivit-b-16x2-kinetics400`, which loads unchanged; `from_official` takes the names of `transformers` 5. As in
the authors' code, GELU is the one with tanh. Where the paper says that model 3's attention over time begins with all weights at zero, only its
last map does here: with all of them at zero no gradient would reach any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from paperzoo.papers.detection.yolos.model import Attention, Dense
from paperzoo.papers.detection.yolos.model import from_official as image_names

EPS = 1e-6
Grid = tuple[int, int]  # moments, places in each


class Layer(nn.Module):
    """Pre-norm transformer layer, model 1 (eq. 2 and 3): (B, N, width) -> (B, N, width)."""

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float, grid: Grid) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.intermediate, self.output = Dense(width, hidden), Dense(hidden, width)
        self.layernorm_before = nn.LayerNorm(width, eps=EPS)
        self.layernorm_after = nn.LayerNorm(width, eps=EPS)
        self.drop_path = StochasticDepth(drop_path, "row")
        self.grid = grid

    def attend(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.attention(self.layernorm_before(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        hidden = F.gelu(self.intermediate(self.layernorm_after(x)), approximate="tanh")
        return x + self.drop_path(self.output(hidden))


class FactorisedAttentionLayer(Layer):
    """Model 3 (eq. 4 to 6): attention among the tokens of a moment, then among those of a place."""

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float, grid: Grid) -> None:
        super().__init__(width, heads, hidden, drop_path, grid)
        self.temporal_attention = Attention(width, heads)
        self.layernorm_temporal = nn.LayerNorm(width, eps=EPS)

    def attend(self, x: Tensor) -> Tensor:
        moments, places = self.grid
        batch = x.shape[0]
        in_space = x.unflatten(1, (moments, places)).flatten(0, 1)
        in_space = self.attention(self.layernorm_before(in_space))
        x = x + self.drop_path(in_space.unflatten(0, (batch, moments)).flatten(1, 2))
        in_time = x.unflatten(1, (moments, places)).transpose(1, 2).flatten(0, 1)
        in_time = self.temporal_attention(self.layernorm_temporal(in_time))
        return x + self.drop_path(in_time.unflatten(0, (batch, places)).transpose(1, 2).flatten(1, 2))


class FactorisedHeads(Attention):
    """Model 4 (sec. 3.3): the first half of the heads attends in space, the second in time."""

    def __init__(self, width: int, heads: int, grid: Grid) -> None:
        super().__init__(width, heads)
        if heads % 2:
            raise ValueError(f"half of the heads attend in time: their number must be even, got {heads}")
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        maps = (self.attention.query, self.attention.key, self.attention.value)
        split = [m(x).unflatten(1, self.grid).unflatten(3, (self.heads, -1)) for m in maps]  # (B, T, S, heads, …)
        half = self.heads // 2
        in_space = [part[..., :half, :].transpose(2, 3) for part in split]  # (B, T, heads, S, …)
        in_time = [part[..., half:, :].permute(0, 2, 3, 1, 4) for part in split]  # (B, S, heads, T, …)
        space = F.scaled_dot_product_attention(*in_space).transpose(2, 3)
        time = F.scaled_dot_product_attention(*in_time).permute(0, 3, 1, 2, 4)
        return self.output(torch.cat([space, time], 3).flatten(3).flatten(1, 2))


class FactorisedHeadsLayer(Layer):
    def __init__(self, width: int, heads: int, hidden: int, drop_path: float, grid: Grid) -> None:
        super().__init__(width, heads, hidden, drop_path, grid)
        self.attention = FactorisedHeads(width, heads, grid)


LAYERS = {"joint": Layer, "factorised_attention": FactorisedAttentionLayer, "factorised_heads": FactorisedHeadsLayer}


class Tubelets(nn.Module):
    """Clips -> tokens (B, moments, places, width), by one linear map of each tubelet."""

    def __init__(self, in_channels: int, width: int, tubelet: tuple[int, int, int]) -> None:
        super().__init__()
        self.projection = nn.Conv3d(in_channels, width, tubelet, tubelet)

    def forward(self, clips: Tensor) -> Tensor:
        return self.projection(clips).flatten(3).permute(0, 2, 3, 1)


class Embeddings(nn.Module):
    """A class token in front, where there is one, and a learned position for each token."""

    def __init__(self, width: int, tokens: int, class_token: bool = True) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, tokens + class_token, width))
        nn.init.trunc_normal_(self.position_embeddings, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return x + self.position_embeddings


class Encoder(nn.Module):
    """The layers under the name `layer`."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Transformer(nn.Module):
    """Tokens (B, N, width) -> one vector (B, width): the class token's, or the mean where there is none."""

    def __init__(
        self,
        kind: str,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        grid: Grid,
        drop_path_rate: float,
        patches: Tubelets | None = None,
    ) -> None:
        super().__init__()
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]  # grows linearly with depth
        self.embeddings = Embeddings(width, grid[0] * grid[1], kind == "joint")
        if patches is not None:
            self.embeddings.patch_embeddings = patches
        self.encoder = Encoder([LAYERS[kind](width, heads, hidden, rate, grid) for rate in rates])
        self.layernorm = nn.LayerNorm(width, eps=EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layernorm(self.encoder(self.embeddings(tokens)))
        return x.mean(1) if self.embeddings.cls_token is None else x[:, 0]


class ViViT(nn.Module):
    """Clips (B, in_channels, frames, image_size, image_size) -> logits (B, num_classes).

    Args:
        attention: which of the four models.
        width, depth, heads, hidden: of the transformer.
        temporal_depth: layers over the moments, of model 2.
        tubelet: frames, rows and columns of a tubelet.
        drop_path_rate: stochastic depth of the last layer, in training; it grows linearly from 0.

    Raises:
        ValueError: if tubelets do not fill the clip.
    """

    def __init__(
        self,
        attention: Literal["joint", "factorised_encoder", "factorised_attention", "factorised_heads"] = "joint",
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        temporal_depth: int = 4,
        tubelet: tuple[int, int, int] = (2, 16, 16),
        num_classes: int = 400,
        in_channels: int = 3,
        frames: int = 32,
        image_size: int = 224,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if frames % tubelet[0] or image_size % tubelet[1] or image_size % tubelet[2]:
            raise ValueError(f"tubelets of {tubelet} do not fill a clip of {frames} frames of {image_size} pixels")
        self.grid = (frames // tubelet[0], (image_size // tubelet[1]) * (image_size // tubelet[2]))
        self.num_features, self.attention_kind = width, attention
        sizes = (width, depth, heads, hidden)
        patches = Tubelets(in_channels, width, tubelet)
        factorised = attention == "factorised_encoder"
        kind, grid = ("joint", (1, self.grid[1])) if factorised else (attention, self.grid)
        self.vivit = Transformer(kind, *sizes, grid, drop_path_rate, patches)
        self.temporal = None
        if factorised:
            self.temporal = Transformer(
                "joint", width, temporal_depth, heads, hidden, (self.grid[0], 1), drop_path_rate
            )
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = patches.projection
        nn.init.trunc_normal_(projection.weight, std=projection.weight[0].numel() ** -0.5)
        nn.init.zeros_(projection.bias)
        self.quiet_time()
        nn.init.zeros_(self.classifier.weight)

    def quiet_time(self) -> None:
        """Model 3's layers begin as those of an image transformer: attention in time adds nothing."""
        for module in self.modules():
            if isinstance(module, FactorisedAttentionLayer):
                nn.init.zeros_(module.temporal_attention.output.dense.weight)
                nn.init.zeros_(module.temporal_attention.output.dense.bias)

    def embed(self, clips: Tensor) -> Tensor:
        """What the classifier sees: (B, num_features)."""
        tokens = self.vivit.embeddings.patch_embeddings(clips)
        if self.temporal is None:
            return self.vivit(tokens.flatten(1, 2))
        batch, moments = tokens.shape[:2]
        return self.temporal(self.vivit(tokens.flatten(0, 1)).unflatten(0, (batch, moments)))

    def forward(self, clips: Tensor) -> Tensor:
        return self.classifier(self.embed(clips))

    def reset_classifier(self, num_classes: int) -> None:
        self.classifier = nn.Linear(self.num_features, num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @torch.no_grad()
    def load_image_weights(
        self, state: Mapping[str, Tensor], init: Literal["central_frame", "uniform"] = "central_frame"
    ) -> None:
        """Start from an image transformer with the same sizes (sec. 3.4): timm's names, or those of `transformers`' ViT.

        Positions are repeated for every moment; a patch's filter becomes a tubelet's by `inflated`. The classifier, model 2's layers over
        the moments and model 3's attention in time stay as they are.

        Raises:
            ValueError: if a weight is missing or has another shape.
        """
        timm = any(name.startswith("blocks.") for name in state)
        named = image_names({f"backbone.{k}": v for k, v in state.items()} if timm else dict(state))
        found = {k.replace("vit.", "vivit.", 1): v for k, v in named.items() if k.startswith("vit.")}
        own = {k: v for k, v in self.state_dict().items() if k.startswith("vivit.")}
        positions, filters = (
            "vivit.embeddings.position_embeddings",
            "vivit.embeddings.patch_embeddings.projection.weight",
        )
        for name, value in own.items():
            if "temporal" in name:
                continue
            if name not in found:
                raise ValueError(f"the image transformer's weights have no '{name}'")
            given = found[name]
            if name == filters:
                given = inflated(given, value.shape[2], init)
            elif name == positions:
                grid = given[:, 1:].repeat(1, self.vivit_moments(), 1)
                given = grid if self.vivit.embeddings.cls_token is None else torch.cat([given[:, :1], grid], 1)
            if given.shape != value.shape:
                raise ValueError(f"'{name}' is {tuple(given.shape)} there, {tuple(value.shape)} here")
            value.copy_(given)

    def vivit_moments(self) -> int:
        """Moments whose tokens the transformer on tubelets reads together."""
        return 1 if self.temporal is not None else self.grid[0]


def inflated(filters: Tensor, frames: int, init: Literal["central_frame", "uniform"]) -> Tensor:
    """Filters of patches (width, C, h, w) to filters of tubelets (width, C, frames, h, w) (eq. 8 and 9).

    "uniform" repeats and divides them, as I3D does; "central_frame" puts them at frame `frames // 2` and zeros elsewhere.
    """
    if init == "uniform":
        return filters[:, :, None].repeat(1, 1, frames, 1, 1) / frames
    out = filters.new_zeros(*filters.shape[:2], frames, *filters.shape[2:])
    out[:, :, frames // 2] = filters
    return out


RULES = (
    (r"^vivit\.layers\.", "vivit.encoder.layer."),
    (r"\.attention\.([qkv])_proj\.", lambda m: f".attention.attention.{dict(q='query', k='key', v='value')[m[1]]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of `transformers` 5's `VivitForVideoClassification` in ours, which are those of the published files."""
    converted = {}
    for name, value in state.items():
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        converted[name] = value
    return converted


def read_official(path: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """A file of an image transformer (its filters have no time) makes the whole state by `load_image_weights`; None for others."""
    from paperzoo.engine.weights import read_state

    state = read_state(path)
    filters = [
        v for k, v in state.items() if k.endswith(("patch_embed.proj.weight", "patch_embeddings.projection.weight"))
    ]
    if not isinstance(model, ViViT) or not filters or filters[0].ndim != 4:
        return None
    model.load_image_weights(state)
    return model.state_dict()


BASE, LARGE = (768, 12, 12, 3072), (1024, 24, 16, 4096)


def vivit_b_16x2(
    num_classes: int = 400, in_channels: int = 3, frames: int = 32, image_size: int = 224, drop_path_rate: float = 0.0
) -> ViViT:
    """Model 1, base size, tubelets of 2 x 16 x 16: 3,136 tokens and the class token."""
    return ViViT("joint", *BASE, 4, (2, 16, 16), num_classes, in_channels, frames, image_size, drop_path_rate)


def vivit_b_16x2_factorised_encoder(
    num_classes: int = 400, in_channels: int = 3, frames: int = 32, image_size: int = 224, drop_path_rate: float = 0.0
) -> ViViT:
    """Model 2, base size, four layers over the moments."""
    return ViViT(
        "factorised_encoder", *BASE, 4, (2, 16, 16), num_classes, in_channels, frames, image_size, drop_path_rate
    )


def vivit_b_16x2_factorised_attention(
    num_classes: int = 400, in_channels: int = 3, frames: int = 32, image_size: int = 224, drop_path_rate: float = 0.0
) -> ViViT:
    """Model 3, base size; no class token."""
    return ViViT(
        "factorised_attention", *BASE, 4, (2, 16, 16), num_classes, in_channels, frames, image_size, drop_path_rate
    )


def vivit_b_16x2_factorised_heads(
    num_classes: int = 400, in_channels: int = 3, frames: int = 32, image_size: int = 224, drop_path_rate: float = 0.0
) -> ViViT:
    """Model 4, base size; no class token."""
    return ViViT(
        "factorised_heads", *BASE, 4, (2, 16, 16), num_classes, in_channels, frames, image_size, drop_path_rate
    )


def vivit_l_16x2_factorised_encoder(
    num_classes: int = 400, in_channels: int = 3, frames: int = 32, image_size: int = 224, drop_path_rate: float = 0.0
) -> ViViT:
    """Model 2, large size: the network of the smaller data sets' results."""
    return ViViT(
        "factorised_encoder", *LARGE, 4, (2, 16, 16), num_classes, in_channels, frames, image_size, drop_path_rate
    )


def vivit_slim(
    num_classes: int = 8, in_channels: int = 3, frames: int = 16, image_size: int = 24, drop_path_rate: float = 0.0
) -> ViViT:
    """Not of the paper: model 1 with 64 channels, 4 layers, tubelets of 4 x 8 x 8, for small pictures and learning in seconds."""
    return ViViT("joint", 64, 4, 4, 128, 4, (4, 8, 8), num_classes, in_channels, frames, image_size, drop_path_rate)
