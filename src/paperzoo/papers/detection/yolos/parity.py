"""YOLOS against transformers: raw outputs, losses with gradients, detections; checkpoints of every origin; the matching by brute force."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.detection.yolos.model import YOLOS, from_official, interpolated, yolos_mini, yolos_tiny
from paperzoo.papers.detection.yolos.technique import SetLoss, corners, match, pairwise_giou

PEER = "transformers 5.23.0 YolosForObjectDetection"

# -- transformers ------------------------------------------------------------------------------------------------------

SMALL = {  # two small networks, one with positions after each layer; heights and widths that patches divide and do not
    "positions once": {
        "width": 48,
        "depth": 3,
        "heads": 3,
        "hidden": 96,
        "image_size": (64, 96),
        "mid_positions": False,
    },
    "positions in each layer": {
        "width": 64,
        "depth": 4,
        "heads": 4,
        "hidden": 128,
        "image_size": (96, 64),
        "mid_positions": True,
    },
}


def their_model(options: dict[str, Any], tokens: int = 12, classes: int = 7) -> nn.Module:
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=options["width"],
        num_hidden_layers=options["depth"],
        num_attention_heads=options["heads"],
        intermediate_size=options["hidden"],
        image_size=list(options["image_size"]),
        use_mid_position_embeddings=options["mid_positions"],
        num_detection_tokens=tokens,
        num_labels=classes,
        layer_norm_eps=1e-6,
    )
    return YolosForObjectDetection(config)


def alike(options: dict[str, Any]) -> tuple[YOLOS, nn.Module]:
    """Ours and theirs with the same weights, all of them random: theirs starts tokens and positions at zero."""
    ours, theirs = YOLOS(**options, patch=16, tokens=12, num_classes=7), their_model(options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.25 if parameter.ndim > 1 else 0.1)
    ours.load_state_dict(from_official(theirs.state_dict()))
    return ours.eval(), theirs.eval()


def pixels_to_parts(boxes: Tensor, canvas: tuple[int, int]) -> Tensor:
    return box_convert(boxes, "xyxy", "cxcywh") / torch.tensor([canvas[1], canvas[0]] * 2)


class TheirRaw(nn.Module):
    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.vit, self.detector = detector.vit, [detector]
        self.class_labels_classifier, self.bbox_predictor = detector.class_labels_classifier, detector.bbox_predictor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.detector[0](images)
        return found.logits, found.pred_boxes


class TheirLoss(TheirRaw):
    def __init__(self, detector: nn.Module, targets: list[dict[str, Tensor]]) -> None:
        super().__init__(detector)
        self.targets = targets

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        canvas = tuple(images.shape[-2:])
        labels = [{"class_labels": t["labels"], "boxes": pixels_to_parts(t["boxes"], canvas)} for t in self.targets]
        found = self.detector[0](images, labels=labels)
        parts = found.loss_dict
        losses = {"classification": parts["loss_ce"], "boxes": 5 * parts["loss_bbox"], "giou": 2 * parts["loss_giou"]}
        return losses | {"sum": found.loss}


class OurLoss(nn.Module):
    def __init__(self, detector: YOLOS, targets: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.vit, self.detector, self.targets = detector.vit, [detector], targets
        self.class_labels_classifier, self.bbox_predictor = detector.class_labels_classifier, detector.bbox_predictor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        losses = self.detector[0](images, self.targets)
        return losses | {"sum": sum(losses.values())}


def their_detections(detector: nn.Module, images: Tensor, threshold: float) -> list[dict[str, Tensor]]:
    """Their image processor's answers, best first, cut to the image."""
    from transformers import YolosImageProcessor

    canvas = tuple(images.shape[-2:])
    with torch.no_grad():
        found = detector(images)
    answers = YolosImageProcessor().post_process_object_detection(
        found, threshold, target_sizes=torch.tensor([canvas] * len(images))
    )
    limit, result = torch.tensor([canvas[1], canvas[0]] * 2), []
    for objects in answers:
        order = objects["scores"].argsort(descending=True)
        boxes = objects["boxes"].clamp(min=0).minimum(limit)
        result.append({"boxes": boxes[order], "scores": objects["scores"][order], "labels": objects["labels"][order]})
    return result


def our_detections(detector: YOLOS, images: Tensor, threshold: float) -> list[dict[str, Tensor]]:
    canvas = tuple(images.shape[-2:])
    detector.score_threshold = threshold
    with torch.no_grad():
        return detector.postprocess(detector(images), torch.tensor([canvas] * len(images)), canvas)


def some_targets(canvas: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Two equal boxes of different classes, one of a pixel; none at all; as many as there are tokens."""
    height, width = canvas
    boxes = torch.tensor([[4.0, 5, 40, 50], [4, 5, 40, 50], [20, 20, 21, 21], [0, 0, width, height]])
    corner = torch.rand(12, 2) * torch.tensor([width - 30.0, height - 30.0])
    return [
        {"boxes": boxes, "labels": torch.tensor([0, 3, 2, 6])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        {
            "boxes": torch.cat([corner, corner + 2 + torch.rand(12, 2) * 28], dim=1),
            "labels": torch.randint(7, (12,)),
        },
    ]


# -- slow versions -----------------------------------------------------------------------------------------------------


def brute_force(logits: Tensor, predicted: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """One image: the query of each object among all ways to choose them, and what the best costs."""
    probability = logits.softmax(-1)
    overlap = generalized_box_iou(
        box_convert(predicted, "cxcywh", "xyxy").double(), box_convert(boxes, "cxcywh", "xyxy").double()
    )
    cost = [
        [
            float(5 * (predicted[q] - boxes[t]).abs().sum() - probability[q, labels[t]] - 2 * overlap[q, t])
            for q in range(len(logits))
        ]
        for t in range(len(boxes))
    ]
    best = min(permutations(range(len(logits)), len(boxes)), key=lambda way: sum(cost[t][q] for t, q in enumerate(way)))
    return torch.tensor(best), sum(cost[t][q] for t, q in enumerate(best))


def authors_names(model: YOLOS) -> dict[str, Tensor]:
    """A state dict as the authors' code saves it: timm's names, queries, keys and values in one."""
    state = {}
    for name, value in model.state_dict().items():
        if ".attention.attention." in name:
            continue
        for new, old in (
            ("vit.embeddings.cls_token", "backbone.cls_token"),
            ("vit.embeddings.detection_tokens", "backbone.det_token"),
            ("vit.embeddings.position_embeddings", "backbone.pos_embed"),
            ("vit.encoder.mid_position_embeddings", "backbone.mid_pos_embed"),
            ("vit.embeddings.patch_embeddings.projection", "backbone.patch_embed.proj"),
            ("vit.encoder.layer", "backbone.blocks"),
            ("vit.layernorm", "backbone.norm"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("class_labels_classifier", "class_embed"),
            ("bbox_predictor", "bbox_embed"),
        ):
            name = name.replace(new, old)
        state[name] = value
    for i, layer in enumerate(model.vit.encoder.layer):
        maps = layer.attention.attention
        for part in ("weight", "bias"):
            joined = torch.cat([getattr(m, part).detach() for m in (maps.query, maps.key, maps.value)])
            state[f"backbone.blocks.{i}.attn.qkv.{part}"] = joined
    return state


# -- the cases ---------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for name, options in SMALL.items():
        ours, theirs = alike(options)
        for shape in ((2, 3, 64, 96), (1, 3, 112, 80), (3, 3, 70, 101)):
            yield Case(
                f"{name}: outputs at {shape[2]} x {shape[3]} pixels",
                ours,
                TheirRaw(theirs),
                (torch.randn(shape),),
                PEER,
                gradients=True,
                rtol=1e-3,
                atol=1e-4,
            )
        for mode, canvas in (("eval", (64, 96)), ("train", (80, 112))):
            targets = some_targets(canvas)
            yield Case(
                f"{name}: losses and gradients, {mode} mode; equal boxes, an empty image, an object for each token",
                OurLoss(ours, targets).train(mode == "train"),
                TheirLoss(theirs, targets).train(mode == "train"),
                (torch.randn(3, 3, *canvas),),
                PEER,
                gradients=True,
                rtol=1e-3,
                atol=1e-3,
            )
        ours.eval(), theirs.eval()
        for threshold in (0.0, 0.3):
            images = torch.randn(2, 3, 64, 96)
            yield Case(
                f"{name}: detections above {threshold}",
                lambda o=ours, x=images, t=threshold: our_detections(o, x, t),
                lambda m=theirs, x=images, t=threshold: their_detections(m, x, t),
                against="transformers 5.23.0 YolosImageProcessor",
            )
    yield from checkpoint_cases()
    yield from loss_cases()


def checkpoint_cases() -> Iterator[Case]:
    """Files of every origin."""
    torch.manual_seed(1)
    options = SMALL["positions in each layer"]
    source, other = (YOLOS(**options, tokens=12, num_classes=7) for _ in range(2))

    def loaded(state: dict[str, Tensor]) -> dict[str, Tensor]:
        other.load_state_dict(from_official(state))
        return other.state_dict()

    newer = {k.replace("encoder.mid_", "encoder.interpolation.mid_"): v for k, v in source.state_dict().items()}
    for name, state in (
        ("the published", source.state_dict()),
        ("transformers 5's", newer),
        ("the authors'", authors_names(source)),
    ):
        yield Case(
            f"weights under {name} names",
            lambda s=state: {k: v.clone() for k, v in loaded(s).items()},
            source.state_dict,
            against="the weights they were made of",
            rtol=0,
            atol=0,
        )
    from timm import create_model

    classifier = create_model("deit_tiny_patch16_224", num_classes=5).eval()
    detector = yolos_tiny(num_classes=5, image_size=(224, 224)).eval()
    detector.load_backbone(classifier.state_dict())

    def without_tokens(images: Tensor) -> Tensor:
        """The classifier's sequence through our layers."""
        embeddings = detector.vit.embeddings
        x = torch.cat([embeddings.cls_token.expand(len(images), -1, -1), embeddings.patch_embeddings(images)], dim=1)
        x = x + embeddings.position_embeddings[:, :197]
        for layer in detector.vit.encoder.layer:
            x = layer(x)
        return detector.vit.layernorm(x)

    yield Case(
        "DeiT's weights as a start",
        without_tokens,
        classifier.forward_features,
        (torch.randn(2, 3, 224, 224),),
        "timm 1.0.31 deit_tiny_patch16_224",
        rtol=1e-3,
        atol=1e-4,
    )
    large = yolos_tiny(num_classes=5, image_size=(256, 320))
    large.load_backbone(classifier.state_dict())

    def stretched() -> Tensor:
        grid = classifier.pos_embed[:, 1:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
        return F.interpolate(grid, (16, 20), mode="bicubic").flatten(2).transpose(1, 2)

    yield Case(
        "its positions for another size",
        lambda: large.vit.embeddings.position_embeddings[:, 1:321].detach(),
        lambda: stretched().detach(),
        against="torch.nn.functional.interpolate",
    )
    positions = torch.randn(2, 1 + 12 + 5, 4)
    yield Case(
        "positions at the size they are stored for, and of tokens",
        lambda: (
            interpolated(positions, (3, 4), (3, 4), 5),
            interpolated(positions, (3, 4), (6, 9), 5)[:, [0, -5, -1]],
        ),
        lambda: (positions, positions[:, [0, -5, -1]]),
        against="no change",
    )


def loss_cases() -> Iterator[Case]:
    torch.manual_seed(2)
    logits, predicted = torch.randn(3, 7, 5), torch.rand(3, 7, 4)
    counts = (3, 0, 4)
    boxes, labels = 0.1 + 0.6 * torch.rand(7, 4), torch.randint(4, (7,))
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    row, query = match(logits, predicted, boxes, labels, owner)
    yield Case(
        "the cheapest matching",
        lambda: (row, query),
        lambda: (
            torch.arange(7),
            torch.cat([brute_force(logits[i], predicted[i], boxes[owner == i], labels[owner == i])[0] for i in (0, 2)]),
        ),
        against="all ways to choose",
    )
    many = torch.rand(9, 4) * 0.5 + 0.1
    yield Case(
        "more objects than tokens",
        lambda: len(
            match(logits, predicted, many, labels[:1].expand(9), torch.zeros(9, dtype=torch.int64))[1].unique()
        ),
        lambda: 7,
        against="each token at most one object",
    )
    nothing = torch.zeros(0, dtype=torch.int64)
    weight = torch.tensor([1.0, 1, 1, 1, 0.1])
    yield Case(
        "losses without objects",
        lambda: SetLoss(4)(logits, predicted, torch.zeros(0, 4), nothing, nothing),
        lambda: {
            "classification": F.cross_entropy(logits.flatten(0, 1), torch.full((21,), 4), weight),
            "boxes": torch.tensor(0.0),
            "giou": torch.tensor(0.0),
        },
        against="cross-entropy with nothing",
    )
    some = box_convert(0.1 + torch.rand(6, 4) * 0.5, "cxcywh", "xyxy")
    yield Case(
        "generalised IoU of pairs",
        lambda: (pairwise_giou(some[:, None], some[None]), corners(torch.tensor([0.5, 0.4, 0.2, 0.6]))),
        lambda: (generalized_box_iou(some, some), torch.tensor([0.4, 0.1, 0.6, 0.7])),
        against="torchvision.ops.generalized_box_iou",
    )
    mini = yolos_mini()
    mini.reset_classifier(3)
    yield Case(
        "another number of classes",
        lambda: mini(torch.zeros(1, 3, 48, 48))[0].shape[-1],
        lambda: 4,
        against="three classes and nothing",
    )


def pairs() -> dict[str, Pair]:
    """For `paperzoo bench`."""

    def theirs() -> nn.Module:
        return TheirRaw(
            their_model(
                {
                    "width": 192,
                    "depth": 12,
                    "heads": 3,
                    "hidden": 768,
                    "image_size": (800, 1333),
                    "mid_positions": False,
                },
                100,
                91,
            )
        )

    return {
        "yolos_tiny": Pair(yolos_tiny, theirs, lambda batch: (torch.randn(batch, 3, 512, 688),), PEER, train_batch=2)
    }
