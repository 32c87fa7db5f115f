"""FGFA against versions written down literally: sums over all places, loops over frames, regions and boxes. No released code of it installs today."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from paperzoo.blocks.boxes import decode_boxes, encode_boxes
from paperzoo.blocks.sequence_nms import sequence_nms
from paperzoo.engine.parity import Case
from paperzoo.papers.video.fgfa.flownet import FlowByName, FlowNetS
from paperzoo.papers.video.fgfa.literal import as_rows, literal_ap, literal_chains, literal_motion, random_film
from paperzoo.papers.video.fgfa.model import (
    FGFA,
    FeatureNetwork,
    adaptive_weights,
    fgfa_rfcn_resnet50,
    fgfa_rfcn_slim,
    warp,
)
from paperzoo.papers.video.fgfa.rfcn import plain_pool, region_votes
from paperzoo.tasks.video_detection import windowed
from paperzoo.tasks.video_detection_metrics import SPEEDS, VideoAP, motion_iou


def lively(model: nn.Module) -> nn.Module:
    """Weights that make flow, proposals and detections of many kinds."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if "predict_flow" in name:
            nn.init.normal_(module.weight, std=0.02)
            nn.init.normal_(module.bias, std=0.02)
    if isinstance(model, FGFA):
        nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.3)
        nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.05)
        nn.init.normal_(model.roi_heads.rfcn_cls.weight, std=0.2)
        nn.init.normal_(model.roi_heads.rfcn_bbox.weight, std=0.2)
    return model


# -- flow network --------------------------------------------------------------------------------------------------------


class LiteralFlowNet(nn.Module):
    """FlowNet-S as the released symbol file draws it, layer after layer; deconvolutions without padding, cropped by one pixel."""

    def __init__(self, network: FlowNetS) -> None:
        super().__init__()
        for name, child in copy.deepcopy(network).named_children():
            self.add_module(name, child)
        self.stride = network.stride

    def cropped(self, layer: nn.ConvTranspose2d, x: Tensor, like: Tensor) -> Tensor:
        y = F.conv_transpose2d(x, layer.weight, layer.bias, stride=2)
        return y[:, :, 1 : 1 + like.shape[2], 1 : 1 + like.shape[3]]

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        mean = first.new_tensor([123.15, 115.90, 103.06]).view(1, 3, 1, 1) / 255
        mean = mean.mul(1e4).round() / 1e4
        x = torch.cat([first - mean, second - mean], 1)
        if self.stride == 16:
            x = F.avg_pool2d(x, 2, ceil_mode=True)

        def run(name: str, x: Tensor, stride: int) -> Tensor:
            layer = self.get_submodule(name)[0]
            return F.leaky_relu(F.conv2d(x, layer.weight, layer.bias, stride, layer.kernel_size[0] // 2), 0.1)

        c2 = run("conv2", run("conv1", x, 2), 2)
        c3 = run("conv3_1", run("conv3", c2, 2), 1)
        c4 = run("conv4_1", run("conv4", c3, 2), 1)
        c5 = run("conv5_1", run("conv5", c4, 2), 1)
        c6 = run("conv6_1", run("conv6", c5, 2), 1)
        x, flow = c6, self.predict_flow6(c6)
        for level, skip in ((5, c5), (4, c4), (3, c3), (2, c2)):
            up = F.leaky_relu(self.cropped(self.get_submodule(f"deconv{level}")[0], x, skip), 0.1)
            flow = self.cropped(self.get_submodule(f"upsampled_flow{level + 1}_to_{level}"), flow, skip)
            x = torch.cat([skip, up, flow], 1)
            if level == 2 and self.stride > 4:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            flow = self.get_submodule(f"predict_flow{level}")(x)
        return flow * 2.5 if self.stride == 16 else flow * 20 / self.stride


# -- aggregation ---------------------------------------------------------------------------------------------------------


def literal_warp(maps: Tensor, flow: Tensor) -> Tensor:
    """f(p) = sum_q G(q, p + dp) f(q) over all places q, with G the product of max(0, 1 - |distance|) along both axes (sec. 3.2)."""
    height, width = maps.shape[2:]
    y = torch.arange(height, dtype=maps.dtype)[:, None] + flow[:, 1]
    x = torch.arange(width, dtype=maps.dtype)[None, :] + flow[:, 0]
    of_y = (1 - (y[..., None] - torch.arange(height)).abs()).clamp(min=0)  # (N, h, w, H)
    of_x = (1 - (x[..., None] - torch.arange(width)).abs()).clamp(min=0)
    return torch.einsum("nchw,nijh,nijw->ncij", maps, of_y, of_x)


def literal_weights(embedded: Tensor, reference: Tensor) -> Tensor:
    """Eq. (3), place by place."""
    batch, count, _, height, width = embedded.shape
    found = torch.zeros(batch, count, 1, height, width)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                mine = reference[b, :, y, x]
                cosines = [
                    (embedded[b, j, :, y, x] @ mine) / (embedded[b, j, :, y, x].norm() * mine.norm())
                    for j in range(count)
                ]
                total = sum(c.exp() for c in cosines)
                for j in range(count):
                    found[b, j, 0, y, x] = cosines[j].exp() / total
    return found


def literal_sum(model: FGFA, frames: Sequence[Tensor], i: int, window: Sequence[int]) -> Tensor:
    """Features of frame i as the sum over `window`, eq. (1) to (3), one frame (1, 3, H, W) at a time."""
    own = model.features(frames[i])
    vector = model.embedding(own)
    warped, cosines = [], []
    for j in window:
        maps = model.features(frames[j])
        if j != i:
            flow = model.flow(model.pixels(frames[i]), model.pixels(frames[j]))
            maps = literal_warp(maps, flow)
        embedded = model.embedding(maps)
        cosines.append((embedded * vector).sum(1) / (embedded.norm(dim=1) * vector.norm(dim=1)))
        warped.append(maps)
    weights = torch.stack(cosines).exp()
    weights = weights / weights.sum(0)
    return sum(w[:, None] * f for w, f in zip(weights, warped, strict=True))


def algorithm_1(model: FGFA, frames: Sequence[Tensor], reach: int) -> list[tuple[Tensor, ...]]:
    """Every frame of a video with j from max(1, i - K) to i + K; nothing is kept between frames."""
    answers = []
    for i in range(len(frames)):
        window = range(max(0, i - reach), min(len(frames), i + reach + 1))
        answers.append(model.detect(literal_sum(model, frames, i, window), tuple(frames[0].shape[-2:])))
    return answers


class Learning(nn.Module):
    """The losses for frames with neighbours: FGFA's, or put together frame by frame."""

    def __init__(self, model: FGFA, targets: Sequence[dict[str, Tensor]], literal: bool) -> None:
        super().__init__()
        self.model, self.targets, self.literal = model, targets, literal

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if not self.literal:
            return self.model(images, self.targets)
        summed = []
        for row in images:
            frames = [frame[None] for frame in row]
            summed.append(literal_sum(self.model, frames, 0, range(1, len(frames))))
        return self.model.losses(torch.cat(summed), tuple(images.shape[-2:]), self.targets)


# -- R-FCN ---------------------------------------------------------------------------------------------------------------


def literal_votes(maps: Tensor, regions: Tensor, bins: int, scale: float) -> Tensor:
    """R-FCN's eq. (1): the mean of bin (p, q) over its own score map, and the vote; region by region."""
    height, width = maps.shape[2:]
    groups = maps.shape[1] // bins**2
    rows = []
    for number, *corners in regions.tolist():
        x1, y1, x2, y2 = (int(np.floor(np.float32(c) * np.float32(scale) + np.float32(0.5))) for c in corners)
        wide, tall = (np.float32(max(n, 1)) / np.float32(bins) for n in (x2 - x1, y2 - y1))
        votes = []
        for c in range(groups):
            total = maps.new_zeros(())
            for p in range(bins):
                for q in range(bins):
                    top, bottom = y1 + int(np.floor(p * tall)), y1 + int(np.ceil((p + 1) * tall))
                    left, right = x1 + int(np.floor(q * wide)), x1 + int(np.ceil((q + 1) * wide))
                    part = maps[
                        int(number),
                        (c * bins + p) * bins + q,
                        max(0, top) : min(bottom, height),
                        max(0, left) : min(right, width),
                    ]
                    total = total + (part.mean() if part.numel() else 0.0)
            votes.append(total / bins**2)
        rows.append(torch.stack(votes))
    return torch.stack(rows)


def literal_losses(
    model: FGFA, maps: Tensor, proposals: Tensor, targets: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Fast R-CNN's eq. (1) on the regions with the largest loss of each image, region by region."""
    heads, kept = model.roi_heads, []
    for b, target in enumerate(targets):
        losses = []
        for box in [*proposals[b], *target["boxes"]]:
            if not bool((box[2:] > box[:2]).all()):
                continue
            region = torch.cat([torch.tensor([float(b)]), box])[None]
            logits, deltas = heads.look(maps, region)
            overlap = box_iou(box[None], target["boxes"])[0]
            if len(overlap) and overlap.max() >= 0.5:
                best = int(overlap.argmax())
                wanted = target["labels"][best] + 1
                goal = encode_boxes(target["boxes"][best], box, heads.weights)
                apart = (deltas[0] - goal).abs()
                distance = torch.where(apart < 1, 0.5 * apart.square(), apart - 0.5).sum()
            else:
                wanted, distance = torch.tensor(0), torch.zeros(())
            losses.append(torch.stack([-logits[0].log_softmax(0)[wanted], distance]))
        kept += sorted(losses, key=lambda pair: -float(pair.detach().sum()))[: heads.hard]
    total = torch.stack(kept).sum(0) / len(kept)
    return {"classification": total[0], "boxes": total[1]}


def literal_detections(model: FGFA, outputs: tuple[Tensor, ...], sizes: Tensor) -> list[dict[str, Tensor]]:
    heads, result = model.roi_heads, []
    for boxes, logits, deltas, (height, width) in zip(*outputs, sizes.tolist(), strict=True):
        rows = []
        for k in range(heads.num_classes):
            found, scores = [], []
            for box, logit, delta in zip(boxes, logits, deltas, strict=True):
                score = logit.softmax(0)[k + 1]
                moved = decode_boxes(delta, box, heads.weights).clamp(min=0)
                moved = torch.minimum(moved, torch.tensor([width, height, width, height], dtype=moved.dtype))
                if (
                    score > heads.score_threshold
                    and bool((box[2:] > box[:2]).all())
                    and bool((moved[2:] - moved[:2] >= 0.01).all())
                ):
                    found.append(moved)
                    scores.append(score)
            if found:
                found, scores = torch.stack(found), torch.stack(scores)
                rows += [(float(scores[i]), found[i], k) for i in nms(found, scores, heads.nms_threshold).tolist()]
        rows = sorted(rows, key=lambda row: -row[0])[: heads.detections]
        result.append({
            "boxes": torch.stack([b for _, b, _ in rows]), "scores": torch.tensor([s for s, _, _ in rows]),
            "labels": torch.tensor([k for *_, k in rows]),
        })  # fmt: skip
    return result


# -- the cases -----------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    against = "the released network's drawing, layer by layer"
    for stride, size, gradients in ((16, (96, 130), True), (8, (64, 75), True), (4, (66, 64), False)):
        network = lively(FlowNetS(stride, (8, 12, 16, 16, 20, 24), (8, 12, 16, 16)))
        pictures = tuple(torch.rand(2, 3, *size) for _ in range(2))
        name = f"FlowNet-S for features of stride {stride}, {size[1]} x {size[0]} pixels"
        yield Case(name, network, LiteralFlowNet(network), pictures, against, gradients=gradients)
    yield Case(
        "the flow has the features' size, whatever the picture's",
        lambda: [float(n) for size in SIZES for n in flow_size(*size)],
        lambda: [float(n) for height, width in SIZES for n in (-(-height // 16), -(-width // 16))],
        against="rounded up, as padded strides of ResNet do",
    )
    by_name = FlowByName("pwc_net_slim", 4).eval()
    for layer in (by_name.network.predict_flow2, by_name.network.predict_flow3):
        nn.init.normal_(layer.weight, std=0.1)
    yield Case(
        "another flow network by name, in cells",
        by_name,
        lambda a, b: F.avg_pool2d(by_name.network(a, b), 4) / 4,
        tuple(torch.rand(2, 3, 48, 64) for _ in range(2)),
        "the mean of its pixels' flow in each cell",
    )
    yield from dilated_features()
    maps, flow = torch.randn(2, 5, 7, 9), 3 * torch.randn(2, 2, 7, 9)
    yield Case(
        "warping, eq. (1)",
        warp,
        literal_warp,
        (maps, flow),
        "a sum over all places, sec. 3.2",
        gradients=True,
        rtol=1e-3,
        atol=1e-4,
    )
    vectors = torch.randn(2, 3, 6, 4, 5), torch.randn(2, 6, 4, 5)
    yield Case(
        "adaptive weights, eq. (3)", adaptive_weights, literal_weights, vectors, "place by place", gradients=True
    )

    model = lively(fgfa_rfcn_slim(num_classes=4)).eval()
    film = [torch.randn(2, 3, 48, 56) for _ in range(5)]
    for reach in (1, 3):
        yield Case(
            f"a video, K = {reach}, two side by side",
            lambda *frames, k=reach: list(model.stream(frames, k)),
            lambda *frames, k=reach: side_by_side(
                [algorithm_1(model, [f[b : b + 1] for f in frames], k) for b in range(2)]
            ),
            tuple(film),
            "algorithm 1, frame by frame, every feature computed anew",
            rtol=1e-3,
            atol=1e-3,
            note="boxes in pixels",
        )
    yield Case(
        "a video in one stream, and each window by itself",
        lambda *frames: list(model.stream(frames, 2)),
        lambda *frames: list(windowed(model, frames, 2)),
        tuple(film),
        "model(images) for each frame and its neighbours",
        rtol=1e-3,
        atol=1e-3,
    )
    once = copy.deepcopy(model)
    once.embed_once = True
    pointwise = copy.deepcopy(once)
    for m in (once, pointwise):  # an embedding of single places commutes with a shift by whole cells
        m.flow = WholeCells()
        kernel = m.embedding.em_conv2.weight
        kernel.data = torch.where(torch.arange(9).reshape(3, 3) == 4, kernel.data, 0.0)
        for layer in (m.embedding.em_conv1, m.embedding.em_conv2, m.embedding.em_conv3):
            nn.init.zeros_(layer.bias)
    pointwise.embed_once = False
    yield Case(
        "embedding once and warping it",
        lambda *frames: [x for outputs in once.stream(frames, 2) for x in outputs],
        lambda *frames: [x for outputs in pointwise.stream(frames, 2) for x in outputs],
        tuple(film),
        "embedding what was warped, where both must agree: an embedding of single places, motion by whole cells",
        rtol=1e-3,
        atol=1e-3,
    )
    yield from second_stage(model)

    model.rpn.sampled, model.roi_heads.hard = 10**6, 12
    targets = [
        {"boxes": torch.tensor([[5.0, 4, 26, 40], [30, 10, 50, 44]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    yield Case(
        "learning from frames with two neighbours: four losses and gradients",
        Learning(model.double(), doubled(targets), False),
        Learning(copy.deepcopy(model), doubled(targets), True),
        (torch.randn(2, 3, 3, 48, 56, dtype=torch.float64),),
        "eq. (1) to (3) frame by frame, the reference frame not among those that are summed",
        gradients=True,
        rtol=1e-3,
        note="every anchor is in the sample; one picture without objects; in float64 up to the warping, which is in 32 bits",
        atol=1e-3,
    )
    yield from chains_and_metrics()


SIZES = ((600, 1000), (337, 600), (64, 96), (65, 97), (562, 999))


def flow_size(height: int, width: int) -> tuple[int, int]:
    with torch.device("meta"):
        network, picture = FlowNetS(16, (4, 4, 4, 4, 4, 4), (4, 4, 4, 4)), torch.empty(1, 3, height, width)
    return tuple(network(picture, picture).shape[-2:])


class WholeCells(nn.Module):
    """A flow of one cell to the right."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first.new_tensor([1.0, 0.0])[None, :, None, None].expand(
            len(first), 2, -(-first.shape[2] // 4), -(-first.shape[3] // 4)
        )


def side_by_side(videos: Sequence[list[tuple[Tensor, ...]]]) -> list[tuple[Tensor, ...]]:
    return [tuple(torch.cat(parts) for parts in zip(*moment, strict=True)) for moment in zip(*videos, strict=True)]


def doubled(targets: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [t | {"boxes": t["boxes"].double()} for t in targets]


def dilated_features() -> Iterator[Case]:
    from torchvision.models import resnet50

    ours = lively(fgfa_rfcn_resnet50(num_classes=2).features).eval()
    theirs = resnet50(replace_stride_with_dilation=[False, False, True])
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.body.body.state_dict(), strict=False)
    theirs.layer4[0].conv2.dilation = theirs.layer4[0].conv2.padding = (
        2,
        2,
    )  # the whole stage, as in the released network
    theirs.eval()

    def reference(x: Tensor) -> Tensor:
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        x = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
        layer: nn.Conv2d = ours.feat_conv_3x3
        return F.conv2d(x, layer.weight, layer.bias, padding=6, dilation=6).relu()

    assert isinstance(ours, FeatureNetwork)
    with torch.no_grad():
        yield Case(
            "ResNet-50 of stride 16 and its 1024 channels",
            lambda x: ours(x),
            reference,
            (torch.randn(1, 3, 65, 96),),
            "torchvision 0.29.2 resnet50, its last stage dilated",
            rtol=1e-3,
            atol=1e-3,
        )


def second_stage(model: FGFA) -> Iterator[Case]:
    maps = torch.randn(2, 4 * 9, 11, 13)
    corner = torch.rand(40, 2) * torch.tensor([44.0, 36.0])
    regions = torch.cat([torch.arange(40)[:, None] % 2, corner, corner + 25 * torch.rand(40, 2)], 1)
    regions[0, 1:], regions[1, 1:] = torch.zeros(4), torch.tensor([0.0, 0.0, 52.0, 44.0])
    cut = torch.minimum(regions, torch.tensor([1.0, 52, 44, 52, 44]))  # as proposals are
    yield Case(
        "position-sensitive votes",
        lambda m: region_votes(m, cut, 3, 0.25),
        lambda m: literal_votes(m, cut, 3, 0.25),
        (maps,),
        "R-FCN's eq. (1), bin by bin",
        gradients=True,
        note="regions at the last row and column, and without extent",
    )
    yield Case(
        "position-sensitive votes of regions across the border",
        lambda m: region_votes(m, regions, 3, 0.25),
        lambda m: literal_votes(m, regions, 3, 0.25),
        (maps,),
        "R-FCN's eq. (1), bin by bin",
        note="without gradients: there, torchvision's backward pass divides by another number of places than its forward pass",
    )
    yield Case(
        "the same as an exported program has it",
        lambda: plain_pool(maps, regions, 3, 0.25).mean((2, 3)),
        lambda: region_votes(maps, regions, 3, 0.25),
        against="torchvision.ops.ps_roi_pool",
    )
    features = torch.randn(2, 32, 12, 14)
    proposals = torch.cat([regions[:20:2, 1:], regions[1:20:2, 1:]]).reshape(2, 10, 4)
    targets = [
        {"boxes": torch.tensor([[4.0, 4, 24, 40], [20, 8, 50, 40]]), "labels": torch.tensor([0, 2])},
        {"boxes": torch.tensor([[10.0, 10, 30, 30]]), "labels": torch.tensor([3])},
    ]
    hard = copy.deepcopy(model)
    hard.roi_heads.hard = 6
    yield Case(
        "losses of the six hardest regions of each picture",
        lambda f: hard.roi_heads.loss(f, proposals, targets),
        lambda f: literal_losses(hard, f, proposals, targets),
        (features,),
        "region by region",
        gradients=True,
    )
    with torch.no_grad():
        outputs = proposals, *model.roi_heads(features, proposals)
        found = model.postprocess(outputs, torch.tensor([[48, 56], [40, 50]]), (48, 56))
    assert all(len(objects["boxes"]) > 4 for objects in found), "too few detections to compare"
    sizes = torch.tensor([[48, 56], [40, 50]])
    yield Case(
        "detections",
        lambda *o: model.postprocess(o, sizes, (48, 56)),
        lambda *o: literal_detections(model, o, sizes),
        outputs,
        "box by box, with torchvision's nms for each class",
        rtol=1e-3,
    )


def chains_and_metrics() -> Iterator[Case]:
    film = random_film(14, 6, 3)
    found = [f for f, *_ in film]
    yield Case(
        "Seq-NMS",
        lambda: as_rows(sequence_nms(found)),
        lambda: literal_chains(found),
        against="chains in lists, class by class",
        atol=2e-4,
        note="scores rounded to the fourth digit, by which the lists are ordered",
    )
    ap = VideoAP(3)
    for detections, truth, speed in film:
        ap.update(detections, truth, speed)
    yield Case(
        "mean average precision, over all and by speed",
        lambda: [ap.mean_ap(limits) for limits in ((0.0, 1.0), *SPEEDS.values())],
        lambda: [literal_ap(film, 3, limits) for limits in ((0.0, 1.0), *SPEEDS.values())],
        against="the released evaluation's rules, detection by detection",
    )
    truth = [t for _, t, _ in film]
    yield Case(
        "motion IoU",
        lambda: motion_iou(range(14), truth),
        lambda: [torch.tensor(r) for r in literal_motion(truth)],
        against="box by box",
    )
