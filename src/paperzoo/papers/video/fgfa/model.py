"""Flow-Guided Feature Aggregation (Zhu et al., ICCV 2017, arXiv:1703.10025), on R-FCN.

    model(images)                 frames (B, T, 3, H, W), normalised with ImageNet's mean and deviation; the first one of each row is the
                                  reference frame, the others are its neighbours -> its regions, class logits and box deltas
    model(images, targets)        the losses; with neighbours, the reference frame's own features are not part of the sum
    model.stream(frames, reach)   all of a video, each frame's features computed once (algorithm 1)

The contract is that of `tasks/video_detection.py`. What differs from the paper and its released code:

- f_(i->i) is f_i itself in tests; the paper's algorithm sends the reference frame through the flow network with itself.
- ResNet's strides sit on the 3x3 convolutions (as everywhere here), so that the released MXNet weights do not fit.
- Objectness is one sigmoid for each anchor, and its losses are those of `detection/faster_rcnn`; as in the released code there is
  no 3x3 convolution of its own before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.boxes import AnchorGenerator
from paperzoo.blocks.dilation import dilated_backbone
from paperzoo.blocks.precision import full_precision
from paperzoo.blocks.warping import backward_warp
from paperzoo.papers.classification.vgg.model import POOL
from paperzoo.papers.detection.fast_rcnn.model import VGGBody
from paperzoo.papers.detection.faster_rcnn.model import FasterRCNN, RegionProposalNetwork, RPNHead
from paperzoo.papers.video.fgfa.flownet import flow_network
from paperzoo.papers.video.fgfa.rfcn import RFCNHeads

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# -- the three networks of a frame (sec. 4.1) ----------------------------------------------------------------------------


class FeatureNetwork(nn.Module):
    """N_feat: a classifier's last map, its channels reduced by a dilated 3x3 convolution: (B, 3, H, W) -> (B, out_channels, h, w).

    Args:
        body: images -> list of maps, the last of which is taken; with `load_body`.
        in_channels: of that map.
    """

    def __init__(self, body: nn.Module, in_channels: int, out_channels: int = 1024, dilation: int = 6) -> None:
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.feat_conv_3x3 = nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation)
        nn.init.kaiming_normal_(self.feat_conv_3x3.weight, nonlinearity="relu")
        nn.init.zeros_(self.feat_conv_3x3.bias)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.feat_conv_3x3(self.body(images)[-1]))


class EmbeddingNetwork(nn.Module):
    """E: features in which frames are compared (sec. 3.3): 1x1, 3x3, 1x1 convolutions. (B, C, h, w) -> (B, widths[2], h, w)."""

    def __init__(self, in_channels: int, widths: Sequence[int] = (512, 512, 2048)) -> None:
        super().__init__()
        self.em_conv1 = nn.Conv2d(in_channels, widths[0], 1)
        self.em_conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=1)
        self.em_conv3 = nn.Conv2d(widths[1], widths[2], 1)
        for layer in (self.em_conv1, self.em_conv2, self.em_conv3):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.em_conv3(F.relu(self.em_conv2(F.relu(self.em_conv1(x)))))


class PlainRPNHead(RPNHead):
    """The two sibling 1x1 convolutions right on the map, which a 3x3 convolution made for them."""

    def __init__(self, in_channels: int, num_anchors: int) -> None:
        super().__init__(in_channels, num_anchors)
        self.conv = nn.Identity()


# -- aggregation (sec. 3.2, 3.3) -----------------------------------------------------------------------------------------


def warp(maps: Tensor, flow: Tensor) -> Tensor:
    """f_(j->i) = W(f_j, F(I_i, I_j)), eq. (1): maps (N, C, h, w) read bilinearly at x + flow(x), zero outside. The flow is in cells."""
    with full_precision(flow):
        return backward_warp(maps.float(), flow.float())[0].to(maps.dtype)


def adaptive_weights(embedded: Tensor, reference: Tensor) -> Tensor:
    """w_(j->i)(p), eq. (3): exp of the cosine of the embeddings at each place, normalised over the frames.

    Embeddings (B, T, E, h, w) of the frames and (B, E, h, w) of the reference -> (B, T, 1, h, w), whose sum over T is 1.
    """
    cosine = F.cosine_similarity(embedded.float(), reference.float()[:, None], dim=2)
    return cosine.softmax(1)[:, :, None].to(embedded.dtype)


# -- the detector --------------------------------------------------------------------------------------------------------


class FGFA(nn.Module):
    """See the module's docstring.

    Args:
        features: N_feat. Its first half of channels is for proposals, the other half for regions (sec. 4.1).
        flow: F, (first, second) in [0, 1] -> flow in cells, see `flownet.py`.
        embedding: E.
        rpn, roi_heads: the two stages of N_rfcn, each on half of the channels.
        before, after: proposals kept before non-maximum suppression and after it: while learning, and in tests.
        embed_once: `stream` embeds each frame once and warps the embedding, as the released code does in tests; else, as in algorithm 1 and
            in training, what is warped is embedded.
    """

    def __init__(
        self,
        features: FeatureNetwork,
        flow: nn.Module,
        embedding: EmbeddingNetwork,
        rpn: RegionProposalNetwork,
        roi_heads: RFCNHeads,
        before: tuple[int, int] = (6000, 6000),
        after: tuple[int, int] = (300, 300),
        embed_once: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.flow, self.embedding = features, flow, embedding
        self.rpn, self.roi_heads = rpn, roi_heads
        self.before, self.after, self.embed_once = before, after, embed_once
        for name, values in (("pixel_mean", MEAN), ("pixel_deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @property
    def num_classes(self) -> int:
        return self.roi_heads.num_classes

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images back to [0, 1], as the flow network takes them."""
        return images * self.pixel_deviation + self.pixel_mean

    def warped(self, images: Tensor, maps: Tensor, reference: Tensor) -> Tensor:
        """Maps (B, N, C, h, w) of the neighbours (B, N, 3, H, W), brought to where the reference frames (B, 3, H, W) have the same content."""
        count = images.shape[1]
        first = self.pixels(reference)[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
        flow = self.flow(first, self.pixels(images.flatten(0, 1)))
        return warp(maps.flatten(0, 1), flow).unflatten(0, (-1, count))

    def aggregate(self, maps: Tensor, reference: Tensor, embedded: Tensor | None = None) -> Tensor:
        """The sum over j of w_(j->i) f_(j->i), eq. (2).

        Args:
            maps: what is added up, (B, T, C, h, w), warped already.
            reference: the reference frames' own features (B, C, h, w); their embedding (B, E, h, w) if `embedded` is given.
            embedded: of `maps`, (B, T, E, h, w).
        """
        count = maps.shape[1]
        if embedded is None:
            every = self.embedding(torch.cat([reference[:, None], maps], 1).flatten(0, 1)).unflatten(0, (-1, 1 + count))
            reference, embedded = every[:, 0], every[:, 1:]
        return (adaptive_weights(embedded, reference) * maps).sum(1)

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | dict[str, Tensor]:
        count, canvas = images.shape[1], tuple(images.shape[-2:])
        maps = self.features(images.flatten(0, 1)).unflatten(0, (-1, count))
        own = maps[:, 0]
        if count > 1:
            others = self.warped(images[:, 1:], maps[:, 1:], images[:, 0])
            # temporal dropout (sec. 4.2): while learning the sum is over the drawn neighbours alone
            summed = others if targets is not None else torch.cat([own[:, None], others], 1)
            own = self.aggregate(summed, own)
        return self.detect(own, canvas) if targets is None else self.losses(own, canvas, targets)

    # -- N_rfcn ------------------------------------------------------------------------------------------------------

    def regions(
        self, maps: Tensor, canvas: tuple[int, int], learning: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """The proposals' boxes (B, P, 4), the proposal network's outputs, and the map that the regions are pooled from."""
        of_proposals, of_regions = maps.chunk(2, dim=1)
        outputs = self.rpn([of_proposals])
        sizes = torch.tensor([canvas], device=maps.device).expand(maps.shape[0], -1)
        boxes = self.rpn.regions(outputs, sizes, canvas, self.before[not learning], self.after[not learning])
        return boxes, outputs, of_regions

    def detect(self, maps: Tensor, canvas: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, C, h, w) of images of this height and width -> boxes (B, P, 4), logits (B, P, K + 1), deltas (B, P, 4)."""
        boxes, _, of_regions = self.regions(maps, canvas, learning=False)
        return boxes, *self.roi_heads(of_regions, boxes)

    def losses(self, maps: Tensor, canvas: tuple[int, int], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        boxes, outputs, of_regions = self.regions(maps, canvas, learning=True)
        first = self.rpn.loss(outputs, targets, canvas)
        second = self.roi_heads.loss(of_regions, boxes, targets)
        return {"objectness": first["objectness"], "proposals": first["boxes"]} | second

    def postprocess(
        self, outputs: tuple[Tensor, Tensor, Tensor], sizes: Tensor, canvas: tuple[int, int], suppress: bool = True
    ) -> list[dict[str, Tensor]]:
        return self.roi_heads.postprocess(*outputs, sizes, suppress)

    aligned = staticmethod(FasterRCNN.aligned)

    # -- a video (algorithm 1) ---------------------------------------------------------------------------------------

    def stream(self, frames: Iterable[Tensor], reach: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The outputs of each frame of B videos side by side, (B, 3, H, W) each, in the order of time.

        A buffer holds the frames and features of 2 * reach + 1 moments; at the ends of a video there are fewer.
        """
        kept: deque[tuple[Tensor, Tensor, Tensor | None]] = deque(maxlen=2 * reach + 1)
        seen = answered = 0
        for images in frames:
            maps = self.features(images)
            kept.append((images, maps, self.embedding(maps) if self.embed_once and reach else None))
            seen += 1
            if seen > answered + reach:
                yield self.answer(list(kept), answered - seen + len(kept), reach)
                answered += 1
        while answered < seen:
            yield self.answer(list(kept), answered - seen + len(kept), reach)
            answered += 1

    def answer(
        self, kept: list[tuple[Tensor, Tensor, Tensor | None]], here: int, reach: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs for the buffer's entry number `here`."""
        image, own, embedded = kept[here]
        others = kept[max(0, here - reach) : here] + kept[here + 1 : here + 1 + reach]
        canvas = tuple(image.shape[-2:])
        if not others:
            return self.detect(own, canvas)
        images, maps = (torch.stack([entry[k] for entry in others], 1) for k in (0, 1))
        if embedded is None:
            summed = torch.cat([own[:, None], self.warped(images, maps, image)], 1)
            return self.detect(self.aggregate(summed, own), canvas)
        both = self.warped(images, torch.cat([maps, torch.stack([entry[2] for entry in others], 1)], 2), image)
        both = torch.cat([torch.cat([own, embedded], 1)[:, None], both], 1)
        maps, vectors = both.split([own.shape[1], embedded.shape[1]], 2)
        return self.detect(self.aggregate(maps, embedded, vectors), canvas)

    # -- other classes, other weights --------------------------------------------------------------------------------

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh score maps for another number of classes."""
        self.roi_heads.reset_classifier(num_classes)

    def load_backbone(self, state_dict: dict[str, Tensor]) -> None:
        """Start from a classifier's weights."""
        self.features.body.load_body(state_dict)


# -- variants ------------------------------------------------------------------------------------------------------------


def on_backbone(num_classes: int, backbone: str, flow: str, embed_once: bool, **options: float) -> FGFA:
    """The paper's detector on a classifier by name: stride 16, its last stage dilated by two; nine anchors, 7 x 7 bins, 300 proposals."""
    body = dilated_backbone(backbone, 16, whole_stage=True)
    features = FeatureNetwork(body, body.out_channels[-1])
    half = features.out_channels // 2
    rpn = RegionProposalNetwork(half, AnchorGenerator((16,), [(128, 256, 512)]), inside=True)
    rpn.head = PlainRPNHead(half, rpn.anchors.per_cell[0])
    heads = RFCNHeads(half, num_classes, **options)
    embedding = EmbeddingNetwork(features.out_channels)
    return FGFA(features, flow_network(flow, 16), embedding, rpn, heads, embed_once=embed_once)


def fgfa_rfcn_resnet101(
    num_classes: int = 30,
    backbone: str = "resnet101",
    flow: str = "flownet_s",
    embed_once: bool = False,
    **options: float,
) -> FGFA:
    """The paper's network. `backbone`: any classifier by name; `flow`: see `flow_network`; `options` as `RFCNHeads`."""
    return on_backbone(num_classes, backbone, flow, embed_once, **options)


def fgfa_rfcn_resnet50(
    num_classes: int = 30,
    backbone: str = "resnet50",
    flow: str = "flownet_s",
    embed_once: bool = False,
    **options: float,
) -> FGFA:
    """The paper's smaller network (table 4). Arguments as of `fgfa_rfcn_resnet101`."""
    return on_backbone(num_classes, backbone, flow, embed_once, **options)


def fgfa_rfcn_slim(
    num_classes: int = 10, flow: str = "flownet_s_slim", embed_once: bool = False, **options: float
) -> FGFA:
    """Not of the paper: the same detector for pictures of about 64 pixels, on a thin VGG of stride 4; 3 x 3 bins.

    `options` as `RFCNHeads`.
    """
    body = VGGBody((8, POOL, 16, 16, POOL, 32, 32, 32), batch_norm=True)
    features = FeatureNetwork(body, body.out_channels, 64, dilation=2)
    half = features.out_channels // 2
    rpn = RegionProposalNetwork(half, AnchorGenerator((4,), [(24,)], (1.2, 1.8, 3.0)), sampled=64)
    rpn.head = PlainRPNHead(half, rpn.anchors.per_cell[0])
    options = {"hard": None, "sampled": 32, "score_threshold": 0.02, "detections": 20} | options
    heads = RFCNHeads(half, num_classes, 3, 4, **options)
    embedding = EmbeddingNetwork(features.out_channels, (32, 32, 64))
    return FGFA(features, flow_network(flow, 4), embedding, rpn, heads, (96, 96), (32, 16), embed_once)
