"""MaskFormer: Per-Pixel Classification is Not All You Need for Semantic Segmentation (Cheng et al., NeurIPS 2021, arXiv:2107.06278).

A pixel decoder gives every pixel an embedding, a transformer decoder (DETR's, arXiv:2005.12872) every query a class and a mask
embedding, and their dot products are the masks (sec. 3.3). `technique.py` has the loss, `postprocess` and `semantic` the two ways
to read an answer (sec. 3.4).

Names are those of `transformers`' checkpoints but for prefixes and the backbone: `official.py`. What differs from the paper:

- ResNet-101c is not here, ResNet-101 is; any classifier with maps of strides 4 to 32 can be the backbone, by name.
- Attention sees the padding of a batch's smaller images, as the released code's does.
- Of several processes that learn together each divides its masks' losses by its own number of segments, not by their average.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import Backbone, at_strides, load_body
from paperzoo.blocks.panoptic import PanopticMap, Segment
from paperzoo.papers.classification.resnet.model import resnet50, resnet101
from paperzoo.papers.detection.fpn.model import TinyBody
from paperzoo.papers.segmentation.maskformer.decoder import Decoder, EncoderLayer, sine_positions
from paperzoo.papers.segmentation.maskformer.official import from_official
from paperzoo.papers.segmentation.maskformer.swin import Swin
from paperzoo.papers.segmentation.maskformer.technique import SetMaskLoss
from paperzoo.tasks.panoptic_segmentation import segments

# -- the pixel decoder (sec. 4.1, "pixel decoder") ---------------------------------------------------------------------


def normalised(in_channels: int, channels: int, kernel: int, groups: int) -> list[nn.Module]:
    """A convolution without bias that keeps the size, and a group norm."""
    convolution = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return [convolution, nn.GroupNorm(groups, channels)]


class Merge(nn.Module):
    """The coarser map, enlarged, plus the projected finer one; a 3x3 convolution with group norm and ReLU behind."""

    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(*normalised(in_channels, channels, 1, groups))
        self.block = nn.Sequential(*normalised(channels, channels, 3, groups), nn.ReLU(inplace=True))

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        fine = self.proj(fine)
        return self.block(fine + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest"))


class PixelDecoder(nn.Module):
    """ "A light-weight pixel decoder based on the popular FPN": maps (B, C_l, H_l, W_l), finest first -> E_pixel (B, mask_channels, H_0, W_0)."""

    def __init__(self, in_channels: Sequence[int], channels: int, mask_channels: int, groups: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*normalised(in_channels[-1], channels, 3, groups), nn.ReLU(inplace=True))
        self.layers = nn.ModuleList(Merge(c, channels, groups) for c in reversed(in_channels[:-1]))
        self.mask_projection = nn.Conv2d(channels, mask_channels, 3, padding=1)
        nn.init.kaiming_uniform_(self.mask_projection.weight, a=1)
        nn.init.zeros_(self.mask_projection.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self.stem(maps[-1])
        for layer, fine in zip(self.layers, reversed(maps[:-1]), strict=True):
            x = layer(x, fine)
        return self.mask_projection(x)


def perceptron(width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers with ReLU; each linear map is in a Sequential of its own, because the public checkpoints' names say so."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(width, width), nn.ReLU()),
        nn.Sequential(nn.Linear(width, width), nn.ReLU()),
        nn.Sequential(nn.Linear(width, outputs)),
    )


# -- the network (sec. 3.3, fig. 2) ------------------------------------------------------------------------------------


class MaskFormer(nn.Module):
    """Images (B, 3, H, W) -> class logits (B, Q, K + 1), the last of "nothing", and mask logits (B, Q, H / 4, W / 4); with targets,
    the losses.

    The contract is in `tasks/panoptic_segmentation.py`.

    Args:
        backbone: images -> maps of strides 4, 8, 16, 32, with `out_channels`.
        num_classes: K, things and stuff.
        things: the countable categories; a segment of another category is all of it in the image.
        queries: N, the most segments that can be found.
        width, heads, hidden, depth: of the transformer decoder.
        encoder_layers: of a transformer encoder on the coarsest map (sec. 4.1: 6 for panoptic segmentation with a ResNet).
        channels, groups: of the pixel decoder; `channels` is also the size of mask embeddings.
        drop_rate: dropout of the transformer.
        deep: whether the states after every decoder layer learn, or the last alone.
        no_object, mask_weight, dice_weight: of `SetMaskLoss`.
        confidence: queries that are less sure of their class are not looked at (sec. 3.4).
        overlap: a query whose pixels are for less than this part its own gives no segment.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        things: Sequence[int] = (),
        queries: int = 100,
        width: int = 256,
        heads: int = 8,
        hidden: int = 2048,
        depth: int = 6,
        encoder_layers: int = 0,
        channels: int = 256,
        groups: int = 32,
        drop_rate: float = 0.1,
        deep: bool = True,
        no_object: float = 0.1,
        mask_weight: float = 20.0,
        dice_weight: float = 1.0,
        confidence: float = 0.8,
        overlap: float = 0.8,
    ) -> None:
        super().__init__()
        self.things = check_things(num_classes, things)
        self.num_classes, self.deep = num_classes, deep
        self.confidence, self.overlap = confidence, overlap
        self.backbone = backbone
        maps = list(backbone.out_channels)
        self.input_projection = nn.Conv2d(maps[-1], width, 1)
        nn.init.kaiming_uniform_(self.input_projection.weight, a=1)
        nn.init.zeros_(self.input_projection.bias)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, hidden, drop_rate) for _ in range(encoder_layers))
        if encoder_layers:  # the pixel decoder stands on what it gives
            maps[-1] = width
        self.pixel_decoder = PixelDecoder(maps, channels, channels, groups)
        self.queries = nn.Embedding(queries, width)
        self.decoder = Decoder(width, heads, hidden, depth, drop_rate)
        self.class_predictor = nn.Linear(width, num_classes + 1)
        self.mask_embedder = perceptron(width, channels)
        self.criterion = SetMaskLoss(num_classes, no_object, mask_weight, dice_weight)

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        class_logits, mask_logits = self.predictions(images, every=targets is not None and self.deep)
        if targets is None:
            return class_logits[-1], mask_logits[-1]
        masks, labels = zip(*(segments(target, self.things) for target in targets), strict=True)
        return self.criterion(class_logits, mask_logits, labels, masks)

    def predictions(self, images: Tensor, every: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Class and mask logits after each decoder layer (deep supervision), or of the last."""
        maps = list(self.backbone(images))
        coarse = self.input_projection(maps[-1])
        positions = sine_positions(*coarse.shape[-2:], coarse.shape[1], coarse)
        memory = coarse.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            memory = layer(memory, positions)
        if len(self.encoder):
            maps[-1] = memory.transpose(1, 2).unflatten(2, coarse.shape[-2:])
        pixels = self.pixel_decoder(maps)
        every_query = torch.arange(self.queries.num_embeddings, device=images.device)
        queries = self.queries(every_query).expand(memory.shape[0], -1, -1)
        states = self.decoder(queries, memory, positions, every)
        # m_i[h, w] = sigmoid(E_mask[:, i]^T E_pixel[:, h, w])
        masks = [(self.mask_embedder(x) @ pixels.flatten(2)).unflatten(2, pixels.shape[-2:]) for x in states]
        return [self.class_predictor(x) for x in states], masks

    def reset_classifier(self, num_classes: int, things: Sequence[int] | None = None) -> None:
        """A fresh last layer for other categories; without `things` those that exist stay things."""
        chosen = [k for k in self.things if k < num_classes] if things is None else things
        self.things = check_things(num_classes, chosen)
        old = self.class_predictor
        self.class_predictor = nn.Linear(old.in_features, num_classes + 1).to(old.weight)
        self.num_classes = self.criterion.num_classes = num_classes

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights; the norms of Swin's maps, which it has not, stay as they are."""
        own = {name: value for name, value in self.backbone.body.state_dict().items() if name.startswith("norms.")}
        load_body(self.backbone.body, own | state_dict)

    # -- inference (sec. 3.4) ------------------------------------------------------------------------------------

    @torch.no_grad()
    def postprocess(
        self,
        outputs: tuple[Tensor, Tensor],
        sizes: Tensor,
        canvas: tuple[int, int],
        originals: Sequence[tuple[int, int]],
    ) -> list[PanopticMap]:
        """General inference: each pixel goes to the query with the highest p_i(c_i) m_i[h, w]; queries that are not sure, or that
        lose too much of their mask, are left out. Pieces of stuff of one category are one segment.

        Args:
            outputs: of `forward`.
            sizes: (B, 2), height and width of each image inside the canvas.
            canvas: height and width of the batch's images.
            originals: height and width of each image as it was given.
        """
        found = []
        for classes, masks, inside, size in zip(*outputs, sizes.tolist(), originals, strict=True):
            scores, labels = classes.float().softmax(-1).max(-1)
            kept = (labels != self.num_classes) & (scores > self.confidence)
            probability = at_size(masks[kept], inside, canvas, size).sigmoid()
            found.append(self.assigned(probability, scores[kept], labels[kept], size))
        return found

    def assigned(self, masks: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int]) -> PanopticMap:
        """Masks (N, H, W), probabilities, of queries that were kept, to a map."""
        if not len(masks):
            return PanopticMap(torch.zeros(size, dtype=torch.int64, device=masks.device), ())
        owner = (scores[:, None, None] * masks).argmax(0)
        won = owner.flatten().bincount(minlength=len(masks))
        whole = (masks >= 0.5).flatten(1).sum(1)
        valid = (won > 0) & (whole > 0) & (won >= self.overlap * whole)
        table, known, result = torch.zeros(len(masks), dtype=torch.int64), {}, []
        areas = won.tolist()
        for i in valid.nonzero()[:, 0].tolist():  # numbers of a hundred queries, no pixels
            category, thing = int(labels[i]), int(labels[i]) in self.things
            if not thing and category in known:
                table[i] = number = known[category]
                old = result[number - 1]
                result[number - 1] = Segment(number, category, False, old.area + areas[i], score=old.score)
                continue
            table[i] = known[category] = len(result) + 1
            result.append(Segment(len(result) + 1, category, thing, areas[i], score=float(scores[i])))
        return PanopticMap(table.to(owner.device)[owner], tuple(result))

    @torch.no_grad()
    def semantic(
        self,
        outputs: tuple[Tensor, Tensor],
        sizes: Tensor,
        canvas: tuple[int, int],
        originals: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Semantic inference: the category of each pixel, int64 (height, width). Arguments as `postprocess`."""
        return [
            marginal(classes[None], at_size(masks, inside, canvas, size)[None])[0].argmax(0)
            for classes, masks, inside, size in zip(*outputs, sizes.tolist(), originals, strict=True)
        ]


def marginal(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """sum_i p_i(c) m_i[h, w] for each category: (B, Q, K + 1) and (B, Q, H, W) -> (B, K, H, W)."""
    return torch.einsum("bqc,bqhw->bchw", class_logits.float().softmax(-1)[..., :-1], mask_logits.float().sigmoid())


def at_size(masks: Tensor, inside: Sequence[int], canvas: Sequence[int], size: Sequence[int]) -> Tensor:
    """Mask logits (N, h, w) of a canvas, enlarged to it, cut to the image inside and resized to (N, *size)."""
    if not len(masks):
        return masks.new_zeros(0, *size, dtype=torch.float32)
    of_canvas = F.interpolate(masks[None].float(), tuple(canvas), mode="bilinear", align_corners=False)
    of_image = of_canvas[:, :, : inside[0], : inside[1]]
    return F.interpolate(of_image, tuple(size), mode="bilinear", align_corners=False)[0]


def check_things(num_classes: int, things: Sequence[int]) -> tuple[int, ...]:
    """The countable categories, rising; there may be none.

    Raises:
        ValueError: if one is no category, or there are no categories.
    """
    chosen = tuple(sorted({int(k) for k in things}))
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be 1 or more")
    if chosen and (chosen[0] < 0 or chosen[-1] >= num_classes):
        raise ValueError(f"things is {list(things)}; they are among 0 … {num_classes - 1}")
    return chosen


class SemanticMaskFormer(MaskFormer):
    """MaskFormer for semantic segmentation: images (B, 3, H, W) -> logits (B, K, H, W), the logarithm of `marginal`, so that their
    softmax gives each category its share; with targets {"semantic": int64 (H, W)} for each image, 255 where none is, the losses.

    The contract is in `tasks/segmentation.py`.
    """

    def forward(self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None) -> Tensor | dict[str, Tensor]:
        if targets is not None:
            canvas = images.shape[-2:]
            none = {
                "masks": torch.zeros(0, *canvas, dtype=torch.bool, device=images.device),
                "labels": torch.zeros(0, dtype=torch.int64, device=images.device),
            }
            return super().forward(images, [target | none for target in targets])
        class_logits, mask_logits = super().forward(images)
        masks = F.interpolate(mask_logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return marginal(class_logits, masks).clamp(min=1e-6).log()


# -- variants ----------------------------------------------------------------------------------------------------------


def body_of(network: nn.Module, backbone: str | None) -> Backbone:
    """The network as a backbone, or another classifier by its name."""
    return Backbone(network) if backbone is None else at_strides(backbone, (4, 8, 16, 32))


def maskformer_resnet50(num_classes: int = 150, backbone: str | None = None, **options: float) -> SemanticMaskFormer:
    """For semantic segmentation, of ADE20K's 150 classes. `options` as `MaskFormer`.

    `backbone`: another classifier by name, its maps of strides 4, 8, 16 and 32.
    """
    return SemanticMaskFormer(body_of(resnet50(), backbone), num_classes, **options)


def maskformer_resnet101(num_classes: int = 150, **options: float) -> SemanticMaskFormer:
    """The same on ResNet-101. `options` as `MaskFormer`."""
    return SemanticMaskFormer(Backbone(resnet101()), num_classes, **options)


def maskformer_panoptic_resnet50(
    num_classes: int = 133, things: Sequence[int] = range(80), backbone: str | None = None, **options: float
) -> MaskFormer:
    """For panoptic segmentation, of COCO's 80 things and 53 kinds of stuff, with six encoder layers as DETR. `options` as `MaskFormer`.

    `backbone`: another classifier by name, its maps of strides 4, 8, 16 and 32.
    """
    return MaskFormer(body_of(resnet50(), backbone), num_classes, things, **{"encoder_layers": 6} | options)


def maskformer_panoptic_resnet101(
    num_classes: int = 133, things: Sequence[int] = range(80), **options: float
) -> MaskFormer:
    """The same on ResNet-101. `options` as `MaskFormer`."""
    return MaskFormer(Backbone(resnet101()), num_classes, things, **{"encoder_layers": 6} | options)


SWIN = {
    "tiny": {"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "window": 7},
    "small": {"dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24), "window": 7},
    "base": {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "window": 12},
    "large": {"dim": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48), "window": 12},
}


def maskformer_swin_tiny(num_classes: int = 150, **options: float) -> SemanticMaskFormer:
    """For semantic segmentation, on Swin-T. `options` as `MaskFormer`."""
    return SemanticMaskFormer(Backbone(Swin(**SWIN["tiny"])), num_classes, **options)


def maskformer_swin_small(num_classes: int = 150, **options: float) -> SemanticMaskFormer:
    """For semantic segmentation, on Swin-S. `options` as `MaskFormer`."""
    return SemanticMaskFormer(Backbone(Swin(**SWIN["small"])), num_classes, **options)


def maskformer_swin_base(num_classes: int = 150, **options: float) -> SemanticMaskFormer:
    """For semantic segmentation, on Swin-B with windows of 12. `options` as `MaskFormer`."""
    return SemanticMaskFormer(Backbone(Swin(**SWIN["base"])), num_classes, **options)


def maskformer_swin_large(num_classes: int = 150, **options: float) -> SemanticMaskFormer:
    """For semantic segmentation, on Swin-L with windows of 12: the paper's 55.6 mIoU. `options` as `MaskFormer`."""
    return SemanticMaskFormer(Backbone(Swin(**SWIN["large"])), num_classes, **options)


def maskformer_panoptic_swin_tiny(
    num_classes: int = 133, things: Sequence[int] = range(80), **options: float
) -> MaskFormer:
    """For panoptic segmentation, on Swin-T, without an encoder. `options` as `MaskFormer`."""
    return MaskFormer(Backbone(Swin(**SWIN["tiny"])), num_classes, things, **options)


def maskformer_panoptic_swin_base(
    num_classes: int = 133, things: Sequence[int] = range(80), **options: float
) -> MaskFormer:
    """For panoptic segmentation, on Swin-B with windows of 12. `options` as `MaskFormer`."""
    return MaskFormer(Backbone(Swin(**SWIN["base"])), num_classes, things, **options)


def maskformer_panoptic_swin_large(
    num_classes: int = 133, things: Sequence[int] = range(80), **options: float
) -> MaskFormer:
    """For panoptic segmentation, on Swin-L with windows of 12: the paper's 52.7 PQ. `options` as `MaskFormer`."""
    return MaskFormer(Backbone(Swin(**SWIN["large"])), num_classes, things, **options)


SMALL = {
    "queries": 16,
    "width": 64,
    "heads": 4,
    "hidden": 128,
    "depth": 2,
    "channels": 32,
    "groups": 8,
    "drop_rate": 0.0,
}


def thin_body(channels: Sequence[int]) -> TinyBody:
    """`TinyBody` whose last stage keeps the size of its map: of 64 pixels 4 x 4 places are left to look at, not 2 x 2."""
    body = TinyBody(channels)
    block = body.layer4[0]
    block.conv1.stride = block.downsample[0].stride = (1, 1)
    body.stage_strides = [4, 8, 16, 16]
    return body


def maskformer_tiny(num_classes: int = 8, backbone: str | None = None, **options: float) -> SemanticMaskFormer:
    """`maskformer_resnet50` in small, for pictures of 64 to 100 pixels. `options` as `MaskFormer`."""
    return SemanticMaskFormer(body_of(thin_body((24, 32, 48, 64)), backbone), num_classes, **SMALL | options)


def maskformer_panoptic_tiny(
    num_classes: int = 10, things: Sequence[int] = range(6), backbone: str | None = None, **options: float
) -> MaskFormer:
    """`maskformer_panoptic_resnet50` in small, for pictures of 64 to 100 pixels, without an encoder. `options` as `MaskFormer`."""
    return MaskFormer(body_of(thin_body((24, 32, 48, 64)), backbone), num_classes, things, **SMALL | options)


__all__ = ["MaskFormer", "SemanticMaskFormer", "at_size", "from_official", "marginal"]
