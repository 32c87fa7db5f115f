"""YOLOS: You Only Look at One Sequence (Fang et al., NeurIPS 2021, arXiv:2106.00666).

A plain vision transformer reads the patches of an image and a hundred learned detection tokens as one sequence (sec. 3.1); each of
these tokens ends as one prediction, a class or nothing, and a box.

Parameter names are those of the published checkpoints (`hustvl/yolos-tiny` and so on), which load unchanged; `from_official` converts
the authors' own files and the newer name of one parameter in `transformers`. What differs from the paper:

- It says that detection tokens take the place of the class token. The released code and all weights keep the class token, in front;
  nothing is read from it.
- Boxes are parts of the batch's canvas, padding included, because that is what the network sees. The released code divides by an
  image's own size; with one image, or images of one size, there is no difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.boxes import clip_boxes, join_boxes
from paperzoo.papers.detection.yolos.technique import SetLoss, corners

# -- the encoder: a vision transformer (Dosovitskiy et al.), with its parameter names in the published checkpoints ------


class Projections(nn.Module):
    """Queries, keys and values of every head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))


class Dense(nn.Module):
    """A linear map under the name `dense`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} must be a multiple of heads {heads}")
        self.heads = heads
        self.attention = Projections(width)
        self.output = Dense(width, width)

    def forward(self, x: Tensor) -> Tensor:
        maps = (self.attention.query, self.attention.key, self.attention.value)
        q, k, v = (linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for linear in maps)
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.intermediate, self.output = Dense(width, hidden), Dense(hidden, width)
        self.layernorm_before = nn.LayerNorm(width, eps=norm_eps)
        self.layernorm_after = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(F.gelu(self.intermediate(self.layernorm_after(x))))


class Patches(nn.Module):
    """Images -> (B, rows * columns, width), one vector a patch; what is left over at the right and lower edge is not seen."""

    def __init__(self, in_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images).flatten(2).transpose(1, 2)


class Embeddings(nn.Module):
    """The sequence: class token, patches, detection tokens; with a learned position each (sec. 3.1)."""

    def __init__(self, in_channels: int, width: int, patch: int, grid: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.grid, self.tokens = grid, tokens
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.detection_tokens = nn.Parameter(torch.zeros(1, tokens, width))
        self.patch_embeddings = Patches(in_channels, width, patch)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1] + tokens, width))

    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        batch = images.shape[0]  # not len(), which would fix the batch of an exported graph
        tokens = (self.cls_token.expand(batch, -1, -1), self.detection_tokens.expand(batch, -1, -1))
        x = torch.cat([tokens[0], self.patch_embeddings(images), tokens[1]], dim=1)
        return x + interpolated(self.position_embeddings, self.grid, grid, self.tokens)


def interpolated(positions: Tensor, before: tuple[int, int], after: tuple[int, int], tokens: int) -> Tensor:
    """Positions (L, 1 + rows * columns + tokens, width) for another grid of patches, bicubically; those of tokens stay."""
    if before == after:
        return positions
    parts = positions[:, :1], positions[:, 1 : positions.shape[1] - tokens], positions[:, positions.shape[1] - tokens :]
    middle = parts[1].transpose(1, 2).unflatten(2, before)
    middle = F.interpolate(middle, size=after, mode="bicubic", align_corners=False)
    return torch.cat([parts[0], middle.flatten(2).transpose(1, 2), parts[2]], dim=1)


class Encoder(nn.Module):
    """The layers; with `positions`, learned positions are added again after each but the last (the paper's "PE type II")."""

    def __init__(self, layers: Sequence[Layer], positions: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)
        self.mid_position_embeddings = None if positions is None else nn.Parameter(positions)


class ViT(nn.Module):
    """Images (B, in_channels, H, W) -> the whole sequence, (B, 1 + patches + tokens, width)."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        patch: int,
        image_size: tuple[int, int],
        tokens: int,
        mid_positions: bool,
        in_channels: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.patch, self.width = patch, width
        grid = (image_size[0] // patch, image_size[1] // patch)
        self.embeddings = Embeddings(in_channels, width, patch, grid, tokens)
        length = self.embeddings.position_embeddings.shape[1]
        positions = torch.zeros(depth - 1, 1, length, width) if mid_positions else None
        self.encoder = Encoder([Layer(width, heads, hidden, norm_eps) for _ in range(depth)], positions)
        self.layernorm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        grid = (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        x = self.embeddings(images, grid)
        mid = self.encoder.mid_position_embeddings
        if mid is not None:
            mid = interpolated(mid[:, 0], self.embeddings.grid, grid, self.embeddings.tokens)
        for i, layer in enumerate(self.encoder.layer):
            x = layer(x)
            if mid is not None and i < len(mid):
                x = x + mid[i]
        return self.layernorm(x)


class Perceptron(nn.Module):
    """Three linear maps with ReLU between them."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, outputs)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](F.relu(self.layers[1](F.relu(self.layers[0](x)))))


# -- the detector ------------------------------------------------------------------------------------------------------


class YOLOS(nn.Module):
    """Normalised images (B, in_channels, H, W) -> class logits (B, tokens, num_classes + 1) and boxes (B, tokens, 4); or losses.

    Boxes are centre x, centre y, width, height in parts of the canvas; the last logit is "no object". The contract of a detector is
    in `tasks/detection.py`.

    Args:
        width, depth, heads, hidden: of the transformer.
        patch: side of a patch in pixels.
        image_size: height and width that the positions are stored for; they are interpolated for other sizes.
        tokens: how many detection tokens, the most objects that can be found.
        mid_positions: whether positions are added after each layer as well.
        score_threshold: detections below it are dropped.
        weight_std, token_std: how weights start, and tokens and positions; published sizes start from DeiT's.
    """

    def __init__(
        self,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        hidden: int = 768,
        patch: int = 16,
        image_size: tuple[int, int] = (800, 1333),
        tokens: int = 100,
        mid_positions: bool = False,
        num_classes: int = 91,
        in_channels: int = 3,
        norm_eps: float = 1e-6,
        score_threshold: float = 0.0,
        weight_std: float = 0.02,
        token_std: float = 0.02,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
        self.num_classes, self.score_threshold = num_classes, score_threshold
        self.vit = ViT(width, depth, heads, hidden, patch, image_size, tokens, mid_positions, in_channels, norm_eps)
        self.class_labels_classifier = Perceptron(width, num_classes + 1)
        self.bbox_predictor = Perceptron(width, 4)
        self.criterion = SetLoss(num_classes)
        for module in self.vit.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=weight_std)
                nn.init.zeros_(module.bias)
        embeddings = self.vit.embeddings
        positions = [embeddings.cls_token, embeddings.detection_tokens, embeddings.position_embeddings]
        if mid_positions:
            positions.append(self.vit.encoder.mid_position_embeddings)
        for parameter in positions:
            nn.init.trunc_normal_(parameter, std=token_std)

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        states = self.vit(images)[:, -self.vit.embeddings.tokens :]
        outputs = self.class_labels_classifier(states), self.bbox_predictor(states).sigmoid()
        return outputs if targets is None else self.loss(outputs, targets, tuple(images.shape[-2:]))

    def loss(
        self, outputs: tuple[Tensor, Tensor], targets: Sequence[dict[str, Tensor]], canvas: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Sec. 3.1: DETR's set prediction loss."""
        logits, predicted = (output.float() for output in outputs)
        boxes, owner = join_boxes(targets)
        labels = torch.cat([t["labels"] for t in targets])
        middle, extent = 0.5 * (boxes[:, :2] + boxes[:, 2:]), boxes[:, 2:] - boxes[:, :2]
        boxes = torch.cat([middle, extent], dim=1) / boxes.new_tensor([canvas[1], canvas[0]] * 2)
        return self.criterion(logits, predicted, boxes, labels, owner)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer for another number of classes."""
        layers = self.class_labels_classifier.layers
        layers[2] = nn.Linear(layers[2].in_features, num_classes + 1).to(layers[2].weight)
        self.num_classes = self.criterion.num_classes = num_classes

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Weights of a classifier, DeiT or ViT in timm's names (sec. 3.1): all but what detection adds; positions are interpolated.

        Raises:
            ValueError: if weights of the transformer are missing, or have another shape.
        """
        state = from_official({f"backbone.{name}": value for name, value in state_dict.items()})
        state = {name: value for name, value in state.items() if name.startswith("vit.")}
        wanted = self.vit.state_dict()
        embeddings = self.vit.embeddings
        positions = state.pop("vit.embeddings.position_embeddings", None)
        if positions is not None:
            tokens = embeddings.position_embeddings.detach()[:, -embeddings.tokens :].to(positions)
            # DeiT may be distilled: then it has a second token, which YOLOS leaves out
            side = int((positions.shape[1] - 1) ** 0.5)
            body = positions[:, positions.shape[1] - side * side :]
            old = torch.cat([positions[:, :1], body, tokens], dim=1)
            state["vit.embeddings.position_embeddings"] = interpolated(
                old, (side, side), embeddings.grid, embeddings.tokens
            )
        own = ("embeddings.detection_tokens", "encoder.mid_position_embeddings")
        loaded = {}
        for name, value in wanted.items():
            found = state.get(f"vit.{name}", value if name in own else None)
            if found is None or found.shape != value.shape:
                problem = "is missing" if found is None else f"has the shape {tuple(found.shape)}"
                raise ValueError(
                    f"{name} {problem}; weights of a vision transformer of width {self.vit.width} are needed"
                )
            loaded[name] = found
        self.vit.load_state_dict(loaded)

    @torch.no_grad()
    def postprocess(
        self, outputs: tuple[Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """Each token's most probable class; nothing is suppressed, as each object has one token.

        Args:
            outputs: of `forward`.
            sizes: (B, 2) height and width of each image inside the canvas.
            canvas: height and width of the batch's images.

        Returns:
            for each image boxes (N, 4) in pixels of the canvas, scores (N,), labels (N,); best first.
        """
        logits, predicted = (output.float() for output in outputs)
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        boxes = corners(predicted) * predicted.new_tensor([canvas[1], canvas[0]] * 2)
        boxes = clip_boxes(boxes, sizes)
        scores, order = scores.sort(dim=1, descending=True)
        result = []
        for b, s, k, o in zip(boxes, scores, labels, order, strict=True):
            kept = s > self.score_threshold
            result.append({"boxes": b[o][kept], "scores": s[kept], "labels": k[o][kept]})
        return result


# -- variants ----------------------------------------------------------------------------------------------------------


def yolos_tiny(num_classes: int = 91, **options) -> YOLOS:
    """YOLOS-Ti on DeiT-Ti, for 512 to 800 pixels. `options` as `YOLOS`."""
    return YOLOS(192, 12, 3, 768, num_classes=num_classes, **{"image_size": (800, 1333)} | options)


def yolos_small(num_classes: int = 91, **options) -> YOLOS:
    """YOLOS-S on DeiT-S. `options` as `YOLOS`."""
    defaults = {"image_size": (512, 864), "mid_positions": True}
    return YOLOS(384, 12, 6, 1536, num_classes=num_classes, **defaults | options)


def yolos_small_dwr(num_classes: int = 91, **options) -> YOLOS:
    """YOLOS-S (dWr): a little narrower and deeper, scaled from YOLOS-Ti as convolutional networks are (sec. 3.3). `options` as `YOLOS`."""
    defaults = {"image_size": (512, 864), "mid_positions": True}
    return YOLOS(330, 14, 6, 1320, num_classes=num_classes, **defaults | options)


def yolos_base(num_classes: int = 91, **options) -> YOLOS:
    """YOLOS-B on DeiT-B, for 800 to 1333 pixels. `options` as `YOLOS`."""
    defaults = {"image_size": (800, 1344), "mid_positions": True}
    return YOLOS(768, 12, 12, 3072, num_classes=num_classes, **defaults | options)


def yolos_mini(num_classes: int = 10, **options) -> YOLOS:
    """Not of the paper: three narrow layers, patches of 8 pixels and four tokens, for pictures of 32 pixels. `options` as `YOLOS`."""
    defaults = {"width": 48, "depth": 3, "heads": 4, "hidden": 192, "image_size": (32, 32), "patch": 8, "tokens": 4}
    defaults |= {"weight_std": 0.1, "token_std": 0.5}  # not pre-trained: a position weighs as much as a patch
    return YOLOS(num_classes=num_classes, **defaults | options)


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' checkpoint (backbone.blocks.0.attn.qkv…), or `transformers` 5's names, in ours."""
    converted = {}
    for name, value in state_dict.items():
        name = name.replace("encoder.interpolation.mid_position_embeddings", "encoder.mid_position_embeddings")
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        if ".attention.attention.qkv." in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                converted[name.replace("qkv", part)] = piece
        else:
            converted[name] = value
    return converted


RULES = [
    (r"^class_embed\.", "class_labels_classifier."),
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"^backbone\.(cls_token)$", r"vit.embeddings.\1"),
    (r"^backbone\.det_token$", "vit.embeddings.detection_tokens"),
    (r"^backbone\.pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^backbone\.mid_pos_embed$", "vit.encoder.mid_position_embeddings"),
    (r"^backbone\.patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^backbone\.norm\.", "vit.layernorm."),
    (r"^backbone\.blocks\.(\d+)\.", r"vit.encoder.layer.\1."),
    (r"(vit\.encoder\.layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(vit\.encoder\.layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(vit\.encoder\.layer\.\d+)\.attn\.qkv\.", r"\1.attention.attention.qkv."),
    (r"(vit\.encoder\.layer\.\d+)\.attn\.proj\.", r"\1.attention.output.dense."),
    (r"(vit\.encoder\.layer\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(vit\.encoder\.layer\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
]
"""timm's names of a vision transformer -> those of the published checkpoints."""
