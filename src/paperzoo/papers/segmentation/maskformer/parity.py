"""MaskFormer against transformers': masks and classes, matching, losses, gradients, both kinds of inference; its encoder against DETR's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.backbones import Backbone
from paperzoo.blocks.panoptic import PanopticMap
from paperzoo.data.panoptic import PanopticScenes
from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.segmentation.maskformer.decoder import EncoderLayer, sine_positions
from paperzoo.papers.segmentation.maskformer.model import (
    MaskFormer,
    SemanticMaskFormer,
    at_size,
    from_official,
    marginal,
    maskformer_panoptic_resnet50,
    maskformer_panoptic_resnet101,
    maskformer_resnet50,
    maskformer_resnet101,
    maskformer_swin_base,
    maskformer_swin_large,
    maskformer_swin_small,
    maskformer_swin_tiny,
)
from paperzoo.papers.segmentation.maskformer.recipe import OneThing
from paperzoo.papers.segmentation.maskformer.swin import Swin
from paperzoo.papers.segmentation.maskformer.technique import SetMaskLoss, mask_costs

VARIANTS = (
    maskformer_resnet50,
    maskformer_resnet101,
    maskformer_swin_tiny,
    maskformer_swin_small,
    maskformer_swin_base,
    maskformer_swin_large,
    maskformer_panoptic_resnet50,
    maskformer_panoptic_resnet101,
)
SOURCE = "transformers 5.23.0 MaskFormerForInstanceSegmentation"
CLASSES, THINGS = 5, (0, 1, 2)
THING_OR_STUFF = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 3, 4, -1])  # of six things, four kinds of stuff and nothing
SMALL = {"queries": 9, "width": 32, "heads": 4, "hidden": 48, "depth": 3, "channels": 64, "drop_rate": 0.0}


def theirs_of(ours: MaskFormer, body: dict[str, Any], sizes: dict[str, int]) -> nn.Module:
    """transformers' network of the same shape, on a ResNet or, if `body` has windows, on a Swin; its weights go into ours."""
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, ResNetConfig, SwinConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    kind = SwinConfig if "window_size" in body else ResNetConfig
    decoder = DetrConfig(
        d_model=sizes["width"],
        num_queries=sizes["queries"],
        decoder_layers=sizes["depth"],
        decoder_attention_heads=sizes["heads"],
        encoder_attention_heads=sizes["heads"],
        decoder_ffn_dim=sizes["hidden"],
        dropout=0.0,
    )
    config = MaskFormerConfig(
        backbone_config=kind(out_features=stages, **body),
        decoder_config=decoder,
        fpn_feature_size=sizes["channels"],
        mask_feature_size=sizes["channels"],
        num_labels=ours.num_classes,
    )
    theirs = MaskFormerForInstanceSegmentation(config)
    for name, value in theirs.named_parameters():  # their batch norms start near zero, which hides what is behind them
        if name.endswith(("normalization.weight", "layernorm_before.weight", "hidden_states_norms.0.weight")):
            nn.init.uniform_(value, 0.5, 1.5)
        elif name.endswith(("bias_table", "query.bias", "value.bias")):
            nn.init.normal_(value, std=0.5)
    ours.load_state_dict(from_official(theirs.state_dict()))
    return theirs


def basic() -> tuple[MaskFormer, nn.Module]:
    """Both sides on ResNet-18."""
    ours = MaskFormer(Backbone(resnet18()), CLASSES, THINGS, **SMALL)
    return ours, theirs_of(ours, {"layer_type": "basic", "depths": [2] * 4, "hidden_sizes": [64, 128, 256, 512]}, SMALL)


def on_swin() -> tuple[MaskFormer, nn.Module]:
    """Both sides on a small Swin."""
    ours = MaskFormer(Backbone(Swin(24, (2, 2, 2, 2), (1, 2, 4, 8), 4, 0.0)), CLASSES, THINGS, **SMALL)
    body = {"embed_dim": 24, "depths": [2] * 4, "num_heads": [1, 2, 4, 8], "window_size": 4, "drop_path_rate": 0.0}
    return ours, theirs_of(ours, body, SMALL)


def some_targets(height: int, width: int) -> list[dict[str, Tensor]]:
    """Two things on two kinds of stuff and a strip of nothing; and an image of one kind of stuff alone."""
    semantic = torch.full((height, width), 3)
    semantic[height // 2 :] = 4
    semantic[height // 2 - 2 : height // 2] = 255
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 5:30, 8:25], masks[1, 20:50, 40:60] = True, True
    semantic[masks[0]], semantic[masks[1]] = 1, 0
    empty = {"masks": masks[:0], "labels": torch.zeros(0, dtype=torch.int64)}
    return [
        {"masks": masks, "labels": torch.tensor([1, 0]), "semantic": semantic},
        empty | {"semantic": torch.full((height, width), 4)},
    ]


def labelled(targets: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Masks and classes of each image, written out."""
    first, second = targets
    masks = [torch.cat([first["masks"], torch.stack([first["semantic"] == 3, first["semantic"] == 4])])]
    masks.append((second["semantic"] == 4)[None])
    return [m.float() for m in masks], [torch.tensor([1, 0, 3, 4]), torch.tensor([4])]


def gradients_by_name(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)  # their Swin has a norm that nothing depends on
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


class Training:
    """One step of learning: the loss and the gradient of every parameter."""

    def __init__(self, model: nn.Module, targets: list[dict[str, Tensor]]) -> None:
        self.model, self.targets = model.train(), targets

    def __call__(self, images: Tensor) -> dict[str, Any]:
        if isinstance(self.model, MaskFormer):
            loss = sum(self.model(images, self.targets).values())
            return {"loss": loss} | gradients_by_name(loss, self.model)
        masks, labels = labelled(self.targets)
        masks = [m.to(images.dtype) for m in masks]
        loss = self.model(images, mask_labels=masks, class_labels=labels).loss
        return {"loss": loss} | from_official(gradients_by_name(loss, self.model))


def their_loss(classes: list[Tensor], masks: list[Tensor], labels: list[Tensor], goal: list[Tensor]) -> Tensor:
    """transformers' loss of the last prediction and of the ones before it."""
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

    matcher = MaskFormerHungarianMatcher(1.0, 20.0, 1.0)
    weights = {"loss_cross_entropy": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}
    criterion = MaskFormerLoss(CLASSES, matcher, weights, 0.1)
    before = [
        {"masks_queries_logits": m, "class_queries_logits": c} for c, m in zip(classes[:-1], masks[:-1], strict=True)
    ]
    losses = criterion(masks[-1], classes[-1], [m.float() for m in goal], labels, before)
    return sum(
        weight * loss for key, weight in weights.items() for name, loss in losses.items() if name.startswith(key)
    )


def cut_after(theirs: nn.Module, depth: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers answers with its first decoder layers alone."""
    layers = theirs.model.transformer_module.decoder.layers
    theirs.model.transformer_module.decoder.layers = layers[:depth]
    with torch.no_grad():
        found = theirs(images)
    theirs.model.transformer_module.decoder.layers = layers
    return found.class_queries_logits, found.masks_queries_logits


def their_costs(logits: Tensor, masks: Tensor) -> Tensor:
    from transformers.models.maskformer.modeling_maskformer import pair_wise_dice_loss, pair_wise_sigmoid_focal_loss

    pairs = zip(logits, masks, strict=True)
    return torch.stack([20 * pair_wise_sigmoid_focal_loss(a, b) + pair_wise_dice_loss(a, b) for a, b in pairs])


# -- inference ---------------------------------------------------------------------------------------------------------


def plain(found: PanopticMap) -> dict[str, Any]:
    """A map as tensors: ids, and category, score and area of each segment."""
    rows = [[s.id, s.category, s.score, int((found.ids == s.id).sum()) - s.area] for s in found.segments]
    return {"ids": found.ids, "segments": torch.tensor(rows).reshape(-1, 4)}


def their_segments(classes: Tensor, masks: Tensor) -> dict[str, Any]:
    """transformers' compute_segments of one image; pixels of no segment are 0 there too."""
    from transformers.models.maskformer.image_processing_maskformer import compute_segments, remove_low_and_no_objects

    scores, labels = classes.softmax(-1).max(-1)
    kept = remove_low_and_no_objects(masks.sigmoid(), scores, labels, 0.8, CLASSES)
    ids, found = compute_segments(*kept, label_ids_to_fuse={3, 4})
    seen: dict[int, dict] = {}
    for entry in found:  # a fused segment is listed once for each of its pieces
        seen.setdefault(entry["id"], entry)
    rows = [[s["id"], s["label_id"], s["score"], 0] for s in seen.values()]
    return {"ids": ids.long(), "segments": torch.tensor(rows).reshape(-1, 4)}


def one_by_one(classes: Tensor, masks: Tensor, least: float, overlap: float) -> dict[str, Any]:
    """Sec. 3.4 query by query, as the released code has it: a mask's own size is that of its probabilities, not weighed."""
    probability, result, rows = masks.sigmoid(), torch.zeros(masks.shape[-2:], dtype=torch.int64), []
    scores, labels = classes.softmax(-1).max(-1)
    kept = [i for i in range(len(scores)) if labels[i] != CLASSES and scores[i] > least]
    weighed = torch.stack([scores[i] * probability[i] for i in kept])
    stuff: dict[int, int] = {}
    for k, i in enumerate(kept):
        mine, whole = weighed.argmax(0) == k, int((probability[i] >= 0.5).sum())
        if not int(mine.sum()) or not whole or int(mine.sum()) / whole < overlap:
            continue
        category = int(labels[i])
        if category not in THINGS and category in stuff:
            result[mine] = stuff[category]
            continue
        rows.append([len(rows) + 1, category, float(scores[i]), 0])
        stuff[category] = len(rows)
        result[mine] = len(rows)
    return {"ids": result, "segments": torch.tensor(rows).reshape(-1, 4)}


def blobs(queries: int, height: int, width: int) -> Tensor:
    """Mask logits of discs that overlap a little."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    middle, radius = torch.rand(queries, 2, 1, 1), 0.15 + 0.15 * torch.rand(queries, 1, 1)
    return 40 * (radius - ((y - middle[:, 0]) ** 2 + (x - middle[:, 1]) ** 2).sqrt()) + 0.3 * torch.randn(
        queries, height, width
    )


def read(model: MaskFormer, classes: Tensor, masks: Tensor) -> dict[str, Any]:
    """`postprocess` of one image whose mask logits have its size already."""
    size = tuple(masks.shape[-2:])
    found = plain(model.postprocess((classes[None], masks[None]), torch.tensor([size]), size, [size])[0])
    assert len(found["segments"]) > 2, "too few segments to compare"
    return found


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    ours, theirs = basic()
    images, targets = torch.randn(2, 3, 64, 96), some_targets(64, 96)

    def answered(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = theirs.eval()(x)
        return found.class_queries_logits, found.masks_queries_logits

    for size in ((64, 96), (96, 64), (70, 41)):
        x = torch.randn(1 if size[0] == 96 else 2, 3, *size)
        yield Case(f"classes and masks, {size[0]} x {size[1]}", ours.eval(), answered, (x,), SOURCE)
    states = ours.predictions(images, every=True)
    for depth in (1, 2):
        yield Case(
            f"the answer after decoder layer {depth}",
            lambda x, i=depth - 1: (states[0][i].detach(), states[1][i].detach()),
            lambda x, n=depth: cut_after(theirs, n, x),
            (images,),
            f"{SOURCE} without the layers behind it",
        )
    ours.deep = False
    yield Case(
        "loss and gradients of all parameters, train mode",
        Training(ours.double(), targets),
        Training(theirs.double(), targets),
        (images.double(),),
        SOURCE,
        note="in float64; of the last prediction: their intermediate ones lack the last layer norm",
    )
    ours.float().deep = True
    stored = {n: v.detach() for n, v in theirs.float().state_dict().items()}
    older = {n.replace(".o_proj.", ".out_proj.").replace(".mlp.fc", ".fc"): v for n, v in stored.items()}
    yield Case(
        "names of transformers 4",
        lambda: from_official(older),
        lambda: {name: stored_as(stored, name) for name in ours.state_dict()},
        against="the files' names, by hand",
    )
    layers, (goal, labels) = 3, labelled(targets)
    classes = [torch.randn(2, 9, CLASSES + 1) for _ in range(layers)]
    masks = [2 * torch.randn(2, 9, 16, 24) for _ in range(layers)]
    yield Case(
        "deep supervision: the losses of three predictions",
        lambda: sum(SetMaskLoss(CLASSES)(classes, masks, labels, [m.bool() for m in goal]).values()),
        lambda: their_loss(classes, masks, labels, goal),
        against="transformers 5.23.0 MaskFormerLoss",
    )
    flat = masks[0].flatten(2), (torch.rand(2, 4, 16 * 24) > 0.6).float()
    yield Case("costs of all pairs", mask_costs, their_costs, flat, "transformers 5.23.0 pair_wise_*_loss", rtol=1e-5)
    none = [labels[0][:0]] * 2, [goal[0][:0].bool()] * 2
    yield Case(
        "no segment in any image: every query says nothing",
        lambda: SetMaskLoss(CLASSES)(classes[:1], masks[:1], *none),
        lambda: {
            "classification": -classes[0].log_softmax(-1)[..., -1].mean(),
            "masks": torch.zeros(()),
            "dice": torch.zeros(()),
        },
        against="L_mask-cls with nothing to match",
    )

    discs, sure = blobs(9, 40, 56), 20 * F.one_hot(torch.tensor([0, 3, 5, 3, 1, 4, 0, 2, 3]), CLASSES + 1).float()
    yield Case(
        "panoptic inference of sure queries",
        lambda c, m: read(ours, c, m),
        their_segments,
        (sure, discs),
        "transformers 5.23.0 compute_segments",
        note="they weigh a mask with its score before they measure it, which makes no difference here",
    )
    unsure = sure / 8 + 0.3 * torch.randn(9, CLASSES + 1)
    ours.confidence, ours.overlap = 0.5, 0.6
    yield Case(
        "panoptic inference of unsure queries",
        lambda c, m: read(ours, c, m),
        lambda c, m: one_by_one(c, m, 0.5, 0.6),
        (unsure, discs),
        "sec. 3.4, query by query",
    )
    yield Case(
        "semantic inference",
        lambda c, m: marginal(c, m).argmax(1),
        their_semantic,
        (classes[0], masks[0]),
        "transformers 5.23.0 post_process_semantic_segmentation",
    )
    yield Case(
        "masks of an image that is smaller than the canvas, at its original size",
        lambda m: at_size(m, (48, 80), (64, 96), (33, 55)),
        lambda m: torch.stack([resized_alone(mask) for mask in m]),
        (masks[0][0],),
        "each mask alone",
    )
    alone = SemanticMaskFormer(Backbone(resnet18()), CLASSES, **SMALL)
    alone.load_state_dict(ours.state_dict())
    semantic = [{"semantic": t["semantic"]} for t in targets]
    yield Case(
        "semantic segmentation: the categories of pixels",
        lambda x: alone.eval()(x).argmax(1),
        lambda x: torch.stack(ours.eval().semantic(ours(x), torch.tensor([[64, 96]] * 2), (64, 96), [(64, 96)] * 2)),
        (images,),
        "the panoptic network's semantic inference",
    )
    yield Case(
        "semantic segmentation: the loss is that of one mask for each category",
        lambda x: sum(alone.train()(x, semantic).values()).detach(),
        lambda x: by_category(ours.train(), x, semantic).detach(),
        (images,),
        "segments written out",
    )
    yield Case(
        "things as one category",
        lambda: torch.stack([item["map"].semantic for item in OneThing(PanopticScenes("train", 4, 64))]),
        lambda: torch.stack([THING_OR_STUFF[item["map"].semantic] for item in PanopticScenes("train", 4, 64)]),
        against="categories by hand",
    )
    yield from swin()
    yield from encoder()
    yield Case(
        "parameters in millions: R50, R101, Swin-T, S, B, L; R50 and R101 with six encoder layers",
        lambda: [millions(f) for f in VARIANTS],
        lambda: [41, 60, 42, 63, 102, 212, 45, 64],
        against="the paper's tables",
    )
    yield published()


def stored_as(stored: dict[str, Tensor], name: str) -> Tensor:
    """One of our parameters in their state."""
    part, _, rest = name.partition(".")
    encoder = "model.pixel_level_module.encoder."
    if part == "backbone":
        _, layer, *inside, kind = rest.split(".")
        norm = "normalization" if layer.startswith("bn") or (inside and inside[1] in ("bn1", "bn2")) else "convolution"
        if not inside:
            return stored[f"{encoder}embedder.embedder.{norm}.{kind}"]
        block, what = f"{encoder}encoder.stages.{int(layer[5:]) - 1}.layers.{inside[0]}", inside[1]
        if what == "downsample":
            return stored[f"{block}.shortcut.{('convolution', 'normalization')[int(inside[2])]}.{kind}"]
        return stored[f"{block}.layer.{int(what[-1]) - 1}.{norm}.{kind}"]
    if part == "pixel_decoder":
        place = "" if rest.startswith("mask_projection") else "fpn."
        return stored[f"model.pixel_level_module.decoder.{place}{rest}"]
    if part in ("class_predictor", "mask_embedder"):
        return stored[name]
    their_name = {"queries": "queries_embedder"}.get(part, part)
    rest = rest.replace("out_proj", "o_proj").replace(".fc", ".mlp.fc")
    return stored[f"model.transformer_module.{their_name}.{rest}"]


def their_semantic(classes: Tensor, masks: Tensor) -> Tensor:
    from transformers.models.maskformer.image_processing_maskformer import MaskFormerImageProcessor

    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    return torch.stack(MaskFormerImageProcessor().post_process_semantic_segmentation(outputs))


def resized_alone(mask: Tensor) -> Tensor:
    whole = F.interpolate(mask[None, None], (64, 96), mode="bilinear")[..., :48, :80]
    return F.interpolate(whole, (33, 55), mode="bilinear")[0, 0]


def by_category(model: MaskFormer, images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
    classes, masks = model.predictions(images, every=True)
    present = [sorted(set(t["semantic"].flatten().tolist()) - {255}) for t in targets]
    goal = [torch.stack([t["semantic"] == k for k in found]) for t, found in zip(targets, present, strict=True)]
    return sum(model.criterion(classes, masks, [torch.tensor(found) for found in present], goal).values())


def encoder() -> Iterator[Case]:
    """DETR's encoder layer and encodings of position."""
    from transformers import DetrConfig
    from transformers.models.detr.modeling_detr import DetrEncoderLayer
    from transformers.models.maskformer.modeling_maskformer import MaskFormerSinePositionEmbedding

    torch.manual_seed(1)
    layer = EncoderLayer(32, 4, 48, 0.0).eval()
    config = DetrConfig(d_model=32, encoder_attention_heads=4, encoder_ffn_dim=48, dropout=0.0)
    config._attn_implementation = "eager"
    theirs = DetrEncoderLayer(config).eval()
    state = {n.replace("out_proj", "o_proj").replace("fc", "mlp.fc"): v for n, v in layer.state_dict().items()}
    theirs.load_state_dict(state)
    positions = sine_positions(5, 7, 32, torch.zeros(()))

    def answered(x: Tensor, where: Tensor) -> Tensor:
        found = theirs(x, None, spatial_position_embeddings=where.expand(len(x), -1, -1))
        return found[0] if isinstance(found, tuple) else found

    x = torch.randn(2, 35, 32)
    yield Case("an encoder layer", layer, answered, (x, positions), "transformers 5.23.0 DetrEncoderLayer")
    embedding = MaskFormerSinePositionEmbedding(16, normalize=True)
    yield Case(
        "encodings of position",
        lambda: sine_positions(5, 7, 32, torch.zeros(())),
        lambda: embedding(torch.Size((1, 32, 5, 7)), "cpu", torch.float32)[0].flatten(1).T,
        against="transformers 5.23.0 MaskFormerSinePositionEmbedding",
    )


def swin() -> Iterator[Case]:
    """The same comparisons on a Swin; with sizes that windows and strides do not divide."""
    torch.manual_seed(2)
    ours, theirs = on_swin()

    def answered(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = theirs.eval()(x)
        return found.class_queries_logits, found.masks_queries_logits

    for size in ((64, 96), (70, 41)):
        x = torch.randn(2, 3, *size)
        yield Case(f"on Swin: classes and masks, {size[0]} x {size[1]}", ours.eval(), answered, (x,), SOURCE)
    body = ours.backbone.body
    images = torch.randn(2, 3, 64, 96)
    yield Case(
        "Swin's four maps",
        lambda x: [m.detach() for m in body.stages(x)],
        lambda x: [m.detach() for m in theirs.model.pixel_level_module.encoder(x).feature_maps],
        (images,),
        "transformers 5.23.0 MaskFormerSwinBackbone",
    )
    ours.deep, targets = False, some_targets(64, 96)
    yield Case(
        "on Swin: loss and gradients of all parameters, train mode",
        Training(ours.double(), targets),
        Training(theirs.double(), targets),
        (images.double(),),
        SOURCE,
        note="in float64",
    )


def millions(function: Any) -> int:
    with torch.device("meta"):
        return round(sum(p.numel() for p in function().parameters()) / 1e6)


def published() -> Case:
    """transformers' network on ResNet-50 for ADE20K's classes, all weights by name."""
    torch.manual_seed(0)
    ours = maskformer_resnet50().eval()
    sizes = {"queries": 100, "width": 256, "heads": 8, "hidden": 2048, "depth": 6, "channels": 256}
    theirs = theirs_of(ours, {}, sizes).eval()

    def answered(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = theirs(x)
        return found.class_queries_logits, found.masks_queries_logits

    return Case(
        "maskformer_resnet50, from a normalised image",
        lambda x: tuple(t.detach() for t in MaskFormer.forward(ours, x)),
        answered,
        (torch.randn(1, 3, 64, 96),),
        f"{SOURCE} on ResNet-50",
        atol=1e-4,
    )


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: from normalised images to classes and masks of a hundred queries."""
    sizes = {"queries": 100, "width": 256, "heads": 8, "hidden": 2048, "depth": 6, "channels": 256}

    def ours() -> nn.Module:
        torch.manual_seed(0)
        return MaskFormer(Backbone(resnet18()), 150, drop_rate=0.0)

    def theirs() -> nn.Module:
        body = {"layer_type": "basic", "depths": [2] * 4, "hidden_sizes": [64, 128, 256, 512]}
        return Answers(theirs_of(ours(), body, sizes))

    return {
        "maskformer_resnet18": Pair(
            ours, theirs, lambda batch: (torch.randn(batch, 3, 256, 256),), "transformers:MaskFormer", train_batch=2
        )
    }


class Answers(nn.Module):
    """transformers' network with a tuple as its answer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.network(images)
        return found.class_queries_logits, found.masks_queries_logits
